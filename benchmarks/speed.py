"""How fast: the plain loop and this project, side by side in one run.

    python benchmarks/speed.py                              # 12,000 images of CIFAR10_ROOT
    python benchmarks/speed.py --images 50000 --repeats 3   # whole epochs, for a GPU
    python benchmarks/speed.py --repeats 0                  # only the table of the results so far

The variants take turns, each in a process of its own, so that a noisy machine disturbs them alike, and the median
counts. Needs Linux, for the peak memory of a process; that of loader workers is not counted.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import reference
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import utils
from augment import ImageBatches
from image_sets import load_images
from output import write_atomically
from recipes import RECIPES

RESULTS = pathlib.Path(__file__).parent / "results"
EPOCHS_OF = ("s9", "tuned", "resnet")  # recipes whose epochs are timed; the others' differ in augmentation alone


def seconds_of(function, device):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        function()
    wait()
    return time.perf_counter() - start


def subset(image_set, n):
    """n images drawn at random, the same on every call."""
    indices = torch.randperm(len(image_set.labels), generator=torch.Generator().manual_seed(0))[:n].numpy()
    return image_set._replace(images=image_set.images[indices], labels=image_set.labels[indices])


# What a child process measures of one variant, "plain" or a recipe, after one unmeasured round: a dict of numbers.


def measure_loading(variant, device, train_set, test_set):
    """Augmented batches in one process on one core; the plain loop's are those of s9."""
    torch.set_num_threads(1)
    sample = subset(train_set, 5120)
    compose = utils.get_train_transforms(**RECIPES["s9" if variant == "plain" else variant]["transforms"])
    if variant == "plain":
        run = lambda: [compose(image=image)["image"] for image in sample.images]  # noqa: E731
    else:
        loader = DataLoader(ImageBatches(sample, compose), RECIPES[variant]["batch_size"])
        run = lambda: list(loader)  # noqa: E731
    run()
    passes, seconds = 0, 0.0
    while seconds < 2:  # a single pass can be so short that whatever else the machine does decides the figure
        passes, seconds = passes + 1, seconds + seconds_of(run, device)
    return {"images_per_second": passes * len(sample.labels) / seconds}


def measure_step(variant, device, train_set, test_set):
    """Training steps of a network on tensors that are on the device already."""
    recipe = utils.get_recipe("s9" if variant == "plain" else variant)
    steps, size = 100 if device.type == "cuda" else 8, recipe["batch_size"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 10, (size,), generator=generator).to(device)
    model = utils.build_model(recipe).to(device).train()
    train = reference.train if variant == "plain" else utils.train
    optimizer = utils.get_optimizer(model, **recipe["optimizer"] | {"lr": 0.05})

    def run():
        train(model, device, [(images, labels)] * steps, optimizer, F.nll_loss)

    run()
    return {"images_per_second": steps * size / seconds_of(run, device)}


def measure_epoch(variant, device, train_set, test_set):
    """An epoch of training and a test; the plain loop's are those of s9."""
    recipe, loop = utils.get_recipe("s9" if variant == "plain" else variant), reference if variant == "plain" else utils
    options, transforms = {"batch_size": recipe["batch_size"]}, utils.get_train_transforms(**recipe["transforms"])
    _, train_loader = utils.get_CIFARdataset_with_loader("train", options, transforms=transforms)
    _, test_loader = utils.get_CIFARdataset_with_loader("test", options)
    for loader, images in ((train_loader, train_set), (test_loader, test_set)):
        loader.dataset.images, loader.dataset.labels = images.images, images.labels
    if variant == "plain":
        train_loader, test_loader = reference.get_loaders(train_set, test_set, device)
    model = utils.build_model(recipe).to(device)
    optimizer, scheduler, criterion = utils.build_training(recipe, model, len(train_loader))

    def run():
        loop.train(model, device, train_loader, optimizer, criterion, scheduler=scheduler)
        loop.test(model, device, test_loader, criterion)

    run()
    seconds = seconds_of(run, device)
    # Not getrusage: its maximum begins with that of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "peak_megabytes": peak}


MEASUREMENTS = {"loading": measure_loading, "step": measure_step, "epoch": measure_epoch}


def take_turns(what, variants, repeats, images):
    """Medians of a measurement, {variant: {quantity: value}}, each in a process of its own."""
    rounds = {variant: [] for variant in variants}
    for variant in list(variants) * repeats:
        environment = os.environ | ({} if variant == "plain" else {"GOMP_SPINCOUNT": "10000"})  # as the Makefile
        command = [sys.executable, __file__, f"--images={images}", "--measure", what, variant]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        rounds[variant].append(json.loads(done.stdout.splitlines()[-1]))
    medians = lambda results: {key: statistics.median(one[key] for one in results) for key in results[0]}  # noqa: E731
    return {variant: medians(results) for variant, results in rounds.items()}


def processor(device):
    """A name; of a CPU with its family and model, as virtual machines call very different CPUs by one name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return f"{facts['model name']}, family {facts['cpu family']}, model {facts['model']}"
    except (OSError, KeyError):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="for training, and a fifth of it for testing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # in a child: which measurement, which variant
    arguments = parser.parse_args()
    repeats = arguments.repeats
    if not repeats:
        return print_table()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    train_set = subset(load_images("cifar10", "train"), arguments.images)
    test_set = subset(load_images("cifar10", "test"), arguments.images // 5)
    if arguments.measure:
        what, variant = arguments.measure
        return print(json.dumps(MEASUREMENTS[what](variant, device, train_set, test_set)))
    recipes = list({repr(recipe["transforms"]): name for name, recipe in reversed(RECIPES.items())}.values())
    result = {
        "device": processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "type": str(utils.autocast_dtype(device)),
        "data": train_set.name,
        "images_per_epoch": len(train_set.labels) + len(test_set.labels),
        "loading": take_turns("loading", ["plain", *recipes], repeats, arguments.images),
        "step": take_turns("step", ["plain", *EPOCHS_OF], repeats, arguments.images),
        "epoch": take_turns("epoch", ["plain", *EPOCHS_OF], max(1, repeats // 2), arguments.images),
    }
    name = re.sub(r"\W+", "-", f"speed {result['device']} {result['type'].removeprefix('torch.')}".lower())
    write_atomically(RESULTS / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    print_table()


def print_table():
    """The results of all machines side by side; in brackets, how many times the plain loop's a figure is."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("speed-*.json"))]
    rows = {"computes in": [r["type"].removeprefix("torch.") for r in results], "torch": [r["torch"] for r in results]}

    def add(what, measured, quantity, variants):
        for variant in variants:
            for result in results:
                ours, plain = (result[measured].get(which, {}).get(quantity) for which in (variant, "plain"))
                if quantity == "seconds" and ours and plain:
                    ours, plain = result["images_per_epoch"] / ours, result["images_per_epoch"] / plain
                cell = f"{ours:,.0f} ({ours / plain:.1f})" if ours and plain else ""
                rows.setdefault(f"{what}, {variant}", []).append(cell)

    add("data path, images/s per core", "loading", "images_per_second", RECIPES)
    add("training step on ready tensors, images/s", "step", "images_per_second", EPOCHS_OF)
    add("epoch with testing, images/s", "epoch", "seconds", ["plain", *EPOCHS_OF])
    add("peak resident memory, MB", "epoch", "peak_megabytes", ["plain", *EPOCHS_OF])
    print("\n| | " + " | ".join(result["device"] for result in results) + " |")
    print("|" + " --- |" * (1 + len(results)))
    for name, cells in rows.items():
        if any(cells):
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
