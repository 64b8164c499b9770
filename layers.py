"""Two layers of torch.nn made faster on a CPU; everywhere else, and for every other purpose, they are torch's own.

Both keep the class name, the parameters and the meaning of the layer that they extend, so that torchsummary, state
dicts and users see an ordinary `Dropout` and `Conv2d`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` whose depthwise case with several outputs a channel runs as plain depthwise on a CPU.

    oneDNN has a fast kernel only for one output a channel; with m of them, each input channel repeated m times gives
    the same sums sooner, by far.
    """

    def forward(self, x):
        depthwise = 1 < self.groups == self.in_channels < self.out_channels and self.padding_mode == "zeros"
        if not depthwise or x.device.type != "cpu" or x.ndim != 4 or x.shape[1] != self.in_channels:
            return super().forward(x)
        # Repeated along the innermost axis of NHWC memory, so that the batch stays channels_last.
        repeats = self.out_channels // self.in_channels
        x = x.permute(0, 2, 3, 1).repeat_interleave(repeats, dim=-1).permute(0, 3, 1, 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, groups=self.out_channels)


class Dropout(nn.Dropout):
    """`nn.Dropout` that on a CPU draws the positions of the dropped units instead of a number for every unit.

    The survivors between two dropped units follow a geometric distribution, so at p = 0.05 one draw serves twenty
    units. Follows `torch.manual_seed`: each call seeds its own generator with one draw from torch's.
    """

    def __init__(self, p=0.5, inplace=False):
        if not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise ValueError(f"dropout probability is {p!r}; it must be a number from 0 to 1")
        super().__init__(p, inplace)

    def forward(self, x):
        if self.training and 0 < self.p < 1 and not self.inplace and x.device.type == "cpu" and x.is_floating_point():
            return _DropPositions.apply(x, self.p)
        return super().forward(x)


class _DropPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        scaled = x * (1 / (1 - p))
        positions = _dropped_positions(scaled.numel(), p)
        ctx.save_for_backward(positions)
        ctx.scale, ctx.strides = 1 / (1 - p), scaled.stride()
        return _zero(scaled, positions)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        # Positions count along the memory of the output, so the gradient needs the same layout, whatever it comes in.
        scaled = torch.empty_strided(gradient.shape, ctx.strides, dtype=gradient.dtype)
        torch.mul(gradient, ctx.scale, out=scaled)
        return _zero(scaled, *ctx.saved_tensors), None


def _zero(dense, positions):
    dense.as_strided((dense.numel(),), (1,)).index_fill_(0, positions, 0)
    return dense


def _dropped_positions(n, p):
    """Sorted positions, int64, of the dropped among n units, each dropped independently with probability p."""
    rng = np.random.Generator(np.random.SFC64(torch.empty((), dtype=torch.int64).random_().item()))
    draws = int(n * p + 6 * math.sqrt(n * p) + 16)  # all but never too few, and then one more round is drawn
    rounds, last = [], -1
    while last < n:
        # floor(log(u) / log(1 - p)) is geometric: P(at least k survivors) = P(u <= (1 - p)^k) = (1 - p)^k.
        survivors = 1 - rng.random(draws, dtype=np.float32)
        np.log(survivors, out=survivors)
        survivors *= np.float32(1 / math.log1p(-p))
        rounds.append(last + np.cumsum(survivors.astype(np.int64) + 1))
        last = rounds[-1][-1]
    positions = rounds[0] if len(rounds) == 1 else np.concatenate(rounds)
    return torch.from_numpy(positions[: np.searchsorted(positions, n)])
