"""The networks: `Model`, the S9 network of the course, and `SeparableResNet`, another under the same rules.

The rules: fewer than 200,000 parameters; four blocks, of which the first three end in a 3x3 convolution of stride 2;
no pooling but the global one; a dilated and a depthwise-separable layer; a receptive field over 44.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from pretrained import Pretrained
from receptive_field import receptive_field  # noqa: F401, for those who ask what a change of the network sees


def squeeze(in_channels, out_channels):
    """A bare 1x1 convolution; behind depthwise layers it is the pointwise half of the separable pair."""
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


class Model(Pretrained):
    """Four convolution blocks, global average pooling and a 1x1 classifier: 199,810 parameters, receptive field 95.

    C1 to C3 end in a strided convolution instead of pooling; C1 has a dilated layer; the 3x3 layers of C3 and C4 are
    depthwise (but for C3's strided one), each block's run of them closed by a pointwise `squeeze`.
    Input is float (N, 3, H, W), normalised, H and W at least 7 (32 for CIFAR-10); output is (N, num_classes)
    log-probabilities. dropout_value is the probability of zeroing an activation, in [0, 1].
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


def conv_norm(in_channels, out_channels, kernel=3, dilation=1, activation=nn.Hardswish, **conv):
    """Conv (no bias) -> BatchNorm -> activation, of the same size at stride 1; Hardswish is of Howard et al., 2019."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False, **conv),
        nn.BatchNorm2d(out_channels),
        activation(),
    )


def separable(channels, activation=nn.Hardswish):
    """A depthwise convolution and a pointwise layer, with nothing between them (Chollet, "Xception", 2017)."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return nn.Sequential(depthwise, conv_norm(channels, channels, kernel=1, activation=activation))


class Residual(nn.Module):
    """Hardswish(x + branch(x)); the branch ends in no activation (He et al., "Deep Residual Learning", 2015)."""

    channels_last = True

    def __init__(self, *branch):
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x):
        return F.hardswish(x + self.branch(x))


class SeparableResNet(Pretrained):
    """A residual network of four blocks: dense convolutions while the image is large, separable ones when it is small.

    | block | layers | out | size | receptive field |
    | --- | --- | --- | --- | --- |
    | C1 | 3x3; residual of two 3x3, the first dilated by 2; 3x3 of stride 2 | 64 | 16 | 11 |
    | C2 | residual of two 3x3; 3x3 of stride 2 in 4 groups | 128 | 8 | 23 |
    | C3 | residual of two separable 3x3; 3x3 of stride 2 in 4 groups | 128 | 4 | 47 |
    | C4 | residual of one separable 3x3 | 128 | 4 | 63 |

    Then global average pooling, dropout and a linear classifier: 198,938 parameters. How it was found: RESULTS.md.
    Input and output are as `Model`'s; dropout_value is the probability of zeroing a feature before the classifier.
    """

    channels_last = True

    def __init__(self, dropout_value=0.0, num_classes=10):
        super().__init__()
        self.C1 = nn.Sequential(
            conv_norm(3, 16),
            Residual(conv_norm(16, 16, dilation=2), conv_norm(16, 16, activation=nn.Identity)),
            conv_norm(16, 64, stride=2),
        )
        self.C2 = nn.Sequential(
            Residual(conv_norm(64, 64), conv_norm(64, 64, activation=nn.Identity)),
            conv_norm(64, 128, stride=2, groups=4),
        )
        self.C3 = nn.Sequential(
            Residual(separable(128), separable(128, activation=nn.Identity)),
            conv_norm(128, 128, stride=2, groups=4),
        )
        self.C4 = nn.Sequential(Residual(separable(128, activation=nn.Identity)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout_value)
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, x):
        x = self.C1(x)
        x = self.C2(x)
        x = self.C3(x)
        x = self.C4(x)
        x = self.classifier(self.dropout(self.pool(x).flatten(1)))
        return F.log_softmax(x, dim=1, dtype=torch.float32)
