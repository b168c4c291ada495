"""Fault-tolerant pools of evaluation and judge actors."""
