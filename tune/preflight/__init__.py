"""What can be known before anything starts: inputs, machine, forecast."""
