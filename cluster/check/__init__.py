"""Offline checks of launch files: what is wrong, where, why, and the remedy."""
