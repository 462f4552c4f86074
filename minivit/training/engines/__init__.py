"""Engines: a batch cut into micro-batches, their gradients summed, on the cores of a processor or on a GPU."""
