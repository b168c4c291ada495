"""Optimizers of the adapter: what its tensors are and start as, what is kept for each, and how that is saved."""
