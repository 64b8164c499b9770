"""Does a killed run end as if nobody had killed it? SIGKILL at random moments and at every step of every write.

    python benchmarks/kill.py

A process trains on a part of the digits sample until it is killed; another goes on from what it left; the end of the
run must equal, but for the seconds, the end of a run that nobody killed, weights and all bit for bit. Then the same
with a disk that is full. Every process is forked from this one, which has imported everything and computed nothing.
"""

import argparse
import builtins
import contextlib
import csv
import dataclasses
import errno
import io
import itertools
import json
import os
import pathlib
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))  # threads do not survive a fork
os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import torch

import runs
import utils
from models import Model

EPOCHS = 4
PATIENCE = 600  # seconds that a process may take
DISK_FULL = 3  # exit status of a process that ends with an OSError
STEPS = ("half written", "before fsync", "after fsync", "before replace", "after replace")
STEPS_THAT_FAIL = ("half written", "before fsync", "before replace")


# --- The process that is killed --------------------------------------------------------------------------------------


def train(root):
    """What the driver notebook does, on two batches."""
    kwargs = {"batch_size": 32, "num_workers": 0}
    _, train_loader = utils.get_CIFARdataset_with_loader("train", kwargs, dataset="digits")
    _, test_loader = utils.get_CIFARdataset_with_loader("test", kwargs, dataset="digits")
    run = utils.Run("killed", data="digits", root=root)
    utils.seed_everything(4)
    model, device = Model(dropout_value=0.05), torch.device("cpu")
    optimizer = utils.get_optimizer(model, "SGD", lr=0.05, momentum=0.9)
    scheduler = utils.get_scheduler(optimizer, step_size=2, gamma=0.5)
    criterion = utils.get_loss("nll_loss")
    train_losses, train_acc, test_losses, test_acc = run.resume({"epochs": EPOCHS}, model, optimizer, scheduler)
    for _ in range(len(train_losses), EPOCHS):
        utils.train(model, device, train_loader, optimizer, criterion, train_losses, train_acc)
        utils.test(model, device, test_loader, criterion, test_losses, test_acc)
        scheduler.step()
        run.save(train_losses, train_acc, test_losses, test_acc)


class Steps:
    """Sees every step of every write below a folder, and kills this process, or fills the disk, at one of them.

    A step is (the method of Run that writes, name of the file, one of STEPS).
    """

    def __init__(self, folder, fatal=None, full=False):
        self.folder, self.fatal, self.full = str(folder), fatal, full
        self.method, self.seen = None, []
        self.names = {}  # file descriptor: name of the file

    def reach(self, name, step):
        if self.method is None:
            return
        here = (self.method, name, step)
        if here not in self.seen:
            self.seen.append(here)
        if here == self.fatal:
            if not self.full:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def watch(self):
        real_open, real_fsync, real_replace = builtins.open, os.fsync, os.replace

        def watched_open(path, mode="r", *arguments, **options):
            file = real_open(path, mode, *arguments, **options)
            if str(path).startswith(self.folder) and set(mode) & set("wxa"):
                name = final_name(path)
                self.names[file.fileno()] = name
                return HalfWriter(file, lambda: self.reach(name, "half written"))
            return file

        def watched_fsync(descriptor):
            name = self.names.get(descriptor, "another file")
            self.reach(name, "before fsync")
            real_fsync(descriptor)
            self.reach(name, "after fsync")

        def watched_replace(source, target, **options):
            self.reach(pathlib.Path(target).name, "before replace")
            real_replace(source, target, **options)
            self.reach(pathlib.Path(target).name, "after replace")

        builtins.open = io.open = watched_open
        os.fsync, os.replace = watched_fsync, watched_replace
        for method in ("resume", "save"):
            setattr(runs.Run, method, self.announced(method, getattr(runs.Run, method)))

    def announced(self, method, function):
        """The method, saying when it begins and ends, so that one knows of a killed process what it was at."""

        def announcing(*arguments):
            self.method = method
            print(f"#begin {method}")
            result = function(*arguments)
            print(f"#end {method}")
            self.method = None
            return result

        return announcing


class HalfWriter:
    """A file that calls back when half of what it was given is on disk."""

    def __init__(self, file, reached):
        self.file, self.reached = file, reached

    def write(self, data):
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.reached()
        return half + self.file.write(data[half:])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def final_name(path):
    """checkpoint.pt of .checkpoint.pt.123.tmp, and of itself."""
    name = pathlib.Path(path).name
    return ".".join(name.split(".")[1:3]) if name.startswith(".") and name.endswith(".tmp") else name


class Process:
    """A forked process that trains in root; `fatal` is the step at which it dies or finds the disk full."""

    def __init__(self, root, fatal=None, full=False):
        reader, writer = os.pipe()
        sys.stdout.flush()
        self.pid, self.reader, self.output = os.fork(), reader, ""
        self.deadline = time.monotonic() + PATIENCE
        if self.pid:
            os.close(writer)
            return
        status = 1
        try:  # in the child, which never returns
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            steps = Steps(root, fatal, full)
            steps.watch()
            train(root)
            print("#seen " + json.dumps(steps.seen))
            status = 0
        except OSError as error:
            print(f"OSError: {error}")
            status = DISK_FULL
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)

    def read(self, until):
        """Collect output until a moment, or until the process has ended, which returns True."""
        while (left := until - time.monotonic()) > 0:
            if select.select([self.reader], [], [], left)[0]:
                text = os.read(self.reader, 65536).decode()
                if not text:
                    return True
                self.output += text
        return False

    def read_first_line(self):
        while "a new run" not in self.output and "going on" not in self.output:
            if self.read(min(time.monotonic() + 0.005, self.deadline)) or time.monotonic() > self.deadline:
                break

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def end(self):
        """Wait for its end; -9 if it was killed, else its exit status."""
        if not self.read(self.deadline):
            self.output += f"\nno end after {PATIENCE} s"
            self.kill()
            self.read(time.monotonic() + 10)
        os.close(self.reader)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def was_writing(self):
        return self.output.count("#begin") > self.output.count("#end")


# --- What it leaves behind -------------------------------------------------------------------------------------------


def rows_of(text):
    rows = list(csv.DictReader(io.StringIO(text)))
    for row in rows:
        del row["seconds"]
    return rows


def same(one, other):
    """Equal bit for bit, through dicts, sequences and tensors, but for entries named seconds."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "seconds")
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
    return one == other


class Left:
    """The files of a run, read; `problem` says what is wrong with one."""

    def __init__(self, folder):
        self.problem = None
        self.checkpoint = self.last = self.best = None
        self.rows = []
        try:
            for name in ("checkpoint", "last", "best"):
                if (folder / f"{name}.pt").exists():
                    setattr(self, name, runs.load_weights(folder / f"{name}.pt"))
            if (folder / "history.csv").exists():
                self.rows = rows_of((folder / "history.csv").read_text())
            if (folder / "run.json").exists():
                json.loads((folder / "run.json").read_text())
        except ValueError as error:
            self.problem = str(error)
        self.epochs = len(self.checkpoint["history"]) if self.checkpoint else 0
        self.leftovers = sorted(path.name for path in folder.glob(".*.tmp"))

    def differs_from(self, end):
        """What is wrong with it as the end of a run, or None."""
        if self.problem or self.leftovers:
            return self.problem or f"leftovers {self.leftovers}"
        if self.rows != end.rows:
            return f"history.csv has {self.rows}, not {end.rows}"
        for name in ("last", "best", "checkpoint"):
            if not same(getattr(self, name), getattr(end, name)):
                return f"{name}.pt differs"
        return None

    def cannot_become(self, end, epochs_before):
        """What is wrong with it halfway, or None."""
        if self.problem:
            return self.problem
        if self.epochs < epochs_before:
            return f"{epochs_before} epochs were saved, {self.epochs} are left"
        if self.checkpoint and not same(self.checkpoint["history"], end.checkpoint["history"][: self.epochs]):
            return f"the checkpoint has the history {self.checkpoint['history']}"
        if self.rows != end.rows[: len(self.rows)] or self.epochs - len(self.rows) not in (0, 1):
            return f"history.csv has {self.rows} at a checkpoint of {self.epochs} epochs"
        return None


# --- The one who kills -----------------------------------------------------------------------------------------------


class Study:
    """Kills runs in a temporary directory and counts; `problems` are what went wrong."""

    def __init__(self, home, seed):
        self.home, self.random, self.numbers = home, random.Random(seed), itertools.count(1)
        self.kills = self.kills_in_writes = self.resumes = self.completed = 0
        self.problems = []
        self.stretch = 1.3  # over 1, or hardly a run would come to its end
        self.new_root()
        start = time.monotonic()
        self.run_to_the_end()
        self.seconds = time.monotonic() - start
        self.end = Left(self.folder)
        if self.problems or self.end.problem or self.end.epochs != EPOCHS:
            raise SystemExit(f"a run that nobody kills fails: {self.problems} {self.end.problem}")
        seen = [self.process.output]
        self.run_to_the_end()  # sees the steps of resume
        seen.append(self.process.output)
        lines = [line for output in seen for line in output.splitlines() if line.startswith("#seen ")]
        self.steps = [tuple(step) for line in lines for step in json.loads(line.removeprefix("#seen "))]
        self.new_root()

    def some(self, steps, n):
        """At most n of the steps, in the order in which they are taken."""
        return [steps[index] for index in sorted(self.random.sample(range(len(steps)), min(n, len(steps))))]

    def new_root(self):
        self.root = self.home / str(next(self.numbers))
        self.folder = self.root / "killed"
        self.epochs = 0
        self.root.mkdir()

    def fail(self, what, problem):
        self.problems.append(f"{what}: {problem}")
        print(self.problems[-1], flush=True)
        self.new_root()

    def start(self, **options):
        self.process = Process(self.root, **options)
        return self.process

    def run_to_the_end(self):
        status = self.start().end()
        if status != 0:
            self.fail("uninterrupted", f"status {status}, {self.process.output}")

    def compare(self, what):
        """A run has come to its end."""
        if problem := Left(self.folder).differs_from(self.end):
            self.fail(what, problem)
            return
        self.completed += 1
        shutil.rmtree(self.root)
        self.new_root()

    def has_died(self, what, status):
        """The process has ended; True if it was by SIGKILL. Looks at what it left either way."""
        if status == 0:
            self.compare(what)
            return False
        if status != -signal.SIGKILL:
            self.fail(what, f"status {status}, {self.process.output}")
            return False
        self.kills += 1
        self.kills_in_writes += self.process.was_writing()
        left = Left(self.folder)
        print(f"kill {self.kills}: {what}, {left.epochs} of {EPOCHS} epochs saved", file=sys.stderr)
        if problem := left.cannot_become(self.end, self.epochs):
            self.fail(what, problem)
            return True
        self.epochs = left.epochs
        self.resumes += left.epochs > 0  # by whatever is started next
        return True

    def kill_at_random(self):
        """One kill between the first line of output and the end; runs that end before it are compared."""
        for _ in range(20):
            process, epochs_before = self.start(), self.epochs
            process.read_first_line()
            remaining = self.seconds * (1 - self.epochs / EPOCHS)
            moment = self.random.uniform(0, self.stretch * remaining)
            if not process.read(time.monotonic() + moment):
                process.kill()
            if self.has_died(f"killed after {moment:.3f} s of {remaining:.3f}", process.end()):
                # On a machine that has become slow, kills would hit the same epoch again and again.
                self.stretch = 1.5 * self.stretch if self.epochs == epochs_before else 1.3
                return
        self.fail("random kills", "none in 20 attempts")

    def save_one_epoch(self):
        """A new run that was killed when it had its first checkpoint."""
        step = ("save", "history.csv", "before replace")
        self.has_died(f"killed at {step}", self.start(fatal=step).end())

    def kill_at(self, step):
        for _ in range(3):  # a run that is at its end anyway does not save once more
            if step[0] == "resume" and self.epochs == 0:  # those are taken only where there is something to go on from
                self.save_one_epoch()
            if self.has_died(f"killed at {step}", self.start(fatal=step).end()):
                return
        self.fail(f"killed at {step}", "never got there")

    def finish(self, what):
        """Bring the run to its end."""
        self.run_to_the_end()
        self.compare(what)

    def fill_disk_at(self, step):
        """An injected ENOSPC: a clear error, nothing lost, and then to the end."""
        what = f"disk full at {step}"
        if self.epochs == 0:
            self.save_one_epoch()
        before = (self.folder / "checkpoint.pt").read_bytes()
        status = self.start(fatal=step, full=True).end()
        self.check_full(what, status, before, step[1])

    def check_full(self, what, status, before, name):
        output = self.process.output
        left = Left(self.folder)
        if status != DISK_FULL or os.strerror(errno.ENOSPC) not in output or f"{self.folder / name}" not in output:
            self.fail(what, f"status {status} and no clear error: {output}")
        elif name == "checkpoint.pt" and (self.folder / name).read_bytes() != before:
            self.fail(what, "the checkpoint has changed")
        elif left.leftovers:
            self.fail(what, f"leftovers {left.leftovers}")
        elif problem := left.cannot_become(self.end, self.epochs):
            self.fail(what, problem)
        else:
            self.epochs = left.epochs
            if self.epochs == EPOCHS or self.random.random() < 0.3:
                self.finish(what)

    def fill_small_disk(self):
        """A real full disk: a tmpfs with room for an epoch and half a checkpoint. False where mounting is forbidden."""
        self.new_root()
        sizes = {path.name: path.stat().st_size for path in (self.home / "1" / "killed").iterdir() if path.is_file()}
        room = sum(sizes.values()) + sizes["checkpoint.pt"] // 2
        mounting = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(self.root)]
        try:
            subprocess.run(mounting, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return False
        mounted, folder = self.root, self.folder
        try:
            status = self.start().end()
            self.epochs = 1
            before = (folder / "checkpoint.pt").read_bytes()
            self.check_full("small disk", status, before, "checkpoint.pt")
            subprocess.run(["mount", "-o", f"remount,size={4 * room}", str(mounted)], check=True)
            if self.folder == folder:
                self.run_to_the_end()
            if self.folder == folder and (problem := Left(folder).differs_from(self.end)):
                self.fail("small disk", problem)
        finally:
            subprocess.run(["umount", str(mounted)], check=True)
        return True


def few_images():
    """64 training images and 32 test images, loaded now, for every process to come."""
    with contextlib.redirect_stdout(io.StringIO()):
        splits = {split: utils.load_images("digits", split) for split in ("train", "test")}
    for split, n in (("train", 64), ("test", 32)):
        whole = splits[split]
        splits[split] = dataclasses.replace(whole, images=whole.images[:n], labels=whole.labels[:n])
    utils.load_images = lambda dataset, split, root=None: splits[split]


def warm_up():
    """Make torch import now what it imports at first use, for every process to come."""
    model = torch.nn.Linear(1, 1)
    utils.get_scheduler(utils.get_optimizer(model, "SGD"), step_size=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=30, help="kills at random moments")
    parser.add_argument("--steps", type=int, default=1000, help="kills at steps of writes; by default one at each")
    parser.add_argument("--full", type=int, default=1000, help="steps at which the disk is full; by default each")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random moments, and of the steps if there are more than are wanted"
    )
    options = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    few_images()
    warm_up()
    with tempfile.TemporaryDirectory() as home:
        study = Study(pathlib.Path(home), options.seed)
        steps = study.some(study.steps, options.steps)
        full = study.some([step for step in study.steps if step[2] in STEPS_THAT_FAIL], options.full)
        print(f"a run of {EPOCHS} epochs takes {study.seconds:.1f} s and its writes take {len(study.steps)} steps")
        for _ in range(options.random):
            study.kill_at_random()
        at_random, in_writes = study.kills, study.kills_in_writes
        for step in steps:
            study.kill_at(step)
        study.finish("the last one")
        print(
            f"{study.kills} kills: {at_random} at random moments, {in_writes} of them in a write; "
            f"{study.kills - at_random} at given steps of writes\n"
            f"{study.resumes} resumes; {study.completed} runs came to their end"
        )
        for step in full:
            study.fill_disk_at(step)
        if full:
            study.finish("after full disks")
            small = "and a small file system" if study.fill_small_disk() else "no small file system: may not mount"
            print(f"{len(full)} times a full disk, {small}; {study.completed} runs came to their end")
    print(f"equal to the run never killed: {'no' if study.problems else 'yes'}  ({time.monotonic() - start:.0f} s)")
    return 1 if study.problems else 0


if __name__ == "__main__":
    sys.exit(main())
