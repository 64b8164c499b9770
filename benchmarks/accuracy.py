"""How accurate: the recipes trained without a notebook at several seeds, and the tables and plot of RESULTS.md.

    python benchmarks/accuracy.py                                           # all recipes, three seeds each
    python benchmarks/accuracy.py --recipes short --epochs 12               # on a schedule of 12 epochs
    python benchmarks/accuracy.py --recipes s9 tuned --ship-weights         # and renew weights/ from the first seed
    python benchmarks/accuracy.py --seeds                                   # only the tables of the runs so far

A run that has a JSON in benchmarks/results/accuracy is not repeated; one that was interrupted goes on after its last
epoch, from runs/accuracy. A figure is that of the last epoch, not of the best. How the recipes were chosen: RESULTS.md.
"""

import argparse
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import devices  # noqa: F401

import matplotlib.pyplot as plt
import torch
from speed import processor

import utils
from image_sets import load_images
from output import save_figure, write_atomically
from pretrained import scores_of
from recipes import RECIPES, flatten_recipe
from runs import load_weights

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
RUNS = ROOT / "runs" / "accuracy"
SPEED = ROOT / "benchmarks" / "results"
OF_A_RUN = ("images", "classes", "seed")  # what a run records beside the recipe and the name of the data set


def train_recipe(name, epochs, seed, device):
    """One run with the calls of the notebook; returns what is worth keeping of it."""
    recipe = utils.get_recipe(name) | {"epochs": epochs}
    options = {"batch_size": recipe["batch_size"]}
    transforms = utils.get_train_transforms(**recipe["transforms"])
    class_to_idx, train_loader = utils.get_CIFARdataset_with_loader("train", options, transforms=transforms)
    _, test_loader = utils.get_CIFARdataset_with_loader("test", options)
    data = train_loader.dataset
    run = utils.Run(run_name(name, epochs, seed, device.type), data=data.name, root=RUNS)
    utils.seed_everything(seed)
    model = utils.build_model(recipe, len(class_to_idx)).to(device)
    optimizer, scheduler, criterion = utils.build_training(recipe, model, len(train_loader))
    settings = utils.run_settings(recipe, train_loader, seed)
    train_losses, train_acc, test_losses, test_acc = run.resume(settings, model, optimizer, scheduler)
    with run:
        for _ in range(len(train_losses), epochs):
            utils.train(model, device, train_loader, optimizer, criterion, train_losses, train_acc, scheduler, False)
            utils.test(model, device, test_loader, criterion, test_losses, test_acc, False)
            run.save(train_losses, train_acc, test_losses, test_acc)
            utils.post_progress(run)
    # The same images without augmentation: beside the test accuracy, it says how well the network generalises.
    data.transforms, plain_acc = utils.get_test_transforms(), []
    utils.test(model, device, train_loader, criterion, test_acc=plain_acc)
    summary = json.loads((run / "run.json").read_text())
    return {
        "recipe": name,
        "epochs": epochs,
        "seed": seed,
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "device": device.type,
        "type": str(utils.autocast_dtype(device)),
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


def read_results(device, data):
    """The results on this kind of device and these images, {(recipe, epochs): [one a seed]}, longest runs first.

    Exits if the runs of a group are not of the same hyperparameters.
    """
    groups = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if (result["device"], result["data"]) == (device, data):
            groups.setdefault((result["recipe"], result["epochs"]), []).append(result)
    for (recipe, epochs), results in groups.items():
        settings = [{**result["hyperparameters"], "seed": None} for result in results]
        if any(one != settings[0] for one in settings):
            sys.exit(f"{RESULTS} has runs of {recipe}, {epochs} epochs, of different settings; delete the old ones")
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])))


def mean_and_spread(values):
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def as_table(lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def accuracy_table(groups):
    """A row per recipe and schedule, accuracies in % as mean ± standard deviation over the seeds."""
    milestones = (10, 20, 40)
    head = ["recipe", "epochs", "seeds", *(f"after epoch {epoch}" for epoch in milestones), "last", "training images"]
    lines = [head]
    for (recipe, epochs), results in groups.items():
        accuracies = [[r["history"][e - 1]["test_acc"] for r in results] if e < epochs else [] for e in milestones]
        accuracies += [[r[f"{kind}_accuracy_percent"] for r in results] for kind in ("test", "unaugmented_train")]
        seeds = ", ".join(str(seed) for seed in sorted(r["seed"] for r in results))
        lines.append([recipe, str(epochs), seeds, *map(mean_and_spread, accuracies)])
    return as_table(lines)


def machine(result):
    """What decides how long a run takes."""
    threads = f"{result['threads']} thread" + "s" * (result["threads"] > 1)
    return f"{result['processor']}, {threads}, {result['type'].removeprefix('torch.')}"


def time_table(groups):
    """A row per machine: mean minutes of a run, and how many times as fast it is as the plain loop's 80 epochs."""
    machines = {}
    for results in groups.values():
        for result in results:
            machines.setdefault(machine(result), []).append(result)
    lines = [["machine", *(f"{recipe}, {epochs} epochs" for recipe, epochs in groups), "plain loop, 80 epochs of S9"]]
    for name, results in sorted(machines.items()):
        plain = plain_loop_minutes(results[0])
        cells = []
        for group in groups:
            taken = [minutes(r) for r in results if (r["recipe"], r["epochs"]) == group]
            faster = f", {plain / statistics.mean(taken):.1f} times as fast" if taken and plain else ""
            cells.append(f"{statistics.mean(taken):.0f} minutes{faster}" if taken else "")
        lines.append([name, *cells, f"{plain:.0f} minutes" if plain else ""])
    return as_table(lines)


def minutes(result):
    return sum(row["seconds"] for row in result["history"]) / 60


def plain_loop_minutes(result):
    """What the plain loop of reference.py takes for 80 epochs on the machine of a result, by speed.py, or None."""
    for path in sorted(SPEED.glob("speed-*.json")):
        speed = json.loads(path.read_text())
        # The type tells processors of one name apart: it depends on what they are fast in.
        if [speed[key] for key in ("device", "threads", "type")] == [
            result[key] for key in ("processor", "threads", "type")
        ]:
            seconds = speed["epoch_seconds"]["reference"] * result["hyperparameters"]["images"] / speed["train_images"]
            return 80 * seconds / 60
    return None


def plot(groups, path):
    """Mean test accuracy by epoch; the band spans the seeds."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for (recipe, epochs), results in groups.items():
        by_epoch = list(zip(*([row["test_acc"] for row in result["history"]] for result in results)))
        means = [statistics.mean(values) for values in by_epoch]
        label = f"{recipe}, {epochs} epochs: {means[-1]:.2f} % ({len(results)} seed{'s' * (len(results) > 1)})"
        (line,) = axis.plot(range(1, epochs + 1), means, label=label)
        lowest, highest = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
        axis.fill_between(range(1, epochs + 1), lowest, highest, alpha=0.25, color=line.get_color(), linewidth=0)
        if (recipe, epochs) == ("s9", 80):
            axis.axhline(means[-1], color=line.get_color(), linestyle=":", linewidth=1, label="where s9 ends")
    every = [result for results in groups.values() for result in results]
    ends = [result["test_accuracy_percent"] for result in every]
    axis.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(min(60, min(ends) - 5), max(ends) + 2))
    names = ", ".join(sorted({result["data"] for result in every}))
    axis.set_title(f"Test accuracy on {names}, mean and range over the seeds")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    save_figure(figure, path)


def ship_weights(recipe, seed, device, note):
    """Copy the last weights of a run of the recipe's own length to weights/, with a JSON of where they come from."""
    name = run_name(recipe, RECIPES[recipe]["epochs"], seed, device)
    if not (RUNS / name / "last.pt").exists():
        sys.exit(f"the weights of {name} are gone; delete {RESULTS / name}.json to train them again")
    result = json.loads((RESULTS / f"{name}.json").read_text())
    run = json.loads((RUNS / name / "run.json").read_text())
    if run["last_test_accuracy_percent"] != result["test_accuracy_percent"]:
        sys.exit(f"{RUNS / name} is of another run than {RESULTS / name}.json; delete both to train again")
    del result["history"]
    model = utils.build_model(utils.get_recipe(recipe))
    model.load_state_dict(load_weights(RUNS / name / "last.pt"))
    result |= {"scores": scores_of(model), "note": note}
    weights = (RUNS / name / "last.pt").read_bytes()
    (ROOT / "weights").mkdir(exist_ok=True)
    write_atomically(ROOT / "weights" / f"{recipe}.pt", weights)
    write_atomically(ROOT / "weights" / f"{recipe}.json", (json.dumps(result, indent=1) + "\n").encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--epochs", type=int, help="by default the recipe's own")
    parser.add_argument("--seeds", type=int, nargs="*", default=[4, 5, 6])
    parser.add_argument("--ship-weights", action="store_true", help="copy the first seed's weights to weights/")
    parser.add_argument("--note", default="", help="what else to say of the images, in the JSON of the weights")
    arguments = parser.parse_args()
    if arguments.epochs is not None and (arguments.epochs < 1 or arguments.ship_weights):
        parser.error("--epochs must be at least 1, and only weights trained for the recipe's own number are shipped")
    if arguments.ship_weights and not arguments.seeds:
        parser.error("--ship-weights takes the weights of the first of the --seeds; give one")
    device = utils.best_device()
    data = load_images("cifar10", "test").name
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            epochs = arguments.epochs or RECIPES[recipe]["epochs"]
            path = RESULTS / f"{run_name(recipe, epochs, seed, device.type)}.json"
            if not read_result(path, flatten_recipe(RECIPES[recipe]) | {"epochs": epochs, "dataset": data}):
                result = train_recipe(recipe, epochs, seed, device)
                write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
            if arguments.ship_weights and seed == arguments.seeds[0]:
                ship_weights(recipe, seed, device.type, arguments.note)

    if not (groups := read_results(device.type, data)):
        sys.exit(f"no results on {data} with {device.type} yet")
    versions = {result["versions"]["torch"] for results in groups.values() for result in results}
    print(f"\n{data}; torch {', '.join(sorted(versions))}\n\n{accuracy_table(groups)}\n\n{time_table(groups)}")
    plot(groups, ROOT / "figures" / f"accuracy-{device.type}.png")


if __name__ == "__main__":
    main()
