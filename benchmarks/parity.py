"""Does the fast path learn as well as the plain loop? The s9 recipe for a few epochs, both ways, at several seeds.

    python benchmarks/parity.py --epochs 5 --seeds 1 2 3

Each run leaves one JSON in benchmarks/results/parity, and a run whose file is there is not repeated, so an interrupted
study goes on. The table printed at the end is the one of the README.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import reference
import torch
from torch import optim

import utils
from image_sets import load_images
from models import Model

RESULTS = pathlib.Path(__file__).parent / "results" / "parity"


def run_reference(epochs, device):
    images = load_images("cifar10", "train"), load_images("cifar10", "test")
    train_loader, test_loader = reference.get_loaders(*images, device)
    model = reference.get_model().to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.75)
    for _ in range(epochs):
        train_loss, train_acc = reference.train(model, device, train_loader, optimizer)
        test_loss, test_acc = reference.test(model, device, test_loader)
        scheduler.step()
        yield train_loss, train_acc, test_loss, test_acc


def run_fast(epochs, device):
    kwargs = {"batch_size": 256}
    _, train_loader = utils.get_CIFARdataset_with_loader("train", kwargs)
    _, test_loader = utils.get_CIFARdataset_with_loader("test", kwargs)
    model = Model(dropout_value=0.05).to(device)
    optimizer = utils.get_optimizer(model, "SGD", lr=0.2, momentum=0.9)
    scheduler = utils.get_scheduler(optimizer, step_size=5, gamma=0.75)
    criterion = utils.get_loss("nll_loss")
    train_losses, train_acc, test_losses, test_acc = [], [], [], []
    for _ in range(epochs):
        utils.train(model, device, train_loader, optimizer, criterion, train_losses, train_acc)
        utils.test(model, device, test_loader, criterion, test_losses, test_acc)
        scheduler.step()
        yield train_losses[-1], train_acc[-1], test_losses[-1], test_acc[-1]


VARIANTS = {"reference": run_reference, "fast": run_fast}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    RESULTS.mkdir(parents=True, exist_ok=True)

    for seed in arguments.seeds:
        for variant in arguments.variants:
            path = RESULTS / f"{variant}-{device.type}-epochs{arguments.epochs}-seed{seed}.json"
            if path.exists():
                continue
            torch.manual_seed(seed)
            start = time.perf_counter()
            history = []
            for row in VARIANTS[variant](arguments.epochs, device):
                history.append(dict(zip(("train_loss", "train_acc", "test_loss", "test_acc"), row)))
                print(variant, "seed", seed, "epoch", len(history), history[-1], flush=True)
            result = {
                "variant": variant,
                "seed": seed,
                "device": device.type,
                "torch": torch.__version__,
                "data": load_images("cifar10", "test").name,
                "minutes": round((time.perf_counter() - start) / 60, 2),
                "history": history,
            }
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(result, indent=1))
            os.replace(partial, path)

    print("\n| variant | seeds | test accuracy after the last epoch, mean ± standard deviation |\n| --- | --- | --- |")
    for variant in VARIANTS:
        pattern = f"{variant}-{device.type}-epochs{arguments.epochs}-seed*.json"
        finals = [json.loads(path.read_text())["history"][-1]["test_acc"] for path in sorted(RESULTS.glob(pattern))]
        if finals:
            spread = statistics.stdev(finals) if len(finals) > 1 else float("nan")
            print(f"| {variant} | {len(finals)} | {statistics.mean(finals):.2f} ± {spread:.2f} % |")


if __name__ == "__main__":
    main()
