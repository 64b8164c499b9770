"""image_sets.py against independent truth: pictures made here, Pillow's own decoding, scikit-learn's own arrays."""

import contextlib
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

import download
import image_sets

REPOSITORY = Path(image_sets.__file__).parent
CLASSES = ("ant", "bee")


def picture(seed, size=(32, 32)):
    """A smooth RGB picture (so that JPEG keeps it), different for each seed."""
    y, x = np.mgrid[: size[1], : size[0]]
    return np.stack([(x * 5 + seed * 40) % 256, (y * 5 + seed * 20) % 256, (x + y + seed * 60) % 256], -1).astype("u1")


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for s, split in enumerate(("train", "test")):
        for c, name in enumerate(CLASSES):
            for i in range(3):
                save(root / split / name / f"{i}{('.png', '.jpg', '.JPEG')[i]}", picture(s * 6 + c * 3 + i))
    return root


def truth(root, split):
    """What Pillow decodes, in (class, file name) order."""
    paths = sorted((root / split).glob("*/*"), key=lambda path: (path.parent.name, path.name))
    paths = [path for path in paths if not path.name.startswith(".")]
    labels = [CLASSES.index(path.parent.name) for path in paths]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]), np.array(labels)


def check(loaded, root, split):
    images, labels = truth(root, split)
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int64
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)
    assert loaded.classes == CLASSES


def load(root, split="train"):
    return image_sets.load_images("cifar10", split, root)


@pytest.fixture
def decodes(monkeypatch):
    """The list of the splits that were decoded."""
    calls, real = [], image_sets._decode
    monkeypatch.setattr(image_sets, "_decode", lambda where, files: calls.append(where.name) or real(where, files))
    return calls


# ---- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "split", "words"),
    [("cifar", "train", ["'cifar'", "cifar10", "digits"]), ("digits", "valid", ["'valid'", "train", "test"])],
)
def test_unknown_names_are_answered_with_the_known_ones(dataset, split, words, tmp_path):
    with pytest.raises(ValueError, match="unknown") as error:
        image_sets.load_images(dataset, split, tmp_path)
    assert all(word in str(error.value) for word in words)


def test_root_is_the_environment_variable_then_data(folder, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(folder))
    check(load(None), folder, "train")
    monkeypatch.delenv("CIFAR10_ROOT")
    shutil.copytree(folder, folder.parent / "data")
    monkeypatch.chdir(folder.parent)
    assert load(None).name == "data folder"


# ---- folder of images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_gives_what_pillow_decodes_in_order(folder, split, capsys):
    loaded = load(folder, split)
    check(loaded, folder, split)
    assert loaded.name == "pictures folder" and str(folder) in loaded.source
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and loaded.source in printed  # nothing was converted or resized: one line


def test_order_does_not_depend_on_the_file_system(folder, monkeypatch):
    scandir = os.scandir

    @contextlib.contextmanager
    def backwards(path):
        with scandir(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", backwards)
    loaded = load(folder)
    monkeypatch.undo()
    check(loaded, folder, "train")


def test_hidden_files_and_folders_are_ignored(folder):
    for where in (folder, folder / "train", folder / "train" / "ant", folder / "test"):
        (where / ".DS_Store").write_bytes(b"x")
        (where / ".ipynb_checkpoints").mkdir()
    check(load(folder), folder, "train")


def test_other_modes_and_sizes_are_converted_and_counted(folder, capsys):
    grey = Image.fromarray(picture(1)[..., 0])
    save(folder / "train/ant/grey.png", grey)
    save(folder / "train/ant/large.png", picture(2, (64, 48)))
    save(folder / "train/ant/large_grey.png", grey.resize((40, 40)))
    loaded = load(folder)
    assert "2 images converted to RGB, 2 resized to 32x32" in capsys.readouterr().out
    images = dict(zip(["0", "1", "2", "grey", "large", "large_grey"], loaded.images[:6], strict=True))
    np.testing.assert_array_equal(images["grey"], np.stack([np.asarray(grey)] * 3, -1))
    half = Image.fromarray(picture(2, (64, 48))).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(images["large"], np.asarray(half))


def halve(path, **options):
    save(path, picture(0, (320, 320)), **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".hidden.png").touch()


BAD_FOLDERS = {  # what breaks it, and words that the error must have
    "test lacks a class": (lambda root: shutil.rmtree(root / "test/bee"), "missing bee", "extra none"),
    "test has another class": (lambda root: save(root / "test/cow/0.png", picture(0)), "missing none", "extra cow"),
    "train lacks a class": (lambda root: shutil.rmtree(root / "train/bee"), "missing none", "extra bee"),
    "class is empty": (lambda root: empty(root / "train/bee"), "no images", "bee", "add"),
    "train is empty": (lambda root: empty(root / "train"), "no images", "/train", "<class>/<name>.png or .jpg"),
    "test is empty": (lambda root: empty(root / "test"), "no images", "/test", "<class>/<name>.png or .jpg"),
    "train is absent": (lambda root: shutil.rmtree(root / "train"), "no images", "/train"),
    "test is absent": (lambda root: shutil.rmtree(root / "test"), "no images", "/test"),
    "stray file": (lambda root: (root / "train/ant/Thumbs.db").touch(), "ant/Thumbs.db", ".png, .jpg", "move"),
    "stray folder": (lambda root: (root / "train/ant/more.png").mkdir(), "ant/more.png"),
    "dead link": (lambda root: (root / "train/ant/link.png").symlink_to("nowhere"), "ant/link.png"),
    "image outside a class": (lambda root: save(root / "train/0.png", picture(0)), "0.png", "class folders", "move"),
    "many stray files": (
        lambda root: [(root / f"train/ant/{i}.txt").touch() for i in range(6)],
        *("ant/0.txt", "ant/4.txt", "6 in all"),
    ),
    "zero bytes": (lambda root: (root / "train/bee/0.png").write_bytes(b""), "bee/0.png", "PNG and JPEG"),
    "half a JPEG": (lambda root: halve(root / "train/bee/1.jpg"), "bee/1.jpg", "truncated", "replace or delete"),
    "half a PNG": (lambda root: halve(root / "train/bee/0.png"), "bee/0.png", "replace or delete"),
    "no image": (lambda root: (root / "train/bee/0.png").write_text("<html>not found"), "bee/0.png", "PNG and JPEG"),
    "another format": (lambda root: save(root / "train/bee/0.png", picture(0), format="BMP"), "bee/0.png", "PNG and"),
    "many bad images": (
        lambda root: [
            (root / f"train/{name}.png").write_bytes(b"") for name in ("bee/0", *map("ant/b{}".format, "01234"))
        ],
        *("ant/b0.png", "ant/b4.png", "6 in all"),
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_give_one_error_that_names_what_is_wrong(folder, case):
    spoil, *words = BAD_FOLDERS[case]
    spoil(folder)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert [word for word in [str(folder), *words] if word not in str(error.value)] == []
    assert not list(folder.glob(".*"))  # and nothing half-read is cached


def test_unreadable_file_is_named(folder, monkeypatch):
    real = Image.open

    def refuse(path, **options):
        if Path(path).name == "1.jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"ant/1\.jpg, bee/1\.jpg .*Permission denied"):
        load(folder)


# ---- cache -----------------------------------------------------------------------------------------------------


def test_cache_is_one_plain_file_a_split_and_saves_decoding(folder, decodes):
    first = load(folder)
    load(folder, "test")
    assert sorted(path.name for path in folder.glob(".*")) == [".test-32px.npz", ".train-32px.npz"]
    with np.load(folder / ".train-32px.npz", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["images"], first.images)
        np.testing.assert_array_equal(stored["labels"], first.labels)
        assert tuple(stored["classes"]) == CLASSES
    assert decodes == ["train", "test"]
    check(load(folder), folder, "train")
    check(load(folder, "test"), folder, "test")
    assert decodes == ["train", "test"]


def change_size(path):
    times = (0, path.stat().st_mtime_ns)
    save(path, np.zeros((32, 32, 3), np.uint8))
    os.utime(path, ns=times)  # so that the size alone must tell


CHANGES = {
    "size": change_size,
    "time": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
    "added": lambda path: shutil.copy2(path, path.with_name("00.png")),
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("9.png")),
    "another class": lambda path: path.rename(path.parents[1] / "bee/00.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folder_is_decoded_anew(folder, decodes, change):
    load(folder)
    CHANGES[change](folder / "train/ant/0.png")
    check(load(folder), folder, "train")
    check(load(folder), folder, "train")
    assert decodes == ["train", "train"]


def npz(**arrays):
    np.savez(file := io.BytesIO(), **arrays)
    return file.getvalue()


DAMAGES = {  # from the good file's bytes and its arrays to another file's bytes
    "zero bytes": lambda good, arrays: b"",
    "half": lambda good, arrays: good[: len(good) // 2],
    "text": lambda good, arrays: b"not a cache",
    "flipped bit": lambda good, arrays: good[:9999] + bytes([good[9999] ^ 1]) + good[10000:],
    "another npz": lambda good, arrays: npz(weights=np.zeros(3)),
    "a pickle": lambda good, arrays: pickle.dumps(arrays),
    "other shape": lambda good, arrays: npz(**arrays | {"images": arrays["images"].transpose(0, 3, 1, 2)}),
    "other dtype": lambda good, arrays: npz(**arrays | {"images": arrays["images"] / 255}),
    "other labels": lambda good, arrays: npz(**arrays | {"labels": arrays["labels"][::-1]}),
    "other classes": lambda good, arrays: npz(**arrays | {"classes": arrays["classes"][::-1]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_cache_is_replaced(folder, decodes, damage):
    load(folder)
    cache = folder / ".train-32px.npz"
    with np.load(cache) as stored:
        arrays = dict(stored)
    cache.write_bytes(DAMAGES[damage](cache.read_bytes(), arrays))
    check(load(folder), folder, "train")
    assert decodes == ["train", "train"]
    check(load(folder), folder, "train")
    assert decodes == ["train", "train"]  # the replacement is good


class CreatesFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("member", ["images", "labels", "classes", "fingerprint"])
def test_pickle_inside_a_cache_is_never_opened(folder, tmp_path, member):
    load(folder)
    with np.load(folder / ".train-32px.npz") as stored:
        arrays = dict(stored)
    arrays[member] = np.array([CreatesFile(tmp_path / "opened")], dtype=object)
    (folder / ".train-32px.npz").write_bytes(npz(**arrays))
    check(load(folder), folder, "train")
    assert not (tmp_path / "opened").exists()


def test_no_flipped_bit_of_the_cache_reaches_the_arrays(folder):
    load(folder)
    cache = folder / ".train-32px.npz"
    good = cache.read_bytes()
    expected = truth(folder, "train")
    # All bytes of the headers at the start, many of the zip's directory at the end, and a sample of the rest.
    for place in [*range(220), *range(220, len(good), 997), *range(len(good) - 900, len(good), 9)]:
        cache.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        loaded = load(folder)
        np.testing.assert_array_equal(loaded.images, expected[0])
        np.testing.assert_array_equal(loaded.labels, expected[1])


@pytest.mark.parametrize(("where", "call"), [(image_sets, "open"), (np, "savez"), (os, "replace")])
def test_unwritable_folder_is_not_cached_and_says_so(folder, where, call, monkeypatch, capsys):
    monkeypatch.setattr(where, call, Mock(side_effect=OSError(28, "No space left on device")), raising=False)
    loaded = load(folder)
    monkeypatch.undo()
    check(loaded, folder, "train")
    assert "not cached" in capsys.readouterr().out
    assert not list(folder.glob(".*"))  # no leftovers


@pytest.mark.parametrize(("where", "call"), [(np, "savez"), (os, "replace")])
def test_interruption_keeps_the_old_cache_and_leaves_nothing_else(folder, where, call, monkeypatch):
    load(folder)
    before = (folder / ".train-32px.npz").read_bytes()
    CHANGES["added"](folder / "train/ant/0.png")
    monkeypatch.setattr(where, call, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert [path.name for path in folder.glob(".*")] == [".train-32px.npz"]
    assert (folder / ".train-32px.npz").read_bytes() == before


TWO_PROCESSES = """
import os, sys, time, image_sets
root, start = sys.argv[1], float(sys.argv[2])
time.sleep(max(0, start - time.time()))
for _ in range(3):
    images = image_sets.load_images("cifar10", "train", root).images
    os.utime(root + "/train/bee/0.png")
print(images.sum())
"""


def test_two_processes_at_once(folder):
    for i in range(200):  # long enough that they overlap
        save(folder / f"train/ant/more{i:03}.png", picture(i))
    run = [sys.executable, "-B", "-c", TWO_PROCESSES, str(folder), str(time.time() + 1)]
    running = [subprocess.Popen(run, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()
        assert int(out.split()[-1]) == truth(folder, "train")[0].sum()
        assert b"damaged" not in out and b"not cached" not in out
    assert [path.name for path in folder.glob(".*")] == [".train-32px.npz"]
    check(load(folder), folder, "train")


# ---- official batches ------------------------------------------------------------------------------------------

OFFICIAL_CLASSES = ["aero", "boat"]
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def official_picture(index):
    """Rows, columns and colours all told apart: red falls by row, green rises by column, blue is the index."""
    return np.array([[(250 - 3 * row, 7 * column, index) for column in range(32)] for row in range(32)], np.uint8)


def official_row(index):
    """The official layout by hand: 1,024 red values row by row, then the green ones, then the blue ones."""
    red = [250 - 3 * row for row in range(32) for _ in range(32)]
    green = [7 * column for _ in range(32) for column in range(32)]
    return red + green + [index] * 1024


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A cifar-10-batches-py in the official format, 2 images a batch, and its archive, both outside of any root."""
    batches = tmp_path / "made" / download.FOLDER_NAME
    batches.mkdir(parents=True)
    for b, name in enumerate([*BATCHES, "test_batch"]):
        rows = np.array([official_row(2 * b), official_row(2 * b + 1)], dtype=np.uint8)
        entry = {"batch_label": name, "labels": [0, 1], "data": rows, "filenames": ["a.png", "b.png"]}
        (batches / name).write_bytes(pickle.dumps(entry, protocol=2))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": OFFICIAL_CLASSES}, protocol=2))

    def md5(name):
        return hashlib.md5((batches / name).read_bytes()).hexdigest()

    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(name)] for name in BATCHES])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5("test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5("batches.meta")})
    archive = batches.parent / download.ARCHIVE_NAME
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, download.FOLDER_NAME)
    monkeypatch.setattr(download, "ARCHIVE_SIZE", archive.stat().st_size)
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(download, "download_archive", lambda *_: pytest.fail("downloaded"))
    return batches


def check_official(loaded, split):
    indices = range(10) if split == "train" else range(10, 12)
    assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int64
    assert loaded.images.flags.c_contiguous
    np.testing.assert_array_equal(loaded.images, np.stack([official_picture(index) for index in indices]))
    assert loaded.labels.tolist() == [0, 1] * (len(indices) // 2)
    assert loaded.classes == tuple(OFFICIAL_CLASSES)
    assert loaded.name == "CIFAR-10"


@pytest.mark.parametrize("split", ["train", "test"])
def test_official_batches(official, tmp_path, split, capsys):
    shutil.copytree(official, tmp_path / official.name)
    loaded = load(tmp_path, split)
    check_official(loaded, split)
    assert capsys.readouterr().out.count(loaded.source) == 1


def test_each_place_is_preferred_to_those_below_it(official, tmp_path, folder, monkeypatch, capsys):
    def fake_download(where, *_):
        return Path(shutil.copy(official.parent / download.ARCHIVE_NAME, where))

    monkeypatch.setattr(download, "download_archive", fake_download)
    loaded = load(tmp_path)
    check_official(loaded, "train")
    assert "downloaded" in loaded.source and loaded.source in capsys.readouterr().out
    monkeypatch.setattr(download, "download_archive", lambda *_: pytest.fail("downloaded"))

    shutil.rmtree(tmp_path / download.FOLDER_NAME)  # the archive only
    loaded = load(tmp_path)
    check_official(loaded, "train")
    assert loaded.source == f"official archive {tmp_path / download.ARCHIVE_NAME}"
    assert loaded.source in capsys.readouterr().out

    monkeypatch.setattr(download, "extract_archive", lambda *_: pytest.fail("extracted"))
    loaded = load(tmp_path)  # folder and archive
    check_official(loaded, "train")
    assert loaded.source == f"official batches in {tmp_path / download.FOLDER_NAME}"
    assert loaded.source in capsys.readouterr().out

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)  # images, folder and archive
    loaded = load(tmp_path)
    check(loaded, folder, "train")
    assert loaded.source == f"image folder {tmp_path / 'train'}" and loaded.source in capsys.readouterr().out


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_tampered_pickle_is_never_opened(official, tmp_path, name, split):
    shutil.copytree(official, tmp_path / official.name)
    opened = tmp_path / "opened"
    evil = pickle.dumps(CreatesFile(opened))
    pickle.loads(evil)
    opened.unlink()  # fails unless the pickle works
    (tmp_path / official.name / name).write_bytes(evil)
    with pytest.raises(ValueError, match=r"damaged.*delete it") as error:
        load(tmp_path, split)
    assert str(tmp_path / official.name) in str(error.value) and download.ARCHIVE_NAME in str(error.value)
    assert not opened.exists()


@pytest.mark.parametrize("damage", ["tampered", "missing"])
def test_damaged_batches_are_unpacked_anew_from_the_archive_beside_them(official, tmp_path, damage, capsys):
    shutil.copytree(official, tmp_path / official.name)
    shutil.copy(official.parent / download.ARCHIVE_NAME, tmp_path)
    (tmp_path / official.name / "test_batch").unlink()
    if damage == "tampered":
        (tmp_path / official.name / "test_batch").write_bytes(b"x")
    check_official(load(tmp_path), "train")
    assert "is damaged" in capsys.readouterr().out
    check_official(load(tmp_path), "train")
    assert "is damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("with_folder", [True, False])
def test_an_archive_that_does_not_verify_is_an_error(official, tmp_path, with_folder):
    if with_folder:
        shutil.copytree(official, tmp_path / official.name)
        (tmp_path / official.name / "test_batch").unlink()
    (tmp_path / download.ARCHIVE_NAME).write_bytes(b"x")
    with pytest.raises(download.DownloadError, match=download.ARCHIVE_NAME):
        load(tmp_path)


@pytest.mark.parametrize("move", ["train -> Train", "train/* -> .", "one level too deep"])
def test_images_in_the_wrong_folders_are_no_reason_to_download_others(folder, move, monkeypatch):
    monkeypatch.setattr(download, "download_archive", lambda *_: pytest.fail("downloaded"))
    root = folder
    if move == "train -> Train":
        (folder / "train").rename(folder / "Train")
        (folder / "test").rename(folder / "Test")
    elif move == "train/* -> .":
        for name in CLASSES:
            (folder / "train" / name).rename(folder / name)
        shutil.rmtree(folder / "train")
        shutil.rmtree(folder / "test")
    else:
        root = folder / "train"
    with pytest.raises(ValueError, match=r"no folders train and test, but .*/train/<class>/.*CIFAR10_ROOT"):
        load(root)


def test_other_data_beside_it_does_not_keep_cifar10_away(official, tmp_path, monkeypatch):
    def fake_download(where, *_):
        return Path(shutil.copy(official.parent / download.ARCHIVE_NAME, where))

    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    save(tmp_path / "flowers" / "rose" / "1.png", picture(1))
    save(tmp_path / "figures" / "plot.png", picture(1))
    monkeypatch.setattr(download, "download_archive", fake_download)
    check_official(load(tmp_path), "train")


# ---- digits ----------------------------------------------------------------------------------------------------


def test_digits_are_sklearns_split_once_and_for_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, test = (image_sets.load_images("digits", split) for split in ("train", "test"))
    assert train.source in capsys.readouterr().out
    assert "digits" in train.name and train.classes == tuple("0123456789")
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    for part in (train, test):
        assert part.images.dtype == np.uint8 and part.images.shape == (len(part.labels), 32, 32, 3)
        assert part.labels.dtype == np.int64
    # Every one of sklearn's images, enlarged here, is in exactly one of the two splits, with its label.
    expected = []
    original = load_digits()
    for grid, label in zip(original.images, original.target, strict=True):
        grey = Image.fromarray(np.rint(grid / 16 * 255).astype(np.uint8))
        large = np.asarray(grey.resize((32, 32), Image.Resampling.BILINEAR))
        expected.append((np.repeat(large[..., None], 3, -1).tobytes(), int(label)))
    found = [
        (image.tobytes(), int(y)) for part in (train, test) for image, y in zip(part.images, part.labels, strict=True)
    ]
    assert sorted(found) == sorted(expected)
    assert train.images.min() == 0 and train.images.max() == 255
    share = 360 / 1797
    assert (abs(np.bincount(test.labels) - share * np.bincount(original.target)) <= 1).all()
    np.random.seed(1)  # the split must not hang on it
    again = image_sets.load_images("digits", "test")
    np.testing.assert_array_equal(again.images, test.images)
    np.testing.assert_array_equal(again.labels, test.labels)
    assert not list(tmp_path.iterdir())
