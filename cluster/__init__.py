"""Launching a Ray cluster and sweeps on it: files, checks, a thin shell over `ray`, `kubectl` and `sbatch`."""
