"""From score rows to comparisons to a verdict; without Ray and torch."""
