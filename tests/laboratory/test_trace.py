"""The recorder: what it records is what happened, it changes nothing, and its sums are those of the closed forms."""

import itertools
import sys
import threading
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from minivit import ViT, ViTConfig
from minivit.base import params
from minivit.base.backend import accelerated, column_sum, plain
from minivit.base.pairs import Pair, chain
from minivit.base.params import ParameterSpec, ones
from minivit.laboratory import naming, recorder, trace
from minivit.laboratory.cases import MODELS
from minivit.laboratory.counting import CountedArray, Counter, activate, counted
from minivit.laboratory.recorder import arrays_in, owner, recording
from minivit.layers import attention, dropout, gelu, layernorm, linear, softmax
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.masked import MaskedConfig, MaskedViT
from minivit.model import compose, costs, parameter_table
from minivit.model.costs import expected_flops
from minivit.options import flash_attention
from minivit.options.option import Option

SMALL = {
    "image_size": 8, "patch_size": 4, "channels": 2, "num_classes": 5, "width": 12, "depth": 2, "num_heads": 3,
    "mlp_dim": 20,
}  # fmt: skip
DROPS = {"dropout": 0.1, "attention_dropout": 0.2, "drop_path": 0.3}
STEM = {"stem_width": 4, "stem_groups": 2}
CONFIGS = {
    "cls": {},
    "mean": {"pooling": "mean"},
    "avg": {"pooling": "avg", "registers": 2},
    "pre-logits": {"pre_logits": 7},
    "one-head": {"num_heads": 1, "pooling": "mean", "pre_logits": 3},
    "dropout": DROPS,
    "dropout-mean": {**DROPS, "pooling": "mean", "depth": 3},
    "one-block": {**DROPS, "depth": 1},
    "attention-dropout": {"attention_dropout": 0.2},
    "drop-path": {"drop_path": 0.2, "depth": 3},
    "erf": {"gelu": "erf"},
    "layer-scale": {"layer_scale": 0.1},
    "qk-norm": {"qk_norm": True},
    "qk-norm-mean": {"qk_norm": True, "pooling": "mean", "attention_dropout": 0.2},
    "seq": {"pooling": "seq", **DROPS, "pre_logits": 7},
    "registers": {"registers": 2, **DROPS},
    "registers-mean": {"registers": 3, "pooling": "mean", "pos_embed": "sincos2d"},
    "registers-seq": {"registers": 1, "pooling": "seq", "qk_norm": True},
    "learned2d": {"pos_embed": "learned2d", "pos_at": "every", "registers": 2, **DROPS},
    "learned2d-input": {"pos_embed": "learned2d"},
    "every": {"pos_at": "every", "depth": 3, **DROPS},
    "shared": {"pos_embed": "sincos2d", "pos_at": "shared", "pooling": "mean", "registers": 2},
    "relative": {"pos_embed": "relative", "pos_at": "every", "qk_norm": True, **DROPS},
    "relative-mean": {"pos_embed": "relative", "pos_at": "shared", "pooling": "mean", "image_size": 12},
    "axial": {"attention": "axial", "pooling": "mean", "image_size": 12, "depth": 3, **DROPS},
    "axial-relative": {"attention": "axial", "pooling": "seq", "pos_embed": "relative", "pos_at": "shared", "depth": 1},
    "layer-scale-dropout": {"layer_scale": 0.1, **DROPS, "pooling": "mean"},
    "root": {"image_size": 16, "stem": "root", "patch_size": 2, **STEM},
    "root-pixels": {"image_size": 12, "stem": "root", "patch_size": 1, **STEM, "pos_embed": "sincos2d"},
    "stem": {"image_size": 16, "stem": "2,1", "patch_size": 1, **STEM, **DROPS},
    "stem-patches": {"image_size": 24, "stem": "1", "patch_size": 3, **STEM, "pooling": "mean"},
    "stem-one-patch": {"image_size": 8, "stem": "1", "patch_size": 2, **STEM},
    "swiglu": {"mlp": "swiglu", **DROPS},
    "one-pixel-patches": {"patch_size": 1, "image_size": 3, "pos_embed": "none"},
    "one-patch": {"patch_size": 8, "pos_embed": "sincos2d"},
}


def batch(config, size=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (size, config.image_size, config.image_size, config.channels)
    return rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, config.num_classes, size)


def weights(config, dtype=np.float32, scale=0.3):
    flat = ViT(config, dtype=dtype).flat
    return flat + (scale * np.random.default_rng(1).standard_normal(flat.shape)).astype(dtype)


def traced(dtype=np.float32, size=3, **changes):
    config = ViTConfig(**{**SMALL, **changes})
    rng = np.random.default_rng(2) if any(changes.get(name) for name in DROPS) else None
    return trace.trace_batch(config, *batch(config, size), flat=weights(config, dtype), rng=rng, label_smoothing=0.1)


FORWARD = """embedding embedding.proj embedding.dropout
    blocks.0 blocks.0.norm1 blocks.0.msa blocks.0.msa.qkv blocks.0.msa.attention blocks.0.msa.attention.softmax
    blocks.0.msa.attention.dropout blocks.0.msa.proj blocks.0.msa.dropout blocks.0.norm2 blocks.0.mlp blocks.0.mlp.fc1
    blocks.0.mlp.activation blocks.0.mlp.activation.dropout blocks.0.mlp.fc2 blocks.0.mlp.dropout
    blocks.1 blocks.1.norm1 blocks.1.msa blocks.1.msa.qkv blocks.1.msa.attention blocks.1.msa.attention.attention
    blocks.1.msa.attention.attention.softmax blocks.1.msa.attention.attention.dropout blocks.1.msa.proj
    blocks.1.msa.dropout blocks.1.msa.drop_path blocks.1.msa.drop_path.dropout blocks.1.norm2 blocks.1.mlp
    blocks.1.mlp.fc1 blocks.1.mlp.activation blocks.1.mlp.activation.dropout blocks.1.mlp.fc2 blocks.1.mlp.dropout
    blocks.1.mlp.drop_path blocks.1.mlp.drop_path.dropout
    head head.norm head.head loss""".split()


def test_every_call_is_recorded_in_its_order_and_place():
    records = [r for r in traced(**DROPS).records if r.direction == "forward"]
    assert [r.path for r in records] == FORWARD
    by_path = {r.path: r for r in records}
    expected = {  # equation, tensors, shape, depth
        "embedding": ("1", "images", "z", (3, 5, 12), 0),
        "blocks.0": ("2-3", "z", "z2", (3, 5, 12), 0),
        "blocks.0.norm2": ("2-3", "x", "y", (3, 5, 12), 1),
        "blocks.1.norm2": ("2-3", "x", "y", (3, 1, 12), 1),  # the last block goes on with the class token alone
        "blocks.1.msa.qkv": ("5-8", "x", "y", (3, 5, 36), 2),
        "blocks.0.msa.attention.softmax": ("6", "x", "y", (3, 3, 5, 5), 3),
        "blocks.0.msa.attention": ("5-8", "q", "y", (3, 3, 5, 4), 2),
        "blocks.0.mlp.activation": ("3", "x", "y", (3, 5, 20), 2),
        "head": ("4", "z", "logits", (3, 5), 0),
        "loss": ("", "logits", "loss", (), 0),
    }
    for path, figures in expected.items():
        r = by_path[path]
        assert (r.equation, r.input, r.output, r.shape, r.depth) == figures
        assert r.dtype == "float32" and r.bytes == 4 * np.prod(r.shape) and r.nonfinite == 0


def test_options_are_recorded_where_they_act():
    records = traced(layer_scale=0.1, qk_norm=True, **DROPS).records
    forward = [r for r in records if r.direction == "forward" and r.path.startswith("blocks.1.") and r.depth == 1]
    names = "norm1 msa msa.dropout msa.ls1 msa.drop_path norm2 mlp mlp.dropout mlp.ls2 mlp.drop_path".split()
    assert [r.path.removeprefix("blocks.1.") for r in forward] == names
    ls2 = next(r for r in records if (r.path, r.direction) == ("blocks.0.mlp.ls2", "backward"))
    assert (ls2.output, set(ls2.norms)) == ("dx", {"dx", "dgamma"})
    assert ls2.flops == 3 * 3 * 5 * 12
    records = traced(registers=2, qk_norm=True, **DROPS).records
    assert [r.path for r in records if r.depth == 0][:3] == ["embedding", "embedding.registers", "embedding.dropout"]
    back = next(r for r in records if (r.path, r.direction) == ("embedding.registers", "backward"))
    assert (back.output, back.shape, set(back.norms)) == ("dz", (3, 5, 12), {"dz", "dreg_token"})
    assert back.flops == 3 * 2 * 12
    shapes = {r.path: r.shape for r in records}
    inside = "blocks.1.msa.attention.attention."
    assert shapes[f"{inside}q_norm"] == (3, 3, 1, 4) and shapes[f"{inside}k_norm"] == (3, 3, 7, 4)
    norms = {r.path: set(r.norms) for r in records if r.direction == "backward"}
    assert norms["blocks.0.msa.attention"] == {"dq", "dk", "dv", "dwq", "dbq", "dwk", "dbk"}
    extra = {f"dextra{i}" for i in (1, 2, 3, 4)}
    assert norms["blocks.0.msa"] == {"dx", "dWqkv", "dbqkv", "dWproj", "dbproj"} | extra


def test_positions_are_recorded_where_they_act():
    """At the input behind the patch embedding, else before each block but the first, and back in the reverse order."""
    every = {"pos_embed": "learned2d", "pos_at": "every", "registers": 2, "depth": 3}
    records = [r for r in traced(**every).records if r.depth == 0]
    expected = "embedding embedding.position2d embedding.registers blocks.0".split()
    expected += "blocks.1.position2d blocks.1 blocks.2.position2d blocks.2 head loss".split()
    assert [r.path for r in records] == [*expected, *reversed(expected)]
    back = next(r for r in records if (r.path, r.direction) == ("blocks.1.position2d", "backward"))
    assert (back.input, back.output, set(back.norms)) == ("dz", "dz", {"dz", "dX", "dY"}) and back.cached == 0
    records = {(r.path, r.direction): r for r in traced(pos_at="shared", registers=2).records}
    assert records["blocks.1.position", "forward"].flops == 3 * 5 * 12
    records = traced(pos_embed="relative", pos_at="shared", **DROPS).records
    by_path = {(r.path, r.direction): r for r in records}
    assert by_path["blocks.0.msa.attention", "forward"].function == "relative_attention_forward"
    assert set(by_path["blocks.0.msa.attention", "backward"].norms) == {"dq", "dk", "dv", "dr"}
    assert by_path["blocks.0.msa.attention", "backward"].equation == "6-7"


def test_a_stem_is_recorded_by_the_fields_of_its_caches():
    records = traced(image_size=16, stem="2,1", patch_size=1, **STEM).records
    forward = {r.path: r for r in records if r.direction == "forward"}
    stem = "embedding.stem.resnet"
    assert [r.path for r in records if r.depth == 0 and r.direction == "forward"][:2] == [stem, "embedding"]
    assert [p for p, r in forward.items() if p.startswith(stem) and r.depth == 1] == [
        f"{stem}.root", f"{stem}.stages.0", f"{stem}.stages.1",
    ]  # fmt: skip
    unit = f"{stem}.stages.1.0."
    names = [p.removeprefix(unit) for p, r in forward.items() if p.startswith(unit) and r.depth == 3]
    assert names == "conv1 relu1 conv2 relu2 conv3 downsample relu3".split()
    assert forward[unit + "conv2.conv"].shape == (3, 2, 2, 8) and forward[unit + "conv1.conv"].shape == (3, 4, 4, 8)
    assert forward[f"{stem}.stages.0.1.conv3.norm"].function == "groupnorm_forward"
    backward = {r.path: r for r in records if r.direction == "backward"}
    assert set(backward) == set(forward)
    root = f"{stem}.root.conv"
    assert (backward[root].output, backward[stem].output, backward[stem].shape) == ("dkernel", "", (0,))
    assert set(backward[root].norms) == {"dkernel", "dw", "db"}  # nobody wants the gradient of bytes
    assert backward[f"{root}.conv"].matmul_flops == forward[f"{root}.conv"].matmul_flops == 2 * 3 * 8 * 8 * 49 * 2 * 4
    assert forward[unit + "conv2.conv"].matmul_flops == 2 * 3 * 2 * 2 * 9 * 8 * 8
    assert backward[unit + "conv2.conv"].matmul_flops == 4 * 3 * 2 * 2 * 9 * 8 * 8
    shares = [forward[unit + name].flops for name in names]
    assert forward[unit[:-1]].flops == sum(shares) + 3 * 2 * 2 * 32  # the addition


def ends(records):
    return [r for event, r, _ in trace.events(records) if event == "out"]


def test_the_backward_is_the_forward_in_reverse():
    records = traced(**DROPS).records
    forward = [r for r in records if r.direction == "forward"]
    backward = [r for r in records if r.direction == "backward"]
    assert records == forward + backward
    # attention's backward makes the dropped map again: one more call, before the gradient's own
    again = [i for i, r in enumerate(backward[1:]) if r.path == backward[i].path]
    assert [backward[i].path.removesuffix("attention.dropout") for i in again] == [
        "blocks.1.msa.attention.",
        "blocks.0.msa.",
    ]
    backward = [r for i, r in enumerate(backward) if i not in again]
    stems = [(r.path, r.function.replace("_backward", "_forward"), r.depth) for r in backward]
    assert stems == [(r.path, r.function, r.depth) for r in reversed(ends(forward))]


def test_norms_are_those_of_the_gradients():
    t = traced(dtype=np.float64)
    grads = params.views(t.gradient, parameter_table(t.config))
    backward = {r.path: r for r in t.records if r.direction == "backward"}
    for path, key, name in (
        ("blocks.1.msa.qkv", "dW", "blocks.1.attn.qkv.weight"), ("blocks.0.mlp.fc2", "db", "blocks.0.mlp.fc2.bias"),
        ("blocks.0.mlp", "dW1", "blocks.0.mlp.fc1.weight"), ("head.norm", "dw", "norm.weight"),
        ("embedding", "dpos_embed", "pos_embed"), ("embedding", "dcls_token", "cls_token"),
        ("blocks.1.msa", "dbproj", "blocks.1.attn.proj.bias"),
    ):  # fmt: skip
        assert backward[path].norms[key] == pytest.approx(np.linalg.norm(grads[name]), rel=1e-12)
    assert set(backward["blocks.0.msa.attention"].norms) == {"dq", "dk", "dv"}
    assert backward["blocks.1"].norms["dz"] == backward["blocks.0"].incoming > 0
    assert backward["loss"].incoming == 1.0


def test_statistics_are_those_of_the_result():
    t = traced(dtype=np.float64)
    head = next(r for r in t.records if r.path == "head")
    expected = t.logits.mean(), t.logits.std(), np.abs(t.logits).max()
    np.testing.assert_allclose([head.mean, head.std, head.largest], expected, rtol=1e-12)
    assert recorder.statistics(np.array([np.nan, -3.0, 1.0, np.inf])) == (-1.0, 2.0, 3.0)
    assert np.isnan(recorder.statistics(np.array([np.nan]))).all()
    assert recorder.norm(np.full(4, 1e30, np.float32)) == pytest.approx(2e30)


def bytes_of(cache, model):
    """The bytes of all buffers that a cache keeps alive, but for the parameters."""
    owners = {id(owner(a)): owner(a) for _, a in arrays_in(cache)}
    return sum(a.nbytes for a in owners.values() if a is not owner(model.flat))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_recorded_is_what_happens(name, dtype):
    """Products are those of the closed forms, bytes those of the caches, and the numbers those of an ordinary run."""
    if name == "erf":
        pytest.importorskip("scipy")
    t = traced(dtype, **CONFIGS[name])
    assert (t.totals.forward_matmul_flops, t.totals.backward_matmul_flops) == t.expected
    image_gradient = not t.config.stem
    assert t.expected == expected_flops(t.config, 3, image_gradient=image_gradient)
    assert t.totals.parameters == params.count(parameter_table(t.config))
    assert t.totals.forward_flops > t.totals.forward_matmul_flops > 0
    assert t.totals.backward_flops > t.totals.backward_matmul_flops
    model = ViT(t.config, flat=weights(t.config, dtype))
    images, labels = batch(t.config)
    with plain():
        rng = np.random.default_rng(2) if any(CONFIGS[name].get(rate) for rate in DROPS) else None
        logits, cache = model.forward(images, rng=rng)
        loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=0.1)
        flat, grads = model.gradient_buffer()
        model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    assert t.logits.tobytes() == logits.tobytes() and t.loss == loss and t.gradient.tobytes() == flat.tobytes()
    assert type(t.logits) is type(t.gradient) is np.ndarray
    assert t.totals.cached == bytes_of((cache.embedding, cache.blocks, cache.head, loss_cache), model)


@pytest.mark.parametrize("name", MODELS)
def test_the_products_of_every_kind_of_model_are_those_of_the_closed_form(name):
    """The models that gradients are checked on: an option whose products nobody told is noticed here."""
    if name == "vit-erf":
        pytest.importorskip("scipy")
    config = ViTConfig(**MODELS[name])
    totals = trace.trace_batch(config, *batch(config), flat=weights(config)).totals
    expected = expected_flops(config, 3, image_gradient=not config.stem)
    assert (totals.forward_matmul_flops, totals.backward_matmul_flops) == expected


def test_the_gradient_of_images_costs_a_product():
    config = ViTConfig(**SMALL)
    product = 2 * 3 * 4 * 4**2 * 2 * 12
    without, with_it = (expected_flops(config, 3, image_gradient=wanted) for wanted in (False, True))
    assert with_it.backward - without.backward == product and with_it.forward == without.forward


@pytest.mark.parametrize(("name", "functions"), [
    ("mean", {"flash_attention_backward"}), ("qk-norm-mean", {"flash_attention_backward"}),
    ("cls", {"flash_attention_backward", "attention_backward"}),
    ("dropout", {"flash_attention_backward", "dropped_attention_backward"}),
    ("relative-mean", {"relative_attention_backward"}), ("axial", {"dropped_attention_backward"}),
])  # fmt: skip
def test_totals_of_long_sequences(name, functions, monkeypatch):
    """Where the map is not kept it is made again; the last block of the class token's model has a short one."""
    monkeypatch.setattr(flash_attention, "LONG", 4)
    monkeypatch.setattr(costs, "LONG", 4)
    t = traced(**CONFIGS[name])
    leaves = {r.function for r in t.records if r.direction == "backward" and "softmax" not in r.function}
    wanted = {
        "attention_backward",
        "flash_attention_backward",
        "dropped_attention_backward",
        "relative_attention_backward",
    }
    assert leaves & wanted == functions
    assert (t.totals.forward_matmul_flops, t.totals.backward_matmul_flops) == t.expected


def test_without_a_generator_there_are_no_masks():
    config = ViTConfig(**SMALL, **DROPS)
    t = trace.trace_batch(config, *batch(config))
    assert not any("drop" in r.path for r in t.records)
    assert t.totals.cached == trace.trace_batch(ViTConfig(**SMALL), *batch(config)).totals.cached


def test_float_images_of_a_larger_array_count_as_the_batch_alone():
    config = ViTConfig(**{**SMALL, "patch_size": 8})  # one patch: cutting it out makes a view
    images = np.random.default_rng(0).random((100, 8, 8, 2), dtype=np.float32)[5:8]
    embedding = trace.trace_batch(config, images, np.zeros(3, int)).records[0]
    assert embedding.cached == images.nbytes


@pytest.mark.parametrize(("name", "gmac"), [
    ("Ti/16", 1.25), ("S/16", 4.60), ("B/16", 17.56), ("B/32", 4.41), ("L/16", 61.55), ("L/32", 15.38), ("H/14", 167.3),
])  # fmt: skip
def test_the_paper_s_models(name, gmac):
    flops = expected_flops(ViTConfig.preset(name), 1, every_token=True)
    assert flops.forward / 2e9 == pytest.approx(gmac, abs=0.05 if gmac > 100 else 0.005)
    assert expected_flops(ViTConfig.preset(name), 7, every_token=True) == (7 * flops.forward, 7 * flops.backward)


def test_operations_are_counted_as_they_are_done():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 6))  # 10 rows of 6
    with recording() as notes:
        _, cache = layernorm.layernorm_forward(x, np.ones(6), np.zeros(6))
        layernorm.layernorm_backward(x, cache)
        _, cache = gelu.gelu_forward(x)
        gelu.gelu_backward(x, cache)
        _, cache = linear.linear_forward(x, rng.standard_normal((6, 3)), np.zeros(3))
        linear.linear_backward(np.ones((2, 5, 3)), cache)
        _, cache = attention.attention_forward(x, x, x)
        attention.attention_backward(x, cache)
    work = [(r.matmul_flops, r.flops - r.matmul_flops) for r in notes.records if r.depth == 0]
    maps, rows = 50, 10  # entries of the attention maps
    assert work == [
        # sum, -, *, sum, *, *, + per entry; two divisions, +, power per row
        (0, 7 * 60 + 4 * rows),
        # dy * xhat, two sums, * w, two means, dxhat * xhat, -, *, -, * rstd; two divisions per row
        (0, 11 * 60 + 2 * rows),
        (0, 9 * 60), (0, 14 * 60),
        (2 * 10 * 6 * 3, 30), (4 * 10 * 6 * 3, 30),
        (4 * 2 * 25 * 6, maps + 5 * maps),  # the scale; softmax: maximum, -, exp, sum, /
        (8 * 2 * 25 * 6, 2 * 60 + 4 * maps),  # the scales of dq and dk; *, sum, -, *
    ]  # fmt: skip
    cached = [r.cached for r in notes.records if r.depth == 0 and r.direction == "forward"]
    assert cached == [8 * (60 + 10 + 6), 8 * (60 + 60), 8 * 18, 8 * 50]  # x was counted with gelu; here w and W count


def test_counted_arrays_give_the_numbers_of_ordinary_ones():
    rng, counter = np.random.default_rng(0), Counter()
    a, b = rng.standard_normal((4, 3)), rng.standard_normal((3, 5))
    before = activate(counter)
    try:
        x, y = counted(a), counted(b)
        product = x @ y
        assert type(product) is CountedArray and (counter.products, counter.others) == (2 * 4 * 3 * 5, 0)
        np.concatenate([product, product])[:, 0].reshape(2, -1)  # moves numbers
        assert counter.others == 0
        total = (np.exp(x) - x).sum(axis=0)
        assert counter.others == 12 + 12 + 12
        into = np.zeros(3)
        into += total  # an ordinary array stays one
        assert type(into) is np.ndarray and counter.others == 36 + 3
        vector = x @ counted(b[:, 0])
        assert counter.products == 120 and counter.others == 39 + 2 * 4 * 3
        quotient, rest = np.divmod(x, 2.0)
        np.add.at(x.copy(), [0, 1], 1.0)
        counter.sums = True
        np.ones(4) @ x
        assert counter.products == 120
    finally:
        assert activate(before) is counter
    assert type(x + 1) is np.ndarray  # without a counter
    assert np.array_equal(product, a @ b) and np.array_equal(into, (np.exp(a) - a).sum(axis=0))
    assert np.array_equal(vector, a @ b[:, 0]) and np.array_equal(quotient, a // 2.0) and np.array_equal(rest, a % 2.0)


def test_sums_are_no_products():
    """`column_sum` makes one with a product, which is no part of the model's."""

    @accelerated
    def total_forward(x):
        return column_sum(x), x.shape

    with recording() as notes:
        total_forward(np.ones((7, 3)))
    assert (notes.records[0].matmul_flops, notes.records[0].flops) == (0, 21)


def test_without_figures_the_rest_is_the_same(monkeypatch):
    def records(figures):
        model = ViT(ViTConfig(**SMALL), seed=3)
        with recording(model=model, figures=figures) as notes:
            images, labels = batch(model.config)
            logits, cache = model.forward(images)
            dlogits = softmax_cross_entropy_backward(1.0, softmax_cross_entropy_forward(logits, labels)[1])
            model.backward(dlogits, cache, model.gradient_buffer()[1])
        nothing = {"mean": 0, "std": 0, "largest": 0, "norms": {}, "incoming": 0.0, "seconds": 0, "own_seconds": 0}
        return [r._replace(**nothing) for r in notes.records]

    expected = records(True)
    for name in ("norm", "statistics"):
        monkeypatch.delattr(recorder, name)  # not called
    assert records(False) == expected and len(expected) > 20


def test_what_was_returned_can_be_kept_and_done_again():
    model = ViT(ViTConfig(**SMALL), seed=3)
    with recording(model=model, keep=True, calls=True) as notes:
        logits, cache = model.forward(batch(model.config)[0])
        model.backward(np.ones_like(logits), cache, model.gradient_buffer()[1])
    assert np.array_equal(notes.kept["head", "forward", "y"], logits)
    assert {name for path, direction, name in notes.kept if (path, direction) == ("head.norm", "backward")} == {
        "dx", "dw", "db",
    }  # fmt: skip
    function, args, keywords, arguments, (y, _) = notes.calls["blocks.1.norm2", "forward"]
    assert np.array_equal(arguments["x"], args[0]) and keywords == {"eps": 1e-6}
    assert all(type(a) is np.ndarray for a in args)
    assert np.array_equal(function.__wrapped__(*args, **keywords)[0], y)
    _, (_, cache), *_ = notes.calls["blocks.1.norm2", "backward"]
    assert type(cache) is layernorm.LayerNormCache and type(cache.xhat) is np.ndarray


def test_one_recording_at_a_time_and_nothing_is_left():
    model = ViT(ViTConfig(**SMALL))
    with pytest.raises(RuntimeError, match="watched already"), recording(), recording():
        pass
    with pytest.raises(ZeroDivisionError), recording(model=model):
        raise ZeroDivisionError
    assert "forward" not in vars(model)
    with recording() as notes:
        pass
    softmax.softmax_forward(np.ones((2, 3)))
    assert notes.records == []


def test_a_call_that_fails_leaves_no_record():
    x = np.ones((2, 3))
    with recording() as notes:
        with pytest.raises(ValueError):
            linear.linear_forward(x, np.ones((4, 4)), np.ones(4))
        softmax.softmax_forward(x)
    (record,) = notes.records
    assert (record.path, record.depth) == ("softmax", 0)


def test_no_other_thread_is_recorded():
    x = np.ones((2, 3))
    with recording() as notes:
        thread = threading.Thread(target=softmax.softmax_forward, args=(x,))
        thread.start()
        thread.join()
        assert notes.records == []
        softmax.softmax_forward(x)
    assert len(notes.records) == 1


def test_a_second_forward_has_the_same_names():
    config = ViTConfig(**SMALL)
    model, (images, _) = ViT(config), batch(config)
    with recording(model=model) as notes:
        model.forward(images)
        model.forward(images)
    paths = [r.path for r in notes.records]
    assert paths[: len(paths) // 2] == paths[len(paths) // 2 :] and "blocks.1.msa" in paths


def test_what_is_kept_nowhere_is_called_by_its_function():
    config = ViTConfig(**{**SMALL, "depth": 3})
    with recording() as notes:
        ViT(config).predict(batch(config)[0])  # every cache is dropped
    top = [r.path for r in notes.records if r.depth == 0]
    assert top == ["patch_embed", "block.0", "block.1", "first_tokens", "head"]
    assert {"block.1.msa.qkv", "patch_embed.proj", "head.norm"} <= {r.path for r in notes.records}


def test_blocks_that_are_run_again_are_recorded():
    config = ViTConfig(**SMALL)
    model = ViT(config)
    with recording(model=model) as notes:
        logits, cache = model.forward(batch(config)[0], recompute=True)
        model.backward(np.ones_like(logits), cache, model.gradient_buffer()[1])
    functions = [r.function for r in notes.records if r.depth == 0]
    assert functions.count("block_forward") == 2 * functions.count("block_backward") == 2


@pytest.mark.parametrize("method", ["mpp", "mae"])
def test_a_masked_model_is_recorded(method):
    config = ViTConfig(**SMALL, **{"dropout": 0.1})
    masked = MaskedConfig(method=method, decoder_width=8, decoder_depth=1, decoder_heads=2)
    model, (images, _) = MaskedViT(config, masked), batch(config)
    plan = np.stack([np.random.default_rng(i).permutation(4) for i in range(6)]).reshape(3, 2, 4)
    with recording(model=model, figures=False) as notes:
        prediction, cache = model.forward(images, plan, rng=np.random.default_rng(0))
        model.backward(np.ones_like(prediction), cache, model.gradient_buffer()[1])
    paths = {r.path for r in notes.records}
    assert {"embed.patches.proj", "blocks.caches.1.msa.qkv", "norm", "predict"} <= paths
    assert ("decoder.blocks.caches.0.mlp" in paths) == (method == "mae")
    assert {r.path for r in notes.records if r.direction == "backward"} == paths
    assert trace.first_non_finite(notes) is None


def test_a_backward_is_named_by_its_cache():
    x = np.ones((2, 3))
    with recording():
        _, old = softmax.softmax_forward(x)
    with recording() as notes:
        caches = [softmax.softmax_forward(x)[1], layernorm.layernorm_forward(x, x[0], x[0])[1]]
        layernorm.layernorm_backward(x, caches[1])
        softmax.softmax_backward(x, caches[0])
        softmax.softmax_backward(x, old)  # from before the recording: named by its function
    assert [r.path for r in notes.records] == ["softmax", "layernorm", "layernorm", "softmax", "softmax"]


def test_a_cache_that_is_gone_lends_its_name_to_no_other():
    """An object may be made where another one lay that is gone; it has the same id then."""
    config = ViTConfig(**SMALL)
    model, x = ViT(config), np.ones((2, 3))
    with recording() as notes:
        model.predict(batch(config)[0])  # every cache is dropped
        count = len(notes.records)
        caches = [layernorm.LayerNormCache(x, x[:, :1], x[0]) for _ in range(50)]
        for cache in caches:
            layernorm.layernorm_backward(x, cache)
    assert {r.path for r in notes.records[count:]} == {"layernorm"}


def test_times_leave_the_recorder_out(monkeypatch):
    clock = [0.0]

    def slow(array):
        clock[0] += 1.0
        return 0.0, 0.0, 0.0

    monkeypatch.setattr(recorder, "statistics", slow)
    for module in (recorder, "minivit.laboratory.counting"):
        monkeypatch.setattr(module if module is recorder else sys.modules[module], "perf_counter", lambda: clock[0])
    t = traced()
    assert clock[0] >= len(t.records) > 0
    assert t.totals.forward_seconds == t.totals.backward_seconds == 0.0


def test_times_are_nested(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(recorder, "perf_counter", lambda: 2.0**-10 * next(clock))  # whoever looks finds it later
    t = traced()
    spent = dict.fromkeys(range(len(t.records)), 0.0)
    open_calls = []
    for i, r in enumerate(t.records):
        del open_calls[r.depth :]
        if open_calls:
            spent[open_calls[-1]] += r.seconds
        open_calls.append(i)
    for i, r in enumerate(t.records):
        assert r.own_seconds == pytest.approx(r.seconds - spent[i], abs=1e-9) and r.own_seconds > 0
        assert r.rate == pytest.approx(1e-9 * r.flops / r.seconds)
    assert t.totals.forward_seconds > t.records[0].seconds > 0


def test_everything_finite():
    assert trace.first_non_finite(traced(**DROPS)) is None


def planted(monkeypatch, module, name, value, call=1, output=0):
    """The ``call``-th call of a function returns one entry of its result as ``value``."""
    function, calls = getattr(module, name), []
    original = function.__wrapped__

    def broken(*args, **keywords):
        result = original(*args, **keywords)
        calls.append(None)
        if len(calls) == call:
            result = list(result) if isinstance(result, tuple) else [result]
            result[output] = result[output].copy()
            result[output].flat[3] = value
            result = tuple(result) if len(result) > 1 else result[0]
        return result

    monkeypatch.setattr(function, "__wrapped__", broken)


@pytest.mark.parametrize(("module", "name", "call", "output", "tensor", "made_by"), [
    (gelu, "gelu_forward", 2, 0, "y", "blocks.1.mlp.activation (gelu_forward)"),
    (softmax, "softmax_forward", 1, 0, "y", "blocks.0.msa.attention.softmax (softmax_forward)"),
    (layernorm, "layernorm_forward", 5, 0, "y", "head.norm (layernorm_forward)"),
    (gelu, "gelu_backward", 1, 0, "dx", "blocks.1.mlp.activation (gelu_backward)"),
    (linear, "linear_backward", 2, 1, "dx", "blocks.1.mlp.fc2 (linear_backward)"),
    (layernorm, "layernorm_backward", 5, 2, "dx", "blocks.0.norm1 (layernorm_backward)"),
])  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_planted_value_is_found(monkeypatch, module, name, call, output, tensor, made_by, value):
    planted(monkeypatch, module, name, value, call, output)
    culprit = trace.first_non_finite(traced())
    assert (culprit.tensor, culprit.made_by, culprit.inputs_finite) == (tensor, made_by, True)
    assert culprit.direction == ("forward" if "forward" in name else "backward")
    assert tensor in culprit.message and made_by in culprit.message and culprit.direction in culprit.message


def test_a_line_between_two_calls_is_found():
    """Scores overflow in attention's own line, and softmax is the first to read them."""
    config = ViTConfig(**SMALL)
    flat = weights(config)
    params.views(flat, parameter_table(config))["blocks.1.attn.qkv.weight"][...] *= 1e20
    t = trace.trace_batch(config, *batch(config), flat=flat)
    assert not any(r.alarms for r in t.records if r.function == "linear_forward")
    culprit = trace.first_non_finite(t)
    assert (culprit.tensor, culprit.made_by) == ("x", "blocks.1.msa.attention.attention (attention_forward)")
    assert "softmax_forward" in culprit.message and culprit.inputs_finite


def test_an_overflow_that_leaves_no_trace_is_found():
    """The variance of huge numbers is infinite, and LayerNorm of them is 0."""
    x = np.array([[1e30, -1e30, 1.0]], np.float32)
    with recording() as notes:
        y, _ = layernorm.layernorm_forward(x, x[0] * 0 + 1, x[0] * 0)
    assert np.isfinite(y).all() and notes.records[0].alarms == "overflow"
    culprit = trace.first_non_finite(notes)
    assert culprit.made_by == "layernorm (layernorm_forward)" and "overflow" in culprit.message


def test_a_backward_that_overflows_is_found():
    """The forward is finite: the head's input is 0, its weights are near the largest float32."""
    config = ViTConfig(**SMALL)
    images, _ = batch(config, 1)
    flat = weights(config)
    named = params.views(flat, parameter_table(config))
    named["norm.weight"][...] = named["norm.bias"][...] = named["head.bias"][...] = 0.0
    named["head.weight"][...] = 3e38 * np.array([-1, 1, 1, 1, 1])
    t = trace.trace_batch(config, images, np.array([0]), flat=flat)
    culprit = trace.first_non_finite(t)
    assert t.loss == pytest.approx(np.log(5)) and not np.isfinite(t.gradient).all()
    assert (culprit.tensor, culprit.direction, culprit.made_by) == ("dx", "backward", "head.head (linear_backward)")


@pytest.mark.parametrize("name", ["patch_embed.proj.bias", "blocks.1.attn.proj.weight", "norm.bias"])
def test_a_bad_parameter_is_found(name):
    config = ViTConfig(**SMALL)
    flat = weights(config)
    params.views(flat, parameter_table(config))[name].flat[1] = np.nan
    culprit = trace.first_non_finite(trace.trace_batch(config, *batch(config), flat=flat))
    assert culprit.tensor == (name.removeprefix("blocks.1.") if name.startswith("blocks") else "b")
    assert not culprit.inputs_finite and culprit.made_by == ""


def test_a_bad_cache_is_found():
    x = np.ones((2, 3))
    with recording() as notes:
        _, cache = softmax.softmax_forward(x)
        cache.y[0, 0] = np.nan
        softmax.softmax_backward(x, cache)
    assert trace.first_non_finite(notes).tensor == "cache.y"


# ---- what nobody has entered anywhere --------------------------------------------------------------------------------


class SwingCache(NamedTuple):
    """What `swing_backward` reads."""

    angle: Any
    through: Any
    offset: Any


@accelerated
def swing_forward(x, offset):
    """A made-up layer with a linear map inside it.

    Math    y = sin(x + offset) @ 1                                                                       (Eq. 99)
    Shapes  x (..., D), offset (D,)  ->  wave (..., D)
    """
    angle = x + offset
    y, through = linear.linear_forward(np.sin(angle), np.eye(len(offset), dtype=x.dtype), 0 * offset)
    return y, SwingCache(angle, through, offset)


@accelerated
def swing_backward(dwave, cache):
    """Backward of `swing_forward`: without a Shapes section, its results are called by the forward's arguments."""
    du, _, _ = linear.linear_backward(dwave, cache.through)
    dx = du * np.cos(cache.angle)
    return dx, dx.reshape(-1, dx.shape[-1]).sum(axis=0)


def test_a_new_option_is_traced_without_an_entry_anywhere(monkeypatch):
    class Nothing:
        """No fields: it is always on."""

    def branch(pair, config, place):
        return (
            chain(pair, Pair(swing_forward, swing_backward, ("swing.offset",)), "swing") if place.branch == 2 else pair
        )

    def rows(config):
        return {"branch2": [ParameterSpec("swing.offset", (config.width,), ones, False)]}

    monkeypatch.setattr(compose, "OPTIONS", (*compose.OPTIONS, Option(Nothing, rows=rows, branch=branch)))
    t = traced()
    by_path = {(r.path, r.direction): r for r in t.records}
    forward, backward = (by_path["blocks.0.mlp.swing", direction] for direction in ("forward", "backward"))
    assert (forward.function, forward.equation, forward.input, forward.output) == ("swing_forward", "99", "x", "wave")
    assert (backward.equation, backward.input, set(backward.norms)) == ("99", "dwave", {"dx", "doffset"})
    assert by_path["blocks.0.mlp.swing.through", "forward"].equation == "99"  # that of the call around it
    n = 3 * 5 * 12
    assert (forward.matmul_flops, forward.flops) == (2 * n * 12, 2 * n * 12 + 3 * n + 12)
    assert (backward.matmul_flops, backward.flops) == (4 * n * 12, 4 * n * 12 + 4 * n)
    added = 2 * 3 * (5 + 1) * 12 * 12  # of the first block, and of the last with its class token
    assert t.totals.forward_matmul_flops == t.expected.forward + added
    assert t.totals.backward_matmul_flops == t.expected.backward + 2 * added
    assert trace.first_non_finite(t) is None
    planted(monkeypatch, sys.modules[__name__], "swing_forward", np.nan)
    assert trace.first_non_finite(traced()).made_by == "blocks.0.mlp.swing (swing_forward)"


def test_names_are_read_from_docstrings():
    assert naming.equation(attention.attention_forward) == "6-7" and naming.equation(linear.linear_forward) == ""
    assert naming.output_name(linear.linear_forward) == "y"
    assert naming.gradient_names(linear.linear_backward, None, 3) == ["dx", "dW", "db"]
    assert naming.gradient_names(dropout.dropout_backward, None, 1) == ["dx"]

    def plain_backward(dy, cache):
        """No sections."""

    assert naming.gradient_names(plain_backward, linear.linear_forward, 4) == ["dx", "dW", "db", "dparameter1"]
    assert naming.gradient_names(plain_backward, None, 1) == ["dx"]
    both = partial(linear.linear_forward)
    assert naming.places((both,)) and naming.places(()) == {id(()): ""}
