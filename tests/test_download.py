"""download.py against a local server that behaves as badly as real ones do; nothing here leaves the machine."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import random
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torchvision.datasets import CIFAR10

import download

MEMBERS = {f"{download.FOLDER_NAME}/data_batch_{i}": random.Random(i).randbytes(60_000) for i in range(1, 5)}


def make_archive(members):
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue())


ARCHIVE = make_archive(MEMBERS)
HALF = len(ARCHIVE) // 2
REST = f"bytes={HALF}-"
CORRUPT = ARCHIVE[:100] + bytes([ARCHIVE[100] ^ 1]) + ARCHIVE[101:]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with ARCHIVE at every path; the path's name is how it misbehaves."""

    def do_GET(self):
        name, asked = self.path.strip("/"), self.headers.get("Range")
        self.server.requests.append((name, asked))
        if name == "404":
            return self.send_error(404)
        body = {"corrupt": CORRUPT, "page": b"<html>sign in", "long": ARCHIVE + b"more"}.get(name, ARCHIVE)
        ranged = asked and name not in ("no-range", "page", "long")
        start = int(asked.strip("bytes=-")) if ranged else 0
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", len(body) - start)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[start:HALF] if name in ("truncate", "stall") else body[start:])
        if name == "stall":
            self.server.gate.wait(30)


@pytest.fixture
def server(monkeypatch):
    """`requests` holds pairs of name and Range; the gate is opened by a test, or at its end."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.gate = [], threading.Event()

        def use(*names):
            url = f"http://127.0.0.1:{server.server_port}/"
            monkeypatch.setattr(download, "SOURCES", [name if ":" in name else url + name for name in names])

        server.use = use
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def small_archive(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "ARCHIVE_SIZE", len(ARCHIVE))
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(ARCHIVE).hexdigest())


@pytest.fixture
def part(tmp_path):
    return tmp_path / f"{download.ARCHIVE_NAME}.part"


def check_fetched(root):
    """The folder is there, and nothing but it, the archive and the lock."""
    download.fetch_batches(root)
    folder = root / download.FOLDER_NAME
    assert {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()} == MEMBERS
    names = {file.name for file in root.iterdir()} - {f"{download.ARCHIVE_NAME}.lock"}
    assert names == {download.ARCHIVE_NAME, folder.name}


def test_constants_are_the_published_ones(monkeypatch):
    monkeypatch.undo()  # of small_archive
    assert download.ARCHIVE_SIZE == 170_498_071
    assert download.ARCHIVE_SHA256 == "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    ours = download.SOURCES[0], download.ARCHIVE_NAME, download.FOLDER_NAME
    assert ours == (CIFAR10.url, CIFAR10.filename, CIFAR10.base_folder)


CALLS = {  # what an earlier call left, the sources, and the range that is asked of each
    "good": (ARCHIVE[:HALF], ["good"], [REST]),
    "no-range": (ARCHIVE[:HALF], ["no-range"], [REST]),
    "page": (ARCHIVE[:HALF], ["page", "long", "good"], [REST, REST, REST]),  # must not replace what is there
    "corrupt half": (CORRUPT[:HALF], ["good"], [REST, None]),
    "corrupt whole": (CORRUPT, ["good"], [None]),
    "whole": (ARCHIVE, ["good"], []),
    "404": (b"", ["404", "good"], [None, None]),
    "corrupt": (b"", ["corrupt", "good"], [None, None]),
    "truncate": (b"", ["truncate", "good"], [None, REST]),
}


@pytest.mark.parametrize("case", CALLS)
def test_going_on_with_what_has_arrived_and_with_the_next_source(part, server, case):
    arrived, names, requests = CALLS[case]
    part.write_bytes(arrived)
    server.use(*names)
    check_fetched(part.parent)
    assert [asked for _, asked in server.requests] == requests


def test_silent_source_is_named_and_given_up(part, server, monkeypatch, capsys):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.1)
    server.use("stall", "good")
    check_fetched(part.parent)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("fetching ") and "timed out" in printed[1] and server.requests[1] == ("good", REST)


def test_slow_source_is_left_for_a_better_one_and_used_in_the_end(part, server, monkeypatch, capsys):
    monkeypatch.setattr(download, "SLOW_SECONDS", -1)
    monkeypatch.setattr(download, "MIN_BYTES_PER_SECOND", 1e15)
    server.use("slow", "404")
    check_fetched(part.parent)
    assert "sends only " in capsys.readouterr().out
    assert [name for name, _ in server.requests] == ["slow", "404", "slow"][: len(server.requests)]


def test_message_when_all_fail_lists_sources_reasons_and_ways_forward(part, server):
    reasons = {"404": "HTTP Error 404", "long": "offers", "truncate": "closed"}
    reasons |= {"http://127.0.0.1:1/": "refused", "gopher://old": "unknown url type"}
    server.use(*reasons)
    with pytest.raises(download.DownloadError) as raised:
        download.fetch_batches(part.parent)
    message = str(raised.value)
    for source, reason in zip(download.SOURCES, reasons.values()):
        assert reason in message.split(f"{source}: ")[1].split("\n")[0]
    ways = download.ARCHIVE_NAME, "CIFAR10_ROOT", "train/<class>/*.png", "DATASET=digits"
    assert [way for way in ways if way not in message] == []
    assert part.read_bytes() == ARCHIVE[:HALF]  # for the next call


def test_full_disk_is_no_reason_to_try_the_next_source(part, server, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(part), "open", full)
    server.use("good", "good?")
    with pytest.raises(download.DownloadError, match=r"writable folder with .* GB free: .*No space left"):
        download.fetch_batches(part.parent)
    assert len(server.requests) == 1


def test_interrupted_unpacking_leaves_no_folder_and_is_redone(part, monkeypatch):
    part.with_suffix("").write_bytes(ARCHIVE)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)  # at the last moment
        download.fetch_batches(part.parent)
    assert not part.with_name(download.FOLDER_NAME).exists()
    part.with_name(f"{download.TEMPORARY_PREFIX}of-a-killed-process").mkdir()
    check_fetched(part.parent)
    (part.with_name(download.FOLDER_NAME) / "mine").touch()
    download.fetch_batches(part.parent)  # leaves a folder that is there alone
    assert (part.with_name(download.FOLDER_NAME) / "mine").exists()


@pytest.mark.parametrize(
    "archive", [CORRUPT, make_archive({f"{download.FOLDER_NAME}/../../outside": b"evil", **MEMBERS})]
)
def test_wrong_archive_is_never_unpacked(part, archive):
    part.with_suffix("").write_bytes(archive)
    with pytest.raises(download.DownloadError, match="not the official CIFAR-10 archive"):
        download.fetch_batches(part.parent)
    assert not part.with_name(download.FOLDER_NAME).exists() and not (part.parent.parent / "outside").exists()


def test_path_traversal_is_refused(part, monkeypatch):
    evil = make_archive({f"{download.FOLDER_NAME}/../../outside": b"evil", **MEMBERS})
    monkeypatch.setattr(download, "ARCHIVE_SIZE", len(evil))
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(evil).hexdigest())  # as if it were the official one
    part.with_suffix("").write_bytes(evil)
    with pytest.raises(download.DownloadError, match="outside"):
        download.fetch_batches(part.parent)
    assert not (part.parent.parent / "outside").exists()


def test_two_processes_download_once(part, server):
    """Threads stand for them: the lock is the same."""
    server.use("good")
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(download.fetch_batches, part.parent) for _ in range(2)]
        assert [one.result(timeout=30) for one in both] == [None, None]
    check_fetched(part.parent)
    assert server.requests == [("good", None)]
