"""Training that stops and goes on ends as training that never stopped, bit for bit."""

import csv
import dataclasses
import functools
import random

import numpy as np
import pytest
import torch
from conftest import end_state
from torch import nn

import utils
from models import Model

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 3


@pytest.fixture(autouse=True)
def two_small_batches(monkeypatch, digits):
    """Per epoch two batches to train on and two to test on, in float32."""
    few = {
        split: dataclasses.replace(whole, images=whole.images[:16], labels=whole.labels[:16])
        for split, whole in digits.items()
    }
    monkeypatch.setattr(utils, "load_images", lambda dataset, split, root: few[split])
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: torch.float32)


class Notebook:
    """What a notebook holds in memory: the cells up to that of the model are run; `train` is the training cell."""

    def __init__(self, root, workers=0, seed=4, name="s9"):
        loaders = [
            utils.get_CIFARdataset_with_loader(split, {"batch_size": 8, "num_workers": workers}, dataset="digits")[1]
            for split in ("train", "test")
        ]
        self.train_loader, self.test_loader = loaders
        self.run = utils.Run(name, data="digits", root=root)
        utils.seed_everything(seed)
        self.seed, self.model = seed, Model(dropout_value=0.05)

    def train(self, epochs=EPOCHS, lr=0.05, stop=()):
        """Run the training cell, up to an epoch, or to a batch where the stop button is pressed: (loop, its number).

        Returns a few random numbers of every epoch, which stand for whatever else a driver may draw.
        """
        optimizer = utils.get_optimizer(self.model, "SGD", lr=lr, momentum=0.9)
        scheduler = utils.get_scheduler(optimizer, step_size=2, gamma=0.5, steps_per_epoch=2)
        criterions = {loop: pressed_at(stop[1]) if loop in stop else utils.get_loss() for loop in ("train", "test")}
        settings, drawn = {"epochs": epochs, "seed": self.seed, "lr": lr}, []
        lists = self.run.resume(settings, self.model, optimizer, scheduler)
        for _ in range(len(lists[0]), epochs):
            drawn.append((random.random(), random.gauss(0, 1), np.random.random(), np.random.normal()))
            utils.train(
                self.model, "cpu", self.train_loader, optimizer, criterions["train"], *lists[:2], scheduler=scheduler
            )
            utils.test(self.model, "cpu", self.test_loader, criterions["test"], *lists[2:])
            self.run.save(*lists)
        return drawn


def pressed_at(batch):
    """A loss with the stop button in it."""
    calls = iter(range(1, batch + 1))

    def loss(scores, labels):
        if next(calls) == batch:
            raise KeyboardInterrupt
        return utils.get_loss()(scores, labels)

    return loss


def history(folder):
    """history.csv as text in rows, without the one column that may differ."""
    with open(folder / "history.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder, drawn) of a run that never stopped, made once for each set of arguments."""

    @functools.cache
    def train(dtype, workers, seed, lr):
        root = tmp_path_factory.mktemp("uninterrupted")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "autocast_dtype", lambda device: dtype)
            return root / "s9", Notebook(root, workers, seed).train(lr=lr)

    return lambda dtype=torch.float32, workers=0, seed=4, lr=0.05: train(dtype, workers, seed, lr)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(dtype, workers, uninterrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: dtype)
    folder, drawn = uninterrupted(dtype, workers=workers)
    capsys.readouterr()
    notebook = Notebook(tmp_path, workers)
    if notebook.train_loader.num_workers < workers:
        pytest.skip("more workers than cores are not started")

    drawn_in_parts = notebook.train(epochs=1)
    assert f"{tmp_path / 's9'}: a new run\n" in capsys.readouterr().out
    for done in (1, 2):
        drawn_in_parts += Notebook(tmp_path, workers).train(epochs=done + 1)
        assert f"{tmp_path / 's9'}: going on after epoch {done} of {done + 1}" in capsys.readouterr().out
    Notebook(tmp_path, workers).train()  # only says that all is done

    assert [row["lr"] for row in history(folder)] == ["0.05", "0.05", "0.025"]  # what each epoch was trained with
    assert history(tmp_path / "s9") == history(folder)
    assert end_state(tmp_path / "s9") == end_state(folder)
    assert drawn_in_parts == drawn


def test_the_history_tells_precisions_and_seeds_apart_and_not_numbers_of_workers(uninterrupted):
    plain = history(uninterrupted()[0])
    assert history(uninterrupted(workers=2)[0]) == plain
    for other in ({"dtype": torch.bfloat16}, {"seed": 5}, {"lr": 0.04}):
        for one, another in zip(plain, history(uninterrupted(**other)[0])):
            assert one["train_loss"] != another["train_loss"] and one["test_loss"] != another["test_loss"], other


# Per epoch two training batches and two test batches: each of these is in the middle of the second epoch.
@pytest.mark.parametrize(("stop", "workers"), [(("train", 4), 0), (("train", 4), 2), (("test", 4), 0)])
def test_stopped_in_the_middle_of_an_epoch_the_same_cell_goes_on(stop, workers, uninterrupted, tmp_path):
    folder, _ = uninterrupted()
    notebook = Notebook(tmp_path, workers)
    with pytest.raises(KeyboardInterrupt):
        notebook.train(stop=stop)
    assert history(tmp_path / "s9") == history(folder)[:1]
    notebook.train()  # weights and generators are no longer those of the end of epoch 1
    assert end_state(tmp_path / "s9") == end_state(folder)


@pytest.mark.parametrize("again", ["the training cell", "the cell of the run too", "all cells"])
def test_stopped_in_epoch_1_it_starts_again_from_the_first_weights(again, uninterrupted, tmp_path, capsys):
    notebook = Notebook(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        notebook.train(stop=("train", 2))
    if again == "the cell of the run too":
        notebook.run = utils.Run("s9", data="digits", root=tmp_path)
    elif again == "all cells":
        notebook = Notebook(tmp_path)
    notebook.train()
    assert ("a new run" if again == "all cells" else "starting again, with epoch 1") in capsys.readouterr().out
    assert end_state(tmp_path / "s9") == end_state(uninterrupted()[0])


@pytest.mark.parametrize("change", [{"lr": 0.04}, {"seed": 5}])
def test_stopped_in_epoch_1_the_settings_may_change(change, uninterrupted, tmp_path):
    """The model keeps its first weights when only the training cell is run again; another seed makes a new one."""
    notebook = Notebook(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        notebook.train(stop=("test", 1))
    if "seed" in change:
        Notebook(tmp_path, **change).train()
    else:
        notebook.train(**change)
    assert end_state(tmp_path / "s9") == end_state(uninterrupted(**change)[0])


def test_between_two_names_each_run_starts_again_from_its_own_first_weights(uninterrupted, tmp_path, capsys):
    notebook = Notebook(tmp_path)
    first = notebook.run
    for run in (first, utils.Run("other", root=tmp_path)):
        notebook.run = run
        with pytest.raises(KeyboardInterrupt):
            notebook.train(stop=("train", 2))
    assert "other: a new run from the weights that an earlier run left in this model" in capsys.readouterr().out
    notebook.run = first
    notebook.train()
    assert end_state(tmp_path / "s9") == end_state(uninterrupted()[0])


def test_a_new_model_keeps_its_weights_as_long_as_no_epoch_is_done(tmp_path):
    """Such as pretrained ones, under the settings of a run that was stopped in epoch 1."""
    notebook = Notebook(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        notebook.train(stop=("train", 1))
    model = Model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    notebook.run.resume({"epochs": 3, "seed": 4, "lr": 0.05}, model, utils.get_optimizer(model))
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())


WRAPPERS = {
    "plain": lambda model: model,
    "parallel": nn.DataParallel,
    "compiled": functools.partial(torch.compile, backend="eager"),
    "compiled, parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "parallel, compiled": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrapper", list(WRAPPERS)[1:])
def test_a_run_is_of_the_network_inside_its_wrapper(wrapper, tmp_path):
    """It goes on with another wrapper or none, and its files are those of the plain network."""
    numbers = []
    for name in (wrapper, "plain", wrapper):
        inner = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
        model = WRAPPERS[name](inner)
        run = utils.Run("wrapped", root=tmp_path)
        lists = run.resume({}, model, torch.optim.SGD(model.parameters(), lr=0.1))
        if numbers:
            assert inner[0].bias.tolist() == [numbers[-1]] * 2
        numbers.append(len(numbers) + 0.5)
        nn.init.constant_(inner[0].bias, numbers[-1])
        for values in lists:
            values.append(1.0)
        run.save(*lists)
        weights = utils.load_weights(run / "last.pt")
        assert weights.keys() == nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).state_dict().keys()
        assert weights["0.bias"].tolist() == [numbers[-1]] * 2


SCHEDULERS = {
    "ExponentialLR": {"gamma": 0.5},
    "CosineAnnealingLR": {"T_max": 4},
    "OneCycleLR": {"max_lr": 0.5, "total_steps": 10},
    "MultiStepLR": {"milestones": [1, 3], "gamma": 0.5},
    "LinearLR": {},
    "ReduceLROnPlateau": {"patience": 0},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on(name, tmp_path):
    def start():
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        return model, optimizer, getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])

    def step(optimizer, scheduler):
        optimizer.step()
        scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
        return optimizer.param_groups[0]["lr"]

    rates = []
    for _ in range(4):  # every epoch in another process, as it were
        model, optimizer, scheduler = start()
        run = utils.Run("run", root=tmp_path)
        lists = run.resume({}, model, optimizer, scheduler)
        rates.append(step(optimizer, scheduler))
        for values in lists:
            values.append(1.0)
        run.save(*lists)
    _, optimizer, scheduler = start()
    assert rates == [step(optimizer, scheduler) for _ in range(4)]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_an_optimizer_goes_on_in_its_own_way_of_computing(name, tmp_path):
    """A checkpoint of a GPU, whose optimizer was fused, on a device where it is not, and back."""
    batch = torch.randn(8, 3, 8, 8), torch.arange(8)
    for epoch, fused in enumerate([True, False, True]):
        model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), nn.LogSoftmax(1))
        optimizer = utils.get_optimizer(model, name, fused=fused)
        run = utils.Run("run", root=tmp_path)
        lists = run.resume({"epochs": 3}, model, optimizer)
        assert [group["fused"] for group in optimizer.param_groups] == [fused] and len(lists[0]) == epoch
        utils.train(model, "cpu", [batch], optimizer, utils.get_loss(), *lists[:2])
        utils.test(model, "cpu", [batch], utils.get_loss(), *lists[2:])
        run.save(*lists)
