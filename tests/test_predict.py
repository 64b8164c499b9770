"""predict.py against pixels worked out here, the transforms of the test loader, and models whose answers are known."""

import copy
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
import pretrained
import utils
from image_sets import CIFAR10_CLASSES
from predict import class_names, main, predict
from recipes import build_model, build_training, get_recipe, run_settings

COLOURS = ("red", "green", "blue")
RNG = np.random.default_rng(0)
GREY, ALPHA = RNG.integers(0, 256, (2, 32, 32), np.uint8)
RGB = RNG.integers(0, 256, (32, 32, 3), np.uint8)


class MeanColour(nn.Module):
    """Knows a picture by its strongest colour; keeps the last batch."""

    def forward(self, batch):
        self.batch = batch
        return batch.mean((2, 3))


def plain(name):
    """A picture of one colour."""
    return np.full((32, 32, 3), [255 * (name == colour) for colour in COLOURS], np.uint8)


# --- Pictures ---------------------------------------------------------------------------------------------------------


GREY3 = np.dstack([GREY] * 3)
OVER_WHITE = 255 + (RGB - 255.0) * (ALPHA[:, :, None] / 255)
# What to_rgb makes of each mode is tested in test_image_sets.py.
ARRAYS = {
    "H,W": (GREY, GREY3),
    "H,W,1": (GREY[:, :, None], GREY3),
    "H,W,3": (RGB, RGB),
    "H,W,4": (np.dstack([RGB, ALPHA]), OVER_WHITE),
    "not contiguous": (RGB.transpose(1, 0, 2)[::-1], RGB.transpose(1, 0, 2)[::-1]),
}
FLOATS = {f"{name}, float64": (array / 255, pixels) for name, (array, pixels) in ARRAYS.items()}
FLOATS["float32"] = (RGB / np.float32(255), RGB)
IMAGES = {"PIL": (Image.fromarray(np.dstack([RGB, ALPHA])), OVER_WHITE)}


@pytest.mark.parametrize("picture, pixels", [*(given := IMAGES | ARRAYS | FLOATS).values()], ids=given)
def test_probabilities_are_those_of_the_pixels_through_the_test_transforms(picture, pixels):
    torch.manual_seed(0)
    model = nn.Sequential(spy := MeanColour(), nn.Linear(3, 3))
    (prediction,) = predict(model, picture, COLOURS)
    expected = utils.get_test_transforms()(image=np.round(pixels).astype(np.uint8))["image"][None]
    assert spy.batch.shape == (1, 3, 32, 32) and spy.batch.dtype == torch.float32
    assert (spy.batch - expected).abs().max() < 1.05 / 255 / 0.2435  # one level
    with torch.no_grad():
        scores = model(expected)[0].double().exp()
    by_hand = dict(zip(COLOURS, (scores / scores.sum()).tolist()))
    assert prediction.probabilities == pytest.approx(by_hand, abs=0.01)
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-6)
    assert prediction.class_name == max(by_hand, key=by_hand.get)
    assert prediction.probability == prediction.probabilities[prediction.class_name]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_file_pil_image_and_array_agree(suffix, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(RGB).save(path)
    with Image.open(path) as opened:
        pixels = np.asarray(opened)
        floats = pixels / 255, np.float32(pixels) / 255, (pixels - 0.4).clip(0) / 255
        forms = (path, str(path), opened, pixels, *floats, [path], pixels[None])
        (first,), *others = (predict(MeanColour(), form, COLOURS) for form in forms)
    assert all(other == [first] for other in others)


def test_lists_batches_and_nothing(tmp_path):
    Image.fromarray(plain("green")).save(tmp_path / "green.png")
    pictures = [
        plain("blue"),
        tmp_path / "green.png",
        Image.fromarray(plain("red")).resize((50, 20)),
        plain("blue") / 255,
    ]
    for images in (pictures, tuple(pictures), iter(pictures)):
        names = [prediction.class_name for prediction in predict(MeanColour(), images, COLOURS)]
        assert names == ["blue", "green", "red", "blue"]
    assert predict(MeanColour(), [], COLOURS) == []
    names = [COLOURS[index] for index in RNG.integers(0, 3, 600)]
    model = MeanColour()
    assert [p.class_name for p in predict(model, list(map(plain, names)), COLOURS)] == names
    assert len(model.batch) < 600  # in parts, for which there is memory


def saved(format):
    Image.fromarray(RGB).save(file := io.BytesIO(), format)
    return file.getvalue()


FILES = {
    "text.png": b"not a picture",
    "empty.png": b"",
    "short.png": saved("PNG")[:1000],
    "short.jpg": saved("JPEG")[:500],
    "drawing.eps": saved("EPS"),  # a format whose reader starts another program
}
NO_PICTURES = [  # a file in the folder or another thing, and what the error says
    *((name, f"{name} is not a picture that can be read") for name in FILES),
    ("drawing.eps", "cannot identify image file"),
    ("absent.png", r"there is no file .*absent\.png"),
    ("", "is a folder"),
    ("https://example.org/cat.jpg", "is an address; download the picture"),
    ("file:///home/cat.jpg", "is an address"),
    *((np.zeros(shape, np.uint8), rf"picture 2 has shape \({shape[0]}") for shape in [(32,), (8, 8, 2), (0, 8, 3)]),
    *((np.ones((8, 8, 3), dtype), f"picture 2 is {dtype}.*uint8 from 0 to 255") for dtype in ("int64", "bool")),
    *((np.full((8, 8), value), f"picture 2 is float64 from {value}") for value in (1.01, -0.01, np.nan, np.inf)),
    *((thing, f"picture 2 is a {type(thing).__name__}") for thing in (None, 3, torch.zeros(3, 32, 32))),
]


@pytest.mark.parametrize("given, words", NO_PICTURES, ids=[words for _, words in NO_PICTURES])
def test_what_is_no_picture_is_named(given, words, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    if isinstance(given, str) and "://" not in given:
        given = tmp_path / given
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=words):
        predict(MeanColour(), [RGB, given, RGB], COLOURS)


# --- Models -----------------------------------------------------------------------------------------------------------


def test_in_the_type_of_the_model_and_through_wrappers():
    torch.manual_seed(0)
    model = models.Model()
    with torch.no_grad():
        for _ in range(5):  # without its statistics an untrained network finds every picture much the same
            model(torch.randn(16, 3, 32, 32))
        model.eval().classifier.weight *= 40
        by_hand = model(utils.get_test_transforms()(image=RGB)["image"][None])[0].exp().tolist()
    expected = dict(zip(CIFAR10_CLASSES, by_hand))
    assert max(by_hand) > 0.2
    parallel = nn.DataParallel(model)
    parallel.forward = None  # as where there are GPUs, and the model is not on one
    for form in (model, parallel, torch.compile(model, backend="eager"), model.double()):
        [prediction] = predict(form, RGB)
        assert prediction.probabilities == pytest.approx(expected, abs=1e-4)


def test_evaluation_mode_inside_and_every_mode_restored():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3).eval(), MeanColour())  # kept frozen, as in fine-tuning
    state = copy.deepcopy(model.state_dict())
    (alone,), (_, among) = predict(model, RGB, COLOURS), predict(model, [plain("red"), RGB], COLOURS)
    assert among.probabilities == pytest.approx(alone.probabilities, abs=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True]


def test_weights_that_are_not_finite():
    model = nn.Sequential(MeanColour(), nn.Linear(3, 3))
    model[1].weight.data.fill_(np.nan)
    with pytest.raises(ValueError, match="scores are not finite"):
        predict(model, RGB, COLOURS)


def test_probabilities_are_not_taken_for_scores():
    with pytest.raises(ValueError, match="returns probabilities; give predict one that returns scores"):
        predict(nn.Sequential(MeanColour(), nn.Softmax(1)), RGB, COLOURS)


# --- Names of classes -------------------------------------------------------------------------------------------------

NUMBERS = "zero one two three four five six seven eight nine ten".split()  # whose alphabetical order is another
LABEL_MAP = {name: label for label, name in enumerate(NUMBERS)}


@pytest.mark.parametrize(
    "label_map, names",
    [
        (tuple(NUMBERS), NUMBERS),
        (LABEL_MAP, NUMBERS),
        (dict(sorted(LABEL_MAP.items())), NUMBERS),  # as the loaders give it
        (dict(reversed([*enumerate(NUMBERS)])), NUMBERS),
        ({name: np.int64(label) for name, label in LABEL_MAP.items()}, NUMBERS),
        ({"1": 0, "0": 1}, ["1", "0"]),  # as of digits
        ({0: "1", 1: "0"}, ["1", "0"]),
        ([1, 0], ["1", "0"]),
    ],
)
def test_class_names_are_in_the_order_of_the_labels(label_map, names):
    assert class_names(label_map) == names


@pytest.mark.parametrize(
    "label_map, words",
    [
        ({0: "a", 2: "b", 3: "c"}, "does not say the class of each label"),  # a gap
        ({"a": 0, "b": 2, "c": 3}, "labels 0 to 2"),
        ({1: "a", 2: "b", 3: "c"}, "labels 0 to 2"),  # a start at 1
        ({"a": 1, "b": 2, "c": 3}, "labels 0 to 2"),
        ({"a": 0, "b": 0, "c": 1}, "each name once"),  # repeated
        ({0: "a", 1: "a", 2: "b"}, "each name once"),
        (["a", "b", "a"], "a name twice"),
        ({"a": "0", "b": "1", "c": "2"}, "does not say"),
        ({0: 1, 1: 0, 2: 2}, "numbers to numbers"),
        ({"a", "b", "c"}, "no order"),
        ("abc", "no order"),
    ],
)
def test_label_maps_that_do_not_say_the_class_of_each_label(label_map, words):
    with pytest.raises(ValueError, match=words):
        predict(MeanColour(), RGB, label_map)


def test_predictions_by_any_label_map():
    for classes in (COLOURS, {0: "red", 1: "green", 2: "blue"}, {"blue": 2, "green": 1, "red": 0}):
        assert predict(MeanColour(), plain("red"), classes)[0].class_name == "red"
    for classes in (COLOURS[:2], CIFAR10_CLASSES, ()):
        with pytest.raises(ValueError, match=rf"3 outputs.*\b{len(classes)} class names"):
            predict(MeanColour(), RGB, classes)


# --- In a terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_run(tmp_path):
    """The folder of a run of one epoch on three classes, and its network."""
    recipe = get_recipe("s9")
    model = build_model(recipe, 3)
    optimizer, scheduler, _ = build_training(recipe, model, 1)
    _, loader = utils.get_CIFARdataset_with_loader("test", dataset="digits")
    loader.dataset.classes = ("fox", "owl", "yak")
    with utils.Run("own", root=tmp_path) as run:
        lists = run.resume(run_settings(recipe, loader, 1), model, optimizer, scheduler)
        model.classifier.bias.data = torch.tensor([0.0, 2.0, 1.0]).log1p()
        model.classifier.weight.data *= 0  # scores of any picture: log 1, log 3, log 2
        run.save(*([*values, 50.0] for values in lists))
    return run.folder


def in_terminal(monkeypatch, capsys, *arguments):
    """(exit status or message, what it prints, what it prints of errors)."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    return stopped.value.code, printed.out, printed.err


def test_a_run_of_ones_own_classifies_with_its_classes(own_run, tmp_path, monkeypatch, capsys):
    good, text, absent = (tmp_path / name for name in ("good.png", "text.png", "absent.png"))
    Image.fromarray(RGB).save(good)
    text.write_text("not a picture")
    address = "https://example.org/cat.jpg"
    pictures = [absent, good, text, tmp_path, address]
    for weights in ("last.pt", "best.pt"):
        code, out, err = in_terminal(monkeypatch, capsys, "--weights", own_run / weights, *pictures)
        assert code == 1 and out == f"{good}: owl 50.0%, yak 33.3%, fox 16.7%\n"
        assert len(err.splitlines()) == 4
        for words in (f"no file {absent}", f"{text} is not", f"{tmp_path} is a folder", f"{address} is an address"):
            assert words in err
    edit("BatchNorm2d", "SyncBatchNorm")(own_run)  # as a run on several GPUs has it
    for _ in range(2):
        code, out, err = in_terminal(monkeypatch, capsys, "--weights", own_run / "last.pt", good)
        assert (code, err) == (0, "")
        edit("ReLU()", "ReLU(inplace=False)")(own_run)  # as another version of torch might print it
        edit('"torch": "', '"torch": "0.')(own_run)


def test_raw_scores_may_sum_to_nearly_one():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2))
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([0.6, 0.42])
    [prediction] = predict(model, RGB, ["fox", "owl"])
    assert prediction.probability == pytest.approx(1 / (1 + np.exp(-0.18)))


def test_by_default_the_most_accurate_weights_name_the_three_best_of_ten(tmp_path, monkeypatch, capsys):
    Image.fromarray(RGB).save(tmp_path / "good.png")
    torch.manual_seed(0)
    model = models.Model().eval()
    asked = {pretrained.most_accurate(): (model, list(CIFAR10_CLASSES))}
    monkeypatch.setattr("predict.load_network", asked.__getitem__)
    code, out, _ = in_terminal(monkeypatch, capsys, tmp_path / "good.png")
    best = sorted(predict(model, RGB)[0].probabilities.items(), key=lambda item: -item[1])[:3]
    assert code == 0 and out == f"{tmp_path / 'good.png'}: {', '.join(f'{name} {p:.1%}' for name, p in best)}\n"


def test_help_names_the_classes_even_without_weights(tmp_path, monkeypatch, capsys):
    code, out, _ = in_terminal(monkeypatch, capsys, "--help")
    assert code == 0 and all(word in out for word in (*CIFAR10_CLASSES, "s9", "tuned", "last.pt"))
    code, _, err = in_terminal(monkeypatch, capsys)
    assert code == 2 and "usage" in err
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    code, out, _ = in_terminal(monkeypatch, capsys, "--help")
    assert code == 0 and all(name in out for name in CIFAR10_CLASSES)
    message, _, _ = in_terminal(monkeypatch, capsys, "cat.png")
    assert "there are no weights in" in message


AS_IT_IS = str  # a function that changes nothing


def edit(old, new):
    return lambda folder: (folder / "run.json").write_text((folder / "run.json").read_text().replace(old, new))


@pytest.mark.parametrize(
    "spoil, file, words",
    [
        (lambda folder: (folder / "run.json").unlink(), "last.pt", "has no run.json beside it that says"),
        (edit('"classes"', '"kinds"'), "last.pt", "has no run.json beside it that says"),
        (edit("{", ""), "last.pt", "has no run.json beside it that says"),
        (edit('"Model"', '"VGG"'), "last.pt", "has no run.json beside it that says"),
        (edit("fox/owl/yak", "fox/owl"), "last.pt", "does not fit Model"),
        (edit("ReLU()", "GELU()"), "last.pt", "does not fit Model: "),
        (lambda folder: (folder / "last.pt").write_bytes(b"PK"), "last.pt", "is damaged"),
        (AS_IT_IS, "checkpoint.pt", "is not the last.pt or best.pt of a run"),
        (AS_IT_IS, "", "is a folder; give the last.pt"),
        (AS_IT_IS, "first.pt", "No such file"),
        (AS_IT_IS, "s9", "no weights"),
    ],
)
def test_weights_that_cannot_be_used(spoil, file, words, own_run, monkeypatch, capsys):
    spoil(own_run)
    message, out, _ = in_terminal(monkeypatch, capsys, "--weights", own_run / file, "cat.png")
    assert words in message and "\n" not in message and not out
