"""Files of named tensors, ``.npz`` and ``.safetensors``, as other programs write them.

A file is mapped, not read: opening it costs what its table of contents costs, and a tensor is fetched from the disk
when it is asked for. Nothing in a file is believed: where a tensor lies, how large it is and of what kind is compared
with the file's own length first, the checksums of an ``.npz`` are verified, and pickles are never read.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.base.files import parse_json, write_atomically

BFLOAT16 = "bfloat16"
FLOATS = ("float16", BFLOAT16, "float32", "float64")
UNPACKED, RATIO = 2**24, 100  # bytes that compressed arrays may unpack to: the first, and so many times the file's
PICKLES = (".bin", ".pt", ".pth", ".pkl")
PICKLE_ADVICE = (
    "is a pickle, which can run any program when it is read, and minivit reads none; if you trust it, write it as "
    "safetensors: python -c \"import torch, safetensors.torch as s; x = torch.load('IN', weights_only=True); "
    "x = x.get('model', x.get('state_dict', x)); s.save_file({k: v.contiguous() for k, v in x.items()}, "
    "'OUT.safetensors')\""
)
INDEX = "model.safetensors.index.json"
MARKS = (  # how files begin that are no weights, or weights that are not read
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: git lfs pull fetches that"),
    (b"<", "is a web page (HTML), perhaps what a failed download left: download it again"),
    (b"\x89HDF\r\n", "is an HDF5 file, of TensorFlow or Keras: save it as safetensors"),
    (b"GGUF", "is a GGUF file, of llama.cpp: take the model's safetensors"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz: unpack it first"),
    (b"BZh", "is compressed with bzip2: unpack it first"),
    (b"Rar!", "is an archive: unpack it first"),
    (b"7z\xbc\xaf", "is an archive: unpack it first"),
    (b"{", "is a JSON text, not the weights themselves"),
    (b"Invalid username", "is the answer of a failed download, not the file: download it again"),
    (b"Entry not found", "is the answer of a failed download, not the file: download it again"),
)
ENDINGS = {
    ".msgpack": "is a msgpack file, of Flax: save it as safetensors",
    ".h5": "is an HDF5 file, of TensorFlow or Keras: save it as safetensors",
    ".keras": "is a file of Keras: save it as safetensors",
    ".onnx": "is an ONNX file: take the model's safetensors",
    ".tflite": "is a file of TensorFlow Lite: take the model's safetensors",
    ".pb": "is a file of TensorFlow: take the model's safetensors",
    ".index": "is a checkpoint of TensorFlow: take the model's safetensors",
    ".gguf": "is a GGUF file, of llama.cpp: take the model's safetensors",
}


class Tensor(NamedTuple):
    """A tensor of a file; ``read()`` fetches it, bfloat16 widened to float32."""

    shape: tuple[int, ...]
    kind: str  # "float32", "bfloat16", ...
    read: Callable  # () -> array


def of_arrays(arrays):
    """Arrays in memory as `open_tensors` would find them in a file."""
    return {name: Tensor(a.shape, a.dtype.name, lambda a=a: a) for name, a in arrays.items()}


@contextlib.contextmanager
def refused(path, what="weights"):
    """Within it, whatever a broken file makes NumPy, zipfile or safetensors raise becomes one `InputError`."""
    try:
        yield
    except Exception as error:
        system = isinstance(error, OSError) and error.errno is not None and error.errno != errno.EINVAL
        if isinstance(error, (InputError, MemoryError, ImportError)) or system:
            raise  # the file is not to blame
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is truncated, altered or not a file of {what} ({detail})") from None


def _map(path):
    """The bytes of a file, fetched from the disk as they are looked at."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _widen(array):
    """bfloat16, stored as its 16 bits, as float32: the upper half of the same bits."""
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _kind(dtype):
    """What a NumPy type is called; two bytes of no type are how NumPy stores the bfloat16 of ml_dtypes."""
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    return BFLOAT16 if dtype in (np.dtype("V2"), np.dtype(np.uint16)) else dtype.name


def _npy_header(start):
    """Shape, order, type and length of an ``.npy`` header."""
    stream = io.BytesIO(start)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("an array has an unknown version")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if any(n < 0 for n in shape):
        raise ValueError("an array has a negative size")
    return shape, "F" if fortran else "C", dtype, stream.tell()


def read_npy(data, name):
    """One array from the bytes of an ``.npy`` file, its size compared with the header's before memory is taken.

    Raises  ValueError: it is broken, of another version, or holds something else than numbers and texts.
    """
    shape, order, dtype, offset = _npy_header(data)
    if dtype.kind not in "fiubU" or not dtype.itemsize:
        raise ValueError(f"array {name} holds {dtype}, not numbers")
    if math.prod(shape) * dtype.itemsize != len(data) - offset:
        raise ValueError(f"array {name} is not as long as it says")
    return np.frombuffer(data, dtype, offset=offset).reshape(shape, order=order).copy()


def _unzipped(data, member, limit):
    """The first ``limit`` bytes of a member of a zip file."""
    if member.compress_type == zipfile.ZIP_STORED:
        return data[:limit]
    return zlib.decompressobj(-15).decompress(data, limit)


def _npz_tensor(data, member, widen):
    """A member of an ``.npz`` file as a `Tensor`; ``data`` are its bytes in the file."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
        raise ValueError(f"{member.filename} is compressed in an unknown way")
    if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
        raise ValueError(f"{member.filename} is not as long as it says")
    shape, order, dtype, offset = _npy_header(bytes(_unzipped(data, member, 1 << 14)))
    kind = _kind(dtype)
    if math.prod(shape) * dtype.itemsize != member.file_size - offset:
        raise ValueError(f"{member.filename} is not as long as it says")

    def read():
        whole = _unzipped(data, member, member.file_size)
        if len(whole) != member.file_size or zlib.crc32(whole) != member.CRC:
            raise ValueError(f"the checksum of {member.filename} is wrong")
        array = np.frombuffer(whole, dtype, offset=offset).reshape(shape, order=order)
        return _widen(array) if widen and kind == BFLOAT16 else array

    return Tensor(shape, kind, read)


def _open_npz(path, *, widen=True):
    with zipfile.ZipFile(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    if any(Path(member.filename).name == "data.pkl" for member in members):
        raise InputError(f"{path} {PICKLE_ADVICE}")
    file, tensors, end = _map(path), {}, 0
    if sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED) > UNPACKED + RATIO * len(file):
        raise ValueError("it unpacks to far more than numbers do: a decompression bomb")
    for member in members:
        if member.header_offset < end:
            raise ValueError("its parts overlap")
        # a local header is 30 bytes, the last four of which are the lengths of the name and of the extra field behind
        magic, lengths = struct.unpack_from("<4s22x4s", file, member.header_offset)
        start = member.header_offset + 30 + sum(struct.unpack("<HH", lengths))
        end = start + member.compress_size
        name = member.filename.removesuffix(".npy")
        if magic != b"PK\x03\x04" or end > len(file):
            raise ValueError(f"{name} does not lie where it should")
        if name in tensors:
            raise ValueError(f"it holds {name} twice")
        tensors[name] = _npz_tensor(file[start:end], member, widen)
    return tensors


def read_arrays(path, names):
    """Some of the arrays of an ``.npz`` file, in the order of their names.

    Raises  InputError: there is no such file, it is broken, or lacks one.
    """
    with refused(path, "arrays"):
        tensors = _open_npz(path, widen=False)
        if not all(name in tensors for name in names):
            raise InputError(f"{path} lacks an array: it must hold {', '.join(names)}")
        return [tensors[name].read() for name in names]


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError('safetensors files need a library: pip install "minivit[interop]"') from None
    return safetensors


def _open_safetensors(path):
    with _safetensors().safe_open(path, framework="numpy"):  # verifies the header: types, sizes, gaps, overlaps
        file = _map(path)
        length = int.from_bytes(file[:8], "little")
        header = json.loads(bytes(file[8 : 8 + length]))
    header.pop("__metadata__", None)
    kinds = {"F16": "float16", "BF16": BFLOAT16, "F32": "float32", "F64": "float64"}

    def tensor(about):
        start, end = about["data_offsets"]
        data, kind = file[8 + length + start : 8 + length + end], kinds.get(about["dtype"], about["dtype"])

        def read():  # the library's own reading has no bfloat16
            dtype = np.dtype(np.uint16 if kind == BFLOAT16 else kind).newbyteorder("<")
            array = np.frombuffer(data, dtype).reshape(about["shape"])
            return _widen(array) if kind == BFLOAT16 else array

        return Tensor(tuple(about["shape"]), kind, read)

    return {name: tensor(about) for name, about in header.items()}


def open_tensors(path):
    """The tensors of an ``.npz`` or ``.safetensors`` file by name, as `Tensor`; what it is is seen from its content.

    The index of several safetensors files, ``*.safetensors.index.json``, stands for all of them.
    Raises  InputError: there is no such file, or it is broken, a pickle or something else; ImportError: it is a
    safetensors file, and the library is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a file; name the .npz or .safetensors file")
    with refused(path):
        with open(path, "rb") as file:
            start = file.read(64)
        if path.name.endswith(".safetensors.index.json"):
            return _open_shards(path)
        if start[:2] == b"PK":
            return _open_npz(path)
        if start[8:9] == b"{" and start[:1] != b"{":
            return _open_safetensors(path)
        if what := _what_else(path, start):
            raise InputError(f"{path} {what}")
    raise InputError(f"{path} is neither an .npz nor a .safetensors file, or it is truncated")


def _what_else(path, start):
    """What a file is, by its first bytes and its ending, where it is none of ours; "" if nobody can tell."""
    if not start:
        return "is empty, perhaps what a failed download left: download it again"
    if path.suffix == ".msgpack":
        return ENDINGS[path.suffix]
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return PICKLE_ADVICE
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for mark, what in MARKS:
        if text.startswith(mark):
            return what
    return PICKLE_ADVICE if path.suffix in PICKLES else ENDINGS.get(path.suffix, "")


def _open_shards(path):
    """The tensors of several safetensors files, by their index."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()) or not where:
        raise InputError(f"{path} has no weight_map, which names the file of each tensor")
    tensors, names = {}, sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{path} names the file {name!r}, which is no safetensors file beside it")
        if not (path.parent / name).is_file():
            raise InputError(f"{path} needs {name}, which is not there: download it too")
    for name in names:
        for key, tensor in open_tensors(path.parent / name).items():
            if where.get(key) != name:
                raise InputError(f"{path}: {name} holds {key}, which the index does not say")
            tensors[key] = tensor
    if lacking := where.keys() - tensors.keys():
        raise InputError(f"{path}: {where[min(lacking)]} lacks {min(lacking)}")
    return tensors


def is_foreign(path):
    """Does a file look like one for `open_tensors`, rather than like a checkpoint of minivit, or like nothing?"""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(64)
    if start[:2] != b"PK":
        weights = path.name.endswith((*PICKLES, *ENDINGS, ".safetensors", ".safetensors.index.json"))
        return weights or start[8:9] == b"{" or bool(start and path.suffix != ".json" and _what_else(path, start))
    try:
        with zipfile.ZipFile(path) as archive:
            return "meta.npy" not in archive.namelist()
    except Exception:  # zipfile raises nearly anything for a broken file; the reader of checkpoints says what it is
        return False


def write_npz(path, arrays):
    """Write arrays as an uncompressed ``.npz`` file, atomically.

    Raises  OSError: see `write_atomically`.
    """
    write_atomically(path, lambda file: np.savez(file, **arrays))


def write_safetensors(path, arrays):
    """Write arrays as a ``.safetensors`` file, atomically.

    Raises  OSError: see `write_atomically`; ImportError: the library is not installed.
    """
    save = _safetensors().numpy.save
    arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}  # () would become (1,)
    content = save(arrays, metadata={"format": "pt"})  # transformers asks for whom it was written
    write_atomically(path, lambda file: file.write(content))


def read_json(path):
    """The object in a JSON file, or {} where there is no file.

    Raises  InputError: it is not JSON, or no object.
    """
    if not os.path.exists(path):
        return {}
    try:
        content = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content
