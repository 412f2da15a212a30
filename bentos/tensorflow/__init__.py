"""The kind `tensorflow`: SavedModel folders and Keras v3 files."""
