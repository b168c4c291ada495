"""From rows of text to token ids and label masks."""
