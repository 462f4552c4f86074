"""Faults that hostile files (tests/commands/test_hostile_input.py) have found, each as a small case of its own."""

import contextlib
import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from cifar_samples import contents, write_archive
from conftest import load_script
from PIL import Image
from small_runs import stop_at, trainer
from watch import watch

from minivit import ViTConfig
from minivit.base.errors import InputError
from minivit.base.files import parse_toml
from minivit.data import load, read_image
from minivit.evaluation.runs import records_of
from minivit.evaluation.vtab import load_task
from minivit.figures.curves import save_curves
from minivit.training import sweep
from minivit.training.folder import LAST, METRICS, SUMMARY, read_metrics
from minivit.weights import checkpoint
from minivit.weights.tensor_files import open_tensors

DEEP = "[" * 100_000


def header(text, data=b""):
    """The bytes of an .npy file with any header."""
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode() + data


def test_a_message_is_one_line_of_text_of_some_length():
    error = InputError("a\x1b[2Jb\u2028c\ud800" + "x" * 10_000 + "end")
    assert str(error).startswith("a\\x1b[2Jb c\\ud800x") and str(error).endswith("xend") and len(str(error)) < 1300
    assert str(InputError("naïve 猫 😀")) == "naïve 猫 😀"


@pytest.mark.parametrize("text", ["x = " + "1" * 5000, "x = " + DEEP, b"\xff".decode("latin1"), "x = 1e"])
def test_toml_that_python_does_not_parse(tmp_path, text):
    (tmp_path / "x.toml").write_text(text, encoding="latin1")
    with pytest.raises(InputError, match="is not a TOML file"):
        parse_toml(tmp_path / "x.toml")


GOOD = '{"kind": "train", "step": 1, "epoch": 1, "lr": 1, "loss": 1}'
LINES = {
    "deep": DEEP, "kind of another type": '{"kind": {}, "step": 1}', "digits": GOOD.replace("1}", "1" * 5000 + "}"),
    "no number": GOOD.replace('"loss": 1', '"loss": NaN'), "infinite": GOOD.replace('"lr": 1', '"lr": Infinity'),
    "too large for a float": GOOD.replace("1}", "1" + "0" * 400 + "}"), "epoch 0": GOOD.replace('h": 1', 'h": 0'),
    "a step before the first": GOOD.replace('"step": 1', '"step": -1'), "not UTF-8": "\udcff",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_a_line_of_metrics_that_is_no_record_is_left_out(tmp_path, line):
    text = f"{GOOD}\n{line}\n{GOOD}\n".encode(errors="surrogateescape")
    (tmp_path / METRICS).write_bytes(text)
    assert read_metrics(tmp_path / METRICS) == records_of(tmp_path) == [json.loads(GOOD)] * 2
    save_curves(tmp_path / "curves.png", read_metrics(tmp_path / METRICS))


SWEEP = '[[row]]\nname = "a"\n'
NUMBERS = {"test_accuracy": 0.5, "train_seconds": 1.0, "epochs": 1, "parameters": 1}
DAMAGED = {
    "deep": DEEP, "no settings": json.dumps(NUMBERS), "settings are a list": json.dumps(NUMBERS | {"settings": []}),
    "settings of no table": json.dumps(NUMBERS | {"settings": {"train": 3}}),
    "seconds are a text": json.dumps(NUMBERS | {"settings": {}, "train_seconds": "1"}),
    "accuracy is none": json.dumps(NUMBERS | {"settings": {}, "test_accuracy": float("nan")}), "a list": "[]",
}  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_summary_is_that_of_no_finished_run(tmp_path, text):
    (tmp_path / "x.toml").write_text(SWEEP)
    (run,) = sweep.runs_of(sweep.read_sweep(tmp_path / "x.toml"), tmp_path)
    run.folder.mkdir()
    for name in (SUMMARY, sweep.DIVERGED):
        (run.folder / name).write_text(text)
        assert sweep.result_of(run) is None


@pytest.mark.parametrize(
    "text", [DEEP, "{}", '{"rows": [3]}', '{"rows": [{"name": [], "recipe": {}, "runs": {"0": {}}}]}']
)
def test_a_damaged_table_of_a_sweep_knows_no_results(tmp_path, text):
    (tmp_path / sweep.TABLE).write_text(text)
    assert sweep.known_results(tmp_path) == {}


def test_an_array_that_claims_gigabytes_takes_none(tmp_path):
    (tmp_path / "x.npy").write_bytes(header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }\n"))
    with watch(100), pytest.raises(InputError, match="is not as long as it says"):
        load_script("predict").array_image(tmp_path / "x.npy", 8, 1)


TASK = ViTConfig(image_size=8, patch_size=4, channels=3, num_classes=3, width=8, depth=1, num_heads=2)
IMAGES = np.zeros((3, 8, 8, 3), np.uint8)


def write_task(folder, compression=zipfile.ZIP_STORED, **changes):
    """A task's file, with members of other bytes."""
    arrays = {"train_images": IMAGES, "train_labels": np.arange(3), "test_images": IMAGES, "test_labels": np.arange(3)}
    with zipfile.ZipFile(folder / "dtd.npz", "w", compression) as archive:
        for name, array in arrays.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", changes.get(name, file.getvalue()))


def test_a_whole_task_is_read_with_labels_of_16_bits(tmp_path):
    file = io.BytesIO()
    np.save(file, np.array([2, 1, 0], np.uint16))
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        write_task(tmp_path, compression, train_labels=file.getvalue())
        assert load_task(tmp_path, "dtd", TASK, examples=3).train_labels.tolist() == [2, 1, 0]


def labels(*values):
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


EXABYTES = "{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775805,), }\n"
EXABYTES = "{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775805,), }\n"
TASKS = {
    "gigabytes": {"train_images": header("{'descr': '|u1', 'fortran_order': False, 'shape': (2000000000,), }\n")},
    "exabytes": {"train_images": header(EXABYTES)},
    "a header that breaks off": {"train_labels": header("{'descr': '<i8', 'shape': (\n")},
    "no array": {"test_images": b"hello"}, "a label of billions": {"train_labels": labels(0, 1, 2**40)},
}  # fmt: skip


@pytest.mark.parametrize("changes", TASKS.values(), ids=TASKS.keys())
def test_a_damaged_task_is_refused_at_once(tmp_path, changes):
    write_task(tmp_path, **changes)
    with watch(5000), pytest.raises(InputError, match=r"dtd\.npz"):
        load_task(tmp_path, "dtd", TASK, examples=3)


def test_compressed_arrays_that_unpack_to_far_too_much_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(30_000_000))
    for read in (open_tensors, lambda path: load_task(tmp_path, "dtd", TASK, examples=3)):
        os.replace(tmp_path / "x.npz", tmp_path / "dtd.npz") if read is not open_tensors else None
        with watch(30_000), pytest.raises(InputError, match="a decompression bomb"):
            read(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros((1000, 1000), np.float32))  # 4 MB from 4 KB: a head of zeros
    assert not open_tensors(tmp_path / "zeros.npz")["a"].read().any()


def test_a_member_that_claims_any_length_ends_with_the_archive(tmp_path):
    """tarfile would look for the member after it, block by block, for years."""
    write_archive(tmp_path / "x.tar.gz", contents("cifar100", "binary"))
    other = tarfile.TarInfo("other")
    other.size = 2**60
    with gzip.open(tmp_path / "x.tar.gz") as file:
        whole = file.read()
    with gzip.open(tmp_path / "x.tar.gz", "w") as file:
        file.write(other.tobuf(tarfile.GNU_FORMAT) + whole)
    with watch(len(whole)), pytest.raises(InputError, match="is not a whole archive"):
        load("cifar100", tmp_path / "x.tar.gz")


def chunk(kind, data, length=None):
    """A part of a PNG."""
    return (
        struct.pack(">I", len(data) if length is None else length)
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )


def png(width, height, data, length=None):
    """A PNG of one bit a pixel."""
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", data, length) + chunk(b"IEND", b"")


def test_a_part_of_an_image_that_claims_gigabytes_takes_none(tmp_path):
    (tmp_path / "x.png").write_bytes(png(64, 64, zlib.compress(bytes(9 * 64))[:9], length=2**32 - 129))
    with watch(100), contextlib.suppress(InputError):
        read_image(tmp_path / "x.png", 8)


def test_an_image_of_far_more_pixels_than_bytes_is_a_bomb(tmp_path):
    data = zlib.compress(bytes(1001 * 8000), 9)  # 64 million pixels
    (tmp_path / "x.png").write_bytes(png(8000, 8000, data))
    assert (tmp_path / "x.png").stat().st_size < 10_000
    with watch(10_000), pytest.raises(InputError, match="8000 x 8000 pixels in .* bytes are a decompression bomb"):
        read_image(tmp_path / "x.png", 8)
    Image.new("RGB", (2000, 2000)).save(tmp_path / "black.png")  # large and empty, and no bomb
    assert not read_image(tmp_path / "black.png", 8).any()


def test_what_is_no_file_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(InputError, match="it is not a file"):
        read_image(tmp_path / "x.png", 8)


@pytest.mark.parametrize("change", [{"depth": 60_000}, {"width": 30_000, "num_heads": 1}, {"mlp_dim": 4_000_000}])
def test_going_on_makes_no_room_for_a_model_that_the_checkpoint_does_not_hold(tmp_path, change):
    run = trainer(tmp_path)
    stop_at(run, 3)
    run.run()
    arrays, meta = checkpoint.load(tmp_path / LAST)
    meta["config"] |= change
    checkpoint.save(tmp_path / LAST, arrays, meta)
    with (
        watch(50_000),
        pytest.raises(InputError, match="holds fewer (blocks|numbers) than|of memory, this machine has"),
    ):
        arrays, record = checkpoint.read(tmp_path / LAST)
        trainer(tmp_path, model=record.config, resume=(arrays, record))
