"""Reports on runs, in every format."""
