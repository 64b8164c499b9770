"""What the processes of test_kill.py do: train, die at a given step of a given write, or hold a run."""

import io
import os
import signal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import output
import utils

EPOCHS = 16


def train(root, *fatal):
    """Train the run `root` from where it is to its end, or to the step and write that are fatal."""
    torch.set_num_threads(1)  # after a fork there is only one
    if fatal:
        die_at(*fatal)
    data = TensorDataset(torch.linspace(-1, 1, 16 * 3 * 64).reshape(16, 3, 8, 8), torch.arange(16) % 10)
    loader = DataLoader(data, batch_size=8, shuffle=True)
    run = utils.Run(root.name, root=root.parent)
    utils.seed_everything(4)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.Conv2d(8, 10, 6)
    model = nn.Sequential(*layers, nn.Flatten(), nn.LogSoftmax(1))
    optimizer = utils.get_optimizer(model, lr=0.05)
    scheduler = utils.get_scheduler(optimizer, step_size=5, steps_per_epoch=len(loader))
    lists = run.resume({"epochs": EPOCHS}, model, optimizer, scheduler)
    for _ in range(len(lists[0]), EPOCHS):
        utils.train(model, "cpu", loader, optimizer, utils.get_loss(), *lists[:2], scheduler, verbose=False)
        utils.test(model, "cpu", loader, utils.get_loss(), *lists[2:], verbose=False)
        run.save(*lists)


def die_at(fatal_write, fatal_step):
    """Let SIGKILL end this process at a step of one of its writes, which are counted from 0."""
    write, replace = -1, os.replace

    def reach(step):
        if (write, step) == (fatal_write, fatal_step):
            os.kill(os.getpid(), signal.SIGKILL)

    class File(io.FileIO):
        def write(self, data):
            nonlocal write
            write += 1
            half = len(data) // 2
            super().write(data[:half])
            reach("half written")
            return super().write(data[half:])

    def watched_replace(source, target):
        reach("before replace")
        replace(source, target)
        reach("after replace")

    output.open, os.replace = File, watched_replace


def hold(root, connection):
    """Hold the run "held" until somebody kills this process, and have loader workers, who have its files open too."""
    run = utils.Run("held", root=root)
    iterator = iter(DataLoader(range(1000), num_workers=2, multiprocessing_context="fork"))
    next(iterator)
    connection.send(run.name)
    connection.recv()
