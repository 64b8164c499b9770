"""The transforms: what the original ones did, and that whole batches get what Compose does image by image."""

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from scipy import stats

import utils
from augment import BATCHED, ShiftScaleRotate, augment_batch

FLIP, SHIFT_SCALE_ROTATE, CUTOUT, *_ = utils.get_train_transforms().transforms
WITH_CROP = utils.get_train_transforms(crop_padding=4).transforms


def random_images(n):
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def by_batch(pipeline, images, seed=0):
    batch = augment_batch(pipeline, images.copy(), np.random.default_rng(seed))
    assert batch.is_contiguous()  # which a view of the images relies on
    return batch.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "transform, p",
    [
        (FLIP, 0.1),
        (SHIFT_SCALE_ROTATE, 0.1),
        (CUTOUT, 0.3),
        (A.Compose([FLIP, SHIFT_SCALE_ROTATE, CUTOUT]), 1 - 0.9 * 0.9 * 0.7),
        (A.CoarseDropout(num_holes_range=(2, 2), p=0.25), 0.25),
        (A.OneOf([ShiftScaleRotate(p=1), A.Transpose(p=1)], p=0.4), 0.4),
        (A.Compose([A.VerticalFlip(p=1)], p=0.2), 0.2),
    ],
)
def test_each_fires_as_often_as_it_says_and_independently(transform, p):
    images = random_images(2000)
    fired = (by_batch(transform, images) != images).any(axis=(1, 2, 3)).sum()
    assert stats.binomtest(int(fired), len(images), p).pvalue > 1e-4


def test_hole_is_one_16x16_square_of_the_mean_colour_anywhere_inside():
    holes = by_batch(CUTOUT, np.zeros((4000, 32, 32, 3), dtype=np.uint8))
    holes = holes[holes.any(axis=(1, 2, 3))]
    rows, columns = ((holes != 0).any(axis=(3, other)) for other in (2, 1))
    assert (rows.sum(axis=1) == 16).all() and (columns.sum(axis=1) == 16).all()
    # 255 * (0.4914, 0.4822, 0.4465), rounded
    assert ((holes == (125, 123, 114)).all(axis=3).sum(axis=(1, 2)) == 256).all()
    corners = np.stack([rows.argmax(axis=1), columns.argmax(axis=1)])
    for corner in corners:
        assert stats.chisquare(np.bincount(corner, minlength=17)).pvalue > 1e-4
    assert abs(np.corrcoef(corners)[0, 1]) < 5 / len(holes) ** 0.5


def test_shift_scale_rotate_draws_uniformly_and_independently_about_the_centre():
    n, centre = 40_000, np.array([15.5, 15.5])
    matrices = SHIFT_SCALE_ROTATE.matrices(np.random.default_rng(0), n, (32, 32, 3))
    scale = np.hypot(matrices[:, 0, 0], matrices[:, 0, 1])
    angle = np.degrees(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    shift = (matrices @ np.array([15.5, 15.5, 1]) - 15.5) / 32  # of the centre of the image
    for values, low, high in [(scale, 0.8, 1.2), (angle, -15, 15), (shift[:, 0], -0.1, 0.1), (shift[:, 1], -0.1, 0.1)]:
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    assert np.abs(np.corrcoef(np.stack([scale, angle, *shift.T])) - np.eye(4)).max() < 5 / n**0.5
    rotation = cv2.getRotationMatrix2D(centre, angle[0], scale[0])  # as Albumentations 1.3.1
    np.testing.assert_allclose(matrices[0], rotation + np.pad(32 * shift[:1].T, ((0, 0), (2, 0))), atol=1e-9)


def test_shift_scale_rotate_interpolates_and_reflects_the_border():
    image = random_images(1)[0]
    reflected = np.pad(image.astype(float), ((0, 0), (3, 0), (0, 0)), "reflect")
    shifted = SHIFT_SCALE_ROTATE.apply(image, np.array([[1, 0, 2.5], [0, 1, 0]]))
    np.testing.assert_allclose(shifted, (reflected[:, :-3] + reflected[:, 1:-2]) / 2, atol=1)


def test_crops_are_windows_of_the_reflected_image_each_as_likely():
    images = random_images(2000)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), "reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), axis=(1, 2))  # (N, 9, 9, 3, 32, 32)
    crop = A.Compose([transform for transform in WITH_CROP if isinstance(transform, (A.Pad, A.RandomCrop))])
    counts = np.zeros((9, 9), int)
    for window, got in zip(windows, by_batch(crop, images).transpose(0, 3, 1, 2)):
        ((row, column),) = np.argwhere((window == got).all(axis=(2, 3, 4)))
        counts[row, column] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_every_transform_of_this_project_has_a_batched_form():
    assert all(type(transform) in BATCHED for transform in WITH_CROP)


@pytest.mark.parametrize(
    "transforms",  # nothing in them is drawn, so that batch and image must agree
    [
        [A.Transpose(p=1), A.HorizontalFlip(p=1)],
        [A.Resize(40, 40), A.CenterCrop(32, 32)],
        [A.Pad(padding=2)],
        [A.Pad(padding=40, border_mode=cv2.BORDER_REFLECT_101)],
        [A.Normalize(normalization="min_max"), ToTensorV2()],
        [A.ToGray(num_output_channels=1, p=1), A.Normalize(0.5, 0.25), ToTensorV2()],
        [A.Compose([A.Normalize(), ToTensorV2()])],
    ],
)
def test_batches_get_what_albumentations_does_by_itself(transforms):
    images = random_images(6)
    got = by_batch(A.Compose(transforms), images)
    want = [torch.as_tensor(A.Compose(transforms)(image=image)["image"]) for image in images]
    want = np.stack([image.permute(1, 2, 0) if image.shape[0] in (1, 3) else image for image in want])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert got.dtype != np.float64  # as Albumentations makes some, on which nothing trains


def test_a_pipeline_of_another_library_is_refused_by_name():
    with pytest.raises(TypeError, match="Flatten"):
        by_batch(torch.nn.Flatten(), random_images(4))
