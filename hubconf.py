"""For torch.hub: the networks with their trained weights, such as torch.hub.load(folder, "resnet_long")."""

from pretrained import shipped as _shipped
from recipes import load_network as _load_network

dependencies = ["torch", "torchvision", "albumentations"]


def _entry(name):
    return lambda: _load_network(name)[0]


globals().update({name.replace("-", "_"): _entry(name) for name in _shipped()})
