"""Class names and probabilities for any pictures, in Python or in a terminal: `python predict.py cat.jpg truck.png`."""

import argparse
import glob
import os
import sys
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from augment import augment_batch, get_test_transforms
from devices import unwrap
from epoch import are_probabilities
from image_sets import CIFAR10_CLASSES, FORMATS, to_rgb
from output import save_figure
from pretrained import shipped
from recipes import load_network


class Prediction(NamedTuple):
    """The most probable class of one picture, its probability, and those of all classes, {name: probability}."""

    class_name: str
    probability: float
    probabilities: dict[str, float]

    def best(self):
        """The three most probable classes, [(name, probability)]."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:3]

    def __str__(self):
        return ", ".join(f"{name} {probability:.1%}" for name, probability in self.best())


def class_names(label_map):
    """The names of the classes, in the order of their labels, which are 0, 1, 2, ..., else ValueError.

    label_map is a list of names in this order, {name: label}, as the loaders give, or {label: name}.
    """
    pairs = dict(enumerate(label_map)) if isinstance(label_map, (list, tuple)) else dict(label_map)
    if set(pairs.values()) == set(range(len(pairs))):
        pairs = {label: name for name, label in pairs.items()}
    names = [str(pairs[label]) for label in range(len(pairs)) if label in pairs]
    if len({*names}) < len(pairs):
        advice = "give each name once, in a list, {name: label} or {label: name}, with the labels 0, 1, 2, ..."
        raise ValueError(f"{label_map!r} does not say the class of each label; {advice}")
    return names


def predict(model, images, classes=CIFAR10_CLASSES, transforms=None):
    """A `Prediction` for each of some pictures of any size and mode, which are squeezed to 32x32 RGB.

    Args:
        model: returns (N, classes) scores, log-probabilities or probabilities for float32 (N, 3, 32, 32), on any
            device; it is put in evaluation mode.
        images: one picture or a list of them. A picture is a file name, a PIL image, or an array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), uint8 or floating-point from 0 to 1; else OSError, ValueError or TypeError.
        classes: names of the model's outputs, in any form that `class_names` takes.
        transforms: an `albumentations.Compose` that normalises as in training, by default `get_test_transforms()`.
    """
    classes = class_names(classes)
    if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    pixels = [to_rgb(_as_pil(image)) for image in images]
    if not pixels:
        return []
    images = augment_batch(transforms or get_test_transforms(), np.stack(pixels), np.random.default_rng(0))
    rows = probabilities(model, images).tolist()
    if len(rows[0]) != len(classes):
        raise ValueError(f"the model has {len(rows[0])} outputs and {len(classes)} class names were given")
    return [Prediction(classes[int(np.argmax(row))], max(row), dict(zip(classes, row))) for row in rows]


@torch.no_grad()
def probabilities(model, images):
    """Probabilities (N, classes), on the CPU, of normalised images float (N, 3, H, W)."""
    model = unwrap(model).eval()  # torch.compile would compile anew for each number of pictures
    parameter = next(model.parameters(), torch.empty(0))
    scores = torch.cat([model(batch.to(parameter)).float().cpu() for batch in images.split(256)])  # memory for 256
    return scores if are_probabilities(scores) else scores.softmax(dim=1)


def _as_pil(image):
    """One picture, in any of the forms that `predict` takes, as a PIL image."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        pixels = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
        if np.issubdtype(pixels.dtype, np.floating) and pixels.min() >= 0 and pixels.max() <= 1:  # false for NaN too
            pixels = (pixels * 255).round().astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(pixels))
    with open(image, "rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as opened:
                opened.load()
            return opened
        except Exception as error:  # a damaged file can make Pillow raise nearly anything
            raise ValueError(f"{image} is not a picture that can be read ({error})") from None


def post_predictions(pictures, predictions, path=None):
    """Pictures, in any form that `predict` takes, each above its three most probable classes."""
    columns, rows = min(len(pictures), 6), -(-len(pictures) // 6)
    size = (2.3 * columns, 3.6 * rows)
    figure, axes = plt.subplots(2 * rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for number, (picture, prediction) in enumerate(zip(pictures, predictions)):
        above, below = axes[2 * (number // columns) :, number % columns][:2]
        above.imshow(_as_pil(picture).convert("RGB"))
        below.axis("on")
        for position, (name, probability) in enumerate(prediction.best()):
            below.barh(-position, 100 * probability, color="tab:green", alpha=0.4)
            below.text(3, -position, f"{name} {probability:.1%}", va="center", fontsize=11, parse_math=False)
        below.set(xlim=(0, 100), yticks=[], xlabel="probability (%)")
    return save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=f"Classify pictures, by default as {', '.join(CIFAR10_CLASSES)}.")
    parser.add_argument("pictures", nargs="+", metavar="picture", help="an image file of any size")
    parser.add_argument("--weights", help=f"{', '.join(shipped())} (default: the first), or your runs/<name>/last.pt")
    parser.add_argument("--show", metavar="FILE", help="draw the pictures and their classes into this file")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter of a name
    try:
        model, classes = load_network(arguments.weights or shipped()[0])
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    shown, failed = {}, False
    for name in arguments.pictures:
        for picture in sorted(glob.glob(name)) or [name]:  # which Windows' shells do not expand
            try:
                [shown[picture]] = predict(model, picture, classes)
            except (OSError, ValueError) as error:
                print(error, file=sys.stderr)
                failed = True
            else:
                print(f"{picture}: {shown[picture]}")
    if arguments.show and shown:
        post_predictions([*shown], [*shown.values()], arguments.show)
    sys.exit(failed)


if __name__ == "__main__":
    main()
