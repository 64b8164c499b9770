"""The weights that ship: of the network and recipe as they are now, and as accurate as the JSON beside them says."""

import os
import pathlib

import pytest
import torch
from torch import nn

import models
import utils
from image_sets import CIFAR10_CLASSES
from pretrained import provenance, scores_of, shipped
from recipes import RECIPES, build_model, flatten_recipe, get_recipe, load_network

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "weights").glob("*.json"))


def test_what_ships_is_listed_by_accuracy():
    assert SHIPPED == sorted(path.stem for path in (ROOT / "weights").glob("*.pt"))
    assert shipped() == sorted(SHIPPED, key=lambda name: -provenance(name)["test_accuracy_percent"])


@pytest.mark.parametrize("name", SHIPPED)
def test_the_weights_are_of_their_recipe_and_of_the_network_as_it_is(name):
    stated = provenance(name)
    assert {"seed", "data", "versions", "device", "processor"} <= stated.keys()
    of_the_run = {key: stated["hyperparameters"].pop(key) for key in ("dataset", "images", "classes", "seed")}
    assert stated["hyperparameters"] == flatten_recipe(RECIPES[name])
    assert (ROOT / "weights" / f"{name}.pt").stat().st_size < 1e6
    network = getattr(models, RECIPES[name]["model"])
    by_name, classes = load_network(name)
    assert tuple(classes) == CIFAR10_CLASSES == tuple(of_the_run["classes"].split("/"))
    from_hub = torch.hub.load(str(ROOT), name.replace("-", "_"), source="local", trust_repo=True)
    for model in (by_name, network.from_pretrained(name), from_hub):
        assert type(model) is network and not model.training
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {RECIPES[name]["dropout"]}
        assert scores_of(model) == pytest.approx(stated["scores"], abs=0.05)


def test_the_accuracy_is_the_stated_one():
    root = pathlib.Path(os.environ.get("CIFAR10_ROOT") or ROOT / "data").expanduser()
    if not any((root / name).exists() for name in ("test", "cifar-10-batches-py", "cifar-10-python.tar.gz")):
        pytest.skip("no CIFAR-10 at hand; set CIFAR10_ROOT to check the accuracy of the weights")
    options = {"batch_size": 500, "sampler": range(0, 10_000, 5)}  # a part, to save time
    _, loader = utils.get_CIFARdataset_with_loader("test", options, root=root)
    if loader.dataset.classes != CIFAR10_CLASSES:
        pytest.skip(f"the images in {root} are not CIFAR-10's")
    for name in SHIPPED:
        utils.test(load_network(name)[0], "cpu", loader, utils.get_loss(), test_acc=(accuracies := []))
        # Sampled, and copies of the images, such as one in JPEG, are a little different.
        assert accuracies == [pytest.approx(provenance(name)["test_accuracy_percent"], abs=3)], name


CHANGES = {
    "kernel": lambda model: setattr(model.C1[0], "conv", nn.Conv2d(3, 16, 5, bias=False)),
    "border": lambda model: setattr(model.C2[1].conv, "padding_mode", "reflect"),
    "what comes out": lambda model: model.register_forward_hook(lambda module, inputs, output: output[:, :7]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_network_says_that_the_weights_do_not_fit(change):
    class Changed(models.Model):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            change(self)

    with pytest.raises(ValueError, match="not fit"):
        Changed.from_pretrained("tuned")


def test_weights_of_another_network_and_of_an_unknown_name_are_refused():
    with pytest.raises(ValueError, match="of Model"):
        models.SeparableResNet.from_pretrained("tuned")
    with pytest.raises(ValueError, match=", ".join(shipped())):
        models.Model.from_pretrained("best")


def test_a_trained_body_gets_a_new_head():
    recipe = get_recipe("finetune")
    model, trained = build_model(recipe, 3), models.SeparableResNet.from_pretrained(recipe["weights"])
    assert model.training and model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert torch.equal(model.C3[1][0].weight, trained.C3[1][0].weight)
