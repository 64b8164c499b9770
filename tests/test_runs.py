"""Seeds and runs: what their files say, how they resume, what is refused, and that a refusal changes nothing."""

import errno
import functools
import itertools
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import sys
from unittest.mock import DEFAULT, Mock, patch

import numpy as np
import pytest
import torch
from conftest import CreatesFile, end_state
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR, StepLR
from torch.utils.data import DataLoader

import utils
from output import load_weights, serialized
from runs import Run, seed_everything

WRITTEN = ("checkpoint.pt", "history.csv", "run.json", "last.pt", "best.pt")
SETTINGS = {"lr": 0.2, "epochs": 80, "batch_size": 256, "optimizer": "SGD", "augment": True}


def trained(settings=SETTINGS, width=4, eps=1e-5, optimizer="Adam", lr=0.2, scheduler=StepLR, **options):
    """Arguments of resume, each with a state of its own, as after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width, eps), nn.Linear(width, 2))
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=lr)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return settings, model, optimizer, scheduler(optimizer, **options or {"step_size": 5})


def start(root, **options):
    """A run, resumed: (run, model, lists)."""
    run, arguments = Run("small", data="none", root=root), trained(**options)
    return run, arguments[1], run.resume(*arguments)


def save(run, model, lists, *test_acc):
    """Epochs that leave a bias at their number and have the given test accuracies."""
    for accuracy in test_acc:
        for values, value in zip(lists, (0.1, 2 / 3, 1e-30, accuracy)):
            values.append(value)
        nn.init.constant_(model[0].bias, len(lists[0]))
        run.save(*lists)
    return run


def epochs_of(run, *names):
    return [load_weights(run / f"{name}.pt")["0.bias"][0].item() for name in names]


def files(folder):
    """{name: bytes} of what the run keeps; the lock is no part of it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def states(arguments):
    """All that resume could change, as bytes."""
    things = [thing.state_dict() for thing in arguments[1:]]
    return serialized([things, torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()])


def test_a_seed_and_a_resumed_run_set_all_generators(tmp_path):
    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    first, other = (seed_everything(seed) or drawn() for seed in (4, 5))
    assert not set(first) & set(other)
    arguments = start(tmp_path)
    seed_everything(np.int64(4))
    save(*arguments, 10.0)
    for wrong in (-1, 2**32, 0.5, "4"):
        with pytest.raises((ValueError, TypeError)):
            seed_everything(wrong)
    assert drawn() == first
    start(tmp_path)
    assert drawn() == first


DAMAGED = {
    "zero bytes": b"",
    "half": serialized(nn.Linear(9, 9).state_dict())[:1500],
    "a changed number": serialized(torch.arange(3.0)).replace(np.float32(2).tobytes(), np.float32(3).tobytes()),
    "a whole network": serialized(nn.Linear(9, 9)),
    "with code": serialized({"weight": CreatesFile()}),
    "with code, as before torch 1.6": pickle.dumps(CreatesFile(), protocol=2),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_foreign_file_of_weights_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("weights.pt").write_bytes(DAMAGED[case])
    with pytest.raises(ValueError, match=r"weights\.pt is damaged"):
        load_weights("weights.pt")
    assert not pathlib.Path("opened").exists()
    torch.save({"weight": torch.arange(3)}, "weights.pt", _use_new_zipfile_serialization=False)
    assert load_weights("weights.pt")["weight"].tolist() == [0, 1, 2]  # the format before torch 1.6


def test_the_files_have_all_digits_and_the_last_and_best_weights_and_are_written_again(tmp_path):
    run = save(*start(tmp_path, lr=np.float64(0.2)), 10.0, np.float64(100 / 3), torch.tensor(20))
    assert epochs_of(run, "last", "best") == [3, 2]
    header, *rows = (run / "history.csv").read_text().splitlines()
    assert header == "epoch,lr,train_loss,train_acc,test_loss,test_acc,seconds"
    for epoch, (row, accuracy) in enumerate(zip(rows, (10.0, 100 / 3, 20.0), strict=True), start=1):
        assert row.startswith(f"{epoch},0.2,0.1,0.6666666666666666,1e-30,{accuracy},")
    save(*start(tmp_path), 100 / 3)  # the best so far is remembered, and the first of equals stays
    assert epochs_of(run, "last", "best") == [4, 2]
    summary = json.loads((run / "run.json").read_text())
    assert (summary["epochs_done"], summary["best_epoch"], summary["hyperparameters"]) == (4, 2, SETTINGS)
    assert summary["last_test_accuracy_percent"] == 100 / 3
    assert (summary["data"], summary["device"], summary["threads"]) == ("none", "cpu", torch.get_num_threads())
    save(*start(tmp_path), 34.0)
    assert epochs_of(run, "last", "best") == [5, 5]
    before = files(run.folder)
    assert before.keys() == set(WRITTEN)
    for name in WRITTEN[1:]:  # lost, say, in a copy from elsewhere; the checkpoint has it all
        (run / name).unlink()
    (run / ".last.pt.123.tmp").write_text("half of what a process wrote that was killed")
    Run("small", "other images than it was trained on", tmp_path).resume(*trained())
    assert files(run.folder) == before


def test_a_file_that_another_program_keeps_open_does_not_end_the_run(tmp_path, capsys):
    """As a spreadsheet or a virus scanner does under Windows, where an open file cannot be replaced."""
    replace, (run, model, lists) = os.replace, start(tmp_path)

    def refuse(source, target):
        if pathlib.Path(target).name in ("checkpoint.pt", "history.csv"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    with patch.object(os, "replace", refuse):
        save(run, model, lists, 10.0)
    assert "history.csv" in capsys.readouterr().out and epochs_of(run, "last", "best") == [1, 1]
    save(run, model, lists, 20.0)
    assert files(run.folder).keys() == set(WRITTEN) and capsys.readouterr().out == ""
    assert start(tmp_path)[2][3] == [10.0, 20.0]


@pytest.mark.parametrize("place", range(len(WRITTEN)))
@pytest.mark.parametrize(("call", "failure"), [("fsync", OSError(errno.ENOSPC, "no room")), ("replace", SystemExit())])
def test_after_an_epoch_that_cannot_be_saved_the_run_resumes(call, failure, place, tmp_path):
    run, model, lists = start(tmp_path)
    save(run, model, lists, 10.0)
    before = files(run.folder)
    fails = {"wraps": getattr(os, call), "side_effect": [DEFAULT] * place + [failure]}
    with patch.object(os, call, **fails), pytest.raises(type(failure)) as raised:
        save(run, model, lists, 20.0)
    assert call == "replace" or "small" in str(raised.value)
    # What was not written is as it was, down to the byte, and nothing half written stays.
    same = {file for file, data in files(run.folder).items() if data == before[file]}
    assert files(run.folder).keys() == before.keys() and len(same) == len(WRITTEN) - place
    again, other, history = start(tmp_path)
    assert history[3] == [10.0, 20.0][: 1 + ("checkpoint.pt" not in same)]
    assert other[0].bias[0] == epochs_of(again, "last")[0] == len(history[3])
    run.save(*lists)  # in the first process, once there is room
    assert start(tmp_path)[2][3] == [10.0, 20.0]


def test_a_run_ends_with_one_line_that_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    run, model, lists = start(tmp_path, settings={"epochs": 3})
    save(run, model, lists, 10.0, 30.0)
    with pytest.raises(FloatingPointError, match=r"^the loss is nan$"), run:  # but an error is shown as it is
        raise FloatingPointError("the loss is nan")
    with pytest.raises(SystemExit) as script, run:  # Python prints the text that it holds, and exits with status 1
        raise KeyboardInterrupt
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(KeyboardInterrupt) as session, run:  # which lives on
        raise KeyboardInterrupt
    assert "epoch 2 of 3" in script.value.code and session.value._render_traceback_() == [script.value.code]
    assert "of 3" not in capsys.readouterr().out
    with run:
        save(run, model, lists, 20.0)
    assert "3 of 3" in (said := capsys.readouterr().out) and "20.00 %" in said


def test_a_run_has_a_folder_of_its_name_though_the_program_leaves_it_or_somebody_deletes_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Run("file", root=tmp_path)
    arguments = start(os.path.relpath(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "small")
    save(*arguments, 10.0)
    assert files(tmp_path / "small").keys() == set(WRITTEN)


def test_lists_that_do_not_follow_the_last_save_are_refused(tmp_path):
    run, model, good = start(tmp_path)
    save(run, model, good, 10.0)
    before, two = files(run.folder), [1.0, 1.0]
    for lists in ([[1.0]] * 4, [two, two, [1.0], two], [two, two, two, [1.0, float("nan")]]):
        with pytest.raises(ValueError, match="lists"):
            run.save(*lists)
    assert files(run.folder) == before
    save(run, model, good, 20.0)  # and the right ones are still taken


@pytest.mark.parametrize("value", [object(), {1: Run}, torch.float32])
def test_what_no_checkpoint_could_hold_is_refused_before_it_trains(value, tmp_path):
    run, (_, *parts) = Run("small", root=tmp_path), trained()
    with pytest.raises(TypeError, match="hyperparameters"):
        run.resume({"width": value}, *parts)
    parts[2].rates = np.linspace(0.1, 0.001, 9)
    with pytest.raises(TypeError, match="scheduler"):
        run.resume({}, *parts)
    assert not files(run.folder)
    del parts[2].rates
    run.resume({}, *parts)


def warm_up_and_fall(optimizer, epochs):
    return SequentialLR(optimizer, [LinearLR(optimizer), CosineAnnealingLR(optimizer, T_max=epochs)], milestones=[1])


def one_cycle(optimizer, epochs):
    return utils.get_scheduler(optimizer, "OneCycleLR", epochs=epochs, steps_per_epoch=2)


OTHER_RUNS = [  # (what the run was, what it is now, words of the refusal)
    ({}, {"settings": {"batch_size": 64, "optimizer": "SGD", "augment": True, "seed": 4}}, "batch_size 256 64 lr seed"),
    ({}, {"width": 5}, "out_features=5"),
    ({}, {"eps": 0.001}, "eps=0.001"),  # its weights would fit
    ({}, {"optimizer": "SGD"}, "optimizer Adam SGD"),
    ({}, {"scheduler": LinearLR, "total_iters": 5}, "scheduler StepLR LinearLR"),
    ({"settings": {"optimizer": "a"}}, {"settings": {"optimizer": "b"}}, "optimizer"),
    # The state of a schedule would bring its old length back: a cosine would rise again, others stay at zero.
    ({"scheduler": one_cycle, "epochs": 4}, {"scheduler": one_cycle, "epochs": 8}, "total_steps 8 16"),
    ({"scheduler": warm_up_and_fall, "epochs": 4}, {"scheduler": warm_up_and_fall, "epochs": 8}, "T_max"),
]


@pytest.mark.parametrize(("was", "now", "words"), OTHER_RUNS)
def test_another_run_is_refused_and_nothing_changed(was, now, words, tmp_path):
    run, model, lists = start(tmp_path, **was)
    save(run, model, lists, 11.0)
    arguments = trained(**now)
    before, files_before = states(arguments), files(run.folder)
    for refused in (run.check, run.resume):
        with pytest.raises(ValueError, match="another run") as refusal:
            refused(*arguments)
        assert all(word in str(refusal.value) for word in words.split()), refusal.value
    with pytest.raises(RuntimeError, match="resume"):
        save(run, model, lists, 12.0)
    assert states(arguments) == before and files(run.folder) == files_before
    assert start(tmp_path, **was)[2][3] == [11.0]
    assert Run("other", root=tmp_path).resume(*arguments) == ([], [], [], [])


def test_a_run_opened_again_resumes_with_what_it_has_trained(tmp_path):
    settings, model, optimizer, scheduler = trained()
    for epoch in range(3):
        run = Run("small", root=tmp_path)
        lists = run.resume(settings, model, optimizer, scheduler)
        assert len(lists[0]) == epoch
        optimizer.step()
        scheduler.step()  # from now on it is not as it was made
        save(run, model, lists, 10.0)
    optimizer.param_groups[0]["lr"] /= 2  # as the fall of a learning rate leaves it
    assert len(run.resume(settings, model, optimizer, StepLR(optimizer, 5))[0]) == 3
    with pytest.raises(ValueError, match="step_size"):
        start(tmp_path, step_size=9)


def test_a_checkpoint_that_holds_something_else_is_refused_and_changes_nothing(tmp_path):
    path = save(*start(tmp_path), 10.0) / "checkpoint.pt"
    good, arguments = load_weights(path), trained()
    before, other = states(arguments), {"torch": torch.zeros(3)}
    entries = {"history": [{"epoch": 1}], "model": other, "optimizer": None, "random": [other], "best": None}
    for content in (None, good["model"], good | {"history": 0}, *(good | {key: entries[key]} for key in entries)):
        path.write_bytes(data := serialized(content))
        with pytest.raises(ValueError, match=r"checkpoint\.pt"):
            Run("small", root=tmp_path).resume(*arguments)
        assert states(arguments) == before and path.read_bytes() == data, content
    good["made_by"]["versions"]["torch"] = "1.13.1"  # which prints the same network otherwise
    path.write_bytes(serialized(good | {"network": "Linear(another=wording)"}))
    assert start(tmp_path)[2][3] == [10.0]


def test_another_pretrained_model_keeps_its_weights_as_long_as_no_epoch_is_done(tmp_path):
    run, arguments = start(tmp_path)[0], trained()
    nn.init.constant_(arguments[1][0].bias, 7)
    run.resume(*arguments)
    assert arguments[1][0].bias.tolist() == [7] * 4


def test_a_run_resumes_in_another_wrapper_and_though_a_layer_prints_otherwise(tmp_path):
    compiled = functools.partial(torch.compile, backend="eager")
    wrappers = compiled, nn.DataParallel, lambda plain: plain, lambda plain: compiled(nn.DataParallel(plain))
    for epoch, wrap in enumerate(wrappers):
        inner = nn.Linear(1, 1)
        inner.extra_repr = lambda bias=inner.bias: f"{bias}, {object()}"  # what it learns, and an address
        inner.last = 2 * nn.init.zeros_(inner.bias)  # which cannot be copied
        model, run = wrap(inner), Run("wrapped", root=tmp_path)
        for _ in range(2):  # the cell is run again, and then all of them
            lists = run.resume({}, model, utils.get_optimizer(model, "AdamW"))
        assert len(lists[0]) == inner.bias == epoch
        nn.init.constant_(inner.bias, epoch + 1)
        run.save(*([*values, 1.0] for values in lists))
        weights = load_weights(run / "last.pt")
        assert weights.keys() == inner.state_dict().keys() and weights["bias"] == epoch + 1


@functools.cache
def loaders(workers=0):
    """Two batches to train on and two to test on."""
    options = {"batch_size": 8, "num_workers": workers}
    both = [utils.get_CIFARdataset_with_loader(split, options, "digits")[1] for split in ("train", "test")]
    for data in (loader.dataset for loader in both):
        data.images, data.labels = data.images[:16], data.labels[:16]
    return both


class Notebook:
    """What a notebook holds in memory: the cells up to that of the model are run; `train` is the training cell."""

    def __init__(self, root, loaders):
        self.run, self.loaders = Run("s9", root=root), loaders
        seed_everything(4)
        layers = nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.Conv2d(8, 10, 7)
        self.model = nn.Sequential(*layers, nn.Flatten(), nn.LogSoftmax(1))

    def train(self, epochs=3, lr=0.1, **stop):
        """Run the training cell, up to an epoch, or to where the stop button is pressed: {"train" or "test": batch}."""
        optimizer = utils.get_optimizer(self.model, lr=lr)
        scheduler = one_cycle(optimizer, 7)
        effects = ([DEFAULT] * stop.get(loop, 99) + [KeyboardInterrupt] for loop in ("train", "test"))
        losses = [Mock(wraps=utils.get_loss(), reduction="mean", side_effect=effect) for effect in effects]
        lists = self.run.resume({"epochs": epochs, "lr": lr}, self.model, optimizer, scheduler)
        for _ in range(len(lists[0]), epochs):
            utils.train(self.model, "cpu", self.loaders[0], optimizer, losses[0], *lists[:2], scheduler)
            utils.test(self.model, "cpu", self.loaders[1], losses[1], *lists[2:])
            self.run.save(*lists)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(workers, tmp_path, capsys):
    Notebook(tmp_path / "whole", loaders(workers)).train()
    for done in range(4):  # the last time, only to say that all is done
        capsys.readouterr()
        Notebook(tmp_path, loaders(workers)).train(epochs=min(done + 1, 3))
        assert (f"after epoch {done} of" in capsys.readouterr().out) == (done > 0)
    assert end_state(tmp_path / "s9") == end_state(tmp_path / "whole" / "s9")


# Each loop has two batches per epoch. In epoch 1 the settings may still change.
@pytest.mark.parametrize("loop, at, lr", [("train", 3, 0.1), ("test", 3, 0.1), ("train", 1, 0.1), ("test", 0, 0.2)])
def test_stopped_in_the_middle_of_an_epoch_it_ends_the_same(loop, at, lr, tmp_path):
    Notebook(tmp_path / "whole", loaders()).train(lr=lr)
    for _ in range(2):  # all cells are run again, and then the training cell
        notebook = Notebook(tmp_path, loaders())
        with pytest.raises(KeyboardInterrupt):
            notebook.train(**{loop: at})
    notebook.train(lr=lr)
    assert end_state(tmp_path / "s9") == end_state(tmp_path / "whole" / "s9")


def train_to_write(fatal, root, loaders):
    """SIGKILL ends this process when half of a file is written; its writes are counted from 0."""
    replace, writes = os.replace, itertools.count()

    def watched_replace(source, target):
        if next(writes) == fatal:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = watched_replace
    Notebook(root, loaders).train(epochs=7)


@pytest.mark.skipif(sys.platform != "linux", reason="processes that are not forked take long to start")
def test_killed_in_every_write_it_ends_as_if_nobody_had(processes, tmp_path):
    """Each process goes on from what the one before has left, and is killed in a later write, up to two epochs away."""
    Notebook(tmp_path / "whole", loaders()).train(epochs=7)
    folder, done = tmp_path / "s9", 0
    for write in itertools.count():
        process = processes.Process(target=train_to_write, args=(write, tmp_path, loaders()))
        process.start()
        process.join(300)
        whole = {path.stem: load_weights(path) for path in folder.glob("*.pt")}
        before, done = done, len(whole["checkpoint"]["history"]) if whole else 0
        rows = [row for table in folder.glob("history.csv") for row in table.read_text().splitlines()[1:]]
        assert process.exitcode in (0, -signal.SIGKILL) and done >= before
        assert done - len(rows) in (0, 1) and all(row.count(",") == 6 for row in rows), rows
        if process.exitcode == 0:
            break
    assert write > 8 and done == 7 and end_state(folder) == end_state(tmp_path / "whole" / "s9")


def hold(root, connection):
    """Hold the run "held" until somebody kills this process, and have loader workers, who have its files open too."""
    run, workers = Run("held", root=root), DataLoader(range(99), num_workers=2, multiprocessing_context="fork")
    for _ in workers:
        connection.send(run.name)
        connection.recv()


@pytest.mark.skipif(sys.platform != "linux", reason="processes that are not forked take long to start")
def test_a_run_is_of_one_process_and_free_at_once_when_that_is_killed(processes, tmp_path):
    """Its loader workers, which notice only after some seconds that nobody wants their batches, must not hold it."""
    here, there = processes.Pipe()
    process = processes.Process(target=hold, args=(tmp_path, there))
    process.start()
    there.close()
    assert here.poll(300) and here.recv() == "held"
    with pytest.raises(RuntimeError, match="held"):
        Run("held", root=tmp_path)
    Run("other", root=tmp_path)  # is nobody's business
    process.kill()
    process.join()
    Run("held", root=tmp_path)
    assert not here.poll()  # the workers still have the other end
