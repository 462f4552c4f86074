"""What CIFAR's files hold: images and labels from their bytes.

Binary files are records of label bytes (CIFAR-10: one; CIFAR-100: coarse, fine) and 3 x 32 x 32 pixel bytes, one plane
per colour. Python files are pickles, and a pickle is a program: here it is read by an unpickler that knows nothing but
the stand-ins below, so that the worst that a file from anywhere can do is be refused.
"""

import io
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

    Shapes  ->  (n, 3072) uint8, (n,) int64
    Raises  InputError: the file is not a pickle of these.
    """
    content = unpickle(data, path)
    labels = content.get(kind.label_key)
    if type(labels) is not list or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise InputError(f"{path} has no list of {kind.label_key.decode()}; {OFFICIAL}")
    match content.get(b"data"):
        case _Array(state=(1, (int(n), 3072), _Dtype(code=b"u1" | "u1"), bool(fortran), bytes(raw))) if (
            n == len(labels) and len(raw) == n * PIXELS
        ):
            pixels = np.frombuffer(raw, np.uint8).reshape((n, PIXELS), order="F" if fortran else "C")
            return pixels, np.array(labels, np.int64)
    raise InputError(f"{path} has no uint8 data of shape ({len(labels)}, {PIXELS}); {OFFICIAL}")


def parse_class_names(data, kind, layout, path):
    """The names of the classes, a tuple.

    Raises  InputError: the file does not hold as many names as there are classes.
    """
    if layout.binary:
        lines = data.splitlines()
    else:
        lines = unpickle(data, path).get(kind.names_key)
        if type(lines) is not list or not all(type(line) is bytes for line in lines):
            raise InputError(f"{path} has no list of class names; {OFFICIAL}")
    names = tuple(line.decode(errors="replace").strip() for line in lines if line.strip())
    count = len(kind.class_names.split())
    if len(names) != count:
        raise InputError(f"{path} names {len(names)} classes, not {count}; {OFFICIAL}")
    return names


class _Array:
    """Stands in for numpy.ndarray and its constructor: keeps the pickled state, and interprets none of it."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state


class _Dtype:
    """Stands in for numpy.dtype: keeps the type code."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass  # the byte order, which one-byte numbers do not have


# Nothing here can be changed from within a pickle, as a plain function could (its defaults, for one).
_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
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
    return content
