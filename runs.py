"""Run directories: what a training run leaves on disk, and how it goes on after an interruption.

    run = Run("s9")
    hyperparameters = {"lr": 0.2, "epochs": 80, ...}
    train_losses, train_acc, test_losses, test_acc = run.resume(hyperparameters, model, optimizer, scheduler)
    for epoch in range(len(train_losses), 80):
        ...                                     # train, test, scheduler.step()
        run.save(train_losses, train_acc, test_losses, test_acc)

`runs/<name>/checkpoint.pt` is the one source of truth, replaced atomically after every epoch; `history.csv`,
`run.json`, `last.pt` and `best.pt` are written from it, and written again when the run is opened.
"""

import contextlib
import copy
import csv
import io
import json
import math
import os
import pathlib
import pickle
import platform
import random
import time
import weakref
import zipfile
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest

import filelock
import numpy as np
import torch

COLUMNS = ("train_loss", "train_acc", "test_loss", "test_acc")
CHECKPOINT = ("hyperparameters", "kinds", "network", "model", "optimizer", "scheduler", "random", "history", "best")
MAY_CHANGE = ("epochs",)  # hyperparameters that leave a checkpoint meaningful
KINDS = {"optimizer": "the optimizer", "scheduler": "the scheduler"}

_STARTS = weakref.WeakKeyDictionary()  # {model: {folder: weights and random state before epoch 1, None if unknown}}


def seed_everything(seed):
    """Seed every generator that training draws from: Python's, NumPy's and torch's, on all devices.

    Raises:
        ValueError: seed is not a whole number from 0 to 2**32 - 1, the range that NumPy takes.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def write_atomically(path, data):
    """Write bytes to path so that it holds either all of them or what it held before.

    Raises:
        OSError: they could not be written (full or read-only disk); the old file, if any, is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = (
            f"could not write {path}: {error.strerror}. What was there before is intact; see that the folder "
            "exists, can be written to and has room"
        )
        raise OSError(error.errno, reason) from None
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too, and has had its error
            partial.unlink(missing_ok=True)


def load_weights(path):
    """Read a file of tensors that `torch.save` wrote, after a check of its checksums; no code in it is ever run.

    Raises:
        OSError: the file cannot be read, or there is none.
        ValueError: the file is damaged, or holds more than tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not check the CRCs
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot read the weights in {path}: {error.strerror}") from None
    except Exception as error:  # whatever zipfile, pickle and torch find wrong in arbitrary bytes
        foreign = isinstance(error, pickle.UnpicklingError)  # torch's text advises to load it without protection
        reason = "it holds more than tensors and plain values" if foreign else str(error).split("\n")[0]
        raise ValueError(
            f"{path} is damaged or is not a file of tensors written by torch.save ({reason}). Nothing was changed; "
            "put back a good copy, or delete it to start afresh"
        ) from None


class Run:
    """The directory `<root>/<name>/` of one training run, held by one process at a time.

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
        if not isinstance(name, str) or not name.strip(".") or pathlib.Path(name).name != name or "\0" in name:
            raise ValueError(f"run name {name!r} must be a plain directory name, without separators")
        self.name, self.data = name, data
        self._history = None  # resume sets it, and what it belongs to
        self._shown = str(pathlib.Path(root) / name)
        self.folder = pathlib.Path(root).absolute() / name  # a later chdir must not lose an epoch
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One lock a process and path, so that a notebook cell can be run again.
            self._lock = filelock.FileLock(self.folder / ".lock", timeout=0, is_singleton=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise RuntimeError(
                f"another process holds the run {name!r} in {self.folder}, perhaps a notebook that is still open; "
                "end it or wait for it, or choose another RUN_NAME"
            ) from None
        except OSError as error:
            raise OSError(
                error.errno, f"cannot keep a run in {self.folder}: {error.strerror}; it must be a writable directory"
            ) from None
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()

    def __str__(self):
        return self._shown

    def __truediv__(self, file_name):
        """Path of a file in the run's directory: `run / "curves.png"`."""
        return self.folder / file_name

    def resume(self, hyperparameters, model, optimizer, scheduler=None):
        """Bring all three, and the random generators, to where the last complete epoch left them, if there was one.

        Args:
            hyperparameters: what defines the run, {name: number, string, bool or None}. A run goes on only with the
                same ones; "epochs" may differ, unless the scheduler needs it.
            model, optimizer, scheduler: new ones, made as at the run's start; `save` records them.

        Returns:
            (train_losses, train_acc, test_losses, test_acc): lists with an entry an epoch done, to append to.

        Raises:
            ValueError: the checkpoint is damaged, or of another network, optimizer or scheduler, or of other
                hyperparameters; nothing is changed.
            TypeError: hyperparameters that no checkpoint can hold, or arguments in another order.
        """
        _check_hyperparameters(hyperparameters)
        if not isinstance(model, torch.nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"resume got a {type(model).__name__} as model and a {type(optimizer).__name__} as optimizer; it takes "
                "hyperparameters, model, optimizer and scheduler, in this order"
            )
        self.hyperparameters = dict(hyperparameters)
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._history = None  # save waits until it is clear that this is the same run
        starts = _STARTS.setdefault(model, {})
        checkpoint_path = self / "checkpoint.pt"
        if not checkpoint_path.exists():
            if starts.get(self.folder):  # stopped in epoch 1, and started again: not with half-trained weights
                weights, random_state = starts[self.folder]
                model.load_state_dict(weights)
                _set_random_state(random_state)
                print(f"{self}: a new run, once more from the weights that this model had at its start")
            else:
                trained = " from the weights that another run left in this model; make a new model to start afresh"
                print(f"{self}: a new run{trained if starts else ''}")
                starts[self.folder] = copy.deepcopy(model.state_dict()), _random_state()
            self._history, self._best = [], None  # a dict an epoch: lr and seconds, beside COLUMNS
            self._start_epoch()
            return [], [], [], []
        checkpoint = load_weights(checkpoint_path)
        missing = [key for key in CHECKPOINT if key not in checkpoint] if isinstance(checkpoint, dict) else CHECKPOINT
        if missing or not checkpoint["history"]:
            raise ValueError(
                f"{checkpoint_path} is not a checkpoint of a run (no {missing[0] if missing else 'epoch'!r} in it); "
                "nothing was changed. Put back a good copy, or delete it to start afresh"
            )
        self._refuse_other_run(checkpoint)
        model.load_state_dict(checkpoint["model"])
        for saved, given in zip(checkpoint["optimizer"]["param_groups"], optimizer.param_groups):
            # How it computes, not what: the checkpoint may come from another kind of device.
            saved |= {how: given[how] for how in ("foreach", "fused") if how in given}
        optimizer.load_state_dict(checkpoint["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(checkpoint["scheduler"])
        starts.setdefault(self.folder)
        self._history, self._best = checkpoint["history"], checkpoint["best"]
        _set_random_state(checkpoint["random"])
        self._start_epoch()
        self._export(checkpoint)
        print(f"{self}: going on after epoch {len(self._history)} of {self.hyperparameters.get('epochs', '?')}")
        return tuple([row[column] for row in self._history] for column in COLUMNS)

    def save(self, train_losses, train_acc, test_losses, test_acc):
        """Record the epoch that has just ended, the last entry of each list, and everything needed to go on from it.

        Raises:
            ValueError: the lists are not one epoch longer than at the last save, or end in what is no finite number.
            RuntimeError: before `resume`.
            OSError: it could not be written; the last checkpoint is intact.
        """
        if self._history is None:
            raise RuntimeError("save before resume; resume says which model and hyperparameters the run is of")
        lists = (train_losses, train_acc, test_losses, test_acc)
        if {len(values) for values in lists} != {len(self._history) + 1}:
            raise ValueError(
                f"save got lists of {', '.join(str(len(values)) for values in lists)} epochs and {len(self._history)} "
                "are saved; it takes each list of resume with one entry appended"
            )
        row = {"epoch": len(self._history) + 1, "lr": self._lr}
        row |= {column: _finite(column, values[-1]) for column, values in zip(COLUMNS, lists)}
        row["seconds"] = round(time.monotonic() - self._epoch_start, 2)
        history = [*self._history, row]
        weights = {name: value.detach().cpu().clone() for name, value in self._model.state_dict().items()}
        best = self._best
        if best is None or row["test_acc"] > best["test_acc"]:
            best = {"epoch": row["epoch"], "test_acc": row["test_acc"], "weights": weights}
        checkpoint = {
            "hyperparameters": self.hyperparameters,
            "kinds": self._kinds(),
            "network": repr(self._model),
            "model": weights,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict() if self._scheduler else None,
            "random": _random_state(),
            "history": history,
            "best": best,
            "made_by": self._made_by(),
        }
        write_atomically(self / "checkpoint.pt", _serialized(checkpoint))
        self._history, self._best = history, best
        self._export(checkpoint)
        self._start_epoch()

    def _start_epoch(self):
        # A scheduler will have changed it when the epoch is saved.
        self._lr = float(self._optimizer.param_groups[0]["lr"])
        self._epoch_start = time.monotonic()

    def _export(self, checkpoint):
        """The files that people read, from the checkpoint."""
        history, best = checkpoint["history"], checkpoint["best"]
        table = io.StringIO()
        writer = csv.DictWriter(table, history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        saved = (self / "checkpoint.pt").stat().st_mtime
        summary = {
            "name": self.name,
            "hyperparameters": self.hyperparameters,
            "epochs_done": len(history),
            "last_test_accuracy_percent": history[-1]["test_acc"],
            "best_test_accuracy_percent": best["test_acc"],
            "best_epoch": best["epoch"],
            "training_seconds": round(sum(row["seconds"] for row in history), 1),
            "saved": datetime.fromtimestamp(saved, UTC).isoformat(timespec="seconds"),
            **checkpoint.get("made_by", {}),  # which older checkpoints lack
        }
        files = {
            "history.csv": table.getvalue().encode(),
            "run.json": (json.dumps(summary, indent=2) + "\n").encode(),
            "last.pt": _serialized(checkpoint["model"]),
            "best.pt": _serialized(best["weights"]),
        }
        for name, data in files.items():
            try:
                write_atomically(self / name, data)
            except PermissionError as error:  # under Windows, while another program has it open
                print(f"{error}; the run goes on, and writes it after the next epoch or at the next start")

    def _made_by(self):
        """What the last epoch was trained with and on, which need not be the machine that opens the run."""
        device = next(self._model.parameters()).device
        return {
            "data": self.data,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in ("torch", "torchvision", "albumentations", "numpy")},
        }

    def _kinds(self):
        """What the states of optimizer and scheduler fit, by the keys of KINDS."""
        return {
            "optimizer": type(self._optimizer).__name__,
            "scheduler": type(self._scheduler).__name__ if self._scheduler else None,
        }

    def _refuse_other_run(self, checkpoint):
        saved, given = checkpoint["hyperparameters"], self.hyperparameters
        differences = [
            f"{key} was {saved.get(key)!r} and is {given.get(key)!r}"
            for key in sorted(saved.keys() | given.keys())
            if key not in MAY_CHANGE and saved.get(key) != given.get(key)
        ]
        differences += [
            f"{KINDS[what]} was {checkpoint['kinds'].get(what)} and is {kind}"
            for what, kind in self._kinds().items()
            if checkpoint["kinds"].get(what) != kind
        ]
        then, now = map(_group_sizes, (checkpoint["optimizer"]["param_groups"], self._optimizer.param_groups))
        if then != now:
            differences.append(f"the number of parameters in the optimizer was {then} and is {now}")
        then = _schedule_length(checkpoint["scheduler"])
        now = _schedule_length(self._scheduler.state_dict() if self._scheduler else None)
        if then != now:
            differences.append(
                f"the length of the schedule in steps, which EPOCHS and the number of images decide, was {then} and is "
                f"{now}"
            )
        shapes = {name: tuple(value.shape) for name, value in checkpoint["model"].items()}
        now = {name: tuple(value.shape) for name, value in self._model.state_dict().items()}
        differences += [
            f"{name} of the network was {shapes.get(name, 'absent')} and is {now.get(name, 'absent')}"
            for name in sorted(shapes.keys() | now.keys())
            if shapes.get(name) != now.get(name)
        ]
        # Another version of torch may print the same layers otherwise.
        if checkpoint.get("made_by", {}).get("versions", {}).get("torch") == version("torch"):
            then, now = checkpoint["network"].splitlines(), repr(self._model).splitlines()
            differences += [
                f"a layer was {old.strip()} and is {new.strip()}"
                for old, new in zip_longest(then, now, fillvalue="nothing")
                if old != new
            ]
        if differences:
            more = f", and {len(differences) - 5} more differences" if len(differences) > 5 else ""
            raise ValueError(
                f"the checkpoint in {self.folder} is of another run: {'; '.join(differences[:5])}{more}. To start "
                f"afresh, choose another RUN_NAME or delete {self.folder}; to go on, put the old values back"
            )


def _group_sizes(param_groups):
    """How many parameters an optimizer has, group by group, such as "16 + 28"."""
    return " + ".join(str(len(group["params"])) for group in param_groups)


def _schedule_length(state):
    """The steps that a scheduler is made for, from its state_dict; None for one that can go on for ever."""
    return next((state[name] for name in ("total_steps", "T_max", "total_iters") if name in (state or {})), None)


def _check_hyperparameters(hyperparameters):
    if not isinstance(hyperparameters, dict):
        raise TypeError(f"hyperparameters is a {type(hyperparameters).__name__}; it must be a dict")
    for name, value in hyperparameters.items():
        # A subclass, such as NumPy's float64, would be saved but not load again; NaN is not even equal to itself.
        if type(value) not in (int, float, bool, str, type(None)) or value != value:
            raise TypeError(
                f"hyperparameter {name!r} is {value!r}, a {type(value).__name__}; it must be a number, string or bool "
                "of Python, or None"
            )


def _finite(column, value):
    if isinstance(value, str) or not math.isfinite(value):
        raise ValueError(f"the last {column} is {value!r}; save records finite numbers")
    return float(value)


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


def _set_random_state(state):
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(tuple(tuple(part) if isinstance(part, list) else part for part in state["python"]))
