"""CIFAR in all its forms, whole and broken, and archives that are not what they seem."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from cifar_samples import (
    BINARY,
    NAMES,
    PYTHON,
    assert_is,
    binary_file,
    contents,
    image_files,
    python_file,
    refused,
    write_archive,
    write_folder,
)

from minivit.data import load, resize_images
from minivit.data.cifar import layouts

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
    assert_is(load("cifar100", tmp_path), "cifar100")


def rewritten(make, protocol=4):
    """CIFAR-100's Python files with the contents that ``make(pixels (n, 3072), labels (n,))`` gives."""
    files = zip(NAMES["cifar100", "python"], image_files("cifar100"), strict=True)
    return {
        file: pickle.dumps(make(images.transpose(0, 3, 1, 2).reshape(-1, 3072), labels), protocol=protocol)
        for file, (images, labels) in files
    }


FORMS = {
    "text keys": lambda data, labels: {"data": data, "fine_labels": labels.tolist()},
    "labels in an array": lambda data, labels: {"data": data, "fine_labels": labels},
    "labels in a column": lambda data, labels: {b"data": data, b"fine_labels": labels.astype(np.uint8)[:, None]},
    "labels of another byte order": lambda data, labels: {b"data": data, b"fine_labels": labels.astype(">i4")},
    "NumPy's numbers": lambda data, labels: {b"data": data, b"fine_labels": list(labels)},
    "lists": lambda data, labels: {"data": data.tolist(), "fine_labels": tuple(labels.tolist())},
    "a list of arrays": lambda data, labels: {"data": list(data), "fine_labels": labels},
    "wider pixels": lambda data, labels: {b"data": data.astype(np.int64), b"fine_labels": labels},
    "planes": lambda data, labels: {b"data": data.reshape(-1, 3, 32, 32), b"fine_labels": labels},
    "colours last": lambda data, labels: {
        b"data": np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), b"fine_labels": labels
    },
    "an ordered dictionary": lambda data, labels: OrderedDict(data=data, fine_labels=labels),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_what_is_right_is_read_in_any_form(tmp_path, make, protocol):
    write_folder(tmp_path / PYTHON["cifar100"], rewritten(make, protocol))
    assert_is(load("cifar100", tmp_path), "cifar100")


def test_class_names_are_text_or_bytes(tmp_path):
    folder = write_folder(tmp_path / PYTHON["cifar10"], contents("cifar10", "python"))
    for names in (list("abcdefghij"), tuple("abcdefghij"), [letter.encode() for letter in "abcdefghij"]):
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
        assert load("cifar10", tmp_path).class_names == tuple("abcdefghij")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("prefix", ["", "inner/"])
def test_every_archive(tmp_path, mode, form, prefix):
    files = contents("cifar100", form)
    ending = {"w": "tar", "w:gz": "tgz", "w:bz2": "tar.bz2", "w:xz": "tar.xz", "zip": "zip"}[mode]
    path = tmp_path / f"cifar-100-{form}.{ending}"
    if mode == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, data in files.items():
                archive.writestr(prefix + file, data)
                archive.writestr(f"__MACOSX/{prefix}._{file}", b"x")
    else:
        write_archive(path, files, prefix, mode)
    assert_is(load("cifar100", tmp_path), "cifar100")
    other = path.rename(tmp_path / "under another name")
    assert_is(load("cifar100", other), "cifar100")
    other.write_bytes(other.read_bytes()[: other.stat().st_size // 2])
    refused("is not a whole archive", "cifar100", other)


def test_a_zip_that_unpacks_to_far_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "MAX_BYTES", 100_000)
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("test.bin", bytes(10_000_000))
    refused("test.bin claims .* far too many", "cifar100", tmp_path / "x")


def test_two_files_of_one_name(tmp_path):
    files = contents("cifar100", "binary")
    path = write_archive(tmp_path / "x.tar", {f"{k}/{file}": files[file] for k in "ab" for file in files}, mode="w")
    assert_is(load("cifar100", path), "cifar100")  # twice the same
    write_archive(path, {f"{k}/{file}": files[file][: 3074 * k] for k in (1, 2) for file in files}, mode="w")
    refused("holds two files train.bin that differ", "cifar100", path)


def test_a_folder_in_a_folder_of_its_name(tmp_path):
    write_folder(tmp_path / BINARY["cifar10"] / BINARY["cifar10"], contents("cifar10", "binary"))
    assert_is(load("cifar10", tmp_path), "cifar10")


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
    refused("is not a whole archive", "cifar100", tmp_path)


def test_a_damaged_archive(tmp_path):
    archive = write_archive(tmp_path / "cifar-100-binary.tar.gz", contents("cifar100", "binary"))
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 255
    archive.write_bytes(data)
    refused("is not a whole archive", "cifar100", tmp_path)
    archive.write_text("<html>404</html>")
    refused("is not a whole archive", "cifar100", tmp_path)


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
