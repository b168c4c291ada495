"""From YAML and `key=value` overrides to a validated `RunSpec`."""
