"""Every figure of the README, measured with real parts: `make bench` (benchmarks/README.md)."""
