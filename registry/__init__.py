"""What is kept: object store, manifests, formats, archives, versions, kinds, the MLflow projection."""
