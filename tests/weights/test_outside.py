"""Models of other programs with all that lies beside them: tools/make_reference.py asked for their logits of images."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from minivit import InputError
from minivit.data import read_image
from minivit.weights import checkpoint, layouts
from minivit.weights.layouts.architectures import FACTS, REASONS, architecture_of
from minivit.weights.layouts.processors import of_timm, of_transformers
from minivit.weights.preprocessing import CLIP, IMAGENET, Preprocessing, of_meta, pixels_of

DATA = Path(__file__).parent.parent / "data"
with np.load(DATA / "outside_models.npz") as file:
    ARRAYS = dict(file)
with np.load(DATA / "outside_pixels.npz") as file:
    IMAGES = [file[f"image/{k}"] for k in range(3)]
FILES = json.loads(str(ARRAYS.pop("settings")))["files"]
FROM_FILES = [name for name in FILES if FILES[name]]


def weights_of(name):
    return {k.removeprefix(f"{name}/weights/"): a for k, a in ARRAYS.items() if k.startswith(f"{name}/weights/")}


def put(folder, name, *, weights=None, **changes):
    """A model's folder; ``changes`` of its config.json, ``None`` takes a key out."""
    folder.mkdir(exist_ok=True)
    save_file(weights or weights_of(name), folder / "model.safetensors")
    for file, content in FILES[name].items():
        content = content | (changes if file == "config.json" else {})
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def logits_of_files(tmp_path, path, **options):
    """What minivit makes of the image files."""
    model, record, notes = layouts.load_any(path, **options)
    for k, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    images = [read_image(tmp_path / f"{k}.png", 8, record.preprocessing) for k in range(3)]
    return model.predict(np.stack(images)), notes


def close(ours, theirs):
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


# ---- right from the image file on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FROM_FILES)
def test_logits_from_image_files(tmp_path, name):
    logits, notes = logits_of_files(tmp_path, put(tmp_path / "m", name))
    close(logits, ARRAYS[f"{name}/logits"])
    assert not any("assumed" in note for note in notes)


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_checkpoint_made_of_it_keeps_how_images_are_cut(tmp_path, call, name):
    ended = call("convert", put(tmp_path / "m", name), tmp_path / "a.npz", "--to", "minivit")
    assert ended.status == 0
    close(logits_of_files(tmp_path, tmp_path / "a.npz")[0], ARRAYS[f"{name}/logits"])


@pytest.mark.parametrize(("name", "to"), [("vit", "hf"), ("vit, not rescaled", "hf"), ("timm, registers", "timm")])
def test_what_is_written_again_means_the_same(tmp_path, call, name, to):
    source = put(tmp_path / "m", name)
    assert call("convert", source, tmp_path / "b", "--to", to).status == 0
    close(logits_of_files(tmp_path, tmp_path / "b")[0], ARRAYS[f"{name}/logits"])
    first, again = (layouts.load_any(path)[1].preprocessing for path in (source, tmp_path / "b"))
    assert again._replace(fill=first.fill) == first


def test_torchvisions_names_pixels_and_layer_before_the_head(tmp_path):
    path = put(tmp_path / "m", "torchvision")
    model, contents = layouts.read(path, heads=2)
    close(model.predict(ARRAYS["torchvision/pixels"]), ARRAYS["torchvision/logits"])
    assert contents.config.pre_logits == 5 and contents.layout.name == "torchvision"
    assert "pixels 0..1 of mean 0.485/0.456/0.406 and std 0.229/0.224/0.225 (--pixels)" in contents.notes[0]
    old = {
        k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): a
        for k, a in weights_of("torchvision").items()
    }
    save_file(old, path / "model.safetensors")
    close(layouts.read(path, heads=2)[0].predict(ARRAYS["torchvision/pixels"]), ARRAYS["torchvision/logits"])


# ---- configurations --------------------------------------------------------------------------------------------------

HF_REFUSED = {
    "hidden_act": ("quick_gelu", "hidden_act, is 'quick_gelu'"), "model_type": ("beit", "of a 'beit'"),
    "hidden_size": (16, "says width 16, its tensors 8"), "num_hidden_layers": (2, "says depth 2"),
    "intermediate_size": (13, "says mlp_dim 13"), "patch_size": ([4, 8], "says patch_size"),
    "num_channels": (1, "says channels 1"), "image_size": ([8, 16], "8 x 16 pixels; only square"),
    "qkv_bias": (False, "says qkv_bias False, and there are such biases"),
    "use_mean_pooling": (True, "'use_mean_pooling'"),
    "problem_type": ("multi_label_classification", "problem_type is 'multi_label_classification'"),
    "architectures": (["ViTForSomethingElse"], "class 'ViTForSomethingElse'"), "auto_map": ({"x": "y"}, "'auto_map'"),
    "quantization_config": ({"bits": 8}, "'quantization_config'"), "id2label": (3, "id2label is 3"),
}  # fmt: skip


@pytest.mark.parametrize("key", HF_REFUSED)
def test_a_key_of_transformers_config_json_is_refused_with_its_name(tmp_path, key):
    value, message = HF_REFUSED[key]
    with pytest.raises(InputError, match=re.escape(message)):
        layouts.read(put(tmp_path / "m", "vit", **{key: value}))


def test_keys_of_no_effect_are_named_in_one_line(tmp_path):
    notes = layouts.read(put(tmp_path / "m", "vit", _name_or_path="x", pooler_act="relu"))[1].notes
    (said,) = [note for note in notes if note.startswith("config.json")]
    for key in ("_name_or_path", "encoder_stride", "initializer_range", "hidden_dropout_prob", "pooler_act"):
        assert key in said
    assert "hidden_act" not in said


TIMM_REFUSED = {
    "act_layer": ("quick_gelu", "act_layer, is 'quick_gelu'"), "pre_norm": (True, "pre_norm = True"),
    "global_pool": ("max", "its pooling is 'max'"), "embed_dim": (16, "says width 16"),
    "mlp_ratio": (3.0, "mlp_dim 24"),
    "img_size": ([8, 12], "8 x 12 pixels"), "norm_layer": ("rmsnorm", "norm_layer = 'rmsnorm'"),
    "block_fn": ("ResPostBlock", "block_fn = 'ResPostBlock'"), "scale_attn_norm": (True, "scale_attn_norm"),
    "qkv_bias": (False, "qkv_bias False"), "rope": (True, "rope = True"), "pool_include_prefix": (True, "pool_include"),
}  # fmt: skip


@pytest.mark.parametrize("key", TIMM_REFUSED)
def test_an_argument_of_timms_config_json_is_refused_with_its_name(tmp_path, key):
    value, message = TIMM_REFUSED[key]
    arguments = FILES["timm, registers"]["config.json"]["model_args"] | {key: value}
    with pytest.raises(InputError, match=re.escape(message)):
        layouts.read(put(tmp_path / "m", "timm, registers", model_args=arguments))


def test_timms_architectures():
    assert architecture_of("vit_base_patch16_gap_224", "x").heads == 16  # of a width of 768
    assert architecture_of("timm/beit3_base_patch16_224.in22k", "x").layernorm_eps == 1e-5
    assert FACTS["vit_tiny_patch16_224"].heads == 0 and not set(FACTS) & set(REASONS)
    for name, reason in (("vit_base_patch16_rpn_224", "LayerNorms come after"), ("swin_tiny", "none of the plain ViTs"),
                         ("vit_base_patch16_siglip_224", "pooled by attention")):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            architecture_of(name, "x")


def test_what_the_name_of_an_architecture_implies_is_heeded(tmp_path):
    """Heads, where no argument says them, and the activation."""
    arguments = FILES["timm, registers"]["config.json"]["model_args"]
    arguments = {k: v for k, v in arguments.items() if k != "num_heads"} | {"no_embed_class": True}
    config = layouts.read(
        put(tmp_path / "m", "timm, registers", model_args=arguments, architecture="test_vit2", global_pool="avg")
    )[1].config
    assert config.num_heads == 2
    arguments.pop("act_layer")
    model = put(
        tmp_path / "m", "timm, registers", model_args=arguments, architecture="vit_so400m_patch16_siglip_gap_256"
    )
    with pytest.raises(InputError, match="width 8 is not a multiple of num_heads 16"):
        layouts.read(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type is 'ConvNextImageProcessor'"),
        ({"do_pad": True}, "do_pad is True"), ({"crop_pct": 0.9}, "crop_pct is 0.9"),
        ({"size": {"longest_edge": 8}}, "size is"),
        ({"resample": 4}, "resample is 4"), ({"do_resize": "yes"}, "do_resize is 'yes'"),
        ({"tiles": 4}, "unknown key 'tiles'"),
        ({"auto_map": {}}, "unknown key 'auto_map'"), ({"do_center_crop": True}, "there is no crop_size"),
        ({"image_std": [0, 1, 1]}, "image_std is"), ({"rescale_factor": "x"}, "rescale_factor is 'x'"),
        ({"image_mean": [float("nan")] * 3}, "image_mean is"),
    ],
)  # fmt: skip
def test_a_key_of_an_image_processor_is_refused_with_its_name(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        of_transformers({"image_processor_type": "ViTImageProcessor", "size": 8} | changes, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_mode": "zoom"}, "crop_mode 'zoom'"), ({"interpolation": "random"}, "interpolation is 'random'"),
        ({"input_size": [224, 224]}, "input_size is"), ({"tiles": 1}, "unknown key 'tiles'"),
        ({"crop_pct": 0.0001}, "crop_pct"),
        ({"label_offset": 1}, "label_offset is 1"), ({"std": [0.1, 0.1, -1]}, "std is"),
    ],
)  # fmt: skip
def test_a_key_of_pretrained_cfg_is_refused_with_its_name(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        of_timm({"input_size": [3, 8, 8]} | changes, "x")


def test_what_timm_takes_where_nothing_is_said():
    found, idle = of_timm({"fixed_input_size": True, "test_crop_pct": 1.0, "url": ""}, "x")
    assert (found.mean, found.std) == IMAGENET and found.size == (256, 256) and found.crop == (224, 224)
    assert idle == ["fixed_input_size", "test_crop_pct", "url"]


def test_images_of_another_size_than_the_models_are_refused(tmp_path):
    path = put(tmp_path / "m", "vit")
    (path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    with pytest.raises(InputError, match="made 16 x 16 pixels, and its positions are for 8 x 8"):
        layouts.read(path)


# ---- what nothing says -----------------------------------------------------------------------------------------------


def bare(tmp_path, name="timm, distilled"):
    save_file(weights_of(name), tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


READERS_OF_MODELS = [
    ("predict", "MODEL", "image.npy", "--out", "o"), ("evaluate", "MODEL", "--data", "folder", "--data-dir", "d"),
    ("convert", "MODEL", "o.npz", "--to", "minivit"), ("convert", "--info", "MODEL"),
    ("transfer", "MODEL", "--data", "folder", "--data-dir", "d", "--shots", "1", "--seeds", "0", "--out", "o"),
    ("trace", "--checkpoint", "MODEL", "--data", "random", "--batch-size", "1"),
    pytest.param(("visualize", "journey", "MODEL", "--data", "folder", "--data-dir", "d"), marks=pytest.mark.slow),
    ("train", "--from", "MODEL", "--data", "folder", "--data-dir", "d",
     "--steps", "1", "--batch-size", "1", "--out", "o"),
]  # fmt: skip


@pytest.fixture
def in_folder(tmp_path, monkeypatch, no_figures):
    monkeypatch.chdir(tmp_path)
    np.save("image.npy", np.zeros((8, 8, 3), np.uint8))
    for split in ("train", "test"):
        for name in ("class 0", "class 1", "class 2"):
            Path("d", split, name).mkdir(parents=True)
            Image.fromarray(IMAGES[0]).save(Path("d", split, name, "0.png"))


@pytest.mark.parametrize("words", READERS_OF_MODELS, ids=lambda words: "-".join(words[:2]))
def test_every_command_that_reads_a_model_says_what_is_assumed_and_can_be_told(tmp_path, call, in_folder, words):
    words = [bare(tmp_path) if word == "MODEL" else word for word in words]
    ended = call(*words)
    said = [line for line in (ended.out + ended.err).splitlines() if line.startswith("note: no file says these")]
    assert ended.status == 0 and len(said) == 1, ended
    for words_of in (
        "pixels 0..1 of mean 0.485/0.456/0.406",
        "1 assumed (--heads)",
        "exact GELU",
        "eps 1e-06",
        "8 x 8 pixels",
    ):
        assert words_of in said[0]
    Path(tmp_path, "o.npz").unlink(missing_ok=True)
    words = ["o2" if word == "o" else word for word in words]
    ended = call(*words, "--pixels", "imagenet", "--heads", 2, "--gelu", "erf", "--layernorm-eps", 1e-6)
    assert ended.status == 0 and "no file says these" not in ended.out + ended.err, ended


def test_pixels_in_every_form(tmp_path):
    expected = {"imagenet": IMAGENET, "half": ((0.5,), (0.5,)), "clip": CLIP, "0.4,0.3": ((0.4,), (0.3,)),
                "0.1,0.2,0.3,0.4,0.5,0.6": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))}  # fmt: skip
    images = np.stack([image[:8, :8] for image in IMAGES])
    path, models = bare(tmp_path), {}
    for text, (mean, std) in expected.items():
        assert pixels_of(text) == (mean, std)
        model, contents = layouts.read(path, pixels=text, heads=2, dtype=np.float64)
        models[text] = model.predict(images)
        theirs = (images / 255 - np.array(mean)) / np.array(std)
        plain, _ = layouts.read(path, pixels="half", heads=2, dtype=np.float64)
        np.testing.assert_allclose(models[text], plain.predict(theirs), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(
        models["imagenet"], layouts.read(path, imagenet_pixels=True, heads=2, dtype=np.float64)[0].predict(images)
    )
    for text in ("image", "0.5", "0.5,0", "0.5,0.5,0.5", "nan,1", "0.1,0.2,0.5,0.5"):
        with pytest.raises(InputError, match="--pixels"):
            layouts.read(path, pixels=text, heads=2)


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "_orig_mod.module."])
def test_prefixes_are_taken_off(tmp_path, prefix):
    for name in ("vit", "timm, distilled", "torchvision"):
        weights = {prefix + key: array for key, array in weights_of(name).items()}
        plain, wrapped = (layouts.read(put(tmp_path / name, name, weights=w), heads=2)[0] for w in (None, weights))
        np.testing.assert_array_equal(plain.flat, wrapped.flat)


def test_two_models_in_one_file_are_refused(tmp_path):
    weights = weights_of("timm, distilled")
    both = {prefix + key: array for key, array in weights.items() for prefix in ("student.", "teacher.")}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="several models, student. and teacher."):
        layouts.read(tmp_path / "x.safetensors")


def shards(folder, name, index=None):
    weights, folder = weights_of(name), put(folder, name)
    (folder / "model.safetensors").unlink()
    keys = sorted(weights)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": keys[n::2] for n in range(2)}
    for file, own in parts.items():
        save_file({key: weights[key] for key in own}, folder / file)
    where = {key: file for file, own in parts.items() for key in own}
    content = {"metadata": {"total_size": 1}, "weight_map": where | (index or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def test_sharded_safetensors(tmp_path):
    folder = shards(tmp_path / "m", "vit")
    close(logits_of_files(tmp_path, folder)[0], ARRAYS["vit/logits"])
    close(logits_of_files(tmp_path, folder / "model.safetensors.index.json")[0], ARRAYS["vit/logits"])
    for index, message in (
        ({"classifier.bias": "../x.safetensors"}, "names the file '../x.safetensors'"),
        ({"classifier.bias": "model-00003-of-00002.safetensors"}, "needs model-00003-of-00002.safetensors"),
        ({"more": "model-00001-of-00002.safetensors"}, "lacks more"),
        ({"classifier.bias": "model-00002-of-00002.safetensors",
          "classifier.weight": "model-00001-of-00002.safetensors"},
         "which the index does not say"),
        ({"classifier.bias": 3}, "has no weight_map"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            layouts.read(shards(tmp_path / "m", "vit", index))


def test_facebooks_names_of_dinov2_and_mae(tmp_path):
    """timm's names but for a few; positions of the class token, none of registers; parts of pre-training left out."""
    weights = weights_of("timm, registers")
    D = weights["cls_token"].shape[2] if "cls_token" in weights else 8
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    dino = {re.sub("^fc_norm", "norm", key): array for key, array in weights.items() if key != "reg_token"}
    dino |= {"cls_token": draw(1, 1, D), "register_tokens": weights["reg_token"], "pos_embed": draw(1, 5, D)}
    save_file(dino | {"mask_token": draw(1, D)}, tmp_path / "dino.safetensors")
    model, contents = layouts.read(tmp_path / "dino.safetensors", heads=2, dtype=np.float64)
    # the same by timm's names, whose registers have no positions and whose class token has taken its own
    timm = dino | {
        "cls_token": dino["cls_token"] + dino["pos_embed"][:, :1],
        "pos_embed": dino["pos_embed"][:, 1:].copy(),
    }
    timm["reg_token"] = timm.pop("register_tokens")
    save_file(timm, tmp_path / "timm.safetensors")
    same, _ = layouts.read(tmp_path / "timm.safetensors", heads=2, pixels="imagenet", image_size=8, dtype=np.float64)
    images = np.stack([image[:8, :8] for image in IMAGES])
    np.testing.assert_allclose(model.predict(images), same.predict(images), rtol=1e-6, atol=1e-6)
    assert contents.config.registers == 2 and any("left out, of pre-training: mask_token" in n for n in contents.notes)
    chunked = {re.sub(r"^blocks\.0\.", "blocks.0.0.", key): array for key, array in dino.items()}
    save_file(chunked, tmp_path / "dino.safetensors")
    again, _ = layouts.read(tmp_path / "dino.safetensors", heads=2, dtype=np.float64)
    np.testing.assert_array_equal(again.flat, model.flat)
    mae = {k: a for k, a in dino.items() if k not in ("register_tokens", "head.weight", "head.bias")}
    mae |= {"decoder_embed.weight": draw(4, D), "decoder_pos_embed": draw(1, 5, 4), "mask_token": draw(1, 1, 4)}
    save_file(mae, tmp_path / "mae.safetensors")
    with pytest.raises(InputError, match="has no head"):
        layouts.read(tmp_path / "mae.safetensors", heads=2)
    model, contents = layouts.read(tmp_path / "mae.safetensors", heads=2, num_classes=3)
    assert "mean 0.485/0.456/0.406" in contents.notes[0] and model.config.pooling == "cls"


def test_heads_side_by_side_of_deit(tmp_path):
    """Both heads are averaged; without the second one the distillation token is a register."""
    weights = weights_of("timm, distilled")
    model, contents = layouts.read(put(tmp_path / "m", "timm, distilled"))
    assert (model.config.pooling, model.config.registers) == ("cls+register", 1)
    np.testing.assert_allclose(
        model.params["head.bias"], (weights["head.bias"] + weights["head_dist.bias"]) / 2, rtol=1e-6
    )
    del weights["head_dist.weight"], weights["head_dist.bias"]
    model, contents = layouts.read(put(tmp_path / "m", "timm, distilled", weights=weights))
    assert (model.config.pooling, model.config.registers) == ("cls", 1)
    assert any("distillation token has no head" in note for note in contents.notes)


FALSE_FILES = {
    "model.safetensors": [
        (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page"), (b'{"error": "Repository not found"}', "is a JSON text"),
        (b"\x1f\x8b\x08" + bytes(20), "compressed with gzip"), (b"Entry not found", "failed download"),
    ],
    "pytorch_model.bin": [(b"\x80\x02}q\x00.", "is a pickle"), (b"version https://git-lfs", "pointer of Git LFS")],
    "tf_model.h5": [(b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file")],
    "flax_model.msgpack": [(b"\x81\xa6params", "is a msgpack file")], "model.onnx": [(b"\x08\x07", "is an ONNX file")],
    "model.gguf": [(b"GGUF" + bytes(30), "is a GGUF file")],
}  # fmt: skip


@pytest.mark.parametrize("name", FALSE_FILES)
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_no_file_of_weights_is_named_for_what_it_is(tmp_path, call, name, whole):
    for content, message in FALSE_FILES[name]:
        folder = tmp_path / "m"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        ended = call("predict", folder if whole else folder / name, "x.png")
        assert ended.status == 2 and message in ended.err and ended.err.count("\n") == 1, ended


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_classes_go_by_name_whatever_their_order(tmp_path, call, no_figures):
    names = {"0": "dog", "1": "cat", "2": "ant"}
    path = put(tmp_path / "m", "vit", id2label=names, label2id={name: int(k) for k, name in names.items()})
    guesses = ARRAYS["vit/logits"].argmax(axis=1)
    for split in ("train", "test"):
        for k, image in enumerate(IMAGES):
            folder = tmp_path / "d" / split / names[str(guesses[k] if split == "test" else k)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{k}.png")
    for kind in ("folder", "imagefolder"):
        flags = ("--data", kind, "--data-dir", tmp_path / "d", "--json", tmp_path / "e.json", "--out", tmp_path / "o")
        assert call("evaluate", path, *flags).status == 0
        facts = json.loads((tmp_path / "e.json").read_text())
        assert facts["accuracy"] == 1.0 and [each["name"] for each in facts["classes"]] == ["dog", "cat", "ant"]
    (tmp_path / "d" / "train" / "ant").rename(tmp_path / "d" / "train" / "bee")
    ended = call("evaluate", path, *flags)
    assert ended.status == 2


@pytest.mark.parametrize(
    ("names", "wanted", "order"),
    [("abc", "abc", [0, 1, 2]), ("abc", "cab", [2, 0, 1]), ("aab", "aab", [0, 1, 2]), ("aab", "aba", None),
     ("abc", "abd", None), ("abc", "ab", None)],
)  # fmt: skip
def test_the_order_of_classes(names, wanted, order):
    assert checkpoint.class_order(names, wanted) == order


# ---- meta ------------------------------------------------------------------------------------------------------------


def test_preprocessing_in_a_checkpoint_is_checked():
    found = Preprocessing("torchvision", "short", (9, 9), "bilinear", (8, 8))
    kept = json.loads(json.dumps(found._asdict()))
    assert of_meta(kept, "x") == found and of_meta(None, "x") is None
    for wrong in ({"resize": "zoom"}, {"size": [9]}, {"size": [9, -1]}, {"crop": 3}, {"program": 1}, {"more": 1},
                  {"resample": "x"}, {"fill": [0, 0]}, {"size": [9, 10**9]}):  # fmt: skip
        with pytest.raises(InputError, match="is damaged"):
            of_meta(kept | wrong, "x")
    with pytest.raises(InputError, match="is damaged"):
        of_meta([1], "x")


def test_nothing_is_said_of_the_images_of_a_run(trained):
    assert checkpoint.load_model(trained / "last.npz")[1].preprocessing is None
