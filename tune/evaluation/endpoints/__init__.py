"""Clients of OpenAI-compatible endpoints: what they share, and the server that generates answers."""
