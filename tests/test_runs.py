"""The files of seeds, weights and runs: what they say, what is refused, and that a refusal changes nothing."""

import errno
import io
import json
import os
import pathlib
import random
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
from runs import Run, load_weights

WRITTEN = ("checkpoint.pt", "history.csv", "run.json", "last.pt", "best.pt")  # in this order
SETTINGS = {"lr": 0.2, "epochs": 80, "batch_size": 256, "optimizer": "SGD", "augment": True}


def network(width=4, **norm):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width, **norm), nn.Linear(width, 2))


def own_network(forward):
    """The same with a forward of its own."""
    return type("Own", (nn.Sequential,), {"forward": forward})(*network())


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
    "a place before its start": lambda: (data := saved(torch.zeros(3)))[:-50] + b"\x7f" * 8 + data[-42:],
    "a whole network": lambda: saved(network()),
    "with code": lambda: saved({"weight": CreatesFile()}),
    "with code, before torch 1.6": lambda: saved({"weight": CreatesFile()}, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_foreign_file_of_weights_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("weights.pt").write_bytes(DAMAGED[case]())
    with pytest.raises(ValueError, match=r"weights\.pt is damaged or is not a file of tensors.*put back a good copy"):
        load_weights("weights.pt")
    assert not pathlib.Path("opened").exists()
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_weights("absent.pt")


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
    assert f"{name}: Permission denied" in (message := capsys.readouterr().out) and "The run goes on" in message
    assert files(run.folder).keys() == set(WRITTEN) - {name} and 1 < sum(waits) < 5
    refusals = 1  # and then it is closed
    save(run, model, lists, 20.0)
    assert load_weights(run / "last.pt")["weight"] == 2 and capsys.readouterr().out == ""
    assert start(tmp_path)[2][3] == [10.0, 20.0]


NO_ROOM = OSError(errno.ENOSPC, "No space left")
STOP = KeyboardInterrupt()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize(("call", "failure"), [("fsync", NO_ROOM), ("replace", STOP)])
def test_after_an_epoch_that_cannot_be_saved_the_run_goes_on(call, failure, name, tmp_path):
    run, model, lists = start(tmp_path)
    save(run, model, lists, 10.0)
    before, failed = files(run.folder), WRITTEN.index(name)
    fails = {"wraps": getattr(os, call), "side_effect": [DEFAULT] * failed + [failure]}
    with patch.object(os, call, **fails), pytest.raises(type(failure)) as raised:
        save(run, model, lists, 20.0)
    words = f"could not write {run / name}: No space left. What was there before is intact; see that the folder "
    assert failure is STOP or words in str(raised.value)
    # Files from the one that failed on are those of epoch 1, down to the byte, and nothing half written stays.
    assert {file for file, data in files(run.folder).items() if data == before[file]} == set(WRITTEN[failed:])

    again, other, history = start(tmp_path)
    done = 2 if failed else 1  # the checkpoint counts, and is written first
    assert history[3] == [10.0, 20.0][:done] and other.weight == load_weights(again / "last.pt")["weight"] == done
    run.save(*lists)  # in the first process, once there is room
    assert start(tmp_path)[2][3] == [10.0, 20.0]


def test_the_end_of_a_run_is_one_line(tmp_path, capsys):
    arguments = start(tmp_path, {"epochs": 3})
    with arguments[0]:
        save(*arguments, 10.0, 30.0, 20.0)
    last_line = f"{tmp_path / 'small'}: 3 of 3 epochs, test accuracy 20.00 % (the best, after epoch 2: 30.00 %)\n"
    assert capsys.readouterr().out.endswith(last_line)


STOPPED = "small: stopped after epoch 1 of 80; run this again to go on from there"


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


@pytest.mark.parametrize(("owner", "name", "value"), [(runs, "in_notebook", lambda: True), (sys, "ps1", ">>> ")])
def test_a_stopped_session_lives_on_after_one_line(owner, name, value, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, name, value, raising=False)
    arguments = start(tmp_path)
    with pytest.raises(KeyboardInterrupt) as stop, save(*arguments, 10.0):
        raise KeyboardInterrupt
    assert stop.value._render_traceback_() == [str(tmp_path / STOPPED)]  # what IPython shows


def test_a_new_run_says_that_its_model_is_not_new(tmp_path, capsys):
    """As when a notebook gets another RUN_NAME, and the cell of the model is not run again."""
    _, model, _ = start(tmp_path)
    Run("other", root=tmp_path).resume(SETTINGS, model, sgd(model))
    assert "other: a new run from the weights that an earlier run left in this model" in capsys.readouterr().out


def test_a_folder_in_which_no_run_can_be_kept_is_refused(tmp_path):
    for name in ("", "a/b", ".."):
        with pytest.raises(ValueError, match="plain directory name"):
            Run(name, root=tmp_path)
    (tmp_path / "small").touch()
    with pytest.raises(OSError, match=r"cannot keep a run in .*small: .*; it must be a writable directory"):
        Run("small", root=tmp_path)


def test_lists_in_another_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="in each other's place"):
        start(tmp_path)[0].save([1.5], [1.6], [40.0], [38.0])


def test_lists_that_do_not_follow_the_last_save_are_refused(tmp_path):
    run, model, good = start(tmp_path)
    save(run, model, good, 10.0)
    before, two = files(run.folder), [1.0, 1.0]
    for lists, message in (
        ([[1.0]] * 4, "lists of 1, 1, 1, 1 epochs and 1 are saved"),
        ([two, two, [1.0], two], "2, 2, 1, 2"),
        ([two, [*two], two, [1.0, float("nan")]], "'test_acc': nan.*finite"),
    ):
        with pytest.raises(ValueError, match=message):
            run.save(*lists)
    assert files(run.folder) == before
    save(run, model, good, 20.0)  # and the right ones are still taken


def test_a_run_that_could_not_be_resumed_is_refused_before_it_trains(tmp_path):
    model = nn.Linear(1, 1)
    scheduler = steps(sgd(model))
    scheduler.rates = np.linspace(0.1, 0.001, 9)
    with pytest.raises(TypeError, match="could not be resumed, as the state_dict of its model, optimizer or scheduler"):
        Run("small", root=tmp_path).resume({}, model, sgd(model), scheduler)
    del scheduler.rates
    Run("small", root=tmp_path).resume({}, model, sgd(model), scheduler)


def test_a_scheduler_that_resume_is_not_given_is_missed(tmp_path):
    model = nn.Linear(1, 1)
    steps(optimizer := sgd(model))
    with pytest.warns(UserWarning, match="the optimizer has a scheduler; give it to resume too"):
        Run("small", root=tmp_path).resume({}, model, optimizer)


@pytest.mark.parametrize("value", [np.float64(0.2), float("nan"), [1, 2]])
def test_a_setting_that_no_checkpoint_can_hold_is_refused(value, tmp_path):
    run = Run("small", root=tmp_path)
    with pytest.raises(TypeError, match=r"hyperparameter 'width' is .*; it must be a number, string or bool"):
        run.resume({"width": value}, *trained()[1:])
    with pytest.raises(RuntimeError, match="save before resume"):
        run.save([1.0], [1.0], [1.0], [1.0])


def scheduler(name, **options):
    return {"scheduler": lambda optimizer: getattr(torch.optim.lr_scheduler, name)(optimizer, **options)}


def warm_up_and_fall(steps):
    def make(optimizer):
        parts = LinearLR(optimizer, 0.1, total_iters=1), CosineAnnealingLR(optimizer, T_max=steps - 1)
        return SequentialLR(optimizer, parts, milestones=[1])

    return {"scheduler": make}


SCHEDULE = "the schedule in steps, which EPOCHS and the number of images decide, was ["
OTHER_RUNS = [  # (what the run was, what it is now, what the refusal says)
    (
        {},
        {"settings": {"epochs": 9, "batch_size": 64, "optimizer": "SGD", "augment": True, "seed": 4}},
        ["batch_size was 256 and is 64; lr was 0.2 and is None; seed was None and is 4."],
    ),
    ({}, {"network": lambda: network(5)}, ["0.bias of the network was (4,) and is (5,); 0.weight", "more differences"]),
    # Its weights would fit.
    ({}, {"network": lambda: network(eps=0.001)}, ["the network had (1): BatchNorm1d(4, eps=1e-05"]),
    (
        {"network": lambda: own_network(lambda self, x: self[2](self[1](self[0](x))))},
        {"network": lambda: own_network(lambda self, x: self[2](self[1](self[0](x) * 2)))},
        ["the network had Own.forward "],
    ),
    ({}, {"optimizer": lambda model: torch.optim.Adam(model.parameters())}, ["the optimizer was 'SGD' and is 'Adam'"]),
    (
        {},
        {"optimizer": lambda model: torch.optim.SGD([{"params": layer.parameters()} for layer in model], 0.2)},
        ["the number of parameters in the optimizer was '6' and is '2 + 2 + 2'"],
    ),
    ({}, {"scheduler": lambda optimizer: None}, ["the scheduler was 'StepLR' and is None"]),
    # The state of a schedule would bring its old length back: a cosine would rise again, others stay at zero.
    (scheduler("CosineAnnealingLR", T_max=4), scheduler("CosineAnnealingLR", T_max=8), [f"{SCHEDULE}4] and is [8]"]),
    (scheduler("OneCycleLR", max_lr=1, total_steps=4), scheduler("OneCycleLR", max_lr=1, total_steps=8), [SCHEDULE]),
    (scheduler("StepLR", step_size=2), scheduler("StepLR", step_size=4), [f"{SCHEDULE}2] and is [4]"]),
    (scheduler("MultiStepLR", milestones=[2, 3]), scheduler("MultiStepLR", milestones=[4, 6]), [SCHEDULE]),
    (warm_up_and_fall(4), warm_up_and_fall(8), [f"{SCHEDULE}[1], 1, 3] and is [[1], 1, 7]"]),
]


@pytest.mark.parametrize(("was", "now", "words"), OTHER_RUNS)
def test_another_run_is_refused(was, now, words, tmp_path, capsys):
    run = Run("small", root=tmp_path)
    run.resume(*trained(**was))
    run.save([2.0], [10.0], [2.1], [11.0])
    arguments = trained(**now)
    before, files_before = states(arguments), files(run.folder)
    with pytest.raises(ValueError) as refusal:
        run.resume(*arguments)
    advice = f"To start afresh, choose another RUN_NAME or delete {run.folder}; to go on, put the old values back"
    for part in (f"the checkpoint in {run.folder} is of another run: ", *words, advice):
        assert part in str(refusal.value)
    with pytest.raises(RuntimeError, match="save before resume"):
        run.save([2.0, 1.0], [10.0, 20.0], [2.1, 1.1], [11.0, 21.0])
    assert states(arguments) == before and files(run.folder) == files_before
    assert Run("small", root=tmp_path).resume(*trained(**was)) == ([2.0], [10.0], [2.1], [11.0])
    Run("other", root=tmp_path).resume(*arguments)
    assert capsys.readouterr().out.endswith("other: a new run\n")  # the model that was refused is still a new one


def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    path, arguments = save(*start(tmp_path), 10.0) / "checkpoint.pt", trained()
    cases = (
        (path.read_bytes()[:2000], "damaged.*good copy"),
        (saved(network().state_dict()), "not a checkpoint of a run .no 'hyperparameters'"),
        (saved(torch.zeros(3)), "not a checkpoint of a run"),
    )
    before = states(arguments)
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            Run("small", root=tmp_path).resume(*arguments)
        assert states(arguments) == before and path.read_bytes() == data


class Power(nn.Module):
    """A layer that prints what it learns, as generalised-mean pooling does."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(()))

    def extra_repr(self):
        return f"p={self.p.item()}"


def test_a_layer_that_prints_what_it_has_learned_is_the_same(tmp_path):
    for epoch in range(3):
        model, run = Power(), Run("power", root=tmp_path)
        lists = run.resume({}, model, sgd(model))
        assert len(lists[0]) == epoch and model.p == 1 + epoch
        with torch.no_grad():
            model.p += 1
        for values in lists:
            values.append(1.0)
        run.save(*lists)


def test_a_network_that_another_torch_prints_otherwise_is_the_same(tmp_path):
    """As torch 2.14 prints `bias=True` in BatchNorm2d, which 2.6 does not."""
    path = save(*start(tmp_path), 10.0) / "checkpoint.pt"
    checkpoint = load_weights(path) | {"network": "Linear(another=wording)"}
    checkpoint["made_by"]["versions"]["torch"] = "1.13.1"
    torch.save(checkpoint, path)
    assert start(tmp_path)[2][3] == [10.0]


def test_a_forward_that_does_the_same_is_the_same_though_its_text_is_another():
    def forward(self, x):
        return nn.Sequential.forward(self, x) if x.dtype in (torch.float32, torch.float64) else x

    def commented(self, x):
        """What it does."""
        # Why it does it.
        return nn.Sequential.forward(self, x) if x.dtype in (torch.float32, torch.float64) else x

    assert runs.printed(own_network(forward)) == runs.printed(own_network(commented))


def test_a_network_that_prints_an_address_is_the_same_in_the_next_process(tmp_path):
    def resumed():
        model = nn.Linear(1, 1)
        model.extra_repr = lambda: object.__repr__(model)
        run = Run("small", root=tmp_path)
        return run, model, run.resume(SETTINGS, model, sgd(model))

    save(*(first := resumed()), 10.0)
    assert resumed()[2][3] == first[2][3] == [10.0]
