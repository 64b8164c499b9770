"""The networks: each layer, parameters and receptive field, the rules of the assignment, and heads that people change.

After a change of a layer one test shows what was expected and found, layer by layer. If the change is meant, put what
was found into TABLE and PARAMETERS here.
"""

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

NETWORKS = sorted({recipe["model"] for recipe in RECIPES.values()})
PARAMETERS = {"Model": 199_810, "SeparableResNet": 198_938}
# Channels in and out, kernel, stride, padding, dilation, groups; side and receptive field of the output
COLUMNS = ("in", "out", "k", "s", "p", "d", "g", "size", "rf")
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
        "classifier": (52, 10, 1, 1, 0, 1, 1, 1, "all"),
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


def build(network, *arguments):
    torch.manual_seed(0)
    return getattr(models, network)(*arguments).eval()


def running(network):
    """The network, if it runs; if not, the table says so, and the other tests are skipped."""
    try:
        model = build(network)
        model(torch.zeros(1, 3, 32, 32))
        return model
    except Exception as error:
        if network not in TABLE:
            raise
        pytest.skip(f"{network} does not run: {error}")


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def changes(network):
    """What differs from TABLE and PARAMETERS, as a text of one screen; empty if nothing does."""
    expected, found, trouble = TABLE[network], {}, []
    try:
        model = build(network)
    except Exception as error:
        return f"{network} cannot be made: {error!r}"
    try:
        rows = receptive_field(model)
        total, seen = rows.total, {row.name: (row.size, row.receptive_field or "all") for row in rows}
    except (RuntimeError, ValueError) as error:
        total, seen, trouble = "?", {}, [f"It does not run: {error}"]
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            sides = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
            geometry = conv.in_channels, conv.out_channels, *(side[0] for side in sides), conv.groups
            found[name] = (*geometry, *seen.get(name, ("?", "?")))
    field = max(row[-1] for row in expected.values() if row[-1] != "all")
    if found == expected and (parameters_of(model), total) == (PARAMETERS[network], field):
        return ""
    cells = "{:>4}{:>4}{:>3}{:>3}{:>3}{:>3}{:>4}{:>6}{:>4}".format
    lines = [f"  {'layer':19}{cells(*COLUMNS)}   |{cells(*COLUMNS)}"]
    for name in sorted({*expected, *found}):
        then, now = (table.get(name, ("-",) * len(COLUMNS)) for table in (expected, found))
        new = ("." if new == old else new for old, new in zip(then, now))
        lines.append(f"{' ' if then[:-2] == now[:-2] else '>'} {name:19}{cells(*then)}   |{cells(*new)}")
    return "\n".join(
        [
            f"{network} has changed. Expected, and what is found instead; > marks a changed layer.",
            *trouble,
            *lines,
            f"  parameters: expected {PARAMETERS[network]:,}, found {parameters_of(model):,} (must be below 200,000)",
            f"  receptive field: expected {field}, found {total} (must be above 44)",
            "(kernel, stride, padding, dilation, groups; side and receptive field of the output)",
            "If the change is meant, put what is found into TABLE and PARAMETERS in tests/test_models.py.",
        ]
    )


@pytest.mark.parametrize("network", TABLE)
def test_layers_are_those_of_the_table(network):
    if report := changes(network):
        pytest.fail(report, pytrace=False)


@pytest.mark.parametrize("network", NETWORKS)
def test_rules_of_the_assignment(network):
    model = running(network)
    rows, modules = receptive_field(model), dict(model.named_modules())
    convs = {row.name: modules[row.name] for row in rows if isinstance(modules[row.name], nn.Conv2d)}
    ends = [[name for name in convs if name.startswith(f"C{block}.")][-1] for block in (1, 2, 3, 4)]
    pools = [position for position, row in enumerate(rows) if row.name not in convs]
    strided = {name: conv.kernel_size[0] for name, conv in convs.items() if conv.stride != (1, 1)}
    depthwise = [conv.kernel_size != (1, 1) and conv.groups == conv.in_channels > 1 for conv in convs.values()]
    pointwise = [conv.kernel_size == (1, 1) and conv.groups == 1 for conv in convs.values()]
    rules = {
        "fewer than 200,000 parameters": parameters_of(model) < 200_000,
        "C1, C2 and C3 end in a 3x3 convolution of stride 2, and no other step has a stride": (
            strided == dict.fromkeys(ends[:3], 3) and all(convs[end].stride == (2, 2) for end in ends[:3])
        ),
        "no pooling but the average over the whole image, after C4": (
            [(rows[p - 1].name, rows[p].layer, rows[p].receptive_field) for p in pools]
            == [(ends[3], "AdaptiveAvgPool2d", None)]
        ),
        "a dilated layer": any(conv.dilation != (1, 1) for conv in convs.values()),
        "a depthwise convolution, then a 1x1 convolution": any(map(all, zip(depthwise, pointwise[1:]))),
        "a receptive field above 44": rows.total > 44,
    }
    if broken := [rule for rule, kept in rules.items() if not kept]:
        pytest.fail(f"{network} breaks the rule: {'; '.join(broken)}", pytrace=False)


@pytest.mark.parametrize("network", NETWORKS)
def test_torchsummary_lists_the_layers(network, capsys):
    model = running(network)
    summary(model, input_size=(3, 32, 32), device="cpu")
    printed = re.findall(r"^\s*(\w+-\d+)\s+\[-1, \d+, (\d+), \d+\]", capsys.readouterr().out, re.MULTILINE)
    sides = [side for name, side in printed if name.startswith(("Conv2d", "AdaptiveAvgPool2d"))]
    assert sides == [str(row.size) for row in receptive_field(model)] and len(sides) > 10
    if network == "Model" and not changes(network):
        layer = ["Conv2d", "ReLU", "BatchNorm2d", "Dropout"]
        kinds = 4 * layer + 2 * layer + ["Conv2d"] + layer + 2 * layer + ["Conv2d"] + layer + 3 * layer + ["Conv2d"]
        kinds += ["AdaptiveAvgPool2d", "Conv2d"]  # the 57 rows of the original table
        names = [f"{kind}-{number}" for number, kind in enumerate(kinds, start=1)]
        pairs = itertools.zip_longest((name for name, _ in printed), names)
        assert not [(found, expected) for found, expected in pairs if found != expected][:3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", NETWORKS)
def test_output_is_log_probabilities_of_images_of_any_size(network, dtype):
    model = running(network).to(dtype)
    smallest = [(7, 7)] if network in TABLE and not changes(network) else []  # other layers may need more
    for size in [(31, 33), (64, 96), *smallest]:
        output = model(torch.randn(3, 3, *size, dtype=dtype))
        assert output.shape == (3, 10) and output.dtype == torch.float32
        torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("network", NETWORKS)
def test_arguments(network):
    model, features = running(network), build(network).classifier.weight.shape[1]
    of_three = build(network, 0.25, 3)
    assert {m.p for m in of_three.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert parameters_of(model) - parameters_of(of_three) == 7 * (features + 1)
    assert of_three(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert Model().C1[0].dropout.p == 0.01


@pytest.mark.parametrize("network", NETWORKS)
def test_torch_fx_and_another_head_give_the_features(network):
    model, images = running(network), torch.randn(2, 3, 32, 32)
    parts = create_feature_extractor(model, {"C3": "features", "log_softmax": "scores"})(images)
    torch.testing.assert_close(parts["features"], model.C3(model.C2(model.C1(images))))
    torch.testing.assert_close(parts["scores"], model(images))
    field, features = receptive_field(model).total, model.classifier.weight.shape[1]
    for head, outputs in [(nn.Sequential(model.classifier, nn.Dropout(0.5)), 10), (nn.Identity(), features)]:
        model.classifier = head.eval()
        assert model(images).shape == (2, outputs) and receptive_field(model).total == field


def test_a_residual_adds_its_branch_to_its_input():
    x, branch = torch.randn(2, 3, 4, 4), nn.Conv2d(3, 3, 3, padding=1)
    torch.testing.assert_close(models.Residual(branch)(x), nn.Hardswish()(x + branch(x)))
