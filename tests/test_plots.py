"""The plots of utils.py against independent truth: scikit-learn, NumPy, arithmetic done here, the images themselves."""

import copy
import os
import re
from types import SimpleNamespace

import albumentations
import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, recall_score
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

import utils
from models import receptive_field

NAMES = "zero one two three four five six seven eight nine".split()  # in the order of the labels, which is not the
LABEL_MAP = {NAMES[label]: label for label in reversed(range(10))}  # alphabet's, nor that of the map
HISTORY = ([2.0, 1.5, 1.2, 1.0], [1.9, 1.6, 1.1, 1.3], [30.0, 40.0, 55.0, 60.0], [35.0, 58.25, 58.25, 50.0])
SIZE_5 = nn.Sequential(nn.Conv2d(3, 1, 5, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def loader(split, transforms=None, **kwargs):
    return utils.get_CIFARdataset_with_loader(split, {"batch_size": 32} | kwargs, "digits", transforms=transforms)[1]


@pytest.fixture(scope="module")
def world():
    """The digits sample, and a model that is right nine times in ten: it prefers the class whose mean is nearest.

    `wrong` is a list as `utils.test` returns it, made without `utils.test`.
    """
    train_loader, test_loader = loader("train", utils.get_test_transforms()), loader("test")  # not augmented
    images, labels = (torch.cat(parts) for parts in zip(*train_loader))
    means = torch.stack([images[labels == label].flatten(1).mean(0) for label in range(10)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).requires_grad_(False)
    model[1].weight.data, model[1].bias.data = means / 200, -(means**2).sum(1) / 400
    images, true = (torch.cat(parts) for parts in zip(*test_loader))
    predicted = model(images).argmax(1)
    wrong = [(i, int(t), int(p)) for i, t, p in zip(images, true, predicted) if t != p]
    return SimpleNamespace(
        train_loader=train_loader, test_loader=test_loader, model=model, true=true, predicted=predicted, wrong=wrong
    )


def shown(figure):
    """(pixels, title) of each picture of a grid; cells without one hold nothing at all."""
    assert all(not axis.axison and (axis.images or not axis.get_title()) for axis in figure.axes)
    return [(np.asarray(axis.images[0].get_array()), axis.get_title()) for axis in figure.axes if axis.images]


def close(pixels, image):
    return pixels.shape == image.shape and np.abs(pixels.astype(int) - image).max() <= 1


# --- What all have in common ------------------------------------------------------------------------------------------

BY_LABEL_MAP = {
    "display": lambda w, names, **options: utils.post_display(w.test_loader, names, **options),
    "misclassified": lambda w, names, **options: utils.post_misclassified(w.wrong, names, w.model, **options),
    "showmisclassified": lambda w, names, **options: utils.showmisclassifiedsamples(w.wrong, names, **options),
    "confusion": lambda w, names, **options: utils.post_confusion_matrix(w.wrong, w.test_loader, names, **options),
}
PLOTS = BY_LABEL_MAP | {
    "augmentations": lambda w, _, **options: utils.post_augmentations(w.train_loader, **options),
    "accuracyplots": lambda w, _, **options: utils.post_accuracyplots(*HISTORY, **options),
    "receptive_field": lambda w, _, **options: utils.post_receptive_field(SIZE_5, receptive_field(SIZE_5), **options),
}


@pytest.mark.parametrize("plot", PLOTS)
def test_saves_a_png_whatever_folders_are_called(plot, world, tmp_path, monkeypatch):
    names = ["$5_$10", "a$b^$c", r"\$x_$", "100 % {x}_y", "$$", *NAMES[5:]]
    for data in (world.train_loader.dataset, world.test_loader.dataset):
        monkeypatch.setattr(data, "name", "images of $5_$10")
        monkeypatch.setattr(data, "classes", tuple(names))
    title = {"title": names[0]} if plot not in ("display", "augmentations", "receptive_field") else {}
    PLOTS[plot](world, names, path=str(tmp_path / "plot.png"), **title)  # to draw it is to parse the dollar signs
    assert os.listdir(tmp_path) == ["plot.png"]
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and min(image.size) > 300 and len(np.unique(image)) > 10


@pytest.mark.parametrize("plot", BY_LABEL_MAP.values(), ids=BY_LABEL_MAP)
def test_label_maps_that_do_not_name_the_classes_are_refused(plot, world):
    with pytest.raises(ValueError, match="labels up to"):
        plot(world, NAMES[:5])


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_pixels_survive_normalisation_and_back_and_do_not_wrap():
    pixels = np.arange(3 * 256).astype(np.uint8).reshape(16, 16, 3)  # each value in each channel
    normalised = utils.get_test_transforms()(image=pixels)["image"]
    before = normalised.clone()
    for tensor in (normalised, normalised.double(), normalised.requires_grad_()):
        image = utils.get_image_from_tensor(tensor)
        assert image.dtype == np.uint8 and np.array_equal(image, pixels)
        image[:] = 0  # neither the call nor the use of its result reaches the input
    assert torch.equal(normalised, before)
    extreme = torch.tensor([-1e30, -10, 10, 1e30]).expand(3, 1, 4)
    assert utils.get_image_from_tensor(extreme)[0].tolist() == [[0] * 3] * 2 + [[255] * 3] * 2


def test_display_shows_16_samples_under_their_own_class(world):
    figure, data = utils.post_display(world.train_loader, LABEL_MAP), world.train_loader.dataset
    cells = shown(figure)
    assert len(cells) == 16 == len({pixels.tobytes() for pixels, _ in cells}) and data.name in figure.get_suptitle()
    for pixels, title in cells:
        (same,) = np.flatnonzero(np.abs(data.images.astype(int) - pixels).max(axis=(1, 2, 3)) <= 1)
        assert title == NAMES[data.labels[same]]


def test_display_of_other_loaders():
    data = TensorDataset(torch.zeros(3, 3, 32, 32), torch.tensor([2, 0, 1]))
    figure = utils.post_display(DataLoader(data, batch_size=3), {"c": 2, "a": 0, "b": 1})
    assert [title for _, title in shown(figure)] == ["c", "a", "b"]
    test_loader = loader("test")  # without a label map, by the classes of the data set
    assert [title for _, title in shown(utils.post_display(test_loader))] == [
        str(n) for n in test_loader.dataset.labels[:16]
    ]


def test_pictures_of_another_normalisation(world):
    """A loader has its own; test hands it on with what was wrong."""
    own = albumentations.Compose(
        [albumentations.Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), albumentations.ToTensorV2()]
    )
    test_loader = loader("test", own)
    images = test_loader.dataset.images
    assert close(shown(utils.post_display(test_loader))[7][0], images[7])
    assert close(shown(utils.post_augmentations(test_loader, 5))[3][0], images[5])
    wrong = utils.test(world.model, "cpu", test_loader, nn.CrossEntropyLoss(), verbose=False)
    index = next(i for i, (image, _) in enumerate(test_loader.dataset) if torch.equal(image, wrong[0].image))
    assert close(shown(utils.showmisclassifiedsamples(wrong[:1], NAMES))[0][0], images[index])
    part = DataLoader(Subset(test_loader.dataset, [9, 8]), batch_size=2)
    assert close(shown(utils.post_display(part))[0][0], images[9])


def test_augmentations_are_an_image_and_15_draws_of_it(world):
    always = albumentations.Compose([utils.get_train_transforms(shift_scale_rotate=1.0)])
    figure, data = utils.post_augmentations(loader("train", always), 5), world.train_loader.dataset
    (first, title), *draws = shown(figure)
    assert np.array_equal(first, data.images[5]) and title == "as it is"
    assert len({first.tobytes(), *(pixels.tobytes() for pixels, _ in draws)}) == 16
    assert f"class {data.labels[5]}; 0 of 15 draws change nothing" in figure.get_suptitle()
    figure = utils.post_augmentations(world.train_loader, 5)
    assert "15 of 15 draws change nothing" in figure.get_suptitle()
    assert len(shown(figure)) == 16 and all(close(pixels, data.images[5]) for pixels, _ in shown(figure))


# --- Curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 4, 80])
def test_accuracy_curves(epochs):
    history = [(values * 20)[:epochs] for values in HISTORY]
    figure = utils.post_accuracyplots(*map(np.array, history), title="a run")
    assert figure.get_suptitle() == "a run"
    axes = {axis.get_title(): axis for axis in figure.axes}
    expected = dict(zip(("Training loss", "Test loss", "Training accuracy", "Test accuracy"), history))
    assert axes.keys() == expected.keys()
    for name, values in expected.items():
        other = name.replace("Test", "Training") if "Test" in name else name.replace("Training", "Test")
        drawn = {line.get_linestyle(): line for line in axes[name].lines}
        assert drawn["-"].get_xydata().tolist() == [[epoch, value] for epoch, value in enumerate(values, start=1)]
        assert drawn[":"].get_ydata().tolist() == expected[other]
        assert epochs > 1 or drawn["-"].get_marker() == "."  # a line through one point is invisible
        unit = r"accuracy \(%\)" if "accuracy" in name else r"per sample \(nats\)"
        assert axes[name].get_xlabel() == "epoch" and re.search(unit, axes[name].get_ylabel())
        assert {text.get_text() for text in axes[name].get_legend().get_texts()} == {"training", "test"}


class RunOf80(SimpleNamespace):
    """What post_progress reads of a run, with some epochs done."""

    def __init__(self, folder, done=0):
        super().__init__(folder=folder, hyperparameters={"epochs": 80}, displays=set())
        self.go_to(done)

    def go_to(self, done):
        self.history = [
            {"epoch": epoch, "train_loss": 1 / epoch, "train_acc": 70 + epoch / 10, "lr": 0.2, "seconds": 30 * epoch}
            | {"test_loss": 2 / epoch, "test_acc": 60 + epoch / 10}
            for epoch in range(1, done + 1)
        ]

    def __truediv__(self, name):
        return self.folder / name


def test_progress_in_a_log_is_a_line_per_epoch(tmp_path, capsys):
    run = RunOf80(tmp_path)
    for done in range(4):
        run.go_to(done)
        utils.post_progress(run)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == "epoch train loss acc. % test loss acc. % lr s".split()
    assert [line.split()[0] for line in lines] == ["1/80", "2/80", "3/80"]
    assert lines[2].split()[1:7] == "0.3333 70.30 0.6667 60.30 0.2 90.0".split()
    assert lines[2].endswith(" 77 min left")  # 77 epochs of 60 seconds in the mean
    assert not os.listdir(tmp_path)
    run.go_to(80)
    utils.post_progress(run)
    assert os.listdir(tmp_path) == ["curves.png"] and not plt.get_fignums()


def test_progress_in_a_notebook_is_one_table_and_one_picture_in_place(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel="that of Jupyter"))
    monkeypatch.setattr(IPython.display, "display", lambda content, **options: calls.append((content, options)))
    run, steps = RunOf80(tmp_path), [1, 3, 80]
    for done in (0, *steps):
        run.go_to(done)
        utils.post_progress(run)
    tables, figures = calls[::2], calls[1::2]
    for parts in (tables, figures):
        assert len({options["display_id"] for _, options in parts}) == 1
        assert [options["update"] for _, options in parts] == [False, True, True]
    assert tables[0][1]["display_id"] != figures[0][1]["display_id"]
    for done, (content, _) in zip(steps, tables):
        lines = content["text/plain"].splitlines()
        assert len(lines) < 22 and lines[1].startswith("  1/80 ") and "overflow-x: auto" in content["text/html"]
        assert [line for line in lines if "/80 " in line][-1].startswith(f"{done:3}/80 ")
    assert "77 min left" in tables[1][0]["text/plain"] and "left" not in tables[-1][0]["text/plain"]
    assert [[len(line.get_xdata()) for line in axis.lines] for axis in figures[1][0].axes] == [[3, 3]] * 2
    assert not plt.get_fignums() and os.listdir(tmp_path) == ["curves.png"] and not capsys.readouterr().out


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def confidence(model, image, label):
    scores = model(image[None])[0].double().numpy()
    return 100 * np.exp(scores[label]) / np.exp(scores).sum()


def on_gpus(model):
    """As DataParallel is where there are GPUs: it refuses a model that is not on one."""
    parallel = nn.DataParallel(model)
    parallel.forward = None
    return parallel


@pytest.mark.parametrize(
    "count, form", [(0, nn.Sequential), (1, on_gpus), (15, nn.Module.double), (None, nn.Sequential)]
)
def test_misclassified_names_both_classes_and_the_confidence(count, form, world):
    wrong = world.wrong[:count]
    ranked = sorted(range(len(wrong)), key=lambda i: -confidence(world.model, wrong[i][0], wrong[i][2]))
    rest = sorted(ranked[10:])
    spread = [rest[i * (len(rest) - 1) // 9] for i in range(10)] if len(rest) > 10 else rest  # from end to end
    model = form(nn.Sequential(nn.Dropout(0.9), *copy.deepcopy(world.model)).train())  # measured without dropout
    figure = utils.post_misclassified(wrong, LABEL_MAP, model, title="a run")
    assert figure.get_suptitle().startswith(f"a run: {len(wrong)} mistakes")
    cells = shown(figure)
    assert len(cells) == (20 if count is None else count)
    for (pixels, title), index in zip(cells, [*ranked[:10], *spread]):
        image, true, predicted = wrong[index]
        assert close(pixels, utils.get_image_from_tensor(image))
        percent = confidence(world.model, image, predicted)
        assert title == f"{NAMES[predicted]} ({percent:.1f}%)\ntrue: {NAMES[true]}"


def test_misclassified_confidence_is_that_of_the_class_it_names(world):
    image, true, _ = world.wrong[0]
    least = int(world.model(image[None]).argmin())  # as when the weights have changed since the test
    ((_, title),) = shown(utils.post_misclassified([(image, true, least)], LABEL_MAP, world.model))
    assert title.startswith(f"{NAMES[least]} ({confidence(world.model, image, least):.1f}%)")


def counts(figure):
    """The numbers of the matrix, read from where they are drawn: column x, row y."""
    matrix = np.full((10, 10), -1)
    for text in figure.axes[0].texts:
        matrix[text.get_position()[::-1]] = int(text.get_text())
    return matrix


def test_confusion_matrix_is_that_of_scikit_learn(world):
    figure = utils.post_confusion_matrix(world.wrong, world.test_loader, LABEL_MAP, title="a run")
    axis, expected = figure.axes[0], confusion_matrix(world.true, world.predicted)
    assert np.array_equal(counts(figure), expected) and not np.array_equal(expected, expected.T)
    shares = confusion_matrix(world.true, world.predicted, normalize="true")
    assert np.allclose(axis.images[0].get_array(), shares)
    background = axis.images[0].norm([0, 0.05, 1])
    assert background[0] == 0 and background[1] > 0.2 and background[2] == 1  # a confusion of 5 % is plain to see
    assert "predicted" in axis.get_xlabel() and "true" in axis.get_ylabel()
    assert [label.get_text() for label in axis.get_xticklabels()] == NAMES
    recalls = recall_score(world.true, world.predicted, average=None)
    rows = [label.get_text().split() for label in axis.get_yticklabels()]
    assert rows == [[name, f"{100 * recall:.1f}", "%"] for name, recall in zip(NAMES, recalls)]
    accuracy = (world.true == world.predicted).float().mean()
    assert f"{100 * accuracy:.2f} %" in axis.get_title() and "a run" in axis.get_title()


LOADERS = {
    "in order": {},
    "shuffled, without the last batch": {"shuffle": True, "batch_size": 100, "drop_last": True},
    "weighted": {"sampler": WeightedRandomSampler(np.linspace(0, 1, 360), 200)},
    "with replacement": {"sampler": RandomSampler(range(360), replacement=True)},
}


@pytest.mark.parametrize("kwargs", LOADERS.values(), ids=LOADERS)
def test_confusion_matrix_of_any_loader_that_was_tested(kwargs, world):
    torch.manual_seed(0)
    test_loader = loader("test", **kwargs)
    batches = list(test_loader)
    misclassified = utils.test(world.model, "cpu", batches, nn.CrossEntropyLoss(), verbose=False)
    expected = np.diag(np.bincount(torch.cat([labels for _, labels in batches]), minlength=10))
    for _, true, predicted in misclassified:
        expected[true, predicted] += 1
        expected[true, true] -= 1
    assert np.array_equal(counts(utils.post_confusion_matrix(misclassified, test_loader, LABEL_MAP)), expected)


def test_confusion_matrix_of_two_tests(world):
    """As of the parts of a cross-validation."""
    parts = [list(world.test_loader)[:6], list(world.test_loader)[6:]]
    first, second = (utils.test(world.model, "cpu", part, nn.CrossEntropyLoss(), verbose=False) for part in parts)
    first += second
    figure = utils.post_confusion_matrix(first, world.test_loader, LABEL_MAP)
    assert np.array_equal(counts(figure), confusion_matrix(world.true, world.predicted))


def test_confusion_matrix_of_another_loader_is_refused(world):
    with pytest.raises(ValueError, match="more misclassified samples than the loader gives"):
        utils.post_confusion_matrix(world.wrong * 20, world.test_loader, LABEL_MAP)
    with pytest.raises(ValueError, match="names 9 classes and there are labels up to 9"):
        utils.post_confusion_matrix([], world.test_loader, NAMES[:9])


# --- Receptive field --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.Module.eval, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_receptive_field_layer_by_layer_and_as_it_is(wrap):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)]
    model = wrap(nn.Sequential(*layers))
    with torch.no_grad():
        figure = utils.post_receptive_field(model, receptive_field(model), torch.rand(2, 3, 31, 31))
    growth, effective = figure.axes[:2]
    assert [bar.get_width() for bar in growth.patches] == [3, 7] and growth.yaxis_inverted()
    assert [text.get_text() for text in growth.texts] == ["3", "7"]
    assert [label.get_text() for label in growth.get_yticklabels()] == ["0", "2"]
    assert all("pixels" in label for label in (growth.get_xlabel(), effective.get_xlabel(), effective.get_ylabel()))
    # Output 8 of 16 looks at pixel 16 and 3 pixels to each side of it.
    (box,) = effective.patches  # an image of 32x32 would not fit in
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (12.5, 12.5, 7, 7)
    assert "output of 2\n" in effective.get_title() and "7x7" in effective.get_title()
    assert "7x7" in effective.get_legend().get_texts()[0].get_text()
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_effective_receptive_field_is_the_mean_absolute_gradient():
    figure = utils.post_receptive_field(SIZE_5, receptive_field(SIZE_5), torch.rand(4, 3, 5, 5))
    gradient = SIZE_5[0].weight.detach()[0].abs().mean(0)  # of a single convolution: its weights
    assert np.allclose(figure.axes[1].images[0].get_array(), gradient / gradient.max(), atol=1e-6)


def test_receptive_field_larger_than_an_image_has_the_image_in_its_middle():
    model = nn.Sequential(nn.Conv2d(3, 1, 41))
    effective = utils.post_receptive_field(model, receptive_field(model, 64)).axes[1]
    boxes = [(*box.get_xy(), box.get_width()) for box in effective.patches]
    assert boxes == [(1.5, 1.5, 41), (6, 6, 32)]  # in 44 pixels of noise, of which output 2 of 4 sees 2 to 42
