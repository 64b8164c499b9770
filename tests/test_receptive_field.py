"""receptive_field against input gradients, a formula and counts by hand."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from models import receptive_field
from recipes import RECIPES
from utils import post_receptive_field


class Network(nn.Module):
    """Some modules, and a function that says how they are put together."""

    def __init__(self, function, *modules):
        super().__init__()
        self.m, self.function = nn.ModuleList(modules), function

    def forward(self, x):
        return self.function(x, *self.m)


def conv(kernel=3, channels=3, outputs=3, **options):
    return nn.Conv2d(channels, outputs, kernel, **({"padding": kernel // 2} | options))


def extents_of_gradients(model, names, side):
    """Side of the square of input pixels that reach the centre output of each layer, by autograd alone.

    Positive weights let no ReLU close and no sum cancel, so that every pixel that can matter does.
    """
    for parameter in model.double().eval().parameters():
        parameter.requires_grad_(False).abs_().add_(0.01)
    modules, outputs, extents = dict(model.named_modules()), {}, []
    for name in names:
        modules[name].register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
    image = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    model(image)
    for name in names:
        centre = outputs[name].shape[-1] // 2
        (gradient,) = torch.autograd.grad(outputs[name][:, :, centre, centre].sum(), image, retain_graph=True)
        rows, columns = (gradient.abs().sum(dim=(0, 1)).sum(dim=dim).nonzero() for dim in (0, 1))
        assert rows.max() - rows.min() == columns.max() - columns.min()
        extents.append(int(rows.max() - rows.min()) + 1)
    return extents


@pytest.mark.parametrize("network", sorted({recipe["model"] for recipe in RECIPES.values()}))
def test_gradients_reach_as_far_in_each_block(network):
    try:
        model = getattr(models, network)()
        rows = receptive_field(model)
    except (RuntimeError, TypeError):
        pytest.skip(f"{network} does not run, as tests/test_models.py says")
    ends = [[row for row in rows if row.name.startswith(block)][-1] for block in ("C1", "C2", "C3", "C4")]
    extents = extents_of_gradients(model, [row.name for row in ends], side=rows.total + 4 * ends[-1].jump)
    assert extents == [row.receptive_field for row in ends] and extents[-1] == rows.total


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 3)), min_size=1))
@settings(deadline=None, max_examples=20)
def test_any_chain_follows_the_formula(chain):
    """r_out = r_in + (k - 1) * d * j_in and j_out = j_in * s (Araujo et al., Distill 2019)."""
    chain = chain[:3]
    layers = [nn.Conv2d(1, 1, kernel, stride, padding, dilation) for kernel, stride, padding, dilation in chain]
    rows = receptive_field(nn.Sequential(*layers), input_size=200)
    jumps = np.cumprod([1] + [stride for _, stride, _, _ in chain])
    fields = 1 + np.cumsum([(kernel - 1) * dilation * jump for (kernel, _, _, dilation), jump in zip(chain, jumps)])
    assert [row.receptive_field for row in rows] == fields.tolist() and rows.total == fields[-1]
    assert [row.jump for row in rows] == jumps[1:].tolist()
    side, sizes = 200, []
    for kernel, stride, padding, dilation in chain:
        side = (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        sizes.append(side)
    assert [row.size for row in rows] == sizes


@given(st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7]), st.booleans()), min_size=1))
@settings(deadline=None, max_examples=10)
def test_gradients_reach_as_far_through_any_branches(blocks):
    """Each block has a branch of two convolutions and one of one, which are added or concatenated."""

    def block(outer, inner, add):
        join = torch.add if add else lambda a, b: torch.cat([a, b], dim=1)
        modules = conv(outer), conv(3, dilation=2, padding=2), conv(inner), conv(1, 3 if add else 6)
        return Network(lambda x, a, b, c, d: d(join(b(a(x)), c(x))), *modules)

    model = nn.Sequential(*(block(*each) for each in blocks[:3]))
    total = receptive_field(model).total
    assert extents_of_gradients(model, [str(len(model) - 1)], side=48) == [total]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.attention(tokens, tokens, tokens)[0].mT.view_as(x)


def after(step, channels=3):
    """A 3x3 convolution, the step, and another one."""
    step = step if isinstance(step, nn.Module) else Network(step)
    return nn.Sequential(conv(outputs=channels), step, conv(channels=channels))


ALL = [3, None]  # the second sees the whole image
BY_HAND = {  # a network, and the receptive field after each of its layers; None is the whole image
    "a sum": (Network(lambda x, a, b: b(a(x) + x), conv(), conv()), [3, 5]),
    "the larger of two branches": (Network(lambda x, a, b: a(x) + b(x), conv(7), conv(3)), [7, 3]),
    "strides": (Network(lambda x, a, b, c: c(a(x) + b(x)), conv(stride=2), conv(1, stride=2), conv()), [3, 1, 7]),
    "strides of 3 and 5": (nn.Sequential(conv(stride=3), conv(stride=5), conv()), [3, 9, 39]),
    "even kernels": (nn.Sequential(conv(2, padding=0), conv(4, padding=0)), [2, 5]),
    "a module used twice": (Network(lambda x, a: a(F.relu(a(x))), conv()), [3, 5]),
    "pooling": (nn.Sequential(conv(), nn.MaxPool2d(2), conv(), nn.AvgPool2d(3, 1, 1), conv()), [3, 4, 8, 12, 16]),
    "max_pool2d, a function": (Network(lambda x, a, b: b(F.max_pool2d(a(x), 2)), conv(), conv()), [3, 8]),
    "global average": (nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), conv(1)), [3, None, None]),
    "a global AvgPool2d": (nn.Sequential(conv(stride=2), nn.AvgPool2d(16), conv(1)), [3, None, None]),
    "squeeze-and-excitation": (
        Network(lambda x, a, b, c: c((x := a(x)) * b(x.mean((2, 3), True)).sigmoid()), conv(), conv(1), conv()),
        [3, None, None],
    ),
    "a linear head": (nn.Sequential(conv(), nn.Flatten(), nn.Linear(3072, 10)), [3]),
    "one input channel": (nn.Sequential(conv(channels=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(768, 10)), [3, 4]),
    "a product over channels": (after(lambda x: (x.movedim(1, 3) @ x.new_ones(3, 3)).movedim(3, 1)), [3, 5]),
    "shuffled pixels": (after(nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2))), [3, 5]),
    "group norm": (after(nn.GroupNorm(1, 3)), ALL),
    "instance norm": (after(nn.InstanceNorm2d(3)), ALL),
    "attention": (after(Attention(), 4), ALL),
    "softmax over space": (after(lambda x: x.flatten(2).softmax(2).view_as(x)), ALL),
    "std over space": (after(lambda x: x / x.std((2, 3), keepdim=True)), ALL),
    "median over space": (after(lambda x: x - x.flatten(2).median(2).values[:, :, None, None]), ALL),
}  # fmt: skip


@pytest.mark.parametrize("network, fields", BY_HAND.values(), ids=BY_HAND)
def test_counts_by_hand(network, fields):
    rows = receptive_field(network)
    assert [row.receptive_field for row in rows] == fields
    plt.close(post_receptive_field(network, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sees_through_wrappers_and_in_any_type(dtype):
    model = nn.Sequential(conv(), nn.Sequential(nn.BatchNorm2d(3), conv(5))).to(dtype)
    rows = receptive_field(torch.compile(nn.DataParallel(model), backend="eager"))
    assert rows == receptive_field(model) and [row.name for row in rows] == ["0", "1.1"] and rows.total == 7


def test_follows_a_change_and_leaves_the_model_as_it_was():
    model = nn.Sequential(conv(stride=2), nn.BatchNorm2d(3), nn.Dropout(), conv()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert receptive_field(model).total == 7
    model[0].stride, model[3].dilation = (1, 1), (2, 2)
    assert receptive_field(model).total == 7
    model[3].dilation = (1, 1)
    assert receptive_field(model).total == 5
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prints_as_a_table():
    model = nn.Sequential(conv(3, dilation=2, padding=0), nn.ReLU(), nn.MaxPool2d(2), conv(3, groups=3))
    lines = str(receptive_field(nn.Sequential(model, nn.AdaptiveAvgPool2d(1)))).splitlines()
    assert [line.split() for line in lines] == [
        "name layer size jump field".split(),
        "0.0 3 -> 3, 3x3, dilated 28 1 5".split(),
        "0.2 MaxPool2d 14 2 6".split(),
        "0.3 3 -> 3, 3x3, depthwise 14 2 10".split(),
        "1 AdaptiveAvgPool2d 1 all all".split(),
    ]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "model, words",
    [
        (after(nn.Upsample(scale_factor=2)), "more outputs than pixels"),
        (after(lambda x: torch.where(x > 0, x, torch.zeros_like(x))), "cannot see through 2"),
        (nn.Linear(3, 3), "Linear has no Conv2d"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        receptive_field(model)
