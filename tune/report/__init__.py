"""What a run's results say, in every format."""
