"""The command line ``minivit convert``, and the scripts that take weights of other programs as they are."""

import json
import re

import numpy as np
import pytest

from minivit import ViT, ViTConfig, parameter_table
from minivit.base import params
from minivit.weights import checkpoint
from minivit.weights import layouts as pretrained

CONFIG = ViTConfig(image_size=8, patch_size=4, channels=1, num_classes=10, width=8, depth=2, num_heads=2, mlp_dim=12)


def random_model(config=CONFIG):
    flat = np.random.default_rng(3).standard_normal(params.count(parameter_table(config)), np.float32)
    return ViT(config, flat=flat)


@pytest.fixture
def digits(tmp_path):
    """An official file of a model that takes the digits."""
    path = tmp_path / "digits.npz"
    pretrained.write(path, random_model(), "official", class_names=[])
    return path


def fails(ended, message):
    assert ended.status == 2 and re.fullmatch(f"(note: .*\n)*error: .*{message}.*\n", ended.err), ended
    assert ended.out == ""


def test_through_every_layout(call, digits, tmp_path):
    steps = [("minivit", "a.npz"), ("timm", "b"), ("hf", "c"), ("official", "d.npz")]
    source = digits
    for layout, name in steps:
        ended = call("convert", source, tmp_path / name, "--to", layout)
        assert ended.status == 0 and ended.err == "" and f"parameters in {tmp_path / name}" in ended.out
        source = tmp_path / name
        if layout == "timm":
            assert "timm.models.VisionTransformer(img_size=8, patch_size=4, in_chans=1" in ended.out
            assert json.loads((source / "config.json").read_text())["model_args"]["act_layer"] == "gelu_tanh"
    assert source.read_bytes() == digits.read_bytes()


def test_info(call, digits, tmp_path):
    ended = call("convert", "--info", digits)
    assert ended.status == 0 and "layout official, float32" in ended.out and "num_heads          2\n" in ended.out
    assert "MultiHeadDotProductAttention_1/key/kernel" in ended.out
    assert f"{random_model().flat.size:,} parameters" in ended.out
    call("convert", digits, tmp_path / "a.npz", "--to", "minivit")
    ended = call("convert", "--info", tmp_path / "a.npz")
    assert "checkpoint of minivit, float32" in ended.out and "params/blocks.1.mlp.fc2.bias" in ended.out
    with np.load(digits) as file:
        np.savez(tmp_path / "bare.npz", **{k: a for k, a in file.items() if not k.startswith("head")})
    ended = call("convert", "--info", tmp_path / "bare.npz")
    assert (
        ended.status == 0
        and "the file has no head" in ended.out
        and re.search(r"head.weight +\(8, 1\) +-\n", ended.out)
    )


def test_class_names_and_a_new_head(call, digits, tmp_path):
    names = [f"Ziffer {k}" for k in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    call("convert", digits, tmp_path / "a.npz", "--to", "minivit", "--class-names", tmp_path / "names.txt")
    assert checkpoint.load_model(tmp_path / "a.npz")[1].class_names == names
    call("convert", tmp_path / "a.npz", tmp_path / "b", "--to", "hf")
    call("convert", tmp_path / "b", tmp_path / "c.npz", "--to", "minivit")
    assert checkpoint.load_model(tmp_path / "c.npz")[1].class_names == names
    (tmp_path / "names.txt").write_text("one\n")
    fails(call("convert", digits, tmp_path / "x", "--to", "hf", "--class-names", tmp_path / "names.txt"), "has 1 class")
    fails(call("convert", digits, tmp_path / "x", "--to", "hf", "--class-names", tmp_path / "none"), "there is no file")
    assert not (tmp_path / "x").exists()
    with np.load(digits) as file:
        np.savez(tmp_path / "bare.npz", **{k: a for k, a in file.items() if not k.startswith("head")})
    fails(call("convert", tmp_path / "bare.npz", tmp_path / "x.npz", "--to", "minivit"), "--num-classes")
    ended = call("convert", tmp_path / "bare.npz", tmp_path / "x.npz", "--to", "minivit", "--num-classes", 3)
    assert "note: the file has no head" in ended.out
    assert checkpoint.load_model(tmp_path / "x.npz")[1].class_names == ["class 0", "class 1", "class 2"]


def test_settings_are_overruled(call, digits, tmp_path):
    call("convert", digits, tmp_path / "a", "--to", "hf", "--gelu", "erf", "--layernorm-eps", 1e-5)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["hidden_act"] == "gelu" and config["layer_norm_eps"] == 1e-5
    fails(call("convert", tmp_path / "a", tmp_path / "b.npz", "--to", "official"), "--layernorm-eps 1e-06 writes")
    flags = ["--gelu", "tanh", "--layernorm-eps", "1e-6", "--naming", "current"]
    assert call("convert", tmp_path / "a", tmp_path / "b.npz", "--to", "official", *flags).status == 0
    with np.load(tmp_path / "b.npz") as file:
        assert "Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel" in file


def test_a_hybrid(call, tmp_path):
    fields = {"patch_size": 1, "width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12, "image_size": 16}
    model = random_model(ViTConfig(**fields, stem="1,1", stem_width=32))
    pretrained.write(tmp_path / "a.npz", model, "official", class_names=[])
    ended = call("convert", "--info", tmp_path / "a.npz")
    assert re.search(r"stem +1,1\n", ended.out) and "block2/unit1/conv_proj/kernel" in ended.out
    ended = call("convert", tmp_path / "a.npz", tmp_path / "b", "--to", "timm")
    assert "backbone=timm.models.resnetv2.ResNetV2(layers=(1, 1), channels=[128, 256], stem_chs=32" in ended.out
    assert "timm's hybrids have other eps" in ended.out and "timm has no name for a model with this stem" in ended.out
    ended = call("convert", tmp_path / "b", tmp_path / "c.npz", "--to", "official")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()
    fails(call("convert", tmp_path / "a.npz", tmp_path / "d", "--to", "hf"), "cannot hold stem")
    flags = ["--to", "minivit", "--stem-groups"]
    call("convert", tmp_path / "a.npz", tmp_path / "e.npz", *flags, 8)
    assert checkpoint.load_model(tmp_path / "e.npz")[0].config.stem_groups == 8
    fails(call("convert", tmp_path / "e.npz", tmp_path / "f.npz", "--to", "official"), "--stem-groups 32 writes")
    fails(call("convert", tmp_path / "a.npz", tmp_path / "f.npz", *flags, 5), "not a multiple of stem_groups 5")
    fails(call("convert", tmp_path / "a.npz", tmp_path / "f.npz", *flags, 0), "stem_groups")
    plain = random_model(CONFIG)
    pretrained.write(tmp_path / "p.npz", plain, "official", class_names=[])
    fails(call("convert", tmp_path / "p.npz", tmp_path / "f.npz", *flags, 8), "is no hybrid")
    assert not (tmp_path / "f.npz").exists() and not (tmp_path / "d").exists()


def test_the_average_is_converted(call, run_copy, tmp_path):
    for weights in ("params", "ema"):
        call("convert", run_copy / "last.npz", tmp_path / weights, "--to", "timm", "--weights", weights)
        model, _ = pretrained.read(tmp_path / weights)
        expected, meta = checkpoint.load_model(run_copy / "last.npz", weights=weights)
        np.testing.assert_array_equal(model.flat, expected.flat)
        assert model.config == expected.config


def test_mistakes_are_one_line_and_nothing_is_lost(call, digits, tmp_path):
    out = tmp_path / "out.npz"
    out.write_text("mine")
    fails(call("convert", digits, out, "--to", "minivit"), "is there already")
    fails(call("convert", digits, out), "say where to write and in which layout")
    fails(call("convert", digits), "say where to write")
    fails(call("convert", tmp_path / "none.npz", out, "--to", "timm"), "there is no")
    fails(call("convert", digits, tmp_path / "x", "--to", "timm", "--heads", 4), "has 2 heads, not 4")
    fails(call("convert", digits, tmp_path / "x", "--to", "timm", "--heads", -1), "cannot be negative")
    call("convert", digits, tmp_path / "mine.npz", "--to", "minivit")
    fails(call("convert", tmp_path / "mine.npz", tmp_path / "x", "--to", "timm", "--heads", 4), "is a checkpoint")
    fails(call("convert", digits, tmp_path / "x", "--to", "pytorch"), "invalid choice")
    (tmp_path / "x.pt").write_bytes(b"\x80\x02}q\x00.")
    fails(call("convert", tmp_path / "x.pt", tmp_path / "x", "--to", "timm"), "is a pickle")
    assert out.read_text() == "mine" and not (tmp_path / "x").exists()
    assert call("convert", digits, out, "--to", "minivit", "--overwrite").status == 0
    call("convert", digits, tmp_path / "deep" / "er.npz", "--to", "minivit")  # folders are made
    assert checkpoint.load_model(tmp_path / "deep" / "er.npz")[0].config == CONFIG


def test_predict_and_evaluate_take_them(call, digits, tmp_path, no_figures):
    np.save(tmp_path / "image.npy", np.arange(64, dtype=np.uint8).reshape(8, 8))
    call("convert", digits, tmp_path / "a.npz", "--to", "minivit")
    call("convert", digits, tmp_path / "b", "--to", "timm")
    seen = []
    for source in (digits, tmp_path / "a.npz", tmp_path / "b"):
        ended = call("predict", source, tmp_path / "image.npy", "--json", tmp_path / "p.json", "--out", tmp_path / "o")
        assert ended.status == 0 and ended.err.count("note: no file says these") == (source == digits)
        seen.append(json.loads((tmp_path / "p.json").read_text())["predictions"][0]["top"])
    assert seen[0] == seen[1] == seen[2] and seen[0][0]["name"].startswith("class ")
    fails(call("predict", digits, "--test", 0), "which data set")
    for source in (digits, tmp_path / "b"):
        ended = call("trace", "--checkpoint", source, "--data", "random", "--batch-size", 2)
        assert ended.status == 0, ended.err
    (tmp_path / "names.txt").write_text("\n".join(map(str, range(10))))
    call("convert", digits, tmp_path / "c.npz", "--to", "minivit", "--class-names", tmp_path / "names.txt")
    ended = call("evaluate", tmp_path / "c.npz", "--data", "digits", "--json", tmp_path / "e.json")
    assert ended.status == 0 and json.loads((tmp_path / "e.json").read_text())["accuracy"] < 0.5
    fails(call("evaluate", digits, "--data", "digits"), "other classes .* class 0, class 1, .*--class-names FILE")
    ended = call("predict", tmp_path / "c.npz", "--test", 0, "--data", "digits", "--out", tmp_path / "o")
    assert ended.status == 0 and "test-0: truly 5" in ended.out
    ended = call("visualize", "journey", tmp_path / "c.npz", "--data", "digits", "--image", 360)
    fails(ended, "there is no test image 360; digits has 0 to 359")
