"""What goes out: files that are whole or not there, figures, progress bars."""

import contextlib
import io
import os
import pathlib
import sys
import time

from tqdm.auto import tqdm


def write_atomically(path, data):
    """Write bytes to path so that it holds either all of them or what it held before.

    Raises:
        OSError: they could not be written (full or read-only disk); the old file, if any, is untouched.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(partial, path)
    except OSError as error:
        reason = (
            f"could not write {path}: {error.strerror}. What was there before is intact; see that the folder "
            "exists, can be written to and has room"
        )
        raise OSError(error.errno, reason) from None
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too, and has had its error
            partial.unlink(missing_ok=True)


def _replace(source, target, waits=(0.1, 0.3, 1.0)):
    """os.replace, tried again while a virus scanner or a spreadsheet has the target open under Windows."""
    for wait in waits:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


def save_figure(figure, path=None):
    """Save a figure, if there is a path, in the format of its suffix; returns the figure."""
    if path is not None:
        path, image = pathlib.Path(path), io.BytesIO()
        figure.savefig(image, format=path.suffix.lstrip(".") or "png", dpi=120)
        write_atomically(path, image.getvalue())
    return figure


def progress_bar(iterable=None, hidden=False, **options):
    """tqdm's bar in a notebook or a terminal; none in a log file, if hidden, or where its own TQDM_DISABLE is set."""
    hidden = hidden or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(iterable, disable=hidden or None, **options)  # None leaves it to whether there is a terminal


def in_notebook():
    """Whether a notebook shows what this process prints, be it in a browser or executed by nbconvert."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")
