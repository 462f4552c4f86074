"""Accelerated twins of the hot layers: `cpu` for NumPy arrays, `cuda` for CuPy arrays.

The layers are the specification: a twin computes the same up to rounding, is tested against its plain body, and is
here because it was measured to pay. See `minivit.base.backend.accelerated`.
"""
