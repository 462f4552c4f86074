"""Downloads of CIFAR, from a server of our own."""

import hashlib
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cifar_samples import assert_is, contents, write_archive

from minivit.base.errors import InputError
from minivit.data import fetch, load
from minivit.data.cifar import download, layouts


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            self.send_error(server.status)
            return
        if server.raw is not None:
            self.wfile.write(server.raw)
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
        self.wfile.write(body[: server.cut_after])

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may break off, and here some do
            super().handle_error(request, client_address)


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        server.status = server.cut_after = None
        server.asked, server.body, server.raw, server.range_shift = [], b"", None, 0
        server.ranges = server.says_length = True
        server.url = f"http://127.0.0.1:{server.server_port}/cifar-100-binary.tar.gz"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


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
