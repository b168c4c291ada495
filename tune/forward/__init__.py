"""Forward passes of a language model, for training and scoring: which tokens see each other, where logits are read."""
