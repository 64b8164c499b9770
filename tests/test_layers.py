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


def drop(p, x):
    dropout = nn.Dropout(p)
    with faster_layers(dropout, CPU):
        return dropout(x)


def dropped(p, *shape):
    """Boolean mask of the dropped units."""
    return drop(p, torch.ones(shape)) == 0


@pytest.mark.parametrize("p", [0.01, 0.5, 0.98])
def test_dropout_keeps_its_share_and_scales_it(p):
    torch.manual_seed(0)
    output = drop(p, torch.ones(1_000_000))
    assert stats.binomtest(int((output == 0).sum()), 1_000_000, p).pvalue > 1e-4
    torch.testing.assert_close(output[output != 0].unique(), torch.tensor([1 / (1 - p)]))


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
    counts = sum(dropped(0.3, 50).int() for _ in range(2000)).numpy()
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradient_layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_goes_where_the_output_did(layout, gradient_layout):
    x = torch.ones(4, 6, 5, 3).to(memory_format=layout).requires_grad_()
    output = drop(0.3, x)
    assert output.stride() == x.stride()
    output.backward(torch.ones(4, 6, 5, 3).contiguous(memory_format=gradient_layout))
    assert torch.equal(x.grad, output.detach())  # of ones, both are the mask, scaled


def test_the_gradient_has_a_gradient():
    """As a penalty on gradients needs."""
    x = (torch.rand(40) + 1).requires_grad_()
    output = drop(0.3, x)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    second = torch.autograd.grad(gradient.sum(), x)[0]
    torch.testing.assert_close(second, 2 * (output / x).detach().square())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_input_is_left_as_it_is_whatever_its_type_and_strides(dtype):
    base = torch.arange(1, 201, dtype=dtype).reshape(10, 20)
    before, view = base.clone(), base[:, ::2]
    output = drop(0.5, view)
    assert torch.equal(base, before) and torch.equal(output[output != 0], 2 * view[output != 0])


def test_dropout_follows_the_generator_of_torch():
    state, first, second = torch.get_rng_state(), dropped(0.5, 1000), dropped(0.5, 1000)
    torch.set_rng_state(state)
    assert torch.equal(first, dropped(0.5, 1000)) and not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(), (0, 3), (7,)])
def test_ends_of_the_range(shape):
    x = torch.rand(shape) + 1
    assert torch.equal(drop(1.0, x), torch.zeros(shape)) and drop(0.5, x).shape == shape
    assert all(torch.equal(drop(p, x), x) for p in (0.0, 1e-9, 1e-30))
    dropout = nn.Dropout(0.5).eval()
    with faster_layers(dropout, CPU):
        assert torch.equal(dropout(x), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "a slice"])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": "valid", "bias": False},
        {"dilation": 2, "padding": "same", "out_channels": 18},
        {"padding": 1, "padding_mode": "reflect"},
        {"groups": 3},
    ],
    ids=str,
)
def test_convolutions_compute_what_torch_does_in_the_layout_of_their_input(options, layout):
    conv = nn.Conv2d(**{"in_channels": 6, "out_channels": 12, "kernel_size": 3, "groups": 6} | options).double()
    images = torch.randn(2, 6, 9, 10, dtype=torch.float64)
    if layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    results = []
    for context in (contextlib.nullcontext(), faster_layers(conv, CPU)):
        x = images.clone().requires_grad_()
        with context:
            output = conv(x[..., :9] if layout == "a slice" else x)
        weighted = output * torch.arange(output.numel()).reshape(output.shape)
        results.append((output, *torch.autograd.grad(weighted.sum(), (x, *conv.parameters()))))
    torch.testing.assert_close(*results)
    assert results[0][0].stride() == results[1][0].stride()  # which a view behind it may rely on


def test_an_image_without_batch_dimension():
    conv, image = nn.Conv2d(4, 8, 3, groups=4), torch.randn(4, 6, 6)
    with faster_layers(conv, CPU):
        torch.testing.assert_close(conv(image), conv(image[None])[0])


COMPILED = torch.compile(nn.Dropout(0.1), backend="eager")
COMPILED_IN_PLACE = nn.Dropout(0.1)
COMPILED_IN_PLACE.compile(backend="eager")
FASTER = {
    "depthwise, two outputs per channel": (nn.Conv2d(4, 8, 3, groups=4), "cpu", True),
    "inside a network": (nn.Sequential(nn.ReLU(), nn.Dropout(0.1)), "cpu", True),
    "on a GPU": (nn.Dropout(0.1), "cuda", False),
    "a subclass": (type("Own", (nn.Dropout,), {})(0.1), "cpu", False),  # whose forward may be another
    "in place": (nn.Dropout(0.1, inplace=True), "cpu", False),
    "one output per channel": (nn.Conv2d(4, 4, 3, groups=4), "cpu", False),
    "one channel": (nn.Conv2d(1, 8, 3), "cpu", False),
    "compiled and wrapped": (nn.DataParallel(COMPILED), "cpu", False),
    "compiled in place": (COMPILED_IN_PLACE, "cpu", False),
}


@pytest.mark.parametrize("case", FASTER)
def test_which_layers_are_made_faster_and_only_meanwhile(case):
    model, device, faster = FASTER[case]
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Dropout))]
    with pytest.raises(OSError), faster_layers(model, torch.device(device)):
        with faster_layers(model, torch.device(device)):  # in each other, too
            assert any("forward" in vars(layer) for layer in layers) == faster
        raise OSError
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_meanwhile_is_of_plain_layers(copied):
    """As an average of the weights that begins during an epoch."""
    model = nn.Sequential(nn.Dropout(0.5))
    with faster_layers(model, CPU):
        copy_of_it = copied(model)
    assert copy_of_it[0].forward.__func__ is nn.Dropout.forward and copy_of_it[0].forward.__self__ is copy_of_it[0]
    assert not copy_of_it.eval()(torch.ones(9)).std()


def test_a_forward_that_somebody_has_replaced_stays():
    layer = nn.Dropout(0.1)
    layer.forward = len
    with faster_layers(layer, CPU):
        assert layer.forward is len
