"""Does the fast path learn as well as the plain loop? The runs of accuracy.py beside runs of the plain loop.

    python benchmarks/accuracy.py --recipes short --seeds 4 5 6 7 8
    python benchmarks/parity.py --recipe short --seeds 4 5 6

A run of the plain loop that has a JSON in benchmarks/results/parity is not repeated; one that was interrupted goes on
after its last epoch, from runs/parity. It ends with a table of both.
"""

import argparse
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import devices  # noqa: F401

import reference
from accuracy import ROOT, mean_and_spread, read_result, read_results, run_name
from speed import processor

import utils
from image_sets import load_images
from output import write_atomically
from recipes import RECIPES, flatten_recipe

RESULTS = ROOT / "benchmarks" / "results" / "parity"


def train_recipe(name, epochs, seed, device):
    """One run of the plain loop, with the network, optimizer, scheduler and loss of the recipe."""
    recipe = utils.get_recipe(name) | {"epochs": epochs}
    train_set, test_set = load_images("cifar10", "train"), load_images("cifar10", "test")
    transforms = utils.get_train_transforms(**recipe["transforms"])
    train_loader, test_loader = reference.get_loaders(train_set, test_set, device, recipe["batch_size"], transforms)
    run = utils.Run(run_name(name, epochs, seed, device.type), data=train_set.name, root=ROOT / "runs" / "parity")
    utils.seed_everything(seed)
    model = utils.build_model(recipe).to(device)
    optimizer, scheduler, criterion = utils.build_training(recipe, model, len(train_loader))
    settings = flatten_recipe(recipe) | {"dataset": test_set.name, "seed": seed}
    train_losses, train_acc, test_losses, test_acc = run.resume(settings, model, optimizer, scheduler)
    with run:
        for _ in range(len(train_losses), epochs):
            loss, accuracy = reference.train(model, device, train_loader, optimizer, criterion, scheduler)
            train_losses.append(loss), train_acc.append(accuracy)
            loss, accuracy = reference.test(model, device, test_loader, criterion)
            test_losses.append(loss), test_acc.append(accuracy)
            run.save(train_losses, train_acc, test_losses, test_acc)
            utils.post_progress(run)
    summary = json.loads((run / "run.json").read_text())
    made_by = {key: summary[key] for key in ("device", "threads", "versions", "hyperparameters")}
    return {"processor": processor()} | made_by | {"history": run.history}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="short")
    parser.add_argument("--epochs", type=int, help="by default the recipe's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6])
    arguments = parser.parse_args()
    recipe, device = arguments.recipe, utils.best_device()
    epochs, data = arguments.epochs or RECIPES[recipe]["epochs"], load_images("cifar10", "test").name
    RESULTS.mkdir(parents=True, exist_ok=True)
    plain = []
    for seed in arguments.seeds:
        path = RESULTS / f"{run_name(recipe, epochs, seed, device.type)}.json"
        if not (result := read_result(path, flatten_recipe(RECIPES[recipe]) | {"epochs": epochs, "dataset": data})):
            result = train_recipe(recipe, epochs, seed, device)
            write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
        plain.append(result["history"][-1]["test_acc"])

    ours = [r["test_accuracy_percent"] for r in read_results(device.type, data).get((recipe, epochs), ())]
    print(f"\n{data}: {recipe}, {epochs} epochs\n\n| | seeds | test accuracy, % |\n| --- | --- | --- |")
    for name, accuracies in ("plain loop", plain), ("this project", ours):
        print(f"| {name} | {len(accuracies)} | {mean_and_spread(accuracies)} |")
    if min(len(plain), len(ours)) > 1:
        error = (statistics.variance(plain) / len(plain) + statistics.variance(ours) / len(ours)) ** 0.5
        print(f"\ndifference {statistics.mean(ours) - statistics.mean(plain):+.2f}, standard error {error:.2f}")


if __name__ == "__main__":
    main()
