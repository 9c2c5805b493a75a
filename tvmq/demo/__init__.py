"""The demo: handwritten digits, from training to bundles for this machine and for a board, in one table."""
