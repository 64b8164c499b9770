"""How fast: the plain loop and this project, side by side in one run.

    python benchmarks/speed.py                      # 12,000 images of CIFAR10_ROOT
    python benchmarks/speed.py --train-images 50000 --test-images 10000 --repeats 3     # whole epochs, for a GPU

The variants take turns, each in a process of its own, so that a noisy machine disturbs them alike, and the median
counts. Prints the table of RESULTS.md and writes benchmarks/results/speed-<processor>-<type computed in>.json. Needs
Linux, for the peak memory of a process; that of loader workers is not counted.
"""

import argparse
import contextlib
import dataclasses
import functools
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

import devices  # noqa: F401

import reference
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import utils
from augment import ImageBatches, SeededSampler, as_batch
from image_sets import load_images
from models import Model
from output import write_atomically
from recipes import RECIPES

BATCH_SIZE = 256
RESULTS = pathlib.Path(__file__).parent / "results"
FIRST_BATCH = """
import utils, models
_, loader = utils.get_CIFARdataset_with_loader("train", {"batch_size": 256})
next(iter(loader))
"""


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device):
    synchronize(device)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        function()
    synchronize(device)
    return time.perf_counter() - start


def subset(image_set, n):
    """n images drawn at random, the same on every call."""
    indices = torch.randperm(len(image_set.labels), generator=torch.Generator().manual_seed(0))[:n].numpy()
    return dataclasses.replace(image_set, images=image_set.images[indices], labels=image_set.labels[indices])


class Waiting:
    """A loader that adds up how long its consumer waits for it."""

    def __init__(self, loader):
        self.loader, self.seconds = loader, 0.0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def fast_loader(image_set, transforms, batch_size, shuffle):
    data = ImageBatches(image_set, transforms)
    sampler = torch.utils.data.RandomSampler(data) if shuffle else range(len(data))
    return DataLoader(
        data,
        batch_size,
        sampler=SeededSampler(sampler),
        collate_fn=as_batch,
        num_workers=2 if torch.cuda.is_available() else 0,
        pin_memory=torch.cuda.is_available(),
    )


# What a child process measures of one variant, after one unmeasured round: a dict of numbers.


def measure_loading(variant, device, train_set, test_set):
    """Augmented batches in one process on one core."""
    sample = subset(train_set, 5120)
    compose = utils.get_train_transforms()
    data = ImageBatches(sample, compose)
    loader = DataLoader(data, BATCH_SIZE, sampler=SeededSampler(range(len(data))), collate_fn=as_batch)

    def one_by_one():
        for start in range(0, len(data), BATCH_SIZE):
            torch.stack([compose(image=image)["image"] for image in sample.images[start : start + BATCH_SIZE]])

    torch.set_num_threads(1)
    run = one_by_one if variant == "reference" else lambda: list(loader)
    run()
    passes, seconds = 0, 0.0
    while seconds < 2:  # a single pass can be so short that whatever else the machine does decides the figure
        passes, seconds = passes + 1, seconds + seconds_of(run, device)
    return {"images_per_second": passes * len(data) / seconds}


def measure_step(variant, device, train_set, test_set):
    """Training steps on tensors that are on the device already.

    "no dropout" is this project's step without dropout. On a GPU, "compiled" is the one through torch.compile, and
    "contiguous" the one that is not in channels_last memory. "first_seconds" is what the unmeasured round takes, in
    which it is compiled.
    """
    steps = 100 if device.type == "cuda" else 8
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 10, (BATCH_SIZE,), generator=generator).to(device)
    if variant == "reference":
        model = Model(0.05).to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def run():
            for _ in range(steps):
                reference.train_step(model, optimizer, F.nll_loss, images, labels)
    else:
        batches = [(images, labels)] * steps
        model = Model(0 if variant == "no dropout" else 0.05).to(device)
        optimizer = utils.get_optimizer(model, lr=0.05)
        if variant == "compiled":
            model.compile(mode="reduce-overhead")
        if variant == "contiguous":
            model.register_forward_hook(lambda *_: None)  # for all that `train` knows, it minds the layout
        run = functools.partial(utils.train, model, device, batches, optimizer, utils.get_loss(), [], [])
    first_seconds = seconds_of(run, device)
    return {"first_seconds": first_seconds, "images_per_second": steps * BATCH_SIZE / seconds_of(run, device)}


def measure_epoch(variant, device, train_set, test_set):
    """An epoch of training and a test, by the plain loop or by a recipe."""
    if variant == "reference":
        train_loader, test_loader = reference.get_loaders(train_set, test_set, device, BATCH_SIZE)
        model = Model(0.05).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def run():
            reference.train(model, device, train_loader, optimizer, F.nll_loss)
            reference.test(model, device, test_loader, F.nll_loss)
    else:
        recipe = utils.get_recipe("s9" if variant == "ours" else variant)
        transforms, size = utils.get_train_transforms(**recipe["transforms"]), recipe["batch_size"]
        train_loader = Waiting(fast_loader(train_set, transforms, size, shuffle=True))
        test_loader = Waiting(fast_loader(test_set, utils.get_test_transforms(), size, shuffle=False))
        model = utils.build_model(recipe).to(device)
        optimizer, scheduler, criterion = utils.build_training(recipe, model, len(train_loader))

        def run():
            utils.train(model, device, train_loader, optimizer, criterion, [], [], scheduler)
            utils.test(model, device, test_loader, criterion, [], [])

    seconds_of(run, device)
    loaders = [loader for loader in (train_loader, test_loader) if isinstance(loader, Waiting)]
    for loader in loaders:
        loader.seconds = 0.0
    seconds = seconds_of(run, device)
    waited = sum(loader.seconds for loader in loaders)
    # Not getrusage: its maximum begins with that of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "waiting_share": waited / seconds, "peak_megabytes": peak}


def measure_busy_step(*arguments):
    """`measure_step` beside another program that keeps one core busy."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return measure_step(*arguments)
    finally:
        busy.kill()


MEASUREMENTS = {"loading": measure_loading, "step": measure_step, "busy": measure_busy_step, "epoch": measure_epoch}


def in_a_process(*arguments, variant="ours"):
    """What a run of this file, or of a piece of code, prints last, as JSON."""
    # Every process compiles anew, or only the first would say how long it takes.
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    if variant == "reference":
        environment["GOMP_SPINCOUNT"] = "300000"  # libgomp's own, which devices.py would lower
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(what, variants, repeats, sizes):
    """Medians of a measurement, {variant: {quantity: value}}.

    Every measurement has a process of its own, since `train` changes what holds for a process, such as the allocator.
    """
    rounds = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            measured = in_a_process(__file__, *sizes, "--measure", what, variant, variant=variant)
            rounds[variant].append(measured)
    return {
        variant: {quantity: statistics.median(one[quantity] for one in results) for quantity in results[0]}
        for variant, results in rounds.items()
    }


def flops_per_image():
    """Floating-point operations of one training step, an image: three times those of the forward pass.

    The gradients by inputs and by weights take as many each. Torch's own count of them takes grouped convolutions for
    dense ones.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Model(0)(torch.randn(1, 3, 32, 32))
    return 3 * counter.get_total_flops()


def best_matrix_product(device, dtype):
    """The most FLOP/s that a square matrix product of this type reaches on the device."""
    best = 0
    for n in (1024, 2048, 4096) + ((8192,) if device.type == "cuda" else ()):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for _ in range(6):
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def processor():
    """The CPU's name, with its family and model, as virtual machines call very different CPUs by one name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return f"{facts['model name']}, family {facts['cpu family']}, model {facts['model']}"
    except (OSError, KeyError):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=5, help="0: only print the results so far")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # in a child: which measurement, which variant
    arguments = parser.parse_args()
    if not arguments.repeats:
        return print_table()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    train_set = subset(load_images("cifar10", "train"), arguments.train_images)
    test_set = subset(load_images("cifar10", "test"), arguments.test_images)
    if arguments.measure:
        what, variant = arguments.measure
        print(json.dumps(MEASUREMENTS[what](variant, device, train_set, test_set)))
        return

    sizes = [f"--train-images={arguments.train_images}", f"--test-images={arguments.test_images}"]
    both = ["reference", "ours"]
    cuda = device.type == "cuda"
    loading = take_turns("loading", both, arguments.repeats, sizes)
    steps = take_turns(
        "step", [*both, *(["compiled", "contiguous"] if cuda else ["no dropout"])], arguments.repeats, sizes
    )
    busy = {} if cuda else take_turns("busy", both, arguments.repeats, sizes)
    epochs = take_turns("epoch", [*both, "tuned", "resnet"], max(1, arguments.repeats // 2), sizes)
    dtype = utils.autocast_dtype(device)
    matrix = best_matrix_product(device, dtype)
    root = str(pathlib.Path(__file__).parent.parent)
    clock = f"import sys, time; start = time.perf_counter(); sys.path.insert(0, {root!r})\n{FIRST_BATCH}"
    start_up = statistics.median(
        in_a_process("-c", clock + "print(time.perf_counter() - start)") for _ in range(min(3, arguments.repeats))
    )

    def column(rows, quantity):
        return {variant: row[quantity] for variant, row in rows.items()}

    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "type": str(dtype),
        "data": train_set.name,
        "train_images": len(train_set.labels),
        "test_images": len(test_set.labels),
        "data_path_images_per_second_and_core": column(loading, "images_per_second"),
        "step_images_per_second": column(steps, "images_per_second"),
        "step_beside_a_busy_core_images_per_second": column(busy, "images_per_second"),
        "epoch_seconds": column(epochs, "seconds"),
        "share_of_epoch_waiting_for_data": epochs["ours"]["waiting_share"],
        "step_flops_per_second": steps["ours"]["images_per_second"] * flops_per_image(),
        "best_matrix_product_flops_per_second": matrix,
        "peak_resident_megabytes": column(epochs, "peak_megabytes"),
        "seconds_from_import_to_first_batch": start_up,
        "seconds_of_compiling": steps["compiled"]["first_seconds"] if cuda else None,
    }
    name = re.sub(r"\W+", "-", f"speed {result['device']} {str(dtype).removeprefix('torch.')}".lower())
    write_atomically(RESULTS / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())

    print_table()


def print_table():
    """The results of all machines side by side; in brackets, how many times the plain loop's a figure is."""

    def compared(key, rates=lambda result, value: value):
        def cell(result):
            if not result.get(key):  # not measured on this device
                return ""
            ours, plain = (rates(result, result[key][variant]) for variant in ("ours", "reference"))
            return f"{ours:,.0f} ({ours / plain:.1f})"

        return cell

    def step_rate(variant):
        return lambda result: f"{rate:,.0f}" if (rate := result["step_images_per_second"].get(variant)) else ""

    def epoch_rate(result, seconds):
        return (result["train_images"] + result["test_images"]) / seconds

    def times(variant, schedule, other, others_schedule):
        """How many times as long a variant takes for the epochs of a recipe as another for those of another."""

        def cell(result):
            seconds = result["epoch_seconds"]
            if variant not in seconds or other not in seconds:
                return ""
            epochs, others_epochs = RECIPES[schedule]["epochs"], RECIPES[others_schedule]["epochs"]
            return f"{epochs * seconds[variant] / (others_epochs * seconds[other]):.2f}"

        return cell

    rows = {
        "computes in": lambda r: r["type"].removeprefix("torch."),
        "torch": lambda r: r["torch"],
        "images": lambda r: r["data"],
        "data path, images/s per core": compared("data_path_images_per_second_and_core"),
        "training step on ready tensors, images/s": compared("step_images_per_second"),
        "the same beside a busy core, images/s": compared("step_beside_a_busy_core_images_per_second"),
        "epoch with testing, images/s": compared("epoch_seconds", epoch_rate),
        "the plain loop's epoch, images/s": lambda r: f"{epoch_rate(r, r['epoch_seconds']['reference']):,.0f}",
        "share of the epoch that waits for data": lambda r: f"{r['share_of_epoch_waiting_for_data']:.1%}",
        "peak resident memory, MB (times the plain loop's)": compared("peak_resident_megabytes"),
        "from import to the first batch, s": lambda r: f"{r['seconds_from_import_to_first_batch']:.1f}",
        "the step without dropout, images/s": step_rate("no dropout"),
        "the step through torch.compile, images/s": step_rate("compiled"),
        "its first round, which compiles, s": lambda r: f"{s:.0f}" if (s := r.get("seconds_of_compiling")) else "",
        "the step in contiguous memory, images/s": step_rate("contiguous"),
        "a run of `resnet`, in runs of `tuned`": times("resnet", "resnet", "tuned", "tuned"),
        "80 epochs of the plain loop, in runs of `resnet-quick`": times("reference", "s9", "resnet", "resnet-quick"),
        "the step's share of the best matrix product's FLOP/s": lambda r: (
            f"{r['step_flops_per_second'] / r['best_matrix_product_flops_per_second']:.0%}"
        ),
    }
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("speed-*.json"))]
    print("\n| | " + " | ".join(result["device"] for result in results) + " |")
    print("|" + " --- |" * (1 + len(results)))
    for name, cell in rows.items():
        print(f"| {name} | " + " | ".join(map(cell, results)) + " |")


if __name__ == "__main__":
    main()
