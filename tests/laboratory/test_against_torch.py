"""The comparison with PyTorch, tensor by tensor. What needs PyTorch runs with: python -m pytest -m torch"""

import dataclasses
import sys

import numpy as np
import pytest

from minivit import InputError, ViT, ViTConfig
from minivit.laboratory.against_torch import LIMIT, compare
from minivit.laboratory.cases import MODEL_BATCH, MODELS
from minivit.laboratory.mistakes import planted


def compared(name):
    config = dataclasses.replace(ViTConfig(**MODELS[name]), dropout=0.0, attention_dropout=0.0, drop_path=0.0)
    rng = np.random.default_rng(0)
    flat = ViT(config, dtype=np.float64).flat
    flat += 0.3 * rng.standard_normal(flat.shape)
    images = rng.standard_normal((MODEL_BATCH, config.image_size, config.image_size, config.channels))
    return compare(config, flat, images, rng.integers(0, config.num_classes, MODEL_BATCH), label_smoothing=0.1)


@pytest.mark.torch
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_pytorchs(name):
    found = compared(name)
    assert len(found) > 90 and max(each.error for each in found) < 1e-12
    parameters = {each.name for each in found if each.path == "blocks.1.mlp.fc1"}
    assert parameters == {"y", "dx", "dW", "db"}


@pytest.mark.torch
@pytest.mark.parametrize(
    ("mistake", "path", "name"),
    [  # of a model that pools by the mean: all tokens of its last block count
        ("layernorm-dropped-mean", "head.norm", "dx"),
        ("softmax-shift-axis", "blocks.0.msa.attention.softmax", "y"),
        ("attention-dk-transpose", "blocks.1.msa.attention", "dk"),
        ("block-residual-dropped", "blocks.1.msa.proj", "dx"),
        ("head-mean-factor", "head.norm", "dx"),
        ("mlp-weights-tied", "blocks.1.mlp", "dW2"),
        ("model-position-not-trained", "embedding", "dpos_embed"),
        ("model-first-block-skipped", "embedding.proj", "dx"),
    ],
)
def test_the_first_tensor_to_differ_is_that_of_the_mistake(mistake, path, name):
    with planted(mistake):
        first = next(each for each in compared("vit-mean") if not each.error <= LIMIT)
    assert (first.path, first.name) == (path, name)


@pytest.mark.torch
def test_the_script(call, tmp_path):
    ended = call("gradcheck", "vit", "vit-mean", "--against", "torch", "--json", tmp_path / "x.json")
    assert ended.status == 0 and ended.out.count("\n") == 3 and (tmp_path / "x.json").exists()
    with planted("gelu-cubic-factor"):
        ended = call("gradcheck", "vit", "--against", "torch")
    assert ended.status == 1 and "the first to differ: dx of blocks.1.mlp.activation in the backward pass" in ended.out


def test_without_pytorch_it_says_what_to_install(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install .minivit\[bench\]"):
        compared("vit")
    ended = call("gradcheck", "vit", "--against", "torch")
    assert ended.status == 2 and ended.err.startswith("error: the comparison needs PyTorch")
    ended = call("gradcheck", "linear", "--against", "torch")
    assert ended.status == 2 and ended.err.startswith("error: --against compares whole models")
