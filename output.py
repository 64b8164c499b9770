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
    """Write bytes to a Path so that it holds either all of them or, after an OSError, what it held before."""
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
    """Tensors and plain values that `torch.save` wrote; ValueError if a checksum is wrong or there is more."""
    with open(path, "rb") as file:  # whatever goes wrong from here on is in the bytes
        try:
            # The format since torch 1.6, whose checksums torch itself does not check.
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip() is not None:
                raise zipfile.BadZipFile("a checksum is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever zipfile, pickle and torch find wrong in arbitrary bytes
            reason = "it holds more than tensors" if "weights_only" in str(error) else str(error).split("\n")[0]
    raise ValueError(f"{path} is damaged or no file of tensors ({reason}); put back a good copy or delete it")


def save_figure(figure, path=None):
    """Save a figure, if there is a path, in the format of its suffix; returns the figure."""
    if path is not None and rank() == 0:
        path, image = pathlib.Path(path), io.BytesIO()
        figure.savefig(image, format=path.suffix.lstrip(".") or "png", dpi=120)
        write_atomically(path, image.getvalue())
    return figure


def progress_bar(iterable=None, **options):
    """tqdm's bar in a notebook or a terminal; none in a log file, or where its own TQDM_DISABLE is set."""
    return tqdm(iterable, disable=rank() > 0 or bool(os.environ.get("TQDM_DISABLE")) or None, **options)


def in_notebook():
    """Whether a notebook shows what this process prints, be it in a browser or executed by nbconvert."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


def scrolled(text):
    """HTML of a table of text, which a narrow notebook scrolls instead of wrapping its lines."""
    return f'<pre style="white-space: pre; overflow-x: auto; font-family: monospace">{text}</pre>'
