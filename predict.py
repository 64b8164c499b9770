"""Class names and probabilities for any pictures, in Python or in a terminal.

predict(Model.from_pretrained("tuned"), ["cat.jpg", "truck.png"])

python predict.py cat.jpg truck.png
"""

import argparse
import contextlib
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from image_sets import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not all of Pillow's: some of its readers start other programs
PICTURE = "file name, a PIL image or a NumPy array"


class Prediction(NamedTuple):
    """The most probable class of one picture, its probability, and those of all classes, {name: probability}."""

    class_name: str
    probability: float
    probabilities: dict[str, float]


@torch.no_grad()
def predict(model, images, classes=CIFAR10_CLASSES):
    """Classify pictures of any size and mode; each is brought to 32x32 RGB, squeezed if it is not square.

    Args:
        model: returns (N, classes) scores or log-probabilities for normalised float32 (N, 3, 32, 32), on any device.
        images: one picture or a list of them. A picture is a file name, a PIL image, or an array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), uint8 from 0 to 255 or floating-point from 0 to 1.
        classes: class names in the order of the model's outputs, or {name: output}, as the loaders give them.

    Returns:
        A list of `Prediction`, one a picture, with probabilities that sum to 1.

    Raises:
        FileNotFoundError, ValueError, TypeError: something that is not a picture; says which.
    """
    classes = sorted(classes, key=classes.get) if isinstance(classes, dict) else list(classes)
    if isinstance(images, (str, os.PathLike, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
        pixels = [_as_rgb(images, "images")]
    elif isinstance(images, (list, tuple, np.ndarray)):
        pixels = [_as_rgb(image, f"images[{index}]") for index, image in enumerate(images)]
    else:
        raise TypeError(f"images is a {type(images).__name__}; give a picture ({PICTURE}) or a list of pictures")
    if not pixels:
        return []
    normalised = (np.stack(pixels).astype(np.float32) / 255 - np.float32(CIFAR10_MEAN)) / np.float32(CIFAR10_STD)
    batches = torch.from_numpy(normalised).permute(0, 3, 1, 2).split(256)  # memory for 256 at a time
    parameter = next(model.parameters(), torch.empty(0))
    with evaluation_mode(model):
        scores = torch.cat([model(batch.to(parameter)).float() for batch in batches])
    if not scores.softmax(dim=1).isfinite().all():
        raise ValueError("the model's scores are not finite; load weights that are")
    if scores.shape[1] != len(classes):
        raise ValueError(f"the model has {scores.shape[1]} outputs and {len(classes)} class names were given")
    return [
        Prediction(classes[int(np.argmax(row))], float(max(row)), dict(zip(classes, row)))
        for row in scores.softmax(dim=1).tolist()
    ]


@contextlib.contextmanager
def evaluation_mode(model):
    """Dropout off and running statistics in use; afterwards every module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


def _as_rgb(image, name):
    """One picture, in any of the forms that `predict` takes, as uint8 (32, 32, 3)."""
    if isinstance(image, np.ndarray):
        return to_rgb(_array_as_pil(image, name))
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        raise TypeError(f"{name} is a {type(image).__name__}; a picture is a {PICTURE}")
    try:
        if isinstance(image, Image.Image):
            return to_rgb(image)
        with Image.open(image, formats=FORMATS) as opened:
            return to_rgb(opened)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no file {image}") from None
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        raise ValueError(f"{name}: {image} is not a picture that can be read ({error})") from None


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


def main():
    from models import Model  # here, because whoever imports `predict` brings a model

    parser = argparse.ArgumentParser(description="Classify pictures with the weights of the tuned recipe.")
    parser.add_argument("pictures", nargs="+", metavar="picture", help="an image file of any size")
    pictures = parser.parse_args().pictures
    try:
        model, failed = Model.from_pretrained("tuned"), False
    except ValueError as error:
        sys.exit(error)
    for picture in pictures:
        try:
            (prediction,) = predict(model, picture)
            print(f"{picture}: {prediction.class_name} ({prediction.probability:.1%})")
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
