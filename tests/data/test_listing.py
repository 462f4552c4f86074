"""Lists of the classes of images: one reading for the whole file, or one line that says why there is none."""

import numpy as np
import pytest

from minivit.base.errors import InputError
from minivit.data.listing import labels_of_list

ANIMALS = ("big dog", "cat")


def read(tmp_path, text, names, classes):
    path = tmp_path / "val.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    labels = labels_of_list(path, sorted(f"val/{name}" for name in names), classes)
    assert labels.dtype == np.int64 and labels.shape == (len(names),)
    return labels.tolist()


READ = {
    "blanks": ("a.png cat\nb.png big dog\n", [1, 0]),
    "several blanks": ("a.png    cat\nb.png \t big dog\n\n", [1, 0]),
    "comma": ("a.png,cat\nb.png,big dog\n", [1, 0]),
    "comma and blank": ("a.png, cat\nb.png, big dog\n", [1, 0]),
    "semicolon": ("a.png;cat\nb.png;big dog\n", [1, 0]),
    "tab": ("a.png\tcat\nb.png\tbig dog\n", [1, 0]),
    "quotes": ('"a.png","cat"\n"b.png","big dog"\n', [1, 0]),
    "quotes and blanks": ('"a.png" "cat"\n"b.png" "big dog"\n', [1, 0]),
    "heading": ("filename,label\na.png,cat\nb.png,big dog\n", [1, 0]),
    "heading, other order, more columns": ("id,width,species,file\n7,32,cat,a.png\n8,33,big dog,b.png\n", [1, 0]),
    "numbers and names beside each other": ("file,number,name\na.png,0,cat\nb.png,1,big dog\n", [1, 0]),
    "numbers": ("b.png 0\na.png 1\n", [1, 0]),
    "paths": ("val/a.png cat\nsome\\where\\b.png big dog\n", [1, 0]),
    "Windows": (b"\xef\xbb\xbfa.png,cat\r\nb.png,big dog\r\n", [1, 0]),
    "another ending": ("a.JPEG cat\nb.JPEG big dog\n", [1, 0]),
    "twice the same": ("a.png cat\na.png cat\nb.png big dog\n", [1, 0]),
    "classes alone": ("cat\nbig dog\n", [1, 0]),
}


@pytest.mark.parametrize(("text", "labels"), READ.values(), ids=READ)
def test_one_reading(tmp_path, text, labels):
    assert read(tmp_path, text, ["a.png", "b.png"], ANIMALS) == labels


def test_names_with_spaces_commas_and_dots(tmp_path):
    assert read(tmp_path, "IMG 1.png,cat\n", ["IMG 1.png"], ANIMALS) == [1]
    assert read(tmp_path, "IMG 1.png cat\n", ["IMG 1.png"], ANIMALS) == [1]
    assert read(tmp_path, '"a,b.png";cat\n', ["a,b.png"], ANIMALS) == [1]
    assert read(tmp_path, "img.v1 cat\n", ["img.v1.png"], ANIMALS) == [1]
    assert read(tmp_path, "Ka\u0308se.png cat\n", ["K\u00e4se.png"], ANIMALS) == [1]
    assert read(tmp_path, "a.png Ka\u0308se\n", ["a.png"], ("K\u00e4se", "cat")) == [0]


def test_full_names_before_those_without_an_ending(tmp_path):
    names = ["001.jpg", "001.png"]
    assert read(tmp_path, "001.png cat\n001.jpg big dog\n", names, ANIMALS) == [0, 1]
    assert read(tmp_path, "001.JPEG cat\n002.png big dog\n", ["001.png", "002.png"], ANIMALS) == [1, 0]
    with pytest.raises(InputError, match="001 may be 001.jpg or 001.png; list full names"):
        read(tmp_path, "001 cat\n", names, ANIMALS)
    with pytest.raises(InputError, match="does not list 001.jpg; add its class"):
        read(tmp_path, "001.png cat\n001.gif cat\n".replace("001.gif", "2.gif"), names, ANIMALS)


def test_folders_that_are_called_by_numbers(tmp_path, capsys):
    """Labels from 0 and folders 1, 2, 3 are numbers, which is told; 1, 2, 3 are the folders; 1, 2 may be both."""
    names, folders = ["a.png", "b.png", "c.png"], ("1", "2", "3")
    assert read(tmp_path, "a.png 0\nb.png 1\nc.png 2\n", names, folders) == [0, 1, 2]
    assert capsys.readouterr().err.endswith("are read as numbers from 0: 0 is 1\n")
    assert read(tmp_path, "a.png 1\nb.png 2\nc.png 3\n", names, folders) == [0, 1, 2]
    assert read(tmp_path, "a.png 01\nb.png 02\nc.png 03\n", names, folders) == [0, 1, 2]
    assert read(tmp_path, "a.png 0\nb.png 1\nc.png 2\n", names, ("00", "01", "02")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    for text in ("a.png 1\nb.png 2\nc.png 1\n", "a.png 01\nb.png 02\nc.png 01\n"):
        with pytest.raises(
            InputError, match="class 0?1 may be the folder of that name or, counted from 0, the folder 2"
        ):
            read(tmp_path, text, names, folders)


REFUSED = {
    "two classes": ("a.png cat\na.png big dog\nb.png cat\n", "gives a.png two classes, cat and big dog; leave one"),
    "names and numbers": ("a.png cat\nb.png 0\n", "mixes names and numbers of classes"),
    "counted from 1": ("a.png 1\nb.png 2\n", "the class of b.png is '2', .* its numbers must count from 0"),
    "unknown": ("a.png cat\nb.png cow\n", "the class of b.png is 'cow', which is no folder of train nor its number"),
    "not listed": ("a.png cat\n", "does not list b.png; add its class"),
    "another case": ("a.png cat\nB.png cat\n", r"does not list b.png \(but B.png\)"),
    "no image of these": ("x.png cat\ny.png big dog\n", "names none of the images, of which one is a.png"),
    "nothing": ("\n", "is empty"),
    "other text": (b"\xff\xfea\x00", "is not a text file in UTF-8"),
    "no class": ("a.png cat\nb.png\n", "the class of b.png is ''"),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED)
def test_no_reading_or_two(tmp_path, text, said):
    with pytest.raises(InputError, match=said) as error:
        read(tmp_path, text, ["a.png", "b.png"], ANIMALS)
    assert "\n" not in str(error.value)


def test_what_is_listed_and_not_there_is_told(tmp_path, capsys):
    assert read(tmp_path, "c.png cat\na.png cat\nb.png big dog\n", ["a.png", "b.png"], ANIMALS) == [1, 0]
    said = capsys.readouterr().err
    assert "lists 1 image that" in said and said.endswith("does not have: c.png\n") and said.count("\n") == 1
