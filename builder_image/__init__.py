"""What runs inside a build: version → Bento → environment → layers → OCI image."""
