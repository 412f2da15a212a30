"""The kind `onnx`: networks and pipelines in the ONNX format."""
