"""Recipes: the figures of the original run, schedules computed by hand, the rules of the assignment, real steps."""

import albumentations as A
import pytest
import torch
from torch import nn

import utils
from augment import ShiftScaleRotate
from recipes import RECIPES, build_model, build_training, flatten_recipe, get_recipe, run_settings


def prepared(name, steps_per_epoch, epochs=None, lr=None):
    """(recipe, model, optimizer, scheduler, criterion), of other epochs and learning rate if they are given."""
    recipe = get_recipe(name)
    recipe["epochs"] = epochs or recipe["epochs"]
    recipe["optimizer"]["lr"] = lr or recipe["optimizer"]["lr"]
    model = build_model(recipe)
    return recipe, model, *build_training(recipe, model, steps_per_epoch)


def learning_rates(name, steps_per_epoch, **changed):
    """The rate that each batch of a run is trained with."""
    recipe, _, optimizer, scheduler, _ = prepared(name, steps_per_epoch, **changed)
    rates = []
    for _ in range(recipe["epochs"] * steps_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_s9_is_the_original_run():
    recipe, model, optimizer, _, criterion = prepared("s9", 196)
    assert (recipe["epochs"], recipe["batch_size"], model.C1[0].dropout.p) == (80, 256, 0.05)
    assert type(optimizer) is torch.optim.SGD and criterion.func is torch.nn.functional.nll_loss
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.2, 0.9, False, 0)
    assert repr(utils.get_train_transforms(**recipe["transforms"])) == repr(utils.get_train_transforms())
    rates = learning_rates("s9", 3)
    assert rates == pytest.approx([0.2 * 0.75 ** (epoch // 5) for epoch in range(80) for _ in range(3)])


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "s9"])
def test_the_others_rise_and_fall_in_straight_lines(name):
    peak, steps = 0.07, 500
    rates = learning_rates(name, steps // 10, epochs=10, lr=peak)
    top = steps // 5 - 1
    assert rates[top] == max(rates) == pytest.approx(peak) and rates[0] < peak / 20
    rise = [rates[0] + (peak - rates[0]) * step / top for step in range(top)]
    fall = [peak * (steps - 1 - step) / (steps - 1 - top) for step in range(top, steps)]
    assert rates == pytest.approx(rise + fall, abs=1e-4 * peak)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "s9"])
def test_weights_decay_unless_muon_sets_their_scale_and_nothing_else_does(name):
    _, model, optimizer, _, _ = prepared(name, 10)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    of_muon = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
    assert of_muon == {id(m.weight) for m in convolutions if m.in_channels > m.groups}
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    others = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert {decay[id(p)] for p in weights if id(p) not in of_muon} == {5e-4}
    assert {decay[id(p)] for p in [*others, model.classifier.bias]} == {0}


@pytest.mark.parametrize("name", RECIPES)
def test_training_images_are_augmented_by_the_rules(name):
    transforms = utils.get_train_transforms(**RECIPES[name]["transforms"])
    fires = {type(transform): transform.p for transform in transforms.transforms}
    if name == "s9" or RECIPES[name]["model"] != "Model":  # the other ways to train S9 go without some
        assert all(fires[kind] > 0 for kind in (A.HorizontalFlip, ShiftScaleRotate, A.CoarseDropout))
    assert isinstance(transforms, A.Compose) and (fires[A.HorizontalFlip] > 0) == (name != "demo")


# Of those that differ only in how long they train and on what, one is enough.
@pytest.mark.parametrize(
    "name", {repr(r | {"epochs": 0, "transforms": {}}): name for name, r in RECIPES.items()}.values()
)
def test_recipes_learn_a_batch_by_heart(name, digits, tmp_path):
    """From the recipe to the epochs of a run, by the same calls as in the notebook."""
    torch.manual_seed(0)
    recipe, model, optimizer, scheduler, criterion = prepared(name, 1, epochs=15)
    compose = utils.get_train_transforms(**recipe["transforms"])
    images = torch.stack([compose(image=image)["image"] for image in digits["train"].images[:10]])
    labels = torch.from_numpy(digits["train"].labels[:10])
    _, loader = utils.get_CIFARdataset_with_loader("test", dataset="digits")
    run = utils.Run("run", root=tmp_path)
    losses, accuracies, *_ = run.resume(run_settings(recipe, loader, 1), model, optimizer, scheduler)
    for _ in range(15):
        utils.train(model, "cpu", [(images, labels)], optimizer, criterion, losses, accuracies, scheduler)
    assert accuracies[-1] > 80 and losses[-1] < losses[0] / 2


def test_a_recipe_is_a_copy():
    get_recipe("s9")["optimizer"]["lr"] = 99
    assert RECIPES["s9"]["optimizer"]["lr"] == 0.2


def test_settings_of_a_run():
    recipe = get_recipe("s9") | {"epochs": 3, "optimizer": {"name": "AdamW", "betas": (0.9, 0.95)}}
    _, loader = utils.get_CIFARdataset_with_loader("test", {"batch_size": 100}, "digits")
    settings = run_settings(recipe, loader, seed=7)
    flat = {"epochs": 3, "dropout": 0.05, "optimizer name": "AdamW", "optimizer betas": "(0.9, 0.95)"}
    flat |= {"scheduler gamma": 0.75, "transforms flip": 0.1, "loss name": "nll_loss"}
    flat |= {"dataset": loader.dataset.name, "images": 360, "classes": "0/1/2/3/4/5/6/7/8/9", "seed": 7}
    assert settings.items() >= flat.items() and len(settings) == 18


def test_unknown_names_say_which_there_are():
    with pytest.raises(ValueError, match=r"unknown recipe 'S9'; there is s9, tuned"):
        get_recipe("S9")
    with pytest.raises(ValueError, match="unknown setting 'dropuot' in the recipe; there is batch_size, dropout"):
        flatten_recipe(get_recipe("s9") | {"dropuot": 0.1})
