"""Run folders: what a training run leaves on disk, and how it resumes after an interruption.

All that a run resumes from is in `checkpoint.pt`, replaced after every epoch; the other files are written from it.
"""

import contextlib
import copy
import errno
import io
import json
import math
import pathlib
import platform
import random
import re
import sys
import time
from importlib.metadata import version

import filelock
import numpy as np
import torch

from devices import gather, rank, unwrap, world_size
from output import in_notebook, load_weights, serialized, write_atomically

COLUMNS = ("train_loss", "train_acc", "test_loss", "test_acc")
# What torch's schedulers call their lengths, which no step changes and a load_state_dict would bring back.
LENGTHS = ("step_size", "milestones", "T_max", "T_0", "total_iters", "total_steps", "steps_per_epoch")


def seed_everything(seed):
    """Seed Python, NumPy and torch with a whole number from 0 to 2**32 - 1, each process of a `torchrun` apart."""
    np.random.seed(seed + rank())  # first, as the strictest
    random.seed(int(seed) + rank())  # which takes no whole number of NumPy
    torch.manual_seed(seed + rank())


class Run(contextlib.AbstractContextManager):
    """The folder `<root>/<name>/` of one training run, held by one process at a time, else RuntimeError.

    Example:
        >>> run, settings = Run("s9", data="CIFAR-10"), {"lr": 0.2, "epochs": 80}  # data: a line for run.json
        >>> train_losses, train_acc, test_losses, test_acc = run.resume(settings, model, optimizer, scheduler)
        >>> with run:  # prints a line at the end, or when it is interrupted
        ...     for epoch in range(len(train_losses), 80):
        ...         ...  # train and test
        ...         run.save(train_losses, train_acc, test_losses, test_acc)
    """

    def __init__(self, name, data="", root="runs"):
        self.name, self.data, self._shown = name, data, str(pathlib.Path(root) / name)
        self.folder = pathlib.Path(root).absolute() / name  # a later chdir must not lose an epoch
        self.history, self.hyperparameters = None, {}  # a dict per epoch: epoch, lr, COLUMNS, seconds; resume sets it
        self.displayed, self._parts, self._identity = False, {}, {}  # displayed: by post_progress
        if rank():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One lock per process and path, so that a notebook cell can be run again.
            self._lock = filelock.FileLock(self / ".lock", timeout=0, is_singleton=True, fallback_to_soft=False)
            self._lock.acquire()
        except filelock.Timeout:
            raise RuntimeError(f"another process holds {self.folder}; end it, or choose another RUN_NAME") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK):
                raise
            print(f"{self}: this drive has no file locks; do not train the same run in two processes")
        for leftover in filter(pathlib.Path.is_file, self.folder.glob(".*.tmp")):
            leftover.unlink()

    def __str__(self):
        return self._shown

    def __truediv__(self, file_name):
        """Path of a file in the run's folder: `run / "curves.png"`."""
        return self.folder / file_name

    def __exit__(self, kind, error, traceback):
        done, epochs = len(self.history or ()), self.hyperparameters.get("epochs", "?")
        if kind is KeyboardInterrupt:
            stopped = f"{self}: stopped after epoch {done} of {epochs}; run this again to resume"
            if not in_notebook() and not hasattr(sys, "ps1"):
                sys.exit(1 if rank() else stopped)
            interrupt = KeyboardInterrupt(stopped)  # of a session, which lives on; IPython shows it as one line
            interrupt._render_traceback_ = lambda: [stopped]
            raise interrupt from None
        if kind is None and done:
            print(f"{self}: {done} of {epochs} epochs, test accuracy {self.history[-1]['test_acc']:.2f} %")

    def check(self, hyperparameters, model, optimizer, scheduler=None):
        """Raise what `resume` would raise of another run, and change nothing."""
        self._find(hyperparameters, model, optimizer, scheduler)

    def _find(self, hyperparameters, model, optimizer, scheduler):
        """(identity of this run, the checkpoint to resume from or None)."""
        known, path = unwrap(model) is self._parts.get("model"), self / "checkpoint.pt"
        kinds = {"the optimizer": type(optimizer).__name__, "the scheduler": type(scheduler).__name__}
        identity = {
            "hyperparameters": _plain(dict(hyperparameters)),
            "kinds": kinds | {"the number of processes": world_size()},
            # As it was at first: a layer may print what it has learned since.
            "network": self._identity["network"] if known else printed(unwrap(model)),
        }
        exists, found = gather((True, load_weights(path)) if rank() == 0 and path.exists() else (False, None))[0]
        if not exists:
            return identity, None
        with _fitting(path):
            whole = found["made_by"]["versions"]["torch"] == version("torch")  # another one prints a network otherwise
            then = _flat(found["identity"], found.get("scheduler"), whole)
            now = _flat(identity, scheduler and scheduler.state_dict(), whole)
            names = [name for name in {**then, **now} if then.get(name) != now.get(name) and name != "epochs"]
            differences = [f"{name} {then.get(name)!r} → {now.get(name)!r}" for name in sorted(names)]
            [float(row[column]) for row in found["history"] for column in COLUMNS] + [float(found["best"]["test_acc"])]
        if differences:
            more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
            what = f"the checkpoint in {self.folder} is of another run: {'; '.join(differences[:5])}{more}"
            raise ValueError(f"{what}. Put the old values back, or choose another RUN_NAME")
        return identity, found

    def resume(self, hyperparameters, model, optimizer, scheduler=None):
        """Bring all three, and the random generators, to where the last complete epoch left them, or back to the start.

        Nothing is changed if the checkpoint is damaged or of another run (ValueError). TypeError if none can be made.

        Args:
            hyperparameters: what defines the run, {name: number, string, bool or None}. A run resumes only with the
                same ones; "epochs" may differ, unless the scheduler was made for them.
            model, optimizer, scheduler: made as at the run's start. A generator of a loader is yours to restore.

        Returns:
            (train_losses, train_acc, test_losses, test_acc), lists with an entry per epoch done, to append to.
        """
        self.history = self._best = None  # so that save refuses, should this turn out to be another run
        identity, checkpoint = self._find(hyperparameters, model, optimizer, scheduler)
        parts = {"model": unwrap(model), "optimizer": optimizer, "scheduler": scheduler}
        again = parts["model"] is self._parts.get("model")
        unchanged = (identity, parts) == (self._identity, self._parts)
        self._identity, self._parts, self.hyperparameters = identity, parts, dict(hyperparameters)
        now = [(part, copy.deepcopy(part.state_dict())) for part in parts.values() if part is not None], _random_state()
        if not again:
            self._start = now
        if checkpoint:
            with _fitting(self / "checkpoint.pt", otherwise=lambda: _restore(*now)):
                states = [(part, checkpoint[name]) for name, part in parts.items() if part is not None]
                _restore(states, checkpoint["random"][rank()])
            self.history, self._best = checkpoint["history"], checkpoint["best"]
            print(f"{self}: resumed after epoch {len(self.history)} of {hyperparameters.get('epochs', '?')}")
            self._export(checkpoint)
        else:
            if again:
                states, random_state = self._start
                _restore(states if unchanged else states[:1], random_state)  # the model's, under other settings
            try:  # read it back now, and not at the first resume
                torch.load(io.BytesIO(serialized(self._checkpoint([]))), weights_only=True)
                json.dumps(self.hyperparameters)
            except Exception:
                self._parts = {}  # or the next call would bring this state back
                kinds = "hyperparameters, or the state_dict of model, optimizer or scheduler"
                raise TypeError(f"{self} could not be resumed: its {kinds} hold more than plain values") from None
            self.history = []
            print(f"{self}: a new run")
        self._start_epoch()
        return tuple([row[column] for row in self.history] for column in COLUMNS)

    def save(self, train_losses, train_acc, test_losses, test_acc):
        """Record the epoch that has just ended, the last entry of each list; step a scheduler that counts epochs first.

        After an OSError, as of a full disk, the last checkpoint is intact.
        """
        if self.history is None:
            raise RuntimeError("save before resume; resume says which model and hyperparameters the run is of")
        done, lists = len(self.history), (train_losses, train_acc, test_losses, test_acc)
        row = {"epoch": done + 1, "lr": self._lr}
        row |= {column: float(values[-1]) for column, values in zip(COLUMNS, lists) if len(values) == done + 1}
        row["seconds"] = round(time.monotonic() - self._epoch_start, 2)
        if not all(math.isfinite(row.get(column, math.nan)) for column in COLUMNS):
            got = [values[done:] for values in lists]
            raise ValueError(f"since the last save, each of resume's lists must get one finite number; they got {got}")
        checkpoint = self._checkpoint([*self.history, row])
        if self._best is None or row["test_acc"] > self._best["test_acc"]:
            checkpoint["best"] = {"epoch": done + 1, "test_acc": row["test_acc"], "weights": checkpoint["model"]}
        self._write("checkpoint.pt", serialized(checkpoint))
        self._export(checkpoint)
        self.history, self._best = checkpoint["history"], checkpoint["best"]
        self._start_epoch()

    def _start_epoch(self):
        self._lr = float(self._parts["optimizer"].param_groups[0]["lr"])  # a scheduler will have changed it by then
        self._epoch_start = time.monotonic()

    def _checkpoint(self, history):
        """Everything that a run resumes from."""
        state = self._parts["model"].state_dict()  # which may have more than tensors, by get_extra_state
        weights = {name: copy.deepcopy(v.detach().cpu() if torch.is_tensor(v) else v) for name, v in state.items()}
        device = next(self._parts["model"].parameters()).device
        packages = ("torch", "torchvision", "albumentations", "numpy")
        states = {name: _plain(part.state_dict()) for name, part in self._parts.items() if part is not None}
        return {
            "identity": self._identity,
            **states,
            "model": weights,
            "random": gather(_random_state()),
            "history": history,
            "best": self._best,
            # The last epoch, which need not be of the machine that resumes the run.
            "made_by": {
                "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "data": self.data,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "threads": torch.get_num_threads(),
                "platform": platform.platform(),
                "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            },
        }

    def _write(self, name, data):
        if rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)  # should somebody have deleted it meanwhile
        try:
            write_atomically(self / name, data)
        except PermissionError as error:  # under Windows, while another program has it open
            print(f"{error}. The run goes on, and tries again after the next epoch or at the next start")

    def _export(self, checkpoint):
        """The files that people read, from the checkpoint."""
        history, best = checkpoint["history"], checkpoint["best"]
        summary = {
            "name": self.name,
            "hyperparameters": self.hyperparameters,
            "network": self._identity["network"],
            "epochs_done": len(history),
            "last_test_accuracy_percent": history[-1]["test_acc"],
            "best_epoch": best["epoch"],
            **checkpoint["made_by"],
        }
        table = [history[0].keys(), *(row.values() for row in history)]
        self._write("history.csv", "".join(",".join(map(str, line)) + "\n" for line in table).encode())
        self._write("run.json", (json.dumps(summary, indent=2) + "\n").encode())
        self._write("last.pt", serialized(checkpoint["model"]))
        self._write("best.pt", serialized(best["weights"]))


@contextlib.contextmanager
def _fitting(path, otherwise=lambda: None):
    """What a checkpoint holds fits; else there is a ValueError, and `otherwise` is called first."""
    try:
        yield
    except Exception as error:  # a file may hold anything
        otherwise()
        what = f"{path} does not fit ({type(error).__name__}: {error}); nothing was changed"
        raise ValueError(f"{what}. Put back a good copy or the old code, or choose another RUN_NAME") from None


def printed(thing):
    """A network, say, as text, without addresses, which change from process to process."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(thing))


def _flat(identity, scheduler, whole):
    """An identity and the lengths in a scheduler's state, {name: value}; if whole, with the network line by line."""
    lines = {f"line {number} of the network": line for number, line in enumerate(identity["network"].splitlines())}
    parts = [scheduler, *scheduler.get("_schedulers", ())] if scheduler else []
    lengths = {f"the scheduler's {name}": [part[name] for part in parts if name in part] for name in LENGTHS}
    return identity["hyperparameters"] | identity["kinds"] | lengths | (lines if whole else {})


def _plain(value):
    """The same with Python's numbers in place of NumPy's, which `weights_only` does not load."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: _plain(part) for key, part in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _random_state():
    """States of the generators of Python, NumPy, torch and the GPUs, in types that `weights_only` loads."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def _restore(states, random_state):
    """Bring parts, [(part, its state_dict)], and the random generators to where they were."""
    for part, state in states:
        part.load_state_dict(state)
    torch.set_rng_state(random_state["torch"])
    if len(random_state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(random_state["cuda"])
    if random_state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(random_state["mps"])
    np.random.set_state(random_state["numpy"])
    random.setstate(random_state["python"])
