"""Verdicts of a proof: whether a model depends on its massive weights (`macdrop.proof`). Imports nothing heavy."""

SENSITIVE, BORDERLINE, NOT_SENSITIVE = "sensitive", "borderline", "not sensitive"
