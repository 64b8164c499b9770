"""The plots of utils.py against independent truth: scikit-learn, NumPy, arithmetic done here, the images themselves."""

import copy
from types import SimpleNamespace

import albumentations
import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import utils
from models import receptive_field

NAMES = "zero one two three four five six seven eight nine".split()  # in the order of the labels, which is not the
LABEL_MAP = {NAMES[label]: label for label in reversed(range(10))}  # alphabet's, nor that of the map
HISTORY = [2.0, 1.5, 1.2, 1.0], [1.9, 1.6, 1.1, 1.3], [30.0, 40.0, 55.0, 60.0], [35.0, 58.25, 58.25, 50.0]
CONV = nn.Sequential(nn.Conv2d(3, 1, 41, bias=False))


NORMALIZE = albumentations.Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))  # not that of CIFAR-10
NOT_AUGMENTED = albumentations.Compose([NORMALIZE, albumentations.ToTensorV2()])


def loader(split, transforms=NOT_AUGMENTED):
    return utils.get_CIFARdataset_with_loader(split, {"batch_size": 2000}, "digits", transforms=transforms)[1]


@pytest.fixture(scope="module")
def world():
    """The digits sample, and a model that is right nine times in ten: it prefers the class whose mean is nearest."""
    world = SimpleNamespace(train_loader=loader("train"), test_loader=loader("test"))
    images, labels = next(iter(world.train_loader))
    means = torch.stack([images[labels == label].flatten(1).mean(0) for label in range(10)])
    world.model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).requires_grad_(False)
    world.model[1].weight.data, world.model[1].bias.data = means / 50, -(means**2).sum(1) / 100
    world.wrong = utils.test(world.model, "cpu", world.test_loader, nn.CrossEntropyLoss(), verbose=False)
    images, world.true = next(iter(world.test_loader))
    world.indices = [int((images == image).flatten(1).all(1).nonzero()) for image, _, _ in world.wrong]
    world.predicted = world.true.clone()
    world.predicted[world.indices] = torch.stack([predicted for _, _, predicted in world.wrong])
    return world


def shown(figure):
    """(pixels, title) of each picture of a grid; cells without one hold nothing at all."""
    assert all(not axis.axison and (axis.images or not axis.get_title()) for axis in figure.axes)
    return [(np.asarray(axis.images[0].get_array()), axis.get_title()) for axis in figure.axes if axis.images]


PLOTS = {
    "display": lambda w, names, **options: utils.post_display(w.test_loader, names, **options),
    "misclassified": lambda w, names, **options: utils.post_misclassified(w.wrong, names, w.model, **options),
    "showmisclassified": lambda w, names, **options: utils.showmisclassifiedsamples(w.wrong, names, **options),
    "confusion": lambda w, names, **options: utils.post_confusion_matrix(w.wrong, w.test_loader, names, **options),
    "augmentations": lambda w, _, **options: utils.post_augmentations(w.train_loader, **options),
    "accuracyplots": lambda w, _, **options: utils.post_accuracyplots(*HISTORY, **options),
    "receptive_field": lambda w, _, **options: utils.post_receptive_field(CONV, receptive_field(CONV, 64), **options),
}


@pytest.mark.parametrize("plot", PLOTS)
def test_saves_a_png_whatever_folders_are_called(plot, world, tmp_path, monkeypatch):
    names = ["$5_$10", "a$b^$c", r"\$x_$", "100 % {x}_y", "$$", *NAMES[5:]]
    for data in (world.train_loader.dataset, world.test_loader.dataset):
        monkeypatch.setattr(data, "name", "images of $5_$10")
        monkeypatch.setattr(data, "classes", tuple(names))
    title = {"title": names[0]} if plot not in ("display", "augmentations", "receptive_field") else {}
    PLOTS[plot](world, names, path=str(tmp_path / "plot.png"), **title)  # to draw it is to parse the dollar signs
    pixels = plt.imread(tmp_path / "plot.png")
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels)) > 10


def test_samples_of_more_classes_than_named_or_of_another_loader_are_refused(world):
    for plot in ("display", "misclassified", "showmisclassified", "confusion"):
        with pytest.raises((IndexError, ValueError)):
            PLOTS[plot](world, NAMES[:5])
    with pytest.raises(ValueError, match="loader"):
        utils.post_confusion_matrix([*world.wrong] * 20, world.test_loader, LABEL_MAP)


def test_pixels_survive_normalisation_and_back_and_do_not_wrap():
    pixels = np.arange(3 * 256).astype(np.uint8).reshape(16, 16, 3)  # each value in each channel
    normalised = utils.get_test_transforms()(image=pixels)["image"]
    for tensor in (normalised, normalised.double(), normalised.requires_grad_()):  # and the first is left as it is
        image = utils.get_image_from_tensor(tensor)
        assert image.dtype == np.uint8 and np.array_equal(image, pixels)
    extreme = torch.tensor([-1e30, -10, 10, 1e30]).expand(3, 1, 4)
    assert utils.get_image_from_tensor(extreme)[0].tolist() == [[0] * 3] * 2 + [[255] * 3] * 2


def test_display_shows_16_samples_under_their_own_class(world):
    figure, data = utils.post_display(world.train_loader, LABEL_MAP), world.train_loader.dataset
    cells = shown(figure)
    assert len(cells) == 16 == len({pixels.tobytes() for pixels, _ in cells}) and data.name in figure.get_suptitle()
    for pixels, title in cells:
        (same,) = np.flatnonzero((data.images == pixels).all(axis=(1, 2, 3)))
        assert title == NAMES[data.labels[same]]
    (first, title), _ = shown(utils.post_display(DataLoader(Subset(data, [9, 8]), batch_size=2)))
    assert np.array_equal(first, data.images[9]) and title == str(data.labels[9])
    others = DataLoader(TensorDataset(torch.zeros(3, 3, 32, 32), torch.tensor([2, 0, 1])), batch_size=3)
    assert [title for _, title in shown(utils.post_display(others, {"c": 2, "a": 0, "b": 1}))] == ["c", "a", "b"]


def test_augmentations_are_an_image_and_15_draws_of_it(world):
    always = albumentations.Compose([utils.get_train_transforms(shift_scale_rotate=1.0)])
    image, label = world.train_loader.dataset.images[5], world.train_loader.dataset.labels[5]
    for train_loader, same, different in ((loader("train", always), 0, 16), (world.train_loader, 15, 1)):
        figure = utils.post_augmentations(train_loader, 5)
        pictures = [pixels for pixels, _ in shown(figure)]
        assert len(pictures) == 16 and len({picture.tobytes() for picture in pictures}) == different
        assert np.array_equal(pictures[0], image) and f"class {label}; {same} of 15" in figure.get_suptitle()


@pytest.mark.parametrize("epochs", [1, 80])
def test_accuracy_curves(epochs):
    history = [(values * 20)[:epochs] for values in HISTORY]
    figure = utils.post_accuracyplots(*map(np.array, history), title="a run")
    axes = {axis.get_title(): axis for axis in figure.axes}
    curves = dict(zip(("training loss", "test loss", "training accuracy", "test accuracy"), history))
    assert [name.lower() for name in axes] == [*curves] and figure.get_suptitle() == "a run"
    for name, axis in axes.items():
        drawn = {f"{line.get_label()} {name.split()[1]}": line for line in axis.lines}
        assert len(drawn) == 2 == len(axis.get_legend().get_texts())
        for curve, line in drawn.items():
            assert line.get_xydata().tolist() == [[*point] for point in enumerate(curves[curve], start=1)]
            assert line.get_linestyle() == ("-" if curve == name.lower() else ":")
            assert epochs > 1 or line.get_marker() == "."  # a line through one point is invisible
        assert axis.get_xlabel() == "epoch" and ("%" if "acc" in name else "nats") in axis.get_ylabel()


def progress(root, *steps):
    """Show a run of 80 epochs when so many are done; returns whether there is a picture in its folder."""
    run = utils.Run("s9", root=root)
    run.hyperparameters = {"epochs": 80}
    columns = "epoch train_loss train_acc test_loss test_acc lr seconds".split()
    for done in steps:
        rows = [(n, 1 / n, 70 + n, 2 / n, 60 + n, 0.2, 30 * n) for n in range(1, done + 1)]
        run.history = [dict(zip(columns, row)) for row in rows]
        utils.post_progress(run)
    return (run / "curves.png").exists()


def test_progress_in_a_log_is_a_line_per_epoch(tmp_path, capsys):
    assert not progress(tmp_path, 0, 1, 2, 3)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == "epoch train loss acc. % test loss acc. % lr s".split()
    assert [line.split()[0] for line in lines] == ["1/80", "2/80", "3/80"]  # and then 77 of 60 seconds in the mean
    assert lines[2].split()[1:] == "0.3333 73.00 0.6667 63.00 0.2 90.0 77 min left".split()
    assert progress(tmp_path, 80) and not plt.get_fignums()


def test_progress_in_a_notebook_is_one_table_and_one_picture_in_place(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel="that of Jupyter"))
    monkeypatch.setattr(IPython.display, "display", lambda content, **options: calls.append((content, options)))
    assert progress(tmp_path, 0, 1, 3, 80) and not plt.get_fignums() and not capsys.readouterr().out
    assert [options["update"] for _, options in calls] == [False] * 2 + [True] * 4
    table, picture, *later = [options["display_id"] for _, options in calls]
    assert table != picture and later == [table, picture] * 2
    for done, (content, _) in zip((1, 3, 80), calls[::2]):
        text, numbered = content["text/plain"], [line for line in content["text/plain"].splitlines() if "/80 " in line]
        assert numbered[0].startswith("  1/80 ") and numbered[-1].startswith(f"{done:3}/80 ") and len(numbered) < 20
        assert ("77 min left" in text) == (done == 3) and ("left" in text) == (done < 80)
        assert "overflow-x: auto" in content["text/html"]
    assert [[len(line.get_xdata()) for line in axis.lines] for axis in calls[3][0].axes] == [[3, 3]] * 4


@pytest.mark.parametrize("count", [0, 1, 15, None])
def test_misclassified_names_both_classes_and_the_confidence(count, world):
    network, wrong = copy.deepcopy(world.model), world.wrong[:count]
    network[1].bias.data.zero_()  # trained on since, so that it would predict another class
    expected = []
    for index, (image, true, predicted) in zip(world.indices, wrong):
        percent = 100 * network(image[None]).double().softmax(1)[0, predicted].item()
        title = f"{NAMES[predicted]} ({percent:.1f}%)\ntrue: {NAMES[true]}"
        expected.append((percent, title, world.test_loader.dataset.images[index].tolist()))
    ranked = sorted(range(len(wrong)), key=lambda index: -expected[index][0])
    rest = sorted(ranked[10:])
    spread = [rest[i * (len(rest) - 1) // 9] for i in range(10)] if len(rest) > 10 else rest  # from end to end
    model = nn.DataParallel(nn.Sequential(nn.Dropout(0.9), *network).train().double())  # measured without dropout
    model.forward = None  # where there are GPUs, it refuses a model that is not on one
    figure = utils.post_misclassified(wrong, LABEL_MAP, model, title="a run")
    assert figure.get_suptitle().startswith(f"a run: {len(wrong)} mistakes")
    cells = [(title, pixels.tolist()) for pixels, title in shown(figure)]
    assert cells == [expected[index][1:] for index in [*ranked[:10], *spread]]
    first_ten = shown(utils.showmisclassifiedsamples(wrong, LABEL_MAP))
    assert [pixels.tolist() for pixels, _ in first_ten] == [pixels for *_, pixels in expected[:10]]


@pytest.mark.parametrize("tested", [360, 8])  # in so few, the last class and others are missing
def test_confusion_matrix_is_that_of_scikit_learn(tested, world):
    true, predicted = world.true[:tested], world.predicted[:tested]
    part = DataLoader(Subset(world.test_loader.dataset, range(tested)), batch_size=100)
    wrong = [*world.wrong][: (true != predicted).sum()]
    figure = utils.post_confusion_matrix(wrong, part, LABEL_MAP, title="a run")
    axis, expected = figure.axes[0], confusion_matrix(true, predicted, labels=range(10))
    counts = {text.get_position(): int(text.get_text()) for text in axis.texts}
    assert counts == {(column, row): count for (row, column), count in np.ndenumerate(expected)}
    shares = expected / expected.sum(axis=1, keepdims=True).clip(1)
    assert np.allclose(axis.images[0].get_array(), shares)
    background = axis.images[0].norm([0, 0.05, 1])
    assert background[0] == 0 and background[1] > 0.2 and background[2] == 1  # a confusion of 5 % is plain to see
    assert "predicted" in axis.get_xlabel() and "true" in axis.get_ylabel()
    assert [label.get_text() for label in axis.get_xticklabels()] == NAMES
    rows = [label.get_text().split() for label in axis.get_yticklabels()]
    assert rows == [[name, f"{100 * share:.1f}", "%"] for name, share in zip(NAMES, shares.diagonal())]
    accuracy = (true == predicted).float().mean()
    assert f"{100 * accuracy:.2f} %" in axis.get_title() and "a run" in axis.get_title()


def test_receptive_field_layer_by_layer_and_as_the_mean_absolute_gradient():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)]
    model = nn.DataParallel(nn.Sequential(*layers))
    with torch.no_grad():
        figure = utils.post_receptive_field(model, receptive_field(model))
    growth, effective, _ = figure.axes
    assert [bar.get_width() for bar in growth.patches] == [3, 7] and growth.yaxis_inverted()
    assert [label.get_text() for label in growth.get_yticklabels()] == ["0", "2"]
    # Output 3 of 6 looks at pixel 6 and 3 pixels to each side of it.
    (box,) = effective.patches  # an image of 32x32 would not fit in
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (2.5, 2.5, 7, 7)
    assert all("7x7" in text for text in (effective.get_title(), effective.get_legend().get_texts()[0].get_text()))
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())

    effective = utils.post_receptive_field(CONV, receptive_field(CONV, 64)).axes[1]
    gradient = CONV[0].weight.detach()[0].abs().mean(0)  # of a single convolution: its weights
    expected = np.pad(gradient / gradient.max(), ((2, 1), (2, 1)))  # output 2 of 4 sees pixels 2 to 42 of 44
    assert np.allclose(effective.images[0].get_array(), expected, atol=1e-6)
    assert [(*box.get_xy(), box.get_width()) for box in effective.patches] == [(1.5, 1.5, 41), (6, 6, 32)]
