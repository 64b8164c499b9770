"""The faster forwards that layers get on a CPU, against the layers of torch and against what dropout is."""

import contextlib
import copy
import pickle

import pytest
import torch
from scipy import stats
from torch import nn

from layers import faster_layers

CPU = torch.device("cpu")
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "a slice": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


def drop(p, x, training=True):
    dropout = nn.Dropout(p).train(training)
    with faster_layers(dropout, CPU):
        return dropout(x)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.98, 1.0])
def test_units_are_dropped_in_their_share_independently_and_by_the_seed(p):
    """Of those of other calls, samples, channels and pixels; the first and the last one too."""
    torch.manual_seed(2)
    ones = torch.ones(64, 16, 20, 20)
    first, second = drop(p, ones) == 0, drop(p, ones) == 0
    assert stats.binomtest(int(first.sum()), first.numel(), p).pvalue > 1e-4
    for other in (second, first.roll(1, 0), first.roll(1, 1), first.roll(1, 3)):
        assert stats.binomtest(int((first & other).sum()), first.numel(), p**2).pvalue > 1e-4
    counts = sum((drop(p, torch.ones(50)) == 0).int() for _ in range(600)).numpy()
    assert stats.chisquare(counts).pvalue > 1e-4
    torch.manual_seed(2)
    assert torch.equal(first, drop(p, ones) == 0) and torch.equal(drop(p, ones, training=False), ones)


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("lay_gradient", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_and_their_gradients_go_where_the_output_did(lay, lay_gradient):
    """The latter for a penalty on gradients."""
    x = lay(torch.rand(4, 6, 9, 10, dtype=torch.float64) + 1).requires_grad_()
    before, output = x.detach().clone(), drop(0.3, x)
    (gradient,) = torch.autograd.grad(output, x, lay_gradient(2 * output), create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    scales = torch.where(output == 0, 0.0, 1 / 0.7)
    assert 0.2 < (scales == 0).double().mean() < 0.4 and torch.equal(x, before)
    for values, expected in ((output, scales * x), (gradient, 2 * scales**2 * x), (second, 2 * scales**2)):
        torch.testing.assert_close(values, expected.double())
    assert output.stride() == (x + 0).stride()


CONVOLUTIONS = [
    {"stride": 2, "padding": "valid", "bias": False},
    {"dilation": 2, "padding": "same", "out_channels": 18},
    {"padding": 1, "padding_mode": "reflect"},
    {"groups": 3},
]


@pytest.mark.parametrize("lay", [*LAYOUTS.values(), lambda x: x[0]], ids=[*LAYOUTS, "a single image"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions_compute_what_torch_does_in_the_layout_of_their_input(options, lay):
    conv = nn.Conv2d(**{"in_channels": 6, "out_channels": 12, "kernel_size": 3, "groups": 6} | options).double()
    x, results = torch.randn(2, 6, 6, 10, dtype=torch.float64, requires_grad=True), []
    for context in (contextlib.nullcontext(), faster_layers(conv, CPU)):
        with context:
            output = conv(lay(x))
        weighted = output * torch.arange(output.numel()).reshape(output.shape)
        results.append((output, *torch.autograd.grad(weighted.sum(), (x, *conv.parameters()))))
    torch.testing.assert_close(*results)
    assert results[0][0].stride() == results[1][0].stride()  # which a view behind it may rely on


COMPILED = torch.compile(nn.Dropout(0.1), backend="eager")
COMPILED_IN_PLACE, REPLACED = nn.Dropout(0.1), nn.Dropout(0.1)
COMPILED_IN_PLACE.compile(backend="eager")
REPLACED.forward = len
FASTER = {
    "depthwise, two outputs per channel": (nn.Conv2d(4, 8, 3, groups=4), "cpu", True),
    "inside a network": (nn.Sequential(nn.ReLU(), nn.Dropout(0.1)), "cpu", True),
    "on a GPU": (nn.Dropout(0.1), "cuda", False),
    "a subclass": (type("Own", (nn.Dropout,), {})(0.1), "cpu", False),  # whose forward may be another
    "a replaced forward": (REPLACED, "cpu", False),
    "in place": (nn.Dropout(0.1, inplace=True), "cpu", False),
    "compiled and wrapped": (nn.DataParallel(COMPILED), "cpu", False),
    "compiled in place": (COMPILED_IN_PLACE, "cpu", False),
}


@pytest.mark.parametrize("model, device, faster", FASTER.values(), ids=FASTER)
def test_which_layers_are_made_faster_and_only_meanwhile(model, device, faster):
    before = [module.forward for module in model.modules()]
    with pytest.raises(OSError), faster_layers(model, torch.device(device)):
        with faster_layers(model, torch.device(device)):  # in each other, too
            assert ([module.forward for module in model.modules()] != before) == faster
        raise OSError
    assert [module.forward for module in model.modules()] == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_meanwhile_is_of_plain_layers(copied):
    """As an average of the weights that begins during an epoch."""
    model = nn.Sequential(nn.Dropout(0.5))
    with faster_layers(model, CPU):
        layer = copied(model)[0]
    assert layer.forward == nn.Dropout.forward.__get__(layer)
