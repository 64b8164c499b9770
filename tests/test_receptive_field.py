"""receptive_field against input gradients, a formula and counts by hand."""

import copy

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


def assert_gradients_reach_as_far(model):
    rows = receptive_field(model)
    for parameter in model.double().eval().parameters():  # positive weights let no ReLU close and no sum cancel
        parameter.requires_grad_(False).abs_().add_(0.01)
    side = rows.total + 4 * rows[-1].jump
    image = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    output = model(image)
    output[:, :, output.shape[2] // 2, output.shape[3] // 2].sum().backward()
    _, _, ys, xs = image.grad.nonzero(as_tuple=True)
    assert [int(at.max() - at.min()) + 1 for at in (ys, xs)] == [rows.total] * 2


@pytest.mark.parametrize("network", sorted({recipe["model"] for recipe in RECIPES.values()}))
def test_gradients_reach_as_far_in_each_block(network):
    blocks = list(getattr(models, network)().children())[:4]
    for count in range(1, 5):
        assert_gradients_reach_as_far(nn.Sequential(*blocks[:count]))


@given(st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7])), min_size=1, max_size=3))
@settings(deadline=None, max_examples=10)
def test_gradients_reach_as_far_through_any_branches(blocks):
    def block(outer, inner):
        modules = conv(outer), conv(3, dilation=2, padding=2), conv(inner), conv(1, 6)
        return Network(lambda x, a, b, c, d: d(torch.cat([b(a(x)) + x, c(x)], dim=1)), *modules)

    assert_gradients_reach_as_far(nn.Sequential(*(block(*kernels) for kernels in blocks)))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 3)), min_size=1))
@settings(deadline=None, max_examples=20)
def test_any_chain_follows_the_formula(chain):
    """r_out = r_in + (k - 1) * d * j_in and j_out = j_in * s (Araujo et al., Distill 2019)."""
    size, jump, field, expected = 200, 1, 1, []
    for kernel, stride, padding, dilation in chain[:3]:
        size = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        field += (kernel - 1) * dilation * jump
        jump *= stride
        expected.append((size, jump, field))
    rows = receptive_field(nn.Sequential(*(nn.Conv2d(1, 1, *geometry) for geometry in chain[:3])), input_size=200)
    assert [(row.size, row.jump, row.receptive_field) for row in rows] == expected and rows.total == field


def after(function, *modules):
    return nn.Sequential(conv(), Network(function, *modules), conv())


BY_HAND = {  # a network, and the receptive field after each of its layers; None is the whole image
    "a sum": (Network(lambda x, a, b: b(a(x) + x), conv(), conv()), [3, 5]),
    "the larger of two branches": (Network(lambda x, a, b: a(x) + b(x), conv(7), conv(3)), [7, 3]),
    "strides": (Network(lambda x, a, b, c: c(a(x) + b(x)), conv(stride=2), conv(1, stride=2), conv()), [3, 1, 7]),
    "strides of 3 and 5": (nn.Sequential(conv(stride=3), conv(stride=5), conv()), [3, 9, 39]),
    "a module used twice": (Network(lambda x, a: a(F.relu(a(x))), conv()), [3, 5]),
    "pooling": (nn.Sequential(conv(), nn.MaxPool2d(2), conv(), nn.AvgPool2d(3, 1, 1), conv()), [3, 4, 8, 12, 16]),
    "global average": (nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), conv(1)), [3, None, None]),
    "a global AvgPool2d": (nn.Sequential(conv(stride=2), nn.AvgPool2d(16), conv(1)), [3, None, None]),
    "squeeze-and-excitation": (after(lambda x, a: x * a(x.mean((2, 3), True)).sigmoid(), conv(1)), [3, None, None]),
    "a linear head": (nn.Sequential(conv(channels=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(768, 10)), [3, 4]),
    "shuffled pixels": (after(lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2)), [3, 5]),
    "group norm": (nn.Sequential(conv(), nn.GroupNorm(1, 3), conv()), [3, None]),
    "softmax over space": (after(lambda x: x.flatten(2).softmax(2).view_as(x)), [3, None]),
}  # fmt: skip


@pytest.mark.parametrize("network, fields", BY_HAND.values(), ids=BY_HAND)
def test_counts_by_hand(network, fields):
    rows = receptive_field(network)
    assert [row.receptive_field for row in rows] == fields
    assert rows.total == max(row.receptive_field or 0 for row in rows if "->" in row.layer)  # of convolutions
    post_receptive_field(network, rows)


def test_sees_through_wrappers_and_follows_a_change_and_leaves_the_model_as_it_was():
    model = nn.Sequential(conv(stride=2), nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), conv())).bfloat16().train()
    wrapped, before = torch.compile(nn.DataParallel(model), backend="eager"), copy.deepcopy(model.state_dict())
    for stride, dilation, total in [(2, 1, 7), (1, 2, 7), (1, 1, 5)]:
        model[0].stride, model[1][2].dilation = (stride, stride), (dilation, dilation)
        rows = receptive_field(wrapped)
        assert [row.name for row in rows] == ["0", "1.2"] and rows.total == total
    assert all(module.training and not module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_prints_as_a_table():
    model = nn.Sequential(conv(3, dilation=2, padding=0), nn.ReLU(), nn.MaxPool2d(2), conv(3, groups=3))
    assert str(receptive_field(nn.Sequential(model, nn.AdaptiveAvgPool2d(1)))).splitlines() == [
        "name  layer                   size  jump  field",
        "0.0   3 -> 3, 3x3, dilated      28     1      5",
        "0.2   MaxPool2d                 14     2      6",
        "0.3   3 -> 3, 3x3, depthwise    14     2     10",
        "1     AdaptiveAvgPool2d          1   all    all",
    ]


def test_what_cannot_be_measured_is_refused():
    enlarges = after(lambda x: F.interpolate(x, scale_factor=2))
    loses_nan = after(lambda x: torch.where(x > 0, x, torch.zeros_like(x)))
    for model, word in [(enlarges, "2"), (loses_nan, "2"), (nn.Sequential(nn.Flatten()), "Sequential")]:
        with pytest.raises(ValueError, match=rf"\b{word}\b"):
            receptive_field(model)
