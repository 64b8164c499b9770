"""What every function does with what it should not get: one short error of ours, and nothing changed.

Files, folders, checkpoints and full disks are in `test_bad_files.py`; both tables go through `check`.
"""

import math
import random
import traceback
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn, randn, zeros

import augment
import layers
import models
import runs
import utils
from image_sets import ImageSet, to_rgb
from models import Model, receptive_field

PROJECT = Path(models.__file__).resolve().parent


def snapshot(folder):
    """Every file and folder below, with its bytes; lock files may come and go."""
    files = sorted(path for path in Path(folder).rglob("*") if not path.name.endswith(".lock"))
    return {str(path): path.read_bytes() if path.is_file() else "folder" for path in files}


def check(call, error, words, folder):
    """The call raises one short error of ours, with all of the words, and no file below folder changes."""
    before = snapshot(folder)
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert len(message) < 700 and message.isprintable(), message
    raised_in = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    assert raised_in.resolve().parent == PROJECT, f"raised in {raised_in}: {message}"
    assert snapshot(folder) == before


# ---- a small world ---------------------------------------------------------------------------------------------------


class Loader(list):
    """The least that a loader is: batches, and a data set."""

    dataset = ()


class Scores(nn.Module):
    """Log-probabilities of ten classes for images (N, 3, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 10)

    def forward(self, x):
        return F.log_softmax(self.layer(x.flatten(1)).float(), dim=1)


class Step(nn.Sequential):
    """A convolution, then whatever is given, then another convolution."""

    def __init__(self, step):
        super().__init__(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
        self.step = step

    def forward(self, x):
        return self[1](self.step(self[0](x)))


class AsDict(Step):
    def forward(self, x):
        return {"scores": self[0](x)}


def spoiled(model, value=math.nan):
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = value
    return model


def once(position, value):
    """Four images, one number of which is spoiled."""
    images = randn(4, 3, 8, 8)
    images[position, 0, 0, 0] = value
    return images


LABELS = torch.tensor([3, 1, 4, 1])


def train(images=None, labels=LABELS, model=None, device="cpu", criterion=None, batches=None, losses=None, acc=None):
    model = model or Scores()
    losses, acc = [] if losses is None else losses, [] if acc is None else acc
    batches = [(randn(4, 3, 8, 8) if images is None else images, labels)] if batches is None else batches
    criterion = criterion or nn.NLLLoss()
    utils.train(model, device, Loader(batches), utils.get_optimizer(model), criterion, losses, acc)


def evaluate(images=None, labels=LABELS, model=None, batches=None):
    batches = [(randn(4, 3, 8, 8) if images is None else images, labels)] if batches is None else batches
    utils.test(model or Scores(), "cpu", Loader(batches), nn.NLLLoss(), [], [])


def train_with(optimizer="SGD", scheduler=None, optimized=None):
    model = Scores()
    optimizer = utils.get_optimizer(optimized or model, optimizer)
    scheduler = scheduler and utils.get_scheduler(optimizer, name=scheduler)
    utils.train(model, "cpu", Loader([(randn(4, 3, 8, 8), LABELS)]), optimizer, nn.NLLLoss(), [], [], scheduler)


class Pair(Scores):
    def forward(self, x):
        return super().forward(x), x


def tiny_images(dataset, split, root):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    return ImageSet(pixels, np.arange(8) % 2, ("ant", "bee"), "tiny", "made here")


def loader(kwargs=None, transforms=None):
    """Over eight images, instead of a data set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load_images", tiny_images)
        return utils.get_CIFARdataset_with_loader("test", kwargs, transforms=transforms)[1]


def sgd(**options):
    return utils.get_optimizer(Scores(), **options)


def scheduler(**options):
    return utils.get_scheduler(sgd(), **options)


def classify(images, **options):
    return utils.predict(Model(), images, **options)


count, picture = utils.GetCorrectPredCount, np.zeros((8, 8, 3), np.uint8)
LABEL_MAP = {"ant": 0, "bee": 1}
SAMPLE = utils.Misclassified(zeros(3, 32, 32), 5, 7)

# ---- name: (type of the error, words that it must have, call) --------------------------------------------------------

CASES = {
    # models.Model
    "model: one image, no batch": (ValueError, ["(3, 32, 32)", "(N, 3, H, W)"], lambda: Model()(zeros(3, 32, 32))),
    "model: grey images": (ValueError, ["(2, 1, 32, 32)", "RGB"], lambda: Model()(zeros(2, 1, 32, 32))),
    "model: channels last": (ValueError, ["(2, 32, 32, 3)", "(N, 3, H, W)"], lambda: Model()(zeros(2, 32, 32, 3))),
    "model: raw bytes": (
        ValueError,
        ["torch.uint8", "torch.float32"],
        lambda: Model()(zeros(2, 3, 32, 32, dtype=torch.uint8)),
    ),
    "model: images too small": (ValueError, ["(2, 3, 32, 6)", "at least 7"], lambda: Model()(zeros(2, 3, 32, 6))),
    "model: a NumPy array": (
        (TypeError, ValueError),
        ["ndarray", "(N, 3, H, W)"],
        lambda: Model()(np.zeros((2, 3, 32, 32), np.float32)),
    ),
    "model: double images for float weights": (
        (TypeError, ValueError),
        ["float64", "float32"],
        lambda: Model()(zeros(2, 3, 32, 32, dtype=torch.float64)),
    ),
    "model: images on another device": (ValueError, ["meta", "cpu"], lambda: Model()(zeros(2, 3, 32, 32).to("meta"))),
    "model: dropout above 1": (ValueError, ["dropout", "1.5", "0", "1"], lambda: Model(dropout_value=1.5)),
    "model: dropout as text": ((TypeError, ValueError), ["dropout", "'0.05'"], lambda: Model(dropout_value="0.05")),
    # layers
    "layers: dropout NaN": (ValueError, ["dropout", "nan", "0", "1"], lambda: layers.Dropout(math.nan)),
    # models.receptive_field
    "field: a shortcut": (
        ValueError,
        ["branches", "one branch"],
        lambda: receptive_field(Step(lambda x: x + x.sigmoid())),
    ),
    "field: a function pools": (
        ValueError,
        ["'1'", "from 32 to 16", "nn.MaxPool2d"],
        lambda: receptive_field(Step(lambda x: F.max_pool2d(x, 2))),
    ),
    "field: a function pools and keeps the size": (
        ValueError,
        ["outside any module"],
        lambda: receptive_field(Step(lambda x: F.max_pool2d(x, 3, stride=1, padding=1))),
    ),
    "field: a module of another kind": (
        ValueError,
        ["'1'", "Upsample", "Conv2d"],
        lambda: receptive_field(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Upsample(scale_factor=2))),
    ),
    "field: kernel not square": (
        ValueError,
        ["'0'", "(3, 1)", "square"],
        lambda: receptive_field(nn.Sequential(nn.Conv2d(3, 3, (3, 1), padding=(1, 0)))),
    ),
    "field: stride not square": (ValueError, ["square"], lambda: receptive_field(nn.Conv2d(3, 3, 3, stride=(1, 2)))),
    "field: no convolution": (ValueError, ["Linear", "no Conv2d"], lambda: receptive_field(nn.Linear(3, 3))),
    "field: the class, not a model": (
        (TypeError, ValueError),
        ["Model", "nn.Module"],
        lambda: receptive_field(Model),
    ),
    "field: the model returns a dict": (
        ValueError,
        ["receptive_field", "dict"],
        lambda: receptive_field(AsDict(nn.Identity())),
    ),
    "field: input size 0": (ValueError, ["input_size is 0", "at least 1"], lambda: receptive_field(Model(), 0)),
    "field: input size of a half": (ValueError, ["32.5", "pixels"], lambda: receptive_field(Model(), 32.5)),
    "field: input size as a pair": (ValueError, ["(32, 32)", "side"], lambda: receptive_field(Model(), (32, 32))),
    "field: input size True": (ValueError, ["True", "side"], lambda: receptive_field(Model(), True)),
    "field: input too small for the chain": (
        ValueError,
        ["4x4", "cannot run"],
        lambda: receptive_field(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), 4),
    ),
    # augment
    "augment: one image for a batch": (
        ValueError,
        ["(32, 32, 3)", "(N, H, W, 3)"],
        lambda: augment.augment_batch(
            utils.get_train_transforms(), np.zeros((32, 32, 3), np.uint8), np.random.default_rng(0)
        ),
    ),
    # utils.get_CIFARdataset_with_loader; image_sets.to_rgb
    "loader: unknown split": (
        ValueError,
        ["'valid'", "'train'", "'test'"],
        lambda: utils.get_CIFARdataset_with_loader("valid", dataset="digits"),
    ),
    "loader: unknown data set": (
        ValueError,
        ["'mnist'", "'cifar10'", "'digits'"],
        lambda: utils.get_CIFARdataset_with_loader("train", dataset="mnist"),
    ),
    "loader: root is a number": (
        TypeError,
        ["root", "3"],
        lambda: utils.get_CIFARdataset_with_loader("train", root=3),
    ),
    "loader: kwargs is the batch size": (TypeError, ["kwargs", "64", "batch_size"], lambda: loader(64)),
    "loader: unknown keyword": (TypeError, ["batchsize"], lambda: loader({"batchsize": 64})),
    "loader: batch size 0": (ValueError, ["batch_size", "0", "positive"], lambda: loader({"batch_size": 0})),
    "loader: batch size as text": (
        (TypeError, ValueError),
        ["batch_size", "'64'", "positive"],
        lambda: loader({"batch_size": "64"}),
    ),
    "loader: workers as text": ((TypeError, ValueError), ["num_workers", "'2'"], lambda: loader({"num_workers": "2"})),
    "loader: sampler and shuffle": (
        ValueError,
        ["sampler", "shuffle"],
        lambda: loader({"sampler": [1, 2], "shuffle": True}),
    ),
    "loader: batch sampler and shuffle": (
        ValueError,
        ["batch_sampler", "shuffle"],
        lambda: loader({"batch_sampler": [[1], [2]], "shuffle": True}),
    ),
    "loader: sampler beyond the images": (IndexError, ["500", "8"], lambda: next(iter(loader({"sampler": [500]})))),
    "loader: transforms not called": (
        TypeError,
        ["function", "Compose"],
        lambda: loader(transforms=utils.get_train_transforms),
    ),
    "loader: transforms as a list": (TypeError, ["list", "Compose"], lambda: loader(transforms=[A.HorizontalFlip()])),
    "loader: images of different shapes": (
        ValueError,
        ["RandomScale", "different shapes", "A.Resize(32, 32)"],
        lambda: next(iter(loader({"batch_size": 8}, A.Compose([A.RandomScale(p=1), *utils.get_test_transforms()])))),
    ),
    "to_rgb: floats to 255": (
        ValueError,
        ["255", "0 to 1"],
        lambda: to_rgb(Image.fromarray(zeros(8, 8).numpy() + 255)),
    ),
    "to_rgb: no pixels": (ValueError, ["no pixels", "0x8"], lambda: to_rgb(Image.new("RGB", (0, 8)))),
    "to_rgb: an array": ((TypeError, ValueError), ["ndarray", "PIL"], lambda: to_rgb(picture)),
    # utils.get_optimizer, get_scheduler, get_loss
    "optimizer: unknown name": (ValueError, ["'adam'", "Adam", "SGD"], lambda: sgd(name="adam")),
    "optimizer: the class for the name": (
        ValueError,
        ["SGD'>", "there is", "SGD, "],
        lambda: sgd(name=utils.optim.SGD),
    ),
    "optimizer: rate as text": ((TypeError, ValueError), ["lr", "'0.2'"], lambda: sgd(lr="0.2")),
    "optimizer: unknown option": (TypeError, ["nesterof"], lambda: sgd(nesterof=True)),
    "optimizer: a class, not a model": (TypeError, ["Model", "nn.Module"], lambda: utils.get_optimizer(Model)),
    "scheduler: a run without epochs": (ValueError, ["epochs is 0", "at least 1"], lambda: scheduler(epochs=0)),
    "scheduler: no batches in an epoch": (ValueError, ["steps_per_epoch", "0"], lambda: scheduler(steps_per_epoch=0)),
    "optimizer: decay of something else": (
        ValueError,
        ["'bias'", "'weights'"],
        lambda: utils.get_optimizer(Model(), decay="bias"),
    ),
    "optimizer: one that wants a closure": ((TypeError, ValueError), ["LBFGS"], lambda: train_with("LBFGS")),
    "scheduler: unknown name": (ValueError, ["'Step'", "StepLR"], lambda: scheduler(name="Step")),
    "scheduler: step of 0 epochs": (ValueError, ["step_size", "0", "at least 1"], lambda: scheduler(step_size=0)),
    "scheduler: step of minus 5": (ValueError, ["step_size", "-5", "at least 1"], lambda: scheduler(step_size=-5)),
    "scheduler: negative factor": (ValueError, ["gamma", "-0.1"], lambda: scheduler(gamma=-0.1)),
    "scheduler: an option is missing": (TypeError, ["T_max"], lambda: scheduler(name="CosineAnnealingLR")),
    "loss: unknown name": (ValueError, ["'mse'", "nll_loss", "cross_entropy"], lambda: utils.get_loss("mse")),
    "loss: a sum": (ValueError, ["reduction", "'sum'", "mean"], lambda: utils.get_loss(reduction="sum")),
    # utils.GetCorrectPredCount
    "count: lengths differ": (ValueError, ["(3,)", "(4,)", "(N, classes)"], lambda: count(zeros(3), zeros(4))),
    "count: scores of fewer": (ValueError, ["(3, 10)", "(4,)"], lambda: count(zeros(3, 10), zeros(4))),
    "count: one-hot labels": (ValueError, ["(4,)", "(4, 10)"], lambda: count(zeros(4), zeros(4, 10))),
    "count: scores of one sample": (ValueError, ["(10,)", "()"], lambda: count(zeros(10), torch.tensor(3))),
    "count: no classes": (ValueError, ["(4, 0)", "(N, classes)"], lambda: count(zeros(4, 0), zeros(4))),
    "count: lists": (TypeError, ["list", "tensor"], lambda: count([1, 2], [1, 2])),
    "count: labels elsewhere": (ValueError, ["cpu", "meta"], lambda: count(zeros(4), zeros(4).to("meta"))),
    # utils.train and test
    "train: empty loader": (ValueError, ["epoch 1", "empty"], lambda: train(batches=[])),
    "test: empty loader": (ValueError, ["test", "empty"], lambda: evaluate(batches=[])),
    "train: empty batch": (
        ValueError,
        ["images", "(0, 3, 8, 8)"],
        lambda: train(zeros(0, 3, 8, 8), zeros(0, dtype=torch.long)),
    ),
    "train: batches of images alone": (
        (TypeError, ValueError),
        ["loader", "(images, labels)"],
        lambda: train(batches=[randn(4, 3, 8, 8)]),
    ),
    "train: images without a batch": (ValueError, ["(3, 8, 8)", "(N, channels, H, W)"], lambda: train(zeros(3, 8, 8))),
    "train: images as an array": ((TypeError, ValueError), ["ndarray"], lambda: train(np.zeros((4, 3, 8, 8), "f"))),
    "train: NaN in an image": (
        FloatingPointError,
        ["epoch 1, batch 1", "nan", "data"],
        lambda: train(once(2, math.nan)),
    ),
    "train: infinity in an image": (FloatingPointError, ["batch 1", "non-finite"], lambda: train(once(0, math.inf))),
    "test: NaN in an image": (
        FloatingPointError,
        ["test, batch 1", "nan", "data"],
        lambda: evaluate(once(1, math.nan)),
    ),
    "train: NaN in the weights": (FloatingPointError, ["nan", "weights"], lambda: train(model=spoiled(Scores()))),
    "test: NaN in the weights": (FloatingPointError, ["test", "weights"], lambda: evaluate(model=spoiled(Scores()))),
    "train: label too large": (ValueError, ["to 10", "from 0 to 9"], lambda: train(labels=torch.tensor([0, 1, 10, 3]))),
    "test: negative label": (ValueError, ["-1", "from 0 to 9"], lambda: evaluate(labels=torch.tensor([0, -1, 2, 3]))),
    "train: labels as floats": (
        (TypeError, ValueError),
        ["labels", "float32", "int64"],
        lambda: train(labels=zeros(4)),
    ),
    "test: labels of 32 bits": (
        (TypeError, ValueError),
        ["labels", "int32", "int64"],
        lambda: evaluate(labels=LABELS.int()),
    ),
    "train: one-hot labels": (
        ValueError,
        ["labels", "(4, 10)", "(N,)"],
        lambda: train(labels=torch.eye(10, dtype=torch.long)[:4]),
    ),
    "train: fewer labels than images": (ValueError, ["labels", "(3,)", "4"], lambda: train(labels=LABELS[:3])),
    "train: labels as a list": ((TypeError, ValueError), ["labels", "'list'"], lambda: train(labels=[0, 1, 2, 3])),
    "train: model on another device": (
        ValueError,
        ["model is on meta", "cpu", "model.to('cpu')"],
        lambda: train(model=Scores().to("meta")),
    ),
    "train: no such device": ((RuntimeError, ValueError), ["gpu", "cpu", "cuda"], lambda: train(device="gpu")),
    "train: frozen model": (
        (RuntimeError, ValueError),
        ["requires a gradient"],
        lambda: train(model=Scores().requires_grad_(False)),
    ),
    "train: a loss a sample": (
        ValueError,
        ["criterion", "(4,)", "mean"],
        lambda: train(criterion=lambda scores, labels: F.nll_loss(scores, labels, reduction="none")),
    ),
    "train: the sum of the losses": (
        ValueError,
        ["criterion", "'sum'", "'mean'"],
        lambda: train(criterion=nn.NLLLoss(reduction="sum")),
    ),
    "train: the class of a loss": (
        TypeError,
        ["criterion", "NLLLoss", "get_loss"],
        lambda: train(criterion=nn.NLLLoss),
    ),
    "train: a tuple for a list": (TypeError, ["tuple", "lists"], lambda: train(losses=())),
    "train: a function for the model": (
        TypeError,
        ["model", "nn.Module"],
        lambda: utils.train(len, "cpu", [], sgd(), nn.NLLLoss(), [], []),
    ),
    "train: a model that returns a pair": (TypeError, ["tuple", "(N, classes)"], lambda: train(model=Pair())),
    "train: weights of 64 bits": (ValueError, ["float64", "model.float()"], lambda: train(model=Scores().double())),
    "train: the optimizer of another model": (
        ValueError,
        ["optimizer", "this model", "get_optimizer"],
        lambda: train_with(optimized=Scores()),
    ),
    "train: a scheduler that waits for a loss": (
        TypeError,
        ["ReduceLROnPlateau", "scheduler.step"],
        lambda: train_with(scheduler="ReduceLROnPlateau"),
    ),
    "train: the name of a loss": (
        TypeError,
        ["criterion", "nll_loss", "get_loss"],
        lambda: train(criterion="nll_loss"),
    ),
    # utils.predict
    "predict: a number": (TypeError, ["images[0]", "int", "file name"], lambda: classify([3])),
    "predict: a tensor": (TypeError, ["Tensor", "NumPy array"], lambda: classify(zeros(2, 3, 32, 32))),
    "predict: floats to 255": (
        ValueError,
        ["images[1]", "255.0", "0 to 1"],
        lambda: classify([picture, picture + 255.0]),
    ),
    "predict: NaN": (ValueError, ["images is float64", "nan", "0 to 1"], lambda: classify(np.full((8, 8), math.nan))),
    "predict: integers of 64 bits": (ValueError, ["int64", "uint8"], lambda: classify(picture.astype(np.int64))),
    "predict: five channels": (ValueError, ["(8, 8, 5)", "(H, W)"], lambda: classify(np.zeros((8, 8, 5), np.uint8))),
    "predict: an array of no pixels": (ValueError, ["(0, 8, 3)"], lambda: classify(np.zeros((0, 8, 3), np.uint8))),
    "predict: too few names": (ValueError, ["10 outputs", "2 class names"], lambda: classify(picture, classes="ab")),
    "predict: NaN in the weights": (
        (FloatingPointError, ValueError),
        ["not finite", "weights"],
        lambda: utils.predict(spoiled(Model()), picture),
    ),
    # runs.seed_everything
    "seed: negative": (ValueError, ["-1", "from 0 to 4294967295"], lambda: utils.seed_everything(-1)),
    "seed: too large": (ValueError, ["4294967296", "to 4294967295"], lambda: utils.seed_everything(2**32)),
    "seed: a fraction": (ValueError, ["0.5", "whole number"], lambda: utils.seed_everything(0.5)),
    "seed: text": (ValueError, ["'4'", "whole number"], lambda: utils.seed_everything("4")),
    "seed: true": (ValueError, ["True", "whole number"], lambda: utils.seed_everything(True)),
    # utils, plots
    "pixels: a batch": (
        ValueError,
        ["(2, 3, 8, 8)", "(3, H, W)"],
        lambda: utils.get_image_from_tensor(zeros(2, 3, 8, 8)),
    ),
    "pixels: channels last": (
        ValueError,
        ["(8, 8, 3)", "(3, H, W)"],
        lambda: utils.get_image_from_tensor(zeros(8, 8, 3)),
    ),
    "pixels: grey": (ValueError, ["(1, 8, 8)", "(3, H, W)"], lambda: utils.get_image_from_tensor(zeros(1, 8, 8))),
    "pixels: an array": (TypeError, ["ndarray", "tensor"], lambda: utils.get_image_from_tensor(np.zeros((3, 8, 8)))),
    "pixels: not normalised": (
        (TypeError, ValueError),
        ["uint8", "float"],
        lambda: utils.get_image_from_tensor(zeros(3, 8, 8, dtype=torch.uint8)),
    ),
    "pixels: NaN": (ValueError, ["nan"], lambda: utils.get_image_from_tensor(torch.full((3, 8, 8), math.nan))),
    "display: empty loader": (ValueError, ["empty"], lambda: utils.post_display(Loader(), LABEL_MAP)),
    "display: a class without a name": (
        ValueError,
        ["label_map", "1"],
        lambda: utils.post_display(loader({"batch_size": 8}), {"ant": 0}),
    ),
    "display: names in a list": (
        TypeError,
        ["label_map", "dict"],
        lambda: utils.post_display(loader({"batch_size": 8}), ["ant", "bee"]),
    ),
    "augmentations: no such image": (
        IndexError,
        ["800", "8"],
        lambda: utils.post_augmentations(loader(), index=800),
    ),
    "curves: no epoch": (ValueError, ["epoch"], lambda: utils.post_accuracyplots([], [], [], [])),
    "curves: of different lengths": (
        ValueError,
        ["2", "1"],
        lambda: utils.post_accuracyplots([0.3, 0.2], [0.3, 0.2], [80.0, 90.0], [80.0]),
    ),
    "misclassified: a class without a name": (
        ValueError,
        ["label_map"],
        lambda: utils.post_misclassified([SAMPLE], LABEL_MAP, Model()),
    ),
    "confusion: of another loader": (
        ValueError,
        ["loader"],
        lambda: utils.post_confusion_matrix([utils.Misclassified(zeros(3, 8, 8), 0, 1)] * 6, loader(), LABEL_MAP),
    ),
    "field plot: no rows": (ValueError, ["rows", "receptive_field"], lambda: utils.post_receptive_field(Model(), [])),
    "field plot: rows of another model": (
        ValueError,
        ["rows", "receptive_field"],
        lambda: utils.post_receptive_field(Model(), receptive_field(nn.Sequential(nn.Conv2d(3, 3, 3)))),
    ),
    "field plot: grey images": (
        ValueError,
        ["(2, 1, 32, 32)"],
        lambda: utils.post_receptive_field(Model(), receptive_field(Model()), zeros(2, 1, 32, 32)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_answered_with_one_error(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error, words, call = CASES[case]
    check(call, error, words, tmp_path)


@pytest.mark.parametrize("call", [train, evaluate])
def test_refused_epoch_leaves_model_and_lists(call):
    """What can be seen before the first step is refused before it."""
    torch.manual_seed(0)
    model = Scores()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        call(labels=torch.tensor([0, 1, 10, 3]), model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_of_nan_do_not_cost_the_weights():
    """A test changes no weights, so its error must not send anybody back to a checkpoint."""
    with pytest.raises(FloatingPointError) as caught:
        evaluate(once(1, math.nan))
    assert "checkpoint" not in str(caught.value)


def test_a_plain_list_of_batches_will_do():
    losses, accuracies, model = [], [], Scores()
    batches = [(randn(4, 3, 8, 8), LABELS)]
    utils.train(model, "cpu", batches, utils.get_optimizer(model), nn.NLLLoss(), losses, accuracies)
    utils.test(model, "cpu", batches, nn.NLLLoss(), losses, accuracies)
    assert len(losses) == len(accuracies) == 2


def test_seed_that_is_refused_changes_no_generator():
    state = random.getstate(), torch.get_rng_state()
    for seed in (-1, 2**32, "4"):
        with pytest.raises(ValueError):
            runs.seed_everything(seed)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
