"""The foundation of the other packages: launch files, running commands, secrets, Ray's token."""
