"""From an array of images to augmented batches: the transforms, and Albumentations pipelines run on whole batches.

All randomness comes from the generator passed in, not from the pipeline's own state, which repeats itself in loader
workers (AlbumentationsX issue 266).
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or importing it asks the network for newer versions

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from image_sets import CIFAR10_MEAN, CIFAR10_STD


class ShiftScaleRotate(A.ImageOnlyTransform):
    """Shift, scale and rotate about the centre, as in Albumentations 1.3.1: bilinear, with a reflected border.

    Drawn uniformly: the shift along each axis, up to ± shift_limit of the side; the scale, from 1 ± scale_limit; the
    angle, up to ± rotate_limit degrees. `A.Affine`, which took its place, shifts by whole pixels only.
    """

    def __init__(self, shift_limit=0.1, scale_limit=0.2, rotate_limit=15, p=0.5):
        super().__init__(p=p)
        self.shift_limit, self.scale_limit, self.rotate_limit = shift_limit, scale_limit, rotate_limit

    def get_params_dependent_on_data(self, params, data):
        return {"matrix": self.matrices(self.random_generator, 1, params["shape"])[0]}

    def apply(self, img, matrix, **params):
        return cv2.warpAffine(img, matrix, img.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)

    def matrices(self, rng, n, shape):
        """Draw n affine matrices, float64 (n, 2, 3), for images of the given (H, W, ...)."""
        height, width = shape[:2]
        angle = np.deg2rad(rng.uniform(-self.rotate_limit, self.rotate_limit, n))
        scale = rng.uniform(1 - self.scale_limit, 1 + self.scale_limit, n)
        shift_x = rng.uniform(-self.shift_limit, self.shift_limit, n) * width
        shift_y = rng.uniform(-self.shift_limit, self.shift_limit, n) * height
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        x, y = (width - 1) / 2, (height - 1) / 2
        row_x = np.stack([cos, sin, (1 - cos) * x - sin * y + shift_x], axis=1)
        row_y = np.stack([-sin, cos, sin * x + (1 - cos) * y + shift_y], axis=1)
        return np.stack([row_x, row_y], axis=1)


def get_train_transforms(flip=0.1, shift_scale_rotate=0.1, cutout=0.3, crop_padding=0):
    """Augmentations, by default those of the original run, from uint8 (32, 32, 3) to float32 (3, 32, 32).

    Args:
        flip, shift_scale_rotate: probabilities of a horizontal flip, and of a shift by up to 10 %, a scale of 0.8 to
            1.2 and a rotation by up to 15 degrees.
        cutout: probability of one 16x16 hole in the mean colour, all of it inside the image (after DeVries & Taylor,
            arXiv 1708.04552, whose holes may stick out).
        crop_padding: pixels of reflected border, before a random crop back to 32x32; 0 for no crop.
    """
    crop = [A.Pad(padding=crop_padding, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(32, 32)]
    mean_colour = tuple(round(255 * mean) for mean in CIFAR10_MEAN)
    augmentations = [
        A.HorizontalFlip(p=flip),
        ShiftScaleRotate(p=shift_scale_rotate),
        *(crop if crop_padding else []),
        A.CoarseDropout((1, 1), (16, 16), (16, 16), fill=mean_colour, p=cutout),
    ]
    return A.Compose([*augmentations, *get_test_transforms()])


def get_test_transforms():
    """Normalisation only: an `albumentations.Compose` from uint8 (H, W, 3) to float32 (3, H, W)."""
    return A.Compose([A.Normalize(CIFAR10_MEAN, CIFAR10_STD), A.ToTensorV2()])


def normalisation(transforms):
    """(mean, std) per channel, on the scale 0 to 1, of the normalisation in a pipeline; CIFAR-10's if there is none."""
    steps = [*getattr(transforms, "transforms", [transforms]), *get_test_transforms()]
    step = next(step for step in steps if type(step).__name__ == "Normalize")  # torchvision's, too
    scale = getattr(step, "max_pixel_value", 255) / 255
    return np.array(step.mean) * scale, np.array(step.std) * scale


def data_of(loader):
    """The data set of a loader, be it behind a `Subset`; the loader itself if it has none."""
    return data_of(loader.dataset) if hasattr(loader, "dataset") else loader


def augment_batch(pipeline, images, rng):
    """Apply an `A.Compose`, or a single Albumentations transform, to each image of a batch.

    images are uint8 (N, H, W, 3), and may be modified; rng is a `numpy.random.Generator`. Returns a tensor
    (N, 3, H, W), float32 if the pipeline has `A.Normalize`. All images must come out in one size.
    """
    if not isinstance(pipeline, (A.BaseCompose, A.BasicTransform)):
        raise TypeError(f"transforms is a {type(pipeline).__name__}; it must be an albumentations.Compose")
    plain = type(pipeline) is A.Compose and pipeline.p == 1
    for transform in pipeline.transforms if plain else [pipeline]:
        changed = BATCHED.get(type(transform), _image_by_image)(transform, images, rng)
        images = _image_by_image(transform, images, rng) if changed is None else changed
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # older networks flatten images by a view
    return batch.float() if batch.dtype == torch.float64 else batch  # as some of A.Normalize's variants make it


# ---- transforms on whole batches; None stands for arguments that none of this project's pipelines has ---------------


def _firing(transform, images, rng):
    """Indices of the images on which the transform fires."""
    return np.flatnonzero(rng.random(len(images)) < transform.p)


def _horizontal_flip(transform, images, rng):
    firing = _firing(transform, images, rng)
    images[firing] = images[firing][:, :, ::-1]
    return images


def _shift_scale_rotate(transform, images, rng):
    firing = _firing(transform, images, rng)
    for index, matrix in zip(firing, transform.matrices(rng, len(firing), images.shape[1:])):
        images[index] = transform.apply(images[index], matrix)
    return images


def _coarse_dropout(transform, images, rng):
    if isinstance(transform.fill, str) or transform.num_holes_range != (1, 1) or transform.hole_height_range[1] < 1:
        return None
    firing = _firing(transform, images, rng)
    corners = []
    for side, (low, high) in zip(images.shape[1:3], (transform.hole_height_range, transform.hole_width_range)):
        length = rng.integers(int(low), min(int(high), side) + 1, len(firing))
        start = rng.integers(0, side - length + 1)
        corners += [start, start + length]
    for index, top, bottom, left, right in zip(firing, *corners):
        images[index, top:bottom, left:right] = transform.fill
    return images


def _pad(transform, images, rng):
    pad, no = transform.padding, (0, 0)
    if (transform.border_mode, transform.p) != (cv2.BORDER_REFLECT_101, 1) or pad not in range(min(images.shape[1:3])):
        return None
    return np.pad(images, (no, (pad, pad), (pad, pad), no), "reflect")


def _random_crop(transform, images, rng):
    n, height, width = images.shape[:3]
    if transform.p < 1 or transform.height > height or transform.width > width:
        return None
    tops = rng.integers(0, height - transform.height + 1, n)
    lefts = rng.integers(0, width - transform.width + 1, n)
    corners = zip(images, tops, lefts)
    return np.stack([image[y : y + transform.height, x : x + transform.width] for image, y, x in corners])


def _normalize(transform, images, rng):
    if transform.normalization != "standard" or transform.p < 1:
        return None
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # a plane a channel, to vectorise
    mean, factor = map(torch.as_tensor, (transform.mean_np, transform.denominator))
    planes = torch.from_numpy(planes).float().sub_(mean.view(-1, 1, 1)).mul_(factor.view(-1, 1, 1))
    return planes.permute(0, 2, 3, 1).numpy()


BATCHED = {
    A.HorizontalFlip: _horizontal_flip,
    ShiftScaleRotate: _shift_scale_rotate,
    A.CoarseDropout: _coarse_dropout,
    A.Pad: _pad,
    A.RandomCrop: _random_crop,
    A.Normalize: _normalize,
    A.ToTensorV2: lambda transform, images, rng: images,  # augment_batch makes the tensor, of the whole batch
}


def _image_by_image(transform, images, rng):
    """Any other transform: Albumentations itself, one image at a time."""
    transform.set_random_seed(int(rng.integers(2**32)))
    results = [transform(image=image)["image"] for image in images]
    if isinstance(results[0], torch.Tensor):  # of a nested ToTensorV2
        results = [image.permute(1, 2, 0).numpy() for image in results]
    return np.stack([image[..., None] if image.ndim == 2 else image for image in results])


class ImageBatches(Dataset):
    """An `image_sets.ImageSet`, with its attributes, that a `DataLoader` reads, and this augments, a batch at a time.

    `dataset[i]` is one (image float32 (3, 32, 32), label) pair. Changed attributes take effect in the next epoch.
    """

    def __init__(self, image_set, transforms):
        vars(self).update(image_set._asdict(), transforms=transforms)

    # torchvision's names of the same
    data = property(lambda self: self.images, lambda self, images: setattr(self, "images", images))
    targets = property(lambda self: self.labels, lambda self, labels: setattr(self, "labels", labels))
    transform = property(lambda self: self.transforms, lambda self, given: setattr(self, "transforms", given))
    class_to_idx = property(lambda self: {name: index for index, name in enumerate(self.classes)})

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return default_collate(self.__getitems__(index)) if isinstance(index, list) else self.__getitems__([index])[0]

    def __getitems__(self, indices):
        indices = [int(index) for index in indices]
        seed = int(torch.empty((), dtype=torch.int64).random_())  # other ones in each worker and epoch
        images = augment_batch(self.transforms, self.images[indices], np.random.default_rng(seed))
        labels = torch.as_tensor(self.labels)[indices]  # which may be probabilities
        return [*zip(images, labels if labels.ndim > 1 or labels.is_floating_point() else labels.tolist())]
