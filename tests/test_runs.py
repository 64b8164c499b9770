"""The files of seeds, weights and runs: what they say, what is refused, and that a refusal changes nothing."""

import errno
import io
import json
import os
import pathlib
import random
import shutil
import sys
import time
from unittest.mock import DEFAULT, patch

import numpy as np
import pytest
import torch
from conftest import CreatesFile
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import runs
from optimization import get_scheduler
from output import load_weights
from runs import Run

WRITTEN = ("checkpoint.pt", "history.csv", "run.json", "last.pt", "best.pt")
SETTINGS = {"lr": 0.2, "epochs": 80, "batch_size": 256, "optimizer": "SGD", "augment": True}


def network(width=4, **norm):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width, **norm), nn.Linear(width, 2))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)


def steps(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 5)


def trained(settings=SETTINGS, network=network, optimizer=sgd, scheduler=steps):
    """Arguments of resume, each with a state of its own, as after one step."""
    torch.manual_seed(0)
    model = network()
    optimizer = optimizer(model)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return settings, model, optimizer, scheduler(optimizer)


def start(root, settings=SETTINGS, lr=0.5):
    """A run of a network with one weight, resumed: (run, model, lists)."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    run = Run("small", data="none", root=root)
    return run, model, run.resume(settings, model, optimizer, steps(optimizer))


def save(run, model, lists, *test_acc):
    """Epochs that leave the weight at their number and have the given test accuracies."""
    for accuracy in test_acc:
        for values, value in zip(lists, (0.1, 2 / 3, 1e-30, accuracy)):
            values.append(value)
        nn.init.constant_(model.weight, len(lists[0]))
        run.save(*lists)
    return run


def files(folder):
    """{name: bytes} of what the run keeps; the lock is no part of it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def states(arguments):
    """All that resume could change, as bytes."""
    things = [thing and thing.state_dict() for thing in arguments[1:]]
    return saved([things, torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()])


def test_a_seed_fixes_all_generators_and_what_is_no_seed_changes_none():
    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    first, other = (runs.seed_everything(seed) or drawn() for seed in (4, 5))
    assert not set(first) & set(other)
    runs.seed_everything(np.int64(4))
    for wrong in (-1, 2**32, 0.5, "4"):
        with pytest.raises((ValueError, TypeError)):
            runs.seed_everything(wrong)
    assert drawn() == first


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


DAMAGED = {
    "zero bytes": lambda: b"",
    "half": lambda: saved(network().state_dict())[:1500],
    "a changed number": lambda: saved(torch.arange(3.0)).replace(np.float32(2).tobytes(), np.float32(3).tobytes()),
    "of NumPy": lambda: np.savez(buffer := io.BytesIO(), weight=np.zeros(3)) or buffer.getvalue(),
    "a whole network": lambda: saved(network()),
    "with code": lambda: saved({"weight": CreatesFile()}),
    "with code, before torch 1.6": lambda: saved({"weight": CreatesFile()}, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_foreign_file_of_weights_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("weights.pt").write_bytes(DAMAGED[case]())
    with pytest.raises(ValueError, match=r"weights\.pt is damaged.*put back a good copy"):
        load_weights("weights.pt")
    assert not pathlib.Path("opened").exists()
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_weights("absent.pt")


def test_weights_from_before_torch_1_6_are_read(tmp_path):
    (tmp_path / "old.pt").write_bytes(saved({"weight": torch.arange(3)}, _use_new_zipfile_serialization=False))
    assert load_weights(tmp_path / "old.pt")["weight"].tolist() == [0, 1, 2]


def test_last_and_best_weights_are_kept(tmp_path):
    folder = save(*start(tmp_path), 10.0, 30.0, 20.0).folder

    def kept():
        return [load_weights(folder / f"{name}.pt")["weight"].item() for name in ("last", "best")]

    assert kept() == [3, 2]
    save(*start(tmp_path), 30.0)  # the best so far is remembered, and the first of equals stays
    assert kept() == [4, 2]
    summary = json.loads((folder / "run.json").read_text())
    assert (summary["epochs_done"], summary["best_epoch"], summary["hyperparameters"]) == (4, 2, SETTINGS)
    assert (summary["best_test_accuracy_percent"], summary["last_test_accuracy_percent"]) == (30.0, 30.0)
    assert (summary["data"], summary["device"], summary["threads"]) == ("none", "cpu", torch.get_num_threads())
    save(*start(tmp_path), 31.0)
    assert kept() == [5, 5]


def test_the_history_has_all_digits_and_takes_numbers_of_numpy_and_torch(tmp_path):
    run = save(*start(tmp_path, lr=np.float64(0.5)), np.float64(100 / 3), torch.tensor(20))
    header, first, second = (run / "history.csv").read_text().splitlines()
    assert header == "epoch,lr,train_loss,train_acc,test_loss,test_acc,seconds"
    assert first.startswith(f"1,0.5,0.1,0.6666666666666666,1e-30,{100 / 3},")
    assert second.startswith("2,0.5,0.1,0.6666666666666666,1e-30,20.0,")
    assert start(tmp_path)[2][3] == [100 / 3, 20.0]  # it can be read, though weights_only takes no number of NumPy


def test_going_on_writes_the_same_files_again(tmp_path):
    run = save(*start(tmp_path), 10.0, 20.0)
    before = files(run.folder)
    assert before.keys() == set(WRITTEN)
    for name in WRITTEN[1:]:  # lost, say, in a copy from elsewhere; the checkpoint has it all
        (run / name).unlink()
    run.data = "of who opens it"  # not what it was trained on
    (run / ".last.pt.123.tmp").write_text("half of what a process wrote that was killed")
    start(tmp_path)
    assert files(run.folder) == before


def test_a_change_of_folder_loses_no_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = start("runs")
    pathlib.Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    save(*arguments, 10.0)
    assert files(tmp_path / "runs" / "small").keys() == set(WRITTEN)


@pytest.mark.parametrize("name", ["checkpoint.pt", "last.pt"])
def test_a_file_that_another_program_keeps_open_does_not_end_the_run(name, tmp_path, monkeypatch, capsys):
    """As a virus scanner does under Windows, where an open file cannot be replaced."""
    replace, refusals, waits = os.replace, 1000, []

    def refuse(source, target):
        nonlocal refusals
        if pathlib.Path(target).name == name and refusals:
            refusals -= 1
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "sleep", waits.append)
    run, model, lists = start(tmp_path)
    save(run, model, lists, 10.0)
    assert f"{name}" in (message := capsys.readouterr().out) and "The run goes on" in message
    assert files(run.folder).keys() == set(WRITTEN) - {name} and 1 < sum(waits) < 5
    refusals = 1  # and then it is closed
    save(run, model, lists, 20.0)
    assert load_weights(run / "last.pt")["weight"] == 2 and capsys.readouterr().out == ""
    assert start(tmp_path)[2][3] == [10.0, 20.0]


NO_ROOM = OSError(errno.ENOSPC, "No space left")
STOP = KeyboardInterrupt()


@pytest.mark.parametrize("place", range(len(WRITTEN)))
@pytest.mark.parametrize(("call", "failure"), [("fsync", NO_ROOM), ("replace", STOP)])
def test_after_an_epoch_that_cannot_be_saved_the_run_resumes(call, failure, place, tmp_path):
    run, model, lists = start(tmp_path)
    save(run, model, lists, 10.0)
    before = files(run.folder)
    fails = {"wraps": getattr(os, call), "side_effect": [DEFAULT] * place + [failure]}
    with patch.object(os, call, **fails), pytest.raises(type(failure)) as raised:
        save(run, model, lists, 20.0)
    assert failure is STOP or all(word in str(raised.value) for word in ("No space left", "small"))
    # What was not written is as it was, down to the byte, and nothing half written stays.
    same = {file for file, data in files(run.folder).items() if data == before[file]}
    assert files(run.folder).keys() == before.keys() and len(same) == len(WRITTEN) - place

    again, other, history = start(tmp_path)
    assert history[3] == [10.0, 20.0][: 1 + ("checkpoint.pt" not in same)]
    assert other.weight == load_weights(again / "last.pt")["weight"] == len(history[3])
    run.save(*lists)  # in the first process, once there is room
    assert start(tmp_path)[2][3] == [10.0, 20.0]


def test_a_folder_that_was_deleted_is_made_again(tmp_path):
    run, model, lists = start(tmp_path)
    shutil.rmtree(run.folder)
    save(run, model, lists, 10.0)
    assert start(tmp_path)[2][3] == [10.0]


@pytest.mark.skipif(sys.platform == "win32", reason="locks files otherwise")
def test_a_drive_without_file_locks_says_so_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    import fcntl

    def flock(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    save(*start(tmp_path), 10.0)
    assert "no file locks" in capsys.readouterr().out
    assert start(tmp_path)[2][3] == [10.0]


def test_the_end_of_a_run_is_one_line(tmp_path, capsys):
    arguments = start(tmp_path, {"epochs": 3})
    with arguments[0]:
        save(*arguments, 10.0, 30.0, 20.0)
    last_line = f"{tmp_path / 'small'}: 3 of 3 epochs, test accuracy 20.00 %\n"
    assert capsys.readouterr().out.endswith(last_line)


STOPPED = "small: stopped after epoch 1 of 80; run this again to resume"


def test_a_stopped_script_ends_with_one_line(tmp_path):
    """Python prints what SystemExit holds, and exits with status 1."""
    arguments = start(tmp_path)
    with pytest.raises(SystemExit, match=f"{STOPPED}$") as end, arguments[0]:
        save(*arguments, 10.0)
        raise KeyboardInterrupt
    assert isinstance(end.value.code, str)
    assert start(tmp_path)[2][3] == [10.0]


def test_an_error_in_a_run_is_shown_as_it_is(tmp_path, capsys):
    arguments = start(tmp_path)
    with pytest.raises(FloatingPointError, match=r"^the loss is nan$"), arguments[0]:
        save(*arguments, 10.0)
        raise FloatingPointError("the loss is nan")
    assert "of 80 epochs" not in capsys.readouterr().out


def test_a_stopped_session_lives_on_after_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    arguments = start(tmp_path)
    with pytest.raises(KeyboardInterrupt) as stop, save(*arguments, 10.0):
        raise KeyboardInterrupt
    assert stop.value._render_traceback_() == [str(tmp_path / STOPPED)]  # what IPython shows


def test_a_folder_in_which_no_run_can_be_kept_is_refused(tmp_path):
    for name in ("", "a/b", ".."):
        with pytest.raises(ValueError, match="plain folder name"):
            Run(name, root=tmp_path)
    (tmp_path / "small").touch()
    with pytest.raises(OSError, match="small"):
        Run("small", root=tmp_path)


def test_lists_that_do_not_follow_the_last_save_are_refused(tmp_path):
    run, model, good = start(tmp_path)
    save(run, model, good, 10.0)
    before, two = files(run.folder), [1.0, 1.0]
    for lists, message in (
        ([[1.0]] * 4, "1 epochs are saved.*1, 1, 1, 1"),
        ([two, two, [1.0], two], "2, 2, 1, 2"),
        ([two, [*two], two, [1.0, float("nan")]], "nan"),
    ):
        with pytest.raises(ValueError, match=message):
            run.save(*lists)
    assert files(run.folder) == before
    save(run, model, good, 20.0)  # and the right ones are still taken


def test_a_run_that_could_not_be_resumed_is_refused_before_it_trains(tmp_path):
    model = nn.Linear(1, 1)
    scheduler = steps(sgd(model))
    scheduler.rates = np.linspace(0.1, 0.001, 9)
    with pytest.raises(TypeError, match="could not be resumed"):
        Run("small", root=tmp_path).resume({}, model, sgd(model), scheduler)
    del scheduler.rates
    Run("small", root=tmp_path).resume({}, model, sgd(model), scheduler)


@pytest.mark.parametrize("value", [object(), {1: sgd}, torch.float32])
def test_a_setting_that_no_checkpoint_can_hold_is_refused(value, tmp_path):
    run = Run("small", root=tmp_path)
    with pytest.raises(TypeError, match="hyperparameters"):
        run.resume({"width": value}, *trained()[1:])
    assert not files(run.folder)
    with pytest.raises(RuntimeError, match="save before resume"):
        Run("small", root=tmp_path).save([1.0], [1.0], [1.0], [1.0])


def of_length(name, epochs):
    """A scheduler of `get_scheduler`, whose state would bring its old length back."""
    return {"scheduler": lambda optimizer: get_scheduler(optimizer, name, epochs=epochs, steps_per_epoch=2)}


def warm_up_and_fall(steps):
    """Of torch's own schedulers."""

    def make(optimizer):
        parts = LinearLR(optimizer, 0.1, total_iters=1), CosineAnnealingLR(optimizer, T_max=steps - 1)
        return SequentialLR(optimizer, parts, milestones=[1])

    return {"scheduler": make}


OTHER_RUNS = [  # (what the run was, what it is now, words of the refusal)
    (
        {},
        {"settings": {"epochs": 9, "batch_size": 64, "optimizer": "SGD", "augment": True, "seed": 4}},
        ["batch_size 256 → 64; lr 0.2 → None; seed None → 4"],
    ),
    ({}, {"network": lambda: network(5)}, ["Linear(in_features=3, out_features=4", "out_features=5"]),
    # Its weights would fit.
    ({}, {"network": lambda: network(eps=0.001)}, ["(1): BatchNorm1d(4, eps=1e-05", "eps=0.001"]),
    ({}, {"optimizer": lambda model: torch.optim.Adam(model.parameters())}, ["the optimizer 'SGD' → 'Adam'"]),
    ({}, {"scheduler": lambda optimizer: None}, ["the scheduler 'StepLR' → 'NoneType'"]),
    ({"settings": {"optimizer": "a"}}, {"settings": {"optimizer": "b"}}, ["optimizer 'a' → 'b'"]),
    # The state of a schedule would bring its old length back: a cosine would rise again, others stay at zero.
    (of_length("OneCycleLR", 4), of_length("OneCycleLR", 8), ["'total_steps': 8", "'total_steps': 16"]),
    (of_length("CosineAnnealingLR", 4), of_length("CosineAnnealingLR", 8), ["'T_max': 8", "'T_max': 16"]),
    (warm_up_and_fall(4), warm_up_and_fall(8), ["'T_max': 3", "'T_max': 7"]),
]


@pytest.mark.parametrize(("was", "now", "words"), OTHER_RUNS)
def test_another_run_is_refused(was, now, words, tmp_path):
    run = Run("small", root=tmp_path)
    run.resume(*trained(**was))
    run.save([2.0], [10.0], [2.1], [11.0])
    arguments = trained(**now)
    before, files_before = states(arguments), files(run.folder)
    for refused in (run.check, run.resume):
        with pytest.raises(ValueError, match="is of another run") as refusal:
            refused(*arguments)
        assert all(word in str(refusal.value) for word in words), refusal.value
    with pytest.raises(RuntimeError, match="save before resume"):
        run.save([2.0, 1.0], [10.0, 20.0], [2.1, 1.1], [11.0, 21.0])
    assert states(arguments) == before and files(run.folder) == files_before
    assert Run("small", root=tmp_path).resume(*trained(**was)) == ([2.0], [10.0], [2.1], [11.0])
    assert Run("other", root=tmp_path).resume(*arguments) == ([], [], [], [])


def changed(**entries):
    """Makes another thing of a checkpoint."""
    return lambda checkpoint: checkpoint | entries


SPOILT = {
    "weights alone": lambda checkpoint: checkpoint["model"],
    "a tensor": lambda checkpoint: torch.zeros(3),
    "nothing": lambda checkpoint: None,
    "no history": lambda checkpoint: {key: value for key, value in checkpoint.items() if key != "history"},
    "another history": changed(history=[1.0]),
    "a history of other columns": changed(history=[{"epoch": 1}]),
    "a history that is no list": changed(history=0),
    "no optimizer": changed(optimizer=None),
    "no random states": changed(random=[]),
    "other random states": changed(random=[{"torch": torch.zeros(3)}]),
    "no best": changed(best=None),
    "other weights": changed(model={"weight": torch.zeros(7)}),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_checkpoint_that_holds_something_else_is_refused_and_changes_nothing(spoil, tmp_path):
    path = save(*start(tmp_path), 10.0) / "checkpoint.pt"
    path.write_bytes(saved(spoil(load_weights(path))))
    model = nn.Linear(1, 1, bias=False)
    arguments = SETTINGS, model, (optimizer := sgd(model)), steps(optimizer)
    before, data = states(arguments), path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt (does not fit|is damaged)"):
        Run("small", root=tmp_path).resume(*arguments)
    assert states(arguments) == before and path.read_bytes() == data


def test_all_generators_are_restored(tmp_path):
    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    save(*start(tmp_path), 10.0)
    expected = drawn()
    runs.seed_everything(5)
    start(tmp_path)
    assert drawn() == expected


class Power(nn.Module):
    """A layer that prints what it learns, as generalised-mean pooling does, and an address; and keeps an activation."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(()))
        self.last = 2 * self.p  # which cannot be copied

    def extra_repr(self):
        return f"p={self.p.item()}, {object.__repr__(self)}"

    def get_extra_state(self):
        return {"epochs": 3}

    def set_extra_state(self, state):
        assert state == {"epochs": 3}


def test_a_layer_that_prints_what_it_has_learned_is_the_same(tmp_path):
    for epoch in range(3):
        model, run = Power(), Run("power", root=tmp_path)
        for _ in range(2):  # the cell is run again, and then all of them
            lists = run.resume({}, model, sgd(model))
        assert len(lists[0]) == epoch and model.p == 1 + epoch
        with torch.no_grad():
            model.p += 1
        run.save(*([*values, 1.0] for values in lists))


def test_a_network_that_another_torch_prints_otherwise_is_the_same(tmp_path):
    """As torch 2.14 prints `bias=True` in BatchNorm2d, which 2.6 does not."""
    path = save(*start(tmp_path), 10.0) / "checkpoint.pt"
    checkpoint = load_weights(path) | {"network": "Linear(another=wording)"}
    checkpoint["made_by"]["versions"]["torch"] = "1.13.1"
    torch.save(checkpoint, path)
    assert start(tmp_path)[2][3] == [10.0]
