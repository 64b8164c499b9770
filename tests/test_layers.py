"""The layers that are faster on a CPU, against the layers of torch.nn and against what dropout is."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from layers import Conv2d, Dropout


def dropped(p, *shape, dtype=torch.float32):
    """Boolean mask of the dropped units."""
    return Dropout(p).train()(torch.ones(shape, dtype=dtype)) == 0


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.5, 0.9])
def test_keep_rate(p):
    n = 400_000
    torch.manual_seed(0)
    count = int(dropped(p, n).sum())
    assert stats.binomtest(count, n, p).pvalue > 1e-4


@pytest.mark.parametrize("p", [1e-9, 1e-30])
def test_a_tiny_probability_drops_nothing(p):
    x = torch.ones(1000)
    assert torch.equal(Dropout(p)(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_survivors_are_scaled(dtype):
    output = Dropout(0.2).train()(torch.full((1000,), 3.0, dtype=dtype))
    assert set(output.unique().tolist()) == {0.0, float(torch.tensor(3 / 0.8, dtype=dtype))}


@pytest.mark.parametrize("p", [0.05, 0.5, 0.98, 0.99999])
def test_mean_is_kept(p):
    torch.manual_seed(0)
    output = Dropout(p).train()(torch.ones(64, 64, 64, 64))
    assert abs(float(output.mean()) - 1) < 5 * (p / (1 - p) / output.numel()) ** 0.5


def test_gaps_between_dropped_units_are_geometric():
    """The very thing drawn: a wrong offset or a reused draw shows here."""
    p, n = 0.1, 1_000_000
    torch.manual_seed(1)
    gaps = np.diff(dropped(p, n).nonzero().flatten().numpy())
    edges = np.arange(1, 60)
    observed = np.array([(gaps == k).sum() for k in edges] + [(gaps >= 60).sum()])
    expected = len(gaps) * np.append(p * (1 - p) ** (edges - 1), (1 - p) ** 59)
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize("other", ["call", "sample", "channel", "pixel"])
def test_independence(other):
    """A unit and another one are both dropped as often as chance has it."""
    p = 0.2
    torch.manual_seed(2)
    first = dropped(p, 64, 16, 20, 20)
    second = {
        "call": lambda: dropped(p, 64, 16, 20, 20),
        "sample": lambda: first.roll(1, 0),
        "channel": lambda: first.roll(1, 1),
        "pixel": lambda: first.roll(1, 3),
    }[other]()
    both = int((first & second).sum())
    assert stats.binomtest(both, first.numel(), p * p).pvalue > 1e-4


def test_every_unit_is_dropped_equally_often():
    """The first and the last one too."""
    torch.manual_seed(3)
    counts = sum(dropped(0.3, 50).int() for _ in range(4000)).numpy()
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gradient_layout", ["contiguous", "channels_last", "expanded"])
def test_gradient_goes_where_the_output_did(layout, gradient_layout):
    x = torch.ones(4, 6, 5, 3)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    x.requires_grad_()
    output = Dropout(0.3).train()(x)
    assert output.stride() == x.stride()
    gradient = torch.ones(()).expand(4, 6, 5, 3)
    if gradient_layout == "contiguous":
        gradient = gradient.contiguous()
    elif gradient_layout == "channels_last":
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    output.backward(gradient)
    assert torch.equal(x.grad, output.detach())  # of ones, both are the mask, scaled


def test_input_is_left_as_it_is_and_slices_work():
    base = torch.arange(1.0, 1001).reshape(10, 100)
    view = base[:, ::2]
    output = Dropout(0.5).train()(view)
    assert torch.equal(base, torch.arange(1.0, 1001).reshape(10, 100))
    assert torch.equal(output[output != 0], 2 * view[output != 0])


def test_follows_the_seed_and_the_generator_state():
    torch.manual_seed(5)
    first, state, second = dropped(0.5, 1000), torch.get_rng_state(), dropped(0.5, 1000)
    torch.manual_seed(5)
    assert torch.equal(first, dropped(0.5, 1000))
    torch.set_rng_state(state)
    assert torch.equal(second, dropped(0.5, 1000))
    assert not torch.equal(first, second)


def test_is_an_ordinary_dropout():
    layer = Dropout(0.3)
    x = torch.randn(100)
    assert isinstance(layer, nn.Dropout) and repr(layer) == repr(nn.Dropout(0.3))
    assert layer.eval()(x) is x or torch.equal(layer(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
    assert torch.equal(Dropout(1.0).train()(x), torch.zeros(100))
    assert Dropout(0.5).train()(torch.empty(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError):
        Dropout(1.5)


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"bias": True}])
@pytest.mark.parametrize("channels, groups", [((6, 12), 6), ((6, 18), 6), ((6, 6), 6), ((6, 12), 3), ((6, 12), 1)])
def test_conv2d_computes_what_torch_does(channels, groups, options):
    torch.manual_seed(0)
    ours = Conv2d(*channels, 3, groups=groups, **options).double()
    theirs = nn.Conv2d(*channels, 3, groups=groups, **options).double()
    theirs.load_state_dict(ours.state_dict())
    inputs = [torch.randn(2, 6, 9, 9, dtype=torch.float64).requires_grad_() for _ in range(2)]
    inputs[1].data = inputs[0].data.clone()
    outputs = ours(inputs[0]), theirs(inputs[1])
    torch.testing.assert_close(*outputs)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_conv2d_takes_an_image_without_batch_dimension():
    layer = Conv2d(4, 8, 3, groups=4)
    image = torch.randn(4, 6, 6)
    torch.testing.assert_close(layer(image), layer(image[None])[0])
