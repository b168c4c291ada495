"""Lanes: Ray Train runs that keep a base model resident and train task after task."""
