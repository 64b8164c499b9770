"""download.py against a local server that behaves as badly as real ones do; nothing here leaves the machine."""

import gzip
import hashlib
import http.server
import io
import itertools
import os
import queue
import random
import tarfile
import threading
import types
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import filelock
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
        if name == "404" or (name == "416" and asked):
            return self.send_error(int(name))
        if name == "gate":
            self.server.gate.wait(30)
        body = {"corrupt": CORRUPT, "page": b"<html>sign in", "long": ARCHIVE + b"more"}.get(name, ARCHIVE)
        ranged = asked and name not in ("no-range", "page", "long")
        start = int(asked.strip("bytes=-")) - (name == "wrong-range") if ranged else 0
        self.send_response(206 if ranged else 200)
        if name != "page":
            self.send_header("Content-Length", len(body) - start)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[start:HALF] if name in ("truncate", "stall") else body[start:])
        if name == "stall":
            self.server.gate.wait(30)


@pytest.fixture
def server():
    """`requests` holds pairs of name and Range; the gate is opened by a test, or at its end."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.gate = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}/{{}}".format
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def small_archive(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "CHUNK_BYTES", 30_000)
    monkeypatch.setattr(download, "ARCHIVE_SIZE", len(ARCHIVE))
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(ARCHIVE).hexdigest())


@pytest.fixture
def archive(tmp_path):
    return tmp_path / download.ARCHIVE_NAME


def check_downloaded(archive, server, *names):
    """The archive arrives from the sources `names`, and nothing but it (and the lock) is left."""
    assert download.download_archive(archive.parent, map(server.url, names)) == archive
    assert archive.read_bytes() == ARCHIVE
    assert {file.name for file in archive.parent.iterdir()} - {f"{archive.name}.lock"} == {archive.name}


def check_extracted(archive):
    folder = download.extract_archive(archive)
    assert folder == archive.parent / download.FOLDER_NAME
    assert {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()} == MEMBERS
    assert {file.name for file in archive.parent.iterdir()} - {f"{archive.name}.lock"} == {archive.name, folder.name}


def test_constants_are_the_published_ones(monkeypatch):
    monkeypatch.undo()  # of small_archive
    assert download.ARCHIVE_SIZE == 170_498_071
    assert download.ARCHIVE_SHA256 == "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    ours = download.SOURCES[0], download.ARCHIVE_NAME, download.FOLDER_NAME
    assert ours == (CIFAR10.url, CIFAR10.filename, CIFAR10.base_folder)


# ---- downloading -----------------------------------------------------------------------------------------------------


def test_sources_default_to_the_module_constant_at_call_time(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", [server.url("good")])
    assert download.download_archive(str(tmp_path / "new" / "folder")).read_bytes() == ARCHIVE


def test_verified_archive_is_returned_without_network(archive, server):
    archive.write_bytes(ARCHIVE)
    check_downloaded(archive, server, "good")
    assert not server.requests
    assert os.listdir(archive.parent) == [archive.name]  # not even a lock: the folder may be read-only


def test_wrong_file_in_its_place_is_kept(archive, server):
    for content in (b"first", CORRUPT):
        archive.write_bytes(content)
        assert download.download_archive(archive.parent, [server.url("good")]).read_bytes() == ARCHIVE
    assert {file.read_bytes() for file in archive.parent.glob("*.wrong-*")} == {b"first", CORRUPT}


CALLS = {  # what an earlier call left, the sources, and the range that is asked of each
    "good": (ARCHIVE[:HALF], ["good"], [REST]),
    "no-range": (ARCHIVE[:HALF], ["no-range"], [REST]),
    "416": (ARCHIVE[:HALF], ["416"], [REST, None]),
    "wrong-range": (ARCHIVE[:HALF], ["wrong-range"], [REST, None]),
    "page": (ARCHIVE[:HALF], ["page", "long", "good"], [REST, REST, REST]),  # must not replace what is there
    "corrupt half": (CORRUPT[:HALF], ["good"], [REST, None]),
    "corrupt whole": (CORRUPT, ["good"], [None]),
    "whole": (ARCHIVE, ["good"], []),
    "404": (b"", ["404", "good"], [None, None]),
    "corrupt": (b"", ["corrupt", "good"], [None, None]),
    "truncate": (b"", ["truncate", "good"], [None, REST]),
}


@pytest.mark.parametrize("case", CALLS)
def test_going_on_with_what_has_arrived_and_with_the_next_source(archive, server, case):
    arrived, names, requests = CALLS[case]
    archive.with_name(f"{archive.name}.part").write_bytes(arrived)
    check_downloaded(archive, server, *names)
    assert [asked for _, asked in server.requests] == requests


@pytest.mark.parametrize("silent", ["gate", "stall"])
def test_silent_source_is_named_and_given_up(archive, server, silent, monkeypatch, capsys):
    printed, connect = [], urllib.request.urlopen

    def impatient(request, timeout):
        assert timeout == download.STALL_SECONDS
        printed.append(capsys.readouterr().out)  # before the connection is made
        return connect(request, timeout=0.05 if silent in request.full_url else timeout)

    monkeypatch.setattr(urllib.request, "urlopen", impatient)
    check_downloaded(archive, server, silent, "good")
    bad, good = server.url(silent), server.url("good")
    assert printed == [f"fetching {bad}\n", f"{bad}: silent for 20 s\nfetching {good}\n"]


def test_slow_source_is_left_for_a_better_one_and_used_in_the_end(archive, server, monkeypatch, capsys):
    clock = itertools.count(step=4)
    monkeypatch.setattr(download, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    check_downloaded(archive, server, "slow", "404")
    assert "sends only " in capsys.readouterr().out
    (_, first), _, (_, last) = server.requests
    assert first is None and 0 < int(last.strip("bytes=-")) < len(ARCHIVE)  # it goes on where it was


def test_message_when_all_fail_lists_sources_reasons_and_ways_forward(archive, server):
    reasons = {"404": "HTTP 404", "page": "gzip", "long": "offers", "corrupt": "SHA-256", "truncate": "closed"}
    reasons = {server.url(name): reason for name, reason in reasons.items()}
    reasons |= {"http://127.0.0.1:1/": "refused", "no URL": "unknown url type"}
    with pytest.raises(download.DownloadError) as raised:
        download.download_archive(archive.parent, reasons)
    message = str(raised.value)
    for source, reason in reasons.items():
        assert reason in message.split(f"{source}: ")[1].split("\n")[0]
    ways = str(archive.resolve()), "CIFAR10_ROOT", "train/<class>/*.png and test/<class>/*.png", "DATASET=digits"
    assert [way for way in ways if way not in message] == []
    assert archive.with_name(f"{archive.name}.part").read_bytes() == ARCHIVE[:HALF]  # for the next call


def test_full_disk_is_no_reason_to_try_the_next_source(archive, server, monkeypatch):
    monkeypatch.setattr(type(archive), "open", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(download.DownloadError, match=r"writable folder with .* GB free: .*No space left"):
        download.download_archive(archive.parent, [server.url("good"), server.url("good?")])
    assert len(server.requests) == 1


# ---- unpacking -------------------------------------------------------------------------------------------------------


def test_extracts_and_then_leaves_the_folder_alone(archive):
    archive.write_bytes(ARCHIVE)
    check_extracted(archive)
    (archive.with_name(download.FOLDER_NAME) / "mine").write_text("mine")
    archive.with_name(f"{archive.name}.lock").unlink(missing_ok=True)
    assert (download.extract_archive(str(archive)) / "mine").exists()
    assert not archive.with_name(f"{archive.name}.lock").exists()  # the folder may be read-only


def test_interrupted_unpacking_leaves_no_folder_and_is_redone(archive, monkeypatch):
    archive.write_bytes(ARCHIVE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))  # at the last moment
        download.extract_archive(archive)
    assert not archive.with_name(download.FOLDER_NAME).exists()
    archive.with_name(f"{download.TEMPORARY_PREFIX}of-a-killed-process").mkdir()
    check_extracted(archive)


def test_wrong_archive_is_never_unpacked(archive, monkeypatch):
    archive.write_bytes(CORRUPT)
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("opened before it was verified"))
    with pytest.raises(download.DownloadError, match="not the official CIFAR-10 archive and was not unpacked"):
        download.extract_archive(archive)


def test_path_traversal_is_refused(archive, monkeypatch):
    archive.write_bytes(make_archive({f"{download.FOLDER_NAME}/../../outside": b"evil", **MEMBERS}))
    monkeypatch.setattr(download, "_mismatch", lambda path: "")  # as if it were the official one
    with pytest.raises(download.DownloadError, match="cannot be unpacked"):
        download.extract_archive(archive)
    assert not archive.with_name("outside").exists()


# ---- other processes (threads stand for them: the lock is the same) --------------------------------------------------


@pytest.fixture
def printed(monkeypatch):
    lines = queue.Queue()
    monkeypatch.setattr(download, "print", lambda line, **kwargs: lines.put(line), raising=False)
    return lines


def test_two_processes_download_once(archive, server, printed):
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(download.download_archive, archive.parent, [server.url("gate")]) for _ in range(2)]
        first_words = {printed.get(timeout=15).split()[0] for _ in both}  # while the gate holds the download
        assert first_words == {"fetching", "waiting"}
        server.gate.set()
        assert [one.result(timeout=15) for one in both] == [archive, archive]
    assert server.requests == [("gate", None)]


def test_folder_that_appears_while_waiting_is_used(archive, printed):
    archive.write_bytes(ARCHIVE)
    with ThreadPoolExecutor() as pool:
        with filelock.FileLock(archive.with_name(f"{archive.name}.lock")):
            waiting = pool.submit(download.extract_archive, archive)
            assert printed.get(timeout=15).startswith("waiting for another process")
            (archive.with_name(download.FOLDER_NAME) / "of the other process").mkdir(parents=True)
        assert os.listdir(waiting.result(timeout=15)) == ["of the other process"]
