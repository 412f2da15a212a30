"""The kind `sklearn`: scikit-learn estimators and pipelines saved by skops."""
