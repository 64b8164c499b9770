"""The S9 network for CIFAR-10 (`Model`) and the arithmetic of what it sees (`receptive_field`).

This file is the definition of the architecture: read `Model.__init__` top to bottom and you have the table of the
README. Data and training live in `utils.py`; of them it knows only the trained weights in `weights/`.
"""

import json
import pathlib
from collections import OrderedDict
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from layers import Conv2d, Dropout
from runs import load_weights

WEIGHTS = pathlib.Path(__file__).parent / "weights"
MIN_INPUT_SIZE = 7  # C1 uses up 2 pixels in its first and 4 in its dilated convolution


def squeeze(in_channels, out_channels):
    """A bare 1x1 convolution; behind depthwise layers it is the pointwise half of the separable pair."""
    return Conv2d(in_channels, out_channels, 1, bias=False)


class Model(nn.Module):
    """Four convolution blocks, global average pooling and a 1x1 classifier: 199,810 parameters, receptive field 95.

    C1 to C3 end in a strided convolution instead of pooling; C1 has a dilated layer; the 3x3 layers of C3 and C4 are
    depthwise (but for C3's strided one), each block's run of them closed by a pointwise `squeeze`.

    Args:
        dropout_value: probability of zeroing an activation, in [0, 1].
        num_classes: outputs of the classifier; 53 parameters each.

    Input is float (N, 3, H, W), normalised, H and W at least 7 (32 for CIFAR-10); output is (N, num_classes)
    log-probabilities.
    """

    def __init__(self, dropout_value=0.01, num_classes=10):
        super().__init__()

        def layer(in_channels, out_channels, **conv):
            return nn.Sequential(
                OrderedDict(
                    conv=Conv2d(in_channels, out_channels, 3, bias=False, **conv),
                    relu=nn.ReLU(inplace=True),
                    norm=nn.BatchNorm2d(out_channels),
                    dropout=Dropout(dropout_value),
                )
            )

        self.C1 = nn.Sequential(
            layer(3, 16),
            layer(16, 32, padding=1),
            layer(32, 48, dilation=2),
            layer(48, 32, padding=1, stride=2),
        )
        self.C2 = nn.Sequential(
            layer(32, 64, padding=1),
            layer(64, 96, padding=1),
            squeeze(96, 64),
            layer(64, 32, padding=1, stride=2),
        )
        self.C3 = nn.Sequential(
            layer(32, 64, padding=1, groups=32),
            layer(64, 128, padding=1, groups=64),
            squeeze(128, 64),
            layer(64, 64, padding=1, stride=2),
        )
        self.C4 = nn.Sequential(
            layer(64, 128, padding=1, groups=64),
            layer(128, 256, padding=1, groups=128),
            layer(256, 256, padding=1, groups=256),
            squeeze(256, 52),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = Conv2d(52, num_classes, 1)

    @classmethod
    def from_pretrained(cls, name):
        """The network with the weights `weights/<name>.pt`, "s9" or "tuned", in evaluation mode on the CPU.

        The JSON beside them says by which recipe, on which images and with which versions they were trained, and how
        accurate they are.

        Raises:
            ValueError: no weights of that name, or a network that was changed since they were trained.
        """
        names = sorted(path.stem for path in WEIGHTS.glob("*.pt"))
        if name not in names:
            raise ValueError(f"no weights {name!r} in {WEIGHTS}; there is {', '.join(names)}")
        provenance = json.loads((WEIGHTS / f"{name}.json").read_text())
        model = cls(dropout_value=provenance["hyperparameters"]["dropout"])
        try:
            model.load_state_dict(load_weights(WEIGHTS / f"{name}.pt"))
        except RuntimeError:
            raise ValueError(
                f"the weights {name!r} do not fit the network, which was changed after they were trained; train it "
                "anew, and load_state_dict the weights of that run"
            ) from None
        return model.eval()

    def forward(self, x):
        weight = self.classifier.weight
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"Model got a {type(x).__name__}; it takes a tensor of images (N, 3, H, W)")
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_INPUT_SIZE:
            raise ValueError(
                f"Model got a tensor of shape {tuple(x.shape)}; it takes a batch of RGB images (N, 3, H, W) with H and "
                f"W at least {MIN_INPUT_SIZE}, such as the loaders of utils.py yield"
            )
        if x.dtype != weight.dtype or x.device != weight.device:
            raise ValueError(
                f"Model got images in {x.dtype} on {x.device} and has weights in {weight.dtype} on {weight.device}; "
                "bring one to the other, with images.to(...) or model.to(...)"
            )
        x = self.C1(x)
        x = self.C2(x)
        x = self.C3(x)
        x = self.C4(x)
        x = self.classifier(self.pool(x))
        # Under autocast x is half precision, too coarse for a logarithm.
        return F.log_softmax(x.flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class ReceptiveFieldRow:
    """One convolution or pooling layer: its geometry, and in input pixels what one of its outputs sees.

    `name` is its path in the model, `summary_row` its row in the torchsummary table, `size` the side of its output,
    `jump` the distance in input pixels between neighbouring outputs. Both `jump` and `receptive_field` are None from a
    global pooling on, where every output sees the whole image.
    """

    name: str
    summary_row: str
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int
    size: int
    jump: int | None
    receptive_field: int | None


class ReceptiveFieldTable(list):
    """The rows of `receptive_field`, which print as a table."""

    @property
    def total(self):
        """Receptive field in pixels of the last layer before any global pooling."""
        return max((row.receptive_field for row in self if row.receptive_field is not None), default=1)

    def __str__(self):
        header = [field.name.replace("_", " ") for field in fields(ReceptiveFieldRow)]
        lines = [header] + [
            ["all" if value is None else str(value) for value in (getattr(row, f.name) for f in fields(row))]
            for row in self
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths))
            )
            for line in lines
        )


def receptive_field(model, input_size=32):
    """Trace a chain of layers and compute what each output sees.

    One forward pass over zeros finds the convolution and pooling modules in the order in which they run; then, layer by
    layer, r_out = r_in + (k - 1) * d * j_in and j_out = j_in * s (Araujo et al., "Computing Receptive Fields of
    Convolutional Neural Networks", Distill 2019).

    Args:
        model: any `nn.Module` whose forward is a chain of Conv2d, pooling and elementwise modules.
        input_size: side of the square input in pixels.

    Returns:
        A `ReceptiveFieldTable`: a list of `ReceptiveFieldRow`, printable, with the receptive field in `.total`.

    Raises:
        ValueError: the model branches, or holds a module or a step in between that cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"receptive_field got {model!r}; it takes a network, an instance of nn.Module")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no Conv2d; receptive_field traces convolutional networks")
    if isinstance(input_size, bool) or not isinstance(input_size, int) or input_size < 1:
        raise ValueError(f"input_size is {input_size!r}; it must be the side of a square image in pixels, at least 1")

    x = torch.zeros(1, first.in_channels, input_size, input_size, device=first.weight.device, dtype=first.weight.dtype)
    x.requires_grad_()
    calls = []  # (name, module, input shape, output shape) in the order of execution
    names = {module: name for name, module in model.named_modules()}

    def record(module, inputs, output):
        if not isinstance(output, torch.Tensor):
            raise ValueError(f"receptive_field cannot trace {names[module]!r}: it returns a {type(output).__name__}")
        calls.append((names[module] or type(module).__name__, module, inputs[0].shape, output.shape))

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(record) for module in leaves]
    modes = [(module, module.training) for module in model.modules()]
    constants = {name: parameter.detach() for name, parameter in model.named_parameters()}
    try:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            output = torch.func.functional_call(model, constants, (x.clone(),))
    except (RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"receptive_field cannot run the model on an image of {input_size}x{input_size} pixels: {reason}"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"receptive_field cannot trace a model that returns a {type(output).__name__}")
    layers_run = _count_layers_of_chain(output)

    rows = ReceptiveFieldTable()
    size, jump, field = input_size, 1, 1
    for number, (name, module, shape_in, shape_out) in enumerate(calls, start=1):
        side_in = _side(shape_in)
        kernel, stride, padding, dilation, groups = _geometry(name, module, side_in)
        if side_in != size:
            raise ValueError(
                f"receptive_field cannot trace what happens before {name!r}: the side changes from {size} to {side_in} "
                "outside any module; write that step as a module (nn.MaxPool2d, not F.max_pool2d)"
            )
        size = _side(shape_out)
        if kernel is None:
            continue
        if isinstance(module, GLOBAL_POOLING) or jump is None:
            jump = field = None
        else:
            field += (kernel - 1) * dilation * jump
            jump *= stride
        summary_row = f"{type(module).__name__}-{number}"
        rows.append(ReceptiveFieldRow(name, summary_row, kernel, stride, padding, dilation, groups, size, jump, field))
    if layers_run != len(rows):
        raise ValueError(
            f"receptive_field cannot trace a convolution or pooling outside any module, or one that is detached: "
            f"{layers_run} lie between input and output, and {len(rows)} modules ran; write each as a module "
            "(nn.MaxPool2d, not F.max_pool2d), and detach nothing"
        )
    return rows


GLOBAL_POOLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
ELEMENTWISE = (
    nn.Identity,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.dropout._DropoutNd,
)
AFTER_THE_IMAGE = (nn.Flatten, nn.Linear)


def _geometry(name, module, side_in):
    """(kernel, stride, padding, dilation, groups) of a layer; a kernel of None for an elementwise one."""

    def square(attribute):
        value = getattr(module, attribute)
        sides = value if isinstance(value, tuple) else (value, value)
        if sides[0] != sides[1]:
            raise ValueError(f"receptive_field cannot trace {name!r}: its {attribute} {sides} is not square")
        return sides[0]

    if isinstance(module, nn.Conv2d):
        kernel, dilation = square("kernel_size"), square("dilation")
        if isinstance(module.padding, str):  # "same" or "valid"
            padding = dilation * (kernel - 1) // 2 if module.padding == "same" else 0
        else:
            padding = square("padding")
        return kernel, square("stride"), padding, dilation, module.groups
    if isinstance(module, nn.MaxPool2d):
        return square("kernel_size"), square("stride"), square("padding"), square("dilation"), 1
    if isinstance(module, nn.AvgPool2d):
        return square("kernel_size"), square("stride"), square("padding"), 1, 1
    if isinstance(module, GLOBAL_POOLING):
        if module.output_size not in (1, (1, 1)):
            raise ValueError(f"receptive_field cannot trace {name!r}: adaptive pooling to more than one output")
        return side_in, 1, 0, 1, 1
    activation = type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, nn.MultiheadAttention)
    if activation or isinstance(module, ELEMENTWISE + AFTER_THE_IMAGE):
        if isinstance(module, nn.Linear) and side_in > 1:
            raise ValueError(f"receptive_field cannot trace {name!r}: a Linear layer along the rows of an image")
        return None, None, None, None, None
    raise ValueError(
        f"receptive_field cannot trace {name!r}, a {type(module).__name__}: it knows Conv2d, max, average and global "
        "pooling, and elementwise layers (activations, normalisation, dropout)"
    )


def _side(shape):
    """Side of a square image (N, C, H, W); 1 once it is flat."""
    if len(shape) != 4:
        return 1
    if shape[2] != shape[3]:
        raise ValueError(f"receptive_field traces square images; a layer gave shape {tuple(shape)}")
    return shape[3]


def _count_layers_of_chain(output):
    """Walk back from the output to the input through autograd's graph and count the convolutions and poolings.

    Where two ways lead back, the model branches. The parameters took part as constants, so every node of the graph
    lies between the input and the output.
    """
    node, layers_run = output.grad_fn, 0
    while node is not None:
        layers_run += any(kind in node.name() for kind in ("Convolution", "MaxPool", "AvgPool", "Mean"))  # Mean: global
        parents = list({parent for parent, _ in node.next_functions if parent is not None})  # a stack names one twice
        if len(parents) > 1:
            raise ValueError(
                f"receptive_field cannot trace a model that branches ({node.name()} joins {len(parents)} paths); "
                "give it one branch at a time"
            )
        node = parents[0] if parents else None
    return layers_run
