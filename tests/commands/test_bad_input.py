"""Bad input, over all scripts: one line on stderr that says what and where, status 2, nothing lost or overwritten."""

import builtins
import errno
import hashlib
import json
import os
import shutil
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY

from minivit.commands import cli
from minivit.training.folder import LAST
from minivit.weights import checkpoint


def tree(folder):
    """Each file below a folder with a hash of its content, and each folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A folder with run/ (a finished run) and files that are not what they seem; no test may change it."""
    folder = tmp_path_factory.mktemp("place")
    run = Path(shutil.copytree(trained, folder / "run"))
    last = (run / LAST).read_bytes()
    png = (run / "curves.png").read_bytes()
    inside = last.index(b"head.weight.npy") + 250  # of the array: nobody reads a few bytes between arrays
    files = {
        "empty.npz": b"", "cut.npz": last[: len(last) // 2], "text.npz": b"hello\n", "image.npz": png,
        "flipped.npz": last[:inside] + bytes([last[inside] ^ 8]) + last[inside + 1 :],
        "cut.png": png[:2000], "empty.png": b"", "text.png": b"hello", "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "cut.npy": b"\x93NUMPY\x01\x00v\x00{'descr'", "text.npy": b"hello", "zip.npy": last,
        "file": b"a file", "no.toml": b"[train\n", "key.toml": b"[train]\nepohcs = 3\n",
        "type.toml": b"[train]\nepochs = \"3\"\n", "float.toml": b"[train]\nepochs = 3.5\n",
        "bool.toml": b"[train]\nflip = 1\n", "nan.toml": b"[train]\nlr = nan\n", "section.toml": b"[training]\n",
        "preset.toml": b'[model]\npreset = "Huge/1"\n', "list.toml": b"[model]\nwidth = [1]\n",
        "presettype.toml": b"[model]\npreset = 3\n", "data.toml": b'[data]\ndata = "mnist"\n',
        "datatype.toml": b"[data]\ndata_dir = 3\n", "binary.toml": bytes(range(256)),
        "sizetype.toml": b'[data]\ndata = "folder"\nimage_size = "8"\n',
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    arrays, meta = checkpoint.load(run / LAST)
    altered(folder / "nan.npz", arrays, meta, array=("ema/head.bias", lambda a: a * np.nan))
    altered(folder / "int.npz", arrays, meta, array=("ema/head.bias", lambda a: a.astype(int)))
    altered(folder / "shape.npz", arrays, meta, array=("ema/head.bias", lambda a: a[:-1]))
    altered(folder / "huge.npz", arrays, meta, array=("ema/head.weight", lambda a: a * 0 + np.float32(3e38)))
    altered(folder / "lacks.npz", arrays, meta, array=("ema/head.bias", None))
    altered(folder / "nodata.npz", arrays, meta, data=None)
    altered(folder / "datatype.npz", arrays, meta, data=meta["data"] | {"data_dir": [1]})
    altered(folder / "otherdata.npz", arrays, meta, data=meta["data"] | {"data": "mnist"})
    altered(folder / "sizetype.npz", arrays, meta, data=meta["data"] | {"image_size": -3})
    altered(folder / "names.npz", arrays, meta, class_names=["zero", *meta["class_names"][1:]])
    altered(folder / "nonames.npz", arrays, meta, class_names=None)
    altered(folder / "configtype.npz", arrays, meta, config=meta["config"] | {"depth": "1"})
    altered(folder / "deep.npz", arrays, meta, config=meta["config"] | {"depth": 10**12})
    altered(folder / "version.npz", arrays, meta, version=2)
    altered(folder / "nowhere.npz", arrays, meta, data=meta["data"] | {"data": "cifar10", "data_dir": "nowhere"})
    altered(folder / "settings.npz", arrays, meta, settings=meta["settings"] | {"epochs": 0})
    for name in ("cut", "huge", "nan", "names", "nodata", "nowhere", "settings"):
        (folder / f"run-{name}").mkdir()
        (folder / f"run-{name}" / LAST).write_bytes((folder / f"{name}.npz").read_bytes())
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("meta.npy", bytes(5_000_000))
    with zipfile.ZipFile(folder / "bomb.npy", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(5_000_000))
    for name, array in {
        "good": np.zeros((8, 8), np.uint8), "nan": np.full((8, 8), np.nan), "inf": np.full((8, 8, 1), np.inf),
        "range": np.full((8, 8), 2.0), "large": np.zeros((9, 9), np.uint8), "colour": np.zeros((8, 8, 3), np.uint8),
        "int": np.zeros((8, 8), np.int64), "text": np.full((8, 8), "x"), "complex": np.zeros((8, 8), complex),
        "batch": np.zeros((1, 8, 8, 1), np.uint8), "object": np.full((8, 8), None),
    }.items():  # fmt: skip
        np.save(folder / f"{name}-array.npy", array, allow_pickle=True)
    for split in ("train", "test"):
        (folder / "images" / split / "cat").mkdir(parents=True)
    (folder / "images/train/cat/1.png").write_bytes(png[:2000])
    (folder / "images/test/cat/1.png").write_bytes(png)
    records = np.zeros((5, 3073), np.uint8)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        for root, label in (("cifar", 0), ("badlabels", 11)):
            records[:, 0] = label
            path = folder / root / "cifar-10-batches-bin" / f"{name}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(records.tobytes())
    (folder / "cutcifar/cifar-10-batches-bin").mkdir(parents=True)
    (folder / "cutcifar/cifar-10-batches-bin/data_batch_1.bin").write_bytes(bytes(3000))
    (folder / "full").mkdir()
    (folder / "full" / "best.npz").write_bytes(b"of another run")
    return folder


def altered(path, arrays, meta, *, array=None, **changes):
    """Write a checkpoint with one array or some of its meta changed; None takes it away."""
    arrays, meta = dict(arrays), {k: v for k, v in (meta | changes).items() if v is not None}
    if array:
        name, change = array
        arrays[name] = change(arrays[name]) if change else None
    arrays = {name: a for name, a in arrays.items() if a is not None}
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)


def assert_refused(ended, said):
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended.err
    assert "Traceback" not in ended.err and said in ended.err, ended.err
    assert len(ended.err) < 600


EVALUATE, PREDICT = "evaluate {} --out new", "predict {} --test 0 --out new"
TRAIN = f"train --config {TINY[1]} --quiet --epochs 1 --out new"
PLAIN = "train --quiet --epochs 1 --out new"
CASES = {
    # checkpoints, for each script that reads them
    **{
        f"{command.split()[0]}: {name}": (command.format(name), said)
        for command in (EVALUATE, PREDICT)
        for name, said in {
            "nothing.npz": "there is no checkpoint at nothing.npz",
            "run": "run is a folder; name the checkpoint in it",
            "file/last.npz": "there is no checkpoint at",
            "empty.npz": "empty.npz is not a minivit checkpoint",
            "cut.npz": "cut.npz is not a minivit checkpoint",
            "flipped.npz": "flipped.npz is not a minivit checkpoint",
            "text.npz": "not a minivit checkpoint",
            "image.npz": "not a minivit checkpoint",
            "bomb.npz": "not a minivit checkpoint, or it is truncated or altered (it is compressed)",
            "good-array.npy": "not a minivit checkpoint",
            "nan.npz": "ema/head.bias holds values that are not finite numbers",
            "int.npz": "ema/head.bias holds values that are not finite numbers",
            "shape.npz": "ema/head.bias has shape (9,), the model needs (10,)",
            "lacks.npz": "lacks ema/head.bias",
            "huge.npz": "huge.npz gives logits that are not finite numbers",
            "nodata.npz": "does not say which data set it was trained on",
            "datatype.npz": "datatype.npz: data_dir must be a text",
            "sizetype.npz": "sizetype.npz: image_size must be a whole number above 0",
            "otherdata.npz": "unknown data set 'mnist'",
            "names.npz": "was trained for other classes than those of digits",
            "nonames.npz": "class",
            "configtype.npz": "configtype.npz: depth must be a whole number",
            "deep.npz": "fewer blocks than",
            "version.npz": "has checkpoint version 2",
        }.items()
    },
    # evaluate
    "evaluate: other data": ("evaluate run/last.npz --data cifar10 --data-dir cifar", "was trained for other classes"),
    "evaluate: data missing": ("evaluate run/last.npz --data cifar10", "minivit data fetch cifar10"),
    "evaluate: unknown data": ("evaluate run/last.npz --data mnist", "invalid choice: 'mnist'"),
    "evaluate: workers": ("evaluate run/last.npz --workers -1", "workers must be at least 0"),
    "evaluate: many workers": ("evaluate run/last.npz --workers 99999999", "workers must be at least 0 and at most"),
    "evaluate: weights": ("evaluate run/last.npz --weights best", "invalid choice: 'best'"),
    "evaluate: out is a file": ("evaluate run/last.npz --out file", "file: File exists; choose another place"),
    "evaluate: out in a file": ("evaluate run/last.npz --out file/x", "Not a directory; choose another place"),
    "evaluate: nothing": ("evaluate", "the following arguments are required: CHECKPOINT"),
    # report
    **{
        f"report: {arguments}": (f"report {arguments}", said)
        for arguments, said in {
            "": "the following arguments are required: RUN",
            "nothing": "nothing does not exist; name the folder of a run",
            "file": "file is a file; name the folder of a run",
            "run/last.npz": "run/last.npz is a file; name the folder of a run",
            "full": "there is no checkpoint at full/last.npz; a report is of a run of minivit train",
            "run-cut": "run-cut/last.npz is not a minivit checkpoint",
            "run-huge": "run-huge/last.npz gives logits that are not finite numbers",
            "run-nan": "ema/head.bias holds values that are not finite numbers",
            "run-names": "was trained for other classes than those of digits",
            "run-nodata": "does not say which data set it was trained on",
            "run-nowhere": "minivit data fetch cifar10",
            "run-settings": "run-settings/last.npz: epochs must be at least 1, got 0",
            "run --out run": "run is a folder; name a file to write",
            "run --out nowhere/x.html": "there is no folder nowhere to write x.html to",
            "run --mistakes -1": "--mistakes must be at least 0, got -1",
            "run --workers -1": "workers must be at least 0",
            "run --weights best": "invalid choice: 'best'",
            "run --device tpu": "device must be cpu, cuda",
        }.items()
    },
    # predict
    "predict: no image": ("predict run/last.npz", "no image is named; name files, or --test 0"),
    "predict: nothing": ("predict", "the following arguments are required: CHECKPOINT"),
    "predict: no such image": ("predict run/last.npz cat.png", "there is no image cat.png"),
    "predict: folder": ("predict run/last.npz run", "run is a folder; name the images in it"),
    "predict: index": ("predict run/last.npz --test 360", "there is no test image 360; digits has 0 to 359"),
    "predict: negative": ("predict run/last.npz --test -1", "there is no test image -1"),
    "predict: index a text": ("predict run/last.npz --test one", "invalid int value: 'one'"),
    **{
        f"predict: {name}": (f"predict run/last.npz {name} --out new", said)
        for name, said in {
            "cut.png": "cut.png cannot be read as an image",
            "empty.png": "empty.png cannot be read as an image",
            "text.png": "text.png cannot be read as an image",
            "eps.png": "eps.png cannot be read as an image",
            "file": "file cannot be read as an image",
            "run/last.npz": "run/last.npz cannot be read as an image",
            "cut.npy": "cut.npy cannot be read as an array",
            "text.npy": "text.npy cannot be read as an array",
            "zip.npy": "zip.npy holds several arrays",
            "bomb.npy": "bomb.npy holds several arrays",
            "nan-array.npy": "has a pixel that is NaN or infinite",
            "inf-array.npy": "has a pixel that is NaN or infinite",
            "range-array.npy": "has floats from 2 to 2; scale them to -1..1",
            "large-array.npy": "has shape (9, 9, 1); this model takes (8, 8, 1)",
            "colour-array.npy": "has shape (8, 8, 3); this model takes (8, 8, 1)",
            "batch-array.npy": "has shape (1, 8, 8, 1)",
            "int-array.npy": "holds int64; save it as uint8",
            "text-array.npy": "save it as uint8",
            "complex-array.npy": "holds complex128",
            "object-array.npy": "object-array.npy cannot be read as an array",
        }.items()
    },
    "predict: one bad of two": ("predict run/last.npz good-array.npy cut.png --out new", "cut.png cannot be read"),
    "predict: out is a file": ("predict run/last.npz --test 0 --out file", "file: File exists"),
    # train: settings files
    **{
        f"train: {name}": (f"train --config {name} --quiet --out new", said)
        for name, said in {
            "nothing.toml": "there is no settings file nothing.toml",
            "run": "run is a folder, not a settings file",
            "no.toml": "no.toml is not a TOML file",
            "binary.toml": "binary.toml is not a TOML file",
            "key.toml": "unknown setting 'epohcs' in key.toml [train]; did you mean 'epochs'?",
            "section.toml": "unknown setting 'training' in section.toml; did you mean 'train'?",
            "type.toml": "epochs must be a whole number, got '3'",
            "float.toml": "epochs must be a whole number, got 3.5",
            "bool.toml": "flip must be true or false, got 1",
            "nan.toml": "lr must be a finite number, got nan",
            "preset.toml": "no preset 'Huge/1'; the presets are Ti/8",
            "presettype.toml": "no preset 3",
            "list.toml": "width must be a whole number, got [1]",
            "data.toml": "data.toml: unknown data set 'mnist'",
            "datatype.toml": "datatype.toml: data_dir must be a text, got 3",
            "sizetype.toml": "sizetype.toml: image_size must be a whole number above 0, got '8'",
        }.items()
    },
    # train: impossible settings
    **{
        f"train: {flags}": (f"{TRAIN} {flags}", said)
        for flags, said in {
            "--patch-size 3": "image_size 8 is not a multiple of patch_size 3",
            "--patch-size 0": "patch_size must be at least 1, got 0",
            "--num-heads 5": "width 16 is not a multiple of num_heads 5",
            "--depth -1": "depth must be at least 1, got -1",
            "--depth 1000000000000": "GB of memory",
            "--width 100000000000": "GB of memory",
            "--num-classes 5": "the model takes 8x8x1 images of 5 classes; digits has 8x8x1 images of 10",
            "--num-classes 50": "the model takes 8x8x1 images of 50 classes; digits has 8x8x1 images of 10",
            "--channels 3": "the model takes 8x8x3 images of 10 classes; digits has 8x8x1 images",
            "--image-size 10": "image_size 10 is not a multiple of patch_size 4",
            "--pooling max": "pooling must be one of cls, mean",
            "--pos-embed random": "pos_embed must be one of",
            "--gelu relu": "gelu must be one of",
            "--pos-embed sincos2d --width 6": "needs a width that is a multiple of 4, got 6",
            "--dropout 1": "dropout must be at least 0.0 and below 1.0, got 1.0",
            "--drop-path -0.1": "drop_path must be at least 0.0 and below 1.0, got -0.1",
            "--layernorm-eps 0": "layernorm_eps must be at least",
            "--epochs 0": "epochs must be at least 1, got 0",
            "--epochs many": "argument --epochs: invalid int value: 'many'",
            "--batch-size 0": "batch_size must be at least 1, got 0",
            "--accumulate 0": "accumulate must be at least 1, got 0",
            "--micro-batch -4": "micro_batch must be at least 0, got -4",
            "--optimizer lbfgs": "optimizer must be one of adamw, adam, sgd, lion, muon; got 'lbfgs'",
            "--schedule step": "schedule must be one of",
            "--schedule onecycle": "schedule onecycle was removed; choose one of cosine",
            "--lr -1": "lr must be at least 0.0, got -1.0",
            "--lr nan": "lr must be a finite number, got nan",
            "--lr inf": "lr must be a finite number, got inf",
            "--beta2 1": "beta2 must be at least 0.0 and below 1.0",
            "--ema-decay 1.5": "ema_decay must be",
            "--label-smoothing 1": "label_smoothing must be",
            "--crop-padding 8": "crop_padding 8 moves whole images out of sight",
            "--crop-padding -1": "crop_padding must be at least 0",
            "--crop-mode wrap": "crop_mode must be one of zero, reflect; got 'wrap'",
            "--policy best": "policy must be one of none, trivial, rand, auto; got 'best'",
            "--rand-count 0": "rand_count must be at least 1 and at most 16",
            "--rand-magnitude 31": "rand_magnitude must be at least 0 and at most 30, got 31",
            "--erasing 1.5": "erasing must be at least 0.0 and at most 1.0",
            "--mixup -1": "mixup must be at least 0.0",
            "--cutmix inf": "cutmix must be a finite number",
            "--mix-probability 2": "mix_probability must be at least 0.0 and at most 1.0",
            "--seed -1": "seed must be at least 0, got -1",
            "--workers 5000": "workers must be at least 0 and at most 1024, got 5000",
            "--device tpu": "device must be cpu, cuda, cuda:1 (the second GPU, and so on) or auto; got 'tpu'",
            "--preset Tiny": "no preset 'Tiny'",
            "--learning-rate 1": "unrecognized arguments: --learning-rate 1",
            "extra": "unrecognized arguments: extra",
        }.items()
    },
    # train: data
    "train: no data": ("train --data cifar10 --data-dir nowhere --quiet --out new", "minivit data fetch cifar10"),
    "train: cut data": ("train --data cifar10 --data-dir cutcifar --quiet --out new", "cifar-10-batches-bin"),
    "train: labels": ("train --data cifar10 --data-dir badlabels --quiet --out new", "label"),
    "train: unknown data": ("train --data mnist", "invalid choice: 'mnist'"),
    "train: broken image": ("train --data folder --data-dir images --out new", "1.png cannot be read as an image"),
    "train: no images": ("train --data folder --data-dir run --out new", "there is no folder run/train"),
    "train: image size": ("train --data folder --data-dir images --image-size 99999 --out new", "out of range"),
    # train: the folder
    "train: used": (TRAIN.replace("new", "run"), "run already holds a run's last.npz; go on with --resume, or choose"),
    "train: used, told before the data are read": (
        "train --data cifar10 --data-dir nowhere --out run",
        "already holds",
    ),
    "train: half used": (TRAIN.replace("new", "full"), "full already holds a run's best.npz; choose another --out"),
    "train: out is a file": (TRAIN.replace("new", "file"), "file: File exists; choose another place"),
    "train: out in a file": (TRAIN.replace("new", "file/x"), "Not a directory; choose another place"),
    # train: resuming
    "resume: where": ("train --resume", "--resume needs --out"),
    "resume: nothing": ("train --resume --out new", "there is no checkpoint at new/last.npz"),
    "resume: a file": ("train --resume --out file", "there is no checkpoint at file/last.npz"),
    "resume: foreign": ("train --resume --out full", "there is no checkpoint at full/last.npz"),
    "resume: other settings": (
        "train --resume --out run --lr 3",
        "was trained with other settings: lr 0.002 there, 3.0",
    ),
    # data
    "data: unknown": ("data info mnist", "invalid choice: 'mnist'"),
    "data: missing": ("data info cifar10 --data-dir nowhere", "minivit data fetch cifar10"),
    "data: size": ("data info digits --image-size 0", "image size 0 is out of range; choose 1 to 4096"),
    "data: no command": ("data", "required: command"),
    # the others
    "gradcheck: unknown": ("gradcheck nothing", "nothing called 'nothing' to check"),
    "kill_check: kills": ("kill_check --kills 0", "must be at least 1"),
    "kill_check: workers": ("kill_check --workers -2", "workers must be at least 0"),
}


@pytest.mark.parametrize(("command", "said"), CASES.values(), ids=CASES.keys())
def test_one_line_and_nothing_lost(place, monkeypatch, call, command, said):
    monkeypatch.chdir(place)
    before = tree(place)
    ended = call(*command.split())
    assert_refused(ended, said)
    after = tree(place)
    assert {name: after.get(name) for name in before} == before
    assert all(name.split("/")[0] == "new" for name in set(after) - set(before))


WITH_JSON = ("evaluate run/last.npz", "predict run/last.npz --test 0", "data info digits", "gradcheck linear", "trace",
             "visualize curvature run/last.npz --epochs 1", "mutate softmax_jvp", "benchmark step")  # fmt: skip


@pytest.mark.parametrize("command", WITH_JSON, ids=lambda command: command.split()[0])
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("nowhere/x.json", "there is no folder nowhere to write x.json to"),
        ("file/x.json", "there is no folder file to write x.json to"),
        ("run", "run is a folder; name a file to write"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(place, monkeypatch, call, command, file, said):
    monkeypatch.chdir(place)
    before = tree(place)
    ended = call(*command.split(), "--json", file)
    assert_refused(ended, said)
    assert not ended.out and tree(place) == before


def test_every_script_that_writes_json_is_among_them():
    modules = [*Path(cli.__file__).parent.glob("*.py"), *(ROOT / "tools").glob("*.py")]
    with_json = {path.stem for path in modules if '"--json"' in path.read_text(encoding="utf-8")}
    assert with_json == {command.split()[0] for command in WITH_JSON}


@pytest.mark.parametrize("name", ["cut.npz", "nan.npz", "version.npz", "text.npz", "names.npz", "nodata.npz"])
def test_resuming_from_what_is_damaged(place, tmp_path, call, name):
    run = tmp_path / "damaged"
    run.mkdir()
    (run / LAST).write_bytes((place / name).read_bytes())
    (run / "metrics.jsonl").write_text("mine\n")
    before = tree(run)
    assert_refused(call("train", "--resume", "--quiet", "--out", run), "last.npz")
    assert tree(run) == before


# ---- the machine refuses ---------------------------------------------------------------------------------------------

REFUSALS = [errno.EROFS, errno.EACCES, errno.ENOSPC]


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("command", [TRAIN, "evaluate run/last.npz", "predict run/last.npz --test 0", "report run"])
def test_a_folder_that_cannot_be_written(run_copy, monkeypatch, call, command, number):
    """Tests may run as root, whom no permission stops: opening for writing is made to fail as it would."""
    real = builtins.open

    def refuse(file, mode="r", *arguments, **keywords):
        if set(mode) & set("wax+"):
            raise OSError(number, os.strerror(number), str(file))
        return real(file, mode, *arguments, **keywords)

    monkeypatch.chdir(run_copy.parent)
    before = tree(run_copy.parent)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        ended = call(*command.split())
    assert_refused(ended, os.strerror(number) + "; ")
    assert ".partial" not in ended.err
    after = tree(run_copy.parent)
    assert {name: after.get(name) for name in before} == before and set(after) - set(before) <= {"new"}


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("function", ["mkdir", "replace", "fsync"])
def test_a_folder_that_cannot_be_changed(run_copy, monkeypatch, call, function, number):
    def refuse(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(run_copy.parent)
    before = tree(run_copy.parent)
    for command in (TRAIN, "evaluate run/last.npz --out new", "train --resume --quiet --out run"):
        if function == "mkdir" and "--resume" in command:
            continue  # its folder is there
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refuse)
            ended = call(*command.split())
        assert_refused(ended, os.strerror(number) + "; ")
        after = tree(run_copy.parent)
        assert {name: after.get(name) for name in before} == before and set(after) - set(before) <= {"new"}


def test_a_disk_that_fills_up_in_the_middle_of_a_run(tmp_path, monkeypatch, call, no_figures):
    """The third checkpoint finds no space: the second survives, and the run goes on from it once there is space."""
    out = tmp_path / "run"
    flags = [*TINY, "--epochs", 3, "--checkpoint-seconds", 0]
    real, calls = checkpoint.np.savez, []

    def savez(file, **arrays):
        calls.append(1)
        if len(calls) > 5:
            file.write(b"as much as there was room for")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.np, "savez", savez)
        ended = call("train", *flags, "--out", out)
    assert_refused(ended, f"{out / LAST}: No space left on device; free some space and try again")
    assert checkpoint.load(out / LAST)[1]["progress"]["step"] == 4
    assert not list(out.glob(".*"))
    assert call("train", "--resume", "--quiet", "--out", out).status == 0
    assert call("train", *flags, "--out", tmp_path / "whole").status == 0
    ends = [checkpoint.load(folder / LAST)[0] for folder in (out, tmp_path / "whole")]
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_disk_that_is_full_for_the_log(tmp_path, monkeypatch, call, no_figures):
    from minivit.training import loop

    def log(**record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "metrics_log", lambda folder: nullcontext(log))
        ended = call("train", *TINY, "--epochs", 1, "--log-every", 1, "--out", tmp_path / "run")
    assert_refused(ended, "No space left on device")
    assert call("train", "--resume", "--quiet", "--out", tmp_path / "run").status == 0


def test_a_diverging_run(tmp_path, call):
    ended = call("train", *TINY, "--lr", 1e30, "--optimizer", "sgd", "--clip-norm", 0, "--out", tmp_path / "run")
    assert_refused(ended, "the run diverged; ")
    assert all(np.isfinite(array).all() for array in checkpoint.load(tmp_path / "run" / LAST)[0].values())


def test_a_diverging_run_of_which_every_tensor_is_looked_at(tmp_path, call):
    flags = ["--lr", 1e30, "--optimizer", "sgd", "--clip-norm", 0, "--check-finite"]
    ended = call("train", *TINY, *flags, "--out", tmp_path / "run")
    assert_refused(ended, "is the first tensor of the forward pass that is not finite")


def test_memory_that_runs_out(trained, tmp_path, monkeypatch, call):
    from minivit.training.engines.cpu import Engine

    def fail(*arguments, **keywords):
        raise MemoryError

    monkeypatch.setattr(Engine, "predict", fail)
    assert_refused(call("evaluate", trained / LAST, "--out", tmp_path), "not enough memory; use a smaller --batch-size")


def test_a_missing_library(tmp_path, monkeypatch, call):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    ended = call("train", *TINY, "--gelu", "erf", "--epochs", 1, "--out", tmp_path / "run")
    assert_refused(ended, 'gelu="erf" needs SciPy: pip install "minivit[interop]"')


def test_the_cases_are_of_all_scripts():
    names = {command.split()[0] for command, _ in CASES.values()}
    assert names >= {"train", "evaluate", "predict", "report", "data", "gradcheck", "kill_check"}
    assert len(CASES) > 100
