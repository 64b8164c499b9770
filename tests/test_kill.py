"""A run whose process is killed, or that two processes want, loses no epoch that was saved."""

import contextlib
import itertools
import sys
import time

import kill
import pytest
from conftest import end_state

from output import load_weights
from runs import Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes that are not forked take long to start")


def epochs_left(folder):
    """How many epochs the checkpoint holds; every file has to be whole."""
    weights = {path.name: load_weights(path) for path in folder.glob("*.pt")}
    history = weights["checkpoint.pt"]["history"] if "checkpoint.pt" in weights else []
    table = folder / "history.csv"
    rows = table.read_text().splitlines()[1:] if table.exists() else []
    assert len(history) - len(rows) in (0, 1) and all(row.count(",") == 6 for row in rows), rows
    return len(history)


def test_killed_in_every_write_it_ends_as_if_nobody_had(processes, tmp_path):
    """Each process goes on from what the one before has left, and is killed in a later write, up to two epochs away."""

    def train(*arguments):
        process = processes.Process(target=kill.train, args=arguments)
        process.start()
        process.join(300)
        return process.exitcode

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole) == 0 and epochs_left(whole) == kill.EPOCHS
    done = 0
    for write in itertools.count():
        if train(killed, write) == 0:
            break
        assert epochs_left(killed) >= done
        done = epochs_left(killed)
    assert write > 8 and end_state(killed) == end_state(whole)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


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
