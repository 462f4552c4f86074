"""One file per layer: the derivation in the module docstring, X_forward and X_backward on one screen.

Reading order: linear, layernorm, gelu, softmax, attention, flash_attention, msa, mlp, dropout, drop_path,
layer_scale, block, patch_embed, registers, sequence_pool, head; of the hybrids conv2d, weight_standardization,
groupnorm, relu, max_pool, resnet.
"""
