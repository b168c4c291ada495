"""What every other package needs: the launch file as read, running commands, secrets, Ray's token."""
