"""Pipelines: every stage from one file, resumable."""
