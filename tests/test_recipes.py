"""Recipes: the figures of the original run, schedules computed by hand, real steps."""

import albumentations as A
import numpy as np
import pytest
import torch
from torch import nn

import utils
from augment import ShiftScaleRotate
from recipes import RECIPES, build_model, build_training, flatten_recipe, get_recipe, run_settings


def prepared(name, steps_per_epoch, **changed):
    recipe = get_recipe(name) | changed
    model = build_model(recipe)
    return recipe, model, *build_training(recipe, model, steps_per_epoch)


def test_s9_is_the_original_run():
    recipe, model, optimizer, _, criterion = prepared("s9", 196)
    assert (recipe["epochs"], recipe["batch_size"], model.C1[0].dropout.p) == (80, 256, 0.05)
    assert type(optimizer) is torch.optim.SGD and criterion.func is torch.nn.functional.nll_loss
    assert [optimizer.defaults[key] for key in ("lr", "momentum", "nesterov", "weight_decay")] == [0.2, 0.9, False, 0]
    assert repr(utils.get_train_transforms(**recipe["transforms"])) == repr(utils.get_train_transforms())


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_fall_in_steps_for_s9_and_else_rise_and_fall_in_straight_lines(name):
    recipe, _, optimizer, scheduler, _ = prepared(name, 50, epochs=10)
    rates, peaks = [], [recipe["optimizer"].get(key, 0.2) for key in ("lr", "kernel_lr")]
    for _ in range(500):
        rates.append([optimizer.param_groups[group]["lr"] for group in (0, -1)])
        optimizer.step()
        scheduler.step()
    shape = 0.75 ** (np.arange(500) // 250) if name == "s9" else np.interp(np.arange(500), [0, 99, 499], [0.04, 1, 0])
    np.testing.assert_allclose(np.array(rates) / peaks, np.stack([shape, shape], axis=1), atol=1e-4)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "s9"])
def test_weights_decay_unless_muon_sets_their_scale_and_nothing_else_does(name):
    _, model, optimizer, _, _ = prepared(name, 10)
    bare = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.bias is None]
    dense = {module.weight for module in bare if module.in_channels > module.groups}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["muon"] == (parameter in dense)
            assert group["muon"] or group["weight_decay"] == (5e-4 if parameter.ndim > 1 else 0)


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
def test_recipes_learn_a_batch_by_heart(name, digits):
    torch.manual_seed(0)
    recipe, model, optimizer, scheduler, criterion = prepared(name, 1, epochs=15)
    compose = utils.get_train_transforms(**recipe["transforms"])
    images = torch.stack([compose(image=image)["image"] for image in digits["train"].images[:10]])
    batches, losses, accuracies = [(images, torch.from_numpy(digits["train"].labels[:10]))], [], []
    for _ in range(15):
        utils.train(model, "cpu", batches, optimizer, criterion, losses, accuracies, scheduler)
    assert accuracies[-1] > 80 and losses[-1] < losses[0] / 2
    assert {"name": recipe["loss"]["name"], **criterion.keywords} == recipe["loss"]


def test_a_recipe_is_a_copy_by_name_that_becomes_the_settings_of_a_run():
    recipe = get_recipe("s9")
    recipe["optimizer"] |= {"lr": 99, "betas": (0.9, 0.95)}
    assert RECIPES["s9"]["optimizer"]["lr"] == 0.2
    _, loader = utils.get_CIFARdataset_with_loader("test", {"batch_size": 100}, "digits")
    settings = run_settings(recipe, loader, seed=7)
    flat = {"dataset": loader.dataset.name, "images": 360, "classes": "0/1/2/3/4/5/6/7/8/9", "seed": 7, "epochs": 80}
    assert settings.items() >= flat.items() and len(settings) == 20 and settings["optimizer betas"] == "(0.9, 0.95)"
    with pytest.raises(ValueError, match="dropout"):
        flatten_recipe(recipe | {"dropuot": 0.1})
    with pytest.raises(ValueError, match="tuned"):
        get_recipe("S9")
