"""Recipes: everything that decides how a network is trained, in one table. `RECIPE` in the notebook names one of them.

The values are the arguments of `Model`, the loaders, `get_train_transforms`, `get_optimizer`, `get_scheduler` and
`get_loss`.
"""

import copy

# The same network trained better; benchmarks/trials.py has what was tried, on validation images.
TUNED = {
    "epochs": 60,
    "batch_size": 256,
    "dropout": 0.0,
    "transforms": {"flip": 0.5, "shift_scale_rotate": 0.5, "cutout": 0.0, "crop_padding": 4},
    "optimizer": {
        "name": "SGD",
        "lr": 0.3,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "decay": "weights",
    },
    # Linearly up to lr in the first fifth of the batches, and linearly down to nothing.
    "scheduler": {"name": "OneCycleLR", "pct_start": 0.2, "anneal_strategy": "linear", "cycle_momentum": False},
    # cross_entropy applies log_softmax to the log-probabilities once more, which changes nothing.
    "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
}
RECIPES = {
    # The original course run.
    "s9": {
        "epochs": 80,
        "batch_size": 256,
        "dropout": 0.05,
        "transforms": {"flip": 0.1, "shift_scale_rotate": 0.1, "cutout": 0.3, "crop_padding": 0},
        "optimizer": {"name": "SGD", "lr": 0.2, "momentum": 0.9},
        "scheduler": {"name": "StepLR", "step_size": 5, "gamma": 0.75},
        "loss": {"name": "nll_loss"},
    },
    "tuned": TUNED,
    # As good as s9 in a fifth of the epochs; with shift_scale_rotate it was not tried at this length.
    "short": TUNED | {"epochs": 16, "transforms": TUNED["transforms"] | {"shift_scale_rotate": 0.0}},
}


def get_recipe(name):
    """A copy of one of `RECIPES`, {setting: value or {argument: value}}, to use as it is or to change.

    Raises:
        ValueError: unknown name.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there is {', '.join(RECIPES)}")
    return copy.deepcopy(RECIPES[name])


def flatten_recipe(recipe):
    """A recipe as {"optimizer lr": 0.2, ...}, numbers and strings only: the form that `Run.resume` records.

    Raises:
        ValueError: a setting that no recipe has, such as a misspelt one.
    """
    known = RECIPES["s9"]
    flat = {}
    for setting, value in recipe.items():
        if setting not in known:
            raise ValueError(f"unknown setting {setting!r} in the recipe; there is {', '.join(known)}")
        arguments = value if isinstance(value, dict) else {"": value}
        for argument, given in arguments.items():
            plain = given if isinstance(given, (int, float, str, type(None))) else repr(given)
            flat[f"{setting} {argument}".strip()] = plain
    return flat
