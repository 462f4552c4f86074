"""Hostile files: what becomes of valid ones when bytes, texts, JSON, archives and arrays in them are changed.

Every function takes a `random.Random`: the same seed makes the same files on every machine.
"""

import functools
import io
import json
import re
import struct
import tarfile
import zipfile

DEEP = 3000  # levels, beyond what Python's parsers follow
NUMBERS = ("-1", "0", "1", "3", "65536", "2147483648", "9223372036854775808", "1" + "0" * 30, "1" * 5000, "1e999",
           "-0.5", "NaN", "-Infinity", "nan", "inf", "0x10", "true", "null", '"1"', "[1]")  # fmt: skip
TOKENS = (b"NaN", b"-Infinity", b"null", b"[]", b"{}", b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"\xed\xa0\x80",
          b"\0", b"\n", b"\r", b'"', b"'", b"=", b",", b"../../x", b"[" * DEEP, b'{"a":' * DEEP, b"1" * 5000,
          b"[[row]]\n", b"\xef\xbb\xbf", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04", b"\x1f\x8b\x08")  # fmt: skip
DEEP_MARK = "<deep>"
NAMES = (
    "",
    ".",
    "..",
    "../out",
    "/out",
    "a\\b",
    "a\nb",
    "\ud800",
    "x" * 300,
    "meta",
    "params/",
    "NUL",
    "caf\u00e9",
    "cafe\u0301",
)
VALUES = (None, True, False, -1, 0, 1, 2, 2**31, 2**63, 10**30, 0.5, 1e308, 1e-320, float("nan"), float("inf"), *NAMES,
          [], {}, [[]], [1] * 100, {"a": 1}, "\0", "nowhere/at/all", DEEP_MARK)  # fmt: skip


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _span(data, random, most=64):
    """A random part of some bytes, (start, end)."""
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.randint(1, most))


def flip(data, random):
    """Some bits are others."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8)) if data else 0):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def truncate(data, random):
    """The end is missing."""
    return data[: random.randrange(len(data) + 1)]


def insert(data, random):
    """Something foreign stands between."""
    start, _ = _span(data, random)
    return data[:start] + random.choice((random.randbytes(random.randint(1, 40)), bytes(20), *TOKENS)) + data[start:]


def remove(data, random):
    """A part is missing."""
    start, end = _span(data, random, max(1, len(data) // 2))
    return data[:start] + data[end:]


def duplicate(data, random):
    """A part stands there twice."""
    start, end = _span(data, random, max(1, len(data) // 2))
    return data[:end] + data[start:]


def swap(data, random):
    """Two parts have changed places."""
    a, b, c = sorted(random.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def field(data, random):
    """A number of 1, 2, 4 or 8 bytes is 0, the largest, or another: lengths and offsets among them."""
    width = random.choice((1, 2, 4, 8))
    value = random.choice((0, 1, 256**width - 1, 256**width // 2 - 1, 256**width // 2, random.randrange(256**width)))
    start = random.randrange(max(1, len(data) - width))
    return data[:start] + value.to_bytes(width, random.choice(("little", "big"))) + data[start + width :]


def number(data, random):
    """A number that is written in digits is another, or none."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?", data))
    if not found:
        return insert(data, random)
    match = random.choice(found)
    return data[: match.start()] + random.choice(NUMBERS).encode() + data[match.end() :]


def token(data, random):
    """A part is something foreign."""
    start, end = _span(data, random)
    return data[:start] + random.choice(TOKENS) + data[end:]


BYTES = (flip, flip, truncate, insert, remove, duplicate, swap, field, field, number, token)


def mutate(data, random):
    """Bytes after one to three of these."""
    for _ in range(random.choice((1, 1, 2, 3))):
        data = random.choice(BYTES)(data, random)
    return data


# ---- settings files and JSON -----------------------------------------------------------------------------------------

LITERALS = (*NUMBERS, "1979-05-27T07:32:00Z", "07:32:00", "{}", "[]", '""', '"x"', '"a\\nb"', '"\\u0000"', "'../x'",
            "[[[]]]", "{a = 1}", "false", '"' + "x" * 5000 + '"', "[" * DEEP + "]" * DEEP, "")  # fmt: skip


def toml(text, random, keys=()):
    """A settings file in which values are others, or lines are missing, twice or foreign; ``keys`` may be added."""
    lines = text.splitlines()
    for _ in range(random.choice((1, 1, 2, 3))):
        i = random.randrange(len(lines))
        kind = random.randrange(6)
        if kind < 3 and "=" in lines[i]:
            lines[i] = lines[i].partition("=")[0] + "= " + random.choice(LITERALS)
        elif kind == 3 and keys:
            lines.insert(i + 1, f"{random.choice(keys)} = {random.choice(LITERALS)}")
        elif kind == 4:
            lines.insert(i, random.choice((*lines, "[train]", "[x]", "[[data]]", "[model.width]", "x.y = 1")))
        elif len(lines) > 1:
            del lines[i]
    data = "\n".join(lines).encode(errors="surrogatepass")
    return mutate(data, random) if random.random() < 0.25 else data


def _nodes(tree, path=()):
    """The places in a JSON tree."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _nodes(value, (*path, key))


def json_tree(tree, random):
    """A tree in which one place has another value, is missing, or has something beside it."""
    tree = json.loads(json.dumps(tree))  # a copy
    places = [path for path in _nodes(tree) if path]
    if not places or random.random() < 0.03:
        return random.choice(VALUES)
    *above, last = random.choice(places)
    parent = tree
    for key in above:
        parent = parent[key]
    kind = random.random()
    if kind < 0.65:
        parent[last] = random.choice(VALUES)
    elif kind < 0.8:
        del parent[last]
    elif isinstance(parent, dict):
        parent[random.choice(NAMES)] = parent.pop(last) if kind < 0.9 else random.choice(VALUES)
    else:
        parent.insert(last, random.choice(VALUES))
    return tree


def json_text(tree):
    """A tree as JSON text; `DEEP_MARK` becomes lists in lists, deeper than a parser follows."""
    return json.dumps(tree).replace(json.dumps(DEEP_MARK), "[" * DEEP + "]" * DEEP)


def json_file(data, random):
    """The bytes of a JSON file that is changed as a tree, or byte by byte."""
    if random.random() < 0.7:
        return json_text(json_tree(json.loads(data), random)).encode(errors="surrogatepass")
    return mutate(data, random)


def json_lines(data, random):
    """The bytes of a file with a JSON object on each line: lines are changed, doubled, missing, in another order."""
    whole = data.splitlines()
    lines = random.sample(whole, random.randrange(len(whole)))
    for _ in range(random.choice((1, 2, 5))):
        lines.insert(random.randrange(len(lines) + 1), json_file(random.choice(whole), random))
    data = b"\n".join(lines)
    return mutate(data, random) if random.random() < 0.2 else data


# ---- arrays and archives ---------------------------------------------------------------------------------------------

DTYPES = ("<f4", ">f4", "<f8", "<f2", "|O", "<U4", "<U99999999", "|S1", "|V0", "|V2", "<c8", "<M8[s]", "<i8", "|b1", "",
          "[('a', '<f4')]", "x" * 50)  # fmt: skip
SHAPES = ("()", "(0,)", "(-1,)", "(-2, -3)", "(1.5,)", "(True,)", "(9223372036854775807, 3)",
          "(4294967296, 4294967296)", "(1000000000,)", "None", "(" * 300, "(" + "-" * 5000 + "1,)", "[3]",
          "('a',)", "(" + "1," * 60 + ")")  # fmt: skip


def npy_header(data, random):
    """The bytes of an ``.npy`` file whose header says something else, at the length that it needs."""
    if not data.startswith(b"\x93NUMPY\x01\x00"):
        return mutate(data, random)
    length = struct.unpack_from("<H", data, 8)[0]
    header, rest = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    kind = random.random()
    if kind < 0.4:
        header = re.sub(r"'shape': \([^)]*\)", lambda _: f"'shape': {random.choice(SHAPES)}", header)
    elif kind < 0.8:
        header = re.sub(r"'descr': '[^']*'", lambda _: f"'descr': {random.choice(DTYPES)!r}", header)
    elif kind < 0.9:
        header = header.replace("False", random.choice(("True", "3", "None", "'x'")))
    else:
        header = mutate(header.encode("latin1"), random).decode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) & 0xFFFF) + header.encode("latin1") + rest


def members_of(data):
    """The members of a zip file, [(name, bytes)]."""
    return list(_members_of(data))


@functools.cache
def _members_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(member.filename, archive.read(member)) for member in archive.infolist()]


def zip_of(members, compression=zipfile.ZIP_STORED):
    """A zip file of members, whose names may be twice the same."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name.encode(errors="replace").decode() or "x")
            info.compress_type = compression
            archive.NameToInfo.pop(info.filename, None)  # zipfile warns of a name that is there twice
            archive.writestr(info, data)
    return file.getvalue()


def npz(data, random):
    """The bytes of an ``.npz`` file: a member is changed, renamed, missing, doubled; or the file's own bytes are."""
    kind, members = random.random(), members_of(data)
    if kind < 0.25:
        return mutate(data, random)
    i = random.randrange(len(members))
    name, content = members[i]
    if kind < 0.55:
        members[i] = name, npy_header(content, random)
    elif kind < 0.7:
        members[i] = name, mutate(content, random)
    elif kind < 0.8:
        members[i] = random.choice((*NAMES, members[0][0])), content
    elif kind < 0.85:
        del members[i]
    elif kind < 0.9:
        members.append((name if random.random() < 0.5 else "extra.npy", content))
    elif kind < 0.95:
        members[i] = name, random.choice(members)[1]
    else:  # a bomb: a large member of zeros, compressed
        members[i] = name, content + bytes(30_000_000)
        return zip_of(members, zipfile.ZIP_DEFLATED)
    return zip_of(members, zipfile.ZIP_DEFLATED if random.random() < 0.1 else zipfile.ZIP_STORED)


def safetensors(data, random):
    """The bytes of a ``.safetensors`` file whose header, or anything, is changed."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if random.random() < 0.4:
        return mutate(data, random)
    header = json_file(header, random)
    header += b" " * (-len(header) % 8)
    length = len(header) if random.random() < 0.9 else random.choice((0, 2**20, 2**40, 2**63))
    return length.to_bytes(8, "little") + header + rest


def tar_gz(files, random, mode="w:gz"):
    """The bytes of a .tar.gz of files {name: bytes}: members are changed, links, far away; or its own bytes are."""
    output, kinds = io.BytesIO(), dict.fromkeys(files, 0)
    kinds[random.choice(list(files))] = random.randrange(1, 9)
    with tarfile.open(fileobj=output, mode=mode) as archive:
        for name, data in files.items():
            member, kind = tarfile.TarInfo(f"x/{name}"), kinds[name]
            if kind == 1:
                data = mutate(data, random)
            elif kind == 2:
                member.name = f"../../{name}"
            elif kind == 3:
                member.type, member.linkname, data = tarfile.SYMTYPE, random.choice(("/etc/passwd", name, "..")), b""
            elif kind == 4:
                member.type, member.linkname, data = tarfile.LNKTYPE, f"x/{name}", b""
            elif kind == 5:
                member.type, data = random.choice((tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)), b""
            elif kind == 6:
                continue
            elif kind == 7:
                member.pax_headers = {"size": random.choice(("-1", "9" * 20, "x", "1e9")), "path": "\0" + name}
            elif kind == 8:
                member.name = "/" + "y/" * 100 + name
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data = output.getvalue()
    return mutate(data, random) if random.random() < 0.4 else data
