"""Measures of the user's own: metrics that are Python functions, and the files that travel to the actors for them."""
