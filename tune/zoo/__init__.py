"""The built-in tiny models and data: names and files; nothing is built here."""
