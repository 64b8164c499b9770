"""How the tuned and the short recipe were chosen: short runs of many configurations, compared on images held out.

    python benchmarks/trials.py                                  # those that results/trials.csv does not have yet
    python benchmarks/trials.py --epochs 40 start "cutout 0.3"   # only these, for longer

5,000 training images, the same 500 of every class each time, are for validation; the other 45,000 are trained on. No
test image is ever looked at. Every trial leaves a row in benchmarks/results/trials.csv, also one that diverged. Beside
the accuracy of the network itself there is that of its weights averaged over the last batches (see `average_weights`).
Several processes may take part, each with trials of its own.
"""

import argparse
import csv
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import SubsetRandomSampler

import utils
from image_sets import load_images
from models import Model
from recipes import get_recipe

RESULTS = pathlib.Path(__file__).parent / "results" / "trials.csv"
COLUMNS = (
    "trial",
    "epochs",
    "seed",
    "train_acc",
    "validation_acc",
    "averaged_validation_acc",
    "minutes",
    "device",
    "data",
)
SEED = 1

START = {  # not taken from recipes.py, whose changes must not change what the rows of trials.csv mean
    "batch_size": 256,
    "dropout": 0.0,
    "transforms": {"flip": 0.5, "shift_scale_rotate": 0.0, "cutout": 0.0, "crop_padding": 4},
    "optimizer": {
        "name": "SGD",
        "lr": 0.3,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "decay": "weights",
    },
    "scheduler": {"name": "OneCycleLR", "pct_start": 0.2, "anneal_strategy": "linear", "cycle_momentum": False},
    "loss": {"name": "nll_loss"},
}
ADAMW = {"name": "AdamW", "weight_decay": 0.05, "decay": "weights"}
CHOSEN = {  # the best of the longest trials that are not longer than the recipe
    "tuned": "label smoothing 0.1, shift_scale_rotate 0.5",
    "short": "label smoothing 0.1",
}
TRIALS = {  # what replaces which part of START
    "start": {},
    "batch 128": {"batch_size": 128},
    "peak 0.6": {"optimizer": START["optimizer"] | {"lr": 0.6}},
    "batch 128, peak 0.15": {"batch_size": 128, "optimizer": START["optimizer"] | {"lr": 0.15}},
    "AdamW, peak 0.01": {"optimizer": ADAMW | {"lr": 0.01}},
    "AdamW, peak 0.02": {"optimizer": ADAMW | {"lr": 0.02}},
    "weight decay 1e-3": {"optimizer": START["optimizer"] | {"weight_decay": 1e-3}},
    "weight decay 2e-4": {"optimizer": START["optimizer"] | {"weight_decay": 2e-4}},
    "decay of all parameters": {"optimizer": START["optimizer"] | {"decay": "all"}},
    "label smoothing 0.1": {"loss": {"name": "cross_entropy", "label_smoothing": 0.1}},
    "label smoothing 0.1, shift_scale_rotate 0.5": {
        "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
        "transforms": START["transforms"] | {"shift_scale_rotate": 0.5},
    },
    "cosine": {"scheduler": START["scheduler"] | {"anneal_strategy": "cos"}},
    "crops from 2 pixels": {"transforms": START["transforms"] | {"crop_padding": 2}},
    "dropout 0.05": {"dropout": 0.05},
    "cutout 0.3": {"transforms": START["transforms"] | {"cutout": 0.3}},
    "shift_scale_rotate 0.3": {"transforms": START["transforms"] | {"shift_scale_rotate": 0.3}},
    "transforms of s9": {"transforms": get_recipe("s9")["transforms"]},
}


def split(labels):
    """Indices of the images to train on and of those to validate on, 500 of each class, the same on every call."""
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == label][:500] for label in np.unique(labels)])
    return np.setdiff1d(order, held_out).tolist(), np.sort(held_out).tolist()


def average_weights(averaged, current, n):
    """Exponential average with a decay of 0.999, and less in the first steps, so that they do not linger in it."""
    n = int(n)
    get_ema_multi_avg_fn(min(0.999, (1 + n) / (10 + n)))(averaged, current, n)


def run_trial(changes, epochs, device):
    """Train START with changes and return (training, validation, averaged weights' validation accuracy), in %."""
    recipe = START | changes
    kwargs = {"batch_size": recipe["batch_size"]}
    _, whole = utils.get_CIFARdataset_with_loader("train", kwargs)
    training, validation = split(np.asarray(whole.dataset.labels))
    _, train_loader = utils.get_CIFARdataset_with_loader(
        "train",
        kwargs | {"sampler": SubsetRandomSampler(training)},
        transforms=utils.get_train_transforms(**recipe["transforms"]),
    )
    _, validation_loader = utils.get_CIFARdataset_with_loader(
        "train", kwargs | {"sampler": validation}, transforms=utils.get_test_transforms()
    )
    utils.seed_everything(SEED)
    model = Model(recipe["dropout"]).to(device)
    optimizer = utils.get_optimizer(model, **recipe["optimizer"])
    schedule = {"epochs": epochs, "steps_per_epoch": len(train_loader)}
    scheduler = utils.get_scheduler(optimizer, **recipe["scheduler"], **schedule)
    criterion = utils.get_loss(**recipe["loss"])
    average = AveragedModel(model, multi_avg_fn=average_weights, use_buffers=True)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    train_losses, train_acc, losses, validation_acc = [], [], [], []
    for _ in range(epochs):
        utils.train(model, device, train_loader, optimizer, criterion, train_losses, train_acc, scheduler)
    for network in (model, average):
        utils.test(network, device, validation_loader, criterion, losses, validation_acc)
    return train_acc[-1], *validation_acc


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", help=f"by default all: {', '.join(TRIALS)}")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.trials if name not in TRIALS]:
        parser.error(f"unknown trial {unknown[0]!r}; there is {', '.join(TRIALS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_images("cifar10", "train").name
    RESULTS.parent.mkdir(exist_ok=True)
    if not RESULTS.exists():
        RESULTS.write_text(",".join(COLUMNS) + "\n")
    for name in arguments.trials or TRIALS:
        with RESULTS.open(newline="") as file:
            done = [(row["trial"], row["epochs"], row["device"], row["data"]) for row in csv.DictReader(file)]
        if (name, str(arguments.epochs), device.type, data) in done:
            continue
        print(name, flush=True)
        start = time.perf_counter()
        try:
            accuracies = [round(value, 2) for value in run_trial(TRIALS[name], arguments.epochs, device)]
        except FloatingPointError:
            accuracies = ["diverged"] * 3
        minutes = round((time.perf_counter() - start) / 60, 1)
        with RESULTS.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(
                [name, arguments.epochs, SEED, *accuracies, minutes, device.type, data]
            )


if __name__ == "__main__":
    main()
