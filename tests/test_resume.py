"""Training that stops and goes on must end as training that never stopped, and the files of a run must say so."""

import csv
import dataclasses
import functools
import json
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


@pytest.mark.parametrize("name", ["checkpoint.pt", "history.csv", "last.pt", "best.pt"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_stop_while_the_epoch_is_being_saved(call, name, tmp_path, monkeypatch):
    """Whatever was written by then, the next start finds whole files and brings them all to the same epoch."""
    start_small(tmp_path, test_acc=[10.0, 20.0])
    whole = getattr(os, call)

    def pressed(*arguments):
        if call == "fsync":
            being_written = os.readlink(f"/proc/self/fd/{arguments[0]}") if os.path.exists("/proc/self/fd") else name
        else:
            being_written = str(arguments[1])
        if name in being_written:
            raise KeyboardInterrupt
        return whole(*arguments)

    run, model, lists = small(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, pressed)
        with pytest.raises(KeyboardInterrupt):
            save_small(run, model, lists, 30.0)
    assert files(tmp_path / "small").keys() == {"checkpoint.pt", *READABLE}, "something half written stays"
    done = 2 if name == "checkpoint.pt" else 3
    run, model, lists = small(tmp_path)
    assert lists[3] == [10.0, 20.0, 30.0][:done]
    assert [float(row["test_acc"]) for row in history(tmp_path / "small")] == lists[3]
    assert runs.load_weights(tmp_path / "small" / "last.pt")["weight"].flatten().tolist() == [done]
    assert runs.load_weights(tmp_path / "small" / "best.pt")["weight"].flatten().tolist() == [done]
    assert model.weight.item() == done


# ---- a run without training, to look at the files -----------------------------------------------------------------


def small(root, hyperparameters=HYPERPARAMETERS, model=None, optimizer=None, scheduler=None):
    """A run of a network with one weight, resumed: (run, model, lists)."""
    model = model or torch.nn.Linear(1, 1, bias=False)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    run = runs.Run("small", data="none", root=root)
    return run, model, run.resume(hyperparameters, model, optimizer, scheduler)


def save_small(run, model, lists, test_acc):
    """An epoch that leaves the weight at its number and has the given test accuracy."""
    for values, value in zip(lists, (0.1, 2 / 3, 1e-30, test_acc)):
        values.append(value)
    with torch.no_grad():
        model.weight.fill_(len(lists[0]))
    run.save(*lists)


def start_small(root, test_acc):
    run, model, lists = small(root)
    for value in test_acc:
        save_small(run, model, lists, value)


def test_a_file_that_another_program_keeps_open_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """As a spreadsheet does under Windows, where an open file cannot be replaced."""
    start_small(tmp_path, test_acc=[10.0])
    run, model, lists = small(tmp_path)
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith("history.csv"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        save_small(run, model, lists, 20.0)
    assert "history.csv: Permission denied" in capsys.readouterr().out
    assert len(history(tmp_path / "small")) == 1 and runs.load_weights(tmp_path / "small" / "last.pt")["weight"] == 2
    save_small(run, model, lists, 30.0)
    assert [float(row["test_acc"]) for row in history(tmp_path / "small")] == [10.0, 20.0, 30.0]


def test_a_learning_rate_in_a_tensor_is_recorded_as_a_number(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5), momentum=0.9)
    run, model, lists = small(tmp_path, model=model, optimizer=optimizer)
    save_small(run, model, lists, 10.0)
    assert history(tmp_path / "small")[0]["lr"] == "0.5"


def test_last_and_best_weights_are_kept(tmp_path):
    start_small(tmp_path, test_acc=[10.0, 30.0, 20.0])
    folder = tmp_path / "small"
    assert runs.load_weights(folder / "last.pt")["weight"].item() == 3
    assert runs.load_weights(folder / "best.pt")["weight"].item() == 2

    run, model, lists = small(tmp_path)  # the best so far is remembered, and the first of equals stays
    save_small(run, model, lists, 30.0)
    assert runs.load_weights(folder / "last.pt")["weight"].item() == 4
    assert runs.load_weights(folder / "best.pt")["weight"].item() == 2
    summary = json.loads((folder / "run.json").read_text())
    assert (summary["epochs_done"], summary["best_epoch"]) == (4, 2)
    assert (summary["best_test_accuracy_percent"], summary["last_test_accuracy_percent"]) == (30.0, 30.0)
    assert summary["hyperparameters"] == HYPERPARAMETERS

    run, model, lists = small(tmp_path)
    save_small(run, model, lists, 31.0)
    assert runs.load_weights(folder / "best.pt")["weight"].item() == 5


def test_pandas_reads_the_history(tmp_path):
    pandas = pytest.importorskip("pandas")
    start_small(tmp_path, test_acc=[10.0, 100 / 3])
    frame = pandas.read_csv(tmp_path / "small" / "history.csv")
    assert {"epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds"} <= set(frame.columns)
    assert frame["epoch"].tolist() == [1, 2]
    assert (frame["seconds"] >= 0).all()
    expected = {
        "lr": [0.5, 0.5],
        "train_loss": [0.1, 0.1],
        "train_acc": [2 / 3, 2 / 3],
        "test_loss": [1e-30, 1e-30],
        "test_acc": [10.0, 100 / 3],
    }
    rows = history(tmp_path / "small")
    for column, values in expected.items():
        assert frame[column].tolist() == pytest.approx(values, rel=1e-14)
        assert [float(row[column]) for row in rows] == values  # all digits are there, to compare runs bit for bit


def test_going_on_rewrites_the_same_files(tmp_path):
    start_small(tmp_path, test_acc=[10.0, 20.0])
    before = files(tmp_path / "small")
    for name in READABLE:  # lost, say, in a copy from elsewhere; the checkpoint has it all
        (tmp_path / "small" / name).unlink()
    small(tmp_path)
    after = files(tmp_path / "small")
    assert before.keys() == after.keys()
    for name in before.keys() - {"run.json"}:
        assert before[name] == after[name], name


def test_lists_that_do_not_follow_the_last_save_are_refused(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    run, model, lists = small(tmp_path)
    before = files(run.folder)
    with pytest.raises(ValueError, match="1, 1, 1, 1 epochs and 1"):
        run.save(*lists)
    with pytest.raises(ValueError, match="1, 2, 2, 2 epochs and 1"):
        save_small(run, model, ([], *lists[1:]), 20.0)
    with pytest.raises(ValueError, match="one entry appended"):
        save_small(run, model, [[0.0, 0.0] for _ in range(4)], 20.0)
    assert files(run.folder) == before


# ---- what must not go on ------------------------------------------------------------------------------------------


def assert_refused(root, named, **changes):
    """A changed run is refused, the message says each of `named`, and neither objects nor files are touched."""
    model = changes.setdefault("model", torch.nn.Linear(1, 1, bias=False))
    optimizer = changes.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
    changes.setdefault("scheduler", torch.optim.lr_scheduler.StepLR(optimizer, step_size=2))
    objects = [changes[name] for name in ("model", "optimizer", "scheduler")]
    before = files(root / "small"), torch.get_rng_state(), [repr(thing.state_dict()) for thing in objects]
    with pytest.raises(ValueError) as refusal:
        small(root, **changes)
    message = str(refusal.value)
    for words in (*named, str(root / "small"), "start afresh", "delete"):
        assert words in message, f"{words!r} is not in: {message}"
    assert files(root / "small") == before[0]
    assert torch.get_rng_state().equal(before[1])
    assert [repr(thing.state_dict()) for thing in objects] == before[2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.1}, ["lr", "0.05", "0.1"]),
        ({"seed": 5}, ["seed", "4", "5"]),
        ({"batch_size": 64, "dropout": 0.0}, ["batch_size", "32", "64", "dropout", "0.05", "0.0"]),
        ({"nesterov": True}, ["nesterov", "True"]),
        ({"lr": 0.1, "epochs": 9}, ["lr", "0.05", "0.1"]),
    ],
)
def test_other_hyperparameters_are_refused(change, named, tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    assert_refused(tmp_path, named, hyperparameters=HYPERPARAMETERS | change)
    _, model, lists = small(tmp_path)  # with the old values it still goes on
    assert lists[3] == [10.0] and model.weight.item() == 1


def test_a_hyperparameter_left_out_is_refused(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    fewer = {name: value for name, value in HYPERPARAMETERS.items() if name != "dropout"}
    assert_refused(tmp_path, ["dropout", "0.05"], hyperparameters=fewer)


@pytest.mark.parametrize("epochs", [1, 2, 80])
def test_the_number_of_epochs_may_change(epochs, tmp_path, capsys):
    start_small(tmp_path, test_acc=[10.0])
    _, _, lists = small(tmp_path, HYPERPARAMETERS | {"epochs": epochs})
    assert f"going on after epoch 1 of {epochs}" in capsys.readouterr().out
    assert lists == ([0.1], [2 / 3], [1e-30], [10.0])
    assert json.loads((tmp_path / "small" / "run.json").read_text())["hyperparameters"]["epochs"] == epochs


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: torch.nn.Linear(1, 2, bias=False), ["weight", "(1, 1)", "(2, 1)"]),
        (lambda: torch.nn.Linear(1, 1, bias=True), ["bias", "absent", "(1,)"]),
        (lambda: torch.nn.BatchNorm1d(1), ["bias", "absent", "more difference"]),
    ],
    ids=["wider", "one more parameter", "another layer"],
)
def test_another_network_is_refused(network, named, tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    assert_refused(tmp_path, [*named, "network"], model=network())


def test_a_changed_layer_is_refused_though_its_weights_would_fit(tmp_path):
    for dilation in ((2, 2), (1, 1)):
        model = Model()
        model.C1[2].conv.dilation = dilation
        run = utils.Run("net", root=tmp_path)
        if dilation == (2, 2):
            run.resume({}, model, utils.get_optimizer(model))
            run.save([1.0], [1.0], [1.0], [1.0])
    with pytest.raises(
        ValueError, match=r"a layer was .*dilation=\(2, 2\).* and is .*48, kernel_size=\(3, 3\), stride"
    ):
        run.resume({}, model, utils.get_optimizer(model))


def test_a_change_of_folder_loses_no_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, model, lists = small("runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    save_small(run, model, lists, 10.0)
    assert (tmp_path / "runs" / "small" / "checkpoint.pt").exists()


def test_another_optimizer_is_refused(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    model = torch.nn.Linear(1, 1, bias=False)
    assert_refused(tmp_path, ["SGD", "Adam"], model=model, optimizer=torch.optim.Adam(model.parameters()))


def test_another_scheduler_is_refused(tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    assert_refused(tmp_path, ["StepLR", "Cosine"], model=model, optimizer=optimizer, scheduler=cosine)


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "PolynomialLR", "OneCycleLR"])
def test_a_schedule_of_another_length_is_refused(name, tmp_path):
    """Its state would bring the old length back: a cosine would rise again after it, others stay at zero."""

    def start(epochs):
        model = torch.nn.Linear(1, 1, bias=False)
        optimizer = utils.get_optimizer(model, "SGD", lr=0.5)
        options = {"steps_per_epoch": 10} if name == "OneCycleLR" else {}
        scheduler = utils.get_scheduler(optimizer, name=name, epochs=epochs, **options)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    run, model, lists = small(tmp_path, **start(4))
    save_small(run, model, lists, 10.0)
    assert_refused(tmp_path, ["length of the schedule", "4", "8"], **start(8))
    assert small(tmp_path, **start(4))[2][3] == [10.0]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "not one"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    start_small(tmp_path, test_acc=[10.0])
    path = tmp_path / "small" / "checkpoint.pt"
    good = path.read_bytes()
    middle = len(good) // 2
    bad = {
        "cut": good[:-10],
        "empty": b"",
        "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "not one": b"epoch,lr\n",
    }
    path.write_bytes(bad[damage])
    assert_refused(tmp_path, ["checkpoint.pt", "damaged"])
    path.write_bytes(good)
    assert small(tmp_path)[2][3] == [10.0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ExponentialLR", {"gamma": 0.5}),
        ("CosineAnnealingLR", {"T_max": 4}),
        ("OneCycleLR", {"max_lr": 0.5, "total_steps": 10}),
        ("MultiStepLR", {"milestones": [1, 3], "gamma": 0.5}),
        ("LinearLR", {}),
    ],
)
def test_other_schedulers_go_on_as_well(name, options, tmp_path):
    scheduler_class = getattr(torch.optim.lr_scheduler, name)

    def start():
        model = torch.nn.Linear(1, 1, bias=False)
        optimizer = utils.get_optimizer(model, "SGD", lr=0.5)
        scheduler = scheduler_class(optimizer, **options)
        return optimizer, scheduler, *small(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)

    rates = []
    for _ in range(4):  # every epoch in another process, as it were
        optimizer, scheduler, run, model, lists = start()
        optimizer.step()
        scheduler.step()
        save_small(run, model, lists, 10.0)
        rates.append(optimizer.param_groups[0]["lr"])
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.5, momentum=0.9)
    scheduler = scheduler_class(optimizer, **options)
    for rate in rates:
        optimizer.step()
        scheduler.step()
        assert rate == scheduler.get_last_lr()[0]


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
    start_small(tmp_path, test_acc=[10.0])  # this process still has the run, so the other may not take it
    held, _, _ = small(tmp_path)
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


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_an_optimizer_goes_on_in_its_own_way_of_computing(tmp_path, name):
    """A checkpoint of a GPU, whose optimizer was fused, on a device where it is not, and back."""
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for epoch, fused in enumerate([True, False, True]):
        model = Model()
        optimizer = utils.get_optimizer(model, name, fused=fused)
        run = utils.Run("run", root=tmp_path)
        lists = run.resume({"epochs": 3}, model, optimizer)
        assert [group["fused"] for group in optimizer.param_groups] == [fused] and len(lists[0]) == epoch
        utils.train(model, "cpu", [(images, labels)], optimizer, utils.get_loss(), *lists[:2])
        utils.test(model, "cpu", [(images, labels)], utils.get_loss(), *lists[2:])
        run.save(*lists)
