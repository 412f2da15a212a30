"""The kind `transformers`: Hugging Face folders that classify or embed texts."""
