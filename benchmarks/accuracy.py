"""How accurate: the recipes trained without a notebook at several seeds, and the tables and plot of RESULTS.md.

    python benchmarks/accuracy.py                                           # all but resnet-long, three seeds each
    python benchmarks/accuracy.py --recipes short --epochs 12               # on a schedule of 12 epochs
    python benchmarks/accuracy.py --recipes s9 tuned --ship-weights         # and renew weights/ from the first seed
    python benchmarks/accuracy.py --recipes short --plain                   # with the plain loop of reference.py
    python benchmarks/accuracy.py --seeds                                   # only the tables of the runs so far

A run that has a JSON in benchmarks/results is not repeated; one that was interrupted resumes after its last epoch. A
figure is that of the last epoch, not of the best. How the recipes were chosen: RESULTS.md.
"""

import argparse
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import matplotlib.pyplot as plt
import reference
import torch
from speed import processor

import utils
from image_sets import load_images
from output import save_figure, write_atomically
from pretrained import scores_of
from recipes import RECIPES, flatten_recipe

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OF_A_RUN = ("images", "classes", "seed")  # what a run records beside the recipe and the name of the data set


def train_recipe(name, epochs, seed, device, plain=False):
    """One run with the calls of the notebook, or of the plain loop; returns what is worth keeping of it."""
    recipe = utils.get_recipe(name) | {"epochs": epochs}
    options, transforms = {"batch_size": recipe["batch_size"]}, utils.get_train_transforms(**recipe["transforms"])
    class_to_idx, train_loader = utils.get_CIFARdataset_with_loader("train", options, transforms=transforms)
    _, test_loader = utils.get_CIFARdataset_with_loader("test", options)
    data = train_loader.dataset
    settings = utils.run_settings(recipe, train_loader, seed)
    if plain:
        train_loader, test_loader = reference.get_loaders(
            data, test_loader.dataset, device, **options, transforms=transforms
        )
    run = utils.Run(
        run_name(name, epochs, seed, device.type), data.name, ROOT / "runs" / ("parity" if plain else "accuracy")
    )
    utils.seed_everything(seed)
    model = utils.build_model(recipe, len(class_to_idx)).to(device)
    optimizer, scheduler, criterion = utils.build_training(recipe, model, len(train_loader))
    train_losses, train_acc, test_losses, test_acc = lists = run.resume(settings, model, optimizer, scheduler)
    with run:
        for _ in range(len(train_losses), epochs):
            if plain:
                trained = reference.train(model, device, train_loader, optimizer, criterion, scheduler)
                for values, value in zip(lists, (*trained, *reference.test(model, device, test_loader, criterion))):
                    values.append(value)
            else:
                utils.train(
                    model, device, train_loader, optimizer, criterion, train_losses, train_acc, scheduler, False
                )
                utils.test(model, device, test_loader, criterion, test_losses, test_acc, False)
            run.save(*lists)
            utils.post_progress(run)
    # The same images without augmentation: beside the test accuracy, it says how well the network generalises.
    _, as_they_are = utils.get_CIFARdataset_with_loader("train", options, transforms=utils.get_test_transforms())
    utils.test(model, device, as_they_are, criterion, test_acc=(plain_acc := []), verbose=False)
    summary = json.loads((run / "run.json").read_text())
    return {
        "recipe": name,
        "epochs": epochs,
        "seed": seed,
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "device": device.type,
        "type": "torch.float32" if plain else str(utils.autocast_dtype(device)),
        "data": data.name,
        **{key: summary[key] for key in ("threads", "versions", "hyperparameters")},
        "train_accuracy_percent": train_acc[-1],
        "unaugmented_train_accuracy_percent": plain_acc[0],
        "test_accuracy_percent": test_acc[-1],
        "history": run.history,
    }


def run_name(recipe, epochs, seed, device):
    return f"{recipe}-{device}-epochs{epochs}-seed{seed}"


def read_result(path, hyperparameters):
    """The JSON of an earlier run, None if there is none; exits if that run was of other hyperparameters."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    trained_with = {key: value for key, value in result["hyperparameters"].items() if key not in OF_A_RUN}
    either = sorted(hyperparameters.keys() | trained_with.keys())
    if changed := [key for key in either if trained_with.get(key) != hyperparameters.get(key)]:
        sys.exit(f"{path} is of a run with another {', '.join(changed)}; delete it to train again")
    return result


def read_results(device, data, folder):
    """The results on this kind of device and these images, {(recipe, epochs): [one a seed]}, longest runs first."""
    groups = {}
    for path in sorted((RESULTS / folder).glob("*.json")):
        name, epochs = path.stem.split(f"-{device}-epochs")
        result = json.loads(path.read_text())
        if result["hyperparameters"]["dataset"] == data:
            groups.setdefault((name, int(epochs.split("-")[0])), []).append(result)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])))


def mean_and_spread(values):
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def accuracy_table(groups):
    """A row per recipe and schedule, accuracies in % as mean ± standard deviation over the seeds."""
    milestones = (10, 20, 40)
    head = ["recipe", "epochs", "seeds", *(f"after epoch {epoch}" for epoch in milestones), "last", "training images"]
    lines = [head, ["---"] * len(head)]
    for (recipe, epochs), results in groups.items():
        accuracies = [[r["history"][e - 1]["test_acc"] for r in results] if e < epochs else [] for e in milestones]
        accuracies.append([r["history"][-1]["test_acc"] for r in results])
        accuracies.append([r["unaugmented_train_accuracy_percent"] for r in results if "recipe" in r])
        seeds = ", ".join(str(seed) for seed in sorted(r["hyperparameters"]["seed"] for r in results))
        lines.append([recipe, str(epochs), seeds, *map(mean_and_spread, accuracies)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(groups, path):
    """Mean test accuracy by epoch, on a logarithmic axis; the band spans the seeds."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for (recipe, epochs), results in groups.items():
        by_epoch = list(zip(*([row["test_acc"] for row in result["history"]] for result in results)))
        means = [statistics.mean(values) for values in by_epoch]
        (line,) = axis.plot(range(1, epochs + 1), means, label=f"{recipe}, {epochs} epochs: {means[-1]:.2f} %")
        lowest, highest = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
        axis.fill_between(range(1, epochs + 1), lowest, highest, alpha=0.25, color=line.get_color(), linewidth=0)
    axis.set(xscale="log", xlabel="epoch", ylabel="test accuracy (%)", ylim=(55, 95))
    axis.set_xticks(ticks := (1, 2, 5, 10, 20, 50, 100, 200), map(str, ticks))
    axis.set_title("Test accuracy on CIFAR-10, mean and range over three seeds")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    save_figure(figure, path)


def ship_weights(recipe, seed, device, note):
    """Copy the last weights of a run of the recipe's own length to weights/, with a JSON of where they come from."""
    name = run_name(recipe, RECIPES[recipe]["epochs"], seed, device)
    result = json.loads((RESULTS / "accuracy" / f"{name}.json").read_text())
    weights = (ROOT / "runs" / "accuracy" / name / "last.pt").read_bytes()
    model = utils.build_model(utils.get_recipe(recipe))
    model.load_state_dict(utils.load_weights(ROOT / "runs" / "accuracy" / name / "last.pt"))
    del result["history"]
    result |= {"scores": scores_of(model), "note": note}
    write_atomically(ROOT / "weights" / f"{recipe}.pt", weights)
    write_atomically(ROOT / "weights" / f"{recipe}.json", (json.dumps(result, indent=1) + "\n").encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=["s9", "tuned", "short", "resnet", "resnet-quick"]
    )
    parser.add_argument("--epochs", type=int, help="by default the recipe's own")
    parser.add_argument("--seeds", type=int, nargs="*", default=[4, 5, 6])
    parser.add_argument("--plain", action="store_true", help="does the plain loop learn as well?")
    parser.add_argument("--ship-weights", action="store_true", help="copy the first seed's weights to weights/")
    parser.add_argument("--note", default="", help="what else to say of the images, in the JSON of the weights")
    arguments = parser.parse_args()
    device, data = utils.best_device(), load_images("cifar10", "test").name
    folder = RESULTS / ("parity" if arguments.plain else "accuracy")
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            epochs = arguments.epochs or RECIPES[recipe]["epochs"]
            path = folder / f"{run_name(recipe, epochs, seed, device.type)}.json"
            if not read_result(path, flatten_recipe(RECIPES[recipe]) | {"epochs": epochs, "dataset": data}):
                result = train_recipe(recipe, epochs, seed, device, arguments.plain)
                write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
            if arguments.ship_weights and seed == arguments.seeds[0]:
                ship_weights(recipe, seed, device.type, arguments.note)

    groups = read_results(device.type, data, "accuracy")
    print(f"\n{data}, by this project\n\n{accuracy_table(groups)}")
    print(f"\nby the plain loop\n\n{accuracy_table(read_results(device.type, data, 'parity'))}")
    plot(groups, ROOT / "figures" / f"accuracy-{device.type}.png")


if __name__ == "__main__":
    main()
