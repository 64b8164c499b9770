"""The network: parameters, the torchsummary table, and the rules of the assignment, each read off the modules."""

import re

import pytest
import torch
from torch import nn
from torchsummary import summary

from models import Model, receptive_field

# DESIGN table: in, out, kernel, stride, padding, dilation, groups, output side, receptive field, jump, summary row
TABLE = [
    (3, 16, 3, 1, 0, 1, 1, 30, 3, 1, "Conv2d-1"),
    (16, 32, 3, 1, 1, 1, 1, 30, 5, 1, "Conv2d-5"),
    (32, 48, 3, 1, 0, 2, 1, 26, 9, 1, "Conv2d-9"),
    (48, 32, 3, 2, 1, 1, 1, 13, 11, 2, "Conv2d-13"),
    (32, 64, 3, 1, 1, 1, 1, 13, 15, 2, "Conv2d-17"),
    (64, 96, 3, 1, 1, 1, 1, 13, 19, 2, "Conv2d-21"),
    (96, 64, 1, 1, 0, 1, 1, 13, 19, 2, "Conv2d-25"),
    (64, 32, 3, 2, 1, 1, 1, 7, 23, 4, "Conv2d-26"),
    (32, 64, 3, 1, 1, 1, 32, 7, 31, 4, "Conv2d-30"),
    (64, 128, 3, 1, 1, 1, 64, 7, 39, 4, "Conv2d-34"),
    (128, 64, 1, 1, 0, 1, 1, 7, 39, 4, "Conv2d-38"),
    (64, 64, 3, 2, 1, 1, 1, 4, 47, 8, "Conv2d-39"),
    (64, 128, 3, 1, 1, 1, 64, 4, 63, 8, "Conv2d-43"),
    (128, 256, 3, 1, 1, 1, 128, 4, 79, 8, "Conv2d-47"),
    (256, 256, 3, 1, 1, 1, 256, 4, 95, 8, "Conv2d-51"),
    (256, 52, 1, 1, 0, 1, 1, 4, 95, 8, "Conv2d-55"),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model().eval()


def parameters_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


# Counted by hand: 9 * in * out (9 * out where depthwise, in * out where 1x1), and 2 * out for each BatchNorm.
@pytest.mark.parametrize(
    "block, by_hand",
    [
        ("C1", 9 * (3 * 16 + 16 * 32 + 32 * 48 + 48 * 32) + 2 * (16 + 32 + 48 + 32)),
        ("C2", 9 * (32 * 64 + 64 * 96 + 64 * 32) + 96 * 64 + 2 * (64 + 96 + 32)),
        ("C3", 9 * (64 + 128 + 64 * 64) + 128 * 64 + 2 * (64 + 128 + 64)),
        ("C4", 9 * (128 + 256 + 256) + 256 * 52 + 2 * (128 + 256 + 256)),
        ("classifier", 52 * 10 + 10),
    ],
)
def test_parameters_of_each_block(model, block, by_hand):
    assert parameters_of(getattr(model, block)) == by_hand


def test_parameters_in_total(model):
    assert parameters_of(model) == 199_810 < 200_000


def test_every_convolution_is_the_one_of_the_table(model):
    found = [
        (c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0], c.dilation[0], c.groups)
        for c in convolutions(model)
    ]
    assert found[:-1] == [row[:7] for row in TABLE]
    assert found[-1] == (52, 10, 1, 1, 0, 1, 1)
    assert [c.bias is not None for c in convolutions(model)] == [False] * len(TABLE) + [True]


def test_a_layer_is_conv_relu_batchnorm_dropout(model):
    layer = model.C1[0]
    assert [type(m).__name__ for m in layer] == ["Conv2d", "ReLU", "BatchNorm2d", "Dropout"]
    assert Model(dropout_value=0.05).C1[0].dropout.p == 0.05 and Model().C1[0].dropout.p == 0.01


def test_torchsummary_prints_the_57_rows(capsys):
    summary(Model(), input_size=(3, 32, 32), device="cpu")
    printed = capsys.readouterr().out
    rows = re.findall(r"^\s*(\w+-\d+)\s+\[-1, (\d+), (\d+), \d+\]", printed, re.MULTILINE)
    layer = ["Conv2d", "ReLU", "BatchNorm2d", "Dropout"]
    kinds = 4 * layer + 2 * layer + ["Conv2d"] + layer + 2 * layer + ["Conv2d"] + layer + 3 * layer + ["Conv2d"]
    kinds += ["AdaptiveAvgPool2d", "Conv2d"]
    assert [name for name, _, _ in rows] == [f"{kind}-{number}" for number, kind in enumerate(kinds, start=1)]
    assert len(rows) == 57 and "Total params: 199,810" in printed
    sides = {name: (int(channels), int(side)) for name, channels, side in rows}
    assert all(sides[row[10]] == (row[1], row[7]) for row in TABLE)


def test_rules_of_the_assignment(model):
    blocks = [model.C1, model.C2, model.C3, model.C4]
    pools = [m for m in model.modules() if "Pool" in type(m).__name__]
    assert [type(pool) for pool in pools] == [nn.AdaptiveAvgPool2d] and pools[0].output_size == 1
    assert [convolutions(block)[-1].stride for block in blocks[:3]] == [(2, 2)] * 3  # C1 to C3 end in a stride
    assert any(c.dilation == (2, 2) for c in convolutions(model.C1))
    for block in (model.C3, model.C4):  # depthwise, then the pointwise half
        depthwise = [c for c in convolutions(block) if c.groups == c.in_channels]
        assert depthwise and any(c.kernel_size == (1, 1) and c.groups == 1 for c in convolutions(block))
    assert receptive_field(model).total > 44


def test_output_is_log_probabilities(model):
    output = model(torch.randn(5, 3, 32, 32))
    assert output.shape == (5, 10) and output.dtype == torch.float32
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(5))


@pytest.mark.parametrize("size", [(7, 7), (31, 33), (64, 64), (96, 128)])
def test_other_input_sizes(model, size):
    assert model(torch.randn(2, 3, *size)).shape == (2, 10)


def test_same_function_as_layers_of_torch(model):
    """Our Conv2d and Dropout change how a CPU computes, not what."""
    plain = Model().eval()
    plain.load_state_dict(model.state_dict())
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(images), plain(images))


def test_state_dict_goes_there_and_back(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = Model()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other.eval()(images), model(images))
