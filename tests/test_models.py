"""The networks: their layers and parameters, the rules of the assignment, and heads that people change."""

import contextlib
import itertools
import re

import pytest
import torch
from torch import nn
from torchsummary import summary
from torchvision.models.feature_extraction import create_feature_extractor

import models
from models import Model, receptive_field
from recipes import RECIPES

PARAMETERS = {"Model": 199_810, "SeparableResNet": 198_938}
# Channels in and out, kernel, stride, padding, dilation, groups; side and receptive field (None: all) of the output
TABLE = {
    "Model": {
        "C1.0.conv": (3, 16, 3, 1, 0, 1, 1, 30, 3),
        "C1.1.conv": (16, 32, 3, 1, 1, 1, 1, 30, 5),
        "C1.2.conv": (32, 48, 3, 1, 0, 2, 1, 26, 9),
        "C1.3.conv": (48, 32, 3, 2, 1, 1, 1, 13, 11),
        "C2.0.conv": (32, 64, 3, 1, 1, 1, 1, 13, 15),
        "C2.1.conv": (64, 96, 3, 1, 1, 1, 1, 13, 19),
        "C2.2": (96, 64, 1, 1, 0, 1, 1, 13, 19),
        "C2.3.conv": (64, 32, 3, 2, 1, 1, 1, 7, 23),
        "C3.0.conv": (32, 64, 3, 1, 1, 1, 32, 7, 31),
        "C3.1.conv": (64, 128, 3, 1, 1, 1, 64, 7, 39),
        "C3.2": (128, 64, 1, 1, 0, 1, 1, 7, 39),
        "C3.3.conv": (64, 64, 3, 2, 1, 1, 1, 4, 47),
        "C4.0.conv": (64, 128, 3, 1, 1, 1, 64, 4, 63),
        "C4.1.conv": (128, 256, 3, 1, 1, 1, 128, 4, 79),
        "C4.2.conv": (256, 256, 3, 1, 1, 1, 256, 4, 95),
        "C4.3": (256, 52, 1, 1, 0, 1, 1, 4, 95),
        "classifier": (52, 10, 1, 1, 0, 1, 1, 1, None),
    },
    "SeparableResNet": {
        "C1.0.0": (3, 16, 3, 1, 1, 1, 1, 32, 3),
        "C1.1.branch.0.0": (16, 16, 3, 1, 2, 2, 1, 32, 7),
        "C1.1.branch.1.0": (16, 16, 3, 1, 1, 1, 1, 32, 9),
        "C1.2.0": (16, 64, 3, 2, 1, 1, 1, 16, 11),
        "C2.0.branch.0.0": (64, 64, 3, 1, 1, 1, 1, 16, 15),
        "C2.0.branch.1.0": (64, 64, 3, 1, 1, 1, 1, 16, 19),
        "C2.1.0": (64, 128, 3, 2, 1, 1, 4, 8, 23),
        "C3.0.branch.0.0": (128, 128, 3, 1, 1, 1, 128, 8, 31),
        "C3.0.branch.0.1.0": (128, 128, 1, 1, 0, 1, 1, 8, 31),
        "C3.0.branch.1.0": (128, 128, 3, 1, 1, 1, 128, 8, 39),
        "C3.0.branch.1.1.0": (128, 128, 1, 1, 0, 1, 1, 8, 39),
        "C3.1.0": (128, 128, 3, 2, 1, 1, 4, 4, 47),
        "C4.0.branch.0.0": (128, 128, 3, 1, 1, 1, 128, 4, 63),
        "C4.0.branch.0.1.0": (128, 128, 1, 1, 0, 1, 1, 4, 63),
    },
}


@pytest.fixture(params=sorted({recipe["model"] for recipe in RECIPES.values()}))
def model(request):
    torch.manual_seed(0)
    return getattr(models, request.param)().eval()


def test_layers_are_those_of_the_table(model):
    network, seen = type(model).__name__, {}
    with contextlib.suppress(RuntimeError):  # of layers that do not fit together; the other tests show it
        seen = {row.name: (row.size, row.receptive_field) for row in receptive_field(model)}
    expected = TABLE[network] | {"parameters": PARAMETERS[network]}
    found = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            sides = (side for side, _ in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
            found[name] = (conv.in_channels, conv.out_channels, *sides, conv.groups, *seen.get(name, "??"))
    pairs = {name: (expected.get(name), found.get(name)) for name in sorted({*expected, *found})}
    changed = [f"{name}: expected {then}, found {now}" for name, (then, now) in pairs.items() if then != now]
    heading = "a layer: (in, out, kernel, stride, padding, dilation, groups, size of the image, receptive field)"
    assert not changed, "\n".join(["the network has changed", heading, *changed])


def test_rules_of_the_assignment(model):
    rows, modules = receptive_field(model), dict(model.named_modules())
    convs = {row.name: modules[row.name] for row in rows if isinstance(modules[row.name], nn.Conv2d)}
    ends = [[name for name in convs if name.startswith(f"C{block}.")][-1] for block in (1, 2, 3, 4)]
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000 and rows.total > 44
    # C1, C2 and C3 end in a 3x3 convolution of stride 2, and no other step has a stride.
    strided = {name: (conv.kernel_size, conv.stride) for name, conv in convs.items() if conv.stride != (1, 1)}
    assert strided == dict.fromkeys(ends[:3], ((3, 3), (2, 2)))
    # No pooling but the average over the whole image, after C4.
    pools = [(rows[p - 1].name, row.layer, row.receptive_field) for p, row in enumerate(rows) if row.name not in convs]
    assert pools == [(ends[3], "AdaptiveAvgPool2d", None)]
    assert any(conv.dilation != (1, 1) for conv in convs.values())
    # A depthwise convolution, then a 1x1 convolution.
    pairs = itertools.pairwise(convs.values())
    then = [b for a, b in pairs if a.kernel_size != (1, 1) and a.groups == a.in_channels > 1]
    assert any(conv.kernel_size == (1, 1) and conv.groups == 1 for conv in then)


def test_torchsummary_lists_the_layers(model, capsys):
    summary(model, input_size=(3, 32, 32), device="cpu")
    printed = re.findall(r"(\w+-\d+) +\[-1, \d+, (\d+), \d+\]", capsys.readouterr().out)
    sides = [int(side) for name, side in printed if name.startswith(("Conv2d", "AdaptiveAvgPool2d"))]
    assert sides == [row.size for row in receptive_field(model)]
    if isinstance(model, Model):  # the 57 rows of the original table
        kinds = ["Conv2d ReLU BatchNorm2d Dropout" if name.endswith("conv") else "Conv2d" for name in TABLE["Model"]]
        kinds = " ".join([*kinds[:-1], "AdaptiveAvgPool2d", kinds[-1]]).split()
        assert [name for name, _ in printed] == [f"{kind}-{number}" for number, kind in enumerate(kinds, start=1)]


def test_output_is_log_probabilities_of_images_of_any_size(model):
    for dtype, size in itertools.product([torch.float32, torch.bfloat16], [(7, 7), (31, 33), (64, 96)]):
        output = model.to(dtype)(torch.randn(3, 3, *size, dtype=dtype))
        assert output.shape == (3, 10) and output.dtype == torch.float32
        torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(3))


def test_arguments(model):
    of_three = type(model)(0.25, 3)
    assert {module.p for module in of_three.modules() if isinstance(module, nn.Dropout)} == {0.25}
    assert of_three(torch.randn(2, 3, 32, 32)).shape == (2, 3) and Model().C1[0].dropout.p == 0.01


def test_torch_fx_and_another_head_give_the_features(model):
    images = torch.randn(2, 3, 32, 32)
    parts = create_feature_extractor(model, {"C3": "features", "log_softmax": "scores"})(images)
    torch.testing.assert_close(parts["features"], model.C3(model.C2(model.C1(images))))
    torch.testing.assert_close(parts["scores"], model(images))
    field, features = receptive_field(model).total, model.classifier.weight.shape[1]
    model.classifier = nn.Identity()
    assert model(images).shape == (2, features) and receptive_field(model).total == field


def test_a_residual_adds_its_branch_to_its_input():
    x, branch = torch.randn(2, 3, 4, 4), nn.Conv2d(3, 3, 3, padding=1)
    torch.testing.assert_close(models.Residual(branch)(x), nn.Hardswish()(x + branch(x)))
