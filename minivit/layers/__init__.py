"""The book: the layers of the paper, the derivation in a module's docstring, X_forward and X_backward on one screen.

Reading order: linear (also says how every layer is written), layernorm, gelu, softmax, attention, msa, mlp, block,
patch_embed, head, loss, and, for training, dropout and drop_path. `minivit.model.vit` calls them, and
`minivit.training.task` joins forward, loss and backward. What later models added stands in `minivit.options`.
"""
