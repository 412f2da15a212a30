"""Models of one file, by the format of the file: what they take and give, and how they answer rows.

The kinds lightgbm, xgboost, onnx and sklearn serve one format each; the kind mlflow serves all four.
"""
