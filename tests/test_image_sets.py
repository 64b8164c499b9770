"""image_sets.py: pictures to pixels, image folders and their cache, the official batches, digits, validation images."""

import hashlib
import itertools
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CreatesFile
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

import download
import image_sets
from output import load_weights, serialized

SPLITS, CLASSES = ("train", "test"), ("ant", "bee")


def picture(seed):
    """A smooth RGB picture (so that JPEG keeps it), different for each seed."""
    y, x = np.mgrid[:32, :32]
    planes = x * 5 + seed * 40, y * 5 + seed * 20, x + y + seed * 60
    return Image.fromarray((np.stack(planes, -1) % 256).astype(np.uint8))


COLOUR = picture(1)
GREY = np.asarray(COLOUR)[..., 0]
GREY3 = np.stack([GREY] * 3, -1)
GREY16 = Image.fromarray(GREY.astype(np.uint16) * 257)
HALF_CLEAR = Image.fromarray(np.uint8([[[0, 0, 0, 128]] * 16 + [[255, 0, 0, 0]] * 16] * 32))
OVER_WHITE = np.uint8([[[127] * 3] * 16 + [[255] * 3] * 16] * 32)
HELD = Image.Exif()
HELD.update({0x0112: 6, 0x00FE: 2**32 - 1})  # to be turned by 90 degrees clockwise, and a number
ODD = HELD.tobytes().replace(b"\0\xfe\0\4", b"\0\xfe\0\x08")  # of a kind that Pillow reads but cannot write


@pytest.mark.parametrize(
    "image, expected",
    [
        (GREY16, GREY3),
        (Image.fromarray(GREY.astype(np.int32) * 257), GREY3),
        (Image.fromarray(GREY.astype(np.int32)), GREY3),  # 8 bits in 32
        (Image.fromarray((GREY / 255).astype(np.float32)), GREY3),
        (HALF_CLEAR.convert("LA"), OVER_WHITE),
    ],
)
def test_each_mode_becomes_rgb_of_32_pixels(image, expected):
    resized = Image.fromarray(expected).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(image_sets.to_rgb(image), resized)


@pytest.mark.parametrize("value", [-0.5, 1.5, np.nan])
def test_floats_that_are_no_greys_are_refused(value):
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        image_sets.to_rgb(Image.fromarray(np.array([[0.5, value]], np.float32)))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for i, (split, name, suffix) in enumerate(itertools.product(SPLITS, CLASSES, (".png", ".jpg", ".JPEG", ".webp"))):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        picture(i).save(root / split / name / f"{i}{suffix}")
    return root


def load(root=None, split="train"):
    return image_sets.load_images("cifar10", split, root)


def check(root, split="train"):
    """What is loaded is what Pillow decodes, in (class, file name) order; returns when the cache was written."""
    paths, loaded = sorted((root / split).glob("*/[0-9]*")), load(root, split)
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int64 and loaded.classes == CLASSES
    np.testing.assert_array_equal(loaded.images, [np.asarray(Image.open(path).convert("RGB")) for path in paths])
    assert loaded.labels.tolist() == [CLASSES.index(path.parent.name) for path in paths] and loaded.name == root.name
    return os.stat(root / f".{split}-32px.pt").st_mtime_ns


@pytest.mark.parametrize("split", SPLITS)
def test_folder_gives_what_pillow_decodes_and_is_decoded_once(folder, split, capsys):
    (folder / "train/ant/.ipynb_checkpoints").mkdir()
    for name in ("ant/Thumbs.db", "bee/labels.txt", "ant/._0.png", "ant/.ipynb_checkpoints/0.png"):
        (folder / "train" / name).write_bytes(b"x")
    assert check(folder, split) == check(folder, split)
    printed, passed = capsys.readouterr().out, 2 * (split == "train")
    found = [printed.count(words) for words in ("passed over 4 files", "8 images in 2 classes", "\n")]
    assert found == [passed, 2, passed + 2]


def test_photos_are_turned_once_and_resized_and_clear_colours_are_white(folder, capsys):
    ant, large = folder / "train/ant", picture(2).resize((64, 48))
    # A telephone's .jpg is often an MPO: the photo, and a second one of its depth.
    large.save(ant / "a.jpg", format="MPO", save_all=True, append_images=[large], exif=HELD)
    GREY16.save(ant / "b.png", exif=HELD)
    COLOUR.save(ant / "c.tiff", exif=HELD)
    COLOUR.save(ant / "d.webp", exif=HELD)
    COLOUR.save(ant / "e.jpg", exif=ODD)
    HALF_CLEAR.quantize().save(ant / "f.png")
    *held, odd, clear = load(folder).images[4:10].astype(int)
    for found, lying in zip(held, (large.resize((32, 32), Image.Resampling.BILINEAR), GREY3, COLOUR, COLOUR)):
        assert abs(found - np.rot90(lying, -1)).mean() < 5
    assert min(abs(odd - np.rot90(COLOUR, turns)).mean() for turns in (0, -1)) < 5
    np.testing.assert_array_equal(clear, OVER_WHITE)
    assert "1 images resized" in capsys.readouterr().out


@pytest.mark.parametrize("lost, only", [("test/bee", "train/: bee"), ("train/bee", "test/: bee"), ("test", "ant, bee")])
def test_classes_that_one_split_alone_has_are_refused(folder, lost, only):
    shutil.rmtree(folder / lost)
    with pytest.raises((ValueError, FileNotFoundError), match=only):
        load(folder)


def test_images_that_cannot_be_read_are_all_named_and_nothing_is_cached(folder):
    half, page = bad = [folder / "train" / name for name in ("ant/0.png", "bee/4.png")]
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    page.write_bytes(b"<html>not found")
    with pytest.raises(ValueError) as raised:
        load(folder)
    assert all(str(path) in str(raised.value) for path in bad)
    assert not list(folder.glob(".*"))


def test_each_change_of_the_folder_is_seen(folder):
    path, link, target = folder / "train/ant/0.png", folder / "train/bee/00.png", folder / "elsewhere.png"
    picture(1).save(target)
    changes = [lambda: None, lambda: os.utime(path, ns=(0, 1)), lambda: path.rename(link), link.unlink]
    if sys.platform != "win32":  # where a link takes a privilege
        changes += [lambda: os.symlink(target, link), lambda: picture(9).save(target)]
    times = set()
    for change in changes:
        change()
        times.add(check(folder))
    assert len(times) == len(changes)


def test_bad_cache_is_replaced_and_no_pickle_opened(folder, monkeypatch):
    monkeypatch.chdir(folder)
    expected, cache = load(folder).images, Path(".train-32px.pt")
    good, stored = cache.read_bytes(), load_weights(cache)
    bad = [serialized(stored | {"images": CreatesFile()}), serialized({}), good[:9999]]
    bad += [serialized({"images": stored["images"] * 0, "fingerprint": "0"})]
    # A flipped bit in headers at the start, in a sample of the pixels, in the zip's directory at the end.
    for place in [*range(0, 220, 9), *range(220, len(good), 4999), *range(len(good) - 900, len(good), 29)]:
        bad.append(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
    for content in bad:
        cache.write_bytes(content)
        np.testing.assert_array_equal(load(folder).images, expected)
    assert not Path("opened").exists()


def test_folder_that_cannot_be_written_is_read_and_not_cached(folder, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", lambda _: os.stat("nowhere"))  # an OSError
    assert len(load(folder).images) == 8 and "not cached" in capsys.readouterr().out


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A cifar-10-batches-py in the official format, 2 images per split, and beside it its archive."""
    batches, md5 = tmp_path / "made" / download.FOLDER_NAME, {}
    batches.mkdir(parents=True)
    # A row is all reds of a picture, row by row, then its greens, then its blues.
    rows = np.stack([np.asarray(picture(seed)).transpose(2, 0, 1).reshape(-1) for seed in range(4)])
    files = {name: {"labels": [0, 1], "data": rows[b : b + 2]} for b, name in ((0, "data_batch_1"), (2, "test_batch"))}
    for name, content in {"batches.meta": {"label_names": list(CLASSES)}, **files}.items():
        (batches / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((batches / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    archive = Path(shutil.make_archive(batches.with_name("cifar-10-python"), "gztar", batches.parent, batches.name))
    monkeypatch.setattr(download, "ARCHIVE_SIZE", archive.stat().st_size)
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(download, "SOURCES", [archive.as_uri()])
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return batches


def check_official(root=None, split="train"):
    loaded, seeds = load(root, split), {"train": (0, 1), "test": (2, 3)}[split]
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int64
    np.testing.assert_array_equal(loaded.images, [picture(seed) for seed in seeds])
    assert loaded.labels.tolist() == [0, 1] and loaded.classes == CLASSES and loaded.name == "CIFAR-10"


def test_an_empty_root_is_filled_and_each_place_preferred_to_those_below_it(official, folder, monkeypatch):
    check_official()
    own = Path("own")
    own.mkdir()
    (own / ".DS_Store").touch()
    check_official(own)
    monkeypatch.setattr(download, "SOURCES", [])
    shutil.rmtree(own / download.FOLDER_NAME)
    check_official(own)  # from the archive that was downloaded
    (own / download.ARCHIVE_NAME).unlink()
    check_official(own, "test")
    shutil.copytree(folder, own, dirs_exist_ok=True)
    assert len(load(own).images) == 8


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_tampered_pickle_is_never_opened(official, name):
    (official / name).write_bytes(pickle.dumps(CreatesFile()))
    with pytest.raises(ValueError, match="damaged"):
        load(official.parent)
    assert not Path("opened").exists()


@pytest.mark.parametrize("argument, variable", [("picures", "."), (None, "picures"), ("data", "."), (".", "picures")])
def test_a_named_root_without_data_is_no_reason_to_download(official, argument, variable, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", variable)
    with pytest.raises(ValueError, match=f"{argument or variable} is no folder" if argument != "." else "holds made"):
        load(argument)
    assert os.listdir() == ["made"]


def test_digits_are_sklearns_each_in_one_split(digits):
    original = load_digits()
    greys = [Image.fromarray(np.rint(grid / 16 * 255).astype(np.uint8)) for grid in original.images]
    large = [grey.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB").tobytes() for grey in greys]
    found = [(image.tobytes(), label) for part in digits.values() for image, label in zip(part.images, part.labels)]
    assert sorted(found) == sorted(zip(large, original.target))
    assert len(digits["test"].labels) == 360 and digits["test"].classes == tuple("0123456789")


def test_validation_images_are_as_many_of_each_class_and_always_the_same():
    labels = np.random.default_rng(5).permutation([0] * 30 + [1] * 20 + [4] * 11)
    training, validation = image_sets.split_validation(labels.tolist(), per_class=10)
    assert sorted(training + validation) == list(range(61))
    assert np.bincount(labels[validation]).tolist() == [10, 10, 0, 0, 10]
    # Drawn, since the order of files often means something: not the first of a class.
    assert set(np.flatnonzero(labels == 0)[:10]) - set(validation)
    assert image_sets.split_validation(labels, per_class=10) == (training, validation)
    with pytest.raises(ValueError, match="class 4 has 11"):
        image_sets.split_validation(labels, per_class=11)
