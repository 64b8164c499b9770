"""The transforms: what the original ones did, and that the batched path does what Compose does, image by image."""

import warnings

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


def rng(seed=0):
    return np.random.default_rng(seed)


def random_images(n, seed=0):
    return rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def hwc(batch):
    return batch.permute(0, 2, 3, 1).numpy()


def by_batch(transforms, images, seed=0):
    return hwc(augment_batch(A.Compose(transforms), images.copy(), rng(seed)))


def by_image(transforms, images, seed=0):
    pipeline = A.Compose(transforms, seed=seed)
    return np.stack([pipeline(image=image)["image"] for image in images])


PATHS = pytest.mark.parametrize("path", [by_batch, by_image], ids=["batched", "Compose"])


def transform_of(kind):
    """The instance in the pipeline of the notebook, alone."""
    return next(t for t in utils.get_train_transforms().transforms if isinstance(t, kind))


def changed(before, after):
    return (before != after).any(axis=(1, 2, 3))


@PATHS
@pytest.mark.parametrize("kind, p", [(A.HorizontalFlip, 0.1), (ShiftScaleRotate, 0.1), (A.CoarseDropout, 0.3)])
def test_how_often_each_fires(kind, p, path):
    images = random_images(N)
    assert stats.binomtest(int(changed(images, path([transform_of(kind)], images)).sum()), N, p).pvalue > 1e-4


def test_they_fire_independently_of_each_other():
    transforms = utils.get_train_transforms().transforms[:3]
    untouched = ~changed(random_images(N), by_batch(transforms, random_images(N)))
    assert stats.binomtest(int(untouched.sum()), N, 0.9 * 0.9 * 0.7).pvalue > 1e-4


@PATHS
def test_flip_mirrors_left_and_right(path):
    images = random_images(200)
    after = path([A.HorizontalFlip(p=1)], images)
    assert np.array_equal(after, images[:, :, ::-1])


@PATHS
def test_hole_is_one_16x16_square_of_the_mean_colour_anywhere_inside(path):
    images = np.zeros((N, 32, 32, 3), dtype=np.uint8)
    after = path([transform_of(A.CoarseDropout)], images)
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
    matrices = transform_of(ShiftScaleRotate).matrices(rng(), N, (32, 32, 3))
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
def test_affine_outcomes_have_the_same_distribution(path):
    """Where a bright spot goes, and how bright it stays, batched and by Compose."""
    images = np.zeros((1500, 32, 32, 3), dtype=np.uint8)
    images[:, 14:18, 20:24] = 255
    weights = path([ShiftScaleRotate(p=1)], images, seed=1).mean(axis=3) / 255
    other = by_image([ShiftScaleRotate(p=1)], images, seed=2).mean(axis=3) / 255
    grid = np.arange(32)
    for axis in (1, 2):
        centres = [(w.sum(axis=3 - axis) * grid).sum(axis=1) / w.sum(axis=(1, 2)) for w in (weights, other)]
        assert stats.ks_2samp(*centres).pvalue > 1e-4
    assert stats.ks_2samp(weights.sum(axis=(1, 2)), other.sum(axis=(1, 2))).pvalue > 1e-4


def test_normalisation_and_layout():
    images = random_images(8)
    batch = augment_batch(utils.get_test_transforms(), images.copy(), rng())
    expected = (images / 255 - np.array(utils.CIFAR10_MEAN)) / np.array(utils.CIFAR10_STD)
    np.testing.assert_allclose(hwc(batch), expected, atol=1e-5)
    assert batch.dtype == torch.float32 and batch.shape == (8, 3, 32, 32)
    assert batch.is_contiguous()  # which a view of the images relies on
    single = utils.get_test_transforms()(image=images[0])["image"]
    torch.testing.assert_close(batch[0], single)


@PATHS
def test_crops_are_windows_of_the_reflected_image_each_as_likely(path):
    transforms = utils.get_train_transforms(crop_padding=4).transforms
    crop = [transform for transform in transforms if isinstance(transform, (A.Pad, A.RandomCrop))]
    images = random_images(N)
    padded = np.stack([cv2.copyMakeBorder(image, 4, 4, 4, 4, cv2.BORDER_REFLECT_101) for image in images])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), axis=(1, 2))  # (N, 9, 9, 3, 32, 32)
    counts = np.zeros((9, 9), int)
    for window, got in zip(windows, path(crop, images).transpose(0, 3, 1, 2)):
        matches = np.argwhere((window == got).all(axis=(2, 3, 4)))
        assert len(matches) == 1
        counts[tuple(matches[0])] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_every_transform_of_this_project_has_a_batched_form():
    assert all(type(t) in BATCHED for t in utils.get_train_transforms(crop_padding=4).transforms)


# Pipelines of a user's own: what each does to an image is known, so batch and image must agree exactly.
@pytest.mark.parametrize(
    "transforms",
    [
        [A.VerticalFlip(p=1)],
        [A.Transpose(p=1), A.HorizontalFlip(p=1)],
        [A.Resize(40, 40), A.CenterCrop(32, 32)],
        [A.ToGray(p=1)],
        [A.OneOf([A.VerticalFlip(p=1)], p=1)],
        [A.Sequential([A.HorizontalFlip(p=1), A.VerticalFlip(p=1)], p=1)],
        [A.Normalize(mean=0.5, std=0.25), ToTensorV2()],
        [A.Normalize(normalization="min_max"), ToTensorV2()],
        [A.Normalize(normalization="image_per_channel"), ToTensorV2()],
        [A.ToGray(num_output_channels=1, p=1), A.Normalize(0.5, 0.25), ToTensorV2()],
        [A.ToGray(num_output_channels=1, p=1), ToTensorV2()],
        [A.Compose([A.Normalize(), ToTensorV2()])],
        [A.Solarize(threshold_range=(0.5, 0.5), p=1), A.ToFloat(max_value=255)],
    ],
    ids=lambda transforms: "-".join(type(t).__name__ for t in transforms),
)
def test_pipelines_of_a_users_own(transforms):
    images = random_images(6)
    got = augment_batch(A.Compose(transforms), images.copy(), rng())
    want = [torch.as_tensor(A.Compose(transforms)(image=image)["image"]) for image in images]
    want = torch.stack([image if image.shape[0] in (1, 3) else image.permute(2, 0, 1) for image in want])
    want = want.float() if want.dtype == torch.float64 else want  # Albumentations' own slip; nothing trains on it
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "transform, p",
    [
        (A.VerticalFlip(p=0.3), 0.3),
        (A.OneOf([A.VerticalFlip(p=1), A.Transpose(p=1)], p=0.4), 0.4),
        (A.CoarseDropout(num_holes_range=(2, 2), p=0.25), 0.25),
        (A.Compose([A.VerticalFlip(p=1)], p=0.2), 0.2),
    ],
    ids=["VerticalFlip", "OneOf", "CoarseDropout-2-holes", "Compose"],
)
def test_probabilities_of_a_users_own(transform, p):
    images = random_images(2000)
    fired = changed(images, hwc(augment_batch(transform, images.copy(), rng())))
    assert stats.binomtest(int(fired.sum()), len(images), p).pvalue > 1e-4


@pytest.mark.parametrize("transforms", [utils.get_train_transforms().transforms, [A.RandomBrightnessContrast(p=0.5)]])
def test_all_randomness_comes_from_the_generator(transforms):
    images = random_images(64)
    assert np.array_equal(by_batch(transforms, images, seed=3), by_batch(transforms, images, seed=3))
    assert not np.array_equal(by_batch(transforms, images, seed=3), by_batch(transforms, images, seed=4))


def test_shapes_that_do_not_make_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"different shapes.*A\.Resize"):
        augment_batch(A.Compose([A.RandomScale(scale_limit=0.5, p=0.5)]), random_images(32), rng())


def test_transforms_work_without_warnings_a_batch_at_a_time():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment_batch(utils.get_train_transforms(crop_padding=4), random_images(256), rng())
