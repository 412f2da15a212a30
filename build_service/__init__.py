"""The API, the control loop, the platforms and the router."""
