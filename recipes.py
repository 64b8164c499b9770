"""Recipes: everything that decides how a network is trained, in one table, and what builds a run from one.

The values are arguments of the network, the loaders, and the `get_` functions of transforms, optimizers and the rest.
"""

import copy

import models
from optimization import get_loss, get_optimizer, get_scheduler
from pretrained import provenance

MUON = {"name": "MuonSGD", "lr": 0.3, "kernel_lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "decay": "weights"}
# The S9 network trained better; RESULTS.md says how it was chosen.
TUNED = {
    "model": "Model",
    "epochs": 60,
    "batch_size": 256,
    "dropout": 0.0,
    "transforms": {"flip": 0.5, "shift_scale_rotate": 0.5, "cutout": 0.0, "crop_padding": 4},
    "optimizer": MUON,
    # Linearly up to lr in the first fifth of the batches, and linearly down to nothing.
    "scheduler": {"name": "OneCycleLR", "pct_start": 0.2, "anneal_strategy": "linear", "cycle_momentum": False},
    # cross_entropy applies log_softmax to the log-probabilities once more, which changes nothing.
    "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
}


def resnet(epochs, shift_scale_rotate, cutout):
    """The second network; the longer it trains, the more augmentation it takes."""
    transforms = {"flip": 0.5, "shift_scale_rotate": shift_scale_rotate, "cutout": cutout, "crop_padding": 4}
    return TUNED | {"model": "SeparableResNet", "epochs": epochs, "batch_size": 128, "transforms": transforms}


RECIPES = {
    # The original course run.
    "s9": {
        "model": "Model",
        "epochs": 80,
        "batch_size": 256,
        "dropout": 0.05,
        "transforms": {"flip": 0.1, "shift_scale_rotate": 0.1, "cutout": 0.3, "crop_padding": 0},
        "optimizer": {"name": "SGD", "lr": 0.2, "momentum": 0.9},
        "scheduler": {"name": "StepLR", "step_size": 5, "gamma": 0.75},
        "loss": {"name": "nll_loss"},
    },
    "tuned": TUNED,
    # Not tried with shift_scale_rotate at this length.
    "short": TUNED | {"epochs": 16, "transforms": TUNED["transforms"] | {"shift_scale_rotate": 0.0}},
    "resnet": resnet(48, 0.3, 0.3),
    "resnet-quick": resnet(8, 0.1, 0.1),
    "resnet-long": resnet(200, 0.5, 0.5),
    # Few images, of classes that the weights do not know: the trained network with a new classifier.
    "finetune": resnet(20, 0.1, 0.1)
    | {"weights": "resnet-long", "batch_size": 16, "optimizer": MUON | {"lr": 0.03, "kernel_lr": 0.002}},
    # Of the handwritten digits: few batches an epoch, and no mirrored digits.
    "demo": TUNED
    | {
        "epochs": 8,
        "batch_size": 32,
        "transforms": {"flip": 0.0, "shift_scale_rotate": 0.1, "cutout": 0.1, "crop_padding": 0},
        "optimizer": MUON | {"lr": 0.1},
        "loss": {"name": "nll_loss"},
    },
}


def get_recipe(name):
    """A copy of one of `RECIPES`, {setting: value or {argument: value}}, to use or to change; ValueError if unknown."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there is {', '.join(RECIPES)}")
    return copy.deepcopy(RECIPES[name])


def build_model(recipe, num_classes=10):
    """The recipe's network on the CPU, untrained, or with the body of the weights that the recipe names."""
    model = getattr(models, recipe["model"])(recipe["dropout"], num_classes)
    if recipe.get("weights"):
        trained, _ = load_network(recipe["weights"])
        trained.classifier = model.classifier
        model.load_state_dict(trained.state_dict())
    return model


def load_network(weights):
    """(model, classes) of weights that ship, by name, or of a run's last.pt, by path; raises as `from_pretrained`."""
    trained = provenance(weights).get("hyperparameters", {})
    network = getattr(models, str(trained.get("model")), None)
    if not hasattr(network, "from_pretrained"):
        raise ValueError(f"{weights} is not of a network in models.py, trained with the settings of run_settings")
    return network.from_pretrained(weights), trained["classes"].split("/")


def build_training(recipe, model, steps_per_epoch):
    """(optimizer, scheduler, criterion) of a recipe for a model on its device; `train` takes the scheduler."""
    optimizer = get_optimizer(model, **recipe["optimizer"])
    length = {"epochs": recipe["epochs"], "steps_per_epoch": steps_per_epoch}
    return optimizer, get_scheduler(optimizer, **recipe["scheduler"], **length), get_loss(**recipe["loss"])


def flatten_recipe(recipe):
    """A recipe as {"optimizer lr": 0.2, ...}, in plain values; ValueError for a setting that no recipe has."""
    flat, known = {}, {setting for each in RECIPES.values() for setting in each}
    for setting, value in recipe.items():
        if setting not in known:
            raise ValueError(f"unknown setting {setting!r} in the recipe; there is {', '.join(sorted(known))}")
        for argument, given in value.items() if isinstance(value, dict) else [("", value)]:
            plain = isinstance(given, (int, float, str, type(None)))
            flat[f"{setting} {argument}".strip()] = given if plain else repr(given)
    return flat


def run_settings(recipe, loader, seed):
    """Recipe, images and seed in the form that `Run.resume` records."""
    data = loader.dataset
    classes = "/".join(data.classes)  # which no name of a folder can hold
    return flatten_recipe(recipe) | {"dataset": data.name, "images": len(data), "classes": classes, "seed": seed}
