"""predict.py against pixels worked out here, the transforms of the test loader, and models whose answers are known."""

import re
import sys
from unittest.mock import Mock

import albumentations as A
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import utils
from image_sets import CIFAR10_CLASSES
from predict import class_names, main, predict
from pretrained import shipped
from recipes import build_model, build_training, get_recipe, load_network, run_settings

COLOURS = ("red", "green", "blue")
RNG = np.random.default_rng(0)
GREY, ALPHA = RNG.integers(0, 256, (2, 32, 32), np.uint8)
GREY3, RGB = np.dstack([GREY] * 3), RNG.integers(0, 256, (32, 32, 3), np.uint8)
OVER_WHITE = 255 + (RGB - 255.0) * (ALPHA[:, :, None] / 255)


class MeanColour(nn.Module):
    def forward(self, batch):
        self.batch = batch
        return 10 * batch.mean((2, 3))


PICTURES = {  # what is given, and its pixels; what becomes of each mode of PIL is tested in test_image_sets.py
    "H,W": (GREY, GREY3),
    "H,W,1 float64": (GREY[:, :, None] / 255, GREY3),
    "H,W,3 not contiguous": (RGB.transpose(1, 0, 2)[::-1], RGB.transpose(1, 0, 2)[::-1]),
    "H,W,3 float32, to be rounded": ((RGB - np.float32(0.4)).clip(0) / 255, RGB),
    "H,W,4 float64": (np.dstack([RGB, ALPHA]) / 255, OVER_WHITE),
}
AS_IT_IS = A.Compose([A.Normalize((0, 0, 0), (1, 1, 1)), A.pytorch.ToTensorV2()])


@pytest.mark.parametrize("transforms", [None, AS_IT_IS], ids=["CIFAR-10's", "own"])
@pytest.mark.parametrize("picture, pixels", PICTURES.values(), ids=PICTURES)
def test_a_network_sees_the_pixels_normalised_as_in_training(picture, pixels, transforms):
    predict(model := MeanColour(), picture, COLOURS, transforms)
    normalise = transforms or utils.get_test_transforms()
    expected = normalise(image=np.round(pixels).astype(np.uint8))["image"][None]
    tolerance = 1.05 / 255 / 0.2435 if pixels is OVER_WHITE else 1e-6  # Pillow may round to the next level
    torch.testing.assert_close(model.batch, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_file_and_its_pixels_agree_alone_and_among_others(suffix, tmp_path):
    Image.fromarray(RGB).save(path := tmp_path / f"picture.{suffix}")
    with Image.open(path) as opened:
        forms = (path, str(path), opened, pixels := np.asarray(opened), pixels[None], (path,), iter([opened]))
        first, *others = (predict(MeanColour(), form, COLOURS) for form in forms)
    assert len(first) == 1 and all(other == first for other in others)


def test_any_number_of_pictures_keep_their_order():
    assert predict(MeanColour(), [], COLOURS) == []
    names = RNG.choice(COLOURS, 600).tolist()
    predictions = predict(model := MeanColour(), [Image.new("RGB", (5, 2), name) for name in names], COLOURS)
    assert [prediction.class_name for prediction in predictions] == names
    assert len(model.batch) < 600  # in parts, for which there is memory


def test_what_is_no_picture_is_refused_and_a_file_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    for suffix, size in (("png", 1000), ("jpg", 500), ("pcx", None)):  # damaged, or of a format that few use or watch
        Image.fromarray(RGB).save(path := tmp_path / f"picture.{suffix}")
        path.write_bytes(path.read_bytes()[:size])
    for path in (*tmp_path.iterdir(), tmp_path / "absent.png", tmp_path):
        with pytest.raises((ValueError, OSError), match=re.escape(str(path))):
            predict(MeanColour(), [RGB, path], COLOURS)
    floats = [np.full((8, 8, 3), value) for value in (1.01, -0.01, np.nan)]
    for other in (None, np.ones((8, 8, 3), int), *floats, *(array[:, :, 0].astype(np.float32) for array in floats)):
        with pytest.raises((ValueError, TypeError)):
            predict(MeanColour(), [RGB, other], COLOURS)


def test_any_wrapper_type_and_kind_of_scores_gives_the_same_in_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.9), MeanColour())
    image = utils.get_test_transforms()(image=RGB)["image"][None]
    expected = dict(zip(COLOURS, model.eval()(image)[0].softmax(0).tolist()))
    parallel = nn.DataParallel(model)
    parallel.forward = None  # as where there are GPUs, and the model is not on one
    with_end = [nn.Sequential(model, end) for end in (nn.Softmax(1), nn.LogSoftmax(1))]
    for form in (model, *with_end, parallel, torch.compile(model, backend="eager"), model.double()):
        [prediction] = predict(form.train(), RGB, COLOURS)
        assert prediction.probabilities == pytest.approx(expected, abs=1e-4)
        assert prediction[:2] == max(prediction.probabilities.items(), key=lambda item: item[1])
        assert not model.training  # other threads may be at it, as in a web demo


def test_any_label_map_names_the_classes_if_it_says_the_class_of_each_output():
    for label_map in (COLOURS, {"blue": 2, "green": 1, "red": 0}, {2: "blue", 1: "green", 0: "red"}):
        assert predict(MeanColour(), Image.new("RGB", (5, 2), "red"), label_map)[0].class_name == "red"
        assert class_names(label_map) == [*COLOURS]
    for label_map in ({"1": np.int64(0), "0": np.int64(1)}, {0: "1", 1: "0"}, [1, 0]):  # as of digits
        assert class_names(label_map) == ["1", "0"]
    gaps = {0: "a", 2: "b", 3: "c"}, {"a": 1, "b": 2, "c": 3}, {1: "a", 2: "b", 3: "c"}
    repeated = {"a": 0, "b": 0, "c": 1}, {0: "a", 1: "a", 2: "b"}, ["a", "b", "a"]
    no_order = {"a": "0", "b": "1", "c": "2"}, {"a", "b", "c"}, "abc"
    for label_map in (*gaps, *repeated, *no_order, COLOURS[:2], CIFAR10_CLASSES, ()):
        with pytest.raises(ValueError):
            predict(MeanColour(), RGB, label_map)


@pytest.fixture
def own_run(tmp_path):
    """The folder of a run of one epoch on three classes."""
    model = build_model(recipe := get_recipe("s9"), 3)
    optimizer, scheduler, _ = build_training(recipe, model, 1)
    _, loader = utils.get_CIFARdataset_with_loader("test", dataset="digits")
    loader.dataset.classes = ("fox", "сова", "yak")
    with utils.Run("own", root=tmp_path) as run:
        lists = run.resume(run_settings(recipe, loader, 1), model, optimizer, scheduler)
        model.classifier.bias.data = torch.tensor([0.0, 2.0, 1.0]).log1p()
        model.classifier.weight.data *= 0  # scores of any picture: log 1, log 3, log 2
        run.save(*([*values, 50.0] for values in lists))
    return run.folder


@pytest.fixture
def terminal(monkeypatch, capsys):
    def run(*arguments):  # returns the exit status or message, what it prints, and what it prints of errors
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        sys.stdout.reconfigure(encoding="cp1252")  # as of a Windows that has no Cyrillic letters
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return run


def test_a_run_of_ones_own_classifies_with_its_classes_and_draws_a_chart(own_run, terminal):
    pictures = [RGB + np.uint8(number) for number in range(8)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(own_run / f"{number}.png")
    (text := own_run / "text.png").write_text("not a picture")
    given = "--show", own_run / "chart.jpg", own_run / "?.png", text, "absent.png"  # Windows expands no patterns
    for weights in ("last.pt", "best.pt"):
        code, out, err = terminal("--weights", own_run / weights, *given)
        lines = [f"{own_run / str(number)}.png: ???? 50.0%, yak 33.3%, fox 16.7%" for number in range(8)]
        assert code == 1 and out.splitlines() == lines and str(text) in err and "absent.png" in err
    axes = plt.gcf().axes
    for number, above, below in ((0, axes[0], axes[6]), (7, axes[13], axes[19])):
        assert np.array_equal(above.images[0].get_array(), pictures[number])
        assert [bar.get_width() for bar in below.patches] == pytest.approx([50, 100 / 3, 100 / 6])
    assert (own_run / "chart.jpg").exists()
    run_json = (own_run / "run.json").read_text().replace("BatchNorm2d", "SyncBatchNorm")  # as a run on several GPUs
    of_another_torch = run_json.replace("ReLU()", "ReLU(inplace=False)").replace('"torch": "', '"torch": "0.')
    for content in (run_json, of_another_torch):
        (own_run / "run.json").write_text(content)
        assert terminal("--weights", own_run / "last.pt", own_run / "0.png")[0] == 0


def test_by_default_the_most_accurate_weights_name_the_three_best_of_ten(tmp_path, terminal):
    Image.fromarray(RGB).save(tmp_path / "good.png")
    code, out, _ = terminal(tmp_path / "good.png")
    [(name, probability, _)] = predict(load_network("resnet-long")[0], RGB)
    assert code == 0 and out.count("%") == 3 and f"good.png: {name} {probability:.1%}, " in out
    assert all(word in terminal("--help")[1] for word in (*CIFAR10_CLASSES, *shipped(), "last.pt"))


def test_a_closed_pipe_is_no_fault_of_the_pictures(tmp_path, monkeypatch):
    """As of `python predict.py *.jpg | head -1`."""
    Image.fromarray(RGB).save(tmp_path / "good.png")
    monkeypatch.setattr(sys, "argv", ["predict.py", str(tmp_path / "good.png")])
    monkeypatch.setattr("builtins.print", Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        main()
    assert print.call_count == 1


def test_weights_that_cannot_be_used_are_named_in_one_line(own_run, terminal):
    (own_run / "damaged.pt").write_bytes(b"PK")
    (own_run.parent / "alone.pt").write_bytes((own_run / "last.pt").read_bytes())
    given = [("", "", file) for file in ("damaged.pt", "../alone.pt", "checkpoint.pt", "absent.pt", "", "s9")]
    changes = [('"classes"', '"kinds"'), ("{", ""), ('"Model"', '"VGG"'), ('"fox/', '"'), ("ReLU()", "GELU()")]
    changes += [('"hyperparameters"', '"settings"'), ('"dropout"', '"p"'), ('"network"', '"module"')]
    text = (own_run / "run.json").read_text()
    for old, new, file in given + [(*change, "last.pt") for change in changes]:
        (own_run / "run.json").write_text(text.replace(old, new))
        message, out, _ = terminal("--weights", own_run / file, "cat.png")
        assert str(own_run / file) in message and "\n" not in message and not out
