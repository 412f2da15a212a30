"""The kind `text`: a text in; its label with scores, and its embedding, out."""
