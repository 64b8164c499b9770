"""Training that stops and goes on must end as training that never stopped."""

import csv
import dataclasses
import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
import utils
from models import Model

REPOSITORY = Path(runs.__file__).parent
EPOCHS = 3
HYPERPARAMETERS = {"epochs": EPOCHS, "seed": 4, "batch_size": 32, "lr": 0.05, "step_size": 2, "dropout": 0.05}
PRECISIONS = [(dtype, workers) for dtype in (torch.float32, torch.bfloat16) for workers in (0, 2)]
READABLE = ("history.csv", "run.json", "last.pt", "best.pt")
all_images = functools.cache(utils.load_images)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Four training batches of 32 and two test batches, so that an epoch takes half a second."""

    def load_images(dataset, split, root=None):
        whole, n = all_images(dataset, split, root), {"train": 128, "test": 64}[split]
        return dataclasses.replace(whole, images=whole.images[:n], labels=whole.labels[:n])

    monkeypatch.setattr(utils, "load_images", load_images)


def compute_in(dtype, monkeypatch):
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: dtype)


class Notebook:
    """What the driver notebook holds in memory: its cells up to the model, and the training cell as a method."""

    def __init__(self, root, workers=0, seed=4, name="s9"):
        kwargs = {"batch_size": 32, "num_workers": workers}
        _, self.train_loader = utils.get_CIFARdataset_with_loader("train", kwargs, dataset="digits")
        _, self.test_loader = utils.get_CIFARdataset_with_loader("test", kwargs, dataset="digits")
        self.run = utils.Run(name, data="digits", root=root)
        self.hyperparameters = HYPERPARAMETERS | {"seed": seed}
        utils.seed_everything(seed)
        self.model = Model(dropout_value=0.05)

    def train(self, until=EPOCHS, epochs=EPOCHS, in_train=None, in_test=None):
        """Run the training cell; it ends after epoch `until`, as if the power had gone.

        in_train and in_test are called with every loss of their loop. Returns a few random numbers of every epoch,
        which stand for whatever else a driver may draw.
        """
        optimizer = utils.get_optimizer(self.model, "SGD", lr=0.05, momentum=0.9)
        scheduler = utils.get_scheduler(optimizer, step_size=2, gamma=0.5)
        nll = utils.get_loss("nll_loss")
        device, drawn = torch.device("cpu"), []
        lists = self.run.resume(self.hyperparameters | {"epochs": epochs}, self.model, optimizer, scheduler)
        train_losses, train_acc, test_losses, test_acc = lists
        for _ in range(len(train_losses), until):
            drawn.append((random.random(), random.gauss(0, 1), np.random.random(), np.random.normal()))
            utils.train(
                self.model, device, self.train_loader, optimizer, watched(nll, in_train), train_losses, train_acc
            )
            utils.test(self.model, device, self.test_loader, watched(nll, in_test), test_losses, test_acc)
            scheduler.step()
            self.run.save(train_losses, train_acc, test_losses, test_acc)
        return drawn


def watched(criterion, callback):
    def loss(*arguments):
        if callback is not None:
            callback()
        return criterion(*arguments)

    return loss


def history(folder):
    """history.csv as text in rows, without the one column that may differ."""
    with open(folder / "history.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def end_state(folder):
    """Everything that the checkpoint and the weights files hold, but the seconds."""
    checkpoint = runs.load_weights(folder / "checkpoint.pt")
    for row in checkpoint["history"]:
        del row["seconds"]
    return checkpoint, runs.load_weights(folder / "last.pt"), runs.load_weights(folder / "best.pt")


def assert_identical(one, other, place="state"):
    """Equal bit for bit, through dicts, sequences and tensors."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_identical(one[key], other[key], f"{place}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for index, (a, b) in enumerate(zip(one, other)):
            assert_identical(a, b, f"{place}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, place
        assert one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8)), place
    else:
        assert one == other, place


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder, drawn) of a run that never stopped, made once for each (dtype, workers)."""

    @functools.cache
    def train(dtype, workers):
        root = tmp_path_factory.mktemp("uninterrupted")
        notebook = Notebook(root, workers)
        return root / "s9", notebook.train()

    return train


def files(folder):
    """{name: bytes} of what the run keeps; the lock is no part of it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# ---- going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "workers"), PRECISIONS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    dtype, workers, uninterrupted, tmp_path, monkeypatch, capsys
):
    if len(os.sched_getaffinity(0)) < workers:
        pytest.skip("more workers than cores are not started")
    compute_in(dtype, monkeypatch)
    folder, drawn = uninterrupted(dtype, workers)
    capsys.readouterr()

    first = Notebook(tmp_path, workers)
    assert first.train_loader.num_workers == workers
    drawn_in_parts = first.train(until=1)
    assert f"{tmp_path / 's9'}: a new run" in capsys.readouterr().out
    drawn_in_parts += Notebook(tmp_path, workers).train(until=2)
    assert f"going on after epoch 1 of {EPOCHS}" in capsys.readouterr().out
    drawn_in_parts += Notebook(tmp_path, workers).train()
    assert f"going on after epoch 2 of {EPOCHS}" in capsys.readouterr().out

    assert [row["lr"] for row in history(folder)] == ["0.05", "0.05", "0.025"]  # what each epoch was trained with
    assert history(tmp_path / "s9") == history(folder)
    assert_identical(end_state(tmp_path / "s9"), end_state(folder))
    assert drawn_in_parts == drawn


def test_precision_changes_the_history_and_the_number_of_workers_does_not(uninterrupted, monkeypatch):
    histories = {}
    for dtype, workers in PRECISIONS:
        compute_in(dtype, monkeypatch)
        histories[dtype, workers] = history(uninterrupted(dtype, workers)[0])
    assert histories[torch.float32, 0] != histories[torch.bfloat16, 0]
    assert histories[torch.float32, 0] == histories[torch.float32, 2]
    assert histories[torch.bfloat16, 0] == histories[torch.bfloat16, 2]


def test_more_epochs_go_on_from_the_end(uninterrupted, tmp_path, monkeypatch, capsys):
    compute_in(torch.float32, monkeypatch)
    folder, _ = uninterrupted(torch.float32, 0)
    Notebook(tmp_path).train(until=1, epochs=1)
    Notebook(tmp_path).train(until=2, epochs=2)
    assert "going on after epoch 1 of 2" in capsys.readouterr().out
    assert history(tmp_path / "s9") == history(folder)[:2]


# ---- the stop button --------------------------------------------------------------------------------------------


def pressed_at(call):
    """Raises KeyboardInterrupt when it is called for the call-th time."""
    calls = iter(range(1, call + 1))

    def callback(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt

    return callback


# Four training batches and two test batches an epoch: each of these is in the middle of the second epoch.
@pytest.mark.parametrize(
    ("loop", "call", "workers"), [("in_train", 7, 0), ("in_train", 7, 2), ("in_test", 4, 0), ("in_test", 3, 2)]
)
def test_stop_in_the_middle_of_an_epoch(loop, call, workers, uninterrupted, tmp_path, monkeypatch, capsys):
    if len(os.sched_getaffinity(0)) < workers:
        pytest.skip("more workers than cores are not started")
    compute_in(torch.float32, monkeypatch)
    folder, _ = uninterrupted(torch.float32, workers)
    notebook = Notebook(tmp_path, workers)
    with pytest.raises(KeyboardInterrupt):
        notebook.train(**{loop: pressed_at(call)})
    assert history(tmp_path / "s9") == history(folder)[:1]
    checkpoint, last, _ = end_state(tmp_path / "s9")
    assert [row["epoch"] for row in checkpoint["history"]] == [1]
    assert_identical(checkpoint["model"], last)
    assert files(tmp_path / "s9").keys() == {"checkpoint.pt", *READABLE}

    capsys.readouterr()
    notebook.train()  # the same cell of the same notebook once more: weights and generators are no longer those
    assert f"going on after epoch 1 of {EPOCHS}" in capsys.readouterr().out
    assert history(tmp_path / "s9") == history(folder)
    assert_identical(end_state(tmp_path / "s9"), end_state(folder))


# ---- the same again, and side by side -----------------------------------------------------------------------------

TRAIN = """
import dataclasses, sys, torch, utils
from models import Model
root, name, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
utils.autocast_dtype = lambda device: torch.float32
whole = utils.load_images
def load_images(dataset, split, root=None):
    data, n = whole(dataset, split, root), {"train": 128, "test": 64}[split]
    return dataclasses.replace(data, images=data.images[:n], labels=data.labels[:n])
utils.load_images = load_images
_, train_loader = utils.get_CIFARdataset_with_loader("train", {"batch_size": 32}, dataset="digits")
_, test_loader = utils.get_CIFARdataset_with_loader("test", {"batch_size": 32}, dataset="digits")
run = utils.Run(name, root=root)
utils.seed_everything(4)
model = Model(dropout_value=0.05)
optimizer = utils.get_optimizer(model, "SGD", lr=0.05, momentum=0.9)
scheduler = utils.get_scheduler(optimizer, step_size=2, gamma=0.5)
lists = run.resume({"epochs": 2}, model, optimizer, scheduler)
for epoch in range(2):
    utils.train(model, "cpu", train_loader, optimizer, utils.get_loss(), *lists[:2])
    utils.test(model, "cpu", test_loader, utils.get_loss(), *lists[2:])
    scheduler.step()
    run.save(*lists)
"""


def start_python(program, *arguments, **variables):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_runs_at_once_in_other_processes_get_the_same_history(uninterrupted, tmp_path, monkeypatch):
    compute_in(torch.float32, monkeypatch)
    folder, _ = uninterrupted(torch.float32, 0)
    threads = torch.get_num_threads()
    processes = [
        start_python(TRAIN, tmp_path, name, threads, PYTHONHASHSEED=seed) for name, seed in (("a", "1"), ("b", "2"))
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    assert history(tmp_path / "a") == history(tmp_path / "b") == history(folder)[:2]
    assert_identical(end_state(tmp_path / "a")[1], end_state(tmp_path / "b")[1])


def test_another_seed_gives_another_history(uninterrupted, tmp_path, monkeypatch):
    compute_in(torch.float32, monkeypatch)
    folder, _ = uninterrupted(torch.float32, 0)
    Notebook(tmp_path, seed=4, name="same").train(until=1)
    Notebook(tmp_path, seed=5, name="other").train(until=1)
    assert history(tmp_path / "same") == history(folder)[:1]
    for column in ("train_loss", "test_loss"):
        assert history(tmp_path / "other")[0][column] != history(folder)[0][column]


HOLD = "import sys, runs; run = runs.Run('small', root=sys.argv[1]); print('held', flush=True); sys.stdin.read()"


def test_the_same_name_in_two_processes_is_refused(tmp_path):
    held = runs.Run("small", root=tmp_path)
    output, _ = start_python(HOLD, tmp_path).communicate(timeout=600)
    assert "RuntimeError: another process holds the run 'small'" in output and "RUN_NAME" in output
    assert held.folder.name == "small"
    runs.Run("small", root=tmp_path)  # the same process may: a cell is run twice


def test_a_run_can_be_taken_when_its_process_has_gone(tmp_path):
    with start_python(HOLD, tmp_path) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(RuntimeError, match=r"small.*RUN_NAME"):
                runs.Run("small", root=tmp_path)
            runs.Run("other", root=tmp_path)  # another name is nobody's business
        finally:
            process.kill()
            process.wait()
    runs.Run("small", root=tmp_path)


@pytest.mark.parametrize("cell_of_the_run_too", [False, True])
def test_stopped_in_the_first_epoch_it_starts_again_from_the_first_weights(
    uninterrupted, tmp_path, monkeypatch, cell_of_the_run_too
):
    compute_in(torch.float32, monkeypatch)
    folder, _ = uninterrupted(torch.float32, 0)
    notebook = Notebook(tmp_path)

    losses = []

    def stop(*loss):
        losses.append(loss)
        if len(losses) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        notebook.train(in_train=stop)
    if cell_of_the_run_too:
        notebook.run = utils.Run("s9", data="digits", root=tmp_path)
    notebook.train()  # the training cell, but not that of the model, run again
    assert history(tmp_path / "s9") == history(folder)
