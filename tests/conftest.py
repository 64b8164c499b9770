"""Shared by the tests: the digits sample, once; no display; no progress bars."""

import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest

from image_sets import load_images


@pytest.fixture(scope="session")
def digits():
    return {split: load_images("digits", split) for split in ("train", "test")}
