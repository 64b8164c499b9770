"""Which network and which recipe are best under the rules? A search on validation images, by Optuna.

    python benchmarks/search.py --trials 20     # go on with the study, for twenty more trials
    python benchmarks/search.py                 # the table and the plots of the trials so far
    python benchmarks/search.py --ablation      # the recipe without one of its ingredients at a time, at two seeds

5,000 of the 50,000 training images, 500 of each class and always the same, are for validation; the other 45,000 are
trained on. No test image is ever looked at. The study is one journal file, benchmarks/results/search.journal: it goes
on after an interruption, and processes that share the file share the study, on other machines through a shared folder
as well: `--journal /shared/search.journal`. Hyperband ends trials early that are behind others of the same length.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import devices  # noqa: F401

import matplotlib.pyplot as plt
import optuna
import torch
import torch.nn.functional as F
from accuracy import read_result
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import nn
from torch.utils.data import SubsetRandomSampler
from torch.utils.flop_counter import FlopCounterMode

import utils
from image_sets import load_images
from models import Residual, layer, separable
from output import write_atomically
from recipes import RECIPES, flatten_recipe

RESULTS = pathlib.Path(__file__).parent / "results"
FIGURES = pathlib.Path(__file__).parent.parent / "figures"
EPOCHS = 8
MOST_PARAMETERS = 200_000
MOST_MULTIPLY_ADDS = 40e6  # per image; S9 takes 32 million, in layers that a CPU computes less well


class Candidate(nn.Module):
    """A network of the layers of `models.SeparableResNet`, from the settings of a trial; C4 may be empty."""

    channels_last = True

    def __init__(self, settings):
        super().__init__()
        widths = [settings[f"C{block} width"] for block in (1, 2, 3, 4)]

        def residuals(block):
            width, count = settings[f"C{block} width"], settings[f"C{block} residuals"]
            if block > 2:
                return [Residual(separable(width), separable(width, activation=nn.Identity)) for _ in range(count)]
            dilations = [2 if block == 1 or settings["C1 residuals"] == 0 else 1] + [1] * count
            return [
                Residual(layer(width, width, dilation=dilation), layer(width, width, activation=nn.Identity))
                for dilation in dilations[:count]
            ]

        def strided(block, groups):
            return layer(widths[block - 1], widths[block], stride=2, groups=groups)

        self.C1 = nn.Sequential(layer(3, widths[0]), *residuals(1), strided(1, 1))
        self.C2 = nn.Sequential(*residuals(2), strided(2, settings["groups"]))
        self.C3 = nn.Sequential(*residuals(3), strided(3, settings["groups"]))
        last = [Residual(separable(widths[3], activation=nn.Identity)) for _ in range(settings["C4 residuals"])]
        self.C4 = nn.Sequential(*last)
        self.classifier = nn.Linear(widths[3], 10)

    def forward(self, x):
        x = self.C4(self.C3(self.C2(self.C1(x))))
        return F.log_softmax(self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1)), dim=1, dtype=torch.float32)


def suggest(trial):
    """(settings of a network, recipe) of a trial."""
    choose = trial.suggest_categorical
    settings = {
        "C1 width": choose("C1 width", [16, 32]),
        "C1 residuals": trial.suggest_int("C1 residuals", 0, 2),
        "C2 width": choose("C2 width", [32, 48, 64]),
        "C2 residuals": trial.suggest_int("C2 residuals", 1, 2),
        "C3 width": choose("C3 width", [64, 96, 128]),
        "C3 residuals": trial.suggest_int("C3 residuals", 1, 3),
        "C4 width": choose("C4 width", [96, 128, 160]),
        "C4 residuals": trial.suggest_int("C4 residuals", 0, 2),
        "groups": choose("groups", [1, 2, 4]),
    }
    recipe = utils.get_recipe("resnet-quick")
    recipe["epochs"] = EPOCHS
    recipe["batch_size"] = choose("batch_size", [64, 128, 256])
    recipe["optimizer"] = {"name": choose("optimizer", ["SGD", "MuonSGD"]), "momentum": 0.9, "decay": "weights"}
    recipe["optimizer"]["lr"] = trial.suggest_float("lr", 0.05, 1.0, log=True)
    recipe["optimizer"]["weight_decay"] = trial.suggest_float("weight_decay", 1e-4, 2e-3, log=True)
    if recipe["optimizer"]["name"] == "SGD":
        recipe["optimizer"]["nesterov"] = True  # which Muon's has anyway
    else:
        recipe["optimizer"]["kernel_lr"] = trial.suggest_float("kernel_lr", 0.005, 0.1, log=True)
    recipe["loss"]["label_smoothing"] = choose("label_smoothing", [0.0, 0.1, 0.2])
    recipe["transforms"]["shift_scale_rotate"] = choose("shift_scale_rotate", [0.1, 0.3, 0.5])
    recipe["transforms"]["cutout"] = choose("cutout", [0.1, 0.3, 0.5])
    return settings, recipe


def multiply_adds(model):
    """Per image of 32x32."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() / 2


def validate(model, recipe, report=lambda epoch, accuracy: None):
    """Train on the training part and return the accuracy on the validation part after the last epoch, in %."""
    device = utils.best_device()
    training, validation = utils.split_validation(load_images("cifar10", "train").labels)
    options = {"batch_size": recipe["batch_size"], "sampler": SubsetRandomSampler(training)}
    transforms = utils.get_train_transforms(**recipe["transforms"])
    _, train_loader = utils.get_CIFARdataset_with_loader("train", options, transforms=transforms)
    options = {"batch_size": 500, "sampler": validation}
    _, loader = utils.get_CIFARdataset_with_loader("train", options, transforms=utils.get_test_transforms())
    optimizer, scheduler, criterion = utils.build_training(recipe, model.to(device), len(train_loader))
    accuracies = []
    for epoch in range(1, recipe["epochs"] + 1):
        utils.train(model, device, train_loader, optimizer, criterion, scheduler=scheduler, verbose=False)
        utils.test(model, device, loader, criterion, test_acc=accuracies, verbose=False)
        print(f"  epoch {epoch}/{recipe['epochs']}: {accuracies[-1]:.2f} %", flush=True)
        report(epoch, accuracies[-1])
    return accuracies[-1]


def objective(trial):
    settings, recipe = suggest(trial)
    utils.seed_everything(1)
    model = Candidate(settings)
    parameters, cost = sum(p.numel() for p in model.parameters()), multiply_adds(model)
    trial.set_user_attr("parameters", parameters)
    trial.set_user_attr("million multiply-adds", round(cost / 1e6, 1))
    trial.set_user_attr("activation", type(layer(1, 1)[-1]).__name__)
    if parameters >= MOST_PARAMETERS or cost > MOST_MULTIPLY_ADDS:
        raise optuna.TrialPruned("too large")

    def report(epoch, accuracy):
        trial.report(accuracy, epoch)
        if epoch < EPOCHS and trial.should_prune():
            raise optuna.TrialPruned

    try:
        return validate(model, recipe, report)
    except FloatingPointError:
        raise optuna.TrialPruned("diverged") from None


def ablation(seeds=(1, 2)):
    """The recipe resnet-quick as it is, and without one ingredient at a time; validation accuracies in %."""
    path = RESULTS / "ablation.json"
    whole = RECIPES["resnet-quick"]
    data = load_images("cifar10", "train").name
    empty = {"hyperparameters": flatten_recipe(whole) | {"dataset": data}, "accuracies": {}}
    results = read_result(path, empty["hyperparameters"]) or empty
    sgd = {name: value for name, value in whole["optimizer"].items() if name != "kernel_lr"}
    sgd |= {"name": "SGD", "nesterov": True}
    without = {
        "as it is": {},
        "no label smoothing": {"loss": whole["loss"] | {"label_smoothing": 0.0}},
        "no weight decay": {"optimizer": whole["optimizer"] | {"weight_decay": 0.0}},
        "SGD instead of Muon": {"optimizer": sgd},
        "no flips": {"transforms": whole["transforms"] | {"flip": 0.0}},
        "no crops": {"transforms": whole["transforms"] | {"crop_padding": 0}},
        "no shifts, scales, rotations": {"transforms": whole["transforms"] | {"shift_scale_rotate": 0.0}},
        "no holes": {"transforms": whole["transforms"] | {"cutout": 0.0}},
    }
    for seed in seeds:
        for name, change in without.items():
            accuracies = results["accuracies"].setdefault(name, {})
            if str(seed) in accuracies:
                continue
            print(f"{name}, seed {seed}", flush=True)
            recipe = utils.get_recipe("resnet-quick") | change
            utils.seed_everything(seed)
            accuracies[str(seed)] = validate(utils.build_model(recipe), recipe)
            write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
    print("\n| recipe | validation accuracy, % |\n| --- | --- |")
    for name, accuracies in results["accuracies"].items():
        print(f"| {name} | {', '.join(f'{accuracy:.2f}' for accuracy in accuracies.values())} |")


def open_study(journal, to_go_on):
    """The study in a journal file, which is written to only to go on; new then if there is none yet."""
    storage, name = JournalStorage(JournalFileBackend(journal)), "resnet"
    if not to_go_on:
        return optuna.load_study(study_name=name, storage=storage)
    return optuna.create_study(
        storage=storage,
        study_name=name,
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True),
        # Not after fewer epochs: while the learning rate rises, the accuracy says little, and less the higher it is.
        pruner=optuna.pruners.HyperbandPruner(min_resource=4, max_resource=EPOCHS, reduction_factor=2),
    )


def show(study):
    """The table of all trials, best first, and Optuna's plots of the history and of what mattered."""
    trials = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not trials:
        return print(f"{len(study.trials)} trials, none of them to the end yet: most are too large, so ask for more")
    columns = list(dict.fromkeys(name for trial in trials for name in trial.params))
    attributes = ["parameters", "million multiply-adds", "activation"]
    print(f"{len(study.trials)} trials, {len(trials)} of them to the end of {EPOCHS} epochs\n")
    print(f"| validation accuracy, % | {' | '.join(attributes + columns)} |")
    print("|" + " --- |" * (1 + len(attributes) + len(columns)))
    for trial in sorted(trials, key=lambda trial: -trial.value):
        values = [trial.user_attrs[name] for name in attributes] + [trial.params.get(name, "") for name in columns]
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        print(f"| {trial.value:.2f} | {' | '.join(cells)} |")
    optuna.visualization.matplotlib.plot_optimization_history(study)
    plt.savefig(FIGURES / "search-history.png", dpi=120, bbox_inches="tight")
    if len(trials) > 3:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        optuna.visualization.matplotlib.plot_param_importances(study, evaluator=evaluator)
        plt.savefig(FIGURES / "search-importance.png", dpi=120, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--journal", default=str(RESULTS / "search.journal"))
    parser.add_argument("--ablation", action="store_true")
    arguments = parser.parse_args()
    if arguments.ablation:
        return ablation()
    study = open_study(arguments.journal, to_go_on=arguments.trials > 0)
    if arguments.trials:
        study.optimize(objective, n_trials=arguments.trials)
    show(study)


if __name__ == "__main__":
    main()
