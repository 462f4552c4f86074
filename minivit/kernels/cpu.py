"""Twins for NumPy arrays on the CPU: none, since none was measured to pay.

The step's matrix products at the machine's rate take 0.78 of the plain step (0.86 without AVX-512).
Of the step of a 32 x 32, patch 4, width 192, depth 6 model in float32 (two cores with AVX-512):

    GELU       as x sigmoid(2u) or by tanh, its slope kept from the forward, in pieces of 8 Ki to 256 Ki elements:
               0.9 to 1.1 of the plain time (0.84 without AVX-512, where NumPy's tanh is slow)
    LayerNorm  in pieces of 128 to 520 rows: 1.0 to 1.3 of the plain time
    softmax    without the row maximum where all scores are small: 1 % of a step at the most
    attention  rowsum(dattn attn) as rowsum(dy y): 0.5 % of a step (`flash_attention` needs it and has it)
"""
