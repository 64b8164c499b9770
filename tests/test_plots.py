"""The plots of utils.py against independent truth: scikit-learn, NumPy, arithmetic done here, the images themselves."""

import errno
import os
import re
from types import SimpleNamespace
from unittest.mock import patch

import albumentations
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix, recall_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import models
import utils

NAMES = "zero one two three four five six seven eight nine".split()  # in the order of the labels, which is not the
LABEL_MAP = {NAMES[label]: label for label in reversed(range(10))}  # alphabet's, nor that of the map
HISTORY = ([2.0, 1.5, 1.2, 1.0], [1.9, 1.6, 1.1, 1.3], [30.0, 40.0, 55.0, 60.0], [35.0, 58.25, 58.25, 50.0])


@pytest.fixture(autouse=True)
def figures_closed():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def loader(split, transforms=None, **kwargs):
    return utils.get_CIFARdataset_with_loader(split, {"batch_size": 32} | kwargs, "digits", transforms=transforms)[1]


def predictions(model, test_loader):
    """(true, predicted, wrong): arrays of labels, and a list as `utils.test` returns it, made without `utils.test`."""
    with torch.no_grad():
        batches = [(images, labels, model(images).argmax(1)) for images, labels in test_loader]
    images, true, predicted = (torch.cat(parts) for parts in zip(*batches))
    wrong = [(i, int(t), int(p)) for i, t, p in zip(images, true, predicted) if t != p]
    return true.numpy(), predicted.numpy(), wrong


@pytest.fixture(scope="module")
def digits():
    """The digits sample, and a model that is right nine times in ten: it prefers the class whose mean is nearest."""
    plain, test_loader = loader("train", utils.get_test_transforms()), loader("test")  # plain: not augmented
    means = torch.zeros(10, 3072)
    for images, labels in plain:
        means.index_add_(0, labels, images.flatten(1))
    means /= torch.bincount(torch.from_numpy(plain.dataset.labels))[:, None]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    model[1].weight.data, model[1].bias.data = means / 200, -(means**2).sum(1) / 400
    true, predicted, wrong = predictions(model, test_loader)
    return SimpleNamespace(
        plain=plain, test_loader=test_loader, model=model, true=true, predicted=predicted, wrong=wrong
    )


def shown(figure):
    """(pixels, title) of each picture of a grid; cells without one hold nothing at all."""
    assert all(not axis.axison and (axis.images or not axis.get_title()) for axis in figure.axes)
    return [(np.asarray(axis.images[0].get_array()), axis.get_title()) for axis in figure.axes if axis.images]


def close(pixels, image):
    return pixels.shape == image.shape and np.abs(pixels.astype(int) - image).max() <= 1


CONVOLUTION = nn.Sequential(nn.Conv2d(3, 1, 5, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
PLOTS = {
    "display": lambda s, path: utils.post_display(s.plain, LABEL_MAP, path=path),
    "augmentations": lambda s, path: utils.post_augmentations(s.plain, path=path),
    "accuracyplots": lambda s, path: utils.post_accuracyplots(*HISTORY, path=path),
    "misclassified": lambda s, path: utils.post_misclassified(s.wrong, LABEL_MAP, s.model, path=path),
    "confusion_matrix": lambda s, path: utils.post_confusion_matrix(s.wrong, s.test_loader, LABEL_MAP, path=path),
    "receptive_field": lambda s, path: utils.post_receptive_field(
        CONVOLUTION, models.receptive_field(CONVOLUTION), path=path
    ),
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_saves_a_whole_png_or_leaves_the_old_file(plot, digits, tmp_path):
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch("os.replace", side_effect=full), pytest.raises(OSError, match="No space left"):
        plot(digits, path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["plot.png"]

    assert isinstance(plot(digits, str(path)), Figure)
    assert os.listdir(tmp_path) == ["plot.png"]
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 300 and len(np.unique(image)) > 10


@pytest.mark.parametrize("prepare", [torch.clone, torch.Tensor.requires_grad_, torch.Tensor.double])
def test_image_from_tensor_inverts_the_normalisation(prepare):
    original = np.random.default_rng(0).integers(0, 256, (32, 24, 3), np.uint8)
    tensor = prepare(utils.get_test_transforms()(image=original)["image"])
    before = tensor.detach().clone()
    image = utils.get_image_from_tensor(tensor)
    assert image.dtype == np.uint8 and close(image, original)
    image[:] = 0  # neither the call nor the use of its result reaches the input
    assert torch.equal(tensor.detach(), before)


def test_image_from_tensor_clips_instead_of_wrapping():
    tensor = torch.full((3, 2, 2), 9.0)
    assert (utils.get_image_from_tensor(tensor) == 255).all() and (utils.get_image_from_tensor(-tensor) == 0).all()


def test_display_shows_16_samples_under_their_own_class(digits):
    figure, data = utils.post_display(digits.plain, LABEL_MAP), digits.plain.dataset
    cells = shown(figure)
    assert len(cells) == 16 and len({pixels.tobytes() for pixels, _ in cells}) == 16
    assert data.name in figure.get_suptitle()
    for pixels, title in cells:
        (same,) = np.flatnonzero(np.abs(data.images.astype(int) - pixels).max(axis=(1, 2, 3)) <= 1)
        assert title == NAMES[data.labels[same]]


def test_label_maps_of_both_directions_name_the_same(digits):
    there, back = LABEL_MAP, {label: name for name, label in LABEL_MAP.items()}
    titles = [
        [axis.get_title() for axis in utils.post_display(digits.test_loader, names).axes] for names in (there, back)
    ]
    assert titles[0] == titles[1]


def test_display_of_a_batch_of_three():
    data = TensorDataset(torch.zeros(3, 3, 32, 32), torch.tensor([2, 0, 1]))
    figure = utils.post_display(DataLoader(data, batch_size=3), {"c": 2, "a": 0, "b": 1})
    assert [title for _, title in shown(figure)] == ["c", "a", "b"]


def test_augmentations_are_an_image_and_15_draws_of_it(digits):
    always = albumentations.Compose([utils.ShiftScaleRotate(p=1), *utils.get_test_transforms().transforms])
    (first, title), *draws = shown(utils.post_augmentations(loader("train", always), 5))
    assert np.array_equal(first, digits.plain.dataset.images[5]) and "as it is" in title
    assert len({pixels.tobytes() for pixels in (first, *(pixels for pixels, _ in draws))}) == 16
    figure, data = utils.post_augmentations(digits.plain, 5), digits.plain.dataset
    assert f"class {data.labels[5]} " in figure.get_suptitle()  # the digits' own class names are "0" to "9"
    assert len(shown(figure)) == 16 and all(close(pixels, data.images[5]) for pixels, _ in shown(figure))


@pytest.mark.parametrize("epochs", [1, 4, 80])
def test_accuracy_curves_and_the_best_test_epoch(epochs):
    history = [(values * 20)[:epochs] for values in HISTORY]
    figure = utils.post_accuracyplots(*history, title="a run")
    assert figure.get_suptitle() == "a run"
    axes = {axis.get_title(): axis for axis in figure.axes}
    expected = dict(zip(("Training loss", "Test loss", "Training accuracy", "Test accuracy"), history))
    assert axes.keys() == expected.keys()
    best = int(np.argmax(history[3]))
    for name, values in expected.items():
        curve, *others = axes[name].lines
        assert curve.get_xydata().tolist() == [[epoch, value] for epoch, value in enumerate(values, start=1)]
        unit = r"accuracy \(%\)" if "accuracy" in name else r"per sample \(nats\)"
        assert axes[name].get_xlabel() == "epoch" and re.search(unit, axes[name].get_ylabel())
        if name.startswith("Training"):
            assert not others
            continue
        training, mark = others
        assert epochs > 1 or training.get_marker() == "."  # a line through one point is invisible
        assert training.get_ydata().tolist() == expected[name.replace("Test", "Training")]
        assert training.get_color() == axes[name.replace("Test", "Training")].lines[0].get_color() != curve.get_color()
        assert mark.get_xydata().tolist() == [[best + 1, values[best]]]
        first, second = (text.get_text() for text in axes[name].get_legend().get_texts())
        assert first == "training" and re.search(rf"\b{best + 1}, {history[3][best]:.2f} %", second)


def confidence(model, image, label):
    scores = model(image[None])[0].detach().double().numpy()
    return 100 * np.exp(scores[label]) / np.exp(scores).sum()


@pytest.mark.parametrize("count", [0, 1, None])
def test_misclassified_names_both_classes_and_the_confidence(count, digits):
    wrong = digits.wrong[:count]
    spread = wrong if len(wrong) <= 20 else [wrong[i * (len(wrong) - 1) // 19] for i in range(20)]  # from end to end
    model = nn.Sequential(nn.Dropout(0.9), *digits.model).train()  # to be measured without dropout
    figure = utils.post_misclassified(wrong, LABEL_MAP, model, title="a run")
    assert f"{len(wrong)} " in figure.get_suptitle() and "a run" in figure.get_suptitle()
    cells = shown(figure)
    assert len(cells) == (20 if count is None else count)
    for (pixels, title), (image, true, predicted) in zip(cells, spread):
        assert close(pixels, utils.get_image_from_tensor(image))
        guess, percent, truth = re.fullmatch(r"(\w+) \((\d+)%\)\ntrue: (\w+)", title).groups()
        assert (guess, truth) == (NAMES[predicted], NAMES[true])
        assert int(percent) == pytest.approx(confidence(digits.model, image, predicted), abs=0.51)


def test_misclassified_confidence_is_that_of_the_class_it_names(digits):
    image, true, _ = digits.wrong[0]
    least = int(digits.model(image[None]).argmin())  # as when the weights have changed since the test
    ((_, title),) = shown(utils.post_misclassified([(image, true, least)], LABEL_MAP, digits.model))
    assert title.startswith(f"{NAMES[least]} ({confidence(digits.model, image, least):.0f}%)")


def test_misclassified_restores_the_training_mode(digits):
    model = nn.Sequential(*digits.model).train()
    utils.post_misclassified(digits.wrong[:1], LABEL_MAP, model)
    assert all(module.training for module in model.modules())


def counts(figure):
    """The axes, and the numbers of the matrix, read from where they are drawn: column x, row y."""
    axis, matrix = figure.axes[0], np.full((10, 10), -1)
    for text in axis.texts:
        matrix[text.get_position()[::-1]] = int(text.get_text())
    return axis, matrix


def test_confusion_matrix_is_that_of_scikit_learn(digits):
    figure = utils.post_confusion_matrix(digits.wrong, digits.test_loader, LABEL_MAP, title="a run")
    (axis, matrix), expected = counts(figure), confusion_matrix(digits.true, digits.predicted)
    assert np.array_equal(matrix, expected) and not np.array_equal(matrix, matrix.T)
    shares = confusion_matrix(digits.true, digits.predicted, normalize="true")
    assert np.allclose(axis.images[0].get_array(), shares)
    background = axis.images[0].norm([0, 0.05, 1])
    assert background[0] == 0 and background[1] > 0.2 and background[2] == 1  # a confusion of 5 % is plain to see
    assert "predicted" in axis.get_xlabel() and "true" in axis.get_ylabel()
    assert [label.get_text() for label in axis.get_xticklabels()] == NAMES
    recalls = recall_score(digits.true, digits.predicted, average=None)
    rows = [label.get_text().split() for label in axis.get_yticklabels()]
    assert rows == [[name, f"{100 * recall:.1f}", "%"] for name, recall in zip(NAMES, recalls)]
    accuracy = np.mean(digits.true == digits.predicted)
    assert f"{100 * accuracy:.2f} %" in axis.get_title() and "a run" in axis.get_title()


def test_confusion_matrix_counts_only_what_the_loader_gives(digits):
    part = loader("test", batch_size=100, drop_last=True)  # 300 of the 360
    true, predicted, wrong = predictions(digits.model, part)
    _, matrix = counts(utils.post_confusion_matrix(wrong, part, LABEL_MAP))
    assert np.array_equal(matrix, confusion_matrix(true, predicted))


@pytest.mark.parametrize("images, corner", [(None, 12), (torch.ones(2, 3, 128, 128), 20)])
def test_receptive_field_of_the_model(images, corner):
    # Output number i along a side looks at pixel 3 + 8 * i and 47 pixels to each side of it.
    torch.manual_seed(0)
    model = models.Model()
    growth, effective = utils.post_receptive_field(model, models.receptive_field(model), images).axes[:2]
    by_hand = [3, 5, 9, 11, 15, 19, 19, 23, 31, 39, 39, 47, 63, 79, 95, 95]
    assert [bar.get_width() for bar in growth.patches] == by_hand and growth.yaxis_inverted()
    assert [text.get_text() for text in growth.texts] == [str(field) for field in by_hand]
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [label.get_text().split()[0] for label in growth.get_yticklabels()] == convolutions[:16]
    assert all("pixels" in label for label in (growth.get_xlabel(), effective.get_xlabel(), effective.get_ylabel()))
    boxes = [(*box.get_xy(), box.get_width(), box.get_height()) for box in effective.patches]
    middle = corner + 47 - 16  # of an image around the same pixel, or half a pixel beside it, since it is even
    assert boxes[0] == (corner - 0.5, corner - 0.5, 95, 95) and boxes[1] == (middle, middle, 32, 32)
    extent, image = (text.get_text() for text in effective.get_legend().get_texts())
    assert "95x95" in effective.get_title() and "95x95" in extent and "32x32" in image
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_effective_receptive_field_is_the_mean_absolute_gradient():
    rows = models.receptive_field(CONVOLUTION)
    figure = utils.post_receptive_field(CONVOLUTION, rows, torch.rand(4, 3, 5, 5))
    assert len(figure.axes[1].patches) == 1  # an image of 32x32 would not fit in
    gradient = CONVOLUTION[0].weight.detach()[0].abs().mean(0)  # of a single convolution: its weights
    assert np.allclose(figure.axes[1].images[0].get_array(), gradient / gradient.max(), atol=1e-6)
