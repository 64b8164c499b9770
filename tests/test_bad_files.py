"""Folders, checkpoints, runs and disks that are not what they should be: one short error, and no file changed."""

import builtins
import errno
import fcntl
import os
import pathlib
import pickle
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_bad_input import check, snapshot
from torch import nn

import download
import runs
import utils
from image_sets import load_images
from models import Model
from runs import Run

HYPERPARAMETERS = {"lr": 0.2, "epochs": 80, "batch_size": 256, "optimizer": "SGD", "augment": True}


def network(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def trainees(width=4, optimizer="SGD", scheduler="StepLR", parameters=None):
    """A new network with its optimizer and scheduler, after one step, so that each has a state."""
    torch.manual_seed(0)
    model = network(width)
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    optimizer = getattr(torch.optim, optimizer)(parameters(model) if parameters else model.parameters(), 0.2, **options)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    if scheduler == "StepLR":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.75)
    elif scheduler == "CosineAnnealingLR":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler)


def state(trained):
    """All that resume could change, as bytes: model, optimizer, scheduler, generators."""
    states = [part and part.state_dict() for part in vars(trained).values()]
    return runs._serialized([states, torch.get_rng_state(), np.random.get_state()[1].tolist()])


def saved_run(root, **options):
    """A run after one epoch, with other weights than trainees gives: a resume that goes half its way would show."""
    trained = trainees(**options)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.add_(1)
    run = Run("kept", root=root)
    run.resume(HYPERPARAMETERS, *vars(trained).values())
    run.save([2.0], [10.0], [2.1], [11.0])
    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The bytes of a good checkpoint after one epoch."""
    return (saved_run(tmp_path_factory.mktemp("kept")) / "checkpoint.pt").read_bytes()


def failing(number, only=lambda *arguments: True, real=None):
    """A function of the operating system that answers with an error."""

    def fail(*arguments, **options):
        if only(*arguments):
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return real(*arguments, **options)

    return fail


def writing(path, mode="r", *_):
    return not set("wxa+").isdisjoint(mode)


def read_only(patch):
    """What a file system mounted read-only does: nothing is opened for writing, renamed, made or deleted."""
    patch.setattr(builtins, "open", failing(errno.EROFS, writing, builtins.open))
    for name in ("replace", "mkdir", "unlink"):
        patch.setattr(os, name, failing(errno.EROFS))


# ---- image folders: (what spoils it, words) --------------------------------------------------------------------------


def image_folder(root):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), "red").save(root / split / name / "0.png")


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def remove_class(root):
    (root / "test/bee/0.png").unlink()
    (root / "test/bee").rmdir()


def huge_png(path):
    """A PNG that says it is 60,000 pixels wide and high."""
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    path.write_bytes(content)


FOLDERS = {
    "a class is missing from test": (remove_class, ["missing bee", "extra none"]),
    "half a PNG": (lambda root: truncate(root / "train/bee/0.png"), ["bee/0.png", "replace or delete"]),
    "a PNG of zero bytes": (lambda root: truncate(root / "train/bee/0.png", 0), ["bee/0.png", "PNG and JPEG"]),
    "a flipped bit in a PNG": (lambda root: flip(root / "train/ant/0.png", 45), ["ant/0.png", "replace or delete"]),
    "a PNG of 60,000 x 60,000 pixels": (lambda root: huge_png(root / "train/ant/0.png"), ["ant/0.png"]),
    "a text file": (lambda root: (root / "train/ant/notes.txt").write_text("x"), ["ant/notes.txt", ".png, .jpg"]),
    "a web page with the name of an image": (
        lambda root: (root / "train/ant/0.png").write_text("<html>not found</html>"),
        ["ant/0.png", "PNG and JPEG"],
    ),
    "a GIF": (
        lambda root: Image.new("RGB", (32, 32)).save(root / "train/ant/0.png", format="GIF"),
        ["ant/0.png", "PNG and JPEG"],
    ),
    "a class is a file": (lambda root: (root / "train/cow").write_text("x"), ["cow", "class folders"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_image_folder(case, tmp_path):
    spoil, words = FOLDERS[case]
    image_folder(tmp_path)
    spoil(tmp_path)
    check(lambda: load_images("cifar10", "train", tmp_path), ValueError, words, tmp_path)


def test_folder_of_the_data_is_a_file(tmp_path):
    (tmp_path / "data").write_text("x")
    check(
        lambda: load_images("cifar10", "train", tmp_path / "data"), download.DownloadError, ["data", "folder"], tmp_path
    )


def test_read_only_image_folder_is_read(tmp_path, monkeypatch):
    """A read-only data set is an ordinary one; it only cannot be cached."""
    image_folder(tmp_path)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        read_only(patch)
        assert len(load_images("cifar10", "train", tmp_path).labels) == 2
    assert snapshot(tmp_path) == before


# ---- pictures for predict --------------------------------------------------------------------------------------------


def half_opened(path):
    """Pillow reads the header now, and finds only later that the rest is missing."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(path)
    truncate(path)
    return Image.open(path)


PICTURES = {
    "absent": (FileNotFoundError, ["images[0]", "absent.png"], lambda root: root / "absent.png"),
    "a folder": (ValueError, ["images[0]", "train"], lambda root: root / "train"),
    "half": (ValueError, ["images[0]", "0.png"], lambda root: truncate(root / "train/ant/0.png")),
    "no picture": (
        ValueError,
        ["images[0]", "0.png"],
        lambda root: (root / "train/ant/0.png").write_text("<html>"),
    ),
    "too large a picture": (ValueError, ["images[0]", "0.png"], lambda root: huge_png(root / "train/ant/0.png")),
    "half, opened": (
        ValueError,
        ["images[0]"],
        lambda root: half_opened(root / "train/ant/0.png"),
    ),
}


@pytest.mark.parametrize("case", PICTURES)
def test_bad_picture(case, tmp_path):
    error, words, spoil = PICTURES[case]
    image_folder(tmp_path)
    made = spoil(tmp_path)
    given_picture = made if isinstance(made, (pathlib.Path, Image.Image)) else tmp_path / "train/ant/0.png"
    check(lambda: utils.predict(Model(), [given_picture]), error, words, tmp_path)


# ---- weights and checkpoints: (what is in place of the checkpoint, words) --------------------------------------------


class Malicious:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("ran.txt").absolute(),)


def save_malicious(path):
    torch.save({"hyperparameters": HYPERPARAMETERS, "model": Malicious()}, path)


def save_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, model=np.zeros(3))


def position(path, member, offset=0):
    """Where the bytes of a member of a zip file begin."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(member))
        name_and_extra = path.read_bytes()[info.header_offset + 26 : info.header_offset + 30]
        return info.header_offset + 30 + sum(np.frombuffer(name_and_extra, "<u2").tolist()) + offset


def change(path, **items):
    """The same checkpoint with other items, or without those given as ...."""
    checkpoint = torch.load(path, weights_only=True) | items
    torch.save({key: value for key, value in checkpoint.items() if value is not ...}, path)


DAMAGED = ["checkpoint.pt", "damaged", "good copy"]
CHECKPOINTS = {
    "zero bytes": (lambda path: path.write_bytes(b""), DAMAGED),
    "half of it": (lambda path: truncate(path), DAMAGED),
    "without its last byte": (lambda path: path.write_bytes(path.read_bytes()[:-1]), DAMAGED),
    "a flipped bit at the start": (lambda path: flip(path, 0), DAMAGED),
    "a flipped bit in the pickle": (lambda path: flip(path, position(path, "data.pkl", 40)), DAMAGED),
    "a flipped bit in a weight": (lambda path: flip(path, position(path, "data/0"), 3), DAMAGED),
    "a flipped bit in the directory": (lambda path: flip(path, -30), DAMAGED),
    "a flipped bit in a name": (lambda path: flip(path, 31), DAMAGED),
    "text": (lambda path: path.write_text("epoch 1"), DAMAGED),
    "an archive of arrays": (save_arrays, DAMAGED),
    "a pickle that would run code": (save_malicious, DAMAGED),
    "an old-style pickle that would run code": (lambda path: path.write_bytes(pickle.dumps(Malicious())), DAMAGED),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), ["checkpoint.pt"]),
    "weights alone": (lambda path: torch.save(network().state_dict(), path), ["checkpoint.pt", "not a checkpoint"]),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), ["checkpoint.pt", "not a checkpoint"]),
    "a part is missing": (lambda path: change(path, best=...), ["checkpoint.pt", "best"]),
    "no epoch": (lambda path: change(path, history=[]), ["checkpoint.pt", "epoch"]),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case, tmp_path, monkeypatch, kept):
    monkeypatch.chdir(tmp_path)
    spoil, words = CHECKPOINTS[case]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/checkpoint.pt").write_bytes(kept)
    spoil(tmp_path / "kept/checkpoint.pt")
    refuse(tmp_path, trainees(), HYPERPARAMETERS, words, OSError if case == "a folder" else ValueError)


def refuse(root, trained, hyperparameters, words, error=ValueError):
    """resume raises, and has changed neither a file nor what it was given."""
    run, before = Run("kept", root=root), state(trained)
    check(lambda: run.resume(hyperparameters, *vars(trained).values()), error, words, root)
    assert state(trained) == before


OTHER_RUNS = {
    "another width": (trainees, {"width": 5}, {}, ["(4, 3)", "(5, 3)", "RUN_NAME"]),
    "another learning rate": (trainees, {}, {"lr": 0.1}, ["lr", "0.2", "0.1", "put the old values back"]),
    "another batch size": (trainees, {}, {"batch_size": 128}, ["batch_size", "256", "128"]),
    "another name": (trainees, {}, {"optimizer": "Adam"}, ["optimizer", "'SGD'", "'Adam'"]),
    "a switch off": (trainees, {}, {"augment": False}, ["augment", "True", "False"]),
    "a new hyperparameter": (trainees, {}, {"seed": 4}, ["seed", "4"]),
    "another optimizer": (trainees, {"optimizer": "Adam"}, {}, ["optimizer", "Adam"]),
    "an optimizer of fewer parameters": (
        trainees,
        {"parameters": lambda model: model[0].parameters()},
        {},
        ["optimizer"],
    ),
    "no scheduler any more": (trainees, {"scheduler": None}, {}, ["scheduler"]),
    "another scheduler": (trainees, {"scheduler": "CosineAnnealingLR"}, {}, ["scheduler"]),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_checkpoint_of_another_run(case, tmp_path, kept):
    make, options, other, words = OTHER_RUNS[case]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/checkpoint.pt").write_bytes(kept)
    refuse(tmp_path, make(**options), HYPERPARAMETERS | other, words)


def test_a_hyperparameter_less(tmp_path, kept):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/checkpoint.pt").write_bytes(kept)
    fewer = {key: value for key, value in HYPERPARAMETERS.items() if key != "lr"}
    refuse(tmp_path, trainees(), fewer, ["lr", "0.2"])


@pytest.mark.parametrize(
    "was, words",
    [({"scheduler": None}, ["scheduler", "StepLR"]), ({"optimizer": "Adam"}, ["optimizer", "SGD"])],
    ids=["a scheduler where there was none", "SGD where there was Adam"],
)
def test_checkpoint_of_a_run_that_was_another(was, words, tmp_path):
    saved_run(tmp_path, **was)
    refuse(tmp_path, trainees(), HYPERPARAMETERS, words)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=150)
def test_any_flipped_bit_is_seen_or_harmless(kept, tmp_path_factory, where, bit):
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    path.write_bytes(kept)
    expected = runs._serialized(runs.load_weights(path))
    flip(path, int(where * len(kept)), bit)
    try:
        assert runs._serialized(runs.load_weights(path)) == expected
    except ValueError as error:
        assert "damaged" in str(error)


WEIGHTS = {
    "absent": (FileNotFoundError, ["weights.pt"], lambda path: None),
    "zero bytes": (ValueError, ["weights.pt", "damaged"], lambda path: path.write_bytes(b"")),
    "a picture": (ValueError, ["weights.pt", "torch.save"], lambda path: Image.new("L", (9, 9)).save(path, "PNG")),
    "a whole network": (ValueError, ["weights.pt", "torch.save"], lambda path: torch.save(network(), path)),
    "a pickle that would run code": (ValueError, ["weights.pt", "damaged"], save_malicious),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_weights(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error, words, make = WEIGHTS[case]
    make(tmp_path / "weights.pt")
    check(lambda: runs.load_weights(tmp_path / "weights.pt"), error, words, tmp_path)


# ---- run directories -------------------------------------------------------------------------------------------------


def lock(root):
    (root / "kept").mkdir()
    descriptor = os.open(root / "kept/.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


NAMES = {
    "empty": (ValueError, "", ["''", "plain directory name"]),
    "a path": (ValueError, "a/b", ["'a/b'", "separators"]),
    "the folder above": (ValueError, "..", ["'..'", "plain directory name"]),
    "absolute": (ValueError, "/a", ["'/a'", "plain directory name"]),
    "none": ((TypeError, ValueError), None, ["None", "plain directory name"]),
    "a number": ((TypeError, ValueError), 9, ["9", "plain directory name"]),
    "a zero byte": (ValueError, "a\0b", ["'a\\x00b'", "plain directory name"]),
    "too long": (OSError, "a" * 300, ["cannot keep a run", "too long"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_bad_run_name(case, tmp_path):
    error, name, words = NAMES[case]
    check(lambda: Run(name, root=tmp_path), error, words, tmp_path)


DIRECTORIES = {
    "runs is a file": (OSError, ["runs", "cannot keep a run", "directory"], lambda root: (root / "runs").touch()),
    "the run is a file": (
        OSError,
        ["kept", "cannot keep a run", "directory"],
        lambda root: ((root / "runs").mkdir(), (root / "runs/kept").touch()),
    ),
    "the lock is a folder": (
        OSError,
        ["cannot keep a run"],
        lambda root: (root / "runs/kept/.lock").mkdir(parents=True),
    ),
    "another process holds it": (
        RuntimeError,
        ["'kept'", "RUN_NAME"],
        lambda root: ((root / "runs").mkdir(), lock(root / "runs")),
    ),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_bad_run_directory(case, tmp_path):
    error, words, spoil = DIRECTORIES[case]
    held = spoil(tmp_path)
    check(lambda: Run("kept", root=tmp_path / "runs"), error, words, tmp_path)
    if isinstance(held, tuple) and isinstance(held[-1], int):
        os.close(held[-1])


def test_read_only_disk_for_a_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        read_only(patch)
        check(lambda: Run("kept", root=tmp_path), OSError, ["cannot keep a run", "Read-only", "writable"], tmp_path)


def epochs(n):
    return [[1.0] * n for _ in range(4)]


SAVES = {
    "no new epoch": (ValueError, ["1, 1, 1, 1", "1 are saved"], lambda: epochs(1)),
    "two new epochs": (ValueError, ["3, 3, 3, 3", "1 are saved", "one entry appended"], lambda: epochs(3)),
    "one list was forgotten": (ValueError, ["2, 2, 1, 2"], lambda: [[1.0] * n for n in (2, 2, 1, 2)]),
    "accuracy NaN": (ValueError, ["test_acc", "nan"], lambda: [*epochs(2)[:3], [1.0, float("nan")]]),
    "loss as text": ((TypeError, ValueError), ["train_loss", "'1.0'"], lambda: [[1.0, "1.0"], *epochs(2)[1:]]),
}


@pytest.mark.parametrize("case", SAVES)
def test_bad_lists_for_save(case, tmp_path):
    error, words, lists = SAVES[case]
    run = saved_run(tmp_path)
    check(lambda: run.save(*lists()), error, words, tmp_path)
    run.save(*epochs(2))  # and the right ones are still taken


def test_save_before_resume(tmp_path):
    run = Run("kept", root=tmp_path)
    check(lambda: run.save(*epochs(1)), RuntimeError, ["resume"], tmp_path)


def test_numbers_of_numpy_and_torch_can_be_resumed(tmp_path):
    """float(value) of what users compute with; a checkpoint that cannot be read is worse than an error."""
    run, trained = saved_run(tmp_path), trainees()
    run.save([2.0, np.float64(1.5)], [10.0, np.float32(20)], [2.1, torch.tensor(1.6)], [11.0, torch.tensor(21.0)])
    lists = Run("kept", root=tmp_path).resume(HYPERPARAMETERS, *vars(trained).values())
    assert [values[-1] for values in lists] == pytest.approx([1.5, 20, 1.6, 21])


RESUMES = {
    "hyperparameters as text": (TypeError, ["hyperparameters", "str"], lambda t: ("lr=0.2", t.model, t.optimizer)),
    "a hyperparameter of NumPy": (
        (TypeError, ValueError),
        ["lr", "float64", "number, string or bool"],
        lambda t: ({"lr": np.float64(0.2)}, t.model, t.optimizer),
    ),
    "a path as a hyperparameter": (
        (TypeError, ValueError),
        ["root", "Path", "number, string or bool"],
        lambda t: ({"root": pathlib.Path("data")}, t.model, t.optimizer),
    ),
    "a hyperparameter that is NaN": (
        (TypeError, ValueError),
        ["lr", "nan"],
        lambda t: ({"lr": float("nan")}, *t_of(t)),
    ),
    "model and optimizer swapped": (TypeError, ["model", "SGD"], lambda t: ({"lr": 0.2}, t.optimizer, t.model)),
}


def t_of(trained):
    return trained.model, trained.optimizer


@pytest.mark.parametrize("case", RESUMES)
def test_bad_arguments_of_resume(case, tmp_path):
    error, words, arguments = RESUMES[case]
    run, trained = Run("new", root=tmp_path), trainees()
    check(lambda: run.resume(*arguments(trained)), error, words, tmp_path)


DISKS = {
    "full when it opens": (
        "No space left",
        lambda patch: patch.setattr(builtins, "open", failing(errno.ENOSPC, writing, builtins.open)),
    ),
    "full when it flushes": ("No space left", lambda patch: patch.setattr(os, "fsync", failing(errno.ENOSPC))),
    "quota used up when it renames": ("quota", lambda patch: patch.setattr(os, "replace", failing(errno.EDQUOT))),
    "read-only": ("Read-only", read_only),
    "failing": ("Input/output error", lambda patch: patch.setattr(os, "fsync", failing(errno.EIO))),
}


@pytest.mark.parametrize("case", DISKS)
def test_disk_fails_when_an_epoch_is_saved(case, tmp_path, monkeypatch):
    word, spoil = DISKS[case]
    run, trained = saved_run(tmp_path), trainees()
    with monkeypatch.context() as patch:
        spoil(patch)
        check(lambda: run.save(*epochs(2)), OSError, ["checkpoint.pt", word, "intact", "has room"], tmp_path)
    lists = Run("kept", root=tmp_path).resume(HYPERPARAMETERS, *vars(trained).values())
    assert lists == ([2.0], [10.0], [2.1], [11.0])


def test_disk_fails_after_the_checkpoint_and_the_epoch_is_kept(tmp_path, monkeypatch):
    """The files for people could not be written; the epoch is saved, and the same call again, with room, is fine."""
    run, trained = saved_run(tmp_path), trainees()
    with monkeypatch.context() as patch:
        full = failing(errno.ENOSPC, lambda path, *mode: "history.csv" in str(path) and writing(path, *mode), open)
        patch.setattr(builtins, "open", full)
        with pytest.raises(OSError, match=r"history\.csv"):
            run.save(*epochs(2))
    lists = Run("kept", root=tmp_path).resume(HYPERPARAMETERS, *vars(trained).values())
    assert [len(values) for values in lists] == [2, 2, 2, 2]
    assert len((tmp_path / "kept/history.csv").read_text().splitlines()) == 3


def test_unreadable_checkpoint_is_not_called_damaged(tmp_path, monkeypatch):
    """Nobody should delete 80 epochs because a permission is wrong."""
    saved_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", failing(errno.EACCES))
        refuse(tmp_path, trainees(), HYPERPARAMETERS, ["checkpoint.pt", "Permission denied"], OSError)


@pytest.mark.parametrize("path, word", [("absent/curves.png", "No such file"), ("kept", "directory")])
def test_plot_where_none_can_be_written(path, word, tmp_path):
    (tmp_path / "kept").mkdir()
    values = [1.0], [1.0], [50.0], [50.0]
    check(lambda: utils.post_accuracyplots(*values, path=tmp_path / path), OSError, [path, word], tmp_path)
