"""What CIFAR's files hold: images and labels from their bytes.

Binary files are records of label bytes (CIFAR-10: one; CIFAR-100: coarse, fine) and 3 x 32 x 32 pixel bytes, one plane
per colour. Python files are pickles, and a pickle is a program: here it is read by an unpickler that knows nothing but
the stand-ins below, so that the worst that a file from anywhere can do is be refused.
"""

import io
import math
import pickle
import pickletools

import numpy as np

from minivit.base.errors import InputError
from minivit.data.cifar.layouts import OFFICIAL, PIXELS


def parse_binary(data, kind, path):
    """Planes of pixels and labels of a binary file.

    Shapes  ->  (n, 3072) uint8, (n,) int64
    Raises  InputError: the file is not made of whole records.
    """
    record = kind.label_bytes + PIXELS
    if len(data) % record:
        raise InputError(f"{path} has {len(data)} bytes, no multiple of the {record} of a record; {OFFICIAL}")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, kind.label_bytes :], records[:, kind.label_bytes - 1].astype(np.int64)


def parse_python(data, kind, path):
    """Planes of pixels and labels of a pickled file.

    Its keys are text or bytes; labels and pixels may be lists or arrays of whole numbers, the pixels of the shape
    (n, 3072) or (n, 3, 32, 32), plane by plane, or (n, 32, 32, 3).

    Shapes  ->  (n, 3072) uint8, (n,) int64
    Raises  InputError: the file is not a pickle of these.
    """
    content = unpickle(data, path)
    labels = _whole_numbers(content.get(kind.label_key), 256)
    if labels is None or labels.ndim not in (1, 2) or labels.size != len(labels):  # (n,) or (n, 1)
        raise InputError(f"{path} has no list of {kind.label_key.decode()}; {OFFICIAL}")
    pixels = _whole_numbers(content.get(b"data"), 256)
    if pixels is None or pixels.shape[:1] != labels.shape[:1] or pixels.shape[1:] not in _SHAPES:
        raise InputError(f"{path} has no uint8 data of shape ({len(labels)}, {PIXELS}); {OFFICIAL}")
    if pixels.shape[1:] == (32, 32, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    return pixels.reshape(-1, PIXELS).astype(np.uint8, copy=False), labels.reshape(-1).astype(np.int64)


_SHAPES = ((PIXELS,), (3, 32, 32), (32, 32, 3))  # of an image


def _whole_numbers(value, below):
    """A list of whole numbers, or of lists of them, or a stand-in's array, as an array; None if it is none of these.

    All numbers must be at least 0 and ``below`` a limit.
    """
    if isinstance(value, _Array | _Buffer):
        array = value.array()
    elif type(value) in (list, tuple) and len(value):
        numbers = [each.number() if isinstance(each, _Scalar) else each for each in value]
        if type(numbers[0]) is int:
            array = np.array(numbers) if all(type(n) is int and 0 <= n < below for n in numbers) else None
        else:  # rows, of lists or arrays
            rows = [_whole_numbers(each, below) for each in numbers]
            whole = rows[0] is not None and all(row is not None and row.shape == rows[0].shape for row in rows)
            array = np.stack([row.astype(np.uint8) for row in rows]) if whole and below <= 256 else None
    elif type(value) in (list, tuple):
        array = np.zeros(0, np.int64)
    else:
        array = None
    return array if array is not None and (not array.size or 0 <= array.min() <= array.max() < below) else None


def parse_class_names(data, kind, layout, path):
    """The names of the classes, a tuple.

    Raises  InputError: the file does not hold as many names as there are classes.
    """
    if layout.binary:
        lines = data.splitlines()
    else:
        lines = unpickle(data, path).get(kind.names_key)
        if type(lines) not in (list, tuple) or not all(type(line) in (bytes, str) for line in lines):
            raise InputError(f"{path} has no list of class names; {OFFICIAL}")
    lines = [line.decode(errors="replace") if type(line) is bytes else line for line in lines]
    names = tuple(line.strip() for line in lines if line.strip())
    count = len(kind.class_names.split())
    if len(names) != count:
        raise InputError(f"{path} names {len(names)} classes, not {count}; {OFFICIAL}")
    return names


def _filled(raw, code, order, shape, fortran):
    """The array of whole numbers that these describe; None where they are no such description, or do not fit."""
    text = [part.decode("latin-1") if type(part) is bytes else part for part in (code, order)]
    if type(text[0]) is not str or text[0] not in _CODES or text[1] not in ("<", ">", "|", "="):
        return None
    if type(raw) is str:  # Python 3 keeps bytes of old pickles as text
        raw = raw.encode("latin-1", "ignore")
    sizes = type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape)
    dtype = np.dtype(text[0]).newbyteorder(text[1])
    if not sizes or type(raw) not in (bytes, bytearray) or math.prod(shape) * dtype.itemsize != len(raw):
        return None
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran is True else "C")


_CODES = tuple(kind + size for kind in "ui" for size in "1248")


class _Array:
    """Stands in for numpy.ndarray and its constructor: keeps the pickled state, and interprets none of it."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def array(self):
        """The array of whole numbers, or None."""
        match self.state:
            case (1, shape, _Dtype(code=code, order=order), fortran, raw):
                return _filled(raw, code, order, shape, fortran)


def _refuse_state(self, state):  # without it a pickle could set attributes, even of the class
    raise pickle.UnpicklingError("it changes what it made")


class _Buffer:
    """Stands in for NumPy's way to put an array into a pickle of protocol 5."""

    def __init__(self, *parts):
        self.parts = parts

    __setstate__ = _refuse_state

    def array(self):
        """The array of whole numbers, or None."""
        match self.parts:
            case (raw, _Dtype(code=code, order=order), shape, layout):
                return _filled(raw, code, order, shape, layout in ("F", b"F"))


class _Dtype:
    """Stands in for numpy.dtype: keeps the type code and the byte order."""

    def __init__(self, code=None, *_):
        self.code, self.order = code, "|"

    def __setstate__(self, state):
        if type(state) is tuple and len(state) > 1:
            self.order = state[1]


class _Scalar:
    """Stands in for a number of NumPy's."""

    def __init__(self, *parts):
        self.parts = parts

    __setstate__ = _refuse_state

    def number(self):
        """The whole number, or None."""
        match self.parts:
            case (_Dtype(code=code, order=order), raw):
                array = _filled(raw, code, order, (), False)
                return None if array is None else int(array)


# Nothing here can be changed from within a pickle, as a plain function could (its defaults, for one).
_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): str.encode,  # Python 3 writes bytes into old pickles as latin-1 text
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[module, name]


def unpickle(data, path):
    """The dictionary that a CIFAR pickle holds; nothing but the stand-ins is run.

    Raises  InputError: it is damaged, or not CIFAR's.
    """
    try:
        # The unpickler sets aside room for whatever memo number and length a file names, so read them first:
        # genops checks the lengths, and an honest pickle numbers its memo in order.
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if "PUT" in opcode.name and argument > count:
                raise pickle.UnpicklingError("memo out of order")
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # damaged bytes may raise anything
        raise InputError(f"{path} is not a CIFAR pickle ({error}); {OFFICIAL}") from error
    if type(content) is not dict:
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary; {OFFICIAL}")
    return {key.encode() if type(key) is str else key: value for key, value in content.items()}
