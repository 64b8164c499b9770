"""The weights that ship: of the network and recipe as they are now, and as accurate as the JSON beside them says.

Where the network was changed since they were trained, what they do is not tested.
"""

import os
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

import models
import utils
from image_sets import CIFAR10_CLASSES, load_images
from models import Model
from pretrained import provenance, scores_of, shipped
from recipes import RECIPES, build_model, flatten_recipe, get_recipe, load_network

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "weights").glob("*.json"))
PART = 2_000  # of the test images, to save time


@pytest.fixture(params=SHIPPED)
def name(request):
    return request.param


@pytest.fixture
def network(name):
    """The class of the network that the weights are of."""
    stated = provenance(name)
    network = getattr(models, stated["hyperparameters"]["model"])
    try:
        (model := network()).load_state_dict(torch.load(ROOT / "weights" / f"{name}.pt", weights_only=True))
        unchanged = scores_of(model) == pytest.approx(stated["scores"], abs=0.05)
    except RuntimeError:
        unchanged = False
    if not unchanged:
        pytest.skip(f"the network has changed since the weights {name!r} were trained")
    return network


@pytest.fixture(scope="module")
def cifar10():
    """The test images of CIFAR-10, if they are at hand, in any form that needs no download."""
    root = pathlib.Path(os.environ.get("CIFAR10_ROOT") or ROOT / "data").expanduser()
    if not any((root / name).exists() for name in ("test", "cifar-10-batches-py", "cifar-10-python.tar.gz")):
        pytest.skip("no CIFAR-10 at hand; set CIFAR10_ROOT to check the accuracy of the weights")
    images = load_images("cifar10", "test", root)
    if images.classes != CIFAR10_CLASSES:
        pytest.skip(f"the images in {root} are not CIFAR-10's")
    return images, root


def test_what_ships():
    assert {"s9", "tuned"} <= set(SHIPPED) <= set(RECIPES)
    assert SHIPPED == sorted(path.stem for path in (ROOT / "weights").glob("*.pt")) == sorted(shipped())
    accuracies = [provenance(name)["test_accuracy_percent"] for name in shipped()]
    assert accuracies == sorted(accuracies, reverse=True)


def test_provenance_is_of_the_recipe_as_it_is(name):
    stated = provenance(name)
    flat = flatten_recipe(RECIPES[name])
    of_the_run = {key: stated["hyperparameters"].pop(key) for key in ("dataset", "images", "classes", "seed")}
    assert stated["hyperparameters"] == flat
    assert of_the_run["classes"] == "/".join(CIFAR10_CLASSES)
    assert {"seed", "data", "versions", "device", "processor", "test_accuracy_percent", "scores"} <= stated.keys()


def test_weights_are_small_trained_and_finite(name, network):
    assert (ROOT / "weights" / f"{name}.pt").stat().st_size < 1e6
    model = network.from_pretrained(name)
    assert not model.training
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {RECIPES[name]["dropout"]}
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters()))


def test_load_network_gives_the_same_and_its_classes(name, network):
    model, classes = load_network(name)
    assert type(model) is network and not model.training and tuple(classes) == CIFAR10_CLASSES
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), network.from_pretrained(name)(images))


def test_accuracy_is_the_stated_one(name, network, cifar10):
    images, root = cifar10
    part = np.random.default_rng(0).permutation(len(images.labels))[:PART]
    _, loader = utils.get_CIFARdataset_with_loader("test", {"batch_size": 500, "sampler": part.tolist()}, root=root)
    accuracies = []
    utils.test(network.from_pretrained(name), "cpu", loader, utils.get_loss(), [], accuracies)
    stated = provenance(name)
    expected = stated["test_accuracy_percent"]
    three_sigma = 3 * (expected * (100 - expected) / PART) ** 0.5
    # Copies of the images, such as one in JPEG, are a little different.
    same_images = stated["hyperparameters"]["dataset"] == images.name
    assert accuracies[0] == pytest.approx(expected, abs=three_sigma if same_images else max(3, three_sigma))


CHANGES = {
    "kernel": lambda model: setattr(model.C1[0], "conv", nn.Conv2d(3, 16, 5, bias=False)),
    "stride": lambda model: setattr(model.C1[0].conv, "stride", (2, 2)),
    "border": lambda model: setattr(model.C2[1].conv, "padding_mode", "reflect"),
    "a step without weights": lambda model: model.C1[0].append(nn.MaxPool2d(2)),
    "what comes out": lambda model: model.register_forward_hook(lambda module, inputs, output: output[:, :7]),
    "what is computed": lambda model: model.C3.register_forward_hook(lambda module, inputs, output: output / 2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_network_says_that_the_weights_do_not_fit(change):
    class Changed(Model):
        def __init__(self, dropout_value):
            super().__init__(dropout_value)
            change(self)

    with pytest.raises(ValueError, match=r"'tuned' do not fit Changed: .* the network was changed"):
        Changed.from_pretrained("tuned")


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match="'tuned' do not fit SeparableResNet: they are of Model"):
        models.SeparableResNet.from_pretrained("tuned")


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match=f"'best'.*there is {', '.join(shipped())}"):
        Model.from_pretrained("best")


def test_torch_hub_gives_the_networks_by_name():
    for name in SHIPPED:
        model = torch.hub.load(str(ROOT), name.replace("-", "_"), source="local", trust_repo=True)
        assert not model.training and scores_of(model) == pytest.approx(provenance(name)["scores"], abs=0.05)


def test_a_trained_body_with_a_new_head():
    recipe = get_recipe("finetune")
    model, trained = build_model(recipe, 3), models.SeparableResNet.from_pretrained(recipe["weights"])
    assert model.training and model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert torch.equal(model.C3[1][0].weight, trained.C3[1][0].weight)
