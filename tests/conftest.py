"""Shared by the tests: the digits sample, once; no display; no progress bars."""

import multiprocessing
import os
import pathlib
import sys

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TQDM_DISABLE", "1")

import matplotlib.pyplot as plt
import pytest
import torch

import utils
from image_sets import load_images
from output import load_weights

torch.set_num_threads(1)  # small networks need no more, and several wait for each other on a busy machine


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def digits():
    return {split: load_images("digits", split) for split in ("train", "test")}


@pytest.fixture(scope="session")
def processes():
    """A `multiprocessing` whose processes start at once under Linux: forked from one that has imported everything."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch._dynamo", "utils", "sklearn.datasets"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(pathlib.Path(utils.__file__).parent))  # where the server finds utils
        context.Process(target=print).start()
    return context


class CreatesFile:
    """A pickle that makes the file "opened" when it is opened."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("opened"),)


def end_state(folder):
    """Everything that the checkpoint and the weights files hold, but times, as one list of plain values."""

    def flat(value):
        if isinstance(value, dict):
            value = [part for part in value.items() if part[0] not in ("seconds", "saved")]
        if isinstance(value, (list, tuple)):
            return [*map(flat, value)]
        return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value

    return flat([load_weights(folder / name) for name in ("checkpoint.pt", "last.pt", "best.pt")])
