"""minivit: a Vision Transformer from scratch on arrays, every forward and backward pass written out by hand."""
