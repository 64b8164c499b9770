"""The weights that ship: small, of the recipes as they are now, and as accurate as the JSON beside them says."""

import json
import os
import pathlib

import pytest
import torch

import utils
from image_sets import CIFAR10_CLASSES, load_images
from models import Model
from recipes import RECIPES, flatten_recipe

SHIPPED = ("s9", "tuned")
ROOT = pathlib.Path(__file__).parent.parent


def provenance(recipe):
    return json.loads((ROOT / "weights" / f"{recipe}.json").read_text())


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


@pytest.mark.parametrize("recipe", SHIPPED)
def test_accuracy_is_the_stated_one(recipe, cifar10):
    images, root = cifar10
    _, loader = utils.get_CIFARdataset_with_loader("test", {"batch_size": 500}, root=root)
    accuracies = []
    utils.test(Model.from_pretrained(recipe), "cpu", loader, utils.get_loss(), [], accuracies)
    stated = provenance(recipe)
    same_images = stated["hyperparameters"]["dataset"] == images.name
    # On the same images only rounding differs; the original images are a little different from their JPEG copies.
    assert accuracies[0] == pytest.approx(stated["test_accuracy_percent"], abs=0.2 if same_images else 3)


@pytest.mark.parametrize("recipe", SHIPPED)
def test_weights_are_small_and_finite(recipe):
    assert (ROOT / "weights" / f"{recipe}.pt").stat().st_size < 1e6
    model = Model.from_pretrained(recipe)
    assert not model.training and model.C1[0].dropout.p == RECIPES[recipe]["dropout"]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    untrained = Model()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), untrained.parameters()))


@pytest.mark.parametrize("recipe", SHIPPED)
def test_provenance_is_of_the_recipe_as_it_is(recipe):
    stated = provenance(recipe)
    flat = flatten_recipe(RECIPES[recipe])
    assert {key: stated["hyperparameters"][key] for key in flat} == flat
    assert {"seed", "data", "versions", "device", "processor", "test_accuracy_percent"} <= stated.keys()


def test_a_changed_network_says_that_the_weights_do_not_fit():
    class Changed(Model):
        def __init__(self, dropout_value):
            super().__init__(dropout_value)
            self.C1[0].conv = torch.nn.Conv2d(3, 16, 5, bias=False)

    with pytest.raises(ValueError, match=r"'tuned' do not fit the network, which was changed .* train it anew"):
        Changed.from_pretrained("tuned")


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match="there is s9, tuned"):
        Model.from_pretrained("best")
