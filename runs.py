"""Run directories: what a training run leaves on disk, and how it goes on after an interruption.

    run = Run("s9")
    hyperparameters = {"lr": 0.2, "epochs": 80, ...}
    train_losses, train_acc, test_losses, test_acc = run.resume(hyperparameters, model, optimizer, scheduler)
    with run:
        for epoch in range(len(train_losses), 80):
            ...                                 # train, test, scheduler.step()
            run.save(train_losses, train_acc, test_losses, test_acc)

`runs/<name>/checkpoint.pt` is the one source of truth, replaced atomically at the start and after every epoch;
`history.csv`, `run.json`, `last.pt` and `best.pt` are written from it, and written again when the run is opened. Of the
processes of a `torchrun`, the first writes.
"""

import csv
import inspect
import io
import json
import math
import pathlib
import pickle
import platform
import random
import re
import sys
import time
import types
import warnings
import weakref
import zipfile
import zlib
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest

import filelock
import numpy as np
import torch

from epoch import check_lists
from output import in_notebook, write_atomically
from parallel import gather, rank, unwrap, world_size

COLUMNS = ("train_loss", "train_acc", "test_loss", "test_acc")
CHECKPOINT = "hyperparameters kinds network model optimizer scheduler random history best made_by".split()
MAY_CHANGE = ("epochs",)  # hyperparameters that leave a checkpoint meaningful

_FOLDERS = weakref.WeakKeyDictionary()  # {model: folders of the runs that it was resumed in}


def seed_everything(seed):
    """Seed every generator that training draws from: Python's, NumPy's and torch's, on all devices.

    Args:
        seed: a whole number from 0 to 2**32 - 1.
    """
    np.random.seed(seed)  # first, as the strictest
    random.seed(int(seed))  # which takes no whole number of NumPy
    torch.manual_seed(seed)


def load_weights(path):
    """Read a file of tensors that `torch.save` wrote, after a check of its checksums; no code in it is ever run.

    Raises:
        OSError: the file cannot be read, or there is none.
        ValueError: the file is damaged, or holds more than tensors and plain values.
    """
    data = pathlib.Path(path).read_bytes()  # whatever goes wrong from here on is in the bytes
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch itself does not check the CRCs
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zipfile, pickle and torch find wrong in arbitrary bytes
        foreign = isinstance(error, pickle.UnpicklingError)  # torch's text advises to load it without protection
        reason = "it holds more than tensors and plain values" if foreign else str(error).split("\n")[0]
        raise ValueError(
            f"{path} is damaged or is not a file of tensors written by torch.save ({reason}). Nothing was changed; "
            "put back a good copy, or delete it to start afresh"
        ) from None


class Stopped(KeyboardInterrupt):
    """An interrupt that a notebook shows as one line instead of a traceback."""

    def _render_traceback_(self):
        return [str(self)]


class Run:
    """The directory `<root>/<name>/` of one training run, held by one process at a time.

    As a context manager it prints, when the run ends or is interrupted, one line that says how far it is.

    Args:
        name: name of the run, and of its directory.
        data: a line that says which images it trains on, for `run.json`.
        root: where the runs are.

    Raises:
        ValueError: name is not a plain directory name.
        RuntimeError: another process trains under the same name.
        OSError: the directory cannot be made.
    """

    def __init__(self, name, data="", root="runs"):
        if not name.strip(".") or pathlib.Path(name).name != name:
            raise ValueError(f"run name {name!r} must be a plain directory name, without separators")
        self.name, self.data = name, data
        self.history = None  # a dict per epoch: epoch, lr, COLUMNS, seconds; resume sets it
        self.hyperparameters = {}
        self.displays = set()  # what a notebook shows of the run and updates in place
        self._shown = str(pathlib.Path(root) / name)
        self.folder = pathlib.Path(root).absolute() / name  # a later chdir must not lose an epoch
        if rank():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One lock per process and path, so that a notebook cell can be run again.
            self._lock = filelock.FileLock(self.folder / ".lock", timeout=0, is_singleton=True)
            self._lock.acquire()
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
        except filelock.Timeout:
            raise RuntimeError(
                f"another process holds the run {name!r} in {self.folder}, perhaps a notebook that is still open; "
                "end it or wait for it, or choose another RUN_NAME"
            ) from None
        except OSError as error:
            raise OSError(
                error.errno, f"cannot keep a run in {self.folder}: {error.strerror}; it must be a writable directory"
            ) from None

    def __str__(self):
        return self._shown

    def __truediv__(self, file_name):
        """Path of a file in the run's directory: `run / "curves.png"`."""
        return self.folder / file_name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        done, epochs = len(self.history or ()), self.hyperparameters.get("epochs", "?")
        if kind is KeyboardInterrupt:
            stopped = f"{self}: stopped after epoch {done} of {epochs}; run this again to go on from there"
            if in_notebook() or hasattr(sys, "ps1"):  # a session, which lives on
                raise Stopped(stopped) from None
            sys.exit(1 if rank() else stopped)
        if kind is None and done and rank() == 0:
            last, best = self.history[-1], self._best
            print(
                f"{self}: {done} of {epochs} epochs, test accuracy {last['test_acc']:.2f} % "
                f"(the best, after epoch {best['epoch']}: {best['test_acc']:.2f} %)"
            )

    def resume(self, hyperparameters, model, optimizer, scheduler=None):
        """Bring all three, and the random generators, to where the last complete epoch left them, if there was one.

        Args:
            hyperparameters: what defines the run, {name: number, string, bool or None}. A run goes on only with the
                same ones; "epochs" may differ, unless the scheduler needs it.
            model, optimizer, scheduler: new ones, made as at the run's start; `save` records them.

        Returns:
            (train_losses, train_acc, test_losses, test_acc): lists with an entry per epoch done, to append to.

        Raises:
            ValueError: the checkpoint is damaged, or of another network, optimizer or scheduler, or of other
                hyperparameters; nothing is changed.
            TypeError: hyperparameters, or the state of a scheduler, that no checkpoint can hold.
        """
        _check_hyperparameters(hyperparameters)
        if scheduler is None and "initial_lr" in optimizer.param_groups[0]:  # which schedulers leave there
            warnings.warn("the optimizer has a scheduler; give it to resume too, or it will start anew", stacklevel=2)
        self.hyperparameters = dict(hyperparameters)
        self._model, self._optimizer, self._scheduler = unwrap(model), optimizer, scheduler
        self.history = None  # so that save refuses, should this turn out to be another run
        checkpoint = gather(self._read_checkpoint() if rank() == 0 else None)[0]
        of_network = checkpoint and self._network_differences(checkpoint)
        differences = checkpoint and self._differences(checkpoint) + of_network
        if checkpoint and checkpoint["history"] and differences:
            more = f", and {len(differences) - 5} more differences" if len(differences) > 5 else ""
            raise ValueError(
                f"the checkpoint in {self.folder} is of another run: {'; '.join(differences[:5])}{more}. To start "
                f"afresh, choose another RUN_NAME or delete {self.folder}; to go on, put the old values back"
            )
        # A model that was stopped in epoch 1 is half-trained, and gets its first weights back; a new one keeps its own.
        earlier = _FOLDERS.get(self._model, ())
        stopped = checkpoint and self.folder in earlier and not of_network
        _FOLDERS[self._model] = {*earlier, self.folder}
        if checkpoint and (checkpoint["history"] or (stopped and not differences)):
            self._restore(checkpoint)
            done, epochs = len(self.history), hyperparameters.get("epochs", "?")
            self._say(f"going on after epoch {done} of {epochs}" if done else "starting again, from its first weights")
            self._start_epoch()
            self._export(checkpoint)
        else:
            if stopped:  # and then the settings were changed
                self._model.load_state_dict(checkpoint["model"])
                _set_random_state(checkpoint["random"])
            trained = " from the weights that an earlier run left in this model; make a new model to start afresh"
            self._say(f"a new run{trained if earlier and not stopped else ''}")
            self.history, self._best = [], None
            self._start_epoch()
            self._write(self._checkpoint())
            self._check_that_it_can_be_read()
        return tuple([row[column] for row in self.history] for column in COLUMNS)

    def save(self, train_losses, train_acc, test_losses, test_acc):
        """Record the epoch that has just ended, the last entry of each list, and everything needed to go on from it.

        Step a scheduler that counts epochs before you call this.

        Raises:
            ValueError: the lists are not one epoch longer than at the last save, in another order, or end in what is no
                finite number.
            RuntimeError: before `resume`.
            OSError: it could not be written; the last checkpoint is intact.
        """
        if self.history is None:
            raise RuntimeError("save before resume; resume says which model and hyperparameters the run is of")
        lists = (train_losses, train_acc, test_losses, test_acc)
        if {len(values) for values in lists} != {len(self.history) + 1}:
            raise ValueError(
                f"save got lists of {', '.join(str(len(values)) for values in lists)} epochs and {len(self.history)} "
                "are saved; it takes each list of resume with one entry appended"
            )
        check_lists([train_losses, test_losses], [train_acc, test_acc])
        row = {"epoch": len(self.history) + 1, "lr": self._lr}
        row |= {column: float(values[-1]) for column, values in zip(COLUMNS, lists)}
        if not all(map(math.isfinite, row.values())):
            raise ValueError(f"the epoch is {row}; save records finite numbers")
        row["seconds"] = round(time.monotonic() - self._epoch_start, 2)
        before = self.history, self._best
        self.history = [*self.history, row]
        if self._best is None or row["test_acc"] > self._best["test_acc"]:
            self._best = {"epoch": row["epoch"], "test_acc": row["test_acc"], "weights": self._weights()}
        try:
            checkpoint = self._checkpoint()
            self._write(checkpoint)
            self._export(checkpoint)
        except BaseException:
            self.history, self._best = before
            raise
        self._start_epoch()

    def _say(self, what):
        if rank() == 0:
            print(f"{self}: {what}")

    def _start_epoch(self):
        # A scheduler will have changed it when the epoch is saved.
        self._lr = float(self._optimizer.param_groups[0]["lr"])
        self._epoch_start = time.monotonic()

    def _read_checkpoint(self):
        """The checkpoint, or None if there is none yet."""
        path = self / "checkpoint.pt"
        if not path.exists():
            return None
        checkpoint = load_weights(path)
        missing = [key for key in CHECKPOINT if key not in checkpoint] if isinstance(checkpoint, dict) else CHECKPOINT
        if missing:
            raise ValueError(
                f"{path} is not a checkpoint of a run (no {missing[0]!r} in it); nothing was changed. Put back a good "
                "copy, or delete it to start afresh"
            )
        return checkpoint

    def _check_that_it_can_be_read(self):
        """Of a new run; a scheduler that somebody has written may hold anything."""
        try:
            self._read_checkpoint()
        except ValueError:
            (self / "checkpoint.pt").unlink(missing_ok=True)  # or it would stand in the way of the next start
            raise TypeError(
                f"{self} could not be resumed, as the state_dict of its model, optimizer or scheduler holds more than "
                "tensors, numbers, strings, lists and dicts of Python; let it hold these only"
            ) from None

    def _restore(self, checkpoint):
        self._model.load_state_dict(checkpoint["model"])
        for saved, given in zip(checkpoint["optimizer"]["param_groups"], self._optimizer.param_groups):
            # How it computes, not what: the checkpoint may come from another kind of device.
            saved |= {how: given[how] for how in ("foreach", "fused") if how in given}
        self._optimizer.load_state_dict(checkpoint["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(checkpoint["scheduler"])
        self.history, self._best = checkpoint["history"], checkpoint["best"]
        _set_random_state(checkpoint["random"])

    def _weights(self):
        return {name: value.detach().cpu().clone() for name, value in self._model.state_dict().items()}

    def _checkpoint(self):
        return {
            "hyperparameters": self.hyperparameters,
            "kinds": self._kinds(),
            "network": printed(self._model),
            "model": self._weights(),
            "optimizer": _plain(self._optimizer.state_dict()),
            "scheduler": _plain(self._scheduler.state_dict()) if self._scheduler else None,
            "random": gather(_random_state()),
            "history": self.history,
            "best": self._best,
            "made_by": self._made_by(),
        }

    def _write(self, checkpoint):
        if rank() == 0:
            self._write_file("checkpoint.pt", _serialized(checkpoint))

    def _write_file(self, name, data):
        try:
            write_atomically(self / name, data)
        except PermissionError as error:  # under Windows, while another program has it open
            print(f"{error}. The run goes on, and tries again after the next epoch or at the next start")

    def _export(self, checkpoint):
        """The files that people read, from the checkpoint."""
        history, best = checkpoint["history"], checkpoint["best"]
        if rank() or not history:
            return
        table = io.StringIO()
        writer = csv.DictWriter(table, history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        summary = {
            "name": self.name,
            "hyperparameters": self.hyperparameters,
            "network": checkpoint["network"],
            "epochs_done": len(history),
            "last_test_accuracy_percent": history[-1]["test_acc"],
            "best_test_accuracy_percent": best["test_acc"],
            "best_epoch": best["epoch"],
            "training_seconds": round(sum(row["seconds"] for row in history), 1),
            **checkpoint["made_by"],
        }
        self._write_file("history.csv", table.getvalue().encode())
        self._write_file("run.json", (json.dumps(summary, indent=2) + "\n").encode())
        self._write_file("last.pt", _serialized(checkpoint["model"]))
        self._write_file("best.pt", _serialized(best["weights"]))

    def _made_by(self):
        """When, with what and on what the last epoch was trained, which need not be the machine that opens the run."""
        device = next(self._model.parameters()).device
        return {
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": self.data,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in ("torch", "torchvision", "albumentations", "numpy")},
        }

    def _kinds(self):
        """What the states of optimizer and scheduler fit."""
        return {
            "optimizer": type(self._optimizer).__name__,
            "scheduler": type(self._scheduler).__name__ if self._scheduler else None,
        }

    def _differences(self, checkpoint):
        """What in the settings is not as in the checkpoint, in words."""
        saved, given = checkpoint["hyperparameters"], self.hyperparameters
        pairs = {
            key: (saved.get(key), given.get(key))
            for key in sorted(saved.keys() | given.keys())
            if key not in MAY_CHANGE
        }
        pairs |= {f"the {what}": (checkpoint["kinds"].get(what), kind) for what, kind in self._kinds().items()}
        pairs["the number of parameters in the optimizer"] = tuple(
            " + ".join(str(len(group["params"])) for group in groups)
            for groups in (checkpoint["optimizer"]["param_groups"], self._optimizer.param_groups)
        )
        pairs["the schedule in steps, which EPOCHS and the number of images decide,"] = (
            _schedule_steps(checkpoint["scheduler"]),
            _schedule_steps(self._scheduler.state_dict() if self._scheduler else None),
        )
        pairs["the number of processes"] = len(checkpoint["random"]), world_size()
        return [f"{what} was {then!r} and is {now!r}" for what, (then, now) in pairs.items() if then != now]

    def _network_differences(self, checkpoint):
        """What in the network is not as in the checkpoint, in words."""
        then, now = (
            {name: tuple(value.shape) for name, value in weights.items()}
            for weights in (checkpoint["model"], self._model.state_dict())
        )
        differences = [
            f"{name} of the network was {then.get(name, 'absent')} and is {now.get(name, 'absent')}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if printed_alike(checkpoint["made_by"]["versions"]):
            then, now = checkpoint["network"], printed(self._model)
            if then != now and not differences:  # perhaps a layer prints what it has learned
                own = self._weights()
                self._model.load_state_dict(checkpoint["model"])
                now = printed(self._model)
                self._model.load_state_dict(own)
            differences += [
                f"the network had {old.strip()} and has {new.strip()}"
                for old, new in zip_longest(then.splitlines(), now.splitlines(), fillvalue="nothing")
                if old != new
            ]
        return differences


def printed(model):
    """A network as text: its layers, and a checksum of what the forward of each class of its own does."""
    lines = [re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(model))]  # addresses change from process to process
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        forward = inspect.unwrap(kind.forward)
        if not kind.__module__.startswith("torch.") and hasattr(forward, "__code__"):
            checksum = zlib.crc32(_described(forward.__code__, forward.__doc__).encode())
            lines.append(f"{kind.__name__}.forward {checksum:08x}")
    return "\n".join(lines)


def _described(code, doc=None):
    """What a function does, wherever it stands in its file: its bytecode, its names and its constants."""
    constants = [
        _described(constant) if isinstance(constant, types.CodeType) else repr(constant)
        for constant in code.co_consts
        # The order of a set changes from process to process.
        if constant not in (None, doc) and not isinstance(constant, frozenset)
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def printed_alike(versions):
    """Whether the network of a run made with {package: version} would be printed the same way here."""
    here = {"python": platform.python_version(), "torch": version("torch")}
    return here == {package: versions.get(package) for package in here}


def _schedule_steps(state):
    """At which steps a scheduler and its parts change or end, from its state_dict."""
    state, names = state or {}, "total_steps T_max T_0 total_iters step_size milestones _milestones total_size".split()
    own = [list(state[name]) if name.endswith("milestones") else state[name] for name in names if name in state]
    return own + [steps for part in state.get("_schedulers", ()) for steps in _schedule_steps(part)]


def _check_hyperparameters(hyperparameters):
    for name, value in hyperparameters.items():
        # A subclass, such as NumPy's float64, would be saved but not load again; NaN is not even equal to itself.
        if type(value) not in (int, float, bool, str, type(None)) or value != value:
            raise TypeError(
                f"hyperparameter {name!r} is {value!r}, a {type(value).__name__}; it must be a number, string or bool "
                "of Python, or None"
            )


def _plain(value):
    """The same with Python's numbers in place of NumPy's, which `weights_only` does not load."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: _plain(part) for key, part in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _serialized(value):
    """What torch.save writes, in memory, so that a full disk is an ordinary OSError of one write."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _random_state():
    """States of the generators of Python, NumPy, torch and CUDA, in types that `weights_only` loads."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def _set_random_state(states):
    state = states[rank()]
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(tuple(tuple(part) if isinstance(part, list) else part for part in state["python"]))
