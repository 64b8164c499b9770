"""The files of seeds, weights and runs: what they say, what is refused, and that a refusal changes nothing."""

import csv
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import runs
from runs import Run, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

READABLE = {"history.csv", "run.json", "last.pt", "best.pt"}
SETTINGS = {"lr": 0.2, "epochs": 80, "batch_size": 256, "optimizer": "SGD", "augment": True}


def network(width=4, **norm):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width, **norm), nn.Linear(width, 2))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)


def steps(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 5)


def trained(settings=None, network=network, optimizer=sgd, scheduler=steps):
    """Arguments of resume, each with a state of its own, as after one step; a setting that is ... is left out."""
    torch.manual_seed(0)
    model = network()
    optimizer = optimizer(model)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    settings = {name: value for name, value in (SETTINGS | (settings or {})).items() if value is not ...}
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
    buffer = io.BytesIO()
    numpy_state = np.random.get_state()[1].tolist()
    things = [thing and thing.state_dict() for thing in arguments[1:]]
    torch.save([things, torch.get_rng_state(), numpy_state, random.getstate()], buffer)
    return buffer.getvalue()


# ---- seeds -----------------------------------------------------------------------------------------------------------


def drawn():
    return random.random(), np.random.random(), torch.rand(1).item()


def test_a_seed_fixes_all_generators():
    first, second, other = (runs.seed_everything(seed) or drawn() for seed in (4, 4, 5))
    assert first == second and not set(first) & set(other)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "4"])
def test_a_seed_that_is_none_changes_no_generator(seed):
    runs.seed_everything(4)
    expected = drawn()
    runs.seed_everything(4)
    with pytest.raises((ValueError, TypeError)):
        runs.seed_everything(seed)
    assert drawn() == expected


# ---- weights ---------------------------------------------------------------------------------------------------------


class Malicious:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("ran.txt").absolute(),)


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


DAMAGED = {
    "zero bytes": lambda: b"",
    "text": lambda: b"epoch,lr\n",
    "half": lambda: saved(network().state_dict())[:1500],
    "without its last byte": lambda: saved(network().state_dict())[:-1],
    "of NumPy": lambda: np.savez(buffer := io.BytesIO(), weight=np.zeros(3)) or buffer.getvalue(),
    "a whole network": lambda: saved(network()),
    "with code": lambda: saved({"weight": Malicious()}),
    "with code, before torch 1.6": lambda: saved({"weight": Malicious()}, _use_new_zipfile_serialization=False),
    "a plain pickle with code": lambda: pickle.dumps(Malicious()),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_foreign_file_of_weights_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("weights.pt").write_bytes(DAMAGED[case]())
    with pytest.raises(ValueError, match=r"weights\.pt is damaged or is not a file of tensors.*put back a good copy"):
        load_weights("weights.pt")
    assert not pathlib.Path("ran.txt").exists()


def test_a_file_of_weights_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights\.pt"):
        load_weights(tmp_path / "weights.pt")


def test_any_flipped_bit_in_weights_is_seen_or_harmless(tmp_path):
    """Every bit of the zip file's trailer, whose sizes can point to before its start, and every 17th of the rest."""
    path = tmp_path / "weights.pt"
    good = saved({"weight": torch.arange(3.0)})
    trailer = good.rindex(b"PK\x06\x06")  # directory's end, in the form for large files, and in that for small ones
    assert good[trailer:].count(b"PK") == 3
    reported = 0
    for bit in itertools.chain(range(0, 8 * trailer, 17), range(8 * trailer, 8 * len(good))):
        path.write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
        try:
            assert load_weights(path)["weight"].tolist() == [0, 1, 2], bit
        except ValueError as error:
            assert "is damaged" in str(error), bit
            reported += 1
    assert reported > 100


# ---- what a run writes -----------------------------------------------------------------------------------------------


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


def test_pandas_reads_the_history_and_it_has_all_digits(tmp_path):
    pandas = pytest.importorskip("pandas")
    run = save(*start(tmp_path), 10.0, 100 / 3)
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    frame = pandas.read_csv(run / "history.csv")
    assert (frame["seconds"] >= 0).all()
    expected = {"epoch": [1, 2], "lr": [0.5] * 2, "train_loss": [0.1] * 2, "train_acc": [2 / 3] * 2}
    expected |= {"test_loss": [1e-30] * 2, "test_acc": [10.0, 100 / 3]}
    for column, values in expected.items():
        assert [float(row[column]) for row in rows] == values
        assert frame[column].tolist() == pytest.approx(values, rel=1e-14)  # as near as pandas gets


def test_going_on_writes_the_same_files_again(tmp_path):
    run = save(*start(tmp_path), 10.0, 20.0)
    before = files(run.folder)
    assert before.keys() == {"checkpoint.pt", *READABLE}
    for name in READABLE:  # lost, say, in a copy from elsewhere; the checkpoint has it all
        (run / name).unlink()
    run.data = "of who opens it"  # not what it was trained on
    (run / ".last.pt.123.tmp").write_text("half of what a process wrote that was killed")
    start(tmp_path)
    assert files(run.folder) == before


@pytest.mark.parametrize("lr", [np.float64(0.5), torch.tensor(0.5)])
def test_numbers_of_numpy_and_torch_are_saved_as_plain_ones(lr, tmp_path):
    """float(value) of what users compute with; a checkpoint that cannot be read is worse than an error."""
    run, _, _ = start(tmp_path, lr=lr)
    run.save([np.float64(1.5)], [np.float32(20)], [torch.tensor(1.6)], [torch.tensor(21)])
    assert [values[-1] for values in start(tmp_path, lr=lr)[2]] == pytest.approx([1.5, 20, 1.6, 21])
    assert ",0.5," in (run / "history.csv").read_text()


def test_a_change_of_folder_loses_no_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = start("runs")
    pathlib.Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    save(*arguments, 10.0)
    assert files(tmp_path / "runs" / "small").keys() == {"checkpoint.pt", *READABLE}


@pytest.mark.parametrize("name", ["checkpoint.pt", "last.pt"])
def test_a_file_that_another_program_keeps_open_does_not_end_the_run(name, tmp_path, monkeypatch, capsys):
    """As a virus scanner does under Windows, where an open file cannot be replaced."""
    run, model, lists = start(tmp_path)
    save(run, model, lists, 10.0)
    replace, refusals, waits = os.replace, itertools.count(1), []

    def refuse(source, target):
        if pathlib.Path(target).name == name and next(refusals) <= last_refusal:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "sleep", waits.append)
    capsys.readouterr()
    last_refusal = 1  # and then it is closed
    save(run, model, lists, 20.0)
    assert load_weights(run / "last.pt")["weight"] == 2 and capsys.readouterr().out == ""
    before, last_refusal = files(run.folder), 1000
    save(run, model, lists, 30.0)
    assert f"{name}: Permission denied" in (message := capsys.readouterr().out) and "The run goes on" in message
    assert {file for file, data in files(run.folder).items() if data == before[file]} == {name}
    assert 1 < sum(waits) < 5
    last_refusal = 0
    save(run, model, lists, 40.0)
    assert start(tmp_path)[2][3] == [10.0, 20.0, 30.0, 40.0]
    assert load_weights(run / "last.pt")["weight"] == 4


def test_a_run_whose_first_checkpoints_cannot_be_written_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        run, model, lists = start(tmp_path)
        save(run, model, lists, 10.0)
        assert files(run.folder) == {}
    save(run, model, lists, 20.0)
    assert start(tmp_path)[2][3] == [10.0, 20.0]


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_the_end_of_a_run_is_one_line(tmp_path, capsys):
    arguments = start(tmp_path, {"epochs": 3})
    with arguments[0]:
        save(*arguments, 10.0, 30.0, 20.0)
    last_line = f"{tmp_path / 'small'}: 3 of 3 epochs, test accuracy 20.00 % (the best, after epoch 2: 30.00 %)\n"
    assert capsys.readouterr().out.endswith(last_line)


def test_an_error_in_a_run_is_what_is_seen(tmp_path):
    with pytest.raises(FloatingPointError), start(tmp_path)[0]:
        raise FloatingPointError
    with pytest.raises(TypeError, match="hyperparameter 'lr'"), Run("new", root=tmp_path) as run:
        run.resume({"lr": [0.1]}, *trained()[1:])


STOPPED = "small: stopped after epoch 1 of 80; run this again to go on from there"


def test_a_stopped_script_ends_with_one_line(tmp_path, monkeypatch):
    """Python prints what SystemExit holds, and exits with status 1."""
    arguments = start(tmp_path)
    with pytest.raises(SystemExit, match=f"{STOPPED}$") as end, arguments[0]:
        save(*arguments, 10.0)
        raise KeyboardInterrupt
    assert isinstance(end.value.code, str)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end, arguments[0]:
        patch.setattr(runs, "rank", lambda: 1)  # another process of a torchrun, of which the first says it
        raise KeyboardInterrupt
    assert end.value.code == 1
    assert start(tmp_path)[2][3] == [10.0]


@pytest.fixture
def ipython(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()
    for prompt in ("ps1", "ps2", "ps3"):  # which tell an interactive session
        vars(sys).pop(prompt, None)


@pytest.mark.parametrize("session", ["a notebook", "an interactive Python"])
def test_a_stopped_session_lives_on_after_one_line(session, ipython, tmp_path, capsys):
    arguments = start(tmp_path)
    save(*arguments, 10.0)
    ipython.push({"run": arguments[0]})
    if session == "a notebook":
        ipython.kernel = "that of Jupyter"
        del sys.ps1
    capsys.readouterr()
    result = ipython.run_cell("with run:\n    raise KeyboardInterrupt")
    assert isinstance(result.error_in_exec, KeyboardInterrupt)
    assert capsys.readouterr().out == f"{tmp_path / STOPPED}\n"


def test_a_new_run_says_that_its_model_is_not_new(tmp_path, capsys):
    """As when a run is deleted, or a notebook gets another RUN_NAME, and the cell of the model is not run again."""
    arguments = run, model, _ = start(tmp_path)
    save(*arguments, 10.0)
    (run / "checkpoint.pt").unlink()
    for other in (run, Run("other", root=tmp_path)):
        other.resume(SETTINGS, model, sgd(model))
        assert f"{other}: a new run from the weights that an earlier run left in this model" in capsys.readouterr().out
    start(tmp_path / "elsewhere")
    assert capsys.readouterr().out.endswith("small: a new run\n")


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b", "..", "/a"])
def test_a_name_that_is_no_plain_folder_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="plain directory name"):
        Run(name, root=tmp_path)
    assert not list(tmp_path.iterdir())


FOLDERS = {
    "runs is a file": lambda root: (root / "runs").touch(),
    "the run is a file": lambda root: ((root / "runs").mkdir(), (root / "runs/small").touch()),
    "the lock is a folder": lambda root: (root / "runs/small/.lock").mkdir(parents=True),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_in_which_no_run_can_be_kept_is_refused(case, tmp_path):
    FOLDERS[case](tmp_path)
    with pytest.raises(OSError, match=r"cannot keep a run in .*small: .*; it must be a writable directory"):
        Run("small", root=tmp_path / "runs")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[1.0]] * 4, "lists of 1, 1, 1, 1 epochs and 1 are saved"),
        ([[1.0] * 3] * 4, "3, 3, 3, 3 .* with one entry appended"),
        ([[1.0] * 2, [1.0] * 2, [1.0], [1.0] * 2], "2, 2, 1, 2"),
        ([[1.0] * 2] * 3 + [[1.0, float("nan")]], "'test_acc': nan.*finite"),
        ([[1.0, float("inf")]] + [[1.0] * 2] * 3, "'train_loss': inf.*finite"),
    ],
)
def test_lists_that_do_not_follow_the_last_save_are_refused(lists, message, tmp_path):
    run, model, good = start(tmp_path)
    save(run, model, good, 10.0)
    before = files(run.folder)
    with pytest.raises(ValueError, match=message):
        run.save(*lists)
    assert files(run.folder) == before
    save(run, model, good, 20.0)  # and the right ones are still taken


@pytest.mark.parametrize("value", [np.float64(0.2), pathlib.Path("data"), float("nan"), [1, 2], {"lr": 0.2}])
def test_a_setting_that_no_checkpoint_can_hold_is_refused(value, tmp_path):
    run = Run("small", root=tmp_path)
    with pytest.raises(TypeError, match=r"hyperparameter 'width' is .*; it must be a number, string or bool"):
        run.resume({"width": value}, *trained()[1:])
    with pytest.raises(RuntimeError, match="save before resume"):
        run.save([1.0], [1.0], [1.0], [1.0])


def adam(model):
    return torch.optim.Adam(model.parameters())


def of_length(name, **options):
    return lambda optimizer: getattr(torch.optim.lr_scheduler, name)(optimizer, **options)


def no_scheduler(optimizer):
    return None


LENGTH = "the length of the schedule in steps, which EPOCHS and the number of images decide, was"
OTHER_RUNS = {  # (what the run was, what it is now, what the refusal says)
    "another value": ({}, {"settings": {"lr": 0.1}}, ["lr was 0.2 and is 0.1."]),
    "two values": (
        {},
        {"settings": {"batch_size": 64, "optimizer": "Adam"}},
        ["batch_size was 256 and is 64; optimizer was 'SGD' and is 'Adam'."],
    ),
    "a switch, and more epochs": (
        {},
        {"settings": {"augment": False, "epochs": 9}},
        ["augment was True and is False."],
    ),
    "one more setting": ({}, {"settings": {"seed": 4}}, ["seed was None and is 4."]),
    "one setting less": ({}, {"settings": {"lr": ...}}, ["lr was 0.2 and is None."]),
    "a wider layer": (
        {},
        {"network": lambda: network(5)},
        ["0.bias of the network was (4,) and is (5,); 0.weight", "more differences"],
    ),
    "one more layer": (
        {},
        {"network": lambda: network().append(nn.Linear(2, 2, bias=False))},
        ["3.weight of the network was absent and is (2, 2)", "was '6' and is '7'"],
    ),
    "another layer whose weights would fit": (
        {},
        {"network": lambda: network(eps=0.001)},
        ["a layer was (1): BatchNorm1d(4, eps=1e-05", "and is (1): BatchNorm1d(4, eps=0.001"],
    ),
    "one more layer, without weights": (
        {},
        {"network": lambda: network().append(nn.Softmax(1))},
        ["a layer was ) and is (3): Softmax(dim=1)"],
    ),
    "another optimizer": ({}, {"optimizer": adam}, ["the optimizer was 'SGD' and is 'Adam'"]),
    "the optimizer back again": ({"optimizer": adam}, {}, ["the optimizer was 'Adam' and is 'SGD'"]),
    "an optimizer of one layer": (
        {},
        {"optimizer": lambda model: sgd(model[0])},
        ["in the optimizer was '6' and is '2'"],
    ),
    "an optimizer in groups": (
        {},
        {"optimizer": lambda model: torch.optim.SGD([{"params": model[i].parameters()} for i in range(3)], 0.2)},
        ["the number of parameters in the optimizer was '6' and is '2 + 2 + 2'"],
    ),
    "another scheduler": (
        {},
        {"scheduler": of_length("ExponentialLR", gamma=0.9)},
        ["was 'StepLR' and is 'Exponential"],
    ),
    "no scheduler any more": ({}, {"scheduler": no_scheduler}, ["the scheduler was 'StepLR' and is None"]),
    "a scheduler where there was none": ({"scheduler": no_scheduler}, {}, ["the scheduler was None and is 'StepLR'"]),
    # The state of a schedule would bring its old length back: a cosine would rise again, others stay at zero.
    **{
        f"a longer {name}": ({"scheduler": of_length(name, **then)}, {"scheduler": of_length(name, **now)}, [LENGTH])
        for name, then, now in (
            ("CosineAnnealingLR", {"T_max": 4}, {"T_max": 8}),
            ("PolynomialLR", {"total_iters": 4}, {"total_iters": 8}),
            ("OneCycleLR", {"max_lr": 1.0, "total_steps": 40}, {"max_lr": 1.0, "epochs": 8, "steps_per_epoch": 10}),
        )
    },
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_another_run_is_refused(case, tmp_path):
    was, now, words = OTHER_RUNS[case]
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


def test_a_model_that_was_refused_is_still_a_new_one(tmp_path, capsys):
    save(*start(tmp_path), 10.0)
    arguments = trained()
    with pytest.raises(ValueError, match="another run"):
        Run("small", root=tmp_path).resume(*arguments)
    Run("other", root=tmp_path).resume(*arguments)
    assert capsys.readouterr().out.endswith("other: a new run\n")


@pytest.mark.parametrize("epochs", [1, 80])
def test_the_number_of_epochs_may_change(epochs, tmp_path, capsys):
    save(*start(tmp_path), 10.0)
    run, _, lists = start(tmp_path, SETTINGS | {"epochs": epochs})
    assert f"going on after epoch 1 of {epochs}\n" in capsys.readouterr().out
    assert lists == ([0.1], [2 / 3], [1e-30], [10.0])
    assert json.loads((run / "run.json").read_text())["hyperparameters"]["epochs"] == epochs


def change(path, **items):
    """The same checkpoint with other items, or without those given as ...."""
    checkpoint = load_weights(path) | items
    torch.save({key: value for key, value in checkpoint.items() if value is not ...}, path)


CHECKPOINTS = {
    "half of it": (lambda path: path.write_bytes(path.read_bytes()[:2000]), ValueError, "damaged.*good copy"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), OSError, r"checkpoint\.pt"),
    "weights alone": (lambda path: torch.save(network().state_dict(), path), ValueError, "not a checkpoint of a run"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), ValueError, "not a checkpoint of a run"),
    "without its best": (lambda path: change(path, best=...), ValueError, "not a checkpoint of a run .no 'best'"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_refused(case, tmp_path):
    spoil, error, message = CHECKPOINTS[case]
    run, arguments = save(*start(tmp_path), 10.0), trained()
    spoil(run / "checkpoint.pt")
    before = states(arguments), sorted(run.folder.iterdir())
    with pytest.raises(error, match=message):
        run.resume(*arguments)
    assert (states(arguments), sorted(run.folder.iterdir())) == before


def test_a_network_that_another_torch_prints_otherwise_is_the_same(tmp_path):
    """As torch 2.14 prints `bias=True` in BatchNorm2d, which 2.6 does not."""
    run = save(*start(tmp_path), 10.0)
    made_by = load_weights(run / "checkpoint.pt")["made_by"]
    made_by["versions"]["torch"] = "1.13.1"
    change(run / "checkpoint.pt", network="Linear(another=wording)", made_by=made_by)
    assert start(tmp_path)[2][3] == [10.0]


class Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def extra_repr(self):
        return repr(self.function)  # which ends in its address

    def forward(self, x):
        return self.function(x)


def test_a_network_that_prints_a_function_is_the_same_in_the_next_process(tmp_path):
    keep = []  # or the second function could get the address of the first

    def with_function():
        keep.append(lambda x: x)
        return network().append(Activation(keep[-1]))

    run = Run("small", root=tmp_path)
    run.resume(*trained(network=with_function))
    run.save([2.0], [10.0], [2.1], [11.0])
    assert run.resume(*trained(network=with_function))[3] == [11.0]
