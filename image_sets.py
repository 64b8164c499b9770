"""From files to arrays: CIFAR-10, a folder of images in its layout, or an offline sample, as plain NumPy arrays."""

import contextlib
import hashlib
import io
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

import download
from output import load_weights, progress_bar, serialized, write_atomically

SPLITS = ("train", "test")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # some of Pillow's other readers start programs
IMAGE_SIZE = 32
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the training images, per channel, on the scale 0 to 1
CIFAR10_STD = (0.2471, 0.2435, 0.2616)


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set, in memory."""

    images: np.ndarray  # uint8 (N, 32, 32, 3), RGB
    labels: np.ndarray  # int64 (N,), indices into classes
    classes: tuple[str, ...]
    name: str  # what prints and plot titles call it
    source: str  # one line: where it came from


def load_images(dataset, split, root=None):
    """Load one split of a data set into memory and print one line saying where it came from.

    "cifar10" is the first of these that exists:

    1. images in `<root>/train/<class>/` and `<root>/test/<class>/`, of any classes and of the formats that
       `torchvision.datasets.ImageFolder` reads; decoded once and cached as `<root>/.train-32px.pt`
    2. the official batches, `<root>/cifar-10-batches-py`
    3. the official archive, `<root>/cifar-10-python.tar.gz`, downloaded if need be

    "digits" is scikit-learn's 1,797 8x8 handwritten digits, enlarged: no download, a sample to try things on.

    Args:
        root: folder of the data; by default the environment variable CIFAR10_ROOT, else ./data, made if need be.

    Returns:
        ImageSet: images uint8 (N, 32, 32, 3) in RGB, labels int64 (N,), always in the same order.

    Raises:
        ValueError: unknown dataset or split, a root that is not there or holds something else, or data that is
            incomplete or damaged (the message names the files).
        FileNotFoundError: a class without images.
        download.DownloadError: the archive could not be downloaded, or is not the official one.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    if dataset not in ("cifar10", "digits") or split not in SPLITS:
        raise ValueError(f"unknown: {dataset!r}, {split!r}. There is 'cifar10' and 'digits', with 'train' and 'test'")
    named = root or os.environ.get("CIFAR10_ROOT")
    root = Path(named or "data").expanduser()
    if dataset == "digits":
        loaded = _load_digits(split)
    # One of the two is enough to choose the folder: a lost test folder should be an error, not a surprise download.
    elif any((root / part).is_dir() for part in SPLITS):
        loaded = _load_folder(root, split)
    else:
        found = sorted(path.name for path in root.glob("[!.]*"))
        known = any(name.startswith("cifar-10") for name in found)
        if named and not (known or (root.is_dir() and not found)):
            raise ValueError(
                f"{root.absolute()} {f'holds {_some(found)}' if found else 'is no folder'}; name one that has "
                f"train/<class>/ and test/<class>/ with images, {download.FOLDER_NAME}/ or {download.ARCHIVE_NAME}, or "
                "an empty one to download CIFAR-10 into"
            )
        loaded = _load_official(root, split)
    print(f"{split}: {len(loaded.labels):,} images in {len(loaded.classes)} classes from {loaded.source}")
    return loaded


def split_validation(labels, per_class=500):
    """(training, validation): indices of the images to train on and of those held out, the same on every call.

    Args:
        labels: int64 (N,), as `loader.dataset.labels`.
        per_class: how many images of each class are held out; ValueError if a class has no more.
    """
    labels = np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    if per_class >= counts.min():
        raise ValueError(f"per_class is {per_class}, but class {classes[counts.argmin()]} has {counts.min()} images")
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == label][:per_class] for label in classes])
    return np.setdiff1d(order, held_out).tolist(), np.sort(held_out).tolist()


def _some(names):
    return ", ".join(names[:5]) + (f", … ({len(names):,} in all)" if len(names) > 5 else "")


# ---- a folder of images ----------------------------------------------------------------------------------------


def _load_folder(root, split):
    from torchvision.datasets import ImageFolder  # slow to import, and not needed for the digits

    # One name can be spelt in two ways of Unicode, as when a Mac has written one of the folders.
    folders = {part: ImageFolder(root / part) for part in SPLITS}
    names = {part: [unicodedata.normalize("NFC", name) for name in folder.classes] for part, folder in folders.items()}
    missing, extra = set(names["train"]) - set(names["test"]), set(names["test"]) - set(names["train"])
    if missing or extra:
        raise ValueError(
            f"{root / 'test'} must have the classes of {root / 'train'}: missing {_some(sorted(missing)) or 'none'}, "
            f"extra {_some(sorted(extra)) or 'none'}; add, rename or delete folders until they agree"
        )
    classes = sorted(set(names[split]))
    samples = [(path, label) for path, label in folders[split].samples if not _hidden(path, root / split)]
    files = sorted((classes.index(names[split][label]), path) for path, label in samples)
    others = sum(len(inside) for _, _, inside in os.walk(root / split, followlinks=True)) - len(files)
    if others:
        print(f"{root / split}: passed over {others:,} files of other kinds")
    labels, paths = np.array([label for label, _ in files], dtype=np.int64), [path for _, path in files]
    images = _decode(root, split, paths)
    return ImageSet(images, labels, tuple(classes), root.resolve().name, f"image folder {root / split}")


def _hidden(path, folder):
    """Whether a name inside of the class folder begins with a dot, as a Mac and Jupyter make them."""
    inside = path[len(str(folder)) + 1 :].partition(os.sep)[2]
    return f"{os.sep}." in os.sep + inside


def _decode(root, split, paths):
    """Images uint8 (N, 32, 32, 3) of the files, from the cache if no file has changed since it was written."""
    fingerprint = hashlib.sha256()
    for path in paths:
        status = os.stat(path) if os.path.exists(path) else os.lstat(path)
        fingerprint.update(os.fsencode(f"{path[len(str(root)) :]}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    cache, fingerprint = root / f".{split}-{IMAGE_SIZE}px.pt", fingerprint.hexdigest()
    try:
        stored = load_weights(cache)
        if stored["fingerprint"] == fingerprint:
            return stored["images"].numpy()
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever is wrong with it, the images can be decoded anew
        print(f"{cache} cannot be used ({type(error).__name__}): decoding anew")
    images = np.empty((len(paths), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    bad, reason, resized = [], "", 0
    for i, path in enumerate(progress_bar(paths, desc=f"decoding {split}", unit=" images")):
        try:
            # To open a pipe would wait for somebody to write to it.
            with Image.open(path if os.path.isfile(path) else io.BytesIO(), formats=FORMATS) as image:
                resized += image.size != (IMAGE_SIZE, IMAGE_SIZE)
                images[i] = to_rgb(image)
        except Exception as error:  # a damaged file can make Pillow raise nearly anything
            reason = reason or f"{type(error).__name__}: {error}"
            bad.append(path)
    if bad:
        raise ValueError(f"cannot read {_some(bad)} (the first: {reason}); replace or delete what is damaged")
    if resized:
        print(f"{root / split}: {resized:,} images resized to {IMAGE_SIZE}x{IMAGE_SIZE}")
    try:
        write_atomically(cache, serialized({"images": torch.from_numpy(images), "fingerprint": fingerprint}))
    except OSError as error:  # a read-only folder or a full disk
        print(f"not cached, so the next start decodes again: {error}")
    return images


# How the camera was held, by the EXIF tag for it: what makes the picture upright (Exif 2.3, 4.6.4.A).
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
TURNS = {tag: Image.Transpose[turn] for tag, turn in enumerate(TURNS, start=2)}


def to_rgb(image, size=IMAGE_SIZE):
    """Bring a PIL image of any mode and size to uint8 (size, size, 3).

    Transparency goes over white, 16-bit and floating-point grey is scaled to 8 bits, a camera's rotation tag is
    applied, and another size is resized with antialiased bilinear (not cropped, so a picture that is not square is
    squeezed).

    Raises:
        ValueError: a floating-point picture that is not from 0 to 1.
    """
    image.load()  # which already turns a TIFF, and then takes the tag away
    turn = None
    with contextlib.suppress(Exception):  # tags that cannot be read say nothing of the pixels
        # Not ImageOps.exif_transpose, which writes all tags anew and so fails on one that is odd.
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    image = image if turn is None else image.transpose(turn)
    if image.mode[0] in "IF":  # 16 or 32 bits, or floats: convert("RGB") would clip them at 255
        grey = np.asarray(image)
        if image.mode == "F" and not (grey.min() >= 0 and grey.max() <= 1):  # false for NaN too
            raise ValueError(f"the picture is floating-point from {grey.min()} to {grey.max()}; it must be from 0 to 1")
        whole = 1 if image.mode == "F" else 255 if image.mode == "I" and grey.max() <= 255 else 65535
        image = Image.fromarray((np.clip(grey, 0, whole) * (255 / whole)).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


# ---- the official batches, and the offline sample --------------------------------------------------------------


def _load_official(root, split):
    from torchvision.datasets import CIFAR10

    folder = root / download.FOLDER_NAME
    if not folder.is_dir():
        download.fetch_batches(root)
    try:
        data = CIFAR10(root, train=split == "train", download=False)  # checks MD5s before it opens the pickles
    except RuntimeError:
        raise ValueError(
            f"{folder} is damaged (a file is missing or fails its MD5 check); delete it, and it is unpacked anew"
        ) from None
    images = np.ascontiguousarray(data.data)  # torchvision gives a channels-last view of planes
    labels = np.array(data.targets, dtype=np.int64)
    return ImageSet(images, labels, tuple(data.classes), "CIFAR-10", f"official batches in {folder}")


def _load_digits(split):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
    greys, labels = parts[SPLITS.index(split) :: 2]
    greys = (greys * (255 / 16)).round().astype(np.uint8)  # sklearn's values are 0 to 16
    images = np.stack([to_rgb(Image.fromarray(grey)) for grey in greys])
    classes = tuple(map(str, digits.target_names))
    return ImageSet(images, labels.astype(np.int64), classes, "digits (offline sample)", "sklearn.datasets.load_digits")
