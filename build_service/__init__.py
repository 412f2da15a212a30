"""The API, the control loop, the platforms and the router."""

VERSION = "0.1.0"
