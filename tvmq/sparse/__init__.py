"""Sparse weights: masks, the structure of zeros, one-shot pruning; what decides is NumPy, without a target."""
