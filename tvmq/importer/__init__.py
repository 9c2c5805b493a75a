"""Models from other frameworks to canonical Relax."""
