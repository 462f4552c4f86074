"""Live comparisons with Flax, timm and transformers, both ways: python -m pytest -m torch tests/tools/test_parity.py"""

import json

import numpy as np
import pytest
from conftest import load_script

from minivit import ViT, ViTConfig, parameter_table
from minivit.base import params
from minivit.weights import layouts as pretrained

NAMES = list("abcde")


def parity():
    return load_script("parity")


@pytest.mark.torch
@pytest.mark.parametrize("preset", ["Ti/16", "S/16", "B/32"])
@pytest.mark.parametrize("library", ["flax", "timm", "hf"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_maps_and_every_gradient(library, preset, dtype):
    script = parity()
    difference = script.compare(library, preset, dtype)
    assert max(difference.logits, difference.gradients) < script.LIMITS[dtype]
    exact = dtype == "float64" and library != "hf"  # transformers' visible maps are float32's
    assert difference.attention < (1e-10 if exact else 1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("library", ["flax", "timm"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_maps_and_every_gradient_of_an_r26_hybrid(library, dtype):
    script = parity()
    difference = script.compare_hybrid(library, dtype)
    assert script.passes(difference)
    assert difference.attention < {"float32": 1e-4, "float64": 1e-10}[dtype]


def test_gradients_have_a_limit_whatever_the_model():
    script = parity()
    for model, dtype, limit in (
        ("Ti/16", "float32", 1e-5), ("R26+S/32", "float32", 1e-4), ("R26+S/32", "float64", 1e-10),
    ):  # fmt: skip
        near = script.Difference("timm", model, dtype, 0.9 * script.LIMITS[dtype], 1.0, 0.9 * limit, "head.bias")
        assert script.passes(near) and not script.passes(near._replace(gradients=1.1 * limit))
        assert not script.passes(near._replace(logits=1.1 * script.LIMITS[dtype]))


FIELDS = {
    "image_size": 12, "patch_size": 4, "width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 20, "num_classes": 5,
}  # fmt: skip


def written(tmp_path, layout, **changes):
    config = ViTConfig(**FIELDS | changes)
    flat = np.random.default_rng(1).standard_normal(params.count(parameter_table(config)), np.float32)
    path = tmp_path / ("x.npz" if layout == "official" else "x")
    options = {"naming": "current"} if layout == "official" else {}
    pretrained.write(path, ViT(config, flat=flat), layout, class_names=NAMES, **options)
    images = np.random.default_rng(2).uniform(-1, 1, (3, config.image_size, config.image_size, 3)).astype(np.float32)
    return path, images, ViT(config, flat=flat).predict(images)


def close(ours, theirs, limit=1e-5):
    assert np.abs(ours - theirs).max() < limit * np.abs(theirs).max()


STAGES = {"image_size": 16, "patch_size": 1, "stem": "2,1", "stem_width": 32}
ROOT = {"image_size": 8, "patch_size": 2, "stem": "root"}


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes", [{}, {"pooling": "mean"}, {"pre_logits": 7, "pos_embed": "sincos2d"}, {"pos_embed": "none"}, STAGES]
)
def test_the_official_model_takes_what_is_written(tmp_path, changes):
    import jax
    from flax.traverse_util import unflatten_dict

    jax.config.update("jax_platforms", "cpu")
    path, images, logits = written(tmp_path, "official", **changes)
    config, _ = pretrained.read(path)
    model = load_script("make_reference").make_flax_model(vars(config.config), "float32")
    with np.load(path) as file:
        tree = unflatten_dict(dict(file), sep="/")
    close(logits, np.asarray(model.apply({"params": tree}, images)[0]))


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"pooling": "avg", "gelu": "erf"}, {"pooling": "mean", "registers": 2, "pos_embed": "sincos2d"},
        {"registers": 2, "qk_norm": True, "layer_scale": 0.1, "gelu": "erf"}, {"pos_embed": "none"}, {"mlp_dim": 25},
    ],
)  # fmt: skip
def test_timm_takes_what_is_written(tmp_path, changes):
    import timm
    import torch
    from safetensors.torch import load_file

    path, images, logits = written(tmp_path, "timm", **changes)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    arguments = json.loads((path / "config.json").read_text())["model_args"]
    model = timm.models.VisionTransformer(**arguments)
    model.load_state_dict(load_file(path / "model.safetensors"), strict=True)
    with torch.no_grad():
        close(logits, model.eval()(pixels).numpy())
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        close(logits, model(pixels).numpy())
    assert tuple(model.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)


@pytest.mark.torch
@pytest.mark.parametrize(("changes", "named"), [(STAGES | {"gelu": "erf"}, False), (ROOT, True)])
def test_timm_takes_a_hybrid_that_is_written(tmp_path, changes, named):
    """With eps of its own, and so with a small difference; the official ones leave none (test_hybrid.py)."""
    import functools

    import timm
    import timm.models.resnetv2
    import torch
    from safetensors.torch import load_file

    path, images, logits = written(tmp_path, "timm", **changes)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    config = pretrained.read(path)[0].config
    assert config == ViTConfig(**FIELDS | changes)
    model = eval(pretrained.timm_call(config), {"functools": functools, "timm": timm})
    model.load_state_dict(load_file(path / "model.safetensors"), strict=True)
    with torch.no_grad():
        close(logits, model.eval()(pixels).numpy(), 1e-4)
    if not named:
        with pytest.raises(RuntimeError, match="Unknown model .hybrid without a name in timm"):
            timm.create_model(f"local-dir:{path}", pretrained=True)
        return
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    for key, tensor in load_file(path / "model.safetensors").items():
        assert torch.equal(model.state_dict()[key], tensor), key
    with torch.no_grad():
        close(logits, model(pixels).numpy(), 1e-4)


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes", [{}, {"gelu": "erf", "layernorm_eps": 1e-4}, {"pos_embed": "sincos2d", "num_heads": 2}]
)
def test_transformers_takes_what_is_written(tmp_path, changes):
    import torch
    from transformers import ViTForImageClassification, ViTImageProcessor

    path, images, logits = written(tmp_path, "hf", **changes)
    model, info = ViTForImageClassification.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.id2label[4] == "e"
    with torch.no_grad():
        close(logits, model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy())
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    given = np.asarray(ViTImageProcessor.from_pretrained(path)(image, return_tensors="np")["pixel_values"])
    np.testing.assert_allclose(given[0].transpose(1, 2, 0), (image - 127.5) / 127.5, atol=1e-6)
