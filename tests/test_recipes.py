"""Recipes against the figures of the course's run and a schedule computed by hand, and each through a real step."""

import pytest
import torch
from torch import nn

import utils
from models import Model
from recipes import RECIPES, flatten_recipe, get_recipe


def build(name, epochs, steps_per_epoch, lr=None):
    recipe = get_recipe(name)
    recipe["optimizer"]["lr"] = lr or recipe["optimizer"]["lr"]
    model = Model(recipe["dropout"])
    optimizer = utils.get_optimizer(model, **recipe["optimizer"])
    scheduler = utils.get_scheduler(optimizer, **recipe["scheduler"], epochs=epochs, steps_per_epoch=steps_per_epoch)
    return recipe, model, optimizer, scheduler


def learning_rates(name, epochs, steps_per_epoch, lr=None):
    """The rate that each batch of a run is trained with."""
    _, _, optimizer, scheduler = build(name, epochs, steps_per_epoch, lr)
    rates = []
    for _ in range(epochs * steps_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_s9_is_the_original_run():
    recipe, model, optimizer, _ = build("s9", 80, 196)
    assert (recipe["epochs"], recipe["batch_size"], model.C1[0].dropout.p) == (80, 256, 0.05)
    assert type(optimizer) is torch.optim.SGD
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.2, 0.9, False, 0)
    assert type(utils.get_loss(**recipe["loss"])) is nn.NLLLoss
    assert repr(utils.get_train_transforms(**recipe["transforms"])) == repr(utils.get_train_transforms())
    rates = learning_rates("s9", 80, 3)
    assert rates == pytest.approx([0.2 * 0.75 ** (epoch // 5) for epoch in range(80) for _ in range(3)])


@pytest.mark.parametrize("name", ["tuned", "short"])
def test_tuned_rises_and_falls_in_straight_lines(name):
    peak, steps = RECIPES[name]["optimizer"]["lr"], 500
    rates = learning_rates(name, 10, steps // 10)
    top = steps // 5 - 1
    assert rates[top] == max(rates) == pytest.approx(peak) and rates[0] < peak / 20
    rise = [rates[0] + (peak - rates[0]) * step / top for step in range(top)]
    fall = [peak * (steps - 1 - step) / (steps - 1 - top) for step in range(top, steps)]
    assert rates == pytest.approx(rise + fall, abs=1e-4 * peak)


@pytest.mark.parametrize("name", RECIPES)
def test_the_learning_rate_of_a_recipe_is_its_largest(name):
    assert max(learning_rates(name, 10, 20, lr=0.07)) == pytest.approx(0.07, rel=1e-3)


def test_a_run_too_short_to_rise_and_fall_is_refused():
    with pytest.raises(ValueError, match="1 epochs of 5 batches are too few"):
        build("tuned", 1, 5)
    build("tuned", 1, 6)


def test_tuned_decays_the_weights_of_convolutions_only():
    _, model, optimizer, _ = build("tuned", 1, 10)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    of_weights = {decay[id(m.weight)] for m in model.modules() if isinstance(m, nn.Conv2d)}
    others = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert of_weights == {RECIPES["tuned"]["optimizer"]["weight_decay"]} and min(of_weights) > 0
    assert {decay[id(p)] for p in [*others, model.classifier.bias]} == {0}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_a_batch_by_heart(name, digits, tmp_path):
    recipe, model, optimizer, scheduler = build(name, 30, 1)
    compose = utils.get_test_transforms()
    images = torch.stack([compose(image=image)["image"] for image in digits["train"].images[:40]])
    batch = images, torch.from_numpy(digits["train"].labels[:40])
    run = utils.Run("run", root=tmp_path)
    lists = run.resume(flatten_recipe(recipe) | {"seed": 1}, model, optimizer, scheduler)
    losses, accuracies = lists[:2]
    for _ in range(30):
        utils.train(model, "cpu", [batch], optimizer, utils.get_loss(**recipe["loss"]), losses, accuracies, scheduler)
    assert accuracies[-1] > 80 and losses[-1] < losses[0] / 2
    utils.get_train_transforms(**recipe["transforms"])(image=digits["train"].images[0])


def test_a_recipe_is_a_copy():
    get_recipe("s9")["optimizer"]["lr"] = 99
    assert RECIPES["s9"]["optimizer"]["lr"] == 0.2


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(ValueError, match=r"unknown recipe 'S9'; there is s9, tuned"):
        get_recipe("S9")


def test_flat_form():
    recipe = {
        "epochs": 3,
        "optimizer": {"name": "AdamW", "lr": 0.1, "betas": (0.9, 0.95)},
        "loss": {"name": "nll_loss"},
    }
    assert flatten_recipe(recipe) == {
        "epochs": 3,
        "optimizer name": "AdamW",
        "optimizer lr": 0.1,
        "optimizer betas": "(0.9, 0.95)",
        "loss name": "nll_loss",
    }
    with pytest.raises(ValueError, match="unknown setting 'dropuot' in the recipe; there is epochs, batch_size, dropo"):
        flatten_recipe(recipe | {"dropuot": 0.1})
