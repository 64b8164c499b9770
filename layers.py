"""Two layers of torch.nn made faster on a CPU; everywhere else they are torch's own.

Both keep the class name, the parameters and the meaning of the layer that they extend, so that torchsummary, state
dicts and users see an ordinary `Dropout` and `Conv2d`. The transforms of torch.func, such as vmap, do not know the
fast dropout; they take the network in evaluation mode, or with torch's own layer in its place.
"""

import functools
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
        # Repeated along the innermost axis of NHWC memory, so that the batch stays channels_last. The gradient of a
        # stack is added up much faster than that of repeat_interleave.
        copies = [x.permute(0, 2, 3, 1)] * (self.out_channels // self.in_channels)
        x = torch.stack(copies, dim=-1).flatten(-2).permute(0, 3, 1, 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, groups=self.out_channels)


class Dropout(nn.Dropout):
    """`nn.Dropout` that on a CPU draws the positions of the dropped units instead of a number for every unit.

    The survivors between two dropped units follow a geometric distribution, so at p = 0.05 one draw serves twenty
    units. Follows `torch.manual_seed`, as torch's own does, but draws other units than that does.
    """

    def __init__(self, p=0.5, inplace=False):
        if not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise ValueError(f"dropout probability is {p!r}; it must be a number from 0 to 1")
        super().__init__(p, inplace)

    def forward(self, x):
        # Nearer to 1, the table of quantiles is too coarse for the last survivors.
        suits = self.training and 0 < self.p < 0.99 and not self.inplace
        if suits and x.device.type == "cpu" and x.is_floating_point():
            return _DropPositions.apply(x, self.p)
        return super().forward(x)


class _DropPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        positions = _dropped_positions(x.numel(), p)
        ctx.save_for_backward(positions)
        scaled = x * (1 / (1 - p))
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
    distances = _geometric_quantiles(p)
    draws = int(n * p + 6 * math.sqrt(n * p) + 16)  # all but never too few, and then one more round is drawn
    rounds, last = [], -1
    while last < n:
        uniform = torch.empty(draws // 4 + 1, dtype=torch.int64).random_(-(2**63), None)  # four of 16 bits in each
        drawn = distances.take(uniform.numpy().view(np.uint16), mode="clip")  # "clip" only saves a check
        drawn = torch.from_numpy(drawn).to(torch.int64)
        drawn[0] += last
        rounds.append(drawn.cumsum_(0))
        last = rounds[-1][-1].item()
    positions = rounds[0] if len(rounds) == 1 else torch.cat(rounds)
    return positions[: torch.searchsorted(positions, n)]


@functools.lru_cache
def _geometric_quantiles(p):
    """Distances from one dropped unit to the next, (65536,), all equally likely; uint16 if they fit, else int64.

    The layers around it push the table out of the cache every time, so its size matters.

    P(distance > k) = (1 - p)^k, inverted in the middle of each 65,536th. Their mean is 1 / p to within 1 in 10,000.
    """
    uniform = (np.arange(2**16) + 0.5) / 2**16
    distances = np.minimum(np.log(uniform) // math.log1p(-p) + 1, 2**50)  # longer than any tensor, and sums still fit
    return distances.astype(np.uint16 if distances.max() < 2**16 else np.int64)
