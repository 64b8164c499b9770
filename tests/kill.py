"""What the processes of test_kill.py do, in a module that imports little, as many are started."""

import itertools
import os
import signal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import utils

EPOCHS = 7


def train(root, fatal_write=None):
    """Train the run `root` from where it is to its end, or to the write that is fatal."""
    torch.set_num_threads(1)  # after a fork there is only one
    die_in(fatal_write)
    data = TensorDataset(torch.linspace(-1, 1, 16 * 3 * 64).reshape(16, 3, 8, 8), torch.arange(16) % 10)
    loader = DataLoader(data, batch_size=8, shuffle=True)
    run = utils.Run(root.name, root=root.parent)
    utils.seed_everything(4)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.Conv2d(8, 10, 6)
    model = nn.Sequential(*layers, nn.Flatten(), nn.LogSoftmax(1))
    optimizer = utils.get_optimizer(model, lr=0.05)
    schedule = {"max_lr": 0.1, "epochs": EPOCHS, "steps_per_epoch": len(loader)}
    scheduler = utils.get_scheduler(optimizer, "OneCycleLR", **schedule)
    lists = run.resume({"epochs": EPOCHS}, model, optimizer, scheduler)
    for _ in range(len(lists[0]), EPOCHS):
        utils.train(model, "cpu", loader, optimizer, utils.get_loss(), *lists[:2], scheduler, verbose=False)
        utils.test(model, "cpu", loader, utils.get_loss(), *lists[2:], verbose=False)
        run.save(*lists)


def die_in(fatal_write):
    """Let SIGKILL end this process when half of a file is written; its writes are counted from 0."""
    replace, writes = os.replace, itertools.count()

    def watched_replace(source, target):
        if next(writes) == fatal_write:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = watched_replace


def hold(root, connection):
    """Hold the run "held" until somebody kills this process, and have loader workers, who have its files open too."""
    run = utils.Run("held", root=root)
    next(workers := iter(DataLoader(range(1000), num_workers=2, multiprocessing_context="fork")))
    connection.send(run.name)
    connection.recv()
    del workers
