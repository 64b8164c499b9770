"""receptive_field against the table, against input gradients, and on networks that are not ours."""

import pytest
import torch
import torch.nn.functional as F
from test_models import TABLE
from torch import nn

from models import Model, receptive_field


def extent_of_gradient(model, layer, side):
    """Side of the square of input pixels that reach the centre output of a layer, by autograd alone."""
    outputs = []
    hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    image = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    model.eval()(image)
    hook.remove()
    centre = outputs[0].shape[-1] // 2
    outputs[0][:, :, centre, centre].sum().backward()
    touched = image.grad.abs().sum(dim=(0, 1)) > 0
    rows, columns = touched.any(dim=1).nonzero(), touched.any(dim=0).nonzero()
    assert rows.max() - rows.min() == columns.max() - columns.min()
    return int(rows.max() - rows.min()) + 1


def all_positive(model):
    """Positive weights let no ReLU close and no sum cancel, so that every pixel that can matter does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.abs() + 0.01
    return model.double()


def test_receptive_field_is_95_pixels():
    assert receptive_field(Model()).total == 95


def test_rows_are_those_of_the_table():
    rows = receptive_field(Model())
    fields = ("kernel", "stride", "padding", "dilation", "groups", "size", "receptive_field", "jump", "summary_row")
    assert [tuple(getattr(row, field) for field in fields) for row in rows[:-2]] == [row[2:] for row in TABLE]
    assert [(row.name, row.summary_row, row.size, row.receptive_field) for row in rows[-2:]] == [
        ("pool", "AdaptiveAvgPool2d-56", 1, None),
        ("classifier", "Conv2d-57", 1, None),
    ]


def test_gradients_reach_just_as_far():
    model = all_positive(Model())
    modules = dict(model.named_modules())
    for row in receptive_field(model)[:-2]:
        assert extent_of_gradient(model, modules[row.name], side=160) == row.receptive_field, row.name


def test_follows_a_change_of_the_network():
    model = Model()
    model.C1[3].conv.stride = (1, 1)  # every jump behind it halves
    assert receptive_field(model).total == 11 + (95 - 11) // 2
    model.C1[2].conv.dilation = (1, 1)
    assert receptive_field(model).total == 11 + (95 - 11) // 2 - 2


def test_a_chain_that_is_not_ours():
    chain = nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2, padding=2),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, dilation=2, padding="same"),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 10),
    )
    rows = receptive_field(chain, input_size=64)
    # 5, then +2*2, +1*4, +2*2*8; jumps 2, 4, 8, 8
    assert [(row.receptive_field, row.jump, row.size) for row in rows] == [
        (5, 2, 32),
        (9, 4, 16),
        (13, 8, 8),
        (45, 8, 8),
    ]
    assert rows[-1].padding == 2


def test_modules_used_twice_and_functional_activations_count():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    assert [row.receptive_field for row in receptive_field(Twice())] == [3, 5]


def test_leaves_the_model_as_it_was():
    model = Model().train()
    model.C2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    receptive_field(model)
    assert model.training and not model.C2.training and model.C3.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_prints_as_a_table():
    lines = str(receptive_field(Model())).splitlines()
    assert (
        lines[0].split() == "name summary row kernel stride padding dilation groups size jump receptive field".split()
    )
    assert lines[3].split() == ["C1.2.conv", "Conv2d-9", "3", "1", "0", "2", "1", "26", "1", "9"]
    assert len(lines) == 19 and len({len(line) for line in lines}) == 1


class Residual(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.join = join

    def forward(self, x):
        return self.join(self.conv(x), x)


class FunctionalPool(nn.Sequential):
    def forward(self, x):
        return self[1](F.max_pool2d(self[0](x), 2))


@pytest.mark.parametrize(
    "model, words",
    [
        (Residual(torch.add), "branches"),
        (Residual(lambda a, b: torch.cat([a, b], dim=1)), "branches"),
        (FunctionalPool(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), "outside any module"),
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.Upsample(scale_factor=2)), "Upsample"),
        (nn.Sequential(nn.Conv2d(3, 3, (3, 1))), "not square"),
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(2)), "more than one output"),
        (nn.Linear(3, 3), "no Conv2d"),
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Linear(32, 32)), "along the rows"),
        (Residual(lambda a, b: (a + b).detach() + 0 * b), "detached"),
    ],
)
def test_what_cannot_be_traced_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        receptive_field(model)
    with torch.inference_mode(), pytest.raises(ValueError, match=words):
        receptive_field(model)
