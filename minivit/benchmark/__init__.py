"""Time and memory, against other programs and the matrix products alone."""
