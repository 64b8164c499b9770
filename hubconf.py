"""For torch.hub: the networks with their trained weights, such as torch.hub.load(folder, "resnet_long")."""

from pretrained import shipped as _shipped
from recipes import load_network as _load_network

dependencies = ["torch", "torchvision", "albumentations"]

for _name in _shipped():

    def _entry(name=_name):
        return _load_network(name)[0]

    _entry.__doc__ = f"The network with the weights {_name!r}, in evaluation mode on the CPU."
    globals()[_name.replace("-", "_")] = _entry
