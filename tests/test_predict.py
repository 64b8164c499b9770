"""predict.py against pixels worked out here, the transforms of the test loader, and a model whose answer is known."""

import io
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import models
import utils
from image_sets import CIFAR10_CLASSES
from predict import main, predict

COLOURS = ("red", "green", "blue")
RNG = np.random.default_rng(0)
GREY, ALPHA = RNG.integers(0, 256, (2, 32, 32), np.uint8)
RGB = RNG.integers(0, 256, (32, 32, 3), np.uint8)
INK = RNG.integers(0, 256, (32, 32, 4), np.uint8)


class MeanColour(nn.Module):
    """Knows a picture by its strongest colour; keeps the last batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        self.batch = batch
        return self.weight * batch.mean((2, 3))


def plain(name):
    """A picture of one colour."""
    return np.full((32, 32, 3), [255 * (name == colour) for colour in COLOURS], np.uint8)


def grey(values):
    return np.repeat(np.asarray(values)[:, :, None], 3, axis=2)


def over_white(pixels, alpha):
    opacity = alpha[:, :, None] / 255
    return pixels * opacity + 255 * (1 - opacity)


def palette():
    """Grey 0 to 15 as indices into a palette of RGB's first colours, of which number 3 is transparent."""
    image = Image.fromarray(GREY // 16, "L")
    image.putpalette(RGB[0, :16].tobytes())
    image.info["transparency"] = 3
    return image


MODES = {  # a PIL image, and its pixels by hand
    "1": (Image.fromarray(GREY > 99), 255 * grey(GREY > 99)),
    "L": (Image.fromarray(GREY), grey(GREY)),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), over_white(grey(GREY), ALPHA)),
    "P": (palette(), over_white(RGB[0, GREY // 16], 255 * (GREY // 16 != 3))),
    "RGB": (Image.fromarray(RGB), RGB),
    "RGBA": (Image.fromarray(np.dstack([RGB, ALPHA])), over_white(RGB, ALPHA)),
    "CMYK": (Image.fromarray(INK, "CMYK"), (255.0 - INK[:, :, :3]) * (255.0 - INK[:, :, 3:]) / 255),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 256 + ALPHA), grey((GREY * 256.0 + ALPHA) / 257)),
}
ARRAYS = {
    "H,W": (GREY, grey(GREY)),
    "H,W,1": (GREY[:, :, None], grey(GREY)),
    "H,W,3": (RGB, RGB),
    "H,W,4": (np.dstack([RGB, ALPHA]), over_white(RGB, ALPHA)),
    "not contiguous": (RGB.transpose(1, 0, 2)[::-1], RGB.transpose(1, 0, 2)[::-1]),
}
FLOATS = {f"{name}, float64": (array / 255, pixels) for name, (array, pixels) in ARRAYS.items()}
FLOATS["float32"] = (RGB / np.float32(255), RGB)


@pytest.mark.parametrize("picture, pixels", [*(given := MODES | ARRAYS | FLOATS).values()], ids=given)
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


@pytest.mark.parametrize("size", [(64, 64), (20, 50), (1, 1), (100, 31)])
def test_another_size_is_squeezed(size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    predict(spy := MeanColour(), pixels, COLOURS)
    squeezed = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    squeezed = F.interpolate(squeezed, (32, 32), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert np.abs(utils.get_image_from_tensor(spy.batch[0]) - squeezed.numpy()).max() <= 1.5


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_file_pil_image_and_array_agree_with_the_network_run_by_hand(suffix, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(RGB).save(path)
    with Image.open(path) as opened:
        pixels = np.asarray(opened)
    torch.manual_seed(0)
    model = models.Model()
    with torch.no_grad():
        for _ in range(10):  # without its statistics an untrained network finds every picture much the same
            model(torch.randn(16, 3, 32, 32))
        model.eval().classifier.weight *= 40
        by_hand = model(utils.get_test_transforms()(image=pixels)["image"][None])[0].exp().tolist()
    forms = (path, str(path), Image.open(path), pixels, pixels / 255, np.float32(pixels) / 255, [path])
    (first,), *others = (predict(model, form) for form in forms)
    assert all(other == [first] for other in others)
    assert list(first.probabilities) == list(CIFAR10_CLASSES) and max(by_hand) > 0.2
    assert list(first.probabilities.values()) == pytest.approx(by_hand, abs=1e-4)
    assert first.class_name == CIFAR10_CLASSES[int(np.argmax(by_hand))]


def test_known_classes_in_the_order_given(tmp_path):
    Image.fromarray(plain("green")).save(tmp_path / "green.png")
    pictures = [plain("blue"), tmp_path / "green.png", Image.fromarray(plain("red")), plain("blue") / 255]
    for images in (pictures, tuple(pictures)):
        names = [prediction.class_name for prediction in predict(MeanColour(), images, COLOURS)]
        assert names == ["blue", "green", "red", "blue"]
    batch = np.stack([plain("green"), plain("red")])
    assert [p.class_name for p in predict(MeanColour(), batch, ["r", "g", "b"])] == ["g", "r"]
    assert predict(MeanColour(), [], COLOURS) == []
    as_loaders_give_them = {name: COLOURS.index(name) for name in sorted(COLOURS)}
    assert predict(MeanColour(), plain("red"), as_loaders_give_them)[0].class_name == "red"


def test_many_pictures_go_through_the_network_in_parts():
    names = [COLOURS[index] for index in RNG.integers(0, 3, 600)]
    model = MeanColour()
    assert [p.class_name for p in predict(model, list(map(plain, names)), COLOURS)] == names
    assert len(model.batch) < 600


def test_in_the_type_of_the_model():
    model = models.Model.from_pretrained("tuned")
    single, double = predict(model, RGB)[0], predict(model.double(), RGB)[0]
    assert double.probabilities == pytest.approx(single.probabilities, abs=1e-4)


def test_model_without_parameters():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert predict(model, plain("green"), COLOURS)[0].class_name == "green"


@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False), (False, True)])
def test_evaluation_mode_inside_and_every_mode_restored(modes):
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3), MeanColour()).train(modes[0])
    model[1].train(modes[1])  # another one than the rest where it is kept frozen
    before = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    (alone,), (_, among) = predict(model, RGB, COLOURS), predict(model, [plain("red"), RGB], COLOURS)
    assert among.probabilities == pytest.approx(alone.probabilities, abs=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == before
    model[2].forward = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        predict(model, RGB, COLOURS)
    assert [module.training for module in model.modules()] == before


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
SHAPES = [(), (32,), (2, 32, 32), (32, 32, 2), (32, 32, 5), (0, 32, 3), (1, 32, 32, 3)]
OUT_OF_RANGE = [("float32", 1.01), ("float64", -0.01), ("float32", np.nan), ("float64", np.inf)]
ERRORS = [  # what to make the picture from, how, and what the error is and says
    *((name, lambda folder, name: folder / name, ValueError, name) for name in FILES),
    ("absent.png", lambda folder, name: folder / name, FileNotFoundError, "absent.png"),
    ("drawing.eps", lambda folder, name: folder / name, ValueError, "cannot identify"),
    ("folder", lambda folder, _: str(folder), ValueError, "not a picture"),
    ("short.png", lambda folder, name: Image.open(folder / name), ValueError, "truncated"),
    *((shape, lambda _, shape: np.zeros(shape, np.uint8), ValueError, str(shape)) for shape in SHAPES),
    *((dtype, lambda _, dtype: np.ones((8, 8, 3), dtype), ValueError, dtype) for dtype in ("int64", "uint16", "bool")),
    *((given, lambda _, given: np.full((8, 8, 3), given[1], given[0]), ValueError, given[0]) for given in OUT_OF_RANGE),
    *(
        (kind, lambda _, kind: kind(), TypeError, kind.__name__)
        for kind in (type(None), int, dict, bytes, torch.Tensor)
    ),
]


@pytest.mark.parametrize("given, make, error, says", ERRORS, ids=[str(case[0]) for case in ERRORS])
def test_error_names_the_picture(given, make, error, says, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=r"images\[1\]") as caught:
        predict(MeanColour(), [RGB, make(tmp_path, given), RGB], COLOURS)
    assert says in str(caught.value)


@pytest.mark.parametrize("images", [None, 3])
def test_neither_a_picture_nor_a_list(images):
    with pytest.raises(TypeError, match=rf"{type(images).__name__}.*picture"):
        predict(MeanColour(), images, COLOURS)


@pytest.mark.parametrize("classes", [COLOURS[:2], CIFAR10_CLASSES, ()])
def test_wrong_number_of_class_names(classes):
    with pytest.raises(ValueError, match=rf"3 outputs.*\b{len(classes)} "):
        predict(MeanColour(), RGB, classes)


def test_in_a_terminal_good_pictures_are_classified_and_bad_ones_named(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = models.Model().eval()
    monkeypatch.setattr(models.Model, "from_pretrained", lambda name: {"tuned": model}[name])
    good, text, absent = (tmp_path / name for name in ("good.png", "text.png", "absent.png"))
    Image.fromarray(RGB).save(good)
    text.write_text("not a picture")
    monkeypatch.setattr(sys, "argv", ["predict.py", str(absent), str(good), str(text)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    (expected,) = predict(model, RGB)
    assert printed.out == f"{good}: {expected.class_name} ({expected.probability:.1%})\n"
    assert f"there is no file {absent}" in printed.err and f"{text} is not a picture" in printed.err


def test_in_a_terminal_without_pictures_there_is_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict.py"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "usage" in capsys.readouterr().err
