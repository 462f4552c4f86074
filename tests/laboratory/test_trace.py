"""The recorder: what it records is what happened, it changes nothing, and its sums are those of the closed forms."""

import inspect
import itertools
import sys
import threading

import numpy as np
import pytest

from minivit import ViT, ViTConfig
from minivit.base import params
from minivit.laboratory import trace
from minivit.layers import attention, block, gelu, layernorm, linear, msa, softmax
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import parameter_table

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


def everything():
    """Every (module, name, function) that a recording replaces."""
    return {
        (name, key): value
        for name, module in list(sys.modules.items())
        if name.startswith("minivit")
        for key, value in vars(module).items()
        if key.endswith(("_forward", "_backward"))
        and value.__module__.startswith(("minivit.layers", "minivit.layers.loss"))
    }


BLOCK = """blocks.{0} blocks.{0}.norm1 blocks.{0}.msa blocks.{0}.msa.qkv blocks.{0}.msa.attention
    blocks.{0}.msa.attention.softmax blocks.{0}.msa.attention.dropout blocks.{0}.msa.proj blocks.{0}.dropout1
    blocks.{0}.path1 blocks.{0}.path1.dropout blocks.{0}.norm2 blocks.{0}.mlp blocks.{0}.mlp.fc1 blocks.{0}.mlp.gelu
    blocks.{0}.mlp.dropout blocks.{0}.mlp.fc2 blocks.{0}.dropout2 blocks.{0}.path2 blocks.{0}.path2.dropout"""
FORWARD = (
    "patch_embed patch_embed.proj dropout".split()
    + BLOCK.format(0).split()
    + BLOCK.format(1).split()
    + "head head.norm head.pre_logits head.head loss".split()
)


def test_every_call_is_recorded_in_its_order_and_place():
    records = [r for r in traced(pre_logits=7, **DROPS).records if r.direction == "forward"]
    assert [r.path for r in records] == FORWARD
    found = {r.path: r for r in records}
    expected = {  # equation, tensor, shape, depth
        "patch_embed": ("1", "z_0", (3, 5, 12), 0),
        "blocks.0": ("2-3", "z_1", (3, 5, 12), 0),
        "blocks.0.norm2": ("3", "v", (3, 5, 12), 1),
        "blocks.1.norm2": ("3", "v", (3, 1, 12), 1),  # the last block goes on with the class token alone
        "blocks.1.msa.qkv": ("5", "qkv", (3, 5, 36), 2),
        "blocks.0.msa.attention.softmax": ("6", "attn", (3, 3, 5, 5), 3),
        "blocks.0.msa.attention": ("6-7", "heads", (3, 3, 5, 4), 2),
        "blocks.0.mlp.gelu": ("3", "gelu", (3, 5, 20), 2),
        "head.pre_logits": ("4", "pre", (3, 7), 1),
        "loss": ("", "loss", (), 0),
    }
    for path, figures in expected.items():
        r = found[path]
        assert (r.equation, r.output, r.shape, r.depth) == figures
        assert r.dtype == "float32" and r.bytes == 4 * np.prod(r.shape) and r.nonfinite == 0


def test_options_are_recorded_where_they_act():
    records = traced(layer_scale=0.1, qk_norm=True, **DROPS).records
    forward = [r for r in records if r.direction == "forward" and r.path.startswith("blocks.0.") and r.depth == 1]
    names = "norm1 msa dropout1 ls1 path1 norm2 mlp dropout2 ls2 path2".split()
    assert [r.path.removeprefix("blocks.0.") for r in forward] == names
    ls2 = next(r for r in records if (r.path, r.direction) == ("blocks.0.ls2", "backward"))
    assert (ls2.equation, ls2.output, set(ls2.norms)) == ("3", "dmlp", {"dx", "dgamma"})
    assert ls2.flops == 3 * 3 * 5 * 12
    records = traced(registers=2, qk_norm=True, **DROPS).records
    assert [r.path for r in records if r.depth == 0][:3] == ["patch_embed", "registers", "dropout"]
    back = next(r for r in records if (r.path, r.direction) == ("registers", "backward"))
    assert (back.output, back.shape, set(back.norms)) == ("dz_0", (3, 5, 12), {"dz", "dreg_token"})
    assert back.flops == 3 * 2 * 12
    inside = [
        r.path for r in records if r.direction == "forward" and r.path.startswith("blocks.1.msa.") and r.depth == 2
    ]
    assert [path.rpartition(".")[2] for path in inside] == "qkv q_norm k_norm attention proj".split()
    shapes = {r.path: r.shape for r in records}
    assert shapes["blocks.1.msa.q_norm"] == (3, 3, 1, 4) and shapes["blocks.1.msa.k_norm"] == (3, 3, 7, 4)


def test_positions_are_recorded_where_they_act():
    """At the input behind the patch embedding, else before each block but the first, and back in the reverse order."""
    every = {"pos_embed": "learned2d", "pos_at": "every", "registers": 2, "depth": 3}
    records = [r for r in traced(**every).records if r.depth == 0]
    expected = "patch_embed position2d registers dropout blocks.0".split()
    expected += "blocks.1.position2d blocks.1 blocks.2.position2d blocks.2 head loss".split()
    assert [r.path for r in records] == [*expected, *reversed(expected)]
    back = next(r for r in records if (r.path, r.direction) == ("blocks.1.position2d", "backward"))
    assert (back.input, back.output, set(back.norms)) == ("dz_1", "dz_1", {"dz", "dX", "dY"})
    assert back.flops == (3 + 1) * 4 * 12 and back.cached == 0
    records = {(r.path, r.direction): r for r in traced(pos_at="shared", registers=2).records}
    assert records["blocks.1.position", "forward"].flops == 3 * 5 * 12
    records = traced(pos_embed="relative", pos_at="shared", **DROPS).records
    found = {(r.path, r.direction): r for r in records}
    assert found["blocks.1.msa.attention", "forward"].function == "relative_attention_forward"
    assert set(found["blocks.0.msa.attention", "backward"].norms) == {"dq", "dk", "dv", "dr"}
    assert found["blocks.0.msa.attention", "backward"].equation == "6-7"
    assert [r.path for r in records if r.output == "dropped"][-1] == "blocks.0.msa.attention.dropout"


def test_a_stem_is_recorded_by_the_names_of_its_parameters():
    records = traced(image_size=16, stem="2,1", patch_size=1, **STEM).records
    forward = {r.path: r for r in records if r.direction == "forward"}
    assert [r.path for r in records if r.depth == 0 and r.direction == "forward"][:2] == ["stem", "patch_embed"]
    assert [p for p, r in forward.items() if p.startswith("stem") and r.depth == 1] == [
        "stem.root", "stem.stages.0", "stem.stages.1",
    ]  # fmt: skip
    unit = "stem.stages.1.blocks.0."
    names = [p.removeprefix(unit) for p, r in forward.items() if p.startswith(unit) and r.depth == 3]
    assert names == "conv1 relu1 conv2 relu2 conv3 downsample relu3".split()
    assert forward[unit + "conv2.conv2d"].shape == (3, 2, 2, 8) and forward[unit + "conv1.conv2d"].shape == (3, 4, 4, 8)
    assert forward["stem.stages.0.blocks.1.conv3.norm"].function == "groupnorm_forward"
    assert (forward["stem"].input, forward["stem"].output, forward["stem"].shape) == ("images", "map", (3, 2, 2, 32))
    backward = {r.path: r for r in records if r.direction == "backward"}
    assert set(backward) == set(forward)
    assert (backward["stem.root.conv"].output, backward["stem"].output, backward["stem"].shape) == (
        "dkernel",
        "dimages",
        (0,),
    )
    assert set(backward["stem.root.conv"].norms) == {"dkernel", "dw", "db"}  # nobody asks for the pictures' gradient
    assert (
        forward["stem.root.conv.conv2d"].flops == 2 * 3 * 8 * 8 * 49 * 2 * 4 == backward["stem.root.conv.conv2d"].flops
    )
    assert forward[unit + "conv2.conv2d"].flops == 2 * 3 * 2 * 2 * 9 * 8 * 8
    assert backward[unit + "conv2.conv2d"].flops == 4 * 3 * 2 * 2 * 9 * 8 * 8
    assert forward["stem.root.max_pool"].flops == 9 * 3 * 4 * 4 * 4
    assert (
        forward["stem.root"].flops
        - sum(forward[p].flops for p in ("stem.root.conv", "stem.root.relu", "stem.root.max_pool"))
        == 0
    )
    shares = [forward[unit + name].flops for name in names]
    assert forward[unit[:-1]].flops == sum(shares) + 3 * 2 * 2 * 32


def ends(records):
    return [r for event, r, _ in trace.events(records) if event == "out"]


def test_the_backward_is_the_forward_in_reverse():
    records = traced(pre_logits=7, **DROPS).records
    forward = [r for r in records if r.direction == "forward"]
    backward = [r for r in records if r.direction == "backward"]
    assert records == forward + backward
    # attention's backward makes the dropped map again: one more call, before the gradient's own
    again = [r for r in backward if r.output == "dropped"]
    assert [r.path for r in again] == [f"blocks.{i}.msa.attention.dropout" for i in (1, 0)]
    backward = [r for r in backward if r.output != "dropped"]
    stems = [(r.path, r.function.replace("_backward", "_forward"), r.depth) for r in backward]
    assert stems == [(r.path, r.function, r.depth) for r in reversed(ends(forward))]
    for r, f in zip(backward, reversed(ends(forward)), strict=True):
        # the embedding's images need no gradient: its weight's stands there
        assert r.output == ("dW" if r.path.startswith("patch_embed") else f"d{f.input}") and r.input == f"d{f.output}"


def test_norms_are_those_of_the_gradients():
    t = traced(dtype=np.float64)
    grads = params.views(t.gradient, parameter_table(t.config))
    backward = {r.path: r for r in t.records if r.direction == "backward"}
    for path, key, name in (
        ("blocks.1.msa.qkv", "dW", "blocks.1.attn.qkv.weight"), ("blocks.0.mlp.fc2", "db", "blocks.0.mlp.fc2.bias"),
        ("blocks.0.mlp", "dW1", "blocks.0.mlp.fc1.weight"), ("head.norm", "dw", "norm.weight"),
        ("patch_embed", "dpos_embed", "pos_embed"), ("patch_embed", "dcls_token", "cls_token"),
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
    assert trace.statistics(np.array([np.nan, -3.0, 1.0, np.inf])) == (-1.0, 2.0, 3.0)
    assert np.isnan(trace.statistics(np.array([np.nan]))).all()
    assert trace.norm(np.full(4, 1e30, np.float32)) == pytest.approx(2e30)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_totals_are_the_closed_forms(name, dtype):
    if name == "erf":
        pytest.importorskip("scipy")
    t = traced(dtype, **CONFIGS[name])
    found = t.totals
    assert (found.forward_matmul_flops, found.backward_matmul_flops) == trace.expected_flops(t.config, 3)
    assert found.cached == trace.expected_cache_bytes(t.config, 3, dtype)
    assert found.parameters == params.count(parameter_table(t.config))
    assert found.forward_flops > found.forward_matmul_flops and found.backward_flops > found.backward_matmul_flops


@pytest.mark.parametrize("name", ["cls", "mean", "dropout", "attention-dropout", "qk-norm"])
def test_totals_of_long_sequences(name, monkeypatch):
    monkeypatch.setattr(msa, "LONG", 4)
    monkeypatch.setattr(trace, "LONG", 4)
    t = traced(**CONFIGS[name])
    found = {r.path: r.function for r in t.records if r.direction == "backward"}
    assert found["blocks.0.msa.attention"] == "flash_attention_backward"
    last = "flash_attention_backward" if name == "mean" else "attention_backward"
    assert found["blocks.1.msa.attention"] == last
    assert (t.totals.forward_matmul_flops, t.totals.backward_matmul_flops) == trace.expected_flops(t.config, 3)
    assert t.totals.cached == trace.expected_cache_bytes(t.config, 3)


@pytest.mark.parametrize(
    ("name", "function"), [("relative-mean", "relative_attention_backward"), ("axial", "attention_backward")]
)
def test_long_sequences_that_keep_their_maps(name, function, monkeypatch):
    monkeypatch.setattr(msa, "LONG", 4)
    monkeypatch.setattr(trace, "LONG", 4)
    t = traced(**CONFIGS[name])
    assert t.config.num_tokens > 4
    assert {r.function for r in t.records if r.path.endswith("msa.attention") and r.direction == "backward"} == {
        function
    }
    assert (t.totals.forward_matmul_flops, t.totals.backward_matmul_flops) == trace.expected_flops(t.config, 3)
    assert t.totals.cached == trace.expected_cache_bytes(t.config, 3)


def test_without_a_generator_there_are_no_masks():
    config = ViTConfig(**SMALL, **DROPS)
    t = trace.trace_batch(config, *batch(config))
    assert t.totals.cached == trace.expected_cache_bytes(config, 3, dropout=False)
    assert t.totals.cached < trace.expected_cache_bytes(config, 3)


def test_float_pictures_of_a_larger_array_count_as_the_batch_alone():
    config = ViTConfig(**{**SMALL, "patch_size": 8})  # one patch: cutting it out makes a view
    images = np.random.default_rng(0).random((100, 8, 8, 2), dtype=np.float32)[5:8]
    t = trace.trace_batch(config, images, np.zeros(3, int))
    assert t.totals.cached == trace.expected_cache_bytes(config, 3)


@pytest.mark.parametrize(("name", "gmac"), [
    ("Ti/16", 1.25), ("S/16", 4.60), ("B/16", 17.56), ("B/32", 4.41), ("L/16", 61.55), ("L/32", 15.38), ("H/14", 167.3),
])  # fmt: skip
def test_the_paper_s_models(name, gmac):
    flops = trace.expected_flops(ViTConfig.preset(name), 1, every_token=True)
    assert flops.forward / 2e9 == pytest.approx(gmac, abs=0.05 if gmac > 100 else 0.005)
    assert trace.expected_flops(ViTConfig.preset(name), 7, every_token=True) == (7 * flops.forward, 7 * flops.backward)


def test_operations_per_element():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 6))
    with trace.recording() as recorder:
        _, cache = layernorm.layernorm_forward(x, np.ones(6), np.zeros(6))
        layernorm.layernorm_backward(x, cache)
        _, cache = gelu.gelu_forward(x)
        gelu.gelu_backward(x, cache)
        _, cache = linear.linear_forward(x, rng.standard_normal((6, 3)), np.zeros(3))
        linear.linear_backward(np.ones((2, 5, 3)), cache, need_dx=False)
        _, cache = attention.attention_forward(x, x, x)
        attention.attention_backward(x, cache)
    work = [(r.matmul_flops, r.flops) for r in recorder.records if r.depth == 0]
    assert work == [
        (0, 7 * 60), (0, 11 * 60), (0, 8 * 60), (0, 11 * 60),
        (2 * 10 * 6 * 3, 2 * 10 * 6 * 3 + 30), (2 * 10 * 6 * 3, 2 * 10 * 6 * 3 + 30),
        (4 * 2 * 25 * 6, 4 * 2 * 25 * 6 + 50 + 5 * 50), (8 * 2 * 25 * 6, 8 * 2 * 25 * 6 + 50 + 4 * 50),
    ]  # fmt: skip
    cached = [r.cached for r in recorder.records if r.depth == 0 and r.direction == "forward"]
    assert cached == [8 * (60 + 10 + 6), 8 * (60 + 60), 8 * 18, 8 * 50]  # x was counted with gelu; here w and W count


@pytest.mark.parametrize("pooling", ["cls", "mean", "avg", "seq"])
def test_operations_of_the_glue(pooling):
    t = traced(pooling=pooling, pre_logits=7, **DROPS)
    own, parents = {}, []  # operations without those of the calls inside
    for r in t.records:
        del parents[r.depth :]
        own[r.path, r.direction] = r.flops
        if parents:
            own[parents[-1]] -= r.flops
        parents.append((r.path, r.direction))
    tokens, cls = 3 * t.config.num_tokens * 12, pooling == "cls"
    last = 3 * 12 if cls else tokens  # what leaves the last block
    of_block = sum(s.size for s in parameter_table(t.config) if s.name.startswith("blocks.0."))
    of_head = 2 * 12 + 12 * 7 + 7 + 7 * 5 + 5 + 13 * (pooling == "seq")
    expected = {
        "patch_embed": (tokens, tokens + 36 * cls), "dropout": (2 * tokens, 2 * tokens),
        "blocks.1": (2 * last, 2 * last + of_block), "blocks.1.msa": (0, 0), "blocks.1.mlp": (0, 0),
        "blocks.1.path1": (0, 0), "blocks.1.path1.dropout": (2 * last, 2 * last), "blocks.0.path1.dropout": (0, 0),
        "head": ((tokens if pooling in ("mean", "avg") else 0) + 21, 3 * 21 + of_head), "loss": (8 * 15, 3 * 15),
    }  # fmt: skip
    if pooling == "seq":
        expected["head.pool"] = (2 * tokens, 4 * tokens + tokens)
    found = {path: (own[path, "forward"], own[path, "backward"]) for path in expected}
    assert found == expected


@pytest.mark.parametrize("name", ["cls", "dropout-mean"])
def test_it_changes_no_bit(name):
    t = traced(**CONFIGS[name])
    model = ViT(t.config, flat=weights(t.config))
    images, labels = batch(t.config)
    logits, cache = model.forward(images, rng=np.random.default_rng(2) if name != "cls" else None)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=0.1)
    flat, grads = model.gradient_buffer()
    model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    assert t.logits.tobytes() == logits.tobytes() and t.loss == loss and t.gradient.tobytes() == flat.tobytes()
    assert flat.any()


def test_without_figures_the_rest_is_the_same(monkeypatch):
    def records(figures):
        model = ViT(ViTConfig(**SMALL), seed=3)
        with trace.recording([model.flat], figures=figures) as recorder:
            images, labels = batch(model.config)
            logits, cache = model.forward(images)
            dlogits = softmax_cross_entropy_backward(1.0, softmax_cross_entropy_forward(logits, labels)[1])
            model.backward(dlogits, cache, model.gradient_buffer()[1])
        nothing = {"mean": 0, "std": 0, "largest": 0, "norms": {}, "incoming": 0.0, "seconds": 0, "own_seconds": 0}
        return [r._replace(**nothing) for r in recorder.records]

    expected = records(True)
    for name in ("norm", "statistics"):
        monkeypatch.delattr(trace, name)  # not called
    assert records(False) == expected and len(expected) > 20


def test_everything_is_put_back():
    before = everything()
    with trace.recording():
        assert all(value is not before[key] for key, value in everything().items())
    assert everything() == before
    with pytest.raises(RuntimeError), trace.recording():
        raise RuntimeError
    assert everything() == before


def test_a_call_that_fails_leaves_no_record():
    x = np.ones((2, 3))
    with trace.recording() as recorder:
        with pytest.raises(ValueError):
            linear.linear_forward(x, np.ones((4, 4)), np.ones(4))
        softmax.softmax_forward(x)
    (record,) = recorder.records
    assert (record.path, record.depth) == ("softmax", 0)


def test_it_reaches_every_importer_and_no_other_thread():
    x = np.ones((2, 3))
    with trace.recording() as recorder:
        assert block.layernorm_forward is layernorm.layernorm_forward and msa.linear_forward is linear.linear_forward
        thread = threading.Thread(target=softmax.softmax_forward, args=(x,))
        thread.start()
        thread.join()
        assert recorder.records == []
        softmax.softmax_forward(x)
    assert len(recorder.records) == 1


def test_a_second_forward_begins_again_at_block_0():
    config = ViTConfig(**SMALL)
    model, (images, _) = ViT(config), batch(config)
    with trace.recording([model.flat]) as recorder:
        model.predict(images)
        model.predict(images)
    paths = [r.path for r in recorder.records]
    assert paths[: len(paths) // 2] == paths[len(paths) // 2 :] and "blocks.1.msa" in paths


def test_a_backward_is_named_by_its_cache():
    x = np.ones((2, 3))
    with trace.recording():
        _, old = softmax.softmax_forward(x)
    with trace.recording() as recorder:
        caches = [softmax.softmax_forward(x)[1], layernorm.layernorm_forward(x, x[0], x[0])[1]]
        layernorm.layernorm_backward(x, caches[1])
        softmax.softmax_backward(x, caches[0])
        softmax.softmax_backward(x, old)  # from before the recording: named by its function
    assert [r.path for r in recorder.records] == ["softmax", "layernorm", "layernorm", "softmax", "softmax"]


def test_a_cache_that_is_gone_lends_its_name_to_no_other():
    """An object may be made where another one lay that is gone; it has the same id then."""
    config = ViTConfig(**SMALL)
    model, x = ViT(config), np.ones((2, 3))
    with trace.recording() as recorder:
        model.predict(batch(config)[0])  # every cache is dropped
        count = len(recorder.records)
        caches = [layernorm.LayerNormCache(x, x[:, :1], x[0]) for _ in range(50)]
        for cache in caches:
            layernorm.layernorm_backward(x, cache)
    assert {r.path for r in recorder.records[count:]} == {"layernorm"}


def test_times_leave_the_recorder_out(monkeypatch):
    clock = [0.0]

    def slow(array):
        clock[0] += 1.0
        return 0.0, 0.0, 0.0

    monkeypatch.setattr(trace, "statistics", slow)
    monkeypatch.setattr(trace, "perf_counter", lambda: clock[0])
    t = traced()
    assert clock[0] >= len(t.records) > 0
    assert t.totals.forward_seconds == t.totals.backward_seconds == 0.0


def test_times_are_nested(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(trace, "perf_counter", lambda: 2.0**-10 * next(clock))  # whoever looks finds it later
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
    original, calls = getattr(module, name), []

    def broken(*args, **keywords):
        result = original(*args, **keywords)
        calls.append(None)
        if len(calls) == call:
            result = list(result) if isinstance(result, tuple) else [result]
            result[output] = result[output].copy()
            result[output].flat[3] = value
            result = tuple(result) if len(result) > 1 else result[0]
        return result

    broken.__name__, broken.__module__ = original.__name__, original.__module__
    broken.__signature__ = inspect.signature(original)
    for place in list(sys.modules.values()):
        if getattr(place, "__name__", "").startswith("minivit"):
            for key, function in list(vars(place).items()):
                if function is original:
                    monkeypatch.setattr(place, key, broken)


@pytest.mark.parametrize(("module", "name", "call", "output", "tensor", "made_by"), [
    (gelu, "gelu_forward", 2, 0, "gelu", "blocks.1.mlp.gelu (gelu_forward)"),
    (softmax, "softmax_forward", 1, 0, "attn", "blocks.0.msa.attention.softmax (softmax_forward)"),
    (layernorm, "layernorm_forward", 5, 0, "y", "head.norm (layernorm_forward)"),
    (gelu, "gelu_backward", 1, 0, "dhidden", "blocks.1.mlp.gelu (gelu_backward)"),
    (linear, "linear_backward", 2, 1, "dgelu", "blocks.1.mlp.fc2 (linear_backward)"),
    (layernorm, "layernorm_backward", 5, 2, "dz_0", "blocks.0.norm1 (layernorm_backward)"),
])  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_planted_value_is_found(monkeypatch, module, name, call, output, tensor, made_by, value):
    planted(monkeypatch, module, name, value, call, output)
    found = trace.first_non_finite(traced())
    assert (found.tensor, found.made_by, found.inputs_finite) == (tensor, made_by, True)
    assert found.direction == ("forward" if "forward" in name else "backward")
    assert tensor in found.message and made_by in found.message and found.direction in found.message


def test_a_line_between_two_calls_is_found():
    """Scores overflow in attention's own line, and softmax is the first to read them."""
    config = ViTConfig(**SMALL)
    flat = weights(config)
    params.views(flat, parameter_table(config))["blocks.1.attn.qkv.weight"][...] *= 1e20
    t = trace.trace_batch(config, *batch(config), flat=flat)
    assert not any(r.alarms for r in t.records if r.function in ("attention_forward", "linear_forward"))
    found = trace.first_non_finite(t)
    assert (found.tensor, found.made_by) == ("scores", "blocks.1.msa.attention (attention_forward)")
    assert "softmax_forward" in found.message and found.inputs_finite


def test_an_overflow_that_leaves_no_trace_is_found():
    """The variance of huge numbers is infinite, and LayerNorm of them is 0."""
    x = np.array([[1e30, -1e30, 1.0]], np.float32)
    with trace.recording() as recorder:
        y, _ = layernorm.layernorm_forward(x, x[0] * 0 + 1, x[0] * 0)
    assert np.isfinite(y).all() and recorder.records[0].alarms == "overflow"
    found = trace.first_non_finite(recorder)
    assert found.made_by == "layernorm (layernorm_forward)" and "overflow" in found.message


def test_a_backward_that_overflows_is_found():
    """The forward is finite: the head's input is 0, its weights are near the largest float32."""
    config = ViTConfig(**SMALL)
    images, _ = batch(config, 1)
    flat = weights(config)
    named = params.views(flat, parameter_table(config))
    named["norm.weight"][...] = named["norm.bias"][...] = named["head.bias"][...] = 0.0
    named["head.weight"][...] = 3e38 * np.array([-1, 1, 1, 1, 1])
    t = trace.trace_batch(config, images, np.array([0]), flat=flat)
    found = trace.first_non_finite(t)
    assert t.loss == pytest.approx(np.log(5)) and not np.isfinite(t.gradient).all()
    assert (found.tensor, found.direction, found.made_by) == ("dy", "backward", "head.head (linear_backward)")


@pytest.mark.parametrize("name", ["patch_embed.proj.bias", "blocks.1.attn.proj.weight", "norm.bias"])
def test_a_bad_parameter_is_found(name):
    config = ViTConfig(**SMALL)
    flat = weights(config)
    params.views(flat, parameter_table(config))[name].flat[1] = np.nan
    found = trace.first_non_finite(trace.trace_batch(config, *batch(config), flat=flat))
    assert found.tensor == ("b" if name.startswith("patch") else name.removeprefix("blocks.1."))
    assert not found.inputs_finite and found.made_by == ""


def test_what_is_only_written_to_is_no_input():
    x, out = np.ones((1, 3, 4)), np.full((1, 3, 4), np.nan)
    with trace.recording() as recorder:
        attention.attention_forward(x, x, x, out=out)
    assert trace.first_non_finite(recorder) is None


def test_a_bad_cache_is_found():
    x = np.ones((2, 3))
    with trace.recording() as recorder:
        _, cache = softmax.softmax_forward(x)
        cache.y[0, 0] = np.nan
        softmax.softmax_backward(x, cache)
    assert trace.first_non_finite(recorder).tensor == "cache.y"
