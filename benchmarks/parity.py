"""Does the fast path learn as well as the plain loop? A recipe of S9, both ways, at several seeds.

    python benchmarks/parity.py --recipe short --seeds 1 2 3

Each run leaves one JSON in benchmarks/results/parity, and a run whose file is there is not repeated, so an interrupted
study goes on. It ends with a table of both.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import devices  # noqa: F401

import reference
import torch
from accuracy import mean_and_spread, read_result

import utils
from image_sets import load_images
from output import write_atomically
from recipes import RECIPES, flatten_recipe

RESULTS = pathlib.Path(__file__).parent / "results" / "parity"


def run(variant, recipe, device):
    """Yield (training loss, training accuracy, test loss, test accuracy) after each epoch."""
    transforms = utils.get_train_transforms(**recipe["transforms"])
    if variant == "plain loop":
        images = load_images("cifar10", "train"), load_images("cifar10", "test")
        train_loader, test_loader = reference.get_loaders(*images, device, recipe["batch_size"], transforms)
    else:
        options = {"batch_size": recipe["batch_size"]}
        _, train_loader = utils.get_CIFARdataset_with_loader("train", options, transforms=transforms)
        _, test_loader = utils.get_CIFARdataset_with_loader("test", options)
    model = utils.build_model(recipe).to(device)
    optimizer, scheduler, criterion = utils.build_training(recipe, model, len(train_loader))
    for _ in range(recipe["epochs"]):
        if variant == "plain loop":
            trained = reference.train(model, device, train_loader, optimizer, criterion, scheduler)
            yield *trained, *reference.test(model, device, test_loader, criterion)
        else:
            lists = [], [], [], []
            utils.train(model, device, train_loader, optimizer, criterion, *lists[:2], scheduler)
            utils.test(model, device, test_loader, criterion, *lists[2:])
            yield [values[0] for values in lists]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="short")
    parser.add_argument("--epochs", type=int, help="by default the recipe's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    recipe, device = utils.get_recipe(arguments.recipe), utils.best_device()
    recipe["epochs"] = arguments.epochs or recipe["epochs"]
    hyperparameters = flatten_recipe(recipe) | {"dataset": load_images("cifar10", "test").name}
    RESULTS.mkdir(parents=True, exist_ok=True)
    study = f"{arguments.recipe}-{device.type}-epochs{recipe['epochs']}"
    accuracies = {"plain loop": [], "this project": []}
    for seed in arguments.seeds:
        for variant, finals in accuracies.items():
            path = RESULTS / f"{study}-{variant.replace(' ', '-')}-seed{seed}.json"
            if not (result := read_result(path, hyperparameters)):
                utils.seed_everything(seed)
                start, history = time.perf_counter(), []
                for row in run(variant, recipe, device):
                    history.append(dict(zip(("train_loss", "train_acc", "test_loss", "test_acc"), row)))
                    print(variant, "seed", seed, "epoch", len(history), history[-1], flush=True)
                result = {
                    "variant": variant,
                    "hyperparameters": hyperparameters,
                    "seed": seed,
                    "device": device.type,
                    "torch": torch.__version__,
                    "minutes": round((time.perf_counter() - start) / 60, 2),
                    "history": history,
                }
                write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
            finals.append(result["history"][-1]["test_acc"])

    print(f"\n{arguments.recipe}, {recipe['epochs']} epochs\n\n| | seeds | test accuracy, % |\n| --- | --- | --- |")
    for variant, finals in accuracies.items():
        print(f"| {variant} | {len(finals)} | {mean_and_spread(finals)} |")
    if len(arguments.seeds) > 1:
        plain, ours = accuracies.values()
        error = (statistics.variance(plain) / len(plain) + statistics.variance(ours) / len(ours)) ** 0.5
        print(f"\ndifference {statistics.mean(ours) - statistics.mean(plain):+.2f}, standard error {error:.2f}")


if __name__ == "__main__":
    main()
