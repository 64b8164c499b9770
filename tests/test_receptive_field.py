"""receptive_field against input gradients, a formula, published figures and counts by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from models import receptive_field
from recipes import RECIPES


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
    convolutions = [row for row in rows if row.summary_row.startswith("Conv2d")]
    ends = [[row for row in convolutions if row.name.startswith(block)][-1] for block in ("C1", "C2", "C3", "C4")]
    side = rows.total + 4 * ends[-1].jump
    extents = extents_of_gradients(model, [row.name for row in ends], side)
    assert extents == [row.receptive_field for row in ends] and extents[-1] == rows.total


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 3)), min_size=1))
@settings(deadline=None, max_examples=30)
def test_any_chain_follows_the_formula(chain):
    chain = chain[:4]
    layers = [nn.Conv2d(1, 1, kernel, stride, padding, dilation) for kernel, stride, padding, dilation in chain]
    rows = receptive_field(nn.Sequential(*layers), input_size=600)
    jumps = np.cumprod([1] + [stride for _, stride, _, _ in chain])
    fields = 1 + np.cumsum([(kernel - 1) * dilation * jump for (kernel, _, _, dilation), jump in zip(chain, jumps)])
    assert [row.receptive_field for row in rows] == fields.tolist() and rows.total == fields[-1]
    assert [row.jump for row in rows] == jumps[1:].tolist()
    side, sizes = 600, []
    for kernel, stride, padding, dilation in chain:
        side = (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        sizes.append(side)
    assert [row.size for row in rows] == sizes


@given(st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7]), st.booleans()), min_size=1))
@settings(deadline=None, max_examples=20)
def test_gradients_reach_as_far_through_any_branches(blocks):
    """Each block has a branch of two convolutions and one of one, which are added or concatenated."""

    def block(outer, inner, add):
        join = torch.add if add else lambda a, b: torch.cat([a, b], dim=1)
        modules = conv(outer), conv(3, dilation=2, padding=2), conv(inner), conv(1, 3 if add else 6)
        return Network(lambda x, a, b, c, d: d(join(b(a(x)), c(x))), *modules)

    model = nn.Sequential(*(block(*each) for each in blocks[:3]), nn.Identity())
    assert extents_of_gradients(model, [str(len(model) - 1)], side=48) == [receptive_field(model).total]


PUBLISHED = {"resnet18": 435, "densenet121": 2071, "mobilenet_v2": 491, "vgg16": 212}


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name, size):
    with torch.device("meta"):  # shapes are enough, and the weights of VGG take a while
        model = getattr(torchvision.models, name)()
    assert receptive_field(model.features if name == "vgg16" else model, size).total == PUBLISHED[name]


def squeeze_excite(pool):
    return Network(lambda x, a, p, b, c: c((x := a(x)) * b(p(x)).sigmoid()), conv(), pool, conv(1), conv())


BY_HAND = {  # a network, and the receptive field after each of its steps; None is the whole image
    "a sum": (Network(lambda x, a, b: b(a(x) + x), conv(), conv()), [3, 5]),
    "a concatenation": (Network(lambda x, a, b: b(torch.cat([x, a(x)], 1)), conv(5), conv(3, 6)), [5, 7]),
    "the larger of two branches": (Network(lambda x, a, b: a(x) + b(x), conv(7), conv(3)), [7, 3]),
    "strides": (Network(lambda x, a, b, c: c(a(x) + b(x)), conv(stride=2), conv(1, stride=2), conv()), [3, 1, 7]),
    "squeeze-and-excitation": (squeeze_excite(nn.AdaptiveAvgPool2d(1)), [3, None, None, None]),
    "squeeze by AvgPool2d": (squeeze_excite(nn.AvgPool2d(32)), [3, None, None, None]),
    "squeeze by a function": (squeeze_excite(Network(lambda x: x.mean((2, 3), True))), [3, None, None]),
    "attention to places": (
        Network(lambda x, a, b: a(x * b(torch.cat([x.mean(1, True), x.amax(-3, True)], 1))), conv(), conv(7, 2, 1)),
        [7, 9],
    ),
    "a module used twice": (Network(lambda x, a: a(F.relu(a(x))), conv()), [3, 5]),
    "max_pool2d, a function": (Network(lambda x, a, b: b(F.max_pool2d(a(x), 2)), conv(), conv()), [3, 4, 8]),
    "avg_pool2d, a function": (Network(lambda x, a, b: b(F.avg_pool2d(a(x), 3, 1, 1)), conv(), conv()), [3, 5, 7]),
    "conv2d, a function": (Network(lambda x, a: F.conv2d(a(x), torch.ones(3, 3, 5, 5)), conv()), [3, 7]),
    "a global AvgPool2d": (nn.Sequential(conv(stride=2), nn.AvgPool2d(16), conv(1)), [3, None, None]),
    "a global average, a function": (Network(lambda x, a: F.avg_pool2d(a(x), x.shape[2:]), conv()), [3, None]),
    "a global maximum": (nn.Sequential(conv(), nn.AdaptiveMaxPool2d(1)), [3, None]),
    "the mean, a function": (Network(lambda x, a: a(x).mean((2, 3)), conv()), [3]),
    "a classifier over all pixels": (nn.Sequential(conv(), nn.Flatten(), nn.Linear(3072, 10)), [3]),
    "a linear layer over channels": (
        Network(lambda x, a, b, c: c(b(a(x).movedim(1, 3)).movedim(3, 1)), conv(), nn.Linear(3, 3), conv()),
        [3, 5],
    ),
    "padding around and negative": (nn.Sequential(nn.ReflectionPad2d(2), conv(), nn.ZeroPad2d(-1), conv()), [3, 5]),
    "padding 'same' of another dilation": (nn.Sequential(conv(3, padding="same", dilation=2), conv()), [5, 7]),
    "some of the channels": (Network(lambda x, a, b: b(a(x)[:, :2]), conv(), conv(3, 2)), [3, 5]),
    "shuffled channels": (nn.Sequential(conv(3, 3, 4), nn.ChannelShuffle(2), conv(3, 4)), [3, 5]),
    "ceil_mode": (nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), conv()), [3, 7]),
}


@pytest.mark.parametrize("network, fields", BY_HAND.values(), ids=BY_HAND)
def test_counts_by_hand(network, fields):
    rows = receptive_field(network)
    assert [row.receptive_field for row in rows] == fields
    assert rows.total == max(field or 0 for field in fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sees_through_wrappers_and_in_any_type(dtype):
    model = nn.Sequential(conv(), nn.Sequential(nn.BatchNorm2d(3), conv(5))).to(dtype)
    rows = receptive_field(torch.compile(nn.DataParallel(model), backend="eager"))
    assert rows == receptive_field(model) and [row.name for row in rows] == ["0", "1.1"]


def test_follows_a_change_and_leaves_the_model_as_it_was():
    model = nn.Sequential(conv(stride=2), nn.BatchNorm2d(3), nn.Dropout(), conv()).train()
    model[1].eval()  # another mode than the rest
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert receptive_field(model).total == 7
    model[0].stride, model[3].dilation = (1, 1), (2, 2)
    with torch.inference_mode():
        assert receptive_field(model).total == 7
    model[3].dilation = (1, 1)
    assert receptive_field(model).total == 5
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_prints_as_a_table():
    model = nn.Sequential(conv(3, dilation=2, padding=0), nn.ReLU(), nn.MaxPool2d(2), conv(3, groups=3))
    lines = str(receptive_field(nn.Sequential(model, nn.AdaptiveAvgPool2d(1)))).splitlines()
    assert [line.split() for line in lines] == [
        "name summary row kernel stride padding dilation groups size jump receptive field".split(),
        "0.0 Conv2d-1 3 1 0 2 1 28 1 5".split(),
        "0.2 MaxPool2d-3 2 2 0 1 1 14 2 6".split(),
        "0.3 Conv2d-4 3 1 1 1 3 14 2 10".split(),
        "1 AdaptiveAvgPool2d-5 14 1 0 1 1 1 all all".split(),
    ]
    assert len({len(line) for line in lines}) == 1


class Own(torch.autograd.Function):
    """Whatever it does to the pixels."""

    @staticmethod
    def forward(ctx, x):
        return x.roll(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.roll(-1, 2)


@pytest.mark.parametrize(
    "model, words",
    [
        (nn.Sequential(conv(), nn.Upsample(scale_factor=2)), "Upsample"),
        (nn.Sequential(conv(), nn.ConvTranspose2d(3, 3, 2, 2)), "transposed"),
        (nn.Sequential(conv(), nn.PixelUnshuffle(2), conv(3, 12)), "before '2': the side changes from 32 to 16"),
        (nn.Sequential(conv(), nn.FractionalMaxPool2d(2, output_size=16)), "FractionalMaxPool"),
        (Network(lambda x, a, b: b(a(x)[:, :, ::2, ::2]), conv(), conv()), "Slice"),
        (Network(lambda x, a: torch.cat(a(x).chunk(2, dim=2)[::-1], 2), conv()), "Split"),
        (Network(lambda x, a: a(x) + F.max_pool2d(x, 3, 2, 1).repeat(1, 1, 2, 2), conv()), "different sizes"),
        (nn.Sequential(conv(), nn.Conv2d(3, 3, (3, 1))), "square.* 1 has"),
        (conv(stride=(1, 2)), "square"),
        (nn.Sequential(conv(), nn.AdaptiveAvgPool2d(2)), "only to one output"),
        (nn.Sequential(conv(), nn.AdaptiveMaxPool2d(2)), "only to one output"),
        (nn.Sequential(conv(), nn.Linear(32, 32)), "along the rows"),
        (nn.Linear(3, 3), "Linear has no Conv2d"),
        (Network(lambda x, a: {"scores": a(x)}, conv()), "returns a dict"),
        (Network(lambda x, a, b: b(a(x).detach()) + 0 * x, conv(), conv()), "output of m.0.*detach"),
        (Network(lambda x, a, b: b(a(x).data) + b(x), conv(), conv()), "output of m.0.*detach"),
        (Network(lambda x, a: a(x).cumsum(2), conv()), "Cumsum"),
        (Network(lambda x, a: Own.apply(a(x)), conv()), "OwnBackward, a function with a backward of its own"),
    ],
)
def test_what_cannot_be_traced_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        receptive_field(model)
    assert not any(module._forward_hooks for module in model.modules())
