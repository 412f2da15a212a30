"""The kind `lightgbm`: boosted trees saved by Booster.save_model."""
