"""predict.py against pixels worked out here, the transforms of the test loader, and models whose answers are known."""

import copy
import io
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
import utils
from image_sets import CIFAR10_CLASSES
from predict import class_names, main, post_predictions, predict
from pretrained import shipped
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
    ("absent.png", r"No such file .*absent\.png"),
    ("", "Is a directory"),
    (np.ones((8, 8, 3), "int64"), "Cannot handle this data type"),  # Pillow's words
    *((np.full((8, 8, 3), value), "Cannot handle this data type") for value in (1.01, -0.01, np.nan, np.inf)),
    *((np.full((8, 8), value, np.float32), "floating-point from") for value in (1.01, -0.01, np.nan, np.inf)),
    (None, "not NoneType"),
]


@pytest.mark.parametrize("given, words", NO_PICTURES, ids=[words for _, words in NO_PICTURES])
def test_what_is_no_picture_is_named(given, words, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    given = tmp_path / given if isinstance(given, str) else given
    with pytest.raises((ValueError, TypeError, OSError), match=words):
        predict(MeanColour(), [RGB, given, RGB], COLOURS)


def test_a_network_of_another_normalisation():
    """Of the pixels as they are, say; with CIFAR-10's, it would see other colours."""
    as_it_is = A.Compose([A.Normalize((0, 0, 0), (1, 1, 1)), A.pytorch.ToTensorV2()])
    predict(model := MeanColour(), RGB, COLOURS, transforms=as_it_is)
    torch.testing.assert_close(model.batch[0], torch.tensor(RGB / 255).float().permute(2, 0, 1))


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


def test_it_leaves_the_model_in_evaluation_mode_for_any_number_of_threads():
    """As a web demo has them: the first answer must not put the model of the second back into training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3), MeanColour())
    expected = predict(copy.deepcopy(model), RGB, COLOURS)
    state = copy.deepcopy(model.state_dict())
    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(lambda _: predict(model, RGB, COLOURS), range(30))] == [expected] * 30
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and not model.training


def test_probabilities_of_a_model_are_taken_as_they_are():
    [expected], [prediction] = (
        predict(nn.Sequential(MeanColour(), *end), RGB, COLOURS) for end in ([], [nn.Softmax(1)])
    )
    assert prediction.probabilities == pytest.approx(expected.probabilities)


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
    "label_map",
    [
        {0: "a", 2: "b", 3: "c"},  # a gap
        {"a": 0, "b": 2, "c": 3},
        {1: "a", 2: "b", 3: "c"},  # a start at 1
        {"a": 1, "b": 2, "c": 3},
        {"a": 0, "b": 0, "c": 1},  # repeated
        {0: "a", 1: "a", 2: "b"},
        ["a", "b", "a"],
        {"a": "0", "b": "1", "c": "2"},
        {"a", "b", "c"},  # no order
        "abc",
    ],
)
def test_label_maps_that_do_not_say_the_class_of_each_label(label_map):
    with pytest.raises(ValueError, match="does not say the class of each label"):
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
    for weights in ("last.pt", "best.pt"):
        code, out, err = in_terminal(monkeypatch, capsys, "--weights", own_run / weights, absent, good, text, tmp_path)
        assert code == 1 and out == f"{good}: owl 50.0%, yak 33.3%, fox 16.7%\n"
        assert len(err.splitlines()) == 3 and str(absent) in err and f"{text} is not" in err
    edit("BatchNorm2d", "SyncBatchNorm")(own_run)  # as a run on several GPUs has it
    for _ in range(2):
        code, out, err = in_terminal(monkeypatch, capsys, "--weights", own_run / "last.pt", good)
        assert (code, err) == (0, "")
        edit("ReLU()", "ReLU(inplace=False)")(own_run)  # as another version of torch might print it
        edit('"torch": "', '"torch": "0.')(own_run)


def test_pictures_by_a_pattern_and_a_chart_of_them(own_run, tmp_path, monkeypatch, capsys):
    """Windows' shells leave patterns to the program."""
    for name in "ab":
        Image.fromarray(RGB).save(tmp_path / f"{name}.png")
    chart = tmp_path / "chart.jpg"
    arguments = "--weights", own_run / "last.pt", "--show", chart, tmp_path / "*.png"
    code, out, _ = in_terminal(monkeypatch, capsys, *arguments)
    assert code == 0 and [line.split(":")[0][-5:] for line in out.splitlines()] == ["a.png", "b.png"]
    with Image.open(chart) as opened:
        assert opened.format == "JPEG"
    axes = post_predictions([RGB] * 8, predict(MeanColour(), [RGB] * 8, COLOURS)).axes
    for picture, bars in ((axes[0], axes[6]), (axes[13], axes[19])):
        assert np.array_equal(picture.images[0].get_array(), RGB) and len(bars.patches) == 3
        assert sum(bar.get_width() for bar in bars.patches) == pytest.approx(100)


def test_names_that_a_terminal_has_no_letters_for(own_run, tmp_path):
    Image.fromarray(RGB).save(tmp_path / "good.png")
    edit("owl", "сова")(own_run)
    command = [sys.executable, "predict.py", "--weights", own_run / "last.pt", tmp_path / "good.png"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    folder = pathlib.Path(models.__file__).parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0 and b"???? 50.0%" in done.stdout


def test_by_default_the_most_accurate_weights_name_the_three_best_of_ten(tmp_path, monkeypatch, capsys):
    Image.fromarray(RGB).save(tmp_path / "good.png")
    code, out, _ = in_terminal(monkeypatch, capsys, tmp_path / "good.png")
    trained = models.SeparableResNet.from_pretrained("resnet-long")
    best = sorted(predict(trained, RGB)[0].probabilities.items(), key=lambda item: -item[1])[:3]
    assert code == 0 and out == f"{tmp_path / 'good.png'}: {', '.join(f'{name} {p:.1%}' for name, p in best)}\n"


def test_help_names_the_classes(monkeypatch, capsys):
    code, out, _ = in_terminal(monkeypatch, capsys, "--help")
    assert code == 0 and all(word in out for word in (*CIFAR10_CLASSES, *shipped(), "last.pt"))
    code, _, err = in_terminal(monkeypatch, capsys)
    assert code == 2 and "usage" in err


AS_IT_IS = str  # a function that changes nothing


def edit(old, new):
    def edited(folder):
        text = (folder / "run.json").read_text(encoding="utf-8")
        (folder / "run.json").write_text(text.replace(old, new), encoding="utf-8")

    return edited


@pytest.mark.parametrize(
    "spoil, file, words",
    [
        (lambda folder: (folder / "run.json").unlink(), "last.pt", "run.json"),
        (edit('"classes"', '"kinds"'), "last.pt", "run.json"),
        (edit("{", ""), "last.pt", "run.json"),
        (edit('"Model"', '"VGG"'), "last.pt", "run.json"),
        (edit("fox/owl/yak", "fox/owl"), "last.pt", "run.json"),
        (edit("ReLU()", "GELU()"), "last.pt", "the network as it was then"),
        (lambda folder: (folder / "last.pt").write_bytes(b"PK"), "last.pt", "is damaged"),
        (AS_IT_IS, "checkpoint.pt", "give the last.pt"),
        (AS_IT_IS, "first.pt", "No such file"),
        (AS_IT_IS, "", "no weights"),
        (AS_IT_IS, "s9", "no weights"),
    ],
)
def test_weights_that_cannot_be_used(spoil, file, words, own_run, monkeypatch, capsys):
    spoil(own_run)
    message, out, _ = in_terminal(monkeypatch, capsys, "--weights", own_run / file, "cat.png")
    assert words in message and "\n" not in message and not out
