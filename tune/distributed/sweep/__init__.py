"""A whole run and its studies: search, control loop, trials."""
