"""For torch.hub: the networks with their trained weights, such as torch.hub.load(folder, "resnet_long")."""

from pretrained import shipped as _shipped
from recipes import load_network as _load_network

dependencies = ["torch", "torchvision", "albumentations"]


def _entry(name):
    def network():
        return _load_network(name)[0]

    network.__doc__ = f"The network with the weights {name!r}, in evaluation mode on the CPU."
    return network


globals().update({name.replace("-", "_"): _entry(name) for name in _shipped()})
