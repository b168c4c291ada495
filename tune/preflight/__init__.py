"""Checks and forecasts made before anything starts: inputs, machine, hours and cost."""
