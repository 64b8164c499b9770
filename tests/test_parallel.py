"""A driver that `torchrun` starts in two processes is one process with batches twice as large, without a change."""

import contextlib
import os
import socket

import pytest
import torch
from conftest import end_state
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils


def drive(folder, epochs, batch_size, wrapper=nn.Sequential):
    device, plain = utils.best_device(), utils.get_test_transforms()
    train_loader, test_loader = (
        utils.get_CIFARdataset_with_loader(split, {"batch_size": batch_size}, "digits", transforms=plain)[1]
        for split in ("train", "test")
    )
    run = utils.Run("run", root=folder)
    utils.seed_everything(4)
    # Without batch normalisation, whose statistics would be those of half a batch.
    layers = nn.Conv2d(3, 8, 5, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 49, 10), nn.LogSoftmax(1)
    model = wrapper(nn.Sequential(*layers).to(device))
    optimizer, loss = utils.get_optimizer(model, lr=0.05), utils.get_loss()
    scheduler = utils.get_scheduler(optimizer, step_size=1, gamma=0.5, steps_per_epoch=len(train_loader))
    lists, orders = run.resume({}, model, optimizer, scheduler), []
    for _ in range(len(lists[0]), epochs):
        utils.train(model, device, train_loader, optimizer, loss, *lists[:2], scheduler)
        mistakes = utils.test(model, device, test_loader, loss, *lists[2:])
        run.save(*lists)
        orders.append(list(train_loader.sampler))
    return [*map(tuple, mistakes)], orders


def as_torchrun_starts_it(rank, port, folder, *arguments):
    torch.cuda.is_available = torch.backends.mps.is_available = lambda: False  # two processes need two GPUs, or none
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "1"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    with open(folder / f"lines of {rank}", "a") as file, contextlib.redirect_stdout(file):
        torch.save(drive(folder, *arguments), folder / f"seen by {rank}")
        print("the driver's own line")


@pytest.fixture(scope="module")
def two(processes, tmp_path_factory):
    """Starts `drive` in two processes and gives its folder."""

    def start(*arguments, folder=None):
        folder = folder or tmp_path_factory.mktemp("two")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            given = str(free.getsockname()[1]), folder, *arguments
        both = [processes.Process(target=as_torchrun_starts_it, args=(rank, *given)) for rank in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(300)
            process.kill()
        assert [process.exitcode for process in both] == [0, 0]
        return folder

    return start


@pytest.fixture(scope="module")
def whole(two):
    return two(2, 8)


def test_one_process_prints_and_writes_and_each_image_counts_once_per_epoch(whole):
    assert not (whole / "lines of 1").read_text() and (whole / "lines of 0").read_text().count("accuracy") == 4
    files = {"checkpoint.pt", "history.csv", "run.json", "last.pt", "best.pt", ".lock"}
    assert {path.name for path in (whole / "run").iterdir()} == files
    (mistakes, (first, second)), (same, (others, _)) = (torch.load(whole / f"seen by {rank}") for rank in range(2))
    assert set(first) | set(others) == set(range(1437)) and len(set(first) & set(others)) <= 1 and first != second
    assert len(mistakes) == len(same) == len({image.numpy().tobytes() for image, _, _ in mistakes})
    history = utils.load_weights(whole / "run" / "checkpoint.pt")["history"]
    assert 360 * (1 - history[1]["test_acc"] / 100) == pytest.approx(len(mistakes)) and len(mistakes) < 54
    assert [row["lr"] for row in history] == [0.05, 0.025]  # what each epoch was trained with


def test_it_resumes_bit_for_bit_but_not_in_another_number_of_processes(two, whole):
    parts = two(1, 8)
    two(2, 8, folder=parts)
    assert "after epoch 1" in (parts / "lines of 0").read_text()
    assert end_state(parts / "run") == end_state(whole / "run")
    with pytest.raises(ValueError, match="processes"):
        drive(parts, 3, 16)


@pytest.mark.parametrize("wrapper", [nn.Sequential, DistributedDataParallel])
def test_a_step_is_that_of_one_process(two, wrapper, tmp_path):
    """Of all images at once, up to rounding, and to the image that makes their number even."""
    drive(tmp_path, 1, 1437)
    ours, theirs = (utils.load_weights(folder / "run" / "last.pt") for folder in (two(1, 719, wrapper), tmp_path))
    for value, expected in zip(ours.values(), theirs.values()):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)
