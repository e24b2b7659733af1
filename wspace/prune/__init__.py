"""Pruning: keep a subset of the units of every group."""
