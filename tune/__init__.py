"""The sweep, from the command line down to files."""
