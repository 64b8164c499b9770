"""From files to arrays: CIFAR-10 (or a folder of images in its layout) and an offline sample as plain NumPy arrays.

    from image_sets import load_images
    train = load_images("cifar10", "train", root="data")    # train.images, train.labels, train.classes

Nothing here knows about tensors, loaders or augmentation.
"""

import hashlib
import io
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import ExifTags, Image

import download
from output import progress_bar, write_atomically

DATASETS = ("cifar10", "digits")
SPLITS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_SUFFIXES = tuple(  # of images as well, but they are not read
    ".arw .avif .bmp .cr2 .cr3 .dng .gif .heic .heif .jfif .jp2 .jpe .nef .pgm .ppm .psd .svg .tga .tif .tiff".split()
)
FORMATS = ("PNG", "JPEG", "WEBP")  # not all of Pillow's: some of its readers start other programs
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

    1. a folder of images, `<root>/train/<class>/*.png|jpg|jpeg|webp` and `<root>/test/<class>/*`, any classes; it is
       decoded once and cached as `<root>/.train-32px.npz` and `<root>/.test-32px.npz`; files that are no images are
       passed over
    2. the official batches, `<root>/cifar-10-batches-py`
    3. the official archive, `<root>/cifar-10-python.tar.gz`, which is unpacked
    4. the official archive, downloaded

    "digits" is scikit-learn's 1,797 8x8 handwritten digits, enlarged: no download, a sample to try things on.

    Args:
        dataset: "cifar10" or "digits".
        split: "train" or "test".
        root: folder of the data; by default the environment variable CIFAR10_ROOT, else ./data, which is made if need
            be. "digits" needs none.

    Returns:
        ImageSet: images uint8 (N, 32, 32, 3) in RGB, labels int64 (N,), always in the same order.

    Raises:
        ValueError: unknown dataset or split, a root that is not there, images in other folders than train and test, or
            data that is incomplete or damaged (the message names the files).
        download.DownloadError: the archive could not be downloaded, or is not the official one.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}: there is {' and '.join(map(repr, DATASETS))}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: there is {' and '.join(map(repr, SPLITS))}")
    named = root or os.environ.get("CIFAR10_ROOT")
    root = Path(named or "data").expanduser()
    if dataset == "digits":
        loaded = _load_digits(split)
    elif named and not root.exists():
        raise ValueError(
            f"there is no folder {root.absolute()}; give root or CIFAR10_ROOT the folder of the images. To download "
            "CIFAR-10 into it, make it first, or leave both out: it then goes to ./data"
        )
    # One of the two is enough to choose the folder: a lost test folder should be an error, not a surprise download.
    elif (root / "train").is_dir() or (root / "test").is_dir():
        loaded = _load_folder(root, split)
    elif misplaced := _misplaced(root):
        raise ValueError(
            f"{root} has no folders train and test, but {_some(misplaced)}; images of your own go into "
            f"{root}/train/<class>/ and {root}/test/<class>/. For CIFAR-10, set CIFAR10_ROOT to another folder"
        )
    else:
        loaded = _load_official(root, split)
    print(f"{split}: {len(loaded.labels):,} images in {len(loaded.classes)} classes from {loaded.source}")
    return loaded


def split_validation(labels, per_class=500):
    """(training, validation): indices of the images to train on and of those held out, the same on every call.

    Args:
        labels: int64 (N,), as `loader.dataset.labels`.
        per_class: how many images of each class are held out.

    Raises:
        ValueError: a class has no more images than that.
    """
    labels = np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    if per_class >= counts.min():
        label, count = classes[counts.argmin()], counts.min()
        raise ValueError(
            f"per_class is {per_class}, but class {label} has {count} images and some must remain to train on; "
            "hold out fewer"
        )
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == label][:per_class] for label in classes])
    return np.setdiff1d(order, held_out).tolist(), np.sort(held_out).tolist()


# ---- a folder of images ----------------------------------------------------------------------------------------


def _misplaced(root):
    """What lies in root, if all of it looks like somebody's own images, which belong into train and test."""
    try:
        entries = _scan(root)
        found = [entry for entry in entries if entry.is_dir() or _is_image(entry.name)]
        images = [
            not entry.is_dir() or entry.name.lower() in SPLITS or any(_is_image(inner.name) for inner in _scan(entry))
            for entry in found
        ]
    except OSError:  # no root yet, or one that holds what is nobody's business here
        return []
    official = any(entry.name.startswith("cifar-10") for entry in entries)
    return [entry.name for entry in found] if all(images) and not official else []


def _load_folder(root, split):
    classes = _list_classes(root, split)
    files, labels, fingerprint = _list_images(root / split, classes)
    names = tuple(classes)
    cache = root / f".{split}-{IMAGE_SIZE}px.npz"
    images = _read_cache(cache, names, labels, fingerprint)
    if images is None:
        images = _decode(root / split, files)
        stored = io.BytesIO()
        np.savez(stored, images=images, labels=labels, classes=np.array(names), fingerprint=np.array(fingerprint))
        try:
            write_atomically(cache, stored.getbuffer())
        except OSError as error:  # a read-only folder or a full disk
            print(f"not cached, so the next start decodes again: {error}")
    return ImageSet(images, labels, names, root.resolve().name, f"image folder {root / split}")


def _list_classes(root, split):
    """{class: its folder in split}, sorted by class, once train and test are known to have the same classes.

    One name can be spelt in two ways of Unicode, as when a Mac has written one of the folders.
    """
    folders = {}
    for part in SPLITS:
        found = [entry.name for entry in _scan(root / part) if entry.is_dir()] if (root / part).is_dir() else []
        if not found:
            raise ValueError(
                f"no images in class folders of {root / part}: expected {root / part}/<class>/<name>.png or .jpg"
            )
        names = [unicodedata.normalize("NFC", name) for name in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{root / part} has two folders for {_some(twice)}, spelt in two ways of Unicode that look alike; "
                "move the images of one into the other and delete it"
            )
        folders[part] = dict(zip(names, found))
    train, test = folders.values()
    missing = [name for name in train if name not in test]
    extra = [name for name in test if name not in train]
    if missing or extra:
        raise ValueError(
            f"{root / 'test'} must have the classes of {root / 'train'}: missing {_some(missing) or 'none'}, "
            f"extra {_some(extra) or 'none'}; add, rename or delete folders until they agree"
        )
    return {name: folders[split][name] for name in sorted(train)}


def _list_images(folder, classes):
    """File names below folder in (class, name) order, labels int64 (N,), and a hash that changes with any file."""
    files, labels, empty = [], [], []
    others = [entry.name for entry in _scan(folder) if not entry.is_dir()]
    fingerprint = hashlib.sha256()
    for label, (name, class_folder) in enumerate(classes.items()):
        before = len(files)
        for entry in _scan(folder / class_folder):
            file = f"{class_folder}/{entry.name}"
            if entry.is_dir():
                raise ValueError(f"{file} in {folder} is a folder; only images may be there, so move it away")
            if not entry.name.lower().endswith(SUFFIXES):
                others.append(file)
                continue
            files.append(file)
            labels.append(label)
            status = entry.stat()
            fingerprint.update(os.fsencode(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n"))
        if len(files) == before:
            empty.append(name)
    if meant := [file for file in others if _is_image(file)]:
        raise ValueError(
            f"{_some(meant)} in {folder}: images must be in {folder}/<class>/ and end in {', '.join(SUFFIXES)}; "
            "move or convert them"
        )
    if others:
        print(f"{folder}: passed over {_some(others)}")
    if empty:
        raise ValueError(f"no images in {_some(empty)} of {folder}: add some, or delete the class from train and test")
    return files, np.array(labels, dtype=np.int64), fingerprint.hexdigest()


def _is_image(name):
    return name.lower().endswith(SUFFIXES + OTHER_SUFFIXES)


def _scan(folder):
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _some(names):
    return ", ".join(names[:5]) + (f", … ({len(names):,} in all)" if len(names) > 5 else "")


def _decode(folder, files):
    """Decode files into uint8 (N, 32, 32, 3), or raise one ValueError that names all those that cannot be."""
    images = np.empty((len(files), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    bad, reason, converted, resized = [], "", 0, 0
    for i, file in enumerate(progress_bar(files, desc=f"decoding {folder.name}", unit=" images")):
        try:
            with Image.open(folder / file, formats=FORMATS) as image:
                converted += image.mode != "RGB"
                resized += image.size != (IMAGE_SIZE, IMAGE_SIZE)
                images[i] = to_rgb(image)
        except Exception as error:  # a damaged file can make Pillow raise nearly anything
            reason = reason or f"{type(error).__name__}: {error}"
            bad.append(file)
    if bad:
        raise ValueError(
            f"cannot read {_some(bad)} in {folder} (the first: {reason}): only whole PNG, JPEG and WebP images are "
            "allowed; replace or delete what is damaged"
        )
    if converted or resized:
        print(f"{folder}: {converted:,} images converted to RGB, {resized:,} resized to {IMAGE_SIZE}x{IMAGE_SIZE}")
    return images


def to_rgb(image, size=IMAGE_SIZE):
    """Bring a PIL image of any mode and size to uint8 (size, size, 3).

    Transparency goes over white, 16-bit and floating-point grey is scaled to 8 bits, a camera's rotation tag is
    applied, and another size is resized with antialiased bilinear (not cropped, so a picture that is not square is
    squeezed).

    Raises:
        ValueError: a picture without pixels, or a floating-point one that is not from 0 to 1.
    """
    if 0 in image.size:
        raise ValueError(f"the picture has no pixels, its size is {image.width}x{image.height}")
    image = _upright(image)
    if image.mode[0] in "IF":  # 16 or 32 bits, or floats: convert("RGB") would clip them at 255 instead of scaling
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


# How the camera was held, by the EXIF tag for it: what makes the picture upright (Exif 2.3, 4.6.4.A).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image):
    image.load()  # which already turns a TIFF, and then takes the tag away
    # Not ImageOps.exif_transpose, which writes all tags anew and so fails on one that is odd.
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # tags that cannot be read say nothing of the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _read_cache(cache, classes, labels, fingerprint):
    """The images of a cache that belongs to this very listing, else None."""
    try:
        with (
            open(cache, "rb") as opened,  # np.load would leave it open when it is no archive
            np.load(opened, allow_pickle=False) as stored,
            stored.zip.open("images.npy") as file,
        ):
            if str(stored["fingerprint"]) != fingerprint:
                return None
            same = tuple(stored["classes"]) == classes and np.array_equal(stored["labels"], labels)
            images = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):  # only reaching the end checks the CRC, and a flipped bit in the header can stop short
                raise ValueError("bytes left over")
        shape = (len(labels), IMAGE_SIZE, IMAGE_SIZE, 3)
        return images if same and images.shape == shape and images.dtype == np.uint8 else None
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it, the images can be decoded anew
        print(f"{cache} is damaged ({error}): decoding anew")
        return None


# ---- the official batches --------------------------------------------------------------------------------------


def _load_official(root, split):
    from torchvision.datasets import CIFAR10  # slow to import, and not needed for the rest

    folder, archive = root / download.FOLDER_NAME, root / download.ARCHIVE_NAME
    source = f"official batches in {folder}"
    if not folder.is_dir():
        source = f"official archive {archive}"
        if not archive.is_file():
            source += ", downloaded"
            download.download_archive(root)
        download.extract_archive(archive)
    try:
        data = CIFAR10(root, train=split == "train", download=False)  # checks MD5s before it opens the pickles
    except RuntimeError:
        damaged = f"{folder} is damaged (a file is missing or fails its MD5 check)"
        if not archive.is_file():
            raise ValueError(f"{damaged}: delete it to have the archive downloaded, or put {archive} there") from None
        aside = folder.rename(folder.with_name(f"{folder.name}.damaged-{uuid4().hex[:8]}"))
        print(f"{damaged}: moved to {aside.name}, unpacking {archive} anew")
        download.extract_archive(archive)
        data = CIFAR10(root, train=split == "train", download=False)
    images = np.ascontiguousarray(data.data)  # torchvision gives a channels-last view of planes
    return ImageSet(images, np.array(data.targets, dtype=np.int64), tuple(data.classes), "CIFAR-10", source)


# ---- the offline sample ----------------------------------------------------------------------------------------


def _load_digits(split):
    from sklearn.datasets import load_digits  # slow to import, and not needed for the rest
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
    greys, labels = parts[SPLITS.index(split) :: 2]
    greys = (greys * (255 / 16)).round().astype(np.uint8)  # sklearn's values are 0 to 16
    images = np.stack([to_rgb(Image.fromarray(grey)) for grey in greys])
    classes = tuple(map(str, digits.target_names))
    return ImageSet(images, labels.astype(np.int64), classes, "digits (offline sample)", "sklearn.datasets.load_digits")
