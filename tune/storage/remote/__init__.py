"""Copies of a run in an object store: finished trials, scores and the report, whole or not at all."""
