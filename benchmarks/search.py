"""Which network and which recipe are best under the rules? Trials on validation images, kept by Optuna.

    python benchmarks/search.py --trials 20                            # twenty more trials of the search
    python benchmarks/search.py --arms "no holes" --seeds 1 2 3        # named changes of the recipe

5,000 of the 50,000 training images, 500 of each class and always the same, are for validation; the other 45,000 are
trained on. No test image is ever looked at. Processes, on several machines as well, can share the journal file.
"""

import argparse
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from torch.utils.data import SubsetRandomSampler

import utils
from image_sets import load_images

SGD = {"name": "SGD", "nesterov": True, "kernel_lr": None}
LITTLE = {"shift_scale_rotate": 0.02, "cutout": 0.02}
ARMS = {  # what is changed in resnet-quick
    "as it is": {},
    "no label smoothing": {"loss": {"label_smoothing": 0.0}},
    "no weight decay": {"optimizer": {"weight_decay": 0.0}},
    "SGD instead of Muon": {"optimizer": SGD},
    "no flips": {"transforms": {"flip": 0.0}},
    "no crops": {"transforms": {"crop_padding": 0}},
    "no shifts, scales, rotations": {"transforms": {"shift_scale_rotate": 0.0}},
    "no holes": {"transforms": {"cutout": 0.0}},
    "both at 0.02": {"transforms": LITTLE},
    "both at 0.02, momentum 0.8": {"transforms": LITTLE, "optimizer": {"momentum": 0.8}},
    "warm-up of a tenth": {"scheduler": {"pct_start": 0.1}},
}


def changed(recipe, change):
    """The recipe with some arguments of its settings replaced; those that become None are left out."""
    merged = {setting: recipe[setting] | arguments for setting, arguments in change.items()}
    return recipe | {name: {k: v for k, v in value.items() if v is not None} for name, value in merged.items()}


def suggest(trial):
    """The change of a trial of the search."""
    muon = trial.suggest_categorical("optimizer", ["SGD", "MuonSGD"]) == "MuonSGD"
    optimizer = {"kernel_lr": trial.suggest_float("kernel_lr", 0.005, 0.1, log=True)} if muon else SGD
    optimizer |= {"lr": trial.suggest_float("lr", 0.05, 1.0, log=True)}
    optimizer |= {"weight_decay": trial.suggest_float("weight_decay", 1e-4, 2e-3, log=True)}
    names = ("flip", "shift_scale_rotate", "cutout")
    transforms = {name: trial.suggest_categorical(name, [0.02, 0.1, 0.3, 0.5]) for name in names}
    smoothing = trial.suggest_categorical("label_smoothing", [0.0, 0.1, 0.2])
    return {"optimizer": optimizer, "transforms": transforms, "loss": {"label_smoothing": smoothing}}


def objective(trial):
    """Accuracy on the validation part after the last epoch, in %."""
    if trial.study.study_name == "arms" and not trial.user_attrs:
        raise optuna.TrialPruned  # another process has taken what was waiting
    change = ARMS[trial.user_attrs["arm"]] if trial.user_attrs else suggest(trial)
    utils.seed_everything(trial.user_attrs.get("seed", 1))
    recipe = changed(utils.get_recipe("resnet-quick"), change)
    device = utils.best_device()
    training, validation = utils.split_validation(load_images("cifar10", "train").labels)
    options = {"batch_size": recipe["batch_size"], "sampler": SubsetRandomSampler(training)}
    transforms = utils.get_train_transforms(**recipe["transforms"])
    _, train_loader = utils.get_CIFARdataset_with_loader("train", options, transforms=transforms)
    options = {"batch_size": 500, "sampler": validation}
    _, loader = utils.get_CIFARdataset_with_loader("train", options, transforms=utils.get_test_transforms())
    model = utils.build_model(recipe).to(device)
    optimizer, scheduler, criterion = utils.build_training(recipe, model, len(train_loader))
    accuracies = []
    for _ in range(recipe["epochs"]):
        utils.train(model, device, train_loader, optimizer, criterion, scheduler=scheduler)
        utils.test(model, device, loader, criterion, test_acc=accuracies)
    return accuracies[-1]


def open_study(name, journal):
    """One of the studies in the journal, which a process that was killed may have left with half a line at its end."""
    path = pathlib.Path(journal)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    # A lock by O_EXCL instead of a symlink, which Windows may forbid.
    storage = JournalStorage(JournalFileBackend(journal, lock_obj=JournalFileOpenLock(journal)))
    sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True)
    options = {"study_name": name, "storage": storage, "sampler": sampler}
    if name in optuna.get_all_study_names(storage):  # else a journal that is only shown would grow
        return optuna.load_study(**options)
    return optuna.create_study(**options, direction="maximize")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--journal", default=str(pathlib.Path(__file__).parent / "results" / "search.journal"))
    arguments = parser.parse_args()
    arms, search = open_study("arms", arguments.journal), open_study("recipe", arguments.journal)
    # As attributes, since a parameter's choices are fixed for the life of a study, and arms are added.
    asked = [{"arm": arm, "seed": seed} for seed in arguments.seeds for arm in arguments.arms]
    for attributes in asked:
        if attributes not in [trial.user_attrs for trial in arms.trials]:
            arms.enqueue_trial({}, user_attrs=attributes)
    if asked:
        arms.optimize(objective, n_trials=sum(trial.state.name == "WAITING" for trial in arms.trials))
    if arguments.trials:
        search.optimize(objective, n_trials=arguments.trials, catch=FloatingPointError)

    accuracies = {}
    complete = [optuna.trial.TrialState.COMPLETE]
    for trial in arms.get_trials(states=complete):
        accuracies.setdefault(trial.user_attrs["arm"], []).append(trial.value)
    print("\n| change of the recipe | validation accuracy, % | mean |\n| --- | --- | --- |")
    for arm, values in accuracies.items():
        print(f"| {arm} | {', '.join(f'{value:.2f}' for value in values)} | {statistics.mean(values):.2f} |")
    for trial in sorted(search.get_trials(states=complete), key=lambda trial: -trial.value):
        print(f"{trial.value:.2f} %: {trial.params}")


if __name__ == "__main__":
    main()
