"""A run whose process is killed or whose disk is full, or that two processes want, loses no epoch that was saved."""

import contextlib
import errno
import itertools
import os
import signal
import sys
import time

import kill
import pytest
import torch
from conftest import end_state
from torch import nn

from runs import Run, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

WRITTEN = ("checkpoint.pt", "history.csv", "run.json", "last.pt", "best.pt")  # in this order
STEPS = ("half written", "before replace", "after replace")


def epochs_left(folder):
    """How many epochs the checkpoint holds; every file has to be whole."""
    weights = {path.name: load_weights(path) for path in folder.glob("*.pt")}
    history = weights["checkpoint.pt"]["history"] if "checkpoint.pt" in weights else []
    table = folder / "history.csv"
    rows = table.read_text().splitlines()[1:] if table.exists() else []
    assert len(history) - len(rows) in (0, 1) and all(row.count(",") == 6 for row in rows), rows
    return len(history)


@pytest.mark.skipif(sys.platform != "linux", reason="35 processes that are not forked take minutes to start")
def test_killed_at_every_step_of_every_write_it_ends_as_if_nobody_had(processes, tmp_path):
    """Each process goes on from what the one before has left, and is killed at the next step."""

    def train(*arguments):
        process = processes.Process(target=kill.train, args=arguments)
        process.start()
        process.join(300)
        return process.exitcode

    whole, killed, epochs = tmp_path / "whole", tmp_path / "killed", 0
    assert train(whole) == 0 and epochs_left(whole) == kill.EPOCHS
    # A new run writes its start and the first epoch; any other the last epoch's files once more, and then the next.
    for writes in (("start", "checkpoint.pt"), (*WRITTEN[1:], *WRITTEN)):
        checkpoint = writes.index("checkpoint.pt")
        for number, step in itertools.product(range(len(writes)), STEPS):
            what = f"{step} in write {number}, of {writes[number]}"
            assert train(killed, number, step) == -signal.SIGKILL, what
            epochs += (number, step) == (checkpoint, "after replace") or number > checkpoint
            assert epochs_left(killed) == epochs, what
    assert 0 < epochs < kill.EPOCHS
    assert train(killed) == 0
    assert end_state(killed) == end_state(whole)
    assert {path.name for path in killed.iterdir()} == {".lock", *WRITTEN}


@pytest.mark.skipif(sys.platform != "linux", reason="loader workers are not forked, so they cannot hold it")
def test_a_run_is_of_one_process_and_free_at_once_when_that_is_killed(processes, tmp_path):
    """Its loader workers, which notice only after some seconds that nobody wants their batches, must not hold it."""
    here, there = processes.Pipe()
    process = processes.Process(target=kill.hold, args=(tmp_path, there))
    process.start()
    there.close()
    assert here.poll(300) and here.recv() == "held"
    with pytest.raises(RuntimeError, match=r"another process holds the run 'held'.*choose another RUN_NAME"):
        Run("held", root=tmp_path)
    Run("other", root=tmp_path)  # is nobody's business
    process.kill()
    for _ in range(1000):  # until it is dead
        with contextlib.suppress(RuntimeError):
            Run("held", root=tmp_path)
            break
        time.sleep(0.01)
    assert not here.poll()  # the workers still have the other end
    process.join()


# ---- in this process: a full disk, and the stop button -------------------------------------------------------------


def start(root):
    """A run of a network with one weight, resumed: (run, model, lists)."""
    model = nn.Linear(1, 1, bias=False)
    run = Run("small", root=root)
    return run, model, run.resume({}, model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))


def save(run, model, lists):
    """An epoch that leaves the weight at its number."""
    nn.init.constant_(model.weight, len(lists[0]) + 1)
    for values in lists:
        values.append(float(len(values) + 1))
    run.save(*lists)


def fail_in(name, call, failure, run, monkeypatch):
    """Let the next writing of a file fail when it is at "write", "fsync" or "replace"."""
    if call == "write":
        (run / f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
        return
    calls, real = itertools.count(), getattr(os, call)

    def fail(*arguments):
        if next(calls) == WRITTEN.index(name):
            raise failure
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)


def error(number):
    return OSError(number, os.strerror(number))


no_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
FAILURES = [
    pytest.param("write", error(errno.ENOSPC), marks=no_full_device),
    ("fsync", error(errno.EIO)),
    ("replace", error(errno.EDQUOT)),
    ("fsync", KeyboardInterrupt()),
    ("replace", KeyboardInterrupt()),
]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize(("call", "failure"), FAILURES)
def test_an_epoch_that_cannot_be_saved(call, failure, name, tmp_path, monkeypatch):
    run, model, lists = start(tmp_path)
    save(run, model, lists)
    before = {file: (run / file).read_bytes() for file in WRITTEN}
    with monkeypatch.context() as patch, pytest.raises(type(failure)) as raised:
        fail_in(name, call, failure, run, patch)
        save(run, model, lists)
    if isinstance(failure, OSError):
        assert raised.value.errno == failure.errno
        for words in (f"could not write {run / name}: {failure.strerror}", "is intact", "has room"):
            assert words in str(raised.value)

    # Files from the one that failed on are those of epoch 1, down to the byte, and nothing half written stays.
    failed = WRITTEN.index(name)
    assert [file for file in WRITTEN if (run / file).read_bytes() == before[file]] == list(WRITTEN[failed:])
    assert {path.name for path in run.folder.iterdir()} == {".lock", *WRITTEN}

    done = 2 if failed else 1  # the checkpoint counts, and is written first
    again, model, lists = start(tmp_path)
    assert lists[0] == [1.0, 2.0][:done] and model.weight.item() == done
    assert load_weights(again / "last.pt")["weight"].item() == done
    assert len((again / "history.csv").read_text().splitlines()) == done + 1
    save(again, model, lists)
    assert start(tmp_path)[1].weight.item() == done + 1


def test_the_epoch_can_be_saved_again_once_there_is_room(tmp_path, monkeypatch):
    run, model, lists = start(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_in("history.csv", "fsync", error(errno.ENOSPC), run, patch)
        save(run, model, lists)
    run.save(*lists)
    assert start(tmp_path)[2][0] == [1.0] and len((run / "history.csv").read_text().splitlines()) == 2


def test_a_full_disk_at_the_start_leaves_a_new_run(tmp_path, monkeypatch, capsys):
    run = Run("small", root=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"checkpoint\.pt.*No space left"):
        fail_in("checkpoint.pt", "fsync", error(errno.ENOSPC), run, patch)
        start(tmp_path)
    assert [path.name for path in run.folder.iterdir()] == [".lock"]
    assert start(tmp_path)[2] == ([], [], [], []) and capsys.readouterr().out.endswith("a new run\n")
