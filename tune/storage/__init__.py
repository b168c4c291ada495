"""The run folder on disk: atomic writes, locks, records, repair."""
