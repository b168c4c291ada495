"""Keys of OpenAI-compatible endpoints: their addresses, and the one that generates answers."""
