"""The faster forwards that layers get on a CPU, against the layers of torch and against what dropout is."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from layers import faster_layers

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def drop(p, x):
    dropout = nn.Dropout(p)
    with faster_layers(dropout, CPU):
        return dropout(x)


def dropped(p, *shape):
    """Boolean mask of the dropped units."""
    return drop(p, torch.ones(shape)) == 0


@given(st.floats(0.001, 0.999), st.integers(0, 2**32), st.lists(st.integers(0, 30), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_dropout_keeps_its_share_and_scales_it(p, seed, shape):
    torch.manual_seed(seed)
    output = drop(p, torch.ones(shape))
    kept, n = int((output != 0).sum()), math.prod(shape)
    scale = torch.tensor(1 / (1 - p))  # which torch's own dropout, at p from 0.99, rounds differently
    assert output.shape == torch.Size(shape) and torch.all((output == 0) | torch.isclose(output, scale))
    spread = math.sqrt(n * p * (1 - p))
    assert abs(kept - n * (1 - p)) <= 6 * spread + 12  # beyond it once in a hundred million draws


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.98])
def test_keep_rate(p):
    torch.manual_seed(0)
    assert stats.binomtest(int(dropped(p, 1_000_000).sum()), 1_000_000, p).pvalue > 1e-4


def test_gaps_between_dropped_units_are_geometric():
    """The very thing drawn: a wrong offset or a reused draw shows here."""
    p = 0.1
    torch.manual_seed(1)
    gaps = np.diff(dropped(p, 1_000_000).nonzero().flatten().numpy())
    edges = np.arange(1, 60)
    observed = np.array([(gaps == k).sum() for k in edges] + [(gaps >= 60).sum()])
    expected = len(gaps) * np.append(p * (1 - p) ** (edges - 1), (1 - p) ** 59)
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize("axis", [None, 0, 1, 3], ids=["call", "sample", "channel", "pixel"])
def test_units_are_dropped_independently(axis):
    """A unit and another one are both dropped as often as chance has it."""
    torch.manual_seed(2)
    first = dropped(0.2, 64, 16, 20, 20)
    second = dropped(0.2, 64, 16, 20, 20) if axis is None else first.roll(1, axis)
    assert stats.binomtest(int((first & second).sum()), first.numel(), 0.2**2).pvalue > 1e-4


def test_every_unit_is_dropped_equally_often():
    """The first and the last one too."""
    torch.manual_seed(3)
    counts = sum(dropped(0.3, 50).int() for _ in range(4000)).numpy()
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradient_layout", [torch.contiguous_format, torch.channels_last, None])
def test_gradient_goes_where_the_output_did(layout, gradient_layout):
    x = torch.ones(4, 6, 5, 3).to(memory_format=layout).requires_grad_()
    output = drop(0.3, x)
    assert output.stride() == x.stride()
    gradient = torch.ones(()).expand(4, 6, 5, 3)
    output.backward(gradient if gradient_layout is None else gradient.contiguous(memory_format=gradient_layout))
    assert torch.equal(x.grad, output.detach())  # of ones, both are the mask, scaled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_input_is_left_as_it_is_whatever_its_type_and_strides(dtype):
    base = torch.arange(1, 201, dtype=dtype).reshape(10, 20)
    before, view = base.clone(), base[:, ::2]
    output = drop(0.5, view)
    assert torch.equal(base, before) and torch.equal(output[output != 0], 2 * view[output != 0])


def test_dropout_follows_the_seed_and_the_generator_state():
    torch.manual_seed(5)
    first, state, second = dropped(0.5, 1000), torch.get_rng_state(), dropped(0.5, 1000)
    torch.manual_seed(5)
    assert torch.equal(first, dropped(0.5, 1000)) and not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(second, dropped(0.5, 1000))


def test_ends_of_the_range():
    x = torch.rand(100) + 1
    assert torch.equal(drop(1.0, x), torch.zeros(100)) and drop(0.5, torch.empty(0, 3)).shape == (0, 3)
    for p in (0.0, 1e-9, 1e-30):
        assert torch.equal(drop(p, x), x)
    dropout = nn.Dropout(0.5).eval()
    with faster_layers(dropout, CPU):
        assert torch.equal(dropout(x), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "a slice"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "padding": "valid", "bias": True},
        {"dilation": 2, "padding": "same", "out_channels": 18},
        {"padding": 1, "padding_mode": "reflect"},
        {"groups": 3},
        {"out_channels": 6},
    ],
    ids=str,
)
def test_convolutions_compute_what_torch_does_in_the_layout_of_their_input(options, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(**{"in_channels": 6, "out_channels": 12, "kernel_size": 3, "groups": 6} | options).double()
    images = torch.randn(2, 6, 9, 10, dtype=torch.float64)
    if layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    results = []
    for context in (contextlib.nullcontext(), faster_layers(conv, CPU)):
        x = images.clone().requires_grad_()
        conv.zero_grad()
        with context:
            output = conv(x[..., :9] if layout == "a slice" else x)
        (output * torch.arange(output.numel()).reshape(output.shape)).sum().backward()
        results.append((output.detach(), x.grad, *(parameter.grad for parameter in conv.parameters())))
    torch.testing.assert_close(*results)
    assert "forward" not in vars(conv)
    assert results[0][0].stride() == results[1][0].stride()  # which a view behind it may rely on


def test_an_image_without_batch_dimension():
    conv, image = nn.Conv2d(4, 8, 3, groups=4), torch.randn(4, 6, 6)
    with faster_layers(conv, CPU):
        torch.testing.assert_close(conv(image), conv(image[None])[0])


class Own(nn.Dropout):
    """Of somebody who has changed what forward does."""


def compiled_in_place(layer):
    layer.compile(backend="eager")
    return layer


FASTER = {
    "depthwise, two outputs per channel": (nn.Conv2d(4, 8, 3, groups=4), CPU, True),
    "dropout": (nn.Dropout(0.1), CPU, True),
    "inside a network": (nn.Sequential(nn.ReLU(), nn.Dropout(0.1))[1:], CPU, True),
    "on a GPU": (nn.Dropout(0.1), torch.device("cuda"), False),
    "a subclass": (Own(0.1), CPU, False),
    "in place": (nn.Dropout(0.1, inplace=True), CPU, False),
    "of channels": (nn.Dropout2d(0.1), CPU, False),
    "one output per channel": (nn.Conv2d(4, 4, 3, groups=4), CPU, False),
    "plain": (nn.Conv2d(4, 8, 3), CPU, False),
    "one channel": (nn.Conv2d(1, 8, 3), CPU, False),
    "compiled": (torch.compile(nn.Dropout(0.1), backend="eager"), CPU, False),
    "compiled in place": (compiled_in_place(nn.Dropout(0.1)), CPU, False),
    "compiled and wrapped": (nn.DataParallel(torch.compile(nn.Dropout(0.1), backend="eager")), CPU, False),
}


@pytest.mark.parametrize("case", FASTER)
def test_which_layers_are_made_faster_and_only_meanwhile(case):
    model, device, faster = FASTER[case]
    kinds = nn.Conv2d, nn.Dropout, nn.Dropout2d  # a compiled module has a forward of its own

    def made_faster():
        return any("forward" in vars(module) for module in model.modules() if isinstance(module, kinds))

    with pytest.raises(OSError), faster_layers(model, device), faster_layers(model, device):  # in each other, too
        assert made_faster() == faster
        raise OSError
    assert not made_faster()


def test_a_forward_that_somebody_has_replaced_stays():
    layer = nn.Dropout(0.1)
    layer.forward = forward = len
    with faster_layers(layer, CPU):
        assert layer.forward is forward
    assert layer.forward is forward
