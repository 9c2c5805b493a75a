"""Calibrated quantization: oracle, observers, calibration, annotation, realization."""
