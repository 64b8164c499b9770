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
from output import load_weights


def drive(folder, epochs, batch_size, wrapper=lambda model: model):
    """Nothing in it knows how many processes there are."""
    device = utils.best_device()
    options, plain = {"batch_size": batch_size}, utils.get_test_transforms()
    _, train_loader = utils.get_CIFARdataset_with_loader("train", options, "digits", transforms=plain)
    _, test_loader = utils.get_CIFARdataset_with_loader("test", options, "digits")
    run = utils.Run("run", root=folder)
    utils.seed_everything(4)
    # Without batch normalisation, whose statistics would be those of half a batch.
    layers = nn.Conv2d(3, 8, 5, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 49, 10), nn.LogSoftmax(1)
    model = wrapper(nn.Sequential(*layers).to(device))
    optimizer, criterion = utils.get_optimizer(model, lr=0.05, momentum=0.9), utils.get_loss()
    scheduler = utils.get_scheduler(optimizer, step_size=1, gamma=0.5, steps_per_epoch=len(train_loader))
    lists, orders = run.resume({"seed": 4}, model, optimizer, scheduler), []
    with run:
        for _ in range(len(lists[0]), epochs):
            utils.train(model, device, train_loader, optimizer, criterion, *lists[:2], scheduler, verbose=False)
            mistakes = utils.test(model, device, test_loader, criterion, *lists[2:], verbose=False)
            run.save(*lists)
            utils.post_progress(run)
            orders.append(list(train_loader.sampler))
    utils.post_display(test_loader, path=folder / "samples.png")
    return mistakes, orders


def as_torchrun_starts_it(rank, port, folder, epochs, *arguments):
    torch.set_num_threads(1)
    torch.cuda.is_available = torch.backends.mps.is_available = lambda: False  # two processes need two GPUs, or none
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "1"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    with open(folder / f"lines of {rank}", "a") as file, contextlib.redirect_stdout(file):
        mistakes, orders = drive(folder, epochs, *arguments)
        print(len(mistakes), "mistakes")
    torch.save([*map(tuple, mistakes)], folder / f"mistakes of {rank}")
    torch.save(orders, folder / f"orders of {rank}")


@pytest.fixture(scope="module")
def two(processes, tmp_path_factory):
    """Starts `drive` in two processes and gives its folder."""

    def start(*arguments, folder=None):
        folder = folder or tmp_path_factory.mktemp("two")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        both = [
            processes.Process(target=as_torchrun_starts_it, args=(rank, port, folder, *arguments)) for rank in range(2)
        ]
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


def test_one_process_prints_and_writes(whole):
    assert not (whole / "lines of 1").read_text()
    lines = (whole / "lines of 0").read_text().splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == ["epoch", "1/1", "2/2"]
    files = "checkpoint.pt history.csv run.json last.pt best.pt curves.png .lock".split()
    assert {path.name for path in (whole / "run").iterdir()} == set(files) and (whole / "samples.png").exists()


def test_each_test_image_counts_once_and_all_mistakes_are_found(whole):
    first, second = (torch.load(whole / f"mistakes of {rank}") for rank in range(2))
    assert len(first) == len(second) == len({image.numpy().tobytes() for image, _, _ in first})
    accuracy = load_weights(whole / "run/checkpoint.pt")["history"][-1]["test_acc"]
    assert 360 * (1 - accuracy / 100) == pytest.approx(len(first)) and accuracy > 85


def test_each_epoch_has_another_order_that_the_processes_share_out(whole):
    (first, second), (others, _) = (torch.load(whole / f"orders of {rank}") for rank in range(2))
    assert set(first) | set(others) == set(range(1437)) and len(set(first) & set(others)) <= 1 and first != second


def test_it_resumes_bit_for_bit(two, whole):
    parts = two(1, 8)
    two(2, 8, folder=parts)
    assert "resumed after epoch 1" in (parts / "lines of 0").read_text()
    assert end_state(parts / "run") == end_state(whole / "run")


@pytest.mark.parametrize("wrapper", [nn.Sequential, DistributedDataParallel])
def test_a_step_is_that_of_one_process(two, wrapper, tmp_path):
    """Of all images at once, up to rounding, and to the image that makes their number even."""
    drive(tmp_path, 1, 1437)
    ours, theirs = (load_weights(folder / "run/last.pt") for folder in (two(1, 719, wrapper), tmp_path))
    for (_, value), expected in zip(ours.items(), theirs.values()):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


def test_another_number_of_processes_is_refused(whole):
    with pytest.raises(ValueError, match="the processes 2 → 1"):
        drive(whole, 3, 16)
