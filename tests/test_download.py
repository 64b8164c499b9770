"""download.py against a local server that behaves as badly as real ones do; nothing here leaves the machine."""

import hashlib
import http.server
import io
import os
import random
import select
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
from torchvision.datasets import CIFAR10

import download

NAME, FOLDER = download.ARCHIVE_NAME, download.FOLDER_NAME
MEMBERS = {f"{FOLDER}/data_batch_{i}": random.Random(i).randbytes(60_000) for i in range(1, 5)}
with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as tar:
    for name, content in MEMBERS.items():
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
ARCHIVE = buffer.getvalue()
HALF = len(ARCHIVE) // 2
REST = f"bytes={HALF}-"
CORRUPT = ARCHIVE[:100] + bytes([ARCHIVE[100] ^ 1]) + ARCHIVE[101:]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # with ARCHIVE at every path; the path's name is how it misbehaves
        name, asked = self.path[1:], self.headers.get("Range")
        self.server.requests.append((name, asked))
        if name == "404":
            return self.send_error(404)
        body = {"page": b"<html>sign in", "long": ARCHIVE + b"more"}.get(name, ARCHIVE)
        ranged = asked and name not in ("no-range", "page", "long")
        start = int(asked.strip("bytes=-")) if ranged else 0
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", len(body) - start)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[start:HALF] if name in ("truncate", "stall") else body[start:])
        if name == "stall" and not select.select([self.rfile], [], [], 9)[0]:  # the client has not hung up
            self.wfile.write(body[HALF:])


@pytest.fixture(autouse=True)
def serve(monkeypatch):
    """A function that takes the names of the sources; it returns a list to which each request adds (name, Range)."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "STALL_SECONDS", 1)
    monkeypatch.setattr(download, "ARCHIVE_SIZE", len(ARCHIVE))
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(ARCHIVE).hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, url = [], f"http://127.0.0.1:{server.server_port}/"

        def sources(*names):
            monkeypatch.setattr(download, "SOURCES", [name if ":" in name else url + name for name in names])
            return server.requests

        sources()
        threading.Thread(target=server.serve_forever, args=[0.02]).start()
        yield sources
        server.shutdown()


def check_fetched(root):
    download.fetch_batches(root)
    assert {f"{FOLDER}/{file.name}": file.read_bytes() for file in (root / FOLDER).iterdir()} == MEMBERS
    assert {file.name for file in root.iterdir()} - {f"{NAME}.lock"} == {NAME, FOLDER}


def test_the_archive_is_the_published_one(monkeypatch):
    monkeypatch.undo()  # of the small archive
    assert download.ARCHIVE_SIZE == 170_498_071
    assert download.ARCHIVE_SHA256 == "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    assert (download.SOURCES[0], NAME, FOLDER) == (CIFAR10.url, CIFAR10.filename, CIFAR10.base_folder)


CALLS = {  # what an earlier call left, the sources, and the range that is asked of each
    "no-range": (ARCHIVE[:HALF], ["no-range"], [REST]),
    "page": (ARCHIVE[:HALF], ["page", "long", "good"], [REST, REST, REST]),  # must not replace what is there
    "corrupt": (CORRUPT[:HALF], ["good"], [REST, None]),
    "whole": (ARCHIVE, ["good"], []),
    "stall": (b"", ["stall", "good"], [None, REST]),
}


@pytest.mark.parametrize("arrived, names, ranges", CALLS.values(), ids=CALLS)
def test_it_goes_on_with_what_has_arrived_and_with_the_next_source(arrived, names, ranges, tmp_path, serve):
    (tmp_path / f"{NAME}.part").write_bytes(arrived)
    requests = serve(*names)
    check_fetched(tmp_path)
    assert [asked for _, asked in requests] == ranges


def test_a_slow_source_is_left_for_a_better_one_and_used_in_the_end(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(download, "SLOW_SECONDS", -1)
    monkeypatch.setattr(download, "MIN_BYTES_PER_SECOND", 1e15)
    requests = serve("slow", "404")
    check_fetched(tmp_path)
    assert [name for name, _ in requests][:2] == ["slow", "404"]


def test_when_all_sources_fail_the_message_says_why_and_what_else_to_do(tmp_path, serve):
    reasons = {"404": "404", "long": "offers", "truncate": "closed", "gopher://old": "unknown"}
    serve(*reasons)
    with pytest.raises(OSError) as raised:
        download.fetch_batches(tmp_path)
    for source, reason in zip(download.SOURCES, reasons.values()):
        assert reason in str(raised.value).split(f"{source}: ")[1].split("\n")[0]
    assert all(way in str(raised.value) for way in (NAME, "CIFAR10_ROOT", "DATASET=digits"))
    assert (tmp_path / f"{NAME}.part").read_bytes() == ARCHIVE[:HALF]  # for the next call


def test_another_archive_or_an_interruption_leaves_no_folder(tmp_path, monkeypatch):
    (tmp_path / NAME).write_bytes(ARCHIVE + b"\0")  # which can be unpacked
    with pytest.raises(OSError, match="official"):
        download.fetch_batches(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    (tmp_path / NAME).write_bytes(ARCHIVE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))  # at the last moment
        download.fetch_batches(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    check_fetched(tmp_path)


def test_two_processes_download_once(tmp_path, serve):
    requests = serve("good")
    with ThreadPoolExecutor() as pool:  # threads stand for them: the lock is the same
        list(pool.map(download.fetch_batches, [tmp_path] * 2))
    assert requests == [("good", None)]
