"""Atomic file writes and checked reads, figures, progress bars."""

import contextlib
import io
import os
import pathlib
import sys
import zipfile

import torch
from tqdm.auto import tqdm

from devices import rank


def write_atomically(path, data):
    """Write bytes to path so that it holds either all of them or, after an OSError, what it held before."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)  # which the message then names
        raise
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too, and has had its error
            partial.unlink(missing_ok=True)


def serialized(value):
    """What `torch.save` writes, in memory."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_weights(path):
    """Read a file of tensors and plain values that `torch.save` wrote; no code in it is ever run.

    Raises ValueError if it is damaged, which its checksums show, or holds something else; OSError if there is none.
    """
    with open(path, "rb") as file:  # whatever goes wrong from here on is in the bytes
        try:
            if zipfile.is_zipfile(file):  # the format since torch 1.6, whose checksums torch itself does not check
                with zipfile.ZipFile(file) as archive:
                    for name in archive.namelist():
                        archive.read(name)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever zipfile, pickle and torch find wrong in arbitrary bytes
            reason = "it holds more than tensors" if "weights_only" in str(error) else str(error).split("\n")[0]
    raise ValueError(
        f"{path} is damaged or no file of tensors that torch.save wrote ({reason}); put back a good copy or delete it"
    )


def save_figure(figure, path=None):
    """Save a figure, if there is a path, in the format of its suffix; returns the figure."""
    if path is not None and rank() == 0:
        path, image = pathlib.Path(path), io.BytesIO()
        figure.savefig(image, format=path.suffix.lstrip(".") or "png", dpi=120)
        write_atomically(path, image.getvalue())
    return figure


def progress_bar(iterable=None, **options):
    """tqdm's bar in a notebook or a terminal; none in a log file, or where its own TQDM_DISABLE is set."""
    hidden = rank() > 0 or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(iterable, disable=hidden or None, **options)  # None leaves it to whether there is a terminal


def in_notebook():
    """Whether a notebook shows what this process prints, be it in a browser or executed by nbconvert."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


def scrolled(text):
    """HTML of a table of text, which a narrow notebook scrolls instead of wrapping its lines."""
    return f'<pre style="white-space: pre; overflow-x: auto; font-family: monospace">{text}</pre>'
