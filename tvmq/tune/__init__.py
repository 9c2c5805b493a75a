"""Tuning: what is free in kernels, decided by measuring; resumable, on this machine or on boards."""
