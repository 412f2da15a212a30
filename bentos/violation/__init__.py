"""Violations of a service that shares pictures of animals: pictures without an animal."""
