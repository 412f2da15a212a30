"""What the training programs of the task kinds share: options, progress, the model folder, MLflow, the upload.

Never part of a Bento, and no kind: what is served imports nothing from here.
"""
