"""CIFAR's pickles: hostile ones run nothing, odd ones are refused."""

import codecs
import os
import pickle
import struct
import sys

import numpy as np
import pytest
from cifar_samples import PYTHON, assert_is, contents, image_files, python_file, refused, write_folder

from minivit.base.errors import InputError
from minivit.data import load
from minivit.data.cifar import parse


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker):
    command = f"touch {marker}"
    array = np.zeros((5, 3072), np.uint8)
    objects = np.array([Call(os.system, command)], dtype=object)
    yield "os.system, protocol 0", pickle.dumps(Call(os.system, command), protocol=0)
    yield "os.system, protocol 4", pickle.dumps(Call(os.system, command), protocol=4)
    yield "inside a dictionary", pickle.dumps({b"data": array, b"fine_labels": Call(os.system, command)})
    yield "eval", pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')"))
    yield "exec by its old name", f"c__builtin__\nexec\n(Vopen({str(marker)!r}, 'w')\ntR.".encode()
    yield "getattr", b"cbuiltins\ngetattr\n(Nt."
    yield "inst", f"(V{command}\nios\nsystem\n.".encode()
    yield "a dotted name", b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93."
    yield "object array", pickle.dumps({b"data": objects, b"fine_labels": [0]}, protocol=2)
    yield "numpy scalar", b"cnumpy.core.multiarray\nscalar\n(tR."
    yield "numpy fromfile", b"cnumpy\nfromfile\n(V/etc/passwd\ntR."
    yield "numpy load", b"cnumpy\nload\n(V/etc/passwd\ntR."
    yield "copyreg", b"ccopyreg\n_reconstructor\n."
    packed = Call(codecs.encode, b"abc", "zlib")
    yield "another codec", pickle.dumps({b"data": array, b"fine_labels": [0] * 5, b"x": packed}, protocol=2)
    yield "decode", b"c_codecs\ndecode\n(Vabc\nVhex\ntR."
    yield "persistent id", b"Pos.system\n."
    yield "extension", b"\x80\x02\x82\x01."
    yield "change a stand-in", b"c_codecs\nencode\n(N(V__doc__\nVchanged\ndtb."
    yield "change a stand-in class", b"cnumpy\nndarray\n(N(Vstate\nVchanged\ndtb."
    for stand_in in ("numpy.core.numeric\n_frombuffer", "numpy.core.multiarray\nscalar", "collections\nOrderedDict"):
        yield f"change {stand_in}", f"c{stand_in}\n(N(Varray\nVchanged\ndtb.".encode()
    good = contents("cifar100", "python")["train"]
    yield "large memo", good.replace(b"}q\x01", b"}r" + struct.pack("<i", 1_000_000), 1)
    yield "huge memo", good.replace(b"}q\x01", b"}r" + struct.pack("<i", 2**31 - 1), 1)
    yield "huge length", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"."
    yield "huge frame", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}."
    yield "deep", b"(" * 100_000 + b"t" * 100_000 + b"."
    yield "list", pickle.dumps([1])
    yield "number", pickle.dumps(1)
    yield "nothing", b""
    yield "noise", bytes(range(256))


def test_hostile_pickles_run_nothing(tmp_path):
    folder = write_folder(tmp_path / PYTHON["cifar100"], contents("cifar100", "python"))
    marker = tmp_path / "marker"
    for what, data in hostile(marker):
        (folder / "train").write_bytes(data)
        with pytest.raises(InputError, match=r"train.* get the official file"):
            load("cifar100", tmp_path)
            pytest.fail(f"read: {what}")
        assert not marker.exists(), what
    assert parse._Array().state is None and not hasattr(parse._Array, "changed")
    assert callable(parse._Buffer.array) and not hasattr(parse._Scalar, "array")
    (folder / "train").write_bytes(contents("cifar100", "python")["train"])
    assert_is(load("cifar100", tmp_path), "cifar100")


def test_pickles_bring_no_module_in(tmp_path):
    folder = write_folder(tmp_path / PYTHON["cifar100"], contents("cifar100", "python"))
    (folder / "train").write_bytes(b"cantigravity\nfly\n.")
    refused("asks for antigravity.fly", "cifar100", tmp_path)
    assert "antigravity" not in sys.modules


def odd_contents():
    data = np.zeros((2, 3072), np.uint8)
    good = {b"data": data, b"fine_labels": [0, 1]}
    yield "no data", {b"fine_labels": [0, 1]}
    yield "no labels", {b"data": data}
    yield "labels for another set", {b"data": data, b"labels": [0, 1]}
    yield "other dtype", good | {b"data": np.full((2, 3072), -1, np.int8)}
    yield "wider dtype", good | {b"data": np.zeros((2, 384))}
    yield "other shape", good | {b"data": data.reshape(2, 3, 1024)}
    yield "transposed", good | {b"data": data.T}
    yield "too few", good | {b"data": data[:1]}
    yield "lists of two lengths", good | {b"data": [[0] * 3072, [0] * 3071]}
    yield "lists of other numbers", good | {b"data": [[0.5] * 3072] * 2}
    yield "pixels out of range", good | {b"data": np.full((2, 3072), 256)}
    yield "text", good | {b"data": "x" * 6144}
    yield "bytes", good | {b"data": data.tobytes()}
    yield "labels of other types", good | {b"fine_labels": [0.0, True]}
    yield "labels below zero", good | {b"fine_labels": [0, -1]}
    yield "labels beyond any integer", good | {b"fine_labels": [0, 10**30]}
    yield "labels in an array of other numbers", good | {b"fine_labels": np.array([0.0, 1.0])}
    yield "labels below zero in an array", good | {b"fine_labels": np.array([0, -1])}
    yield "labels of two dimensions", good | {b"fine_labels": np.array([[0, 1], [0, 1]])}
    yield "labels of objects", good | {b"fine_labels": np.array([0, "a"], object)}


@pytest.mark.parametrize("content", [pytest.param(content, id=what) for what, content in odd_contents()])
def test_pickles_of_something_else(tmp_path, content):
    folder = write_folder(tmp_path / PYTHON["cifar100"], contents("cifar100", "python"))
    (folder / "train").write_bytes(pickle.dumps(content, protocol=2))
    refused("train has no .* get the official file", "cifar100", tmp_path)


def test_a_shape_that_its_bytes_do_not_fill(tmp_path):
    folder = write_folder(tmp_path / PYTHON["cifar100"], contents("cifar100", "python"))
    data = (folder / "train").read_bytes()
    shape = b"J" + struct.pack("<i", 7) + b"J" + struct.pack("<i", 3072)
    assert data.count(shape) == 1
    for n, width in ((8, 3072), (2**31 - 1, 3072), (-7, 3072), (7, -3072), (7, 2**31 - 1)):
        changed = b"J" + struct.pack("<i", n) + b"J" + struct.pack("<i", width)
        (folder / "train").write_bytes(data.replace(shape, changed))
        refused("train has no uint8 data", "cifar100", tmp_path)
    images, labels = image_files("cifar100")[0]
    more = python_file(images, [*labels, 0], "cifar100")
    assert more.count(shape) == 1
    longer = b"J" + struct.pack("<i", 8) + b"J" + struct.pack("<i", 3072)
    (folder / "train").write_bytes(more.replace(shape, longer))
    refused("train has no uint8 data of shape (.*8, 3072)", "cifar100", tmp_path)
