"""Prometheus metrics of the service: what an operator alarms on."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

UPLOADS = Counter("ekiben_uploads_total", "Uploads by outcome.", ["outcome"])
UPLOADED_BYTES = Counter("ekiben_uploaded_bytes_total", "Bytes of models received.")
BUILDS = Counter("ekiben_builds_total", "Finished builds by outcome.", ["outcome"])
ROLLOUTS = Counter("ekiben_rollouts_total", "Finished rollouts by outcome.", ["outcome"])
INFERENCES = Counter("ekiben_inference_requests_total", "Requests through the router.", ["deployment", "status"])
INFERENCE_SECONDS = Histogram(
    "ekiben_inference_seconds",
    "Time of a request through the router, in seconds.",
    ["deployment"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
PROJECTION_WAITING = Gauge("ekiben_mlflow_projection_waiting", "Changes that MLflow does not have yet.")
SWEEPS = Counter("ekiben_sweeps_total", "Looks for what nobody needs any more, by outcome.", ["outcome"])
FREED_BYTES = Counter("ekiben_freed_bytes_total", "Bytes freed because nobody needed them any more.")
