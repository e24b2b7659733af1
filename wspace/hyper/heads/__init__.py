"""Heads: from a vector to the tensors of a target, whole, in pieces, one after another."""
