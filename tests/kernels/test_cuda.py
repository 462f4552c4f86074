"""The CUDA path against the plain functions: on an emulator everywhere, on a GPU with ``python -m pytest -m gpu``."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from emulator import Emulator

from minivit.base import backend
from minivit.base import params as parameters
from minivit.base.backend import plain, to_host
from minivit.kernels import cuda
from minivit.kernels.cublas import ArrayProducts
from minivit.kernels.nvrtc import usual_sizes
from minivit.laboratory.cases import LAYERS, NEED_SCIPY
from minivit.layers.dropout import dropout_backward, dropout_forward
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.layers.patch_embed import patch_embed_forward
from minivit.masked import MaskedConfig, MaskedViT, draw_plan, patch_loss, patch_loss_gradient
from minivit.model import ViT, ViTConfig
from minivit.optim import EMA, SGD, Adam, AdamW, Muon, orthogonalise
from minivit.options.dropping import drop_path_rate
from minivit.training.engines.gpu import CudaEngine
from minivit.training.step import Batch
from minivit.training.step_gpu import CudaStep
from minivit.training.task import cross_entropy

SMALL = ViTConfig(image_size=8, patch_size=4, width=24, depth=2, num_heads=3, mlp_dim=40, num_classes=10)
LONG = replace(SMALL, image_size=40, depth=1)  # 101 tokens: attention through products
CONFIGS = {
    "cls": SMALL,
    "mean": replace(SMALL, pooling="mean", gelu="erf", pos_embed="sincos2d"),
    "none": replace(SMALL, pos_embed="none", depth=1, num_heads=1, mlp_dim=4, num_classes=1),
    "odd": replace(SMALL, mlp_dim=42),  # what comes after the first MLP begins in the middle of four numbers
    "path": replace(SMALL, drop_path=0.5, depth=3),
    "wide": replace(SMALL, width=260, num_heads=5, patch_size=2, pre_logits=7),  # rows end in the middle of a warp
    "layer_scale": replace(SMALL, layer_scale=0.1, drop_path=0.5),
    "qk_norm": replace(SMALL, qk_norm=True),
    "avg": replace(SMALL, pooling="avg", registers=2),
    "seq": replace(SMALL, pooling="seq", registers=2),
    "registers": replace(SMALL, registers=3, drop_path=0.5),
    "learned2d": replace(SMALL, pos_embed="learned2d", pos_at="every", registers=1),
    "shared": replace(SMALL, pos_at="shared", registers=3),
    "relative": replace(SMALL, pos_embed="relative", pos_at="shared", drop_path=0.5),
    "axial": replace(SMALL, attention="axial", pooling="mean", image_size=12, drop_path=0.5, depth=3),
    "long": replace(LONG, drop_path=0.3),  # one block: it has the full rate
}


@pytest.fixture(scope="session")
def emulator():
    return Emulator()


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def xp(request, monkeypatch):
    """NumPy with its twins replaced by the CUDA ones on the emulator; CuPy."""
    with ExitStack() as stack:
        if request.param == "emulator":
            monkeypatch.setitem(backend.TWINS, "numpy", "minivit.kernels.cuda")
            stack.enter_context(cuda.using(request.getfixturevalue("emulator")))
            yield np
        else:
            import cupy

            backend.use_device("cuda:0")
            cuda.machine().precision = "float32"
            yield cupy


def parameters_of(config, dtype=np.float32):
    """Parameters that leave nothing at zero, so that every gradient matters."""
    flat = ViT(config, dtype=np.float64).flat
    return (flat + 0.1 * np.random.default_rng(1).standard_normal(flat.shape)).astype(dtype)


def batch_of(config, n=None, seed=0):
    n = n or (5 if config.num_tokens < 50 else 3)
    rng = np.random.default_rng(seed)
    shape = (n, config.image_size, config.image_size, config.channels)
    return rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, config.num_classes, n)


def one_pass(model, images, labels, rng=None, *, recompute=False):
    """Logits, loss and every gradient, on the host."""
    logits, cache = model.forward(images, rng=rng, recompute=recompute)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=0.1, denominator=7)
    flat, grads = model.gradient_buffer()
    for _ in range(2):  # gradients are added to what is there
        model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    return to_host(logits), float(loss), {name: to_host(g) / 2.0 for name, g in grads.items()}


def assert_close(actual, expected, tolerance, name=""):
    scale = np.abs(expected).max()
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert error <= tolerance * max(scale, 1e-6), f"{name}: {error:.1e} off, where the largest is {scale:.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_model_is_the_plain_one_in_float64(xp, name):
    config = CONFIGS[name]
    images, labels = batch_of(config)
    with plain():
        expected = one_pass(
            ViT(config, flat=parameters_of(config, np.float64)), images, labels, np.random.default_rng(3)
        )
    model = ViT(config, flat=xp.asarray(parameters_of(config)))
    logits, loss, grads = one_pass(model, xp.asarray(images), xp.asarray(labels), np.random.default_rng(3))
    assert_close(logits, expected[0], 1e-5, "logits")
    assert loss == pytest.approx(expected[1], rel=1e-5)
    largest = max(np.abs(g).max() for g in expected[2].values())
    for key, gradient in expected[2].items():
        # the keys' bias has no gradient: nothing but rounding is there to compare
        assert_close(grads[key], gradient, 2e-5 * max(1.0, 0.01 * largest / max(np.abs(gradient).max(), 1e-9)), key)


ROUNDING = {"tf32": 8 * 2**-10, "bf16": 8 * 2**-8}  # of a gradient, relative to its norm: some roundings in a row


@pytest.fixture(params=ROUNDING)
def precision(xp, request):
    """The machine in a precision below float32."""
    cuda.machine().precision = request.param
    yield request.param
    cuda.machine().precision = "float32"


@pytest.mark.parametrize("attention", ["tensor cores", "float32", "products"])
@pytest.mark.parametrize("name", ["cls", "path", "mean", "long"])
def test_rounded_factors_give_the_plain_model_up_to_their_bits(xp, precision, name, attention, monkeypatch):
    if attention == "float32":
        monkeypatch.setattr(cuda.machine(), "has_tf32", False)
    if attention == "products":  # as where a block's shared memory is too small for so many tokens
        monkeypatch.setattr(cuda.machine(), "shared_memory", 0)
    config = CONFIGS[name]
    images, labels = batch_of(config)
    with plain():
        exact = ViT(config, flat=parameters_of(config, np.float64))
        expected = one_pass(exact, images, labels, np.random.default_rng(3))
    model = ViT(config, flat=xp.asarray(parameters_of(config)))
    found = one_pass(model, xp.asarray(images), xp.asarray(labels), np.random.default_rng(3))
    assert found[1] == pytest.approx(expected[1], rel=1e-2)
    for key, gradient in expected[2].items():
        actual = found[2][key]
        if key.endswith("qkv.bias"):  # a third of it, the keys', is zero but for rounding
            actual, gradient = (np.delete(g.reshape(3, -1), 1, axis=0) for g in (actual, gradient))
        error = np.linalg.norm(actual - gradient) / np.linalg.norm(gradient)
        assert error < ROUNDING[precision], f"{key}: {error:.1%}"
    with cuda.rounded(model.flat):  # one rounded copy of the parameters, not one each time
        once = one_pass(model, xp.asarray(images), xp.asarray(labels), np.random.default_rng(3))
    assert once[1] == found[1]
    for key, gradient in once[2].items():
        np.testing.assert_array_equal(gradient, found[2][key])


@pytest.mark.parametrize("precision", cuda.PRECISIONS)
@pytest.mark.parametrize("name", ["path", "long"])
def test_products_without_cublas_give_the_same_model(emulator, name, precision, monkeypatch):
    """Those of strided stacks too, and of numbers that are stored as bfloat16."""
    monkeypatch.setitem(backend.TWINS, "numpy", "minivit.kernels.cuda")
    monkeypatch.setattr(emulator, "precision", precision)
    config, found = CONFIGS[name], []
    for blas in (emulator.blas(), ArrayProducts()):
        monkeypatch.setattr(emulator, "_blas", blas)
        before = emulator.launches.copy()
        with cuda.using(emulator):
            model = ViT(config, flat=parameters_of(config))
            found.append(one_pass(model, *batch_of(config), np.random.default_rng(3)))
        made = emulator.launches - before
        assert (made["matmul"] > 0) == (type(blas) is not ArrayProducts) and made["adam"] == 0 < made["embed"]
    expected, actual = found
    tolerance = ROUNDING.get(precision, 2e-5)
    assert actual[1] == pytest.approx(expected[1], rel=tolerance)
    for key, gradient in expected[2].items():
        mine = actual[2][key]
        if key.endswith("qkv.bias"):  # a third of it, the keys', is zero but for rounding
            mine, gradient = (np.delete(g.reshape(3, -1), 1, axis=0) for g in (mine, gradient))
        assert np.linalg.norm(mine - gradient) < tolerance * np.linalg.norm(gradient), key


def test_a_run_that_diverges_in_bf16_does_not_look_finite(xp):
    values = xp.asarray([0.0, 1.0, np.inf, -np.inf, np.nan, np.nan, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    values.view(np.uint32)[4:6] = xp.asarray([0x7FFFFFFF, 0xFFFFFFFF], np.uint32)  # a GPU's
    found = (to_host(cuda._round(values)).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(found, np.float32([0.0, 1.0, np.inf, -np.inf, np.nan, np.nan, 1.0, 1 + 2**-6]))


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_products_without_cublas_scale_add_and_round(emulator, dtype):
    rng = np.random.default_rng(0)

    def stored(*shape):
        x = rng.standard_normal(shape, np.float32)
        return x if dtype == np.float32 else (x.view(np.uint32) >> 16).astype(np.uint16)

    a, b = stored(2, 5, 3).swapaxes(1, 2), stored(2, 5, 4)
    for out_dtype in (np.float32, dtype):
        for settings in ({"alpha": 0.7}, {"add": True}):
            found, expected = (np.ones((2, 3, 4), out_dtype) for _ in range(2))
            ArrayProducts().matmul(a, b, found, **settings)
            emulator.blas().matmul(a, b, expected, **settings)
            if out_dtype == np.uint16:
                assert np.abs(found.astype(int) - expected).max() <= 1  # of the last bit
            else:
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("exact", "stored"), [
    (1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-20, 1 + 2**-7), (-np.inf, -np.inf), (np.nan, np.nan),
])  # fmt: skip
def test_products_without_cublas_round_to_even_and_keep_what_is_not_finite(exact, stored):
    factor, out = np.full((1, 1), exact, np.float32), np.empty((1, 1), np.uint16)
    factor.view(np.uint32)[np.isnan(factor)] = 0x7FFFFFFF  # a GPU's
    ArrayProducts().matmul(factor, np.ones((1, 1), np.float32), out)
    np.testing.assert_array_equal((out.astype(np.uint32) << 16).view(np.float32), np.float32(stored))


@pytest.mark.parametrize("precision", cuda.PRECISIONS)
@pytest.mark.parametrize("name", ["cls", "long"])
def test_parameters_may_begin_anywhere(xp, name, precision, monkeypatch):
    """As views of the flat buffer they are aligned to 4 bytes alone: vectors of 16 are not read from them."""
    monkeypatch.setattr(cuda.machine(), "precision", precision)
    config = CONFIGS[name]
    images, labels = map(xp.asarray, batch_of(config))
    aligned = xp.asarray(parameters_of(config))
    moved = xp.empty(len(aligned) + 1, np.float32)[1:]
    moved[:] = aligned
    with cuda.rounded(aligned):
        expected = one_pass(ViT(config, flat=aligned), images, labels)
    with cuda.rounded(moved):
        found = one_pass(ViT(config, flat=moved), images, labels)
    np.testing.assert_array_equal(found[0], expected[0])
    for key, gradient in expected[2].items():
        np.testing.assert_array_equal(found[2][key], gradient)


def test_the_decoder_of_a_masked_autoencoder_comes_after_an_odd_number_of_classes(xp):
    config, masked = replace(SMALL, num_classes=9), MaskedConfig(method="mae", decoder_width=8, decoder_heads=2)
    images, _ = batch_of(config)
    plan = draw_plan(config, masked, len(images), np.random.default_rng(0))
    flat = MaskedViT(config, masked, dtype=np.float64).flat
    flat += 0.1 * np.random.default_rng(1).standard_normal(flat.shape)

    def gradients(model, images, plan):
        prediction, cache = model.forward(images, plan)
        loss, _, loss_cache = patch_loss(prediction, model.targets(images, plan))
        _, grads = model.gradient_buffer()
        model.backward(patch_loss_gradient(1.0, loss_cache), cache, grads)
        return {"loss": np.array(float(loss))} | {name: to_host(g) for name, g in grads.items()}

    with plain():
        expected = gradients(MaskedViT(config, masked, flat=flat), images, plan)
    model = MaskedViT(config, masked, flat=xp.asarray(flat.astype(np.float32)))
    largest = max(np.abs(g).max() for g in expected.values())
    for key, gradient in gradients(model, xp.asarray(images), xp.asarray(plan)).items():
        assert_close(
            gradient, expected[key], 2e-5 * max(1.0, 0.01 * largest / max(np.abs(expected[key]).max(), 1e-9)), key
        )


@pytest.mark.parametrize(
    ("width", "heads", "shared_memory", "fused"),
    [
        (64, 1, 227 << 10, True),
        (64, 1, 110 << 10, False),  # the forward would fit
        (24, 3, 64 << 10, True),
        (192, 1, 227 << 10, False),
    ],
)
def test_attention_in_shared_memory_wants_room_for_its_backward(xp, width, heads, shared_memory, fused, monkeypatch):
    monkeypatch.setattr(cuda.machine(), "shared_memory", shared_memory)
    config = replace(SMALL, image_size=32, width=width, num_heads=heads, depth=1)  # 65 tokens
    assert (cuda._fused(65, width // heads) is not None) == fused
    images, labels = batch_of(config, 2)
    with plain():
        expected = one_pass(ViT(config, flat=parameters_of(config, np.float64)), images, labels)
    model = ViT(config, flat=xp.asarray(parameters_of(config)))
    found = one_pass(model, xp.asarray(images), xp.asarray(labels))
    assert_close(found[0], expected[0], 1e-5, "logits")
    for key in ("blocks.0.attn.qkv.weight", "pos_embed"):
        assert_close(found[2][key], expected[2][key], 2e-5, key)


def test_on_tensor_cores_many_tokens_are_loaded_in_parts(xp, precision):
    """A block of more than 256 threads has registers for half of a thread's share of heads of 64 numbers at a time."""
    config = replace(SMALL, image_size=48, width=64, num_heads=1, depth=1)  # 145 tokens: ten warps
    images, labels = batch_of(config, 1)
    assert cuda._tensor_cores(145, 64)[0] > 256
    with plain():
        expected = one_pass(ViT(config, flat=parameters_of(config, np.float64)), images, labels)
    model = ViT(config, flat=xp.asarray(parameters_of(config)))
    found = one_pass(model, xp.asarray(images), xp.asarray(labels))
    for key in ("blocks.0.attn.qkv.weight", "pos_embed"):
        error = np.linalg.norm(found[2][key] - expected[2][key]) / np.linalg.norm(expected[2][key])
        assert error < ROUNDING[precision], f"{key}: {error:.1%}"


def test_stacks_of_bfloat16_matrices_begin_at_multiples_of_16_bytes(xp, monkeypatch):
    """cuBLAS asks for it where the sums are over a multiple of 8 numbers, such as 16 tokens."""
    monkeypatch.setattr(cuda.machine(), "precision", "bf16")
    monkeypatch.setattr(cuda.machine(), "shared_memory", 0)
    config = replace(SMALL, image_size=16, pooling="mean", num_heads=2, depth=1)  # heads of 12 numbers
    images, labels = batch_of(config)
    with plain():
        expected = one_pass(ViT(config, flat=parameters_of(config, np.float64)), images, labels)
    model = ViT(config, flat=xp.asarray(parameters_of(config)))
    found = one_pass(model, xp.asarray(images), xp.asarray(labels))
    for key in ("blocks.0.attn.qkv.weight", "pos_embed"):
        error = np.linalg.norm(found[2][key] - expected[2][key]) / np.linalg.norm(expected[2][key])
        assert error < ROUNDING["bf16"], f"{key}: {error:.1%}"


def test_the_largest_sizes_that_run_are_compiled_by_the_check(emulator, monkeypatch):
    monkeypatch.setattr(emulator, "precision", "tf32")
    checked = [dict(sizes) for sizes in usual_sizes("sm_90")]
    checked = {(sizes["TOKENS"], sizes["HEAD"], "TENSOR" in sizes) for sizes in checked if "TOKENS" in sizes}
    with cuda.using(emulator):
        for Dh in (8, 16, 32, 64, 128):
            assert (max(N for N in range(1, 600) if cuda._tensor_cores(N, Dh)), Dh, True) in checked
        assert (96, max(Dh for Dh in range(4, 1028, 4) if cuda._fused(96, Dh)), False) in checked
        assert (4, max(Dh for Dh in range(4, 1028, 4) if cuda._fused(4, Dh)), False) in checked


BARRIER = "= sum;\n  __syncthreads();\n  if (threadIdx.y == 0 && c < cols) {\n    for (int i = 1; i < 16"
PLANTED = {  # mistakes in kernels.cu: what is right, and what stands there instead
    "layernorm: the mean is not taken off": ("v[k] = v[k] - mean;", ""),
    "layernorm backward: the term along xhat": ("(d[k] - mean) - along * x[k]", "d[k] - mean"),
    "layernorm backward: a barrier": ("    __syncthreads();\n  }\n}\n#endif", "  }\n}\n#endif"),
    "column sums: some rows": ("row += gridDim.y * 8", "row += rows"),
    "partial sums: a barrier": (BARRIER, BARRIER.replace("  __syncthreads();\n", "")),
    "gelu: the second term": ("return s + x * s * (1.f - s)", "return s + x * (1.f - s)"),
    "attention: padded keys count": ("j < TOKENS ? __expf(row[j] - largest) : 0.f", "__expf(row[j] - largest)"),
    "attention: dk from k": ("scores_transposed_times_rows(ds, q", "scores_transposed_times_rows(ds, k"),
    "embedding: a bias for the class token": ("cls[d] : bias[d]", "cls[d] + bias[d] : bias[d]"),
    "loss backward: one row's targets": ("* p[i] - t[i])", "* p[i] - t[i % K])"),
    "loss: the score of the class": ("dot += t[start + k] * shifted", "dot += t[start + k] * e"),
    "tensor cores: padded keys count": ("s[n][e] = 8 * (first + n) + 2 * t + e % 2 < TOKENS ?", "s[n][e] = true ?"),
    "tensor cores: delta twice": ("if (q == 0) delta[n] = dot;", "if (q == 0) delta[n] = 2.f * dot;"),
    "tensor cores: factors are not rounded": ("a[0] = to_tf32(c[0])", "a[0] = c[0]"),
    "tensor cores: rows in the wrong order": ("(k0 + 2 * (threadIdx.x % 4))", "(k0 + threadIdx.x % 4)"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_in_a_kernel_is_caught(name, monkeypatch):
    right, wrong = PLANTED[name]
    source, precision = cuda.SOURCE.read_text(), "tf32" if name.startswith("tensor") else "float32"
    assert right in source
    config = replace(SMALL, depth=1, drop_path=0.3, image_size=12)
    images, labels = batch_of(config, 4)
    with plain():
        exact = ViT(config, flat=parameters_of(config, np.float64))
        _, loss, grads = one_pass(exact, images, labels, np.random.default_rng(3))
    monkeypatch.setitem(backend.TWINS, "numpy", "minivit.kernels.cuda")
    found = {}
    for text in (source, source.replace(right, wrong, 1)):
        with cuda.using(Emulator(text)) as machine:
            machine.precision = precision
            _, value, gradients = one_pass(
                ViT(config, flat=parameters_of(config)), images, labels, np.random.default_rng(3)
            )
        errors = [np.linalg.norm(gradients[k] - g) / np.linalg.norm(g) for k, g in grads.items() if "qkv.bias" not in k]
        found[text is source] = max(*errors, abs(value - loss))  # NaN counts as large
    allowed = 1e-4 if precision == "float32" else ROUNDING[precision]
    assert found[True] < allowed and not found[False] < allowed


@pytest.mark.parametrize("name", ["cls", "long"])
def test_no_plain_body_of_a_block_runs(xp, name, monkeypatch):
    config = CONFIGS[name]
    kinds = []
    original = cuda.block_forward

    def seen(*arguments, **settings):
        result = original(*arguments, **settings)
        kinds.append(result is not NotImplemented)
        return result

    seen.__module__ = cuda.__name__
    monkeypatch.setattr(cuda, "block_forward", seen)
    images, _ = batch_of(config)
    ViT(config, flat=xp.asarray(parameters_of(config))).forward(xp.asarray(images))
    assert kinds == [True] * config.depth


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_patches_are_cut_and_bytes_scaled_to_the_bit(xp, dtype, contiguous):
    rng = np.random.default_rng(0)
    images = np.arange(2 * 8 * 12 * 3, dtype=np.uint8).reshape(2, 8, 12, 3)  # every byte
    if dtype == np.float32:
        images = rng.standard_normal(images.shape).astype(np.float32)
    W, b = rng.standard_normal((48, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    cls_token, pos_embed = rng.standard_normal((1, 1, 8)), rng.standard_normal((1, 7, 8))
    arguments = W, b, cls_token.astype(np.float32), pos_embed.astype(np.float32)
    with plain():
        z, cache = patch_embed_forward(images, *arguments, patch_size=4)
    given = xp.asarray(images) if contiguous else xp.asarray(images[:, :, ::-1].copy())[:, :, ::-1]
    found, made = patch_embed_forward(given, *map(xp.asarray, arguments), patch_size=4)
    patches = to_host(made.patches).reshape(2, 7, 48)
    assert not patches[:, 0].any()  # the class token's
    np.testing.assert_array_equal(patches[:, 1:], cache.proj.x)
    assert_close(to_host(found), z, 1e-6)


def test_what_is_not_covered_runs_plain(xp):
    images, labels = batch_of(SMALL)
    for config, dtype in (
        (SMALL, np.float64), (replace(SMALL, dropout=0.2, attention_dropout=0.1), np.float64),
        (replace(SMALL, width=18, num_heads=3), np.float32),
    ):  # fmt: skip
        with plain():
            expected = one_pass(
                ViT(config, flat=parameters_of(config, dtype)), images, labels, np.random.default_rng(3)
            )
        model = ViT(config, flat=xp.asarray(parameters_of(config, dtype)))
        _, loss, grads = one_pass(model, xp.asarray(images), xp.asarray(labels), np.random.default_rng(3))
        assert loss == pytest.approx(expected[1], rel=1e-5)
        for key, gradient in expected[2].items():
            assert_close(grads[key], gradient, 1e-3, key)


def test_loss_of_targets_that_are_no_probabilities(xp):
    rng = np.random.default_rng(0)
    logits, targets = 3 * rng.standard_normal((9, 35)), rng.random((9, 35))
    with plain():
        loss, cache = softmax_cross_entropy_forward(logits, targets, label_smoothing=0.2, denominator=4)
        dlogits = softmax_cross_entropy_backward(0.7, cache)
    arrays = (xp.asarray(array.astype(np.float32)) for array in (logits, targets))
    found, cache = softmax_cross_entropy_forward(*arrays, label_smoothing=0.2, denominator=4)
    assert type(cache) is cuda.CudaCrossEntropyCache and float(found) == pytest.approx(loss, rel=1e-5)
    assert_close(to_host(softmax_cross_entropy_backward(0.7, cache)), dlogits, 1e-5)


def philox_uniform(key, n):
    """The first n uniform numbers of a key, by Salmon et al. (2011): Philox 4x32-10, upper 24 bits of each word."""
    c = np.zeros((4, -(-n // 4)), np.uint64)
    c[0] = np.arange(c.shape[1])
    k0, k1, low = int(key) & 0xFFFFFFFF, int(key) >> 32, np.uint64(0xFFFFFFFF)
    for _ in range(10):
        m0, m1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high0, high1 = m0 >> np.uint64(32), m1 >> np.uint64(32)
        c = np.stack([high1 ^ c[1] ^ np.uint64(k0), m1 & low, high0 ^ c[3] ^ np.uint64(k1), m0 & low])
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return (c.T.reshape(-1)[:n] >> np.uint64(8)) * 2.0**-24


def test_philox_is_the_published_one():
    """The generator's known answer for a counter and key of zeros (Random123's kat_vectors)."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_uniform(0, 4).tolist() == [(word >> 8) / 2**24 for word in words]


SPOILT_DROPOUT = {
    "": "", "fewer rounds": ("round < 10", "round < 9"), "half a key": ("(unsigned)(key[0] >> 32)", "0u"),
    "one word for four": ("(float)(c[e] >> 8)", "(float)(c[0] >> 8)"), "kept are not scaled": ("scale * x[j]", "x[j]"),
    "the last ones": ("if (j < size) y[j]", "if (j + 1 < size) y[j]"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT_DROPOUT)
def test_dropout_draws_its_mask_from_its_key_forward_and_backward(name, monkeypatch, emulator):
    monkeypatch.setitem(backend.TWINS, "numpy", "minivit.kernels.cuda")
    machine = Emulator(emulator.source.replace(*SPOILT_DROPOUT[name])) if name else emulator
    x = np.random.default_rng(0).standard_normal((37, 123), np.float32)
    key = np.random.default_rng(1).integers(0, 2**64, 1, np.uint64)
    expected = x * (philox_uniform(key[0], x.size).reshape(x.shape) >= 0.3) / 0.7
    with cuda.using(machine):
        y, cache = dropout_forward(x, rate=0.3, rng=np.random.default_rng(1))
        dx = dropout_backward(x, cache)
    right = np.allclose(y, expected, rtol=1e-6) and np.array_equal(y, dx)
    assert right == (not name)
    assert not any(isinstance(value, np.ndarray) and value.size > 1 for value in cache)  # no mask is stored


class FromDraws:
    """A Generator for the plain functions that has them drop what `cuda.Draws` has the kernels drop."""

    def __init__(self, factors, keys):
        self.branches = iter(factors)
        self.keys = iter(keys)

    def random(self, shape, dtype):
        if shape[1:] == (1,) * (len(shape) - 1):  # stochastic depth: 0 is below any rate
            return (next(self.branches) > 0.0).astype(dtype).reshape(shape)
        return philox_uniform(next(self.keys), np.prod(shape)).reshape(shape)


DROPPING = {
    "all": replace(SMALL, dropout=0.3, attention_dropout=0.2, drop_path=0.4, depth=3),
    "dropout": replace(SMALL, dropout=0.3, pooling="mean"), "attention": replace(SMALL, attention_dropout=0.4),
}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", DROPPING)
def test_a_model_with_dropout_is_the_plain_one_with_the_same_masks(xp, name, recompute):
    config = DROPPING[name]
    images, labels = batch_of(config)
    exact = ViT(config, flat=parameters_of(config, np.float64))
    rates = [drop_path_rate(config, i) for i in range(config.depth)]
    step = CudaStep(CudaEngine(ViT(config, flat=xp.asarray(parameters_of(config)))), AdamW(xp.zeros(1), xp.zeros(1)))
    draws = cuda.Draws.draw(np.random.default_rng(8), rates, len(images), step._keys)
    with plain():
        expected = one_pass(exact, images, labels, FromDraws(*draws))
    assert step._keys == {"all": 13, "dropout": 7, "attention": 2}[name]
    rng = cuda.Draws(*map(xp.asarray, draws))
    found = one_pass(step.engine.model, xp.asarray(images), xp.asarray(labels), rng, recompute=recompute)
    assert_close(found[0], expected[0], 1e-5, "logits")
    for key, gradient in expected[2].items():
        floor = 1e-2 * max(np.abs(g).max() for g in expected[2].values())
        assert_close(found[2][key], gradient, 2e-5 * max(1.0, floor / max(np.abs(gradient).max(), 1e-9)), key)


def steps_of(xp, optimizer, config, *, graph, count=4, batch=6, micro_batch=0, average=True, clip_norm=0.5):
    """Some steps of training: the figures of each, the parameters, the average, and the `CudaStep`."""
    model = ViT(config, flat=xp.asarray(parameters_of(config)))
    mask = xp.asarray(parameters.decay_mask(model.table))
    settings = {"weight_decay": 0.1}
    if optimizer is not SGD:  # a large eps: where a true gradient is zero, Adam would blow its rounding up
        settings |= {"betas": (0.8, 0.9), "eps": 1e-3}
    if optimizer is Muon:
        settings |= {"table": model.table, "momentum": 0.8}
    chosen = optimizer(model.flat, mask, **settings)
    ema = EMA(model.flat, 0.9) if average else None
    engine = CudaEngine(model, partial(cross_entropy, label_smoothing=0.1), micro_batch=micro_batch, seed=5)
    step = CudaStep(engine, chosen, ema, clip_norm=clip_norm, graph=graph)
    figures = []
    for i in range(count):
        images, labels = batch_of(config, 3 if i == count - 1 else batch, seed=i)  # the last one is short
        results = step([Batch(i, xp.asarray(images), xp.asarray(labels))], len(images), 1e-2 / (1 + i))
        figures.append([float(result) for result in results])
    return np.array(figures), to_host(model.flat), ema and to_host(ema.flat), step


@pytest.mark.parametrize("optimizer", [AdamW, Adam, SGD, Muon])
def test_steps_are_the_plain_ones(xp, optimizer):
    config = CONFIGS["path"]
    with plain():
        expected = steps_of(np, optimizer, config, graph=False)
    for graph in (False, True) if xp is not np else (False,):
        figures, flat, average, step = steps_of(xp, optimizer, config, graph=graph)
        np.testing.assert_allclose(figures, expected[0], rtol=2e-4)
        assert_close(flat, expected[1], 2e-4)
        assert_close(average, expected[2], 2e-4)
        assert step.fused == (optimizer is not SGD)
        assert step.optimizer.steps == step.average.steps == 4


@pytest.mark.parametrize("name", ["learned2d", "shared", "relative", "axial"])
def test_steps_with_positions_in_the_blocks_and_axial_attention(xp, name):
    config = CONFIGS[name]
    with plain():
        expected = steps_of(np, AdamW, config, graph=False)
    for graph in (False, True) if xp is not np else (False,):
        figures, flat, _, step = steps_of(xp, AdamW, config, graph=graph)
        assert step.fused and step._sequences == (3 if name == "axial" else 1)
        assert step.replays == 2 * graph  # neither the first of the four, nor the last, which is short
        np.testing.assert_allclose(figures, expected[0], rtol=2e-4)
        assert_close(flat, expected[1], 2e-4)


def test_a_block_with_relative_positions_is_left_to_the_plain_function(xp, monkeypatch):
    """The others with the options of positions and axial attention run their kernels."""
    covered = {}
    original = cuda.block_forward
    for name in ("relative", "learned2d", "shared", "axial"):
        kinds = covered[name] = []

        def seen(*arguments, kinds=kinds, **settings):
            result = original(*arguments, **settings)
            kinds.append(result is not NotImplemented)
            return result

        seen.__module__ = cuda.__name__
        monkeypatch.setattr(cuda, "block_forward", seen)
        images, _ = batch_of(CONFIGS[name])
        ViT(CONFIGS[name], flat=xp.asarray(parameters_of(CONFIGS[name]))).forward(xp.asarray(images))
    assert {name: set(kinds) for name, kinds in covered.items()} == {
        "relative": {False}, "learned2d": {True}, "shared": {True}, "axial": {True}
    }  # fmt: skip


def test_micro_batches_add_up(xp):
    whole = steps_of(xp, AdamW, SMALL, graph=False)
    parts = steps_of(xp, AdamW, SMALL, graph=False, micro_batch=3)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-4)
    assert_close(parts[1], whole[1], 1e-4)


def test_a_batch_that_does_not_fit_is_cut(xp, monkeypatch):
    config = CONFIGS["path"]
    expected = steps_of(xp, AdamW, config, graph=False, micro_batch=2)
    original = ViT.forward

    def forward(self, images, **settings):
        if len(images) > 2:
            raise MemoryError("Out of memory allocating 9 bytes")
        return original(self, images, **settings)

    monkeypatch.setattr(ViT, "forward", forward)
    said = r"6 images at a time do not fit .*9 bytes.*: going on with 3, as --gpu-micro-batch 3 would"
    with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match="3 images .* going on with 2"):
        found = steps_of(xp, AdamW, config, graph=False)
    for a, b in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    monkeypatch.setattr(ViT, "forward", lambda *a, **k: (_ for _ in ()).throw(MemoryError("none")))
    with pytest.raises(MemoryError), pytest.warns(UserWarning):
        steps_of(xp, AdamW, config, graph=False)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 2, 5, 30), (30, 5)])
def test_matrices_are_made_orthogonal_as_by_the_plain_function(xp, shape):
    matrices = np.random.default_rng(0).standard_normal(shape)
    with plain():
        expected = orthogonalise(matrices)
    found = orthogonalise(xp.asarray(matrices.astype(np.float32)))
    assert found.shape == shape
    np.testing.assert_allclose(to_host(found), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"micro_batch": 3}, {"average": False, "clip_norm": 0.0}])
@pytest.mark.parametrize("optimizer", [AdamW, Muon])
@pytest.mark.parametrize("name", ["path", "all", "layer_scale", "qk_norm", "relative", "seq", "learned2d"])
def test_a_replayed_graph_gives_the_bits_of_single_kernels(name, optimizer, settings):
    import cupy

    config = (CONFIGS | DROPPING)[name]
    backend.use_device("cuda:0")
    single = steps_of(cupy, optimizer, config, graph=False, count=21, **settings)
    replayed = steps_of(cupy, optimizer, config, graph=True, count=21, **settings)
    assert replayed[3].replays == 19 and single[3].replays == 0  # all but the first, and the short last one
    np.testing.assert_array_equal(replayed[0], single[0])
    np.testing.assert_array_equal(replayed[1], single[1])


def test_augmentation_is_the_plain_one(xp):
    from minivit.data.loader import batches

    images, labels = batch_of(replace(SMALL, image_size=12), 40)
    order = np.random.default_rng(2).permutation(40)
    both = {"crop_padding": 3, "flip": True}
    mixing = {"num_classes": 10, "probability": 0.9}
    for settings in (
        both, {"crop_padding": 2}, {"flip": True}, {}, {"rotate": 9.0}, both | {"policy": "trivial"},
        {"policy": "auto"}, {"policy": "rand", "rand_count": 3, "rand_magnitude": 20}, both | {"erasing": 0.5},
        both | {"rand_count": 2, "mixing": mixing | {"mixup_alpha": 1.0}}, {"mixing": mixing | {"cutmix_alpha": 1.0}},
        both | {"crop_mode": "reflect"}, {"flip": True, "crop_mode": "reflect"},
    ):  # fmt: skip
        with plain():
            expected = list(batches(images, labels, order, 16, seed=1, epoch=2, prefetch=0, **settings))
        found = list(
            batches(xp.asarray(images), xp.asarray(labels), order, 16, seed=1, epoch=2, prefetch=0, **settings)
        )
        for (i, shown, classes), (j, *others) in zip(found, expected, strict=True):
            assert i == j
            np.testing.assert_array_equal(to_host(shown), others[0])
            np.testing.assert_array_equal(to_host(classes), others[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_every_plain_layer_runs_on_a_gpu(name):
    import cupy

    if name in NEED_SCIPY:
        pytest.importorskip("scipy")
    forward, backward, args, _ = LAYERS[name](np.random.default_rng(0))
    y, cache = forward(*args)
    dy = np.random.default_rng(1).standard_normal(np.shape(y))

    def on_gpu(value):
        return cupy.asarray(value) if isinstance(value, np.ndarray) else value

    y_gpu, cache_gpu = forward(*map(on_gpu, args))
    assert_close(to_host(y_gpu), y, 1e-13)
    expected, found = backward(dy, cache), backward(on_gpu(dy) if dy.shape else float(dy), cache_gpu)
    as_tuple = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
    for actual, gradient in zip(as_tuple(found), as_tuple(expected), strict=True):
        if gradient is not None:
            assert_close(to_host(actual), gradient, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["layernorm", "block-dropout", "loss", "vit"])
def test_gradients_agree_with_differences_on_a_gpu(name):
    from minivit.laboratory.checks import results_of

    backend.use_device("cuda:0")
    for method in ("central", "complex"):
        assert all(result.passed for result in results_of(name, method, 0, elementwise=False, device="cuda:0"))


@pytest.mark.gpu
def test_training_on_both_devices_agrees_and_moves_between_them(tmp_path, call, no_figures):
    import json

    def losses(out):
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]

    # one micro-batch, since stochastic depth is drawn for each
    flags = ["--quiet", "--epochs", 3, "--lr", 1e-3, "--dropout", 0, "--drop-path", 0.2, "--log-every", 5]
    flags += ["--workers", 1, "--micro-batch", 128, "--adam-eps", 1e-5]
    for device in ("cpu", "cuda"):
        assert call("train", *flags, "--device", device, "--out", tmp_path / device).status == 0
    np.testing.assert_allclose(losses(tmp_path / "cuda"), losses(tmp_path / "cpu"), rtol=2e-3)
    for first, second in (("cpu", "cuda"), ("cuda", "cpu")):
        out = tmp_path / f"{first}-{second}"
        trainer_stops_after(out, flags, first, epochs=1)
        ended = call("train", "--resume", "--quiet", "--device", second, "--out", out)
        assert ended.status == 0, ended.err
        np.testing.assert_allclose(losses(out), losses(tmp_path / "cpu"), rtol=2e-3)


def trainer_stops_after(out, flags, device, epochs):
    from conftest import load_script

    script = load_script("train")
    trainer = script.start(script.parse([str(flag) for flag in [*flags, "--device", device, "--out", out]]))
    trainer.on_epoch = lambda t: t.stop("test") if t.state.epoch == epochs else None
    trainer.run()


PRODUCTS = {  # shapes of two factors, and whether each is a transposed view
    "matrices": ((5, 7), (7, 3), False, False), "transposed": ((5, 7), (7, 3), True, True),
    "stacks": ((2, 4, 3, 5), (2, 4, 5, 6), False, True), "three axes": ((2, 4, 3), (2, 3, 5), True, False),
    "one for all": ((2, 4, 3, 5), (5, 6), False, True), "many for one": ((1, 4, 3, 5), (2, 1, 5, 6), True, False),
    "column": ((2, 3, 5), (2, 5, 1), True, True), "row": ((2, 1, 5), (2, 5, 4), True, True),
    "vector": ((5,), (2, 5, 4), False, True),
}  # fmt: skip


@pytest.mark.parametrize("gaps", [1, 2, "heads"])  # between neighbouring numbers, or between heads
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_any_views_are_the_plain_ones(xp, name, gaps):
    rng = np.random.default_rng(0)
    *shapes, ta, tb = PRODUCTS[name]
    host, factors = [], []
    for shape, turned in zip(shapes, (ta, tb), strict=True):
        turned = turned and len(shape) > 1
        stored = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        if gaps == "heads" and len(shape) == 4:
            array = rng.standard_normal((stored[0], stored[2], stored[1], stored[3])).astype(np.float32)
            views = [a.swapaxes(1, 2) for a in (array, xp.asarray(array))]
        else:
            step = gaps if gaps != "heads" else 1
            array = rng.standard_normal((*stored[:-1], step * stored[-1])).astype(np.float32)
            views = [a[..., ::step] for a in (array, xp.asarray(array))]
        views = [v.swapaxes(-1, -2) if turned else v for v in views]
        assert views[0].shape == shape
        host.append(views[0].astype(np.float64))
        factors.append(views[1])
    expected = host[0] @ host[1]
    assert cuda.matmul(*factors) is not NotImplemented
    assert_close(to_host(backend.matmul(*factors)), expected, 1e-6)
    if len(shapes[0]) == len(shapes[1]) == 4:
        out = xp.empty((expected.shape[0], expected.shape[2], expected.shape[1], expected.shape[3]), np.float32)
        backend.matmul(*factors, out=out.swapaxes(1, 2))
        assert_close(to_host(out).swapaxes(1, 2), expected, 1e-6)
    if len(shapes[1]) == 2:
        assert_close(to_host(backend.matmul_rows(*factors)), expected, 1e-6)


def test_sums_keep_all_bits_where_factors_are_rounded(xp, precision):
    """LayerNorm's, softmax's and GroupNorm's arithmetic stays float32."""
    x = np.random.default_rng(0).random((3, 40, 8), np.float32)
    there = xp.asarray(x)
    assert_close(to_host(backend.row_sum(there)), x.sum(axis=-1, keepdims=True, dtype=np.float64), 1e-6)
    assert_close(to_host(backend.column_sum(there[0])), x[0].sum(axis=0, dtype=np.float64), 1e-6)
    mean = xp.asarray(np.full(40, 0.3, np.float32))
    assert_close(to_host(backend.matmul(mean, there)), np.full(40, np.float64(np.float32(0.3))) @ x, 1e-6)


@pytest.mark.gpu
def test_tf32_is_close_and_is_not_float32():
    import cupy

    backend.use_device("cuda:0")
    rng = np.random.default_rng(0)
    a, b = (cupy.asarray(rng.standard_normal((256, 256)), dtype=np.float32) for _ in range(2))
    exact = to_host(a).astype(np.float64) @ to_host(b)
    errors = {}
    for precision in ("float32", "tf32"):
        out = cupy.empty((256, 256), np.float32)
        cuda.machine().precision = precision
        cuda._matmul(a, b, out)
        errors[precision] = np.abs(to_host(out) - exact).max() / np.abs(exact).max()
    cuda.machine().precision = "float32"
    assert errors["float32"] < 1e-6 < errors["tf32"] < 3e-3
