"""image_sets.py: pictures to pixels, image folders and their cache, the official batches, digits, validation images."""

import hashlib
import io
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CreatesFile
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

import download
import image_sets
import output
from output import load_weights

SPLITS, CLASSES = ("train", "test"), ("ant", "bee")
CAFE, CAFE_OF_A_MAC = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def picture(seed, size=(32, 32)):
    """A smooth RGB picture (so that JPEG keeps it), different for each seed."""
    y, x = np.mgrid[: size[1], : size[0]]
    planes = x * 5 + seed * 40, y * 5 + seed * 20, x + y + seed * 60
    return Image.fromarray((np.stack(planes, -1) % 256).astype(np.uint8))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def through(kind, image, **options):
    """The image as it comes from a file of this kind."""
    image.save(file := io.BytesIO(), kind, **options)
    return Image.open(file)


# ---- to_rgb: any picture to uint8 (32, 32, 3) ------------------------------------------------------------------------

COLOUR = picture(1)
GREY = np.asarray(COLOUR)[..., 0]
GREY3 = np.stack([GREY] * 3, -1)
GREY16 = Image.fromarray(GREY.astype(np.uint16) * 257)
HALF_CLEAR = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
HALF_CLEAR.paste((0, 0, 0, 128), (0, 0, 16, 32))
OVER_WHITE = np.full((32, 32, 3), 255)
OVER_WHITE[:, :16] = 127
MODES = {
    "1": (Image.fromarray(GREY > 127), np.where(GREY3 > 127, 255, 0)),
    "P": (COLOUR.quantize(256), COLOUR.quantize(256).convert("RGB")),
    "CMYK": (COLOUR.convert("CMYK"), COLOUR),
    "I;16": (GREY16, GREY3),
    "I": (Image.fromarray(GREY.astype(np.int32) * 257), GREY3),
    "I of 8 bits": (Image.fromarray(GREY.astype(np.int32)), GREY3),
    "F": (Image.fromarray((GREY / 255).astype(np.float32)), GREY3),
    "RGBA": (HALF_CLEAR, OVER_WHITE),
    "LA": (HALF_CLEAR.convert("LA"), OVER_WHITE),
    "P with a clear colour": (through("PNG", HALF_CLEAR.quantize()), OVER_WHITE),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode(mode):
    image, expected = MODES[mode]
    array = image_sets.to_rgb(image)
    assert array.dtype == np.uint8 and array.flags.writeable
    np.testing.assert_array_equal(array, expected)
    smaller = Image.fromarray(np.asarray(expected, np.uint8)).resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(image_sets.to_rgb(image, size=8), smaller)


def test_pictures_that_have_no_colours():
    with pytest.raises(ValueError, match=r"floating-point from .*must be from 0 to 1"):
        image_sets.to_rgb(Image.fromarray(np.full((8, 8), np.nan, np.float32)))


def tags(*entries):
    """EXIF bytes by hand; an entry is (tag, type, count, its four bytes)."""
    packed = [struct.pack("<HHL", *numbers) + value for *numbers, value in entries]
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(packed)) + b"".join(packed) + b"\0" * 4


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(("kind", "image"), [("JPEG", COLOUR), ("PNG", GREY16), ("WEBP", COLOUR), ("TIFF", COLOUR)])
def test_each_way_of_holding_a_camera(kind, image, orientation):
    photo = through(kind, image, exif=tags((0x0112, 3, 1, bytes([orientation, 0, 0, 0]))))
    np.testing.assert_array_equal(image_sets.to_rgb(photo), image_sets.to_rgb(ImageOps.exif_transpose(photo)))


HELD = (0x0112, 3, 1, b"\6\0\0\0")  # turn by 90 degrees clockwise
EXIF = {  # the bytes, and whether they turn the picture
    "an unsigned width of -1": (tags((0x0100, 8, 1, b"\xff\xff\0\0"), HELD), True),
    "a table beyond the end": (tags(HELD, (0x8769, 4, 1, struct.pack("<L", 9999))), True),
    "half a header": (b"Exif\0\0II*\0", False),
}


@pytest.mark.parametrize("case", EXIF)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it warns of what is odd
def test_odd_tags_of_a_camera(case):
    exif, turns = EXIF[case]
    photo = through("JPEG", COLOUR, exif=exif)
    np.testing.assert_array_equal(image_sets.to_rgb(photo), np.rot90(np.asarray(photo), -turns))


# ---- a folder of images and its cache --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for s, split in enumerate(SPLITS):
        for c, name in enumerate(CLASSES):
            for i, suffix in enumerate((".png", ".jpg", ".JPEG", ".webp")):
                save(root / split / name / f"{i}{suffix}", picture(s * 6 + c * 3 + i))
    return root


def load(root=None, split="train"):
    return image_sets.load_images("cifar10", split, root)


def check(loaded, root, split="train"):
    """loaded is what Pillow decode, in (class, file name) order."""
    paths = sorted((root / split).glob("*/[0-9]*"))
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int64
    np.testing.assert_array_equal(loaded.images, [np.asarray(Image.open(path).convert("RGB")) for path in paths])
    assert loaded.labels.tolist() == [CLASSES.index(path.parent.name) for path in paths]
    assert loaded.classes == CLASSES


def cached(folder, split="train"):
    """When the cache was written."""
    return os.stat(folder / f".{split}-32px.pt").st_mtime_ns


@pytest.mark.parametrize("split", SPLITS)
def test_folder_gives_what_pillow_decodes_and_is_decoded_once(folder, split, capsys):
    times = set()
    for _ in range(2):
        loaded = load(folder, split)
        check(loaded, folder, split)
        assert loaded.name == "pictures" and loaded.source == f"image folder {folder / split}"
        # Nothing was converted, resized or passed over: one line.
        assert capsys.readouterr().out == f"{split}: 8 images in 2 classes from {loaded.source}\n"
        times.add(cached(folder, split))
    assert len(times) == 1


def test_other_modes_and_sizes_are_converted_and_counted(folder, capsys):
    large = picture(2, (64, 48))
    save(folder / "train/ant/grey.png", Image.fromarray(GREY))
    save(folder / "train/ant/large.png", large)
    # A telephone's .jpg is often an MPO: the photo, and a second one of its depth.
    save(folder / "train/ant/phone.jpg", large, format="MPO", save_all=True, append_images=[large], exif=tags(HELD))
    grey, shrunk, phone = load(folder).images[4:7]
    np.testing.assert_array_equal(grey, GREY3)
    expected = np.asarray(large.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(shrunk, expected)
    assert abs(phone.astype(int) - np.rot90(expected, -1)).mean() < 5
    assert "2 images resized to 32x32" in capsys.readouterr().out


def test_what_is_no_image_is_passed_over_and_counted(folder, capsys):
    (folder / "train/ant/.ipynb_checkpoints").mkdir()
    for name in ("README.md", "ant/Thumbs.db", "bee/labels.txt", "ant/._0.png", "ant/.ipynb_checkpoints/0.png"):
        (folder / "train" / name).write_bytes(b"x")
    check(load(folder), folder)
    assert capsys.readouterr().out.splitlines()[:-1] == [f"{folder / 'train'}: passed over 5 files of other kinds"]


def test_class_is_one_in_both_spellings_of_unicode(tmp_path):
    for s, (split, name) in enumerate({"train": CAFE_OF_A_MAC, "test": CAFE}.items()):
        save(tmp_path / split / name / "0.png", picture(s))
        save(tmp_path / split / "caffe" / "0.png", picture(s + 7))  # before é, but behind e with an accent to come
    for s, split in [*enumerate(SPLITS)] * 2:  # decoded, and from the cache
        loaded = load(tmp_path, split)
        assert loaded.classes == ("caffe", CAFE)
        np.testing.assert_array_equal(loaded.images, [picture(s + 7), picture(s)])


SPOILT = [  # what spoils the folder, and words of the error, torchvision's or ours
    (lambda root: shutil.rmtree(root / "test/bee"), "missing bee, extra none"),
    (lambda root: save(root / "test/cow/0.png", COLOUR), "missing none, extra cow"),
    (lambda root: [(root / split / "cow").mkdir() for split in SPLITS], "no valid file for the classes cow"),
    (lambda root: (root / "train/.hidden").mkdir(), "no valid file for the classes .hidden"),
    (lambda root: shutil.rmtree(root / "test"), "test"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILT)
def test_classes_that_cannot_be_meant_are_refused(folder, spoil, words):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load(folder)


def test_images_that_cannot_be_read_are_named_in_one_error(folder):
    spoilt = [
        str(folder / "train" / name) for name in ("ant/0.png", "ant/1.jpg", "ant/3.webp", "bee/0.png", "bee/1.jpg")
    ]
    for name in spoilt[:3]:
        Path(name).write_bytes(Path(name).read_bytes()[: os.path.getsize(name) // 2])
    Path(spoilt[3]).write_bytes(b"<html>not found")
    if hasattr(os, "mkfifo"):
        Path(spoilt[4]).unlink()
        os.mkfifo(spoilt[4])  # to open it would wait for ever
        os.symlink("nowhere", folder / "train/bee/9.png")
    named = re.escape(", ".join(spoilt[: 5 if hasattr(os, "mkfifo") else 4]))
    with pytest.raises(ValueError, match=rf"cannot read {named}.*replace or delete"):
        load(folder)
    assert not list(folder.glob(".*"))  # nothing half-read is cached


def test_each_change_of_the_folder_is_seen(folder):
    times = {load(folder) and cached(folder)}
    path = folder / "train/ant/0.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000))
    times.add(load(folder) and cached(folder))
    path = path.rename(folder / "train/bee/00.png")
    check(load(folder), folder)
    times.add(cached(folder))
    path.unlink()
    check(load(folder), folder)
    times.add(cached(folder))
    if sys.platform != "win32":  # where it takes a privilege
        save(folder / "elsewhere.png", picture(1))
        os.symlink(folder / "elsewhere.png", path)
        check(load(folder), folder)
        save(folder / "elsewhere.png", picture(9))
        check(load(folder), folder)
    assert len(times) == 4


DAMAGES = {  # from what the good cache holds to another file's bytes
    "half": lambda stored: output.serialized(stored)[:9999],
    "other weights": lambda stored: output.serialized({"weight": torch.zeros(3)}),
    "another fingerprint": lambda stored: output.serialized(stored | {"fingerprint": "0"}),
    "no images": lambda stored: output.serialized(stored | {"images": None}),
    "a pickle": lambda stored: output.serialized(stored | {"images": CreatesFile()}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_cache_is_replaced_and_no_pickle_opened(folder, damage, monkeypatch):
    monkeypatch.chdir(folder)
    load(folder)
    cache = Path(".train-32px.pt")
    good = load_weights(cache)
    cache.write_bytes(DAMAGES[damage](good))
    check(load(folder), folder)
    assert load_weights(cache)["fingerprint"] == good["fingerprint"]
    assert not Path("opened").exists()


def test_no_flipped_bit_of_the_cache_reaches_the_arrays(folder):
    expected, cache = load(folder), folder / ".train-32px.pt"
    good = cache.read_bytes()
    # Headers at the start, a sample of the pixels, much of the zip's directory at the end.
    for place in [*range(0, 220, 9), *range(220, len(good), 4999), *range(len(good) - 900, len(good), 29)]:
        cache.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        np.testing.assert_array_equal(load(folder).images, expected.images)


def test_folder_that_cannot_be_written_is_read_and_not_cached(folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", full)
    check(load(folder), folder)
    assert "not cached" in (printed := capsys.readouterr().out) and "Read-only file system" in printed


# ---- the official batches --------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A cifar-10-batches-py in the official format, 2 images per split, and beside it its archive."""
    batches = tmp_path / "made" / download.FOLDER_NAME
    batches.mkdir(parents=True)
    files = {"batches.meta": {"label_names": list(CLASSES)}}
    for b, name in enumerate(("data_batch_1", "test_batch")):
        # A row is all reds of a picture, row by row, then its greens, then its blues.
        rows = [np.asarray(picture(2 * b + i)).transpose(2, 0, 1).reshape(-1) for i in (0, 1)]
        files[name] = {"labels": [0, 1], "data": np.stack(rows)}
    for name, content in files.items():
        (batches / name).write_bytes(pickle.dumps(content, protocol=2))
    md5 = {name: hashlib.md5((batches / name).read_bytes()).hexdigest() for name in files}
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    archive = batches.with_name(download.ARCHIVE_NAME)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, download.FOLDER_NAME)
    monkeypatch.setattr(download, "ARCHIVE_SIZE", archive.stat().st_size)
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(download, "SOURCES", [archive.as_uri()])
    monkeypatch.setenv("CIFAR10_ROOT", "")
    return batches


def check_official(loaded, split="train"):
    seeds = {"train": (0, 1), "test": (2, 3)}[split]
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int64
    np.testing.assert_array_equal(loaded.images, [picture(seed) for seed in seeds])
    assert loaded.labels.tolist() == [0, 1] and loaded.classes == CLASSES and loaded.name == "CIFAR-10"


def test_default_root_is_filled_and_each_place_preferred_to_those_below_it(official, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_official(load())
    monkeypatch.setattr(download, "SOURCES", [])
    shutil.rmtree(Path("data", download.FOLDER_NAME))
    check_official(load())  # from the archive that was downloaded
    Path("data", download.ARCHIVE_NAME).unlink()
    check_official(load(split="test"), "test")
    shutil.copytree(folder, "data", dirs_exist_ok=True)
    check(load(), folder)


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_tampered_pickle_is_never_opened(official, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = Path(shutil.copytree(official, tmp_path / official.name))
    (batches / name).write_bytes(pickle.dumps(CreatesFile()))
    with pytest.raises(ValueError, match=rf"{official.name} is damaged.*delete it"):
        load(tmp_path)
    assert not Path("opened").exists()


# ---- which data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argument", "variable"), [("picures", "."), (None, "picures"), ("data", ".")])
def test_root_that_was_named_and_is_not_there_is_an_error(official, tmp_path, argument, variable, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFAR10_ROOT", variable)
    with pytest.raises(ValueError, match=f"{argument or variable} is no folder"):
        load(argument)
    assert os.listdir() == ["made"]


@pytest.mark.parametrize("file", ["0.png", "ant/0.png", "Train/ant/0.png", "MNIST/raw/images", "data_batch_1"])
def test_a_named_folder_of_something_else_is_no_reason_to_download(official, tmp_path, file):
    save(tmp_path / "own" / file, COLOUR, format="PNG")
    with pytest.raises(ValueError, match=r"own holds .*train/<class>/ .*cifar-10-batches-py"):
        load(tmp_path / "own")
    assert not (tmp_path / "own" / download.FOLDER_NAME).exists()


def test_an_empty_folder_and_a_download_that_was_interrupted_are_filled(official, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/.DS_Store").touch()
    check_official(load(tmp_path / "own"))
    shutil.rmtree(tmp_path / "own" / download.FOLDER_NAME)
    (tmp_path / "own" / download.ARCHIVE_NAME).rename(tmp_path / "own" / f"{download.ARCHIVE_NAME}.part")
    check_official(load(tmp_path / "own"))


# ---- the offline sample, and validation images -----------------------------------------------------------------------


def test_digits_are_sklearns_split_once_and_for_all(digits, tmp_path):
    original = load_digits()
    large = [
        Image.fromarray(np.rint(grid / 16 * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR)
        for grid in original.images
    ]
    expected = sorted((image.convert("RGB").tobytes(), label) for image, label in zip(large, original.target))
    found = [(image.tobytes(), label) for part in digits.values() for image, label in zip(part.images, part.labels)]
    assert sorted(found) == expected  # each of sklearn's images is in exactly one of the two splits
    assert len(digits["test"].labels) == 360 and digits["test"].classes == tuple("0123456789")
    again = image_sets.load_images("digits", "test", tmp_path / "absent")  # no folder is needed
    np.testing.assert_array_equal(again.images, digits["test"].images)


def test_validation_images_are_as_many_of_each_class_and_always_the_same():
    labels = np.random.default_rng(5).permutation([0] * 30 + [1] * 20 + [4] * 11)
    training, validation = image_sets.split_validation(labels.tolist(), per_class=10)
    assert sorted(training + validation) == list(range(61))
    assert np.bincount(labels[validation]).tolist() == [10, 10, 0, 0, 10]
    # Drawn, since the order of files often means something: not the first of a class.
    assert set(np.flatnonzero(labels == 0)[:10]) - set(validation)
    assert image_sets.split_validation(labels, per_class=10) == (training, validation)
    with pytest.raises(ValueError, match="per_class is 11, but class 4 has 11 images"):
        image_sets.split_validation(labels, per_class=11)
