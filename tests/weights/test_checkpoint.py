"""Checkpoints: exact round trips, no loss when writing fails, and no belief in what is read."""

import builtins
import errno
import io
import json
import os
import struct
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from minivit import ViT, ViTConfig, parameter_table
from minivit.base import params as parameters
from minivit.base.errors import InputError
from minivit.weights import checkpoint
from minivit.weights.checkpoint import load, load_model, model_meta, named_arrays, read, record_of, save

CONFIG = ViTConfig(image_size=4, patch_size=2, channels=1, num_classes=3, width=4, depth=1, num_heads=2, mlp_dim=8)


def content(**changes):
    """Arrays and meta of a small model's checkpoint."""
    model = ViT(CONFIG, seed=1)
    meta = model_meta(CONFIG) | {"class_names": ["a", "b", "c"]}
    return named_arrays("params", model.flat, model.table), meta | changes


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.npz"
    save(path, *content())
    return path


def same(arrays, others):
    return arrays.keys() == others.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(arrays.values(), (others[k] for k in arrays), strict=True)
    )


def npy(array):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), allow_pickle=True)
    return stream.getvalue()


def header(text, data=b"", version=1):
    """The bytes of an .npy file with any header."""
    text = (text + "\n").encode("latin1")
    length = struct.pack("<H", len(text)) if version == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def write_zip(path, members, **keywords):
    with zipfile.ZipFile(path, "w", **keywords) as archive:
        for name, data in members:
            archive.writestr(name, data)


def members(**changes):
    """The members of a good checkpoint as (name, bytes), some replaced, added, or (None) left out."""
    arrays, meta = content()
    named = {f"{name}.npy": npy(array) for name, array in arrays.items()}
    named["meta.npy"] = npy(np.array(json.dumps({"format": checkpoint.FORMAT, "version": checkpoint.VERSION} | meta)))
    return [(name, data) for name, data in (named | changes).items() if data is not None]


def with_meta(**changes):
    meta = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **content()[1]} | changes
    return members(**{"meta.npy": npy(np.array(json.dumps(meta)))})


# ---- round trip ------------------------------------------------------------------------------------------------------


def test_round_trip(file):
    arrays, meta = content()
    stored, stored_meta = load(file)
    assert same(stored, arrays)
    assert stored_meta == {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **meta}
    record = record_of(stored_meta, file)
    assert record.config == CONFIG and record.class_names == ["a", "b", "c"] and record.path == file
    assert record.data == {} and record.settings is record.start is record.progress is None


def test_numpy_reads_it_without_pickles(file):
    with np.load(file, allow_pickle=False) as archive:
        assert json.loads(str(archive["meta"]))["config"]["width"] == 4
        np.testing.assert_array_equal(archive["params/head.weight"], content()[0]["params/head.weight"])


def test_the_model_comes_back(file):
    model, record = load_model(file)
    np.testing.assert_array_equal(model.flat, ViT(CONFIG, seed=1).flat)
    assert model.config == CONFIG and record.weights == "params" and model.flat.dtype == np.float32


def test_a_file_from_before_an_option_was_there_is_read_without_it(tmp_path):
    arrays, meta = content()
    for name in ("layer_scale", "qk_norm", "registers"):
        del meta["config"][name]
    save(tmp_path / "old.npz", arrays, meta)
    model, _ = load_model(tmp_path / "old.npz")
    assert model.config == CONFIG


def test_a_model_with_every_option_comes_back(tmp_path):
    config = replace(CONFIG, layer_scale=0.1, qk_norm=True, registers=2, pooling="seq")
    model = ViT(config, seed=1)
    save(tmp_path / "new.npz", named_arrays("params", model.flat, model.table), model_meta(config))
    again, _ = load_model(tmp_path / "new.npz")
    assert again.config == config and np.array_equal(again.flat, model.flat)
    _, meta = content()
    save(tmp_path / "less.npz", *content(config=meta["config"] | {"registers": 2}))
    with pytest.raises(InputError, match="fewer numbers than|lacks params/reg_token"):
        load_model(tmp_path / "less.npz")


def test_weights_are_chosen(tmp_path):
    arrays, meta = content()
    average = ViT(CONFIG, seed=2)
    save(tmp_path / "a.npz", arrays | named_arrays("ema", average.flat, average.table), meta)
    for weights, seed, name in (("auto", 2, "ema"), ("ema", 2, "ema"), ("params", 1, "params")):
        model, stored = load_model(tmp_path / "a.npz", weights=weights)
        np.testing.assert_array_equal(model.flat, ViT(CONFIG, seed=seed).flat)
        assert stored.weights == name


def test_a_missing_average_is_refused(file):
    with pytest.raises(InputError, match="holds no moving average"):
        load_model(file, weights="ema")


# ---- writing ---------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Not an Exception, so that nothing handles it on its way."""


def explode(error):
    def function(*arguments, **keywords):
        raise error

    return function


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [Crash(), FULL, KeyboardInterrupt()], ids=["crash", "full", "ctrl-c"])
@pytest.mark.parametrize("stage", ["open", "write", "late write", "fsync", "replace"])
def test_the_old_file_survives_any_failure(file, monkeypatch, stage, error):
    before = file.read_bytes()
    arrays, meta = content(more=1)
    if stage == "open":
        monkeypatch.setattr(builtins, "open", explode(error))
    elif stage == "write":
        monkeypatch.setattr(np, "savez", explode(error))
    elif stage == "late write":  # half of the file is written by then
        real = np.lib.format.write_array
        calls = []

        def write(*arguments, **keywords):
            calls.append(1)
            if len(calls) > len(arrays) // 2:
                raise error
            return real(*arguments, **keywords)

        monkeypatch.setattr("numpy.lib._npyio_impl.format.write_array", write)
    elif stage == "fsync":
        monkeypatch.setattr(os, "fsync", explode(error))
    else:
        monkeypatch.setattr(os, "replace", explode(error))
    with pytest.raises(type(error)) as raised:
        save(file, arrays, meta)
    monkeypatch.undo()
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
    load_model(file)
    if error is FULL:
        assert raised.value.filename == str(file)


def test_a_crash_after_the_rename_leaves_the_new_file(file, monkeypatch):
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(1)
        if len(calls) == 2:  # the folder's
            raise Crash
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Crash):
        save(file, *content(more=1))
    assert load(file)[1]["more"] == 1


def test_a_partial_file_of_a_killed_process_is_in_nobodys_way(file):
    (file.parent / f".{file.name}.partial").write_bytes(b"half")
    save(file, *content(more=1))
    assert load(file)[1]["more"] == 1 and list(file.parent.iterdir()) == [file]


# ---- reading what is damaged -----------------------------------------------------------------------------------------


def test_every_sampled_truncation_is_refused(file):
    whole = file.read_bytes()
    for length in {*range(0, len(whole), 97), *range(len(whole) - 40, len(whole))}:
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated or altered") as raised:
            load(file)
        assert "\n" not in str(raised.value) and str(file) in str(raised.value)


def test_every_sampled_flip_is_refused_or_harmless(file):
    whole = file.read_bytes()
    arrays, meta = load(file)
    refused = 0
    rng = np.random.default_rng(0)
    end = whole.rindex(b"PK\x01\x02")  # the directory at the end is looked at more closely
    positions = {*range(0, len(whole), 23), *range(end, len(whole))}
    for position in sorted(positions):
        for bit in (1 << int(rng.integers(8)), 0xFF):
            flipped = bytearray(whole)
            flipped[position] ^= bit
            file.write_bytes(flipped)
            try:
                again, meta_again = load(file)
            except InputError:
                refused += 1
            else:
                assert same(again, arrays) and meta_again == meta, position
    assert refused > 1.2 * len(positions)


def test_flips_in_the_data_are_always_refused(file):
    whole = file.read_bytes()
    for array in (content()[0]["params/head.weight"], content()[0]["params/patch_embed.proj.weight"]):
        data = array.tobytes()
        start = whole.index(data)
        for position in range(start, start + len(data), 5):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            with pytest.raises(InputError):
                load(file)


class Payload:
    """An object whose unpickling would leave a trace."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


GOOD_META = dict(members())["meta.npy"]
CASES = {
    "empty file": b"",
    "text": b"not a checkpoint\n" * 100,
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20,
    "bare npy": npy(np.arange(5)),
    "pickled object": members(**{"x.npy": npy(np.array(Payload(), dtype=object))}),
    "pickled meta": members(**{"meta.npy": npy(np.array(Payload(), dtype=object))}),
    "object header, no data": members(**{"x.npy": header("{'descr':'|O','fortran_order':False,'shape':()}", b"x" * 8)}),
    "structured": members(**{"x.npy": npy(np.zeros(2, "i4,f4"))}),
    "datetime": members(**{"x.npy": npy(np.zeros(2, "M8[s]"))}),
    "absurd shape": members(
        **{"x.npy": header("{'descr':'<f4','fortran_order':False,'shape':(1000000000000,)}", b"1234")}
    ),
    "overflowing shape": members(
        **{"x.npy": header("{'descr':'<f4','fortran_order':False,'shape':(4294967296,4294967296,4)}", b"")}
    ),
    "negative shape": members(**{"x.npy": header("{'descr':'<f4','fortran_order':False,'shape':(-1,-1)}", b"1234")}),
    "zero times absurd": members(
        **{"x.npy": header("{'descr':'<f4','fortran_order':False,'shape':(0,9999999999999999999)}", b"")}
    ),
    "empty text": members(**{"x.npy": header("{'descr':'<U0','fortran_order':False,'shape':(1000000000000,)}", b"")}),
    "shape too small": members(**{"x.npy": header("{'descr':'<f4','fortran_order':False,'shape':(1,)}", b"12345678")}),
    "header is code": members(**{"x.npy": header("__import__('os').mkdir('unpickled')")}),
    "header is deep": members(**{"x.npy": header("(" * 5000 + ")" * 5000)}),
    "header is huge": members(**{"x.npy": header("{" + " " * 60000 + "}")}),
    "header is no dict": members(**{"x.npy": header("[1, 2]")}),
    "header is broken": members(**{"x.npy": header("{'descr': '<f4', 'shape")}),
    "header of Python 2": members(**{"x.npy": header("{'descr':'<f4','fortran_order':False,'shape':(1L,)}", b"1234")}),
    "unknown npy version": members(**{"x.npy": b"\x93NUMPY\x09\x00" + bytes(100)}),
    "no npy": members(**{"x.npy": b"hello"}),
    "two of a name": [*members(), ("params/head.bias", npy(np.zeros(3, np.float32)))],
    "no meta": members(**{"meta.npy": None}),
    "meta is a list": members(**{"meta.npy": npy(np.array("[1, 2]"))}),
    "meta is a number": members(**{"meta.npy": npy(np.array(7.0))}),
    "meta is several": members(**{"meta.npy": npy(np.array(["{}", "{}"]))}),
    "meta is no JSON": members(**{"meta.npy": npy(np.array("{format"))}),
    "meta is deep": members(**{"meta.npy": npy(np.array("[" * 100_000))}),
    "other format": with_meta(format="another"),
    "no format": members(**{"meta.npy": npy(np.array("{}"))}),
}


def write_case(path, case):
    if isinstance(case, bytes):
        path.write_bytes(case)
    else:
        write_zip(path, case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write_case(tmp_path / "x.npz", case)
    with pytest.raises(InputError, match="not a minivit checkpoint") as raised:
        load("x.npz")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert os.listdir(tmp_path) == ["x.npz"]  # nothing was unpickled or run


def test_the_same_member_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(tmp_path / "x.npz", [*members(), ("params/head.bias.npy", npy(np.zeros(3, np.float32)))])
    with pytest.raises(InputError, match=r"\(it holds params/head.bias twice\)"):
        load(tmp_path / "x.npz")


def test_compressed_files_are_refused(tmp_path):
    write_zip(tmp_path / "x.npz", members(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"\(it is compressed\)"):
        load(tmp_path / "x.npz")
    arrays, meta = content()
    np.savez_compressed(tmp_path / "x.npz", meta=np.array(json.dumps(meta)), **arrays)
    with pytest.raises(InputError, match=r"\(it is compressed\)"):
        load(tmp_path / "x.npz")


def test_a_bomb_takes_no_memory(tmp_path):
    import tracemalloc

    zeros = header("{'descr':'|u1','fortran_order':False,'shape':(200000000,)}", bytes(200_000_000))
    write_zip(tmp_path / "x.npz", [*members(), ("x.npy", zeros)], compression=zipfile.ZIP_DEFLATED)
    del zeros
    assert (tmp_path / "x.npz").stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(InputError, match=r"\(it is compressed\)"):
        load(tmp_path / "x.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_parts_that_overlap_are_refused(tmp_path):
    """Many directory entries for one stretch of data: 100 names, all of the first member's bytes."""
    data = npy(np.zeros(10_000, np.float32))
    write_zip(tmp_path / "one.npz", [("x.npy", data)])
    raw = (tmp_path / "one.npz").read_bytes()
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    entry = raw[start:end]
    tail = bytearray(raw[end:])
    tail[8:12] = struct.pack("<HH", 100, 100)
    tail[12:16] = struct.pack("<I", 100 * len(entry))
    (tmp_path / "many.npz").write_bytes(raw[:start] + entry * 100 + bytes(tail))
    with pytest.raises(InputError, match=r"\(its parts overlap\)"):
        load(tmp_path / "many.npz")


def test_an_offset_before_the_file_is_refused(tmp_path):
    write_zip(tmp_path / "x.npz", members())
    raw = bytearray((tmp_path / "x.npz").read_bytes())
    end = raw.rindex(b"PK\x05\x06")
    raw[end + 12 : end + 16] = struct.pack("<I", len(raw))  # the directory would begin before the file
    (tmp_path / "x.npz").write_bytes(raw)
    with pytest.raises(InputError):
        load(tmp_path / "x.npz")


def test_other_places(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint at"):
        load(tmp_path / "nothing.npz")
    with pytest.raises(InputError, match=r"is a folder; name the checkpoint in it, such as .*last\.npz"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file"):
        load(tmp_path / "pipe")


def test_what_the_machine_refuses_is_not_blamed_on_the_file(file, monkeypatch):
    for error in (OSError(errno.EIO, "Input/output error"), MemoryError()):
        monkeypatch.setattr(zipfile, "ZipFile", explode(error))
        with pytest.raises(type(error)):
            load(file)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_version_is_refused(tmp_path, version):
    write_zip(tmp_path / "x.npz", with_meta(version=version))
    with pytest.raises(InputError, match=f"has checkpoint version {version}; this minivit reads 1"):
        load(tmp_path / "x.npz")


# ---- reading what does not fit ---------------------------------------------------------------------------------------

CONFIGS = {
    "no config": (None, "does not say which model"),
    "config is a list": ([], "does not say which model"),
    "unknown field": (content()[1]["config"] | {"widht": 4}, "did you mean 'width'"),
    "other type": (content()[1]["config"] | {"width": "4"}, "width must be a whole number"),
    "list": (content()[1]["config"] | {"width": [4]}, "width must be a whole number"),
    "impossible": (content()[1]["config"] | {"num_heads": 3}, "not a multiple"),
    "another width": (content()[1]["config"] | {"width": 2}, "shape"),
    "wider": (content()[1]["config"] | {"width": 1 << 40}, "fewer numbers"),
    "deeper": (content()[1]["config"] | {"depth": 2}, "fewer blocks"),
    "absurdly deep": (content()[1]["config"] | {"depth": 10**15}, "fewer blocks"),
    "more classes": (content()[1]["config"] | {"num_classes": 4}, "fewer numbers"),
    "mean pooling": (content()[1]["config"] | {"pooling": "mean"}, "shape"),
}


@pytest.mark.parametrize(("config", "said"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_does_not_fit_is_refused(tmp_path, config, said):
    write_zip(tmp_path / "x.npz", with_meta(config=config))
    with pytest.raises(InputError, match=said) as raised:
        load_model(tmp_path / "x.npz")
    assert "x.npz" in str(raised.value)


ARRAYS = {
    "missing": (None, "lacks params/head.weight"),
    "other shape": (np.zeros((3, 4), np.float32), "has shape"),
    "NaN": (np.full((4, 3), np.nan, np.float32), "not finite"),
    "infinite": (np.full((4, 3), -np.inf, np.float32), "not finite"),
    "integers": (np.zeros((4, 3), np.int32), "not finite"),
    "text": (np.full((4, 3), "x"), "not finite"),
}


@pytest.mark.parametrize(("array", "said"), ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays_that_do_not_fit_are_refused(tmp_path, array, said):
    extra = npy(np.zeros(100, np.float32))  # so that there are numbers enough
    write_zip(
        tmp_path / "x.npz",
        members(**{"params/head.weight.npy": None if array is None else npy(array), "extra.npy": extra}),
    )
    with pytest.raises(InputError, match=said):
        load_model(tmp_path / "x.npz")


def test_a_refused_fill_changes_nothing(file):
    arrays, _ = load(file)
    table = parameter_table(CONFIG)
    flat = np.full(parameters.count(table), 7.0, np.float32)
    arrays["params/head.bias"] = np.full(3, np.nan, np.float32)  # the last of them
    with pytest.raises(InputError):
        checkpoint.fill(flat, table, arrays, "params", file)
    assert (flat == 7.0).all()


@pytest.mark.parametrize("names", [None, "abc", ["a", "b"], ["a", "b", 3]])
def test_class_names_that_do_not_fit_are_refused(tmp_path, names):
    write_zip(tmp_path / "x.npz", with_meta(class_names=names))
    with pytest.raises(InputError, match="classes"):
        checkpoint.class_names_of(read(tmp_path / "x.npz")[1])


@pytest.mark.parametrize("value", [None, 3, "text", [1], [], True])
def test_what_a_meta_says_in_no_known_form_it_does_not_say(value):
    """Whoever needs it says so in a line; others do without."""
    tables = dict.fromkeys(("data", "settings", "start", "pretraining", "progress", "versions"), value)
    record = record_of(content()[1] | tables | {"class_names": value}, "x.npz")
    assert record == checkpoint.Record("x.npz", CONFIG, [] if value == [] else None)
    assert checkpoint.few_classes(record) == ""
