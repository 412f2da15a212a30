"""The kind `xgboost`: boosted trees saved by Booster.save_model as JSON or UBJ."""
