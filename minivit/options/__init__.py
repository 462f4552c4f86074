"""What later Vision Transformers added, each a pair that composes with those of `minivit.layers`."""
