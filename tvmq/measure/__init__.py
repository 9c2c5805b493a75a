"""Benchmarks, verification and reports."""
