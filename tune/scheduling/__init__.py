"""Pure decisions: what to train, when to stop, how often to retry; without Ray and torch."""
