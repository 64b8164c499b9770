"""download.py against a local server that behaves as badly as real ones do; nothing here leaves the machine.

Nothing waits either: for a slow source the clock that download.py looks at runs fast.
"""

import contextlib
import gzip
import hashlib
import http.client
import http.server
import io
import multiprocessing
import os
import random
import socket
import tarfile
import threading
import types
import urllib.request

import filelock
import pytest

import download

MEMBERS = {f"{download.FOLDER_NAME}/data_batch_{i}": random.Random(i).randbytes(60_000) for i in range(1, 5)}


def make_archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)  # the same bytes in every process


ARCHIVE = make_archive(MEMBERS)
HALF = len(ARCHIVE) // 2
CORRUPT = ARCHIVE[:100] + bytes([ARCHIVE[100] ^ 1]) + ARCHIVE[101:]


class Server(http.server.ThreadingHTTPServer):
    """Serves ARCHIVE at every path; the path's name is how it misbehaves. `requests` holds (name, Range) pairs."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.sent = [], 0
        self.gate = threading.Event()  # opened by a test, or at its end
        self.now, self.seconds_per_look = 0, 0  # what download.py takes for the time

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def monotonic(self):
        self.now += self.seconds_per_look
        return self.now

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is what several tests are about


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        name, asked = self.path.strip("/"), self.headers.get("Range")
        self.server.requests.append((name, asked))
        self.server.seconds_per_look = {"slow": 4, "slower": 9}.get(name, 0)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        bodies = {"corrupt": CORRUPT, "page": b"<html>please sign in</html>", "long": ARCHIVE + b"more"}
        body = bodies.get(name, ARCHIVE)
        if name in ("404", "500") or (name == "416" and asked):
            return self.send_error(int(name))
        if name in ("redirect", "loop"):
            target = {"redirect": "good"}.get(name, name)
            return self.answer(302, {"Location": self.server.url(target), "Content-Length": 0})
        if name == "gate":
            self.server.gate.wait(30)
        if name in ("no-range", "page", "endless", "long"):
            start = 0
        if name == "wrong-range" and asked:
            start -= 1
        headers = {} if name in ("page", "endless") else {"Content-Length": len(body) - start}
        if asked and start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206 if asked and start else 200, headers)
        self.send(body[start:HALF] if name == "truncate" else body[start:])
        while name == "endless" and not self.server.gate.is_set():
            self.send(body)

    def answer(self, status, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def send(self, data):
        self.server.sent += len(data)  # before the client can have it, and be done
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        monkeypatch.setattr(download, "time", types.SimpleNamespace(monotonic=server.monotonic))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


def use_archive(content, setattr=setattr):
    setattr(download, "ARCHIVE_SIZE", len(content))
    setattr(download, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())


@pytest.fixture(autouse=True)
def small_archive(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "CHUNK_BYTES", 30_000)
    use_archive(ARCHIVE, monkeypatch.setattr)


@pytest.fixture
def archive(tmp_path):
    """Where it belongs."""
    return tmp_path / download.ARCHIVE_NAME


@pytest.fixture
def part(archive):
    return archive.with_name(f"{archive.name}.part")


def check_downloaded(root, server, *names):
    """The archive arrives from the sources `names`, and nothing but it (and the lock) is left."""
    path = download.download_archive(root, [server.url(name) for name in names])
    assert path == root / download.ARCHIVE_NAME
    assert path.read_bytes() == ARCHIVE
    assert {file.name for file in root.iterdir()} - {f"{path.name}.lock"} == {path.name}


def test_constants_are_the_published_ones(monkeypatch):
    from torchvision.datasets import CIFAR10  # here, since the processes of another test import this file anew

    monkeypatch.undo()  # of small_archive
    assert download.ARCHIVE_SIZE == 170_498_071
    assert download.ARCHIVE_SHA256 == "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    ours = download.SOURCES[0], download.ARCHIVE_NAME, download.FOLDER_NAME
    assert ours == (CIFAR10.url, CIFAR10.filename, CIFAR10.base_folder)
    assert all(url.startswith("https://") and url.endswith(f"/{download.ARCHIVE_NAME}") for url in download.SOURCES)


# ---- one source ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["good", "redirect", "endless", "slower"])
def test_downloads(tmp_path, server, name):
    """Also from one that never stops sending, and, where there is no other, from one that is slow."""
    check_downloaded(tmp_path / "new" / "folder", server, name)
    assert len(server.requests) == 1 + (name == "redirect")


def test_sources_default_to_the_module_constant_at_call_time(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", [server.url("good")])
    assert download.download_archive(str(tmp_path)).read_bytes() == ARCHIVE


def test_silent_source_is_named_before_the_connection_is_made_and_then_given_up(tmp_path, server, monkeypatch, capsys):
    printed, connect = [], urllib.request.urlopen

    def impatient(request, timeout):
        assert timeout == download.STALL_SECONDS
        printed.append(capsys.readouterr().out)
        return connect(request, timeout=0.05 if "gate" in request.full_url else timeout)

    monkeypatch.setattr(urllib.request, "urlopen", impatient)
    check_downloaded(tmp_path, server, "gate", "good")
    gate, good = server.url("gate"), server.url("good")
    assert printed == [f"fetching {gate}\n", f"{gate}: silent for 20 s\nfetching {good}\n"]


def test_verified_archive_is_returned_without_network(archive, server):
    archive.write_bytes(ARCHIVE)
    assert download.download_archive(archive.parent, [server.url("good")]) == archive
    assert not server.requests
    assert os.listdir(archive.parent) == [archive.name]  # not even a lock: the folder may be read-only


def test_wrong_file_in_its_place_is_kept(archive, server, capsys):
    for content in (b"first", CORRUPT):
        archive.write_bytes(content)
        assert download.download_archive(archive.parent, [server.url("good")]).read_bytes() == ARCHIVE
        assert ".wrong-" in capsys.readouterr().out
    assert {file.read_bytes() for file in archive.parent.glob("*.wrong-*")} == {b"first", CORRUPT}


# ---- going on with what has arrived ----------------------------------------------------------------------------------

REST = f"bytes={HALF}-"


@pytest.mark.parametrize(
    ("names", "requests"),
    [
        (["good"], [REST]),
        (["redirect"], [REST, REST]),
        (["no-range"], [REST]),
        (["416"], [REST, None]),
        (["wrong-range"], [REST, None]),
        (["page", "long", "good"], [REST, REST, REST]),  # an error page must not replace what is there
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_resume(tmp_path, part, server, names, requests, capsys):
    part.write_bytes(ARCHIVE[:HALF])
    check_downloaded(tmp_path, server, *names)
    assert [asked for _, asked in server.requests] == requests
    failures = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("fetching")]
    assert len(failures) == len(names) - 1  # what cannot resume starts over, which is no failure
    if names == ["good"]:
        assert server.sent == len(ARCHIVE) - HALF


@pytest.mark.parametrize(
    ("content", "requests"),
    [(ARCHIVE, []), (CORRUPT, [None]), (ARCHIVE + b"more", [None]), (CORRUPT[:HALF], [REST, None])],
    ids=["good", "corrupt", "too long", "corrupt at its beginning"],
)
def test_part_is_judged_when_it_is_full(tmp_path, part, server, content, requests):
    part.write_bytes(content)
    check_downloaded(tmp_path, server, "good")
    assert [asked for _, asked in server.requests] == requests


# ---- going on with the next source -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["404", "500", "loop", "page", "long", "refused", "not a URL"])
def test_bad_source_is_followed_by_the_next(tmp_path, server, name, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    bad = {"refused": f"http://127.0.0.1:{port}/", "not a URL": name}.get(name, server.url(name))
    assert download.download_archive(tmp_path, [bad, server.url("good")]).read_bytes() == ARCHIVE
    assert f"{bad}: " in capsys.readouterr().out


@pytest.mark.parametrize("reason", ["closed the connection", "silent for 20 s"])
def test_half_a_download_is_continued_by_the_next_source(tmp_path, server, reason, monkeypatch, capsys):
    read = http.client.HTTPResponse.read1

    def wait_for_more(response, number):
        if chunk := read(response, number):
            return chunk
        raise TimeoutError("timed out")

    if reason == "silent for 20 s":
        monkeypatch.setattr(http.client.HTTPResponse, "read1", wait_for_more)
    check_downloaded(tmp_path, server, "truncate", "good")
    assert server.requests == [("truncate", None), ("good", REST)]
    assert f"{server.url('truncate')}: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "requested"),
    [
        (["slow", "good"], ["slow", "good"]),
        (["slow", "404", "500"], ["slow", "404", "500", "slow"]),
        (["slower", "slow", "404"], ["slower", "slow", "404", "slow"]),  # the faster of the two
    ],
    ids="-".join,
)
def test_slow_source_is_left_for_a_better_one_and_used_in_the_end(tmp_path, server, names, requested, capsys):
    check_downloaded(tmp_path, server, *names)
    assert [name for name, _ in server.requests] == requested
    assert "sends only " in capsys.readouterr().out
    first, *_, last = [int(asked.strip("bytes=-")) if asked else 0 for _, asked in server.requests]
    assert first == 0 < last < len(ARCHIVE)  # and goes on where it was


def test_corrupt_archive_is_dropped_and_the_next_source_starts_from_zero(tmp_path, server, capsys):
    check_downloaded(tmp_path, server, "corrupt", "good")
    assert server.requests == [("corrupt", None), ("good", None)]
    assert f"{server.url('corrupt')}: the finished file is wrong: its SHA-256" in capsys.readouterr().out


def test_message_when_all_fail_lists_sources_reasons_and_ways_forward(archive, part, server):
    reasons = {"404": "HTTP 404", "500": "HTTP 500", "corrupt": "SHA-256", "truncate": "closed the connection"}
    with pytest.raises(download.DownloadError) as raised:
        download.download_archive(archive.parent, map(server.url, reasons))
    message = str(raised.value)
    for name, reason in reasons.items():
        assert reason in message.split(f"{server.url(name)}: ")[1].split("\n")[0]
    ways = str(archive.resolve()), "CIFAR10_ROOT", "train/<class>/*.png and test/<class>/*.png", "DATASET=digits"
    assert [way for way in ways if way not in message] == []
    assert not archive.exists() and part.read_bytes() == ARCHIVE[:HALF]  # for the next call


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_root_that_is_a_file(tmp_path, server):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(download.DownloadError, match="file to be a writable folder"):
        download.download_archive(tmp_path / "file", [server.url("good")])
    assert (tmp_path / "file").read_text() == "mine" and not server.requests


@contextlib.contextmanager
def full_disk(file_bytes):
    """A limit on the size of a file makes writes fail as a full disk does: with an OSError in the middle."""
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(archive, server):
    with full_disk(HALF), pytest.raises(download.DownloadError, match="GB free"):
        download.download_archive(archive.parent, [server.url("good"), server.url("good?")])
    assert len(server.requests) == 1  # no other source helps
    assert not archive.exists()
    check_downloaded(archive.parent, server, "good")
    with full_disk(10_000), pytest.raises(download.DownloadError, match="GB free"):
        download.extract_archive(archive)
    check_extracted(archive)


# ---- unpacking -------------------------------------------------------------------------------------------------------


def check_extracted(archive):
    folder = download.extract_archive(archive)
    assert folder == archive.parent / download.FOLDER_NAME
    assert {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()} == MEMBERS
    assert {file.name for file in archive.parent.iterdir()} - {f"{archive.name}.lock"} == {archive.name, folder.name}


def test_extracts_and_then_leaves_the_folder_alone(archive):
    archive.write_bytes(ARCHIVE)
    check_extracted(archive)
    (archive.with_name(download.FOLDER_NAME) / "mine").write_text("mine")
    lock = archive.with_name(f"{archive.name}.lock")
    lock.unlink(missing_ok=True)
    assert (download.extract_archive(str(archive)) / "mine").exists()
    assert not lock.exists()  # the folder may be read-only


WRONG = {
    "there is no such file": None,
    f"it has {HALF:,} bytes instead of {len(ARCHIVE):,}": ARCHIVE[:HALF],
    f"is {hashlib.sha256(CORRUPT).hexdigest()} instead of {hashlib.sha256(ARCHIVE).hexdigest()}": CORRUPT,
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_archive_is_never_unpacked(archive, monkeypatch, reason):
    if content := WRONG[reason]:
        archive.write_bytes(content)
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("opened before it was verified"))
    with pytest.raises(download.DownloadError, match=reason):
        download.extract_archive(archive)
    assert os.listdir(archive.parent) == ([archive.name] if content else [])


@pytest.mark.parametrize("absolute", [False, True])
def test_path_traversal_is_refused(tmp_path, monkeypatch, absolute):
    archive = tmp_path / "root" / download.ARCHIVE_NAME
    archive.parent.mkdir()
    name = str(tmp_path / "outside") if absolute else f"{download.FOLDER_NAME}/../../../outside"
    archive.write_bytes(make_archive({name: b"evil", **MEMBERS}))
    use_archive(archive.read_bytes(), monkeypatch.setattr)
    with contextlib.suppress(download.DownloadError):  # refused, or (an absolute path) kept inside
        download.extract_archive(archive)
    assert list(tmp_path.rglob("outside")) == []


# ---- other processes -------------------------------------------------------------------------------------------------


def test_folder_that_appears_while_waiting_is_used(archive, monkeypatch):
    archive.write_bytes(ARCHIVE)
    folder = archive.with_name(download.FOLDER_NAME)
    waiting, results = threading.Event(), []
    monkeypatch.setattr(download, "print", lambda *args, **kwargs: waiting.set(), raising=False)
    thread = threading.Thread(target=lambda: results.append(download.extract_archive(archive)))
    with filelock.FileLock(archive.with_name(f"{archive.name}.lock")):
        thread.start()
        assert waiting.wait(15)
        folder.mkdir()
        (folder / "from the other process").touch()
    thread.join(15)
    assert results == [folder] and os.listdir(folder) == ["from the other process"]


def fetch_and_die(root, url, results):
    """In a process of its own: prints into the queue, and dies between unpacking and moving into place."""
    use_archive(ARCHIVE)
    download.print = lambda line, **kwargs: results.put(line)
    archive = download.download_archive(root, [url])
    results.put(archive)
    results.close()
    results.join_thread()
    download.os.replace = lambda *args: os._exit(9)
    download.extract_archive(archive)


def test_two_processes_download_once_and_what_they_leave_half_done_is_redone(archive, server):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    args = (archive.parent, server.url("gate"), results)
    processes = [context.Process(target=fetch_and_die, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        printed = {results.get(timeout=30) for _ in processes}  # while the gate holds the download
    finally:
        server.gate.set()
    assert printed == {
        f"fetching {server.url('gate')}",
        f"waiting for another process that fetches CIFAR-10 into {archive.parent}",
    }
    assert [results.get(timeout=30) for _ in processes] == [archive, archive]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [9, 9]
    assert server.requests == [("gate", None)]
    assert not archive.with_name(download.FOLDER_NAME).exists()
    assert any(archive.parent.rglob("data_batch_1"))  # what they left behind
    check_extracted(archive)
