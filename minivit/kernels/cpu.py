"""Twins for NumPy arrays on the CPU."""
