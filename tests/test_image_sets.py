"""image_sets.py: pictures to pixels, image folders and their cache, the official batches, digits, validation images.

The truth is what Pillow decodes, scikit-learn's own arrays, and official batches written here.
"""

import hashlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

import download
import image_sets
import output

CLASSES = ("ant", "bee")
CAFE, CAFE_OF_A_MAC = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def picture(seed, size=(32, 32)):
    """A smooth RGB picture (so that JPEG keeps it), different for each seed."""
    y, x = np.mgrid[: size[1], : size[0]]
    return np.stack([(x * 5 + seed * 40) % 256, (y * 5 + seed * 20) % 256, (x + y + seed * 60) % 256], -1).astype("u1")


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def encoded(kind, image, **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def through(kind, image, **options):
    """The image as it comes from a file of this kind."""
    return Image.open(io.BytesIO(encoded(kind, image, **options)))


def test_torch_is_not_imported():
    """It is slow to import, and not needed for arrays."""
    code = "import image_sets, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(image_sets.__file__).parent, check=True)


# ---- to_rgb: any picture to uint8 (32, 32, 3) ------------------------------------------------------------------------

COLOUR = Image.fromarray(picture(1))
GREY = picture(1)[..., 0]
GREY3 = np.stack([GREY] * 3, -1)
GREY16 = Image.fromarray(GREY.astype(np.uint16) * 257)
MODES = {
    "RGB": (COLOUR, picture(1)),
    "L": (Image.fromarray(GREY), GREY3),
    "1": (Image.fromarray(GREY > 127), np.where(GREY3 > 127, 255, 0)),
    "P": (COLOUR.quantize(256), np.asarray(COLOUR.quantize(256).convert("RGB"))),
    "CMYK": (COLOUR.convert("CMYK"), picture(1)),
    "I;16": (GREY16, GREY3),
    "I;16B": (Image.fromarray(GREY.astype(">u2") * 257), GREY3),
    "16-bit PNG": (through("PNG", GREY16), GREY3),
    "I": (Image.fromarray(GREY.astype(np.int32) * 257), GREY3),
    "I of 8 bits": (Image.fromarray(GREY.astype(np.int32)), GREY3),
    "F": (Image.fromarray((GREY / 255).astype(np.float32)), GREY3),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode(mode):
    image, expected = MODES[mode]
    array = image_sets.to_rgb(image)
    assert array.dtype == np.uint8 and array.flags.writeable
    np.testing.assert_array_equal(array, expected)
    assert image_sets.to_rgb(image, size=8).shape == (8, 8, 3)


@pytest.mark.parametrize("value", [255.0, -0.1, np.nan])
def test_pictures_that_have_no_colours(value):
    with pytest.raises(ValueError, match=r"floating-point from .*must be from 0 to 1"):
        image_sets.to_rgb(Image.fromarray(np.full((8, 8), value, np.float32)))
    with pytest.raises(ValueError, match="no pixels, its size is 0x8"):
        image_sets.to_rgb(Image.new("RGB", (0, 8)))


def right_half_clear(mode, left, clear):
    image = Image.new(mode, (32, 32), clear)
    image.paste(left, (0, 0, 16, 32))
    return image


RED_AND_BLUE = right_half_clear("P", 1, 0)
RED_AND_BLUE.putpalette([255, 0, 0, 0, 0, 255])
CLEAR = {  # transparent on the right, and the colour on the left
    "RGBA": (right_half_clear("RGBA", (0, 0, 255, 255), (255, 0, 0, 0)), (0, 0, 255)),
    "LA": (right_half_clear("LA", (9, 255), (0, 0)), (9, 9, 9)),
    "P": (through("PNG", RED_AND_BLUE, transparency=0), (0, 0, 255)),
    "half": (right_half_clear("RGBA", (0, 0, 0, 128), (0, 0, 0, 0)), (127, 127, 127)),
}


@pytest.mark.parametrize("mode", CLEAR)
def test_transparency_goes_over_white(mode):
    image, left = CLEAR[mode]
    array = image_sets.to_rgb(image)
    assert (array[:, :16] == left).all() and (array[:, 16:] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_shrinking_averages(mode):
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)  # without antialiasing: all 0 or all 255
    array = image_sets.to_rgb(Image.fromarray(checks).convert(mode))
    assert abs(array.astype(int) - 127).max() <= 3


# ---- to_rgb: how the camera was held ---------------------------------------------------------------------------------


def tags(*entries, order="<"):
    """EXIF bytes by hand; an entry is (tag, type, count, its four bytes)."""
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, len(entries))
    entries = [struct.pack(order + "HHL", *numbers) + value for *numbers, value in entries]
    return b"Exif\0\0" + start + b"".join(entries) + b"\0" * 4


HELD = (0x0112, 3, 1, b"\6\0\0\0")  # turn by 90 degrees clockwise
BEYOND = struct.pack("<L", 9999)  # where a value should be, but the file ends before
EXIF = {  # the bytes, and whether they turn the picture
    "an unsigned width of -1": (
        b"Exif\0\0II*\0\x08\0\0\0\x02\0\0\x01\x08\0\x01\0\0\0\xff\xff\0\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
        True,
    ),
    "a time zone of -1": (tags(HELD, (0x882A, 9, 1, b"\xff\xff\xff\xff")), True),
    "a tag of no known type": (tags((0x010F, 99, 20, BEYOND), HELD), True),
    "a text beyond the end": (tags(HELD, (0x0131, 2, 20, BEYOND)), True),
    "a table beyond the end": (tags(HELD, (0x8769, 4, 1, BEYOND)), True),
    "a position as text": (tags(HELD, (0x8825, 2, 4, b"here")), True),
    "cut off in the next tag": (tags(HELD, HELD)[:-10], True),
    "cut off before it": (tags(HELD)[:18], False),
    "big-endian": (tags((0x0112, 3, 1, b"\0\6\0\0"), order=">"), True),
    "32 bits": (tags((0x0112, 4, 1, b"\6\0\0\0")), True),
    "0": (tags((0x0112, 3, 1, b"\0\0\0\0")), False),
    "9": (tags((0x0112, 3, 1, b"\x09\0\0\0")), False),
    "a text": (tags((0x0112, 2, 2, b"6\0\0\0")), False),
    "a fraction": (tags((0x0112, 5, 1, b"\x08\0\0\0")), False),
    "half a header": (b"Exif\0\0II*\0", False),
    "no header": (b"Exif\0\0camera, held on its side", False),
}


@pytest.mark.parametrize("case", EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it warns of what is odd
def test_odd_tags_of_a_camera(kind, case):
    exif, turns = EXIF[case]
    photo = through(kind, Image.fromarray(picture(3)), exif=exif)
    np.testing.assert_array_equal(image_sets.to_rgb(photo), np.rot90(np.asarray(photo), -turns))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_each_way_of_holding_a_camera(kind, orientation):
    photo = through(kind, Image.fromarray(picture(3)), exif=tags((0x0112, 3, 1, bytes([orientation, 0, 0, 0]))))
    np.testing.assert_array_equal(image_sets.to_rgb(photo), np.asarray(ImageOps.exif_transpose(photo)))


@pytest.mark.parametrize("image", [GREY16, *map(COLOUR.convert, ("1", "L", "P", "RGBA"))], ids=lambda image: image.mode)
def test_each_mode_is_turned(image):
    turned = image_sets.to_rgb(through("PNG", image, exif=tags(HELD)))
    np.testing.assert_array_equal(turned, np.rot90(image_sets.to_rgb(image), -1))


# ---- a folder of images ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for s, split in enumerate(("train", "test")):
        for c, name in enumerate(CLASSES):
            for i, suffix in enumerate((".png", ".jpg", ".JPEG", ".webp")):
                save(root / split / name / f"{i}{suffix}", picture(s * 6 + c * 3 + i))
    return root


def load(root, split="train"):
    return image_sets.load_images("cifar10", split, root)


def check(loaded, root, split="train"):
    """loaded is what Pillow decodes, in (class, file name) order."""
    paths = [path for path in (root / split).glob("*/[!.]*") if path.suffix in (".png", ".jpg", ".JPEG", ".webp")]
    paths.sort(key=lambda path: (path.parent.name, path.name))
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int64
    np.testing.assert_array_equal(loaded.images, [np.asarray(Image.open(path).convert("RGB")) for path in paths])
    assert loaded.labels.tolist() == [CLASSES.index(path.parent.name) for path in paths]
    assert loaded.classes == CLASSES


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_gives_what_pillow_decodes(folder, split, capsys):
    loaded = load(folder, split)
    check(loaded, folder, split)
    assert loaded.name == "pictures" and loaded.source == f"image folder {folder / split}"
    # Nothing was converted, resized or passed over: one line.
    assert capsys.readouterr().out == f"{split}: 8 images in 2 classes from {loaded.source}\n"


def test_other_modes_and_sizes_are_converted_and_counted(folder, capsys):
    large = Image.fromarray(picture(2, (64, 48)))
    save(folder / "train/ant/grey.png", GREY)
    save(folder / "train/ant/large.png", large)
    save(folder / "train/ant/large_grey.png", large.convert("L"))
    # A telephone's .jpg is often an MPO: the photo, and a second one of its depth.
    save(folder / "train/ant/phone.jpg", large, format="MPO", save_all=True, append_images=[large], exif=tags(HELD))
    grey, shrunk, _, phone = load(folder).images[4:8]
    np.testing.assert_array_equal(grey, GREY3)
    expected = np.asarray(large.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(shrunk, expected)
    assert abs(phone.astype(int) - np.rot90(expected, -1)).mean() < 5
    assert "2 images converted to RGB, 3 resized to 32x32" in capsys.readouterr().out


def test_what_is_no_image_is_passed_over_and_named_in_one_line(folder, capsys):
    others = ("README.md", "ant/Thumbs.db", "ant/desktop.ini", "bee/folder.ico", "bee/labels.txt")
    for name in (*others, ".DS_Store", "ant/._0.png"):
        (folder / "train" / name).write_bytes(b"x")
    (folder / "train/ant/.ipynb_checkpoints").mkdir()
    check(load(folder), folder)
    assert capsys.readouterr().out.splitlines()[:-1] == [f"{folder / 'train'}: passed over {', '.join(others)}"]
    (folder / "train/bee/0").touch()
    load(folder)
    assert "bee/0, bee/folder.ico, … (6 in all)" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["train", "train/ant"])
@pytest.mark.parametrize(
    "suffix", [".gif", ".BMP", ".tif", ".tiff", ".heic", ".HEIF", ".avif", ".jfif", ".svg", ".dng"]
)
def test_images_that_are_not_read_are_not_passed_over(folder, place, suffix):
    (folder / place / f"photo{suffix}").touch()
    with pytest.raises(ValueError, match=rf"photo{suffix} in .*end in \.png, \.jpg, .*convert"):
        load(folder)


@pytest.mark.parametrize(("of_train", "of_test"), [(CAFE, CAFE_OF_A_MAC), (CAFE_OF_A_MAC, CAFE)])
def test_class_is_one_in_both_spellings_of_unicode(tmp_path, of_train, of_test):
    for s, (split, name) in enumerate({"train": of_train, "test": of_test}.items()):
        save(tmp_path / split / name / "0.png", picture(s))
        save(tmp_path / split / "$5_$10" / "0.png", picture(s + 5))
        save(tmp_path / split / "caffe" / "0.png", picture(s + 7))  # before é, but behind e with an accent to come
    for s, split in [*enumerate(("train", "test"))] * 2:  # decoded, and from the cache
        loaded = load(tmp_path, split)
        assert loaded.classes == ("$5_$10", "caffe", CAFE)
        np.testing.assert_array_equal(loaded.images, [picture(s + 5), picture(s + 7), picture(s)])


def leave(folder, *files):
    """The folder holds these empty files and nothing else."""
    shutil.rmtree(folder)
    folder.mkdir()
    for file in files:
        (folder / file).touch()


def spelt_twice(root):
    for name in ("train/ant", "test/ant"):
        (root / name).rename((root / name).with_name(CAFE))
    save(root / "train" / CAFE_OF_A_MAC / "0.png", picture(0))
    if len(os.listdir(root / "train")) == 2:
        pytest.skip("this file system takes both spellings for one")


LAYOUT = "/<class>/<name>.png or .jpg"
LARGE = Image.fromarray(picture(0, (320, 320)))
JPEG, PNG, WEBP = (encoded(kind, LARGE) for kind in ("JPEG", "PNG", "WEBP"))
SPOILT = {  # what spoils the folder, and words that the error must have
    "test lacks a class": (lambda root: shutil.rmtree(root / "test/bee"), "missing bee, extra none"),
    "test has another class": (lambda root: save(root / "test/cow/0.png", GREY), "missing none, extra cow"),
    "a class is empty": (lambda root: leave(root / "train/bee", ".0.png"), "no images in bee", "add some, or delete"),
    "train has no classes": (lambda root: leave(root / "train", "0.png"), "no images", f"train{LAYOUT}"),
    "train is absent": (lambda root: shutil.rmtree(root / "train"), "no images", f"train{LAYOUT}"),
    "test is absent": (lambda root: shutil.rmtree(root / "test"), "no images", f"test{LAYOUT}"),
    "an image beside classes": (lambda root: save(root / "train/0.webp", GREY), "0.webp in", "train/<class>/"),
    "one class in two spellings": (spelt_twice, "two folders for café", "move the images of one into the other"),
    "a folder in a class": (lambda root: (root / "train/ant/more.png").mkdir(), "ant/more.png", "move it away"),
    "six bad images": (lambda root: leave(root / "train/ant", *map("{}.jpg".format, range(6))), "4.jpg, … (6 in all)"),
}
BAD_IMAGES = {
    "zero bytes": b"",
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "half a PNG": PNG[: len(PNG) // 2],
    "half a WebP": WEBP[: len(WEBP) // 2],
    "a flipped bit in the size": PNG[:19] + bytes([PNG[19] ^ 1]) + PNG[20:],
    "60,000 x 60,000 pixels": PNG[:16] + (60_000).to_bytes(4, "big") * 2 + PNG[24:],
    "a web page": b"<html>not found",
    "a GIF": encoded("GIF", LARGE),
}
for case, content in BAD_IMAGES.items():
    words = "cannot read bee/0.png in", "only whole PNG, JPEG and WebP images", "replace or delete"
    SPOILT[case] = lambda root, content=content: (root / "train/bee/0.png").write_bytes(content), *words


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_folder_gives_one_error_that_names_what_is_wrong(folder, case):
    spoil, *words = SPOILT[case]
    spoil(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError) as error:
        load(folder)
    assert [word for word in (str(folder), *words) if word not in str(error.value)] == []
    assert sorted(folder.rglob("*")) == before  # nothing half-read is cached


# ---- its cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def decodes(monkeypatch):
    """The list of the splits that were decoded."""
    calls, real = [], image_sets._decode
    monkeypatch.setattr(image_sets, "_decode", lambda where, files: calls.append(where.name) or real(where, files))
    return calls


@pytest.fixture
def cache(folder, decodes):
    load(folder)
    return folder / ".train-32px.npz"


def arrays_of(cache):
    with np.load(cache, allow_pickle=False) as stored:
        return dict(stored)


def npz(**arrays):
    np.savez(file := io.BytesIO(), **arrays)
    return file.getvalue()


def test_cache_is_one_plain_file_per_split_and_saves_decoding(folder, cache, decodes):
    loaded = load(folder)
    check(loaded, folder)
    for _ in range(2):
        check(load(folder, "test"), folder, "test")
    assert decodes == ["train", "test"]
    assert sorted(folder.glob(".*")) == [folder / ".test-32px.npz", cache]
    np.testing.assert_array_equal(arrays_of(cache)["images"], loaded.images)


def change_size(path):
    times = (0, path.stat().st_mtime_ns)
    save(path, np.zeros((32, 32, 3), np.uint8))
    os.utime(path, ns=times)  # so that the size alone must tell


CHANGES = {
    "size": change_size,
    "time": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000)),
    "added": lambda path: shutil.copy2(path, path.with_name("00.png")),
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("9.png")),
    "another class": lambda path: path.rename(path.parents[1] / "bee/00.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folder_is_decoded_anew(folder, cache, decodes, change):
    CHANGES[change](folder / "train/ant/0.png")
    for _ in range(2):
        check(load(folder), folder)
    assert decodes == ["train", "train"]


class CreatesFile:
    """A pickle that makes the file "opened" when it is opened."""

    def __reduce__(self):
        return Path.touch, (Path("opened"),)


EVIL = np.array([CreatesFile()], dtype=object)
DAMAGES = {  # from the good file's bytes and its arrays to another file's bytes
    "zero bytes": lambda good, arrays: b"",
    "half": lambda good, arrays: good[: len(good) // 2],
    "text": lambda good, arrays: b"not a cache",
    "another npz": lambda good, arrays: npz(weights=np.zeros(3)),
    "other shape": lambda good, arrays: npz(**arrays | {"images": arrays["images"].transpose(0, 3, 1, 2)}),
    "other dtype": lambda good, arrays: npz(**arrays | {"images": arrays["images"] / 255}),
    "other labels": lambda good, arrays: npz(**arrays | {"labels": arrays["labels"][::-1]}),
    "other classes": lambda good, arrays: npz(**arrays | {"classes": arrays["classes"][::-1]}),
}
for member in ("images", "labels", "classes", "fingerprint"):
    DAMAGES[f"pickled {member}"] = lambda good, arrays, member=member: npz(**arrays | {member: EVIL})


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_cache_is_replaced_and_no_pickle_opened(folder, cache, decodes, damage, monkeypatch):
    monkeypatch.chdir(folder)
    cache.write_bytes(DAMAGES[damage](cache.read_bytes(), arrays_of(cache)))
    for _ in range(2):
        check(load(folder), folder)
    assert decodes == ["train", "train"]  # the replacement is good
    assert not Path("opened").exists()


def test_no_flipped_bit_of_the_cache_reaches_the_arrays(folder, cache):
    good, expected = cache.read_bytes(), load(folder)
    # Headers at the start, a sample of the pixels, much of the zip's directory at the end.
    for place in [*range(0, 220, 2), *range(220, len(good), 1997), *range(len(good) - 900, len(good), 13)]:
        cache.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        loaded = load(folder)
        np.testing.assert_array_equal(loaded.images, expected.images)
        np.testing.assert_array_equal(loaded.labels, expected.labels)


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), OSError(28, "No space left on device")])
def test_folder_that_cannot_be_written_is_read_and_not_cached(folder, error, monkeypatch, capsys):
    monkeypatch.setattr(output, "open", Mock(side_effect=error), raising=False)
    check(load(folder), folder)
    assert "not cached" in (printed := capsys.readouterr().out) and error.strerror in printed
    assert not list(folder.glob(".*"))


# ---- the official batches --------------------------------------------------------------------------------------------

OFFICIAL_CLASSES = ("aero", "boat")
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def official_picture(index):
    """Rows, columns and colours all told apart: red falls by row, green rises by column, blue is the index."""
    return np.array([[(250 - 3 * row, 7 * column, index) for column in range(32)] for row in range(32)], np.uint8)


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A cifar-10-batches-py in the official format, 2 images per batch, and its archive, both outside of any root."""
    batches = tmp_path / "made" / download.FOLDER_NAME
    batches.mkdir(parents=True)
    files = {"batches.meta": {"label_names": list(OFFICIAL_CLASSES)}}
    for b, name in enumerate(BATCHES):  # a row is all reds of a picture, row by row, then its greens, then its blues
        rows = [official_picture(2 * b + i).transpose(2, 0, 1).reshape(-1) for i in (0, 1)]
        files[name] = {"labels": [0, 1], "data": np.stack(rows)}
    for name, content in files.items():
        (batches / name).write_bytes(pickle.dumps(content, protocol=2))
    md5 = {name: hashlib.md5((batches / name).read_bytes()).hexdigest() for name in files}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in BATCHES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    archive = batches.parent / download.ARCHIVE_NAME
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, download.FOLDER_NAME)
    monkeypatch.setattr(download, "ARCHIVE_SIZE", archive.stat().st_size)
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(download, "_download", lambda *_: pytest.fail("downloaded"))
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    return batches


@pytest.fixture
def network(official, monkeypatch):
    """The archive can be downloaded."""
    made = official.parent / download.ARCHIVE_NAME
    monkeypatch.setattr(download, "_download", lambda archive, sources: shutil.copy(made, archive))


def check_official(loaded, split="train"):
    indices = range(10) if split == "train" else range(10, 12)
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int64
    assert loaded.images.flags.c_contiguous
    np.testing.assert_array_equal(loaded.images, np.stack([official_picture(index) for index in indices]))
    assert loaded.labels.tolist() == [0, 1] * (len(indices) // 2)
    assert loaded.classes == OFFICIAL_CLASSES and loaded.name == "CIFAR-10"


def test_each_place_is_preferred_to_those_below_it(network, folder, tmp_path, monkeypatch, capsys):
    archive, batches = tmp_path / download.ARCHIVE_NAME, tmp_path / download.FOLDER_NAME
    check_official(downloaded := load(tmp_path))
    assert downloaded.source == f"official archive {archive}, downloaded"
    monkeypatch.setattr(download, "_download", lambda *_: pytest.fail("downloaded"))
    shutil.rmtree(batches)
    check_official(unpacked := load(tmp_path))
    assert unpacked.source == f"official archive {archive}"
    monkeypatch.setattr(download, "extract_archive", lambda *_: pytest.fail("extracted"))
    for split in ("train", "test"):  # folder and archive
        check_official(read := load(tmp_path, split), split)
        assert read.source == f"official batches in {batches}"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)  # images, folder and archive
    check(load(tmp_path), folder)
    printed = capsys.readouterr().out
    assert all(loaded.source in printed for loaded in (downloaded, unpacked, read))


@pytest.mark.parametrize("name", [*BATCHES, "batches.meta"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_tampered_pickle_is_never_opened(official, tmp_path, name, split, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(evil := pickle.dumps(CreatesFile()))
    Path("opened").unlink()  # fails unless the pickle works
    batches = Path(shutil.copytree(official, tmp_path / official.name))
    (batches / name).write_bytes(evil)
    with pytest.raises(ValueError, match=rf"{official.name} is damaged.*delete it.*{download.ARCHIVE_NAME}"):
        load(tmp_path, split)
    assert not Path("opened").exists()


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x"), Path.unlink], ids=["tampered", "missing"])
def test_damaged_batches_are_unpacked_anew_from_a_good_archive_beside_them(official, tmp_path, damage, capsys):
    shutil.copytree(official, tmp_path / official.name)
    archive = Path(shutil.copy(official.parent / download.ARCHIVE_NAME, tmp_path))
    damage(tmp_path / official.name / "test_batch")
    check_official(load(tmp_path))
    assert "is damaged" in capsys.readouterr().out
    check_official(load(tmp_path))
    assert "is damaged" not in capsys.readouterr().out
    damage(tmp_path / official.name / "test_batch")
    archive.write_bytes(b"x")
    with pytest.raises(download.DownloadError, match=download.ARCHIVE_NAME):
        load(tmp_path)


# ---- which data ------------------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown dataset 'cifar': there is 'cifar10' and 'digits'"):
        image_sets.load_images("cifar", "train")
    with pytest.raises(ValueError, match=r"unknown split 'valid': there is 'train' and 'test'"):
        image_sets.load_images("digits", "valid")


def test_root_is_the_argument_then_the_environment_variable_then_data(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in ("argument", "variable", "data"):
        shutil.copytree(folder, name)
    monkeypatch.setenv("CIFAR10_ROOT", "variable")
    assert [load("argument").name, load(None).name] == ["argument", "variable"]
    monkeypatch.setenv("CIFAR10_ROOT", "")
    assert load(None).name == "data"
    monkeypatch.delenv("CIFAR10_ROOT")
    assert load(None).name == "data"


@pytest.mark.parametrize("name", ["picures", "no/such/folder", "~/no such folder", "data"])
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_root_that_was_named_and_is_not_there_is_an_error(network, tmp_path, name, by, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CIFAR10_ROOT", name if by == "variable" else ".")
    with pytest.raises(ValueError, match=f"no folder .*{Path(name).name};.*CIFAR10_ROOT.*make it first"):
        load(name if by == "argument" else None)
    assert os.listdir() == ["made"]


@pytest.mark.parametrize("root", ["data", "empty"])
def test_default_root_is_made_and_an_empty_folder_is_filled(network, tmp_path, root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if root == "empty":
        Path(root).mkdir()
        monkeypatch.setenv("CIFAR10_ROOT", root)
    check_official(load(None))
    assert {path.name for path in Path(root).iterdir()} >= {download.ARCHIVE_NAME, download.FOLDER_NAME}


def with_capitals(root):
    for split in ("train", "test"):
        (root / split).rename(root / "moving").rename(root / split.upper())
    return root


MISPLACED = {
    "TRAIN and TEST": with_capitals,
    "classes alone": lambda root: Path(shutil.copytree(root / "train", root / "classes")),
    "inside train": lambda root: root / "train",
    "inside a class": lambda root: root / "train/ant",
}


@pytest.mark.parametrize("case", MISPLACED)
def test_images_in_the_wrong_folders_are_no_reason_to_download_others(network, folder, case):
    root = MISPLACED[case](folder)
    if (root / "train").is_dir():
        pytest.skip("this file system takes TRAIN for train")
    with pytest.raises(ValueError, match=r"no folders train and test, but .*/train/<class>/.*CIFAR10_ROOT"):
        load(root)


def test_other_data_beside_it_does_not_keep_cifar10_away(network, tmp_path):
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    for name in ("flowers/rose/1.png", "figures/plot.png", "plot.png"):
        save(tmp_path / name, GREY)
    check_official(load(tmp_path))


# ---- the offline sample, and validation images -----------------------------------------------------------------------


def test_digits_are_sklearns_split_once_and_for_all(digits, tmp_path, capsys):
    train, test = digits["train"], digits["test"]
    original, expected = load_digits(), []
    for grid, label in zip(original.images, original.target):
        grey = Image.fromarray(np.rint(grid / 16 * 255).astype(np.uint8))
        large = np.asarray(grey.resize((32, 32), Image.Resampling.BILINEAR))
        expected.append((np.repeat(large[..., None], 3, -1).tobytes(), int(label)))
    found = [(image.tobytes(), int(y)) for part in (train, test) for image, y in zip(part.images, part.labels)]
    assert sorted(found) == sorted(expected)  # each of sklearn's images is in exactly one of the two splits
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert (abs(np.bincount(test.labels) - 360 / 1797 * np.bincount(original.target)) <= 1).all()
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int64
    assert train.classes == tuple("0123456789") and train.name == "digits (offline sample)"
    np.random.seed(1)  # the split must not hang on it, nor on any folder
    again = image_sets.load_images("digits", "test", tmp_path / "absent")
    np.testing.assert_array_equal(again.images, test.images)
    np.testing.assert_array_equal(again.labels, test.labels)
    assert again.source in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [np.array, list])
def test_validation_images_are_as_many_of_each_class_and_always_the_same(kind):
    labels = np.random.default_rng(5).permutation([0] * 30 + [1] * 20 + [4] * 11)
    training, validation = image_sets.split_validation(kind(labels), per_class=10)
    assert sorted(training + validation) == list(range(61))
    assert np.bincount(labels[validation]).tolist() == [10, 10, 0, 0, 10]
    assert training == sorted(training) and validation == sorted(validation)
    # Drawn, since the order of files often means something: not the first of a class.
    assert set(np.flatnonzero(labels == 0)[:10]) - set(validation)
    np.random.seed(5)
    assert image_sets.split_validation(labels, per_class=10) == (training, validation)


@pytest.mark.parametrize("per_class", [20, 500])
def test_validation_leaves_something_of_each_class_to_train_on(per_class):
    with pytest.raises(ValueError, match=f"per_class is {per_class}, but class 7 has 20 images"):
        image_sets.split_validation(np.repeat([3, 7], [600, 20]), per_class)
