"""Alembic's steps for the tables of the batch jobs."""
