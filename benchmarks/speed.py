"""How fast: the plain loop, this project, and the limit, side by side in one run.

    python benchmarks/speed.py                      # the images of CIFAR10_ROOT; all of it on a CPU in about 5 minutes
    python benchmarks/speed.py --train-images 50000 --test-images 10000 --repeats 3     # whole epochs, for a GPU

The variants take turns within each repeat, so that a noisy machine disturbs them alike, and the median counts. Prints
the tables of the README and writes benchmarks/results/speed-<processor>-<type computed in>.json.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
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
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import utils
from augment import ImageBatches, SeededSampler, as_batch
from image_sets import load_images
from models import Model

BATCH_SIZE = 256
FIRST_BATCH = """
import utils, models
_, loader = utils.get_CIFARdataset_with_loader("train", {"batch_size": 256})
next(iter(loader))
"""


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(variants, repeats, device):
    """Median seconds of each variant, {name: seconds}, after one unmeasured turn."""
    seconds = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, function in variants.items():
            synchronize(device)
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                function()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def first(image_set, n):
    """The first n images, spread over the classes."""
    indices = torch.randperm(len(image_set.labels), generator=torch.Generator().manual_seed(0))[:n].numpy()
    return dataclasses.replace(image_set, images=image_set.images[indices], labels=image_set.labels[indices])


class Waiting:
    """A loader that adds up how long its consumer waits for it."""

    def __init__(self, loader):
        self.loader, self.dataset, self.seconds = loader, loader.dataset, 0.0

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


def fast_loader(image_set, transforms, shuffle):
    data = ImageBatches(image_set, transforms)
    sampler = torch.utils.data.RandomSampler(data) if shuffle else range(len(data))
    workers = 4 if torch.cuda.is_available() else 0
    return DataLoader(
        data,
        BATCH_SIZE,
        sampler=SeededSampler(sampler),
        collate_fn=as_batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


class Epoch:
    """One epoch of training and a test, by the plain loop or by this project."""

    def __init__(self, variant, train_set, test_set, device):
        self.variant, self.device = variant, device
        if variant == "reference":
            self.loaders = reference.get_loaders(train_set, test_set, device, BATCH_SIZE)
            self.model = reference.get_model().to(device)
        else:
            self.loaders = [
                Waiting(fast_loader(train_set, utils.get_train_transforms(), shuffle=True)),
                Waiting(fast_loader(test_set, utils.get_test_transforms(), shuffle=False)),
            ]
            self.model = Model(0.05).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def __call__(self):
        train_loader, test_loader = self.loaders
        if self.variant == "reference":
            reference.train(self.model, self.device, train_loader, self.optimizer)
            reference.test(self.model, self.device, test_loader)
        else:
            criterion = utils.get_loss()
            utils.train(self.model, self.device, train_loader, self.optimizer, criterion, [], [])
            utils.test(self.model, self.device, test_loader, criterion, [], [])


def data_path(train_set, repeats):
    """Augmented batches in this one process: images per second and core."""
    sample = first(train_set, 5120)
    compose = utils.get_train_transforms()
    loader = fast_loader(sample, utils.get_train_transforms(), shuffle=True)
    if loader.num_workers:  # one core against one core
        data = loader.dataset
        loader = DataLoader(data, BATCH_SIZE, sampler=SeededSampler(range(len(data))), collate_fn=as_batch)

    def one_by_one():
        for start in range(0, len(sample.images), BATCH_SIZE):
            torch.stack([compose(image=image)["image"] for image in sample.images[start : start + BATCH_SIZE]])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = take_turns({"reference": one_by_one, "ours": lambda: list(loader)}, repeats, torch.device("cpu"))
    torch.set_num_threads(threads)
    return {name: len(sample.images) / value for name, value in seconds.items()}


class ReadyBatches(list):
    """A list of batches with the attribute of a loader that `train` reads."""

    dataset = ()


def training_step(device, repeats, steps=8):
    """Steps on tensors that are on the device already, {variant: images per second}; the limit has no dropout.

    On a GPU "compiled" is this project's step through torch.compile. The second value returned is how many seconds
    compiling took, with the first steps, or None.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 10, (BATCH_SIZE,), generator=generator).to(device)
    batches = ReadyBatches([(images.to(memory_format=torch.channels_last), labels)] * steps)
    plain = reference.get_model().to(device).train()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)

    def plain_steps():
        for _ in range(steps):
            reference.train_step(plain, plain_optimizer, images, labels)

    def steps_of(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return functools.partial(utils.train, model, device, batches, optimizer, utils.get_loss(), [], [])

    variants = {
        "reference": plain_steps,
        "ours": steps_of(Model(0.05).to(device)),
        "limit": steps_of(Model(0).to(device)),
    }
    compiling = None
    if device.type == "cuda":
        variants["compiled"] = steps_of(torch.compile(Model(0.05).to(device)))
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            variants["compiled"]()
        synchronize(device)
        compiling = time.perf_counter() - start
    seconds = take_turns(variants, repeats, device)
    return {name: steps * BATCH_SIZE / value for name, value in seconds.items()}, compiling


def flops_per_image():
    """Floating-point operations of one training step, an image, as torch counts them."""
    model = Model(0)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 32, 32)).sum().backward()
    return counter.get_total_flops()


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


def in_a_process(*arguments):
    """What a run of this file, or of a piece of code, prints last, as a number."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def processor():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        return next(line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name"))
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", choices=["reference", "ours"], help=argparse.SUPPRESS)  # the child of in_a_process
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    train_set = first(load_images("cifar10", "train"), arguments.train_images)
    test_set = first(load_images("cifar10", "test"), arguments.test_images)
    if arguments.memory:
        with contextlib.redirect_stdout(io.StringIO()):
            Epoch(arguments.memory, train_set, test_set, device)()
        # Not getrusage: its maximum begins with that of the process that started this one.
        status = pathlib.Path("/proc/self/status").read_text()
        print(next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")))
        return

    loading = data_path(train_set, arguments.repeats)
    step, compiling = training_step(device, arguments.repeats)
    epochs = {variant: Epoch(variant, train_set, test_set, device) for variant in ("reference", "ours")}
    seconds = take_turns(epochs, max(1, arguments.repeats // 2), device)
    waited = sum(loader.seconds for loader in epochs["ours"].loaders)
    measured = (max(1, arguments.repeats // 2) + 1) * seconds["ours"]
    dtype = utils.autocast_dtype(device)
    matrix = best_matrix_product(device, dtype)
    sizes = [f"--train-images={arguments.train_images}", f"--test-images={arguments.test_images}"]
    memory = {variant: in_a_process(__file__, f"--memory={variant}", *sizes) for variant in epochs}
    root = str(pathlib.Path(__file__).parent.parent)
    clock = f"import sys, time; start = time.perf_counter(); sys.path.insert(0, {root!r})\n{FIRST_BATCH}"
    start_up = statistics.median(in_a_process("-c", clock + "print(time.perf_counter() - start)") for _ in range(3))

    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "type": str(dtype),
        "data": train_set.name,
        "train_images": len(train_set.labels),
        "test_images": len(test_set.labels),
        "data_path_images_per_second_and_core": loading,
        "step_images_per_second": step,
        "epoch_seconds": seconds,
        "share_of_epoch_waiting_for_data": waited / measured,
        "step_flops_per_second": step["ours"] * flops_per_image(),
        "best_matrix_product_flops_per_second": matrix,
        "peak_resident_megabytes": memory,
        "seconds_from_import_to_first_batch": start_up,
        "seconds_of_compiling": compiling,
    }
    name = re.sub(r"\W+", "-", f"speed {result['device']} {str(dtype).removeprefix('torch.')}".lower())
    path = pathlib.Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    utils.write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())

    rate = {name: (len(train_set.labels) + len(test_set.labels)) / value for name, value in seconds.items()}
    print("\n" + ", ".join(str(result[key]) for key in ("device", "threads", "torch", "type", "data")) + "\n")
    print("| | plain loop | this project | ratio | limit | share of the limit |\n| --- | --- | --- | --- | --- | --- |")
    for name, row in (
        ("data path, images/s and core", loading),
        ("training step on ready tensors, images/s", step),
        ("epoch with testing, images/s", rate),
    ):
        limit = f"{row['limit']:,.0f} | {row['ours'] / row['limit']:.0%}" if "limit" in row else "| "
        ratio = row["ours"] / row["reference"]
        print(f"| {name} | {row['reference']:,.0f} | {row['ours']:,.0f} | {ratio:.1f}x | {limit} |")
    print(f"| peak resident memory, MB | {memory['reference']:,.0f} | {memory['ours']:,.0f} | | | |\n")
    print(f"share of an epoch that waits for data: {result['share_of_epoch_waiting_for_data']:.1%}")
    print(f"import to first batch, data cached: {start_up:.1f} s")
    if compiling:
        print(f"step through torch.compile: {step['compiled']:,.0f} images/s, after {compiling:.0f} s of compiling")
    share = result["step_flops_per_second"] / matrix
    print(f"step: {result['step_flops_per_second'] / 1e9:,.0f} GFLOP/s, {share:.0%} of the best matrix product")


if __name__ == "__main__":
    main()
