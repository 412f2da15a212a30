"""Forecasts as scheduled work: sales are written down, forecasts beside them, and later compared with what came.

    python -m bentos.forecast.batch register  --database URL --csv sales.csv     what was sold, and what is planned
    python -m bentos.forecast.batch predict   --database URL --url http://…      the next days, by the live model
    python -m bentos.forecast.batch evaluate  --database URL                     errors of the days that have come

PostgreSQL or SQLite. Each job may be repeated, and goes on where it was ended. Never part of a Bento
(bentos/serving/images.py leaves folders of this name out).
"""
