"""The figures and tables of the ViT paper."""
