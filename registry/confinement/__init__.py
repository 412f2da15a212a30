"""Starts programs that are not trusted: with bounds, without rights, and with an end for all that they start.

`supervisor.py` is a script of its own. What it needs is here and imports the standard library alone, as one copy runs
for each program.
"""
