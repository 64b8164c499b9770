"""How accurate: the recipes trained without a notebook at several seeds, and the tables and plot of RESULTS.md.

    python benchmarks/accuracy.py                                     # all but resnet-long, three seeds each
    python benchmarks/accuracy.py --recipes s9 tuned --ship-weights   # and renew weights/ from the first seed
    python benchmarks/accuracy.py --seeds                             # only the tables of the runs so far

A run that has a JSON in benchmarks/results is not repeated, and one that was interrupted resumes.
"""

import argparse
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import matplotlib.pyplot as plt
import reference
from speed import processor

import utils
from image_sets import load_images
from output import save_figure, write_atomically
from pretrained import scores_of
from recipes import RECIPES, flatten_recipe, load_network

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUN_NAME = "{}-{}-epochs{}-seed{}"  # recipe, kind of device, epochs, seed


def train_recipe(name, epochs, seed, device, plain=False):
    """One run with the calls of the notebook, or of the plain loop; returns what is worth keeping of it."""
    recipe = utils.get_recipe(name) | {"epochs": epochs}
    options, transforms = {"batch_size": recipe["batch_size"]}, utils.get_train_transforms(**recipe["transforms"])
    class_to_idx, train_loader = utils.get_CIFARdataset_with_loader("train", options, transforms=transforms)
    _, test_loader = utils.get_CIFARdataset_with_loader("test", options)
    data, settings = train_loader.dataset, utils.run_settings(recipe, train_loader, seed)
    if plain:
        both = data, test_loader.dataset
        train_loader, test_loader = reference.get_loaders(*both, device, **options, transforms=transforms)
    folder = ROOT / "runs" / ("parity" if plain else "accuracy")
    run = utils.Run(RUN_NAME.format(name, device.type, epochs, seed), data.name, folder)
    utils.seed_everything(seed)
    model = utils.build_model(recipe, len(class_to_idx)).to(device)
    optimizer, scheduler, criterion = utils.build_training(recipe, model, len(train_loader))
    lists = run.resume(settings, model, optimizer, scheduler)
    with run:
        for _ in range(len(lists[0]), epochs):
            if plain:
                trained = reference.train(model, device, train_loader, optimizer, criterion, scheduler)
                for values, value in zip(lists, (*trained, *reference.test(model, device, test_loader, criterion))):
                    values.append(value)
            else:
                utils.train(model, device, train_loader, optimizer, criterion, *lists[:2], scheduler, verbose=False)
                utils.test(model, device, test_loader, criterion, *lists[2:], verbose=False)
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
        "processor": processor(device),
        "device": device.type,
        "type": "torch.float32" if plain else str(utils.autocast_dtype(device)),
        "data": data.name,
        **{key: summary[key] for key in ("threads", "versions", "hyperparameters")},
        "train_accuracy_percent": lists[1][-1],
        "unaugmented_train_accuracy_percent": plain_acc[0],
        "test_accuracy_percent": lists[3][-1],
        "history": run.history,
    }


def is_done(path, hyperparameters):
    """Whether there is the JSON of an earlier run; exits if that run was of other hyperparameters."""
    if path.exists():
        now, then = hyperparameters, json.loads(path.read_text())["hyperparameters"]
        names = sorted((now.keys() | then.keys()) - {"images", "classes", "seed"})
        if changed := [name for name in names if then.get(name) != now.get(name)]:
            sys.exit(f"{path} is of a run with another {', '.join(changed)}; delete it to train again")
    return path.exists()


def read_results(device, data, folder):
    """The results on this kind of device and these images, {(recipe, epochs): [one a seed]}, longest runs first."""
    groups = {}
    for path in sorted((RESULTS / folder).glob("*.json")):
        name, epochs = path.stem.split(f"-{device}-epochs")
        result = json.loads(path.read_text())
        if result["hyperparameters"]["dataset"] == data:
            groups.setdefault((name, int(epochs.split("-")[0])), []).append(result)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])))


def accuracy_table(groups):
    """A row per recipe and schedule, accuracies in % as mean ± standard deviation over the seeds."""
    milestones = (10, 20, 40)
    head = ["recipe", "epochs", "seeds", *(f"after epoch {epoch}" for epoch in milestones), "last", "training images"]
    lines = [head, ["---"] * len(head)]
    for (recipe, epochs), results in groups.items():
        accuracies = [[r["history"][e - 1]["test_acc"] for r in results] if e < epochs else [] for e in milestones]
        accuracies.append([r["history"][-1]["test_acc"] for r in results])
        accuracies.append([r["unaugmented_train_accuracy_percent"] for r in results if "recipe" in r])
        cells = [f"{statistics.mean(values):.2f}" if values else "" for values in accuracies]
        cells = [f"{c} ± {statistics.stdev(v):.2f}" if len(v) > 1 else c for c, v in zip(cells, accuracies)]
        seeds = ", ".join(str(seed) for seed in sorted(r["hyperparameters"]["seed"] for r in results))
        lines.append([recipe, str(epochs), seeds, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(groups, path):
    """Mean test accuracy by epoch, on a logarithmic axis; the band spans the seeds."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for (recipe, epochs), results in groups.items():
        by_epoch = list(zip(*([row["test_acc"] for row in result["history"]] for result in results)))
        means = [statistics.mean(values) for values in by_epoch]
        (line,) = axis.plot(range(1, epochs + 1), means, label=f"{recipe}, {epochs} epochs: {means[-1]:.2f} %")
        bounds = [*map(min, by_epoch)], [*map(max, by_epoch)]
        axis.fill_between(range(1, epochs + 1), *bounds, alpha=0.25, color=line.get_color(), linewidth=0)
    axis.set(xscale="log", xlabel="epoch", ylabel="test accuracy (%)", ylim=(55, 95))
    axis.set_xticks(ticks := (1, 2, 5, 10, 20, 50, 100, 200), map(str, ticks))
    axis.set_title("Test accuracy on CIFAR-10, mean and range over three seeds")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    save_figure(figure, path)


def ship_weights(recipe, seed, device, note):
    """Copy the last weights of a run of the recipe's own length to weights/, with a JSON of where they come from."""
    name = RUN_NAME.format(recipe, device, RECIPES[recipe]["epochs"], seed)
    result, weights = json.loads((RESULTS / "accuracy" / f"{name}.json").read_text()), ROOT / "runs" / "accuracy" / name
    model, _ = load_network(weights / "last.pt")
    del result["history"]
    result |= {"scores": scores_of(model), "note": note}
    write_atomically(ROOT / "weights" / f"{recipe}.pt", (weights / "last.pt").read_bytes())
    write_atomically(ROOT / "weights" / f"{recipe}.json", (json.dumps(result, indent=1) + "\n").encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["s9", "tuned", "short", "resnet", "resnet-quick"]
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=default)
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
            path = folder / f"{RUN_NAME.format(recipe, device.type, epochs, seed)}.json"
            if not is_done(path, flatten_recipe(RECIPES[recipe]) | {"epochs": epochs, "dataset": data}):
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
