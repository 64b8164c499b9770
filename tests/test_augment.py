"""The transforms: what the original ones did, and that the batched path does what Compose does, image by image."""

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from scipy import stats

import utils
from augment import BATCHED, ShiftScaleRotate, augment_batch

N = 4000
MEAN_COLOUR = np.array([125, 123, 114])  # 255 * (0.4914, 0.4822, 0.4465), rounded
WITHOUT_CROP = utils.get_train_transforms().transforms
WITH_CROP = utils.get_train_transforms(crop_padding=4).transforms


def random_images(n):
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def by_batch(pipeline, images, seed=0):
    batch = augment_batch(pipeline, images.copy(), np.random.default_rng(seed))
    assert batch.is_contiguous()  # which a view of the images relies on
    return batch.permute(0, 2, 3, 1).numpy()


def by_image(pipeline, images):
    pipeline = A.Compose([pipeline], seed=0)
    return np.stack([pipeline(image=image)["image"] for image in images])


PATHS = pytest.mark.parametrize("path", [by_batch, by_image], ids=["batched", "Compose"])


def transform_of(kind):
    """The instance in the pipeline of the notebook, alone."""
    return next(transform for transform in WITHOUT_CROP if isinstance(transform, kind))


def changed(before, after):
    return (before != after).any(axis=(1, 2, 3))


OFTEN = {
    "flip": (transform_of(A.HorizontalFlip), 0.1),
    "shift, scale, rotate": (transform_of(ShiftScaleRotate), 0.1),
    "one hole": (transform_of(A.CoarseDropout), 0.3),
    "two holes": (A.CoarseDropout(num_holes_range=(2, 2), p=0.25), 0.25),
    "one of two flips": (A.OneOf([A.VerticalFlip(p=1), A.Transpose(p=1)], p=0.4), 0.4),
    "flips of some": (A.Compose([A.VerticalFlip(p=1)], p=0.2), 0.2),
}


@PATHS
@pytest.mark.parametrize("case", OFTEN)
def test_how_often_each_fires(case, path):
    transform, p = OFTEN[case]
    images = random_images(2000)
    fired = changed(images, path(transform, images))
    assert stats.binomtest(int(fired.sum()), len(images), p).pvalue > 1e-4


def test_images_are_normalised_by_the_statistics_of_cifar10():
    """As published: of the training images, per channel, red first."""
    grey = utils.get_test_transforms()(image=np.full((1, 1, 3), 51, np.uint8))["image"].flatten()
    np.testing.assert_allclose(
        grey, [(0.2 - 0.4914) / 0.2471, (0.2 - 0.4822) / 0.2435, (0.2 - 0.4465) / 0.2616], rtol=1e-5
    )


def test_they_fire_independently_of_each_other():
    images = random_images(N)
    fired = changed(images, by_batch(A.Compose(WITHOUT_CROP[:3]), images))
    assert stats.binomtest(int(fired.sum()), N, 1 - 0.9 * 0.9 * 0.7).pvalue > 1e-4


@PATHS
def test_hole_is_one_16x16_square_of_the_mean_colour_anywhere_inside(path):
    images = np.zeros((N, 32, 32, 3), dtype=np.uint8)
    after = path(transform_of(A.CoarseDropout), images)
    holes = after[changed(images, after)]
    mask = (holes == MEAN_COLOUR).all(axis=3)
    assert np.array_equal(mask, (holes != 0).any(axis=3))  # nothing but the mean colour
    rows, columns = mask.any(axis=2), mask.any(axis=1)
    assert (mask.sum(axis=(1, 2)) == 256).all() and (rows.sum(axis=1) == 16).all() and (columns.sum(axis=1) == 16).all()
    for corner in (rows.argmax(axis=1), columns.argmax(axis=1)):
        counts = np.bincount(corner, minlength=17)
        assert len(counts) == 17 and stats.chisquare(counts).pvalue > 1e-4
    assert abs(stats.pearsonr(rows.argmax(axis=1), columns.argmax(axis=1)).statistic) < 5 / len(holes) ** 0.5


def test_shift_scale_rotate_draws_uniformly_within_its_ranges():
    matrices = transform_of(ShiftScaleRotate).matrices(np.random.default_rng(0), N, (32, 32, 3))
    scale = np.hypot(matrices[:, 0, 0], matrices[:, 0, 1])
    angle = np.degrees(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    centre = matrices @ np.array([15.5, 15.5, 1])  # where the centre of the image goes
    shift = (centre - 15.5) / 32
    for values, low, high in [(scale, 0.8, 1.2), (angle, -15, 15), (shift[:, 0], -0.1, 0.1), (shift[:, 1], -0.1, 0.1)]:
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    correlations = np.corrcoef(np.stack([scale, angle, *shift.T])) - np.eye(4)
    assert np.abs(correlations).max() < 5 / N**0.5


def test_shift_scale_rotate_is_opencvs_rotation_about_the_centre_with_reflected_border():
    """As Albumentations 1.3.1 computed it: getRotationMatrix2D, then a shift in fractions of the side."""

    class Fixed:
        draws = iter([np.array([10.0]), np.array([1.1]), np.array([0.05]), np.array([-0.03])])

        def uniform(self, low, high, n):
            return next(self.draws)

    transform = ShiftScaleRotate()
    (matrix,) = transform.matrices(Fixed(), 1, (32, 32, 3))
    expected = cv2.getRotationMatrix2D((15.5, 15.5), 10, 1.1) + np.array([[0, 0, 1.6], [0, 0, -0.96]])
    np.testing.assert_allclose(matrix, expected, atol=1e-12)
    image = random_images(1)[0]
    shifted = transform.apply(image, np.array([[1.0, 0, 3], [0, 1.0, 0]]))
    assert np.array_equal(shifted[:, 3:], image[:, :-3]) and np.array_equal(shifted[:, :3], image[:, 3:0:-1])


@PATHS
def test_crops_are_windows_of_the_reflected_image_each_as_likely(path):
    crop = A.Compose([transform for transform in WITH_CROP if isinstance(transform, (A.Pad, A.RandomCrop))])
    images = random_images(2000)
    padded = np.stack([cv2.copyMakeBorder(image, 4, 4, 4, 4, cv2.BORDER_REFLECT_101) for image in images])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), axis=(1, 2))  # (N, 9, 9, 3, 32, 32)
    counts = np.zeros((9, 9), int)
    for window, got in zip(windows, path(crop, images).transpose(0, 3, 1, 2)):
        ((row, column),) = np.argwhere((window == got).all(axis=(2, 3, 4)))
        counts[row, column] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_every_transform_of_this_project_has_a_batched_form():
    assert all(type(transform) in BATCHED for transform in WITH_CROP)


# Pipelines of a user's own: what each does to an image is known, so batch and image must agree exactly.
@pytest.mark.parametrize(
    "transforms",
    [
        [A.Transpose(p=1), A.HorizontalFlip(p=1)],
        [A.Resize(40, 40), A.CenterCrop(32, 32)],
        [A.OneOf([A.VerticalFlip(p=1)], p=1)],
        [A.Normalize(normalization="min_max"), ToTensorV2()],
        [A.ToGray(num_output_channels=1, p=1), A.Normalize(0.5, 0.25), ToTensorV2()],
        [A.Compose([A.Normalize(), ToTensorV2()])],
        [A.Solarize(threshold_range=(0.5, 0.5), p=1), A.ToFloat(max_value=255)],
    ],
    ids=lambda transforms: "-".join(type(t).__name__ for t in transforms),
)
def test_pipelines_of_a_users_own(transforms):
    images = random_images(6)
    got = by_batch(A.Compose(transforms), images)
    want = [torch.as_tensor(A.Compose(transforms)(image=image)["image"]) for image in images]
    want = np.stack([image.permute(1, 2, 0) if image.shape[0] in (1, 3) else image for image in want])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert got.dtype != np.float64  # as Albumentations makes some, on which nothing trains


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transforms", [WITH_CROP, [A.RandomBrightnessContrast(p=0.5)]], ids=["ours", "a user's own"])
def test_all_randomness_comes_from_the_generator(transforms):
    first, same, other = (by_batch(A.Compose(transforms), random_images(64), seed) for seed in (3, 3, 4))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_what_no_batch_can_be_made_with_is_refused():
    with pytest.raises(ValueError, match="same shape"):
        by_batch(A.RandomScale(scale_limit=0.5, p=0.5), random_images(32))
    with pytest.raises(TypeError, match=r"Flatten; .*albumentations\.Compose"):
        by_batch(torch.nn.Flatten(), random_images(4))


@pytest.mark.parametrize("padding, side", [(4, 32), (5, 7), (9, 8)])
def test_the_border_is_opencvs_reflection(padding, side):
    images = random_images(3)[:, :side]
    padded = by_batch(A.Pad(padding=padding, border_mode=cv2.BORDER_REFLECT_101), images)
    border = [padding] * 4
    assert np.array_equal(padded, [cv2.copyMakeBorder(image, *border, cv2.BORDER_REFLECT_101) for image in images])
