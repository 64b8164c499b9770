"""A run whose process is killed, or whose disk is full, goes on as if nothing had happened (the short version)."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runs

REPOSITORY = Path(runs.__file__).parent
WRITTEN = ("checkpoint.pt", "history.csv", "run.json", "last.pt", "best.pt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="benchmarks/kill.py forks")
def test_five_kills_and_three_full_disks_leave_no_trace():
    script = REPOSITORY / "benchmarks" / "kill.py"
    # With this seed two of the steps are in the write of the checkpoint, and so is one of the full disks.
    options = ("--random", "2", "--steps", "3", "--full", "3", "--seed", "174")
    result = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to the run never killed: yes" in result.stdout
    assert "2 at random moments" in result.stdout
    kills = int(result.stdout.split(" kills: ")[0].splitlines()[-1])
    assert kills >= 5, result.stdout
    assert "3 times a full disk" in result.stdout


HOLD = """
import sys, torch, runs
from torch.utils.data import DataLoader
run = runs.Run("killed", root=sys.argv[1])
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
lists = run.resume({}, model, optimizer)
[values.append(1.0) for values in lists]
run.save(*lists)
loader = DataLoader(range(1000), num_workers=2, persistent_workers=True)
iterator = iter(loader)
next(iterator)
print(*(worker.pid for worker in iterator._workers), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_run_goes_on_at_once_though_its_loader_workers_linger(tmp_path):
    """They notice only after some seconds that nobody wants their batches, and must not keep the run's lock for it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        output = [process.stdout.readline() for _ in range(2)]
        assert output[0].endswith("a new run\n"), output
        assert len(output[1].split()) == 2, output
        process.kill()
        process.wait()
        model = torch.nn.Linear(1, 1)
        run = runs.Run("killed", root=tmp_path)
        lists = run.resume({}, model, torch.optim.SGD(model.parameters(), lr=0.5))
    assert lists == ([1.0], [1.0], [1.0], [1.0])


# ---- a full disk, in this process ---------------------------------------------------------------------------------


def start(root):
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    run = runs.Run("full", root=root)
    return run, model, run.resume({"epochs": 3}, model, optimizer)


def save(run, model, lists):
    for values in lists:
        values.append(float(len(values) + 1))
    with torch.no_grad():
        model.weight.fill_(len(lists[0]))
    run.save(*lists)


class FullFile:
    """A file on a disk that has room for ten more bytes."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        self.file.write(data[:10])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def fill_disk(monkeypatch, call, name):
    """Let one call fail for one file from now on: "write", "fsync" or "replace"."""
    opened = {}  # file descriptor: path
    real = {"open": open, "fsync": os.fsync, "replace": os.replace}

    def watched_open(path, mode="r", *arguments, **options):
        file = real["open"](path, mode, *arguments, **options)
        if set(mode) & set("wxa"):
            opened[file.fileno()] = str(path)
            if call == "write" and name in str(path):
                return FullFile(file)
        return file

    def fsync(descriptor):
        if call == "fsync" and name in opened.get(descriptor, ""):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real["fsync"](descriptor)

    def replace(source, target):
        if call == "replace" and Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real["replace"](source, target)

    monkeypatch.setattr(runs, "open", watched_open, raising=False)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_full_disk(call, name, tmp_path, monkeypatch):
    run, model, lists = start(tmp_path)
    save(run, model, lists)
    before = {file: (run / file).read_bytes() for file in WRITTEN}
    with monkeypatch.context() as patched:
        fill_disk(patched, call, name)
        with pytest.raises(OSError) as full:
            save(run, model, lists)
    assert full.value.errno == errno.ENOSPC
    for words in (str(run / name), os.strerror(errno.ENOSPC), "intact"):
        assert words in str(full.value)

    # Files from the one that failed on are those of epoch 1, down to the byte, and there is nothing half written.
    failed = WRITTEN.index(name)
    for file in WRITTEN[failed:]:
        assert (run / file).read_bytes() == before[file], file
    for file in WRITTEN[:failed]:
        assert (run / file).read_bytes() != before[file], file
    assert {path.name for path in run.folder.iterdir()} == {".lock", *WRITTEN}

    done = 2 if failed else 1  # the checkpoint counts, and is written first
    run, model, lists = start(tmp_path)
    assert lists[0] == [1.0, 2.0][:done] and model.weight.item() == done
    save(run, model, lists)
    _, model, lists = start(tmp_path)
    assert lists[0] == [1.0, 2.0, 3.0][: done + 1] and model.weight.item() == done + 1
    assert runs.load_weights(run / "last.pt")["weight"].item() == done + 1
    assert len((run / "history.csv").read_text().splitlines()) == done + 2


def test_full_disk_at_the_first_save_leaves_a_new_run(tmp_path, monkeypatch, capsys):
    run, model, lists = start(tmp_path)
    with monkeypatch.context() as patched:
        fill_disk(patched, "write", "checkpoint.pt")
        with pytest.raises(OSError, match=r"checkpoint\.pt.*No space left"):
            save(run, model, lists)
    assert [path.name for path in run.folder.iterdir()] == [".lock"]
    _, _, lists = start(tmp_path)
    assert lists == ([], [], [], []) and capsys.readouterr().out.endswith("a new run\n")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, monkeypatch):
    run, model, lists = start(tmp_path)
    save(run, model, lists)
    monkeypatch.setattr(Path, "unlink", lambda *arguments, **options: None)  # as if killed before it could tidy up
    fill_disk(monkeypatch, "write", "checkpoint.pt")
    with pytest.raises(OSError):
        save(run, model, lists)
    monkeypatch.undo()
    assert len(list(run.folder.iterdir())) == len(WRITTEN) + 2
    start(tmp_path)
    assert {path.name for path in run.folder.iterdir()} == {".lock", *WRITTEN}
