"""The kind `mlflow`: MLflow model folders of a flavour that is data."""
