"""The official archives from the internet: downloaded as far as needed, verified, unpacked."""

import hashlib
import os
import tempfile
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from minivit.base.errors import InputError
from minivit.data.cifar import layouts
from minivit.data.cifar.files import read_archive


def fetch(name, data_dir="data", *, url=None, progress=True):
    """Download, verify and unpack the official binary archive of a data set, as far as not done before.

    A download that breaks off leaves a ``.part`` file, from which the next call goes on.

    ``data_dir`` is made if it is not there; nothing that was there before is overwritten. ``url`` is another place to
    download the same archive from; the checksum stays the official one.

    Returns  Path of the folder with the data
    Raises   InputError: there is no such data set or no way to it, or what came is not the official archive.
    """
    if name not in layouts.KINDS:
        raise InputError(f"there is nothing to fetch for {name!r}; choose one of {', '.join(layouts.KINDS)}")
    layout, md5 = layouts.KINDS[name].layouts[0], layouts.KINDS[name].md5
    data_dir = Path(data_dir)
    folder, archive = data_dir / layout.folder, data_dir / layout.archive
    if folder.exists():
        for file in layout.image_files:
            if not (folder / file).is_file():
                raise InputError(f"{folder} is there but has no {file}; move it away and fetch again")
        return folder
    data_dir.mkdir(parents=True, exist_ok=True)
    if archive.exists():
        _verify(archive, md5, "move it away and fetch again")
    else:
        part = archive.with_name(archive.name + ".part")
        _download(url or layouts.URL + layout.archive, part, data_dir, progress)
        try:
            _verify(part, md5, "it was removed; fetch again")
        except InputError:
            part.unlink()
            raise
        os.replace(part, archive)
    # The folder appears under its name only when it is complete.
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=data_dir) as temporary:
        whole = Path(temporary) / layout.folder
        whole.mkdir()
        for file, data in read_archive(archive, set(layout.files)).items():
            (whole / file).write_bytes(data)
        whole.rename(folder)
    return folder


def _verify(path, md5, advice):
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if checksum != md5:
        raise InputError(f"{path} has the MD5 {checksum}, not the official {md5}; {advice}")


def _download(url, part, data_dir, progress):
    """Bring the file ``part`` to its full length."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=60) as response:
            have, total = _copy(response, part, have, url, progress)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # nothing left to send: the checksum will tell whether it is all there
            return
        reason = error
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
    else:
        if total is None or have >= total:
            return
        reason = f"the connection broke off after {have} of {total} bytes"
    raise InputError(
        f"could not download {url} ({reason}); fetch again to go on, or get it by other means and put it in {data_dir}"
    )


def _copy(response, part, have, url, progress):
    """Write an answer to the file ``part``, of which ``have`` bytes are there: (bytes there now, bytes in all or None).

    Raises  InputError: it is another part of the archive than that asked for.
    """
    # A server may also send the whole file again (200), or a range of its own choice.
    continues = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    have = have if response.status == 206 and continues else 0
    if response.status == 206 and not continues:
        raise InputError(f"{url} answered with the wrong part; remove {part} and fetch again")
    left = response.headers.get("Content-Length")
    total = None if left is None else have + int(left)
    bar = tqdm(
        desc=url.rpartition("/")[2], initial=have, total=total, unit="B", unit_scale=True, disable=not progress
    )  # fmt: skip
    with open(part, "ab" if have else "wb") as file, bar:
        while have <= layouts.MAX_BYTES and (chunk := response.read(2**18)):
            file.write(chunk)
            bar.update(len(chunk))
            have += len(chunk)
    return have, total
