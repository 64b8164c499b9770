"""Trained weights, each beside a JSON that says where they come from: those in `weights/`, and those of runs."""

import json
import pathlib
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from output import load_weights
from runs import printed

WEIGHTS = pathlib.Path(__file__).parent / "weights"


def shipped():
    """The names of the weights that ship, a list, the most accurate first."""
    names = sorted(path.stem for path in WEIGHTS.glob("*.json"))
    return sorted(names, key=lambda name: -provenance(name)["test_accuracy_percent"])


def provenance(weights):
    """What is known of weights that ship, by name, or of a run's last.pt or best.pt, a dict; ValueError if nothing."""
    path = pathlib.Path(weights)
    file = path.with_name("run.json") if path.suffix == ".pt" else WEIGHTS / f"{weights}.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        names = ", ".join(shipped())
        raise ValueError(f"no weights {weights}; there is {names}, and runs/<name>/last.pt with its run.json") from None


def scores_of(model):
    """The scores of a fixed image, a list: a fingerprint of network and weights."""
    with torch.no_grad():
        return model.eval()(torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32))[0].tolist()


class Pretrained(nn.Module):
    """A network of which there are trained weights."""

    @classmethod
    def from_pretrained(cls, weights):
        """The network with weights that ship, such as "tuned", or of a run's last.pt, in evaluation mode on the CPU.

        ValueError or OSError if they are not there, damaged, or of another network, or the network was changed since.
        """
        path = weights if pathlib.Path(weights).suffix == ".pt" else WEIGHTS / f"{weights}.pt"
        known, state = provenance(weights), load_weights(path)
        trained = known.get("hyperparameters", {})
        try:
            model = cls(trained["dropout"], len(trained["classes"].split("/")))
            model.load_state_dict(state)
            if "scores" in known:
                fits = np.allclose(scores_of(model), known["scores"], atol=0.05)  # processors round differently
            else:  # SyncBatchNorm, of a run on several GPUs, computes the same; another torch may print otherwise
                fits = printed(model) == known["network"].replace("SyncBatchNorm", "BatchNorm2d")
                fits = fits or known["versions"]["torch"] != version("torch")
        except (RuntimeError, ValueError, TypeError, KeyError):  # other shapes; settings other than run_settings
            fits = False
        if not fits:
            what = f"weights of {trained.get('model', 'something else')}, perhaps from before a change"
            raise ValueError(f"{weights} does not fit {cls.__name__}: it has {what}, or is no run's last.pt or best.pt")
        return model.eval()
