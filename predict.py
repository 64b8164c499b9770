"""Class names and probabilities for any pictures, in Python or in a terminal.

predict(Model.from_pretrained("tuned"), ["cat.jpg", "truck.png"])

python predict.py cat.jpg truck.png
"""

import argparse
import json
import os
import pathlib
import sys
from typing import NamedTuple

import devices  # noqa: F401

import numpy as np
import torch
from PIL import Image

from epoch import are_probabilities
from image_sets import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, to_rgb
from layers import evaluation_mode
from parallel import unwrap
from runs import load_weights, printed, printed_alike

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not all of Pillow's: some of its readers start other programs


class Prediction(NamedTuple):
    """The most probable class of one picture, its probability, and those of all classes, {name: probability}."""

    class_name: str
    probability: float
    probabilities: dict[str, float]


def class_names(label_map):
    """The names of the classes, in the order of their labels.

    Args:
        label_map: a list of names in this order, {name: label}, as the loaders give, or {label: name}; the labels are
            0, 1, 2, ...

    Raises:
        ValueError: labels that are not 0, 1, 2, ..., or not one for each name.
    """
    if isinstance(label_map, (str, set, frozenset)):
        raise ValueError(f"{label_map!r} has no order of classes; give a list of names, or a dict {{name: label}}")
    if not isinstance(label_map, dict):
        names = [str(name) for name in label_map]
        if len(set(names)) < len(names):
            raise ValueError(f"the classes {names} have a name twice; give each class a name of its own")
        return names
    labels = set(range(len(label_map)))
    by_name, by_label = set(label_map.values()) == labels, set(label_map) == labels
    if by_name and by_label and any(key != value for key, value in label_map.items()):
        raise ValueError(f"{label_map} is numbers to numbers; give the names as strings, {{name: label}}")
    if not by_name and (not by_label or len(set(label_map.values())) < len(labels)):
        raise ValueError(
            f"{label_map} does not say the class of each label; it must be {{name: label}} or {{label: name}}, with "
            f"the labels 0 to {len(label_map) - 1} and each name once"
        )
    pairs = {label: name for name, label in label_map.items()} if by_name else label_map
    return [str(pairs[label]) for label in range(len(pairs))]


@torch.no_grad()
def predict(model, images, classes=CIFAR10_CLASSES):
    """Classify pictures of any size and mode; each is brought to 32x32 RGB, squeezed if it is not square.

    Args:
        model: returns (N, classes) scores or log-probabilities for normalised float32 (N, 3, 32, 32), on any device.
        images: one picture or a list of them. A picture is a file name, a PIL image, or an array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), uint8 from 0 to 255 or floating-point from 0 to 1.
        classes: names of the model's outputs, in any form that `class_names` takes.

    Returns:
        A list of `Prediction`, one per picture, with probabilities that sum to 1.

    Raises:
        FileNotFoundError, ValueError, TypeError: something that is not a picture; says which.

    Example:
        >>> [prediction] = predict(Model.from_pretrained("tuned"), "cat.jpg")
        >>> prediction.class_name, round(prediction.probability, 2)
        ('cat', 0.92)
    """
    classes = class_names(classes)
    if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    pixels = [_as_rgb(image, f"picture {number}") for number, image in enumerate(images, start=1)]
    if not pixels:
        return []
    normalised = (np.stack(pixels).astype(np.float32) / 255 - np.float32(CIFAR10_MEAN)) / np.float32(CIFAR10_STD)
    images = torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous()
    model = unwrap(model)  # which torch.compile would compile anew for each number of pictures
    parameter = next(model.parameters(), torch.empty(0))
    with evaluation_mode(model):
        scores = torch.cat([model(batch.to(parameter)).float() for batch in images.split(256)])  # memory for 256
    if not scores.softmax(dim=1).isfinite().all():
        raise ValueError("the model's scores are not finite; load weights that are")
    if are_probabilities(scores, off=0.05 if parameter.dtype.itemsize < 4 else 1e-4):
        raise ValueError("the model returns probabilities; give predict one that returns scores, without any softmax")
    if scores.shape[1] != len(classes):
        raise ValueError(f"the model has {scores.shape[1]} outputs and {len(classes)} class names were given")
    return [
        Prediction(classes[int(np.argmax(row))], max(row), dict(zip(classes, row)))
        for row in scores.softmax(dim=1).tolist()
    ]


def _as_rgb(image, name):
    """One picture, in any of the forms that `predict` takes, as uint8 (32, 32, 3)."""
    if isinstance(image, np.ndarray):
        return to_rgb(_array_as_pil(image, name))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, (str, os.PathLike)):
        raise TypeError(f"{name} is a {type(image).__name__}; a picture is a file name, a PIL image or a NumPy array")
    if "://" in str(image):
        raise ValueError(f"{image} is an address; download the picture and give the name of the file")
    if os.path.isdir(image):
        raise ValueError(f"{image} is a folder; give the pictures in it, such as {image}/*.jpg")
    try:
        with Image.open(image, formats=FORMATS) as opened:
            return to_rgb(opened)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {image}") from None
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        raise ValueError(f"{image} is not a picture that can be read ({error})") from None


def _array_as_pil(image, name):
    pixels = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(f"{name} has shape {image.shape}; an array is (H, W) or (H, W, 1, 3 or 4)")
    if np.issubdtype(pixels.dtype, np.floating) and pixels.min() >= 0 and pixels.max() <= 1:  # false for NaN too
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        extent = f" from {image.min()} to {image.max()}" if np.issubdtype(image.dtype, np.number) else ""
        raise ValueError(
            f"{name} is {image.dtype}{extent}; an array is uint8 from 0 to 255 or floating-point from 0 to 1"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def load_network(weights):
    """(model, classes) of the weights that ship, by name, or of a run, by the path of its last.pt or best.pt.

    Raises:
        ValueError, OSError: no such weights, a file that is not in the folder of a run, or is damaged.
    """
    import models  # here, because whoever imports `predict` brings a model
    from pretrained import provenance
    from recipes import build_model

    path = pathlib.Path(weights)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the last.pt or best.pt of a run")
    if path.suffix != ".pt":
        trained = provenance(weights)["hyperparameters"]
        return getattr(models, trained["model"]).from_pretrained(weights), trained["classes"].split("/")
    state = load_weights(path)
    try:
        run = json.loads((path.parent / "run.json").read_text())
        trained = run["hyperparameters"]
        classes = trained["classes"].split("/")
        model = build_model(trained, len(classes))
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        raise ValueError(
            f"{path} has no run.json beside it that says of which network and classes it is; give the last.pt or "
            "best.pt in runs/<name>/, of a run whose settings are those of recipes.run_settings"
        ) from None
    try:
        model.load_state_dict(state)
        # SyncBatchNorm, of a run on several GPUs, computes the same here.
        network = run.get("network", printed(model)).replace("SyncBatchNorm", "BatchNorm2d")
        fits = printed(model) == network or not printed_alike(run.get("versions", {}))
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{path} does not fit {trained['model']}: it is not the last.pt or best.pt of a run, or the network was "
            "changed since"
        )
    return model.eval(), classes


def main():
    from pretrained import most_accurate, shipped

    parser = argparse.ArgumentParser(
        description=f"Classify pictures. The weights that ship know {', '.join(CIFAR10_CLASSES)}."
    )
    parser.add_argument("pictures", nargs="+", metavar="picture", help="an image file of any size")
    names = ", ".join(shipped()) or "none is here"
    parser.add_argument(
        "--weights", help=f"{names} (default: the most accurate), or runs/<name>/last.pt of a run of your own"
    )
    arguments = parser.parse_args()
    try:
        model, classes = load_network(arguments.weights or most_accurate())
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    failed = False
    for picture in arguments.pictures:
        try:
            [prediction] = predict(model, picture, classes)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        best = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:3]
        print(f"{picture}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in best))
    sys.exit(failed)


if __name__ == "__main__":
    main()
