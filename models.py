"""The networks: `Model`, the S9 network of the course, and nothing else. Read `__init__` as the table of its layers."""

from collections import OrderedDict

import devices  # noqa: F401

import torch
import torch.nn.functional as F
from torch import nn

from pretrained import Pretrained
from receptive_field import receptive_field

__all__ = ["Model", "receptive_field"]


def squeeze(in_channels, out_channels):
    """A bare 1x1 convolution; behind depthwise layers it is the pointwise half of the separable pair."""
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


class Model(Pretrained):
    """Four convolution blocks, global average pooling and a 1x1 classifier: 199,810 parameters, receptive field 95.

    C1 to C3 end in a strided convolution instead of pooling; C1 has a dilated layer; the 3x3 layers of C3 and C4 are
    depthwise (but for C3's strided one), each block's run of them closed by a pointwise `squeeze`.

    Args:
        dropout_value: probability of zeroing an activation, in [0, 1].
        num_classes: outputs of the classifier; 53 parameters each.

    Input is float (N, 3, H, W), normalised, H and W at least 7 (32 for CIFAR-10); output is (N, num_classes)
    log-probabilities.
    """

    channels_last = True  # no step of forward minds how images lie in memory, see devices.memory_format

    def __init__(self, dropout_value=0.01, num_classes=10):
        super().__init__()

        def layer(in_channels, out_channels, **conv):
            return nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(in_channels, out_channels, 3, bias=False, **conv),
                    relu=nn.ReLU(),
                    norm=nn.BatchNorm2d(out_channels),
                    dropout=nn.Dropout(dropout_value),
                )
            )

        self.C1 = nn.Sequential(
            layer(3, 16),
            layer(16, 32, padding=1),
            layer(32, 48, dilation=2),
            layer(48, 32, padding=1, stride=2),
        )
        self.C2 = nn.Sequential(
            layer(32, 64, padding=1),
            layer(64, 96, padding=1),
            squeeze(96, 64),
            layer(64, 32, padding=1, stride=2),
        )
        self.C3 = nn.Sequential(
            layer(32, 64, padding=1, groups=32),
            layer(64, 128, padding=1, groups=64),
            squeeze(128, 64),
            layer(64, 64, padding=1, stride=2),
        )
        self.C4 = nn.Sequential(
            layer(64, 128, padding=1, groups=64),
            layer(128, 256, padding=1, groups=128),
            layer(256, 256, padding=1, groups=256),
            squeeze(256, 52),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Conv2d(52, num_classes, 1)

    def forward(self, x):
        x = self.C1(x)
        x = self.C2(x)
        x = self.C3(x)
        x = self.C4(x)
        x = self.classifier(self.pool(x)).flatten(1)
        return F.log_softmax(x, dim=1, dtype=torch.float32)  # half precision is too coarse for a logarithm
