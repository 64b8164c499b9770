"""From files to arrays: CIFAR-10, a folder of images in its layout, or an offline sample, as plain NumPy arrays."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

import download
from output import load_weights, progress_bar, serialized, write_atomically

SPLITS = ("train", "test")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # some of Pillow's other readers start programs
IMAGE_SIZE = 32
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the training images, per channel, on the scale 0 to 1
CIFAR10_STD = (0.2471, 0.2435, 0.2616)


class ImageSet(NamedTuple):
    """One split of a data set, in memory."""

    images: np.ndarray  # uint8 (N, 32, 32, 3), RGB
    labels: np.ndarray  # int64 (N,), indices into classes
    classes: tuple[str, ...]
    name: str  # what prints and plot titles call it
    source: str  # one line: where it came from


def load_images(dataset, split, root=None):
    """Load one split, "train" or "test", of "cifar10" or "digits" into memory, in an order that is always the same.

    "cifar10" is the first of these that exists in root (by default the environment variable CIFAR10_ROOT, else ./data):

    1. images in `train/<class>/` and `test/<class>/`, of any classes, sizes and formats that
       `torchvision.datasets.ImageFolder` reads; decoded once and cached as `.train-32px.pt`
    2. the official batches, `cifar-10-batches-py`
    3. the official archive, `cifar-10-python.tar.gz`, downloaded if need be

    "digits" is scikit-learn's 1,797 8x8 handwritten digits, enlarged: no download.

    ValueError for what is unknown, incomplete or damaged; OSError for an archive, or what cannot be found or written.
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
        if named and (found or not root.is_dir()) and not any(root.glob("cifar-10*")):
            what = f"holds {_some(found)}" if found else "is no folder"
            layouts = f"train/<class>/ and test/<class>/, {download.FOLDER_NAME}/ or {download.ARCHIVE_NAME}"
            raise ValueError(f"{root.absolute()} {what}; name one with {layouts}, or an empty one")
        loaded = _load_official(root, split)
    print(f"{split}: {len(loaded.labels):,} images in {len(loaded.classes)} classes from {loaded.source}")
    return loaded


def split_validation(labels, per_class=500):
    """(training, validation): always the same indices of images to train on, and of per_class held out of each class.

    labels are int64 (N,), as `loader.dataset.labels`; ValueError if a class has no more than per_class images.
    """
    labels = np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    if per_class >= counts.min():
        raise ValueError(f"per_class is {per_class}, but class {classes[counts.argmin()]} has {counts.min()} images")
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == label][:per_class] for label in classes])
    return np.setdiff1d(order, held_out).tolist(), np.sort(held_out).tolist()


def _some(names):
    return (", ".join(names[:5]) or "none") + (f", … ({len(names):,} in all)" if len(names) > 5 else "")


def _load_folder(root, split):
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder  # slow to import, not needed for the digits

    passed_over = []

    def is_image(path):
        """Not such as a Mac and Jupyter make, whose names begin with a dot, in the class folder or below."""
        wanted = path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in path[len(str(root / split)) :]
        return wanted or passed_over.append(path)

    train, test = ({path.name for path in (root / part).glob("*/")} for part in SPLITS)
    if train != test:
        only = f"only in train/: {_some(sorted(train - test))}; only in test/: {_some(sorted(test - train))}"
        raise ValueError(f"train/ and test/ in {root} must have the same classes; {only}")
    folder = ImageFolder(root / split, is_valid_file=is_image)
    if passed_over:
        print(f"{root / split}: passed over {len(passed_over):,} files of other kinds")
    images = _decode(root, split, [path for path, _ in folder.samples])
    labels, source = np.array(folder.targets, dtype=np.int64), f"image folder {root / split}"
    return ImageSet(images, labels, tuple(folder.classes), root.resolve().name, source)


def _decode(root, split, paths):
    """Images uint8 (N, 32, 32, 3) of the files, from the cache if no file has changed since it was written."""
    found = zip(paths, map(os.stat, paths))
    listed = "".join(f"{path[len(str(root)) :]}\0{status.st_size}\0{status.st_mtime_ns}\n" for path, status in found)
    cache, fingerprint = root / f".{split}-{IMAGE_SIZE}px.pt", hashlib.sha256(os.fsencode(listed)).hexdigest()
    try:
        stored = load_weights(cache) if cache.exists() else {"fingerprint": None}
        if stored["fingerprint"] == fingerprint:
            return stored["images"].numpy()
    except Exception as error:  # whatever is wrong with it, the images can be decoded anew
        print(f"{cache} cannot be used ({type(error).__name__}): decoding anew")
    images = np.empty((len(paths), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    bad, resized = {}, 0
    for i, path in enumerate(progress_bar(paths, desc=f"decoding {split}", unit=" images")):
        try:
            with Image.open(path, formats=FORMATS) as image:
                resized += image.size != (IMAGE_SIZE, IMAGE_SIZE)
                images[i] = to_rgb(image)
        except Exception as error:  # a damaged file can make Pillow raise nearly anything
            bad[path] = f"{type(error).__name__}: {error}"
    if bad:
        raise ValueError(f"cannot read {_some([*bad])} (the first: {next(iter(bad.values()))}); replace or delete them")
    if resized:
        print(f"{root / split}: {resized:,} images resized to {IMAGE_SIZE}x{IMAGE_SIZE}")
    try:
        write_atomically(cache, serialized({"images": torch.from_numpy(images), "fingerprint": fingerprint}))
    except OSError as error:  # a read-only folder or a full disk
        print(f"not cached, so the next start decodes again: {error}")
    return images


def to_rgb(image):
    """A PIL image of any mode and size as uint8 (32, 32, 3), transparency over white, squeezed if it is not square.

    16-bit and floating-point grey (from 0 to 1, else ValueError) is scaled to 8 bits.
    """
    image.load()
    with contextlib.suppress(Exception):  # it writes all tags anew, and fails on odd ones, which say nothing of pixels
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 or 32 bits, or floats: convert("RGB") would clip them at 255
        grey = np.asarray(image)
        if image.mode == "F" and not (grey.min() >= 0 and grey.max() <= 1):  # false for NaN too
            raise ValueError(f"the picture is floating-point from {grey.min()} to {grey.max()}; it must be from 0 to 1")
        whole = 1 if image.mode == "F" else 255 if image.mode == "I" and grey.max() <= 255 else 65535
        image = Image.fromarray((np.clip(grey, 0, whole) * (255 / whole)).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))  # a copy


def _load_official(root, split):
    from torchvision.datasets import CIFAR10

    folder = root / download.FOLDER_NAME
    if not folder.is_dir():
        download.fetch_batches(root)
    try:
        data = CIFAR10(root, train=split == "train", download=False)  # checks MD5s before it opens the pickles
    except RuntimeError:
        raise ValueError(f"{folder} is damaged (a file is missing or wrong); delete it, to unpack it anew") from None
    images = np.ascontiguousarray(data.data)  # torchvision gives a channels-last view of planes
    labels = np.array(data.targets, dtype=np.int64)
    return ImageSet(images, labels, tuple(data.classes), "CIFAR-10", f"official batches in {folder}")


def _load_digits(split):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
    greys, labels = parts[SPLITS.index(split) :: 2]
    images = np.stack([to_rgb(Image.fromarray(grey)) for grey in np.float32(greys / 16)])  # their values are 0 to 16
    classes = tuple(map(str, digits.target_names))
    return ImageSet(images, labels.astype(np.int64), classes, "digits (offline sample)", "sklearn.datasets.load_digits")
