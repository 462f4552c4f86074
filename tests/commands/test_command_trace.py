"""The command line ``minivit trace``: the tables, the files, what is not finite, and bad input."""

import json
import math

import numpy as np
import pytest
from conftest import load_script

from minivit import ViT, ViTConfig, figures
from minivit.base import params
from minivit.base.pairs import Pair
from minivit.base.params import dense, ones
from minivit.data import load
from minivit.figures import network
from minivit.laboratory import trace
from minivit.layers.linear import linear_backward, linear_forward
from minivit.model import compose, parameter_table
from minivit.model.costs import expected_flops
from minivit.options.option import Option
from minivit.training.folder import LAST
from minivit.weights import checkpoint

SMALL = [
    "--image-size", 8, "--channels", 1, "--width", 12, "--depth", 2, "--num-heads", 3, "--mlp-dim", 20, "--patch-size",
    4, "--batch-size", 3,
]  # fmt: skip


def test_the_tables_and_the_files(tmp_path, call):
    out = tmp_path / "new" / "out"
    ended = call("trace", *SMALL, "--random-head", "--dropout", 0.1, "--out", out, "--json", tmp_path / "t.json")
    assert ended.status == 0 and ended.err == "", ended.err
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 120
    assert ended.out.index("FORWARD") < ended.out.index("BACKWARD") < ended.out.index("TOTALS")
    assert ended.out.count(" equal") == 3 and "DIFFERENT" not in ended.out and "The head is zero" not in ended.out
    forward = [line[:24].strip() for line in lines[lines.index("") + 2 :]]
    assert forward[: forward.index("")] == [
        "embedding", "proj", "embedding.dropout", "blocks.0", "norm1", "msa", "qkv", "attention", "proj", "msa.dropout",
        "norm2", "mlp", "fc1", "activation", "activation.dropout", "fc2", "mlp.dropout", "blocks.1", "head", "norm",
        "head", "loss",
    ]  # fmt: skip
    assert (out / "trace.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)  # no NaN or Infinity in it
    config = ViTConfig(**report["config"])
    assert (config.width, config.dropout, report["batch"], report["dtype"]) == (12, 0.1, 3, "float32")
    totals, expected = report["totals"], expected_flops(config, 3, image_gradient=True)
    assert totals["forward_matmul_flops"] == expected.forward == report["closed_forms"]["forward"]
    assert totals["backward_matmul_flops"] == expected.backward == report["closed_forms"]["backward"]
    assert totals["cached"] == sum(r["cached"] for r in report["records"] if r["depth"] == 0) > 0
    assert set(report["gradient_norms"]) == {spec.name for spec in parameter_table(config)}
    assert min(norm for name, norm in report["gradient_norms"].items() if "qkv.bias" not in name) > 0
    assert report["first_non_finite"] is None and report["records"][0]["path"] == "embedding"
    assert report["records"][0]["gflop_per_second"] > 0


def test_levels_all_and_no_backward(call):
    shallow = call("trace", *SMALL, "--levels", 0, "--no-backward").out
    assert "BACKWARD" not in shallow and "PARAMETER" not in shallow and "norm1" not in shallow
    assert shallow.count(" equal") == 2
    deep = call("trace", *SMALL, "--levels", 4, "--all").out  # in the last block, attention of the first query
    assert deep.count("softmax") == 4 and deep.count(" norm1 ") == 4 and "blocks.1.norm1.weight" in deep
    assert "The head is zero" in deep  # nobody asked for another one: no gradient behind it
    first = call("trace", *SMALL, "--levels", 3).out
    assert first.count("softmax") == 2 and "blocks.1.norm1.weight" not in first


def test_a_checkpoint_on_its_own_data(trained, tmp_path, call):
    ended = call("trace", "--checkpoint", trained / LAST, "--dtype", "float64", "--json", tmp_path / "t.json")
    assert ended.status == 0 and "digits images of 8x8x1" in ended.out and "float64" in ended.out
    report = json.loads((tmp_path / "t.json").read_text())
    config = checkpoint.load_model(trained / LAST)[0].config
    assert report["config"] == vars(config)
    assert report["totals"]["parameters"] == params.count(parameter_table(config))
    assert report["loss"] < math.log(10)  # it has learned something: these are its own weights and images
    other = call("trace", "--checkpoint", trained / LAST, "--data", "random", "--json", tmp_path / "r.json")
    assert other.status == 0 and json.loads((tmp_path / "r.json").read_text())["loss"] > report["loss"]


def test_data_fit_the_model(call):
    ended = call("trace", "--data", "digits", "--preset", "Nano/4", "--levels", 0, "--no-backward")
    assert ended.status == 0 and "Nano/4: 16 digits images of 8x8x1" in ended.out


def test_the_seed_decides(tmp_path, call):
    def loss(*flags):
        call("trace", *SMALL, "--random-head", "--dropout", 0.2, "--nan", "--json", tmp_path / "t.json", *flags)
        return json.loads((tmp_path / "t.json").read_text())["loss"]

    assert loss() == loss("--seed", 0) != loss("--seed", 1)
    assert loss() != loss("--label-smoothing", 0.5)


def test_the_images_are_drawn_by_the_seed():
    batch_of, config = load_script("trace").batch_of, ViTConfig(image_size=8, channels=1)
    for dataset in (None, load("digits")):
        images, labels = batch_of(dataset, config, 5, 0)
        assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8 and labels.shape == (5,)
        again, other = batch_of(dataset, config, 5, 0), batch_of(dataset, config, 5, 1)
        assert (images == again[0]).all() and (labels == again[1]).all() and (images != other[0]).any()
    at = [(dataset.train_images == image).all(axis=(1, 2, 3)).argmax() for image in images]
    assert (dataset.train_labels[at] == labels).all()


def test_what_is_not_finite_is_named(tmp_path, call):
    fine = call("trace", *SMALL, "--nan", "--random-head")
    assert fine.status == 0 and "every tensor is finite" in fine.out and "FORWARD" not in fine.out
    flags = ["--random-head", "--scale-weights", 1e15]
    ended = call("trace", *SMALL, "--nan", *flags, "--json", tmp_path / "t.json", "--out", tmp_path)
    assert ended.status == 1 and ended.err == ""
    assert "softmax_forward) reads as x, made by blocks.0.msa.attention (attention_forward)" in ended.out
    report = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)
    assert report["first_non_finite"]["tensor"] == "x" and report["loss"] is None
    assert (tmp_path / "trace.png").exists()
    assert call("trace", *SMALL, "--nan", "--dtype", "float64", *flags).status == 0  # float64 has the room
    table = call("trace", *SMALL, *flags)
    assert table.status == 0 and "not finite" in table.out and "reads as x, made by" in table.out


@pytest.mark.parametrize(("flags", "message"), [
    (["--preset", "Ti/17"], "no preset 'Ti/17'"),
    (["--checkpoint", "missing.npz"], "there is no checkpoint at missing.npz"),
    (["--checkpoint", "missing.npz", "--preset", "Ti/16"], "--checkpoint brings its own model"),
    (["--checkpoint", "missing.npz", "--width", "8"], "--checkpoint brings its own model"),
    (["--dtype", "float16"], "invalid choice: 'float16'"),
    (["--data", "imagenet"], "invalid choice: 'imagenet'"),
    (["--data", "cifar10", "--data-dir", "missing"], "missing"),
    (["--data", "digits", "--image-size", "16"], "the model takes 16x16x1 images of 10 classes; digits has 8x8x1"),
    (["--data", "digits", "--num-classes", "9"], "images of 9 classes"),
    (["--data", "digits", "--batch-size", "100000"], "--batch-size 100000 is more than"),
    (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--levels", "-1"], "--levels must be at least 0"),
    (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below 1"),
    (["--label-smoothing", "nan"], "--label-smoothing must be at least 0 and below 1"),
    (["--scale-weights", "inf"], "--scale-weights must be a finite number"),
    (["--width", "10", "--num-heads", "3"], "width 10 is not a multiple of num_heads 3"),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path, monkeypatch, call, flags, message):
    monkeypatch.chdir(tmp_path)
    ended = call("trace", *flags)
    assert ended.status == 2 and message in ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("changes", [
    {}, {"depth": 1, "pooling": "mean", "drop_path": 0.5}, {"dropout": 0.1, "drop_path": 0.2}, {"backward": False},
    {"depth": 1, "mlp": "swiglu"}, {"qk_norm": True, "pooling": "seq", "layer_scale": 0.1},
    {"name": "$x_1$ ^ 猫" * 9},
])  # fmt: skip
def test_the_figure_overlaps_nowhere(tmp_path, monkeypatch, changes):
    """No text lies on another one, or on the edge of the figure; it shows the tensors, shapes and gradients."""
    drawn = []
    monkeypatch.setattr(network, "save", lambda figure, path: drawn.append(figure))
    changes = dict(changes)
    name, backward = changes.pop("name", "B/16"), changes.pop("backward", True)
    config = ViTConfig(**{"image_size": 8, "patch_size": 2, "width": 48, "num_heads": 12, "depth": 3, **changes})
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8), rng.integers(0, 10, 64)
    flat = ViT(config).flat
    flat += np.random.default_rng(2).standard_normal(flat.size).astype(np.float32) * 0.1
    t = trace.trace_batch(config, images, labels, flat=flat, rng=np.random.default_rng(1), backward=backward)
    figures.save_trace(tmp_path / "t.png", t, title=name)
    (figure,) = drawn
    figure.canvas.draw()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    for i, a in enumerate(boxes):
        assert a.x0 >= 0 and a.y0 >= 0 and a.x1 <= figure.bbox.width and a.y1 <= figure.bbox.height
        for j, b in enumerate(boxes[:i]):
            assert not a.overlaps(b), (texts[i].get_text(), texts[j].get_text())
    written = "\n".join(text.get_text() for text in texts)
    tokens = config.num_tokens
    rows = 1 if config.pooling == "cls" and config.depth == 1 else tokens
    assert f"attn 64×12×{rows}×{tokens}" in written and f"z_0\n64×{tokens}×48" in written
    last = 1 if config.pooling == "cls" else tokens  # the head reads the class token alone
    assert f"z_{config.depth}\n64×{last}×48" in written
    assert ("backward" in written) == ("gradient" in written) == backward
    if backward:
        back = {r.path: r for r in t.records if r.direction == "backward"}
        joint = math.hypot(*[back["blocks.0.msa.attention"].norms[name] for name in ("dq", "dk", "dv")])
        ends = [back.get(f"blocks.0.mlp{part}") for part in ("", ".dropout", ".ls2", ".drop_path")]
        end = [r for r in ends if r][-1]  # of the branch
        assert f"dq, dk, dv\nnorm {joint:.2g}" in written
        assert f"dv\nnorm {back['blocks.0.mlp.fc1'].norms['dx']:.2g}" in written
        assert f"dmlp\nnorm {end.incoming:.2g}" in written
        assert f"dz_0\nnorm {back['blocks.0'].norms['dz']:.2g}" in written
    assert "cached" in written and f"{config.depth} block" in written
    assert f"{params.count(parameter_table(config)):,} parameters" in written


def test_an_mlp_of_other_parts_is_one_box(tmp_path, monkeypatch):
    """What an option puts in the place of the MLP may not be a line of boxes."""

    def rows(config):
        return {"mlp": dense("mlp.only", config.width, config.width, ones)}

    def mlp(pair, config, place):
        return Pair(linear_forward, linear_backward, ("mlp.only.weight", "mlp.only.bias"))

    drawn = []
    monkeypatch.setattr(network, "save", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr(compose, "OPTIONS", (*compose.OPTIONS, Option(type("Nothing", (), {}), rows=rows, mlp=mlp)))
    config = ViTConfig(image_size=8, patch_size=4, width=12, num_heads=3, depth=1)
    figures.save_trace(
        tmp_path / "t.png", trace.trace_batch(config, np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, int))
    )
    written = [text.get_text() for text in drawn[0].axes[0].texts]
    assert written.count("mlp") == 1 and "norm2" in written and not {"fc1", "gelu", "fc2"} & set(written)
    assert "v\n2×1×12" in written and "mlp\n2×1×12" in written


def test_a_stem_is_traced(tmp_path, call, no_figures):
    ended = call(
        "trace", "--image-size", 8, "--patch-size", 1, "--stem", 1, "--stem-width", 4, "--stem-groups", 2, "--width", 8,
        "--depth", 1, "--num-heads", 2, "--batch-size", 2, "--all", "--random-head", "--out", tmp_path,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    for start in ("embedding.stem.resnet ", "  root ", "    conv ", "  stages.0 ", "    stages.0.0 "):
        assert sum(line.startswith(start) for line in lines) == 2, start  # forward and backward
    back = next(line for line in reversed(lines) if line.startswith("embedding.stem"))
    assert back.split()[1:3] == ["0", "-"]  # it hands no gradient on
