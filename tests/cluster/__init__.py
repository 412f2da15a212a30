"""A real Kubernetes of one node for the tests, brought up from packages only: `python -m tests.cluster up`."""
