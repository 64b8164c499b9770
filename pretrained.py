"""The trained weights that ship in `weights/`, each beside a JSON that says where they come from."""

import json
import pathlib

import numpy as np
import torch
from torch import nn

from output import load_weights

WEIGHTS = pathlib.Path(__file__).parent / "weights"


def shipped():
    """The names of the weights that ship, a list, the most accurate first."""
    names = sorted(path.stem for path in WEIGHTS.glob("*.json"))
    return sorted(names, key=lambda name: -provenance(name)["test_accuracy_percent"])


def provenance(name):
    """What is known of the weights `weights/<name>.pt`: recipe, images, versions, accuracy, as a dict."""
    try:
        return json.loads((WEIGHTS / f"{name}.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"no weights {name!r} in {WEIGHTS}; there is {', '.join(shipped())}") from None


def scores_of(model):
    """The scores of a fixed image, a list: a fingerprint of network and weights."""
    with torch.no_grad():
        return model.eval()(torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32))[0].tolist()


class Pretrained(nn.Module):
    """A network of which there are trained weights, named for the recipe that they were trained by."""

    @classmethod
    def from_pretrained(cls, name):
        """The network with the weights `weights/<name>.pt`, in evaluation mode on the CPU.

        Raises:
            ValueError: no weights of that name, or of another network, or the network was changed since.
        """
        stated = provenance(name)
        trained, weights = stated["hyperparameters"], load_weights(WEIGHTS / f"{name}.pt")
        model = cls(dropout_value=trained["dropout"])
        try:
            model.load_state_dict(weights)
            fits = np.allclose(scores_of(model), stated["scores"], atol=0.05)  # processors round differently
        except (RuntimeError, ValueError):  # other shapes
            fits = False
        if not fits:
            raise ValueError(
                f"the weights {name!r} do not fit {cls.__name__}: they are of {trained['model']}, or the network was "
                "changed after they were trained. Train it anew, and load_state_dict the weights of that run"
            )
        return model
