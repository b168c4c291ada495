"""One fine-tuning in one process group; without Ray."""
