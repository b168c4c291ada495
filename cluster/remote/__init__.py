"""Code that runs on the hosts: answers about the head, and the watch for spot termination notices."""
