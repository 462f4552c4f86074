"""block, mlp and head: the residual path, the pooling, and that gradients are added, not written."""

from contextlib import nullcontext

import numpy as np
import pytest

from minivit.base.backend import plain
from minivit.layers.block import BLOCK_PARAMETERS, block_backward, block_forward
from minivit.layers.gelu import GELU
from minivit.layers.layernorm import layernorm_forward
from minivit.layers.mlp import mlp_backward, mlp_forward
from minivit.layers.msa import msa_forward
from minivit.model import ViTConfig, compose
from minivit.options.exact_gelu import EXACT_GELU

D, M = 6, 10
SHAPES = {
    "attn.qkv.weight": (D, 3 * D),
    "attn.qkv.bias": (3 * D,),
    "attn.proj.weight": (D, D),
    "mlp.fc1.weight": (D, M),
    "mlp.fc1.bias": (M,),
    "mlp.fc2.weight": (M, D),
}


def block_params(rng):
    return {name: rng.standard_normal(SHAPES.get(name, (D,))) for name in BLOCK_PARAMETERS}


def test_equations_2_and_3():
    rng = np.random.default_rng(0)
    p, z = block_params(rng), rng.standard_normal((2, 5, D))
    out, _ = block_forward(z, p, num_heads=2)
    u, _ = layernorm_forward(z, p["norm1.weight"], p["norm1.bias"])
    attn = [p[f"attn.{n}"] for n in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")]
    z1 = msa_forward(u, *attn, num_heads=2)[0] + z
    u, _ = layernorm_forward(z1, p["norm2.weight"], p["norm2.bias"])
    mlp = [p[f"mlp.{n}"] for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")]
    np.testing.assert_allclose(out, mlp_forward(u, *mlp)[0] + z1, rtol=1e-12)


def test_a_dropped_branch_leaves_the_residual_path():
    rng = np.random.default_rng(1)
    p, z = block_params(rng), rng.standard_normal((2, 5, D))

    class Never:  # a Generator whose draws are all below the rate
        def random(self, shape, dtype):
            return np.zeros(shape, dtype)

    config = ViTConfig(image_size=4, patch_size=2, width=D, depth=1, num_heads=2, mlp_dim=M, drop_path=0.5)
    block = compose.block(config, 0, rng=Never())
    out, cache = block.forward(z, p)
    np.testing.assert_array_equal(out, z)
    grads = {name: np.zeros_like(value) for name, value in p.items()}
    dy = rng.standard_normal(z.shape)
    np.testing.assert_array_equal(block.backward(dy, cache, grads), dy)
    assert not any(g.any() for g in grads.values())


def test_gradients_are_added_to_what_is_there():
    rng = np.random.default_rng(2)
    p, z = block_params(rng), rng.standard_normal((2, 5, D))
    out, cache = block_forward(z, p, num_heads=2)
    once = {name: np.zeros_like(value) for name, value in p.items()}
    twice = {name: np.zeros_like(value) for name, value in p.items()}
    block_backward(out, cache, once)
    for _ in range(2):
        block_backward(out, cache, twice)
    for name in p:
        np.testing.assert_array_equal(twice[name], 2 * once[name])


def test_mlp_is_two_linear_maps_around_gelu():
    rng = np.random.default_rng(3)
    x, W1, b1 = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 5)), rng.standard_normal(5)
    W2, b2 = rng.standard_normal((5, 4)), rng.standard_normal(4)
    for pair in (GELU, EXACT_GELU):
        y, cache = mlp_forward(x, W1, b1, W2, b2, activation=pair)
        np.testing.assert_allclose(y, pair.forward(x @ W1 + b1)[0] @ W2 + b2, rtol=1e-12)
    assert [g.shape for g in mlp_backward(y, cache, activation=pair)] == [
        x.shape,
        W1.shape,
        b1.shape,
        W2.shape,
        b2.shape,
    ]


def test_heads_are_their_definitions():
    """The class token alone is normalised, or all patches, before or after their mean."""
    rng = np.random.default_rng(4)
    z = rng.standard_normal((2, 5, D))
    p = {"norm.weight": rng.standard_normal(D), "norm.bias": rng.standard_normal(D)}
    p |= {"head.weight": rng.standard_normal((D, 3)), "head.bias": rng.standard_normal(3)}
    normed, _ = layernorm_forward(z, p["norm.weight"], p["norm.bias"])
    read = {"cls": normed[:, 0], "mean": normed.mean(axis=1)}
    read["avg"], _ = layernorm_forward(z.mean(axis=1), p["norm.weight"], p["norm.bias"])
    for pooling, y in read.items():
        head = compose.head(ViTConfig(image_size=4, patch_size=2, width=D, num_heads=2, pooling=pooling))
        logits, cache = head.forward(z, p)
        np.testing.assert_allclose(logits, y @ p["head.weight"] + p["head.bias"], rtol=1e-12)
        if pooling == "cls":
            dz = head.backward(np.ones((2, 3)), cache, {name: np.zeros_like(value) for name, value in p.items()})
            assert not dz[:, 1:].any() and dz[:, 0].any()
    assert np.abs(read["avg"] - read["mean"]).max() > 0.01


@pytest.mark.parametrize("kernels", [plain, nullcontext])
@pytest.mark.parametrize("reads", [1, 3])
def test_a_block_for_the_first_tokens_alone_is_the_block_of_all_where_only_those_are_read(reads, kernels):
    """Values and every gradient: those of the whole block with no gradient elsewhere, of the book and of its twin."""
    rng = np.random.default_rng(5)
    p, z = block_params(rng), rng.standard_normal((2, 5, D))
    config = ViTConfig(image_size=4, patch_size=2, width=D, depth=1, num_heads=2, mlp_dim=M)
    first = compose.block(config, 0, reads=reads)
    all_of_it, all_cache = block_forward(z, p, num_heads=2)
    with kernels():
        some, cache = first.forward(z, p)
    assert some.shape == (2, reads, D) and (cache.mlp if kernels is plain else cache).fc1.x.shape == (2, reads, D)
    np.testing.assert_allclose(some, all_of_it[:, :reads], rtol=1e-12, atol=1e-13)
    dz = np.zeros_like(z)
    dz[:, :reads] = rng.standard_normal(some.shape)
    expected = {name: np.zeros_like(value) for name, value in p.items()}
    found = {name: np.zeros_like(value) for name, value in p.items()}
    dx = block_backward(dz, all_cache, expected)
    np.testing.assert_allclose(first.backward(dz[:, :reads], cache, found), dx, rtol=1e-11, atol=1e-12)
    for name in p:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-11, atol=1e-12)
