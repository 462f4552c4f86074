"""Files of tensors: both kinds, read lazily, and whatever a broken or hostile file holds."""

import io
import json
import struct
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from minivit import InputError
from minivit.weights.tensor_files import open_tensors, read_json, refused, write_npz, write_safetensors

ARRAYS = {
    "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.linspace(0, 1, 5),
    "c": np.float16([1.5, -2.5]),
    "scalar": np.float32(3),
    "empty": np.zeros((0, 3), np.float32),
}


def everything(path):
    """Every tensor of a file, as a reader would take them; what it makes of a broken one is one sentence."""
    tensors = open_tensors(path)
    with refused(path):
        return {name: tensor.read() for name, tensor in tensors.items() if tensor.kind.startswith(("float", "bf"))}


def same(path):
    found = everything(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in found.items():
        assert array.dtype == ARRAYS[name].dtype and array.shape == ARRAYS[name].shape
        np.testing.assert_array_equal(array, ARRAYS[name])


def refuses(path, match=None):
    with pytest.raises(InputError, match=match) as error:
        everything(path)
    text = str(error.value)
    assert str(path) in text and len(text.splitlines()) == 1 and len(text) < 500
    return text


def test_both_kinds_written_and_read(tmp_path):
    write_npz(tmp_path / "x.npz", ARRAYS)
    write_safetensors(tmp_path / "x.safetensors", ARRAYS)
    np.savez_compressed(tmp_path / "y.npz", **ARRAYS)
    for name in ("x.npz", "x.safetensors", "y.npz"):
        same(tmp_path / name)
    (tmp_path / "x.npz").rename(tmp_path / "named.safetensors")  # the content tells, not the name
    same(tmp_path / "named.safetensors")


def test_a_tensor_is_a_view_of_the_mapped_file(tmp_path):
    write_npz(tmp_path / "x.npz", ARRAYS)
    write_safetensors(tmp_path / "x.safetensors", ARRAYS)
    for name in ("x.npz", "x.safetensors"):
        array = open_tensors(tmp_path / name)["a/kernel"].read()
        assert not array.flags.owndata and not array.flags.writeable


def test_a_damaged_tensor_is_found_when_it_is_read_and_not_before(tmp_path):
    path = tmp_path / "x.npz"
    write_npz(path, ARRAYS)
    content = bytearray(path.read_bytes())
    at = content.index(ARRAYS["b"].tobytes())
    content[at + 3] ^= 1
    path.write_bytes(content)
    tensors = open_tensors(path)
    np.testing.assert_array_equal(tensors["a/kernel"].read(), ARRAYS["a/kernel"])
    with pytest.raises(ValueError, match="checksum of b.npy"):
        tensors["b"].read()
    refuses(path, "checksum")


@pytest.mark.parametrize("name", ["x.npz", "z.npz", "x.safetensors"])
def test_truncated_anywhere(tmp_path, name):
    path = tmp_path / name
    few = {k: ARRAYS[k] for k in ("a/kernel", "c")}
    {"x.npz": np.savez, "z.npz": np.savez_compressed}.get(name, lambda p, **a: save_file(a, p))(path, **few)
    content = path.read_bytes()
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        refuses(path)


@pytest.mark.parametrize("name", ["x.npz", "z.npz", "x.safetensors"])
def test_any_byte_altered(tmp_path, name):
    """One sentence, or the numbers; where there are checksums, the numbers as they were."""
    path = tmp_path / name
    few = {k: ARRAYS[k] for k in ("a/kernel", "c")}
    {"x.npz": np.savez, "z.npz": np.savez_compressed}.get(name, lambda p, **a: save_file(a, p))(path, **few)
    content, rng, refusals = path.read_bytes(), np.random.default_rng(0), 0
    places = np.arange(len(content)) if len(content) < 400 else rng.choice(len(content), 400, replace=False)
    for place in places:
        broken = bytearray(content)
        broken[place] ^= int(rng.choice([1, 4, 16, 128, 255]))
        path.write_bytes(broken)
        try:
            found = everything(path)
        except InputError:
            refusals += 1
        else:
            for key, array in found.items():
                if name.endswith(".npz") and key in few and array.shape == few[key].shape:
                    assert array.tobytes() == few[key].tobytes()
    assert refusals > len(places) / 4


def zipped(path, members, **keywords):
    with zipfile.ZipFile(path, "w", **keywords) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def npy(header, data=b"", version=1):
    text = (header + "\n").encode("latin1")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


FLOATS = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}, }}"
NPY = {  # what an array's bytes say -> what the message says
    "longer than it is": (npy(FLOATS.format("(1000000000000,)"), b"1234"), "not as long as it says"),
    "shorter than it is": (npy(FLOATS.format("(1,)"), b"12345678"), "not as long as it says"),
    "a product that overflows": (npy(FLOATS.format(f"({2**40}, {2**40})"), b""), "not as long as it says"),
    "negative": (npy(FLOATS.format("(-1, -1)"), b"1234"), "negative size"),
    "pickled": (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"x" * 8), "pickled objects"),
    "pickled inside": (npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }", b"x" * 8), "pickled"),
    "no header": (b"\x93NUMPY\x01\x00\xff\xff", "not a file of weights"),
    "no dictionary": (npy("[1, 2]"), "not a file of weights"),
    "code": (npy("__import__('os').system('true')"), "not a file of weights"),
    "deep": (npy("(" * 9000), "not a file of weights"),
    "another version": (npy(FLOATS.format("(1,)"), b"1234")[:6] + b"\x09\x00", "unknown version"),
    "another magic": (b"not an array at all", "not a file of weights"),
    "empty": (b"", "not a file of weights"),
}


@pytest.mark.parametrize("name", NPY)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_arrays_that_lie(tmp_path, name, compression):
    data, message = NPY[name]
    refuses(zipped(tmp_path / "x.npz", [("a.npy", data)], compression=compression), message)


def test_a_short_version_2_header_is_read(tmp_path):
    path = zipped(tmp_path / "x.npz", [("a.npy", npy(FLOATS.format("(1,)"), b"\0\0\x80\x3f", version=2))])
    assert everything(path)["a"] == [1.0]


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """10 GB of zeros announced in 10 kB: the tensor is found to be another size than the model needs, or not whole."""
    data = npy(FLOATS.format("(250,)"), bytes(1000))
    path = zipped(tmp_path / "x.npz", [("a.npy", data)], compression=zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    huge = content.replace(struct.pack("<I", len(data)), struct.pack("<I", 2**32 - 2))
    path.write_bytes(huge)
    refuses(path, "a decompression bomb")


def test_members_that_overlap_or_hide(tmp_path):
    good = npy(FLOATS.format("(1,)"), b"1234")
    path = zipped(tmp_path / "x.npz", [("a.npy", good), ("b.npy", good)])
    content = bytearray(path.read_bytes())
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    moved = content.copy()
    moved[second + 42 : second + 46] = struct.pack("<I", 0)  # b is said to lie where a lies
    path.write_bytes(moved)
    refuses(path)
    moved[second + 42 : second + 46] = struct.pack("<I", len(content) - 8)
    path.write_bytes(moved)
    refuses(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        zipped(path, [("a.npy", good), ("a.npy", good)])
    refuses(path, "a twice")
    zipped(path, [("a.npy", good)], compression=zipfile.ZIP_LZMA)
    refuses(path, "compressed in an unknown way")


SAFE = {  # header text -> part of the message
    "beyond the file": {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
    "another length than the shape": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "overlapping": {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    },
    "negative": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "no type": {"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
    "no tensor": {"a": 3},
}


@pytest.mark.parametrize("name", SAFE)
def test_headers_that_lie(tmp_path, name):
    text = json.dumps(SAFE[name]).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    refuses(path, "truncated, altered or not a file of weights")


def test_a_header_of_any_length(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (2**60, 2**64 - 1, 10**8, 0, 1):
        path.write_bytes(length.to_bytes(8, "little") + b'{"a":3}')
        refuses(path)


def test_integers_are_found_and_not_read(tmp_path):
    save_file({"n": np.arange(3), "x": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert tensors["n"].kind == "I64" and tensors["x"].kind == "float32"


def test_pickles_are_never_read(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:  # as torch.save writes
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", b"1234")
    for name, content in (("x.pt", stream.getvalue()), ("x.npz", stream.getvalue()), ("y.bin", b"\x80\x02}q\x00."),
                          ("y.pth", b"no matter what")):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert "weights_only=True" in refuses(tmp_path / name, "is a pickle, which can run any program")


def test_other_things(tmp_path):
    refuses(tmp_path / "none.npz", "there is no file")
    refuses(tmp_path, "is not a file")
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    refuses(tmp_path / "x.h5", "is an HDF5 file")
    (tmp_path / "x").write_bytes(b"")
    refuses(tmp_path / "x", "is empty")
    (tmp_path / "x").write_bytes(b"something")
    refuses(tmp_path / "x", "neither")
    assert read_json(tmp_path / "config.json") == {}
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not a JSON file"):
        read_json(tmp_path / "deep.json")


def test_without_the_library(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "x.safetensors", ARRAYS)
    write_npz(tmp_path / "x.npz", ARRAYS)
    for name in [name for name in sys.modules if name.startswith("safetensors")]:
        monkeypatch.setitem(sys.modules, name, None)
    same(tmp_path / "x.npz")
    with pytest.raises(ImportError, match=r'pip install "minivit\[interop\]"'):
        open_tensors(tmp_path / "x.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    for name, write in (("x.npz", write_npz), ("x.safetensors", write_safetensors)):
        path = tmp_path / name
        write(path, ARRAYS)
        before = path.read_bytes()
        monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            write(path, {"a": np.ones(3)})
        monkeypatch.undo()
        assert path.read_bytes() == before and len(list(tmp_path.glob(".*"))) == 0
