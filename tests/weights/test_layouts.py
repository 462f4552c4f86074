"""Weights of other programs: what they compute, every way they are stored in, round trips, and what is refused.

The files ``layout_*`` hold small float64 models of Flax, timm and transformers under their own names, with logits and
gradients (tools/make_reference.py); the libraries themselves are asked in test_parity.py.
"""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minivit import InputError, ViT, ViTConfig, parameter_table
from minivit.base import params
from minivit.model import HYBRIDS
from minivit.options.positions import sincos2d
from minivit.weights import checkpoint
from minivit.weights import layouts as pretrained
from minivit.weights.layouts.description import likely_heads
from minivit.weights.layouts.timm import timm_config
from minivit.weights.preprocessing import own
from minivit.weights.tensor_files import Tensor, of_arrays

FILES = {  # file: what the settings come to
    "layout_official": {"pooling": "cls", "pre_logits": 7, "gelu": "tanh", "layernorm_eps": 1e-6, "mlp_dim": 11},
    "layout_timm_registers": {"registers": 2, "qk_norm": True, "layer_scale": 1e-5, "gelu": "erf", "mlp_dim": 12},
    "layout_timm_average": {"pooling": "avg", "registers": 1, "channels": 1, "gelu": "erf", "layernorm_eps": 1e-6},
    "layout_timm_deit3": {"pooling": "cls", "layer_scale": 1e-5, "registers": 0, "qk_norm": False},
    "layout_hf": {"pooling": "cls", "gelu": "erf", "layernorm_eps": 1e-12, "num_heads": 2, "mlp_dim": 11},
    "layout_official_hybrid": {"image_size": 16, "patch_size": 1, "channels": 3, "stem": "2,1", "stem_width": 4},
}
COMMON = {"image_size": 6, "patch_size": 2, "num_classes": 5, "width": 8, "depth": 2, "num_heads": 2}


def stored(name):
    """A reference file: weights, gradients, and everything else."""
    with np.load(Path(__file__).parent.parent / "data" / f"{name}.npz") as file:
        arrays = dict(file)
    parts = {"weights": {}, "grads": {}}
    for key in list(arrays):
        part, _, name = key.partition("/")
        if part in parts:
            parts[part][name] = arrays.pop(key)
    return parts["weights"], parts["grads"], arrays


def put(folder, weights, **extra):
    """Weights as a file of the kind that they come in, with a config.json if there are settings."""
    official = any(key.endswith("embedding/kernel") for key in weights)
    path = folder / ("weights.npz" if official else "model.safetensors")
    if official:
        np.savez(path, **weights)
    else:
        save_file({key: np.ascontiguousarray(a) for key, a in weights.items()}, path)
    if extra:
        (folder / "config.json").write_text(json.dumps(extra))
    return path


def load(path, **options):
    return pretrained.read(path, **({"dtype": np.float64, "heads": 2} | options))


def groups(name):
    """What has to be said of a reference file's hybrid."""
    return {"changes": {"stem_groups": 2}} if name.endswith("hybrid") else {}


def logits_of(model, arrays):
    return model.forward(arrays["images"])[0]


def close(actual, expected, name=""):
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12, err_msg=name)


# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_settings_logits_and_every_gradient(tmp_path, name):
    weights, theirs, arrays = stored(name)
    model, found = load(put(tmp_path, weights), **groups(name))
    for field, value in (COMMON | FILES[name]).items():
        assert getattr(model.config, field) == value, field
    logits, cache = model.forward(arrays["images"])
    close(logits, arrays["logits"])
    _, grads = model.gradient_buffer()
    model.backward(arrays["dlogits"], cache, grads)
    # their gradients have the names and shapes of their weights
    about = pretrained.describe_tensors(of_arrays(theirs), {}, "the gradients", heads=2, **groups(name))
    expected = pretrained.build(about, dtype=np.float64).params
    if FILES[name].get("registers"):  # the sum of two of theirs, each with this gradient
        expected["reg_token"] /= 2
    if name == "layout_timm_deit3":  # the class token's position is ours alone
        expected["pos_embed"][:, :1] = theirs["cls_token"]
    assert grads.keys() == expected.keys()
    for parameter, gradient in grads.items():
        if not parameter.endswith("k_norm.bias"):  # whose gradient is zero
            assert np.abs(expected[parameter]).max() > 1e-7, parameter
        close(gradient, expected[parameter], parameter)


def test_what_was_assumed_is_said(tmp_path):
    weights, _, arrays = stored("layout_timm_average")
    model, found = load(put(tmp_path, weights), heads=0)
    assert model.config.num_heads == 1  # 8 // 64, at least one
    for words in ("how many heads there are: 1 assumed (--heads)", "pixels 0..1 of mean 0.5 and std 0.5 (--pixels)",
                  "exact GELU (--gelu)", "with eps 1e-06 (--layernorm-eps)", "images of 6 x 6 pixels"):  # fmt: skip
        assert words in found.notes[0], words
    assert any("fc_norm beside a class token" in note for note in found.notes)
    assert any("it is the first register" in note for note in found.notes)
    assert np.abs(logits_of(model, arrays) - arrays["logits"]).max() > 0.01
    weights, _, _ = stored("layout_timm_registers")
    assert load(put(tmp_path, weights), heads=0)[0].config.num_heads == 2  # the norm of queries tells


@pytest.mark.parametrize(
    ("extra", "heads"),
    [
        ({"model_args": {"num_heads": 4}}, 4),
        ({"architecture": "vit_huge_patch14_224"}, 16),
        ({"architecture": "vit_so400m_patch14_siglip_gap_224", "global_pool": "token"}, 16),
        ({"architecture": "vit_base_patch16_224"}, 2),
        ({}, 2),
    ],
)
def test_heads_from_config_json(tmp_path, extra, heads):
    config = ViTConfig(
        image_size=4, patch_size=2, width=128, depth=1, num_heads=2, mlp_dim=4, num_classes=2, gelu="erf"
    )
    path = put(tmp_path, pretrained.tensors_of(ViT(config), "timm"), **extra)
    assert pretrained.describe(path).config.num_heads == heads
    assert pretrained.describe(path, heads=8).config.num_heads == 8


def test_heads_of_the_papers_huge_model_are_not_64_wide():
    assert likely_heads(1280, 32) == 16 and likely_heads(768, 12) == 12


@pytest.mark.parametrize("name", ["layout_timm_registers", "layout_timm_deit3", "layout_timm_average"])
def test_timms_config_json_is_heeded(tmp_path, name):
    weights, _, arrays = stored(name)
    arguments = json.loads(str(arrays["settings"]))["arguments"]
    pooling = arguments.get("global_pool", "token")
    path = put(tmp_path, weights, architecture="vit_base_patch16_224", model_args=arguments, global_pool=pooling,
               label_names=list("abcde"))  # fmt: skip
    model, found = load(path, heads=0)
    close(logits_of(model, arrays), arrays["logits"])
    assert found.class_names == list("abcde") and model.config.num_heads == 2
    assert model.config.layer_scale == arguments.get("init_values", 0)
    for wrong, message in (({"act_layer": "quick_gelu"}, "quick_gelu"), ({"global_pool": "map"}, "'map'")):
        with pytest.raises(InputError, match=message):
            load(put(tmp_path, weights, model_args=arguments | wrong))


def test_pooling_is_chosen(tmp_path):
    weights, _, arrays = stored("layout_timm_average")
    model, _ = load(put(tmp_path, weights), pooling="cls")
    assert model.config.pooling == "cls" and model.config.registers == 0
    weights, _, arrays = stored("layout_timm_deit3")
    model, _ = load(put(tmp_path, weights), pooling="mean")
    assert model.config.pooling == "mean" and model.config.registers == 1
    del weights["cls_token"]
    assert load(put(tmp_path, weights))[0].config.pooling == "mean"
    with pytest.raises(InputError, match="no class token"):
        load(put(tmp_path, weights), pooling="cls")
    weights, _, _ = stored("layout_official")
    model, _ = load(put(tmp_path, weights), pooling="mean")
    assert (model.config.pooling, model.config.registers) == ("mean", 1)


def test_hugging_faces_config_json_is_heeded(tmp_path):
    weights, _, arrays = stored("layout_hf")
    said = {"num_attention_heads": 4, "layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh", "image_size": [6, 6]}
    said |= {"id2label": {str(k): f"name {k}" for k in range(5)}, "model_type": "vit"}
    model, found = load(put(tmp_path, weights, **said), heads=0)
    c = model.config
    assert (c.num_heads, c.layernorm_eps, c.gelu) == (4, 1e-3, "tanh") and found.class_names[4] == "name 4"
    said["id2label"] = {str(k): f"LABEL_{k}" for k in range(5)}
    assert load(put(tmp_path, weights, **said), heads=0)[1].class_names is None
    for wrong in ({"model_type": "beit"}, {"hidden_act": "relu"}, {"num_attention_heads": "x"},
                  {"num_attention_heads": 3}, {"layer_norm_eps": "tiny"}, {"image_size": 8}, {"image_size": 7},
                  {"id2label": 3}):  # fmt: skip
        with pytest.raises(InputError):
            load(put(tmp_path, weights, **said | wrong), heads=0)
    assert load(put(tmp_path, weights, **said), changes={"gelu": "erf"})[0].config.gelu == "erf"


# ---- the ways in which one model is stored ---------------------------------------------------------------------------


def published(weights):
    """The names of 2020."""
    names = (("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"), ("MlpBlock_0", "MlpBlock_3"),
             ("LayerNorm_1", "LayerNorm_2"))  # fmt: skip
    for old, new in names:
        weights = {key.replace(old, new): a for key, a in weights.items()}
    return weights


def stacked(weights):
    """big_vision's scan over the blocks."""
    inside = {key.replace("encoderblock_0", "encoderblock") for key in weights if "encoderblock_0" in key}
    whole = {k: np.stack([weights[k.replace("encoderblock", f"encoderblock_{i}")] for i in range(2)]) for k in inside}
    return {k: a for k, a in weights.items() if "encoderblock_" not in k} | whole


def big_vision(weights):
    """Positions of the patches alone, added before the class token comes; here it takes its own with it."""
    weights = dict(weights)
    table = weights.pop("Transformer/posembed_input/pos_embedding")
    return weights | {"pos_embedding": table[:, 1:], "cls": weights["cls"] + table[:, :1]}


def prefixed(prefix, weights):
    other = {"opt/state/step": np.array(3), "elsewhere/t": np.ones(1)}
    return {prefix + key: a for key, a in weights.items()} | other


def bfloat16(weights):
    """As NumPy stores the arrays of ml_dtypes: two bytes of no type. Numbers lose their lower half."""
    return {k: (a.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view("V2") for k, a in weights.items()}


OFFICIAL_FORMS = {
    "published": published,
    "stacked": stacked,
    "published and stacked": lambda w: stacked(published(w)),
    "big_vision": big_vision,
    "params/": partial(prefixed, "params/"),
    "params/img/": partial(prefixed, "params/img/"),
    "opt/target/": lambda w: prefixed("opt/target/", published(w)),
    "big_vision, stacked, prefixed": lambda w: prefixed("params/", stacked(big_vision(w))),
    "columns first": lambda w: {k: np.asfortranarray(a) for k, a in w.items()},
    "big-endian": lambda w: {k: a.astype(">f8") for k, a in w.items()},
}


@pytest.mark.parametrize("form", OFFICIAL_FORMS)
@pytest.mark.parametrize("compressed", [False, True])
def test_official_forms(tmp_path, form, compressed):
    weights, _, arrays = stored("layout_official")
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", **OFFICIAL_FORMS[form](weights))
    model, found = load(tmp_path / "x.npz")
    close(logits_of(model, arrays), arrays["logits"])
    if "opt" in form:
        assert any("left out, outside opt/target/: elsewhere/t, opt/state/step" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["V2", "<V2", "uint16"])
def test_bfloat16_in_npz(tmp_path, kind):
    weights, _, arrays = stored("layout_official")
    np.savez(tmp_path / "x.npz", **{k: a.view(kind) for k, a in bfloat16(weights).items()})
    model, found = load(tmp_path / "x.npz")
    assert {t.kind for t in found.tensors.values()} == {"bfloat16"}
    cut = {k: (a.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32) for k, a in weights.items()}
    exact, _ = load(put(tmp_path, cut))
    np.testing.assert_array_equal(model.flat, exact.flat)
    assert 1e-4 < np.abs(logits_of(model, arrays) - arrays["logits"]).max() < 1


def test_half_precision_and_bfloat16_in_safetensors(tmp_path):
    weights, _, arrays = stored("layout_hf")
    half, _ = load(put(tmp_path, {k: a.astype(np.float16) for k, a in weights.items()}))
    np.testing.assert_allclose(logits_of(half, arrays), arrays["logits"], atol=0.1)
    bits = {k: a.view(np.uint16) for k, a in bfloat16(weights).items()}
    header, start = {}, 0
    for key, a in bits.items():
        header[key] = {"dtype": "BF16", "shape": a.shape, "data_offsets": [start, start := start + a.nbytes]}
    text = json.dumps(header).encode()
    data = b"".join(a.tobytes() for a in bits.values())
    (tmp_path / "b.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    model, found = load(tmp_path / "b.safetensors")
    assert {t.kind for t in found.tensors.values()} == {"bfloat16"}
    np.testing.assert_array_equal(
        model.params["norm.weight"].astype(np.float32).view(np.uint32) >> 16, bits["vit.layernorm.weight"]
    )


HYBRID_FORMS = {
    "published": published,
    "stacked, prefixed": lambda w: prefixed("params/", stacked(w)),
    "opt/target/": lambda w: prefixed("opt/target/", published(w)),
    "GroupNorm of four axes": lambda w: {k: a.reshape(1, 1, 1, -1) if "/gn" in f"/{k}" else a for k, a in w.items()},
}


@pytest.mark.parametrize("form", HYBRID_FORMS)
def test_official_forms_of_a_hybrid(tmp_path, form):
    weights, _, arrays = stored("layout_official_hybrid")
    changed_ones = HYBRID_FORMS[form](weights)
    assert changed_ones.keys() != weights.keys() or changed_ones["gn_root/scale"].shape == (1, 1, 1, 4)
    model, found = load(put(tmp_path, changed_ones), **groups("hybrid"))
    close(logits_of(model, arrays), arrays["logits"])
    assert model.config.stem_units == (2, 1)


def test_the_settings_of_the_papers_hybrids_are_seen_in_the_shapes():
    """Tensors without numbers: their shapes are all that is asked."""
    for preset in HYBRIDS:
        config = ViTConfig.preset(preset)
        for name, gelu in (("official", "tanh"), ("timm", "erf")):
            layout = pretrained.LAYOUTS[name]
            tensors = {}
            for spec in parameter_table(config):
                part = layout.part_shape(spec.name, spec.shape)
                for key in layout.keys(spec.name):
                    shape = layout.shape(spec.name, part, config)
                    tensors[key] = Tensor(shape, "float32", None)
            found = pretrained.describe_tensors(tensors, {}, preset)
            assert found.config == replace(config, gelu=gelu), preset
            assert any("other eps in GroupNorm" in note for note in found.notes) == (name == "timm")
            assert ("conv_root/kernel" in tensors) == (name == "official")


def test_without_pre_logits(tmp_path):
    weights, _, _ = stored("layout_official")
    weights = {k: a for k, a in weights.items() if not k.startswith("pre_logits")}
    weights["head/kernel"] = np.ones((8, 5))
    assert load(put(tmp_path, weights))[0].config.pre_logits == 0


def test_big_vision_without_a_class_token_or_with_fixed_positions(tmp_path):
    weights, _, _ = stored("layout_official")
    table = weights.pop("Transformer/posembed_input/pos_embedding")
    model, found = load(put(tmp_path, weights), image_size=6)
    assert model.config.pos_embed == "sincos2d" and model.config.image_size == 6 and "the fixed ones" in found.notes[-1]
    learned, _ = load(put(tmp_path, weights | {"pos_embedding": sincos2d(3, 8)}))
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 3))
    close(model.predict(images), learned.predict(images))
    assert load(put(tmp_path, weights))[0].config.image_size == 224
    del weights["cls"]
    assert load(put(tmp_path, weights | {"pos_embedding": table[:, 1:]}))[0].config.pooling == "mean"


def test_hugging_faces_other_names(tmp_path):
    weights, _, arrays = stored("layout_hf")
    new = {}
    for key, a in weights.items():  # the names of transformers 5's own modules
        key = key.replace("encoder.layer.", "layers.").replace("attention.attention.", "attention.")
        key = key.replace("attention.output.dense", "attention.o_proj").replace("intermediate.dense", "mlp.fc1")
        new[re.sub(r"attention\.(query|key|value)", lambda m: f"attention.{m[1][0]}_proj", key).replace(
            ".output.dense", ".mlp.fc2")] = a  # fmt: skip
    assert "vit.layers.1.mlp.fc2.weight" in new and "vit.layers.0.attention.k_proj.bias" in new
    close(logits_of(load(put(tmp_path, new))[0], arrays), arrays["logits"])
    # ViTModel: no classifier, no prefix, a pooler
    bare = {k.removeprefix("vit."): a for k, a in weights.items() if not k.startswith("classifier")}
    with pytest.raises(InputError, match="no head; say how many classes"):
        load(put(tmp_path, bare))
    rng = np.random.default_rng(0)
    pooler = {"pooler.dense.weight": rng.standard_normal((9, 8)), "pooler.dense.bias": rng.standard_normal(9)}
    model, found = load(put(tmp_path, bare | pooler), num_classes=3)
    assert model.config.pre_logits == 9 and model.config.num_classes == 3 and "no head" in found.notes[-1]
    np.testing.assert_array_equal(model.params["pre_logits.weight"], pooler["pooler.dense.weight"].T)
    assert not model.params["head.weight"].any()
    with pytest.raises(InputError, match="a pooler and a classifier"):
        load(put(tmp_path, weights | {"vit." + k: a for k, a in pooler.items()}))


def test_deit3s_names_no_biases_and_the_pre_logits_of_old_files(tmp_path):
    weights, _, arrays = stored("layout_timm_deit3")
    renamed = {re.sub(r"ls([12])\.gamma", r"gamma_\1", key): a for key, a in weights.items()}
    assert "blocks.1.gamma_2" in renamed
    close(logits_of(load(put(tmp_path, renamed))[0], arrays), arrays["logits"])
    without = {k: a for k, a in weights.items() if not k.endswith("qkv.bias")}
    model, found = load(put(tmp_path, without))
    assert not model.params["blocks.1.attn.qkv.bias"].any() and any("no biases" in note for note in found.notes)
    old = weights | {"pre_logits.fc.weight": np.ones((8, 8)), "pre_logits.fc.bias": np.ones(8)}
    assert load(put(tmp_path, old))[0].config.pre_logits == 8


def test_a_position_table_that_can_be_read_in_two_ways(tmp_path):
    config = ViTConfig(image_size=6, patch_size=2, width=8, depth=1, num_heads=2, mlp_dim=4, num_classes=2, registers=6,
                       gelu="erf")  # fmt: skip
    path = put(tmp_path, pretrained.tensors_of(ViT(config), "timm"))
    with pytest.raises(InputError, match="16 positions for 7 tokens .* in two ways"):
        load(path)
    assert load(path, image_size=6)[0].config.image_size == 6
    assert load(path, image_size=8)[0].config.image_size == 8
    for embedded, size in ((False, 6), (True, 8)):
        path = put(tmp_path, load_file(path), model_args={"no_embed_class": embedded})
        assert load(path)[0].config.image_size == size
    with pytest.raises(InputError, match="are not 6 x 6"):
        load(path, image_size=12)


# ---- writing ---------------------------------------------------------------------------------------------------------


def random_model(**changes):
    config = ViTConfig(**COMMON | {"mlp_dim": 11} | changes)
    flat = np.random.default_rng(5).standard_normal(params.count(parameter_table(config)), np.float32)
    return ViT(config, flat=flat)


def write(path, model, layout, **options):
    return pretrained.write(path, model, layout, class_names=list("abcde"), **options)


def test_from_the_official_layout_through_all_others_and_back_bit_for_bit(tmp_path):
    write(tmp_path / "a.npz", random_model(), "official")
    model, _ = pretrained.read(tmp_path / "a.npz")
    write(tmp_path / "timm", model, "timm")
    model, found = pretrained.read(tmp_path / "timm")
    assert found.class_names == list("abcde")
    write(tmp_path / "hf", model, "hf")
    model, found = pretrained.read(tmp_path / "hf")
    assert found.class_names == list("abcde") and all("of no effect" in note for note in found.notes)
    write(tmp_path / "b.npz", model, "minivit")
    model, record = checkpoint.load_model(tmp_path / "b.npz")
    assert record.class_names == list("abcde")
    write(tmp_path / "c.npz", model, "official")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()
    assert model.config == random_model().config
    np.testing.assert_array_equal(model.flat, random_model().flat)


SMALL_HYBRID = {"image_size": 16, "patch_size": 1, "stem": "2,1", "stem_width": 32}  # GroupNorm has 32 groups
ROOT = {"image_size": 8, "stem": "root", "stem_width": 64}


@pytest.mark.parametrize("changes", [SMALL_HYBRID, ROOT])
@pytest.mark.parametrize("naming", ["published", "current"])
def test_a_hybrid_from_the_official_layout_to_timm_and_back_bit_for_bit(tmp_path, changes, naming):
    model = random_model(**changes)
    write(tmp_path / "a.npz", model, "official", naming=naming)
    first, found = pretrained.read(tmp_path / "a.npz")
    assert first.config == model.config and len(found.notes) == 1
    np.testing.assert_array_equal(first.flat, model.flat)
    write(tmp_path / "timm", first, "timm")
    state = load_file(tmp_path / "timm" / "model.safetensors")
    kernels = {key: a for key, a in state.items() if a.ndim == 4}
    for key, kernel in kernels.items():
        ours = model.params[key]
        ours = ours.reshape(*kernel.shape[2:], -1, kernel.shape[0])  # patches are rows of a matrix
        np.testing.assert_array_equal(kernel, ours.transpose(3, 2, 0, 1), key)
    second, found = pretrained.read(tmp_path / "timm")
    assert second.config == model.config and found.class_names == list("abcde")
    write(tmp_path / "b.npz", second, "minivit")
    third, _ = checkpoint.load_model(tmp_path / "b.npz")
    write(tmp_path / "c.npz", third, "official", naming=naming)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()


def test_a_hybrid_is_written_under_the_names_of_the_official_model():
    weights, _, _ = stored("layout_official_hybrid")
    written = pretrained.tensors_of(random_model(**SMALL_HYBRID), "official", naming="current")
    assert written.keys() == weights.keys()
    for key, array in written.items():
        assert array.ndim == weights[key].ndim, key
        assert key.startswith(("Transformer", "block2")) or array.shape[:2] == weights[key].shape[:2] or array.ndim < 4


def test_timms_names_of_hybrids():
    """Only those that timm.create_model can make as they are."""
    assert [pretrained.timm_architecture(ViTConfig.preset(name)) for name in ("R26+S/32", "R+Ti/16")] == [
        "vit_small_r26_s32_224", "vit_tiny_r_s16_p8_224",
    ]  # fmt: skip
    assert pretrained.timm_architecture(ViTConfig()) == "vit_base_patch16_224"
    for changes in ({"stem_width": 128}, {"stem_groups": 16}, {"stem": "1,1"}):
        assert pretrained.timm_architecture(ViTConfig.preset("R26+S/32", **changes)) == ""
    config = ViTConfig(**COMMON | SMALL_HYBRID | {"stem_groups": 8})
    content = timm_config(config, list("abcde"), own(config.image_size))
    assert (content["architecture"], content["stem_groups"]) == ("hybrid without a name in timm", 8)
    assert content["pretrained_cfg"]["first_conv"] == "patch_embed.backbone.stem.conv"


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("timm", SMALL_HYBRID | {"stem_groups": 4, "pooling": "avg", "channels": 1}),
        ("timm", ROOT | {"registers": 2, "stem_groups": 1}), ("official", ROOT | {"pooling": "mean"}),
        ("official", {"pre_logits": 3}), ("official", {"pooling": "mean"}), ("official", {"num_heads": 4}),
        ("timm", {"pooling": "mean", "registers": 2}), ("timm", {"pooling": "avg", "gelu": "erf"}),
        ("timm", {"registers": 3, "layer_scale": 0.1, "qk_norm": True}), ("timm", {"num_heads": 1, "mlp_dim": 24}),
        ("hf", {"gelu": "erf", "layernorm_eps": 1e-5}), ("hf", {"num_heads": 8}),
    ],
)  # fmt: skip
def test_what_was_written_is_read_as_it_was(tmp_path, layout, changes):
    model = random_model(**changes)
    path = tmp_path / ("x.npz" if layout == "official" else "x")
    for again in write(path, model, layout):
        assert again.exists()
    back, found = pretrained.read(path)
    assert back.config == model.config and found.layout.name == layout
    np.testing.assert_array_equal(back.flat, model.flat)
    if layout == "official":
        write(path, model, layout, naming="current", overwrite=True)
        with np.load(path) as file:
            assert "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out/kernel" in file
        np.testing.assert_array_equal(pretrained.read(path)[0].flat, model.flat)


def test_timms_ratio_gives_the_mlp_its_width():
    """timm cuts width * ratio off to a whole number, which may be one too small."""
    for width, mlp_dim in ((28, 61), (44, 15), (44, 49), (12, 20), (8, 32)):
        config = ViTConfig(width=width, num_heads=2, mlp_dim=mlp_dim)
        assert int(width * pretrained.timm_arguments(config)["mlp_ratio"]) == mlp_dim


@pytest.mark.parametrize("layout", pretrained.LAYOUTS)
@pytest.mark.parametrize("positions", ["sincos2d", "learned2d", "none"])
def test_other_positions_are_written_as_their_table(tmp_path, layout, positions):
    model = random_model(pos_embed=positions, **({"registers": 2} if layout == "timm" else {}))
    path = tmp_path / ("x.npz" if layout == "official" else "x")
    write(path, model, layout)
    back, _ = pretrained.read(path)
    assert back.config == replace(model.config, pos_embed="learned")
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 3), np.float32)
    np.testing.assert_allclose(back.predict(images), model.predict(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("official", {"registers": 1}, "cannot hold registers = 1"),
        ("official", {"gelu": "erf"}, "cannot hold gelu = 'erf' (only tanh); --gelu tanh writes"),
        ("official", {"layernorm_eps": 1e-5}, "--layernorm-eps 1e-06 writes"),
        ("official", {"pooling": "avg"}, "cannot hold pooling = 'avg' (only cls or mean)"),
        ("official", {"pos_embed": "relative", "pos_at": "every"}, "cannot hold pos_embed = 'relative'"),
        ("timm", {"pos_at": "every"}, "cannot hold pos_at = 'every' (only input)"),
        ("hf", {"stem": "root", "patch_size": 1, "image_size": 8}, "cannot hold stem = 'root' (only none)"),
        ("official", {"qk_norm": True}, "qk_norm"), ("official", {"layer_scale": 0.5}, "layer_scale"),
        ("timm", {"pre_logits": 4}, "cannot hold pre_logits = 4"), ("timm", {"pooling": "seq"}, "pooling = 'seq'"),
        ("timm", {"layernorm_eps": 1e-5}, "layernorm_eps"),
        ("hf", {"pooling": "mean"}, "(only cls)"), ("hf", {"pre_logits": 4}, "pre_logits"),
        ("hf", {"registers": 1}, "registers"), ("hf", {"qk_norm": True}, "qk_norm"),
        ("hf", {"layer_scale": 0.5}, "layer_scale"),
        ("hf", ROOT, "cannot hold stem = 'root' (only none)"),
        ("official", ROOT | {"stem_groups": 8}, "stem_groups = 8 (only 32); --stem-groups 32 writes"),
        *[
            (layout, changes, message)
            for layout in pretrained.LAYOUTS
            for changes, message in (
                ({"pos_at": "every"}, "pos_at = 'every'"), ({"pos_at": "shared"}, "pos_at = 'shared'"),
                ({"pos_embed": "learned2d", "pos_at": "every"}, "pos_at = 'every'"),
                ({"pos_embed": "relative", "pos_at": "every"}, "pos_embed = 'relative'"),
                ({"attention": "axial", "pooling": "mean"}, "pooling" if layout == "hf" else "attention = 'axial'"),
                (ROOT | {"pos_at": "every"}, "pos_at = 'every'"),
            )
        ],
    ],
)  # fmt: skip
def test_what_a_layout_cannot_hold_is_refused_before_anything_is_written(tmp_path, layout, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        write(tmp_path / "x", random_model(**changes), layout)
    assert not list(tmp_path.iterdir())


def test_every_setting_is_held_or_refused():
    """A setting that nobody thought of is refused, unless it is that of a plain model."""
    for layout in pretrained.LAYOUTS:
        assert set(pretrained.LAYOUTS[layout].holds) <= set(vars(ViTConfig()))
        pretrained.check_held(ViTConfig(), layout)


def test_nothing_is_overwritten_silently(tmp_path):
    model = random_model()
    for layout, path, file in (
        ("official", "x.npz", "x.npz"),
        ("minivit", "x.npz", "x.npz"),
        ("hf", "x", "x/config.json"),
    ):
        target = tmp_path / file
        target.parent.mkdir(exist_ok=True)
        target.write_text("mine")
        with pytest.raises(InputError, match="there already"):
            write(tmp_path / path, model, layout)
        assert target.read_text() == "mine"
        write(tmp_path / path, model, layout, overwrite=True)
        assert target.read_bytes()[:4] != b"mine"
    with pytest.raises(InputError, match="is a file; timm needs a folder"):
        write(tmp_path / "x.npz", model, "timm")
    with pytest.raises(InputError, match="is a folder; name the"):
        write(tmp_path / "x", model, "official")


# ---- files that are no weights of a ViT ------------------------------------------------------------------------------


def changed(weights, **changes):
    return {k: a for k, a in (weights | changes).items() if a is not None}


B = "Transformer/encoderblock_"
BROKEN = {  # file, key -> array or None, what the message says
    "no block 0": ("layout_official", {f"{B}0/LayerNorm_0/scale": None}, f"lacks {B}0/LayerNorm_0/scale"),
    "no such part": ("layout_timm_deit3", {"attn_pool.latent": np.zeros(1)}, "no part of the model takes: attn"),
    "a map head": ("layout_official", {"MAPHead_0/probe": np.zeros((1, 1, 8))}, "takes: MAPHead_0/probe"),
    "two heads": ("layout_timm_deit3", {"head_dist.weight": np.zeros((5, 8))}, "no distillation token"),
    "of BEiT": ("layout_hf", {"vit.encoder.layer.0.lambda_1": np.zeros(8)}, "takes: vit.encoder.layer.0.lambda_1"),
    "a wrong shape": ("layout_timm_deit3", {"blocks.1.mlp.fc1.weight": np.zeros((12, 9))}, "fc1.weight has shape"),
    "transposed": ("layout_hf", {"classifier.weight": np.zeros((8, 5))}, "classifier"),
    "heads that differ": ("layout_official", {f"{B}1/MultiHeadDotProductAttention_0/out/kernel": np.zeros((4, 2, 8))},
                          "MultiHeadDotProductAttention_1/out/kernel has shape (4, 2, 8), the model needs (2, 4, 8)"),
    "nan": ("layout_official", {f"{B}1/MlpBlock_0/Dense_1/bias": np.full(8, np.nan)}, "Dense_1/bias holds values"),
    "too large for float32": ("layout_timm_deit3", {"head.bias": np.full(5, 1e300)}, "head.bias holds values"),
    "infinite": ("layout_timm_deit3", {"cls_token": np.full((1, 1, 8), np.inf)}, "cls_token holds values"),
    "integers": ("layout_timm_deit3", {"head.bias": np.zeros(5, np.int64)}, "head.bias holds"),
    "five positions": ("layout_hf", {"vit.embeddings.position_embeddings": np.zeros((1, 6, 8))}, "are no square"),
    "a batch of tokens": ("layout_timm_deit3", {"cls_token": np.zeros((2, 1, 8))}, "cls_token has shape"),
    "two class tokens": ("layout_timm_deit3", {"cls_token": np.zeros((1, 2, 8))}, "cls_token has shape"),
    "oblong patches": ("layout_timm_deit3", {"patch_embed.proj.weight": np.zeros((8, 3, 2, 3))}, "2 x 3 pixels"),
    "no size": ("layout_timm_deit3", {"patch_embed.proj.weight": np.zeros((8, 0, 2, 2))}, "has shape (8, 0, 2, 2)"),
    "flat patches": ("layout_timm_deit3", {"patch_embed.proj.weight": np.zeros((8, 12))}, "has shape (8, 12)"),
    "part of a layer": ("layout_timm_deit3", {"blocks.1.ls1.gamma": None}, "lacks blocks.1.ls1.gamma"),
    "more than the rest": ("layout_timm_deit3", {"blocks.1.attn.q_norm.bias": np.zeros(4)}, "no place for: blocks.1"),
    "a bias too few": ("layout_timm_deit3", {"blocks.1.attn.qkv.bias": None}, "lacks blocks.1.attn.qkv.bias"),
    "two names": ("layout_official", {f"{B}1/LayerNorm_2/scale": np.ones(8)}, "under two names"),
    "a gap in a stage": ("layout_official_hybrid", {"block1/unit9/conv1/kernel": np.zeros((1, 1, 16, 4))},
                         "lacks block1/unit3/, and holds later ones"),
    "a stage too few": ("layout_official_hybrid", {"block4/unit1/gn1/bias": np.zeros(4)}, "lacks block3/unit1/"),
    "no root": ("layout_official_hybrid", {"conv_root/kernel": None}, "lacks conv_root/kernel"),
    "half a unit": ("layout_official_hybrid", {"block1/unit2/gn2/scale": None}, "lacks block1/unit2/gn2/scale"),
    "a second shortcut": ("layout_official_hybrid", {"block1/unit2/conv_proj/kernel": np.zeros((1, 1, 16, 16))},
                          "no part of the model takes: block1/unit2/conv_proj/kernel"),
    "a wide kernel": ("layout_official_hybrid", {"block1/unit1/conv2/kernel": np.zeros((5, 5, 4, 4))},
                      "conv2/kernel has shape (5, 5, 4, 4), the model needs (3, 3, 4, 4)"),
    "a batch of scales": ("layout_official_hybrid", {"gn_root/scale": np.zeros((2, 1, 1, 4))}, "gn_root/scale has sh"),
    "patches of an image": ("layout_official_hybrid", {"embedding/kernel": np.zeros((1, 1, 3, 8))},
                             "embedding/kernel has shape (1, 1, 3, 8), the model needs (1, 1, 32, 8)"),
    "a stem alone": ("layout_timm_deit3", {"patch_embed.backbone.conv1.weight": np.zeros((4, 3, 7, 7))},
                     "no part of the model takes: patch_embed.backbone.conv1.weight"),
    "nothing at all": ("layout_official", {"embedding/kernel": None}, "has no layout known here"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_is_none_is_refused_in_one_sentence(tmp_path, name):
    file, changes, message = BROKEN[name]
    weights = changed(stored(file)[0], **changes)
    path = tmp_path / "x.npz"
    if file.startswith("layout_official"):
        np.savez(path, **weights)
    else:
        path = put(tmp_path, weights)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load(path, dtype=np.float32, **groups(file))
    assert str(path) in str(error.value) and len(str(error.value)) < 400


def test_what_a_hybrid_has_to_be_told(tmp_path):
    weights, _, _ = stored("layout_official_hybrid")
    path = put(tmp_path, weights)
    with pytest.raises(InputError, match="stem_width 4 is not a multiple of stem_groups 32 .--stem-groups."):
        load(path)
    with pytest.raises(InputError, match="stem cannot take ours"):
        load(path, imagenet_pixels=True, **groups("hybrid"))
    with pytest.raises(InputError, match="are not 1 x 1"):
        load(path, image_size=8, **groups("hybrid"))
    with pytest.raises(InputError, match="20 pixels are no multiple of the patches' 8"):
        load(path, image_size=20, **groups("hybrid"))
    del weights["Transformer/posembed_input/pos_embedding"]
    assert load(put(tmp_path, weights), **groups("hybrid"))[0].config.image_size == 224


def test_a_missing_block_is_named(tmp_path):
    weights, _, _ = stored("layout_official")
    gap = {key.replace("encoderblock_1", "encoderblock_2"): a for key, a in weights.items()}
    with pytest.raises(InputError, match="lacks block 1"):
        load(put(tmp_path, gap))
    none = {key: a for key, a in weights.items() if "encoderblock" not in key}
    with pytest.raises(InputError, match="lacks block 0"):
        load(put(tmp_path, none))
    ragged = stacked(weights) | {"Transformer/encoderblock/LayerNorm_0/scale": np.ones((3, 8))}
    with pytest.raises(InputError, match="lacks"):
        load(put(tmp_path, ragged))
    with pytest.raises(InputError, match="no stack of blocks"):
        load(put(tmp_path, stacked(weights) | {"Transformer/encoderblock/LayerNorm_0/scale": np.array(1.0)}))


def test_options_that_contradict_the_file(tmp_path):
    weights, _, _ = stored("layout_official")
    path = put(tmp_path, weights)
    for options, message in (({"heads": 4}, "has 2 heads, not 4"), ({"num_classes": 3}, "has 5 classes, not 3")):
        with pytest.raises(InputError, match=message):
            load(path, **options)
    with pytest.raises(InputError, match="no multiple of"):
        load(path, image_size=7)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="no JSON object"):
        load(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        load(path)
    (tmp_path / "config.json").write_text('{"model_args": 3}')
    with pytest.raises(InputError):
        load(put(tmp_path, stored("layout_timm_deit3")[0]))


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_images_normalised_in_another_way_come_to_the_same_logits(tmp_path):
    mean, std = np.array(pretrained.IMAGENET)
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    theirs = (images / 255 - mean) / std
    for name, beside in (("layout_timm_deit3", None), ("layout_hf", "preprocessor_config.json")):
        weights, _, _ = stored(name)
        path = put(tmp_path, weights, **({} if beside is None else {"num_attention_heads": 2}))
        expected = load(path)[0].predict(theirs)
        model, found = load(path, imagenet_pixels=True)
        close(model.predict(images), expected)
        assert "made part of the patch embedding" in found.notes[-1]
        if beside is None:
            images_of = {"mean": list(mean), "std": list(std), "input_size": [3, 6, 6]}
            put(tmp_path, weights, pretrained_cfg=images_of, model_args={"num_heads": 2})
        else:
            said = {"image_mean": list(mean), "image_std": list(std), "size": 6}
            (tmp_path / beside).write_text(json.dumps(said))
        close(load(path)[0].predict(images), expected)
    for bad in ([0.2, 0.2], [0.2, 0.2, 0.0], [0.2, 0.2, "x"]):
        (tmp_path / beside).write_text(json.dumps({"image_mean": 0.5, "image_std": bad}))
        with pytest.raises(InputError):
            load(path)
    (tmp_path / beside).write_text(json.dumps({"image_mean": 0.5, "image_std": [0.5, 0.5, 0.5], "size": 6}))
    np.testing.assert_array_equal(
        load(path)[0].params["patch_embed.proj.bias"], weights["vit.embeddings.patch_embeddings.projection.bias"]
    )
