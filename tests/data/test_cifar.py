"""CIFAR in all its forms, whole and broken, honest and hostile; downloads from a server of our own."""

import codecs
import contextlib
import gzip
import hashlib
import io
import os
import pickle
import socket
import struct
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from minivit.base.errors import InputError
from minivit.data import fetch, load, resize_images
from minivit.data.cifar import download, layouts, parse

COUNTS = {"cifar10": (3, 1, 2, 3, 2, 4), "cifar100": (7, 5)}  # records of each file, the test file last
BINARY = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
PYTHON = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
NAMES = {
    ("cifar10", "binary"): [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"],
    ("cifar10", "python"): [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
    ("cifar100", "binary"): ["train.bin", "test.bin"],
    ("cifar100", "python"): ["train", "test"],
}


def image_files(name):
    """Return [(images, labels)] for each file of a small data set."""
    rng = np.random.default_rng(4)
    classes = 10 if name == "cifar10" else 100
    return [(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, classes, n)) for n in COUNTS[name]]


def binary_file(images, labels, name):
    records = []
    for image, label in zip(images, labels, strict=True):
        coarse = [] if name == "cifar10" else [int(label) // 5]
        planes = b"".join(image[:, :, channel].tobytes() for channel in range(3))
        records.append(bytes([*coarse, int(label)]) + planes)
    return b"".join(records)


def python_file(images, labels, name):
    """Return what cPickle of Python 2 wrote: byte strings, and NumPy's module names of then."""
    text = lambda value: b"T" + struct.pack("<i", len(value)) + value  # noqa: E731
    number = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731
    planes = images.transpose(0, 3, 1, 2).tobytes()
    dtype = (
        b"cnumpy\ndtype\nq\x05(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02(cnumpy\nndarray\nq\x03(K\x00t" + text(b"b") + b"tR"
        b"(K\x01(" + number(len(images)) + number(3072) + b"t" + dtype + b"\x89" + text(planes) + b"tb"
    )
    key = b"labels" if name == "cifar10" else b"fine_labels"
    items = text(b"data") + array + text(key) + b"](" + b"".join(map(number, map(int, labels))) + b"e"
    return b"\x80\x02}q\x01(" + text(b"batch_label") + text(b"a batch") + items + b"u."


def contents(name, form):
    make = binary_file if form == "binary" else python_file
    return {
        file: make(images, labels, name)
        for file, (images, labels) in zip(NAMES[name, form], image_files(name), strict=True)
    }


def write_folder(folder, files):
    folder.mkdir(parents=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


def write_archive(path, files, prefix="some/where/"):
    with tarfile.open(path, "w:gz") as archive:
        for file, data in files.items():
            member = tarfile.TarInfo(prefix + file)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def assert_is(dataset, name):
    expected = image_files(name)
    splits = (
        (expected[:-1], dataset.train_images, dataset.train_labels),
        (
            expected[-1:],
            dataset.test_images,
            dataset.test_labels,
        ),
    )
    for parts, images, labels in splits:
        np.testing.assert_array_equal(images, np.concatenate([part for part, _ in parts]))
        np.testing.assert_array_equal(labels, np.concatenate([part for _, part in parts]))
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        assert images.flags.c_contiguous
    assert dataset.name == name


def refused(pattern, name, data_dir):
    with pytest.raises(InputError, match=pattern) as caught:
        load(name, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- All the forms ---


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_every_form_in_every_place(name, form, tmp_path):
    files = contents(name, form)
    folder = write_folder(tmp_path / "a" / (BINARY if form == "binary" else PYTHON)[name], files)
    number = name.removeprefix("cifar")
    archive = write_archive(tmp_path / f"cifar-{number}-{form}.tar.gz", files)
    renamed = write_archive(tmp_path / "renamed", files, prefix="")
    for place in (tmp_path / "a", folder, tmp_path, archive, renamed):
        assert_is(load(name, place, image_size=32), name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a", archive.name, "renamed"])


def test_the_order_of_search(tmp_path):
    found = []
    write_archive(tmp_path / "cifar-10-python.tar.gz", contents("cifar10", "python"))
    found.append(load("cifar10", tmp_path).source)
    write_archive(tmp_path / "cifar-10-binary.tar.gz", contents("cifar10", "binary"))
    found.append(load("cifar10", tmp_path).source)
    write_folder(tmp_path / PYTHON["cifar10"], contents("cifar10", "python"))
    found.append(load("cifar10", tmp_path).source)
    write_folder(tmp_path / BINARY["cifar10"], contents("cifar10", "binary"))
    found.append(load("cifar10", tmp_path).source)
    assert [source.removeprefix(f"{tmp_path}/") for source in found] == [
        "cifar-10-python.tar.gz, Python version",
        "cifar-10-binary.tar.gz, binary version",
        "cifar-10-batches-py, Python version",
        "cifar-10-batches-bin, binary version",
    ]


def test_class_names(tmp_path):
    files = contents("cifar10", "binary")
    folder = write_folder(tmp_path / BINARY["cifar10"], files)
    assert load("cifar10", tmp_path).class_names[::9] == ("airplane", "truck")
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert load("cifar10", tmp_path).class_names == tuple("abcdefghij")
    (folder / "batches.meta.txt").write_text("a\nb\n")
    refused("batches.meta.txt names 2 classes, not 10", "cifar10", tmp_path)


def test_class_names_of_the_python_version(tmp_path):
    folder = write_folder(tmp_path / PYTHON["cifar10"], contents("cifar10", "python"))
    meta = {b"label_names": [bytes([letter]) for letter in b"abcdefghij"], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    assert load("cifar10", tmp_path).class_names == tuple("abcdefghij")
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [1] * 10}))
    refused("batches.meta has no list of class names", "cifar10", tmp_path)


def test_the_built_in_names_of_cifar100(tmp_path):
    write_folder(tmp_path / BINARY["cifar100"], contents("cifar100", "binary"))
    names = load("cifar100", tmp_path).class_names
    assert len(set(names)) == 100 and list(names) == sorted(names)
    assert names[:2] + names[-1:] == ("apple", "aquarium_fish", "worm")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_other_versions(tmp_path, protocol, order):
    files = {}
    for file, (images, labels) in zip(NAMES["cifar100", "python"], image_files("cifar100"), strict=True):
        data = np.array(images.transpose(0, 3, 1, 2).reshape(-1, 3072), order=order)
        content = pickle.dumps({b"data": data, b"fine_labels": labels.tolist()}, protocol=protocol)
        files[file] = content
    write_folder(tmp_path / PYTHON["cifar100"], files)
    if protocol == 5:  # NumPy then writes another function, which the official files do not hold
        refused("_frombuffer", "cifar100", tmp_path)
    else:
        assert_is(load("cifar100", tmp_path), "cifar100")


# --- Missing and broken ---


def test_missing_says_how_to_get_it(tmp_path):
    place = tmp_path / "my data"
    message = refused("cifar10 is not in", "cifar10", place)
    assert f"minivit data fetch cifar10 --data-dir '{place}'" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in message


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("missing", [2, 5])
def test_a_missing_file_is_named(tmp_path, form, missing):
    files = contents("cifar10", form)
    name = NAMES["cifar10", form][missing]
    del files[name]
    write_folder(tmp_path / "a" / (BINARY if form == "binary" else PYTHON)["cifar10"], files)
    write_archive(tmp_path / f"cifar-10-{form}.tar.gz", files)
    for place in (tmp_path / "a", tmp_path):
        assert f"has no {name};" in refused("has no", "cifar10", place)


def test_the_archive_of_another_set(tmp_path):
    archive = write_archive(tmp_path / "x.tar.gz", contents("cifar100", "binary"))
    refused("x.tar.gz has no data_batch_1.bin", "cifar10", archive)


def test_a_size_that_is_no_multiple_of_a_record(tmp_path):
    folder = write_folder(tmp_path / BINARY["cifar100"], contents("cifar100", "binary"))
    with open(folder / "train.bin", "ab") as file:
        file.write(b"x")
    refused(f"train.bin has {7 * 3074 + 1} bytes, no multiple of the 3074", "cifar100", tmp_path)


@pytest.mark.parametrize("form", ["binary", "python"])
def test_a_label_out_of_range(tmp_path, form):
    make = binary_file if form == "binary" else python_file
    files = contents("cifar10", form)
    images, _ = image_files("cifar10")[0]
    file = NAMES["cifar10", form][0]
    files[file] = make(images, [0, 10, 3], "cifar10")
    write_folder(tmp_path / (BINARY if form == "binary" else PYTHON)["cifar10"], files)
    refused(f"{file}: record 1 has label 10, but cifar10 has only 10", "cifar10", tmp_path)


def test_no_records(tmp_path):
    files = contents("cifar100", "binary")
    write_folder(tmp_path / "a" / BINARY["cifar100"], files | {"test.bin": b""})
    refused("the test split is empty", "cifar100", tmp_path / "a")
    write_folder(tmp_path / "b" / BINARY["cifar100"], files | {"train.bin": b""})
    refused("the training split is empty", "cifar100", tmp_path / "b")


def test_another_image_size(tmp_path):
    write_folder(tmp_path / BINARY["cifar100"], contents("cifar100", "binary"))
    plain, larger = load("cifar100", tmp_path), load("cifar100", tmp_path, image_size=40)
    assert larger.test_images.shape == (len(plain.test_images), 40, 40, 3)
    np.testing.assert_array_equal(larger.train_images, resize_images(plain.train_images, 40))
    assert larger.source == plain.source + "; resized from 32x32"


# --- Archives that are not what they seem ---


@pytest.mark.parametrize("keep", [0, 10, 1000, -1000, -4])
def test_a_cut_archive(tmp_path, keep):
    archive = write_archive(tmp_path / "cifar-100-binary.tar.gz", contents("cifar100", "binary"))
    archive.write_bytes(archive.read_bytes()[:keep])
    refused("is not a whole .tar.gz archive", "cifar100", tmp_path)


def test_a_damaged_archive(tmp_path):
    archive = write_archive(tmp_path / "cifar-100-binary.tar.gz", contents("cifar100", "binary"))
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 255
    archive.write_bytes(data)
    refused("is not a whole .tar.gz archive", "cifar100", tmp_path)
    archive.write_text("<html>404</html>")
    refused("is not a whole .tar.gz archive", "cifar100", tmp_path)


@pytest.mark.parametrize("kind", ["link", "symlink", "device", "sparse", "folder"])
def test_only_regular_members_count(tmp_path, kind):
    path = write_archive(tmp_path / "plain.tar.gz", contents("cifar100", "binary"))
    with tarfile.open(path) as source, tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for member in source:
            data = source.extractfile(member).read()
            if member.name.endswith("test.bin"):
                member.type = {
                    "link": tarfile.LNKTYPE,
                    "symlink": tarfile.SYMTYPE,
                    "device": tarfile.CHRTYPE,
                    "sparse": tarfile.REGTYPE,
                    "folder": tarfile.DIRTYPE,
                }[kind]
                member.linkname = "/etc/passwd"
                if kind == "sparse":  # one block on disk that claims to be a whole file
                    member.pax_headers = {"GNU.sparse.size": str(5 * 3074), "GNU.sparse.map": "0,512"}
                    data = data[:512]
                else:
                    data = b""
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    refused("x.tar.gz has no test.bin", "cifar100", tmp_path / "x.tar.gz")


@pytest.mark.parametrize("where", ["wanted", "unwanted", "header"])
def test_a_decompression_bomb_is_refused_early(tmp_path, where, monkeypatch):
    monkeypatch.setattr(layouts, "MAX_BYTES", 100_000)
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("test.bin" if where == "wanted" else "readme.html")
        if where == "header":
            member.pax_headers = {"comment": "x" * 10_000_000}
            archive.addfile(member)
        else:
            member.size = 10_000_000
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    taken = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n: taken.append(n) or read(self, n))
    refused("far too many", "cifar100", tmp_path)
    assert sum(taken) < (50_000 if where == "wanted" else 200_000)  # a wanted member says at once how big it is


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    write_folder(tmp_path / BINARY["cifar100"], contents("cifar100", "binary"))
    monkeypatch.setattr(layouts, "MAX_BYTES", 100)
    refused("far too many", "cifar100", tmp_path)


# --- Pickles that are programs ---


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
    yield "other dtype", good | {b"data": data.astype(np.int8)}
    yield "wider dtype", good | {b"data": np.zeros((2, 384))}
    yield "other shape", good | {b"data": data.reshape(2, 3, 1024)}
    yield "transposed", good | {b"data": data.T}
    yield "too few", good | {b"data": data[:1]}
    yield "no array", good | {b"data": [[0] * 3072] * 2}
    yield "bytes", good | {b"data": data.tobytes()}
    yield "labels of other types", good | {b"fine_labels": [0.0, True]}
    yield "labels below zero", good | {b"fine_labels": [0, -1]}
    yield "labels beyond any integer", good | {b"fine_labels": [0, 10**30]}
    yield "labels in an array", good | {b"fine_labels": np.array([0, 1])}


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


# --- Downloads ---


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            self.send_error(server.status)
            return
        if server.raw is not None:
            self.send(server.raw)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start and start >= len(server.body):
            self.send_error(416)
            return
        body = server.body[start:]
        self.send_response(206 if start else 200)
        if start:
            shown = start + server.range_shift
            self.send_header("Content-Range", f"bytes {shown}-{len(server.body) - 1}/{len(server.body)}")
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send(body[: server.cut_after])

    def send(self, data):
        with contextlib.suppress(ConnectionError):  # a client that has enough hangs up
            self.wfile.write(data)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False  # they end before it does

    def handle_error(self, request, client_address):
        self.errors.append(sys.exception())


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        server.errors = []  # of its threads; they would be printed between the results of other tests
        server.status = server.cut_after = None
        server.asked, server.body, server.raw, server.range_shift = [], b"", None, 0
        server.ranges = server.says_length = True
        server.url = f"http://127.0.0.1:{server.server_port}/cifar-100-binary.tar.gz"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    assert not server.errors


@pytest.fixture
def official(server, tmp_path, monkeypatch):
    """Let the server offer a small archive, and take its checksum for the official one."""
    files = contents("cifar100", "binary") | {"../../evil.bin": b"x", "readme.html": b"x"}
    server.body = write_archive(tmp_path / "official", files, prefix="cifar-100-binary/").read_bytes()
    md5 = hashlib.md5(server.body).hexdigest()
    monkeypatch.setitem(layouts.KINDS, "cifar100", layouts.KINDS["cifar100"]._replace(md5=md5))
    return server


ARCHIVE, PART, FOLDER = "cifar-100-binary.tar.gz", "cifar-100-binary.tar.gz.part", "cifar-100-binary"


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def fails(pattern, data_dir, url):
    with pytest.raises(InputError, match=pattern) as caught:
        fetch("cifar100", data_dir, url=url, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("says_length", [True, False])
def test_fetch(official, tmp_path, says_length, capsys):
    official.says_length = says_length
    data_dir = tmp_path / "new" / "data"
    assert fetch("cifar100", data_dir, url=official.url) == data_dir / FOLDER
    assert_is(load("cifar100", data_dir), "cifar100")
    assert listing(data_dir) == [FOLDER, ARCHIVE]
    assert listing(data_dir / FOLDER) == ["test.bin", "train.bin"]
    assert not (tmp_path / "evil.bin").exists() and official.asked == [None]
    assert "cifar-100-binary.tar.gz" in capsys.readouterr().err  # the bar


def test_fetch_does_only_what_is_left(official, tmp_path):
    folder = fetch("cifar100", tmp_path, url=official.url, progress=False)
    fetch("cifar100", tmp_path, url=official.url, progress=False)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    fetch("cifar100", tmp_path, url=official.url, progress=False)  # from the archive
    assert official.asked == [None]
    assert_is(load("cifar100", tmp_path), "cifar100")


def test_fetch_resumes(official, tmp_path):
    data_dir = tmp_path / "data"
    official.cut_after = 5000
    fails(f"broke off after 5000 of {len(official.body)} bytes", data_dir, official.url)
    assert (data_dir / PART).read_bytes() == official.body[:5000]
    fails("broke off after 10000 of", data_dir, official.url)
    official.cut_after = None
    fetch("cifar100", data_dir, url=official.url, progress=False)
    assert official.asked == [None, "bytes=5000-", "bytes=10000-"]
    assert listing(data_dir) == [FOLDER, ARCHIVE]
    assert_is(load("cifar100", data_dir), "cifar100")


def test_fetch_from_a_server_that_sends_no_parts(official, tmp_path):
    data_dir = tmp_path / "data"
    official.ranges = False
    official.cut_after = 5000
    fails("broke off", data_dir, official.url)
    official.cut_after = None
    fetch("cifar100", data_dir, url=official.url, progress=False)
    assert official.asked == [None, "bytes=5000-"]
    assert_is(load("cifar100", data_dir), "cifar100")


def test_fetch_with_the_whole_download_left_behind(official, tmp_path):
    (tmp_path / PART).write_bytes(official.body)
    fetch("cifar100", tmp_path, url=official.url, progress=False)
    assert_is(load("cifar100", tmp_path), "cifar100")


def test_fetch_refuses_another_part_than_it_asked_for(official, tmp_path):
    (tmp_path / PART).write_bytes(official.body[:5000])
    official.range_shift = 1
    fails("answered with the wrong part", tmp_path, official.url)
    assert (tmp_path / PART).read_bytes() == official.body[:5000]


def test_fetch_removes_a_download_of_the_wrong_checksum(official, tmp_path):
    data_dir = tmp_path / "data"
    official.body = official.body[:-1] + b"x"
    fails("has the MD5 .* not the official .* fetch again", data_dir, official.url)
    assert listing(data_dir) == []


def test_fetch_stops_an_endless_download(official, tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "MAX_BYTES", 1000)
    official.body += bytes(2**22)
    official.says_length = False
    sizes = []
    verify = download._verify
    monkeypatch.setattr(download, "_verify", lambda path, *_: sizes.append(path.stat().st_size) or verify(path, *_))
    fails("MD5", tmp_path / "data", official.url)
    assert sizes[0] < 2**20


def test_fetch_leaves_foreign_files_alone(official, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(b"mine")
    fails("MD5 .* move it away", tmp_path, official.url)
    assert (tmp_path / ARCHIVE).read_bytes() == b"mine"
    (tmp_path / FOLDER).mkdir()
    fails("is there but has no train.bin; move it away", tmp_path, official.url)
    assert official.asked == []


@pytest.mark.parametrize("status", [404, 500, 503])
def test_fetch_tells_of_a_refusal(server, tmp_path, status):
    server.status = status
    fails(f"could not download .*{status}.* put it in {tmp_path}", tmp_path, server.url)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "answer",
    [b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nff\r\ncut", b""],
    ids=["no status", "cut chunk", "nothing"],
)
def test_fetch_tells_of_a_muddled_answer(server, tmp_path, answer):
    server.raw = answer
    fails("could not download", tmp_path, server.url)


def test_fetch_survives_a_reset_connection(official, tmp_path):
    data_dir = tmp_path / "data"
    end = official.shutdown_request

    def reset(request):
        request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        official.close_request(request)

    official.cut_after, official.shutdown_request = 5000, reset
    fails("could not download .*(reset|broke off).* fetch again to go on", data_dir, official.url)
    official.cut_after, official.shutdown_request = None, end
    fetch("cifar100", data_dir, url=official.url, progress=False)
    assert_is(load("cifar100", data_dir), "cifar100")


def test_fetch_without_a_connection(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        port = unused.getsockname()[1]
        fails(f"could not download .*refused.* put it in {tmp_path}", tmp_path, f"http://127.0.0.1:{port}/x")


def test_fetch_knows_only_cifar(tmp_path):
    with pytest.raises(InputError, match="nothing to fetch for 'digits'; choose one of cifar10, cifar100"):
        fetch("digits", tmp_path)
