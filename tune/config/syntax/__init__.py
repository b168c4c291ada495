"""The syntax of values that a user writes: YAML, and paths."""
