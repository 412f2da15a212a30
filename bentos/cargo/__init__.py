"""Cargo: which material is in a hold, told from a picture."""
