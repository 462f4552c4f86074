"""Checkpoints, the files and layouts of other programs, models that begin with another one."""
