"""Keys of a fine-tuning, a block of them per module; `tune.config.train_spec.TrainSpec` is made of the blocks."""
