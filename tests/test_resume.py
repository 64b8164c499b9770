"""Training that stops and resumes ends as training that never stopped, bit for bit."""

import functools
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import end_state
from torch import nn

import utils
from models import Model

EPOCHS = 3


class Notebook:
    """What a notebook holds in memory: the cells up to that of the model are run; `train` is the training cell."""

    def __init__(self, root, workers=0):
        """Per epoch two batches to train on and two to test on."""
        options = {"batch_size": 8, "num_workers": workers}
        _, self.train_loader = utils.get_CIFARdataset_with_loader("train", options, dataset="digits")
        _, self.test_loader = utils.get_CIFARdataset_with_loader("test", options | {"num_workers": 0}, dataset="digits")
        for data in (self.train_loader.dataset, self.test_loader.dataset):
            data.images, data.labels = data.images[:16], data.labels[:16]
        self.run = utils.Run("s9", data="digits", root=root)
        utils.seed_everything(4)
        self.model = Model(dropout_value=0.05)

    def train(self, epochs=EPOCHS, lr=0.05, stop=()):
        """Run the training cell, up to an epoch, or to a batch where the stop button is pressed: (loop, its number)."""
        optimizer = utils.get_optimizer(self.model, "SGD", lr=lr, momentum=0.9)
        scheduler = utils.get_scheduler(optimizer, step_size=2, gamma=0.5, steps_per_epoch=2)
        losses = {loop: pressed_at(stop[1]) if loop in stop else utils.get_loss() for loop in ("train", "test")}
        settings = {"epochs": epochs, "seed": 4, "lr": lr}
        lists = self.run.resume(settings, self.model, optimizer, scheduler)
        for _ in range(len(lists[0]), epochs):
            utils.train(self.model, "cpu", self.train_loader, optimizer, losses["train"], *lists[:2], scheduler)
            utils.test(self.model, "cpu", self.test_loader, losses["test"], *lists[2:])
            self.run.save(*lists)


def pressed_at(batch):
    """A loss with the stop button in it."""
    return Mock(wraps=utils.get_loss(), reduction="mean", side_effect=[DEFAULT] * (batch - 1) + [KeyboardInterrupt])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder of a run that never stopped, made once for each set of arguments."""

    @functools.cache
    def train(lr=0.05, workers=0):
        root = tmp_path_factory.mktemp("uninterrupted")
        Notebook(root, workers).train(lr=lr)
        return root / "s9"

    return train


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(workers, uninterrupted, tmp_path, capsys):
    """At the same number of workers."""
    for done, said in enumerate(("a new run", "resumed after epoch 1 of 2", "resumed after epoch 2 of 3")):
        capsys.readouterr()
        Notebook(tmp_path, workers).train(epochs=done + 1)
        assert f"{tmp_path / 's9'}: {said}\n" in capsys.readouterr().out
    Notebook(tmp_path, workers).train()  # only says that all is done
    history = utils.load_weights(tmp_path / "s9" / "checkpoint.pt")["history"]
    assert [row["lr"] for row in history] == [0.05, 0.05, 0.025]  # what each epoch was trained with
    assert end_state(tmp_path / "s9") == end_state(uninterrupted(workers=workers))


@pytest.mark.parametrize("loop", ["train", "test"])
def test_stopped_in_the_middle_of_epoch_2_the_same_cell_resumes(loop, uninterrupted, tmp_path):
    notebook = Notebook(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        notebook.train(stop=(loop, 4))  # each loop has two batches per epoch
    notebook.train()  # weights and generators are no longer those of the end of epoch 1
    assert end_state(tmp_path / "s9") == end_state(uninterrupted())


@pytest.mark.parametrize("again", ["the training cell", "all cells"])
def test_stopped_in_epoch_1_it_starts_again_from_the_first_weights(again, uninterrupted, tmp_path):
    notebook = Notebook(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        notebook.train(stop=("train", 2))
    if again == "all cells":
        notebook = Notebook(tmp_path)
    notebook.train()
    assert end_state(tmp_path / "s9") == end_state(uninterrupted())


def test_stopped_in_epoch_1_the_settings_may_change(uninterrupted, tmp_path):
    notebook = Notebook(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        notebook.train(stop=("test", 1))
    notebook.train(lr=0.04)  # from the model's first weights
    assert end_state(tmp_path / "s9") == end_state(uninterrupted(lr=0.04))


def test_a_new_model_keeps_its_weights_as_long_as_no_epoch_is_done(tmp_path):
    """Such as pretrained ones, under the settings of a run that was stopped in epoch 1."""
    notebook = Notebook(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        notebook.train(stop=("train", 1))
    model = Model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    notebook.run.resume({"epochs": 3, "seed": 4, "lr": 0.05}, model, utils.get_optimizer(model))
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())


def test_a_run_resumes_in_another_wrapper(tmp_path):
    """Its files are those of the plain network."""
    compiled = functools.partial(torch.compile, backend="eager")
    wrappers = compiled, nn.DataParallel, lambda plain: plain, lambda plain: compiled(nn.DataParallel(plain))
    for epoch, wrap in enumerate(wrappers):
        inner = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
        model = wrap(inner)
        run = utils.Run("wrapped", root=tmp_path)
        lists = run.resume({}, model, utils.get_optimizer(model, "AdamW"))
        assert epoch == 0 or inner[0].bias.tolist() == [epoch - 1] * 2
        nn.init.constant_(inner[0].bias, epoch)
        run.save(*([*values, 1.0] for values in lists))
        weights = utils.load_weights(run / "last.pt")
        assert weights.keys() == inner.state_dict().keys() and weights["0.bias"].tolist() == [epoch] * 2
