"""The trained weights that ship in `weights/`, each beside a JSON that says where they come from."""

import json
import pathlib

from torch import nn

from runs import load_weights

WEIGHTS = pathlib.Path(__file__).parent / "weights"


def provenance(name):
    """What is known of the weights `weights/<name>.pt`: recipe, images, versions, accuracy, as a dict.

    Raises:
        ValueError: no weights of that name.
    """
    names = sorted(path.stem for path in WEIGHTS.glob("*.json"))
    if name not in names:
        raise ValueError(f"no weights {name!r} in {WEIGHTS}; there is {', '.join(names)}")
    return json.loads((WEIGHTS / f"{name}.json").read_text())


def most_accurate():
    """The name of the weights with the highest test accuracy."""
    names = [path.stem for path in WEIGHTS.glob("*.json")]
    return max(names, key=lambda name: provenance(name)["test_accuracy_percent"])


class Pretrained(nn.Module):
    """A network of which there are trained weights, named for the recipe that they were trained by."""

    @classmethod
    def from_pretrained(cls, name):
        """The network with the weights `weights/<name>.pt`, in evaluation mode on the CPU.

        Raises:
            ValueError: no weights of that name, or of another network, or the network was changed since.
        """
        trained = provenance(name)["hyperparameters"]
        model = cls(dropout_value=trained["dropout"])
        try:
            model.load_state_dict(load_weights(WEIGHTS / f"{name}.pt"))
        except RuntimeError:
            raise ValueError(
                f"the weights {name!r} do not fit {cls.__name__}: they are of {trained['model']}, or the network was "
                "changed after they were trained. Train it anew, and load_state_dict the weights of that run"
            ) from None
        return model.eval()
