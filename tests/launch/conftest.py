"""Launch files, the launcher, and a network of hosts to launch on."""
