"""Runs that begin with a trained model: what is copied, resized, replaced, refused, and written down."""

import json
import os
import zlib
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from minivit import ViTConfig
from minivit.base.errors import InputError
from minivit.data import load
from minivit.data.source import DATA_KEYS
from minivit.model import ViT
from minivit.options.positions import sincos2d
from minivit.training.config import TrainConfig
from minivit.training.folder import LAST, SETTINGS, SUMMARY, last_checkpoint
from minivit.training.trainer import Trainer
from minivit.weights import checkpoint
from minivit.weights.resize import resize_patch_embedding, resize_positions, resize_table
from minivit.weights.start import Start, StartConfig, begin, load_start, model_from, prepare_start

pytestmark = pytest.mark.usefixtures("no_figures")

CONFIG = ViTConfig(
    image_size=12, patch_size=4, channels=3, num_classes=4, width=8, depth=2, num_heads=2, mlp_dim=12, dropout=0.2
)


def random_model(**changes):
    """A model of random parameters, also where training starts from zero."""
    model = ViT(replace(CONFIG, **changes))
    model.flat[...] = np.random.default_rng(3).standard_normal(model.flat.size)
    return model


# ---- what becomes of the parameters ----------------------------------------------------------------------------------


def test_all_but_the_head_is_copied():
    model = random_model(pre_logits=5, registers=2, qk_norm=True, layer_scale=0.1)
    config = model_from(model.config, {"num_classes": 7, "dropout": 0.0}, "x.npz")
    assert config == replace(model.config, num_classes=7, dropout=0.0, pre_logits=0)
    made = ViT(config, flat=begin(model, config))
    for name, array in made.params.items():
        if name.startswith("head."):
            assert not array.any()
        else:
            np.testing.assert_array_equal(array, model.params[name])
    assert not any(name.startswith("pre_logits") for name in made.params)
    assert made.flat.dtype == np.float32 and not np.shares_memory(made.flat, model.flat)


def test_the_head_may_be_kept_with_its_pre_logits():
    model = random_model(pre_logits=5)
    config = model_from(model.config, {"num_classes": 4}, "x.npz", keep_head=True)
    assert config == model.config
    np.testing.assert_array_equal(begin(model, config, keep_head=True), model.flat)


@pytest.mark.parametrize("pooling", ["cls", "mean", "seq"])
def test_positions_and_patches_are_resized(pooling):
    """Learned positions of registers there are none; the class token's stay as they are."""
    model, prefix = random_model(pooling=pooling, registers=3), int(pooling == "cls")
    for changes in ({"image_size": 20}, {"image_size": 8}, {"patch_size": 6}, {"image_size": 30, "patch_size": 5}):
        for kind, patches in (("bicubic", "bilinear"), ("align-corners", "pi")):
            config = model_from(model.config, changes, "x.npz")
            made = ViT(config, flat=begin(model, config, pos_resize=kind, patch_resize=patches)).params
            old, g = model.params["pos_embed"], config.grid_size
            np.testing.assert_array_equal(made["pos_embed"], resize_positions(old, g, prefix_tokens=prefix, kind=kind))
            W = model.params["patch_embed.proj.weight"]
            np.testing.assert_array_equal(
                made["patch_embed.proj.weight"],
                resize_patch_embedding(W, config.patch_size, channels=3, kind=patches),
            )
            np.testing.assert_array_equal(made["reg_token"], model.params["reg_token"])


@pytest.mark.parametrize("at", ["input", "every", "shared"])
@pytest.mark.parametrize("kind", ["align-corners", "bilinear"])
def test_positions_of_rows_and_columns_are_resized(at, kind):
    model = random_model(pos_embed="learned2d", pos_at=at, registers=3)
    for changes in ({"image_size": 20}, {"image_size": 8}, {"image_size": 30, "patch_size": 5}):
        config = model_from(model.config, changes, "x.npz")
        made = ViT(config, flat=begin(model, config, pos_resize=kind)).params
        tables = [name for name in made if "pos_embed" in name]
        assert len(tables) == (4 if at == "every" else 2)
        for name in tables:
            np.testing.assert_array_equal(made[name], resize_table(model.params[name], config.grid_size, kind))


def test_a_larger_image_in_larger_patches_is_the_same_to_the_model():
    """Images of patches that are each of one colour look the same at any size: so must the logits be."""
    model = random_model()
    colours = np.random.default_rng(0).uniform(-1, 1, (2, 3, 3, 3)).astype(np.float32)
    small, large = (colours.repeat(P, axis=1).repeat(P, axis=2) for P in (4, 7))
    config = model_from(model.config, {"image_size": 21, "patch_size": 7}, "x.npz", keep_head=True)
    made = ViT(config, flat=begin(model, config, keep_head=True))
    np.testing.assert_allclose(made.predict(large), model.predict(small), rtol=1e-4, atol=1e-4)


def test_sine_cosine_positions_stay_or_are_learned_from_there_on():
    model = random_model(pos_embed="sincos2d")
    larger = model_from(model.config, {"image_size": 20}, "x.npz")
    assert larger.pos_embed == "sincos2d"
    assert "pos_embed" not in ViT(larger, flat=begin(model, larger)).params
    learned = model_from(model.config, {"image_size": 20, "pos_embed": "learned"}, "x.npz")
    made = ViT(learned, flat=begin(model, learned)).params["pos_embed"]
    before = sincos2d(3, 8, prefix_tokens=1)
    np.testing.assert_array_equal(made, resize_positions(before, 5, prefix_tokens=1).astype(np.float32))
    np.testing.assert_allclose(made[0, 1:].reshape(5, 5, 8)[::2, ::2], before[0, 1:].reshape(3, 3, 8), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 16}, "x.npz has width 8, 16 was asked for; leave it out, or begin without --from"),
        ({"depth": 3}, "x.npz has depth 2, 3 was asked for"),
        ({"mlp_dim": 0}, "x.npz has mlp_dim 12, 32 was asked for"),
        ({"pooling": "mean"}, "x.npz has pooling cls, mean was asked for"),
        ({"gelu": "erf"}, "x.npz has gelu tanh, erf was asked for"),
        ({"pos_embed": "sincos2d"}, "x.npz has pos_embed learned, sincos2d was asked for"),
        ({"registers": 1}, "x.npz has registers 0, 1 was asked for"),
        ({"channels": 1}, "x.npz takes images of 3 channels, not of 1"),
        ({"image_size": 13}, "image_size 13 is not a multiple of patch_size 4"),
        ({"pre_logits": 4}, "a new head has no pre-logits layer"),
        ({"stem": "root", "patch_size": 1}, "x.npz has stem none, root was asked for"),
    ],
)
def test_what_cannot_change(changes, said):
    with pytest.raises(InputError, match=said):
        model_from(CONFIG, changes, "x.npz")


def test_a_kept_head_keeps_its_pre_logits():
    with pytest.raises(InputError, match="x.npz has pre_logits 0, which --keep-head keeps"):
        model_from(CONFIG, {"pre_logits": 3}, "x.npz", keep_head=True)


def test_parameters_that_do_not_fit_are_refused_by_name():
    with pytest.raises(InputError, match="the start has no parameter reg_token"):
        begin(random_model(), replace(CONFIG, registers=1))
    with pytest.raises(
        InputError, match=r"the start's cls_token has shape \(1, 1, 8\), the new model needs \(1, 1, 16\)"
    ):
        begin(random_model(), replace(CONFIG, width=16))
    old = random_model(pos_embed="relative", pos_at="shared")
    with pytest.raises(InputError, match="rel_pos .* leave the size of images and patches as it was, 12 and 4$"):
        begin(old, replace(old.config, image_size=16))
    with pytest.raises(InputError, match=r"the start's head.weight has shape \(8, 4\)"):
        begin(random_model(), replace(CONFIG, num_classes=5), keep_head=True)


def test_settings_of_a_start():
    for settings, said in [
        ({"pos_resize": "nearest", "checkpoint": "x"}, "pos_resize must be one of align-corners, bilinear"),
        ({"patch_resize": "flexi", "checkpoint": "x"}, "patch_resize must be one of pi, bilinear"),
        ({"keep_head": 1, "checkpoint": "x"}, "keep_head must be true or false"),
        ({"keep_head": True}, "are of a start: name it with --from"),
        ({"pixels": "imagenet"}, "are of a start: name it with --from"),
        ({"heads": -1, "checkpoint": "x"}, "heads must be at least 0"),
        ({"pos_resize": "bicubic"}, "name it with --from"),
    ]:
        with pytest.raises(InputError, match=said):
            StartConfig(**settings)


# ---- runs ------------------------------------------------------------------------------------------------------------


def final(out):
    """The arrays of a run's last checkpoint."""
    return checkpoint.load(out / LAST)[0]


def test_a_run_begins_where_the_other_ended_and_says_so(tmp_path, trained, call):
    out, source = tmp_path / "a", trained / LAST
    flags = ["--from", source, "--classes", "0-4", "--image-size", 12, "--dropout", 0.1, "--out", out]
    ended = call("train", *TINY, *flags, "--epochs", 1, "--lr", 0)
    assert ended.status == 0 and ended.err == ""
    assert "of 12x12x1, 5 classes" in ended.out and f"it begins with {source} (ema)" in ended.out
    (before, _), (after, record) = load_start(source), checkpoint.load_model(out / LAST, weights="params")
    assert before.config.dropout == 0.0 and after.config == replace(
        before.config, image_size=12, num_classes=5, dropout=0.1
    )
    # the learning rate is 0: these are the first parameters
    np.testing.assert_array_equal(after.flat, begin(before, after.config))
    origin = {
        "checkpoint": str(source), "keep_head": False, "pos_resize": "align-corners", "patch_resize": "pi",
        "weights": "ema", "crc": zlib.crc32(before.flat),
    }  # fmt: skip
    assert record.start == origin and record.class_names == list("01234")
    for name in (SETTINGS, SUMMARY):
        content = json.loads((out / name).read_text())
        content = content if name == SETTINGS else content["settings"]
        assert content["start"] == origin
        expected = DATA_KEYS | {"image_size": 12, "classes": "0-4"}
        assert content["data"] == expected
    # evaluate and predict find the same images
    ended = call("evaluate", out / LAST)
    assert ended.status == 0 and ended.err == "" and "; resized from 8x8" in ended.out
    ended = call("predict", out / LAST, "--test", 0)
    assert ended.status == 0 and ended.err == ""
    ended = call("report", out)
    assert ended.status == 0 and ended.err == ""
    page = (out / "report.html").read_text()
    assert f"--from {source}" in page and "--classes 0-4" in page and "--image-size 12" in page


def test_another_size_of_the_data_is_told(tmp_path, trained, call):
    """Once, unless it was asked for; a folder's images have no size of their own and take the model's."""
    quick = [*TINY, "--epochs", 1, "--lr", 0]
    assert call("train", *quick, "--image-size", 12, "--out", tmp_path / "a").status == 0
    source = tmp_path / "a" / LAST
    ended = call("train", *quick, "--from", source, "--out", tmp_path / "b")
    assert ended.status == 0 and " of 8x8x1" in ended.out
    assert ended.err == (
        f"note: the model goes on at the size of the data, 8x8 pixels; {source} is of 12x12, to which --image-size 12 "
        "scales the data\n"
    )
    for flags in (["--image-size", 12], ["--image-size", 8], ["--image-size", 16]):
        ended = call("train", *quick, "--from", source, *flags, "--out", tmp_path / "-".join(map(str, flags)))
        assert ended.status == 0 and ended.err == ""
    ended = call("train", *quick, "--from", trained / LAST, "--out", tmp_path / "c")
    assert ended.status == 0 and ended.err == ""
    for split in ("train", "test"):
        for name in "01":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.new("L", (9, 9), 99).save(tmp_path / "images" / split / name / "x.png")
    folder = [*quick, "--data", "folder", "--data-dir", tmp_path / "images"]
    assert call("train", *folder, "--image-size", 12, "--out", tmp_path / "d").status == 0
    ended = call("train", *folder, "--from", tmp_path / "d" / LAST, "--out", tmp_path / "e")
    assert ended.status == 0 and ended.err == "" and " of 12x12x3" in ended.out


def test_a_kept_head_makes_the_same_predictions(tmp_path, trained, call):
    flags = [*TINY, "--from", trained / LAST, "--keep-head", "--epochs", 1, "--lr", 0, "--out", tmp_path / "a"]
    assert call("train", *flags).status == 0
    np.testing.assert_array_equal(
        checkpoint.load_model(tmp_path / "a" / LAST)[0].flat, load_start(trained / LAST)[0].flat
    )


def test_a_head_of_another_program_is_kept(tmp_path, trained, call):
    other = tmp_path / "other"
    assert call("convert", trained / LAST, other, "--to", "timm").status == 0
    kept = [*TINY, "--from", other, "--keep-head", "--steps", 1, "--lr", 1e-20]
    ended = call("train", *kept, "--out", tmp_path / "a")
    assert ended.status == 0, ended.err
    after, before = (checkpoint.load_model(path / LAST)[0].params["head.weight"] for path in (tmp_path / "a", trained))
    np.testing.assert_allclose(after, before, rtol=1e-6)
    ended = call("train", *kept, "--classes", "0-4", "--out", tmp_path / "b")
    assert ended.status == 2 and "classes 0, 1, 2, 3, 4, ...: leave --keep-head out" in ended.err
    assert call("convert", other, tmp_path / "unnamed.npz", "--to", "official").status == 0
    ended = call("train", *TINY, "--from", tmp_path / "unnamed.npz", "--keep-head", "--out", tmp_path / "b")
    assert ended.status == 2 and "class 4, ... (minivit convert --class-names FILE gives" in ended.err


def test_it_resumes_exactly_also_when_the_start_is_gone(tmp_path, run_copy, call):
    """Interrupted in the middle of an epoch and resumed without the file that it began with."""
    data = load("digits", classes="5-9")
    config = TrainConfig(
        epochs=2, batch_size=64, lr=0.01, ema_decay=0.9, workers=1, micro_batch=32, log_every=1, checkpoint_seconds=1e6,
        freeze="patch_embed*",
    )  # fmt: skip
    asked = {"image_size": 8, "channels": 1, "num_classes": 5, "dropout": 0.1}
    model, start = prepare_start(StartConfig(checkpoint=str(run_copy / LAST)), asked, data.class_names)
    describe = {"data": "digits", "data_dir": "data", "image_size": None, "classes": "5-9"}

    def run(out, at=None):
        trainer = Trainer(data, model, config, out, describe=describe, start=start, progress=False)
        real = trainer.optimizer.step

        def step(*arguments):
            real(*arguments)
            if trainer.state.step + 1 == at:
                trainer.stop("test")

        trainer.optimizer.step = step
        return trainer.run()

    assert run(tmp_path / "whole") and run(tmp_path / "broken", at=15) is None
    (run_copy / LAST).unlink()
    assert call("train", "--resume", "--quiet", "--classes", "5-9", "--out", tmp_path / "broken").status == 0
    whole, broken = final(tmp_path / "whole"), final(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], broken[name], err_msg=name)
    metas = [checkpoint.load(tmp_path / name / LAST)[1] for name in ("whole", "broken")]
    assert metas[0]["start"] == metas[1]["start"] == start.origin
    for flags, said in [
        (["--classes", "0-4"], "was trained on the classes 5-9, not 0-4"),
        (["--classes", "5-9", "--config", TINY[1], "--label-smoothing", 0.1], "was trained with other settings"),
        (["--from", "other.npz"], f"began with checkpoint {run_copy / LAST}, not other.npz"),
        (["--keep-head"], "began with keep_head False, not True"),
    ]:
        ended = call("train", "--resume", "--quiet", "--out", tmp_path / "broken", *flags)
        assert ended.status == 2 and said in ended.err
    # another start, or none, is another run
    for other in (Start(start.flat, start.origin | {"crc": 1}), None):
        with pytest.raises(InputError, match="began with other parameters"):
            Trainer(data, model, config, tmp_path / "broken", start=other, resume=last_checkpoint(tmp_path / "broken"))


BAD = {
    "no file": ("--from nowhere.npz", "there is no checkpoint at nowhere.npz"),
    "a folder": ("--from RUN", "is a folder; name the checkpoint in it"),
    "no checkpoint": ("--from RUN/settings.json", "is not a minivit checkpoint"),
    "another width": ("--from RUN/last.npz --width 32", "has width 16, 32 was asked for; leave it out"),
    "another preset": ("--from RUN/last.npz --preset Nano/4", "has width 16, 64 was asked for"),
    "size": ("--from RUN/last.npz --image-size 10", "image_size 10 is not a multiple of patch_size 4"),
    "init": ("--from RUN/last.npz --init mimetic", "takes no --init and no --whiten"),
    "whiten": ("--from RUN/last.npz --whiten", "takes no --init and no --whiten"),
    "kept head": ("--from RUN/last.npz --keep-head --classes 0-4", "was trained for the classes 0, 1, 2, 3, 4, ...:"),
    "heads of a checkpoint": ("--from RUN/last.npz --heads 2", "is a checkpoint, which says itself what heads is"),
    "no start": ("--keep-head", "name it with --from"),
    "way of resizing": ("--from RUN/last.npz --pos-resize nearest", "pos_resize must be one of"),
    "unknown class": ("--classes 3,ten", "the data have no class 'ten'"),
    "no class": ("--classes=", "the data have no class ''"),
    "frozen nothing": ("--freeze blokcs.*", "no parameter is called 'blokcs.*'"),
    "frozen all": ("--freeze *", "leaves nothing to train"),
    "steps": ("--steps -1", "steps must be at least 0, got -1"),
    "warmup": ("--warmup-steps -1", "warmup_steps must be at least 0"),
    "budget": ("--budget 1m --steps 3", "--budget finds the number of epochs: leave --steps out"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, trained, call, name):
    flags, said = BAD[name]
    before = sorted(os.listdir(trained))
    ended = call("train", *TINY, *flags.replace("RUN", str(trained)).split(), "--out", tmp_path / "new")
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert said in ended.err, ended.err
    assert not (tmp_path / "new").exists() and sorted(os.listdir(trained)) == before


def test_a_kept_head_goes_by_the_names_of_the_classes(tmp_path, trained, call):
    flags = ("--keep-head", "--classes", "1,0,2-9", "--lr", 0, "--epochs", 1)
    assert call("train", *TINY, "--from", trained / LAST, *flags, "--out", tmp_path / "a").status == 0
    (before, _), (after, record) = load_start(trained / LAST), checkpoint.load_model(tmp_path / "a" / LAST)
    assert record.class_names == ["1", "0", *"23456789"]
    order = [1, 0, *range(2, 10)]
    for name in ("head.weight", "head.bias"):
        np.testing.assert_array_equal(after.params[name], before.params[name][..., order])
    assert np.ptp(before.params["head.bias"][:2]) > 0


def test_curvature_cannot_make_such_a_run_again(tmp_path, trained, call):
    assert call("train", *TINY, "--from", trained / LAST, "--steps", 1, "--out", tmp_path / "a").status == 0
    ended = call("visualize", "curvature", tmp_path / "a" / LAST)
    assert ended.status == 2 and f"began with {trained / LAST}; this trains a run again" in ended.err


def test_the_learning_rate_is_found_for_the_start(tmp_path, trained, call):
    """Its first loss is the start's, not ln K."""
    flags = [*TINY, "--steps", 10, "--epochs", 1, "--label-smoothing", 0, "--crop-padding", 0]
    losses = []
    for more in ([], ["--from", trained / LAST, "--keep-head"]):
        ended = call("visualize", "lr", *flags, *more, "--out", tmp_path)
        assert ended.status == 0, ended.err
        losses.append(json.loads((tmp_path / "lr.json").read_text())["losses"][0])
    assert abs(losses[0] - np.log(10)) < 1e-4 and losses[1] < 2.28
