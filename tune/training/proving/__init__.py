"""Measurements that `macdrop scan` makes on request: a proof of every layer, and first tokens of training data."""
