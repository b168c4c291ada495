"""The verbs of `macdrop cluster`, a module each (the verbs on jobs share one)."""
