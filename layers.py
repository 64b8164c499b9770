"""Temporary changes to a model, whose own layers stay torch's: faster kernels for two kinds of layers on a CPU."""

import contextlib
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@contextlib.contextmanager
def faster_layers(model, device):
    """While it lasts, dropout and depthwise convolutions with several outputs per channel are faster on a CPU.

    Dropout draws the positions of the dropped units, so it drops others than torch would with the same seed.
    """
    # torch.compile makes kernels of its own, whether it has wrapped the model or compiled it in place.
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules())
    modules = [] if compiled or device.type != "cpu" else model.modules()
    with contextlib.ExitStack() as stack:
        for module in modules:
            if way := _faster_way(module):
                module.forward = _Faster(way, module)
                stack.callback(delattr, module, "forward")
        yield


def _faster_way(module):
    """What can stand in for the module's forward, or None; also if some library has replaced it already."""
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and "forward" not in vars(module):
        return _depthwise if 1 < module.groups == module.in_channels < module.out_channels else None
    if type(module) is nn.Dropout and not module.inplace and "forward" not in vars(module):
        # Nearer to 1, the table of quantiles is too coarse for the last survivors.
        return _dropout if 0 < module.p < 0.99 else None
    return None


class _Faster(functools.partial):
    """A forward in place of a module's own, which a copy or a pickle of the module does not take over."""

    def __reduce__(self):
        return getattr, (self.args[0], "forward")  # by then of a module without this


def _depthwise(conv, x):
    """Repeat each channel as often as it has outputs: oneDNN has a fast kernel only for one output per channel."""
    if x.ndim != 4 or x.shape[1] != conv.in_channels:
        return nn.Conv2d.forward(conv, x)  # which says what is wrong
    # The gradient of a stack is added up much faster than that of repeat_interleave.
    copies = [x] * (conv.out_channels // conv.in_channels)
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():  # along the innermost axis, then
        x = torch.stack([copy.permute(0, 2, 3, 1) for copy in copies], dim=-1).flatten(-2).permute(0, 3, 1, 2)
    else:
        x = torch.stack(copies, dim=2).flatten(1, 2)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, groups=conv.out_channels)


def _dropout(dropout, x):
    if not dropout.training or not x.is_floating_point():
        return nn.Dropout.forward(dropout, x)
    return _DropPositions.apply(x, _dropped_positions(x.numel(), dropout.p), 1 / (1 - dropout.p))


class _DropPositions(torch.autograd.Function):
    """Dropout by positions: at p = 0.05 one draw serves twenty units, as survivors come in geometric runs."""

    @staticmethod
    def forward(ctx, x, positions, scale, strides=None):
        # Positions count along the memory of the output, so the gradient needs the same layout, whatever it comes in.
        strides = strides or torch.empty_like(x).stride()
        scaled = torch.mul(x, scale, out=torch.empty_strided(x.shape, strides, dtype=x.dtype))
        scaled.as_strided((scaled.numel(),), (1,)).index_fill_(0, positions, 0)
        ctx.save_for_backward(positions)
        ctx.scale, ctx.strides = scale, strides
        return scaled

    @staticmethod
    def backward(ctx, gradient):  # the same, so that it can be differentiated again
        return _DropPositions.apply(gradient, *ctx.saved_tensors, ctx.scale, ctx.strides), None, None, None


def _dropped_positions(n, p):
    """Sorted positions, int64, of the dropped among n units, each dropped independently with probability p."""
    draws = int(n * p + 6 * math.sqrt(n * p) + 16)  # enough, but for once in a billion; then the last units are kept
    uniform = torch.empty(draws // 4 + 1, dtype=torch.int64).random_(-(2**63), None)  # four of 16 bits in each
    distances = _geometric_quantiles(p).take(uniform.numpy().view(np.uint16), mode="clip")  # which only saves a check
    positions = torch.from_numpy(distances).to(torch.int64).cumsum_(0).sub_(1)
    return positions[: torch.searchsorted(positions, n)]


@functools.lru_cache
def _geometric_quantiles(p):
    """Distances from one dropped unit to the next, (65536,), equally likely, of mean 1 / p to within 1 in 10,000."""
    uniform = (np.arange(2**16) + 0.5) / 2**16  # inverts P(distance > k) = (1 - p)^k
    distances = np.minimum(np.log(uniform) // math.log1p(-p) + 1, 2**50)  # longer than any tensor, and sums still fit
    return distances.astype(np.uint16 if distances.max() < 2**16 else np.int64)  # as size matters
