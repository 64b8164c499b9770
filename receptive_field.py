"""What an output of a network sees of the image: `receptive_field` computes it, `post_receptive_field` shows it."""

import itertools
import math
from dataclasses import dataclass, fields

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from layers import evaluation_mode
from output import save_figure
from parallel import unwrap


@dataclass(frozen=True)
class ReceptiveFieldRow:
    """One convolution or pooling: its geometry, and in input pixels what one of its outputs sees.

    `name` is the path of its module in the model and `summary_row` its row in the torchsummary table, both empty if it
    is a function; `size` is the side of its output, `jump` the distance in input pixels between neighbouring outputs.
    `receptive_field` is None where every output sees the whole image, which is from a global pooling on, or from a
    squeeze-and-excitation on; `jump` is None while there is a single output.
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
        """The largest receptive field, in pixels, before any global pooling, such as that of a squeeze-and-excitation.

        An early one makes it small, though every output behind it sees the whole image.
        """
        return max((row.receptive_field for row in self if row.receptive_field is not None), default=1)

    def __str__(self):
        names = [field.name for field in fields(ReceptiveFieldRow)]
        lines = [[name.replace("_", " ") for name in names]]
        lines += [["all" if (v := getattr(row, name)) is None else str(v) for name in names] for row in self]
        widths = [max(map(len, column)) for column in zip(*lines)]
        pads = [str.ljust] * 2 + [str.rjust] * (len(names) - 2)
        return "\n".join("  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths)) for line in lines)


def receptive_field(model, input_size=32):
    """Compute what each output of each convolution and pooling sees, where paths join the largest over them.

    A forward pass over zeros leaves autograd's graph, which is walked from the input: along each path
    r_out = r_in + (k - 1) * d * j_in and j_out = j_in * s (Araujo et al., "Computing Receptive Fields of Convolutional
    Neural Networks", Distill 2019).

    Args:
        model: any network of square 2-D convolutions, poolings and steps that mix no pixels; paths may split and join.
        input_size: side of the square input in pixels.

    Returns:
        A `ReceptiveFieldTable`: a list of `ReceptiveFieldRow` in the order of execution, printable, with the receptive
        field in `.total`.

    Raises:
        ValueError: a step whose effect is not known, such as resizing, slicing or an `autograd.Function`.

    Example:
        >>> receptive_field(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))).total
        8
    """
    model = unwrap(model)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no Conv2d; receptive_field traces convolutional networks")
    calls = {}  # node of the graph: (name of its module, row in the torchsummary table, side of its output)
    names = {module: name for name, module in model.named_modules()}
    containers = (nn.Sequential, nn.ModuleList)  # which have no row in the torchsummary table

    numbers = itertools.count(1)

    def record(module, inputs, output):
        row = f"{type(module).__name__}-{next(numbers)}"
        if isinstance(output, torch.Tensor) and not list(module.children()):
            calls.setdefault(output.grad_fn, (names[module] or type(module).__name__, row, output.shape[-1:]))

    hooks = [m.register_forward_hook(record) for m in model.modules() if not isinstance(m, containers)]
    shape = 1, first.in_channels, input_size, input_size
    try:
        with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(shape, device=first.weight.device, dtype=first.weight.dtype, requires_grad=True)
            # The weights take part as constants, so every node of the graph lies between input and output.
            constants = {name: parameter.detach() for name, parameter in model.named_parameters()}
            output = torch.func.functional_call(model, constants, (x.clone(),))
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, torch.Tensor):
        raise ValueError(
            f"receptive_field traces networks that return a tensor; this returns a {type(output).__name__}"
        )

    layers = {node: _layer(node, calls.get(node)) for node in _in_order(output.grad_fn)}
    for node, (name, summary_row, _) in calls.items():
        if node not in layers and ("Conv" in summary_row or "Pool" in summary_row):
            raise ValueError(
                f"receptive_field cannot trace the output of {name}: it does not reach that of the network, or only "
                "past autograd, as by detach"
            )
    # An average over the whole image is the global pooling, unless what it leaves still goes through kernels.
    averages_last = not any(layer and layer[0] == 1 < layer[1] for layer in layers.values())
    rows = ReceptiveFieldTable()
    seen = {}  # node: (side, jump, receptive field) of its output
    for node, layer in layers.items():
        before = _join([seen[parent] for parent, _ in node.next_functions if parent in seen], node, input_size)
        if layer is None:
            seen[node] = _step(node, before)
            continue
        side_in, kernel, stride, padding, dilation, groups = layer
        side, jump, field = before
        name, summary_row, _ = calls.get(node, ("", "", None))
        if side != side_in:
            raise ValueError(
                f"receptive_field cannot trace what happens before {name or node.name()!r}: the side changes from "
                f"{side} to {side_in} by a step that is neither convolution nor pooling"
            )
        ceil = stride - 1 if getattr(node, "_saved_ceil_mode", False) else 0
        side = (side + 2 * padding - dilation * (kernel - 1) - 1 + ceil) // stride + 1
        kind = node.name()
        may_be_global = "Mean" in kind or "Adaptive" in kind or ("AvgPool" in kind and averages_last)
        if kernel == side_in > side == 1 and may_be_global:
            jump = field = None
        if field is not None:
            field += (kernel - 1) * dilation * jump
        jump = jump and jump * stride
        seen[node] = side, jump, field
        rows.append(ReceptiveFieldRow(name, summary_row, kernel, stride, padding, dilation, groups, side, jump, field))
    return rows


def _in_order(last):
    """The nodes of autograd's graph, each after those that it depends on, in the order of execution."""
    nodes, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    # The leaf, which accumulates the gradient of the input, has the largest number of all.
    return sorted(nodes, key=lambda node: -1 if "AccumulateGrad" in node.name() else node._sequence_nr())


def _join(paths, node, input_size):
    """(side, jump, receptive field) of what goes into a node, where several paths may join."""
    if not paths:
        return input_size, 1, 1
    images = {path[:2] for path in paths if path[1] is not None}
    if len(images) > 1:
        raise ValueError(
            f"receptive_field cannot trace {node.name()}, which joins images of different sizes or strides"
        )
    side, jump = images.pop() if images else paths[0][:2]
    fields = [path[2] for path in paths]
    return side, jump, None if None in fields else max(fields)


# What autograd calls the steps that move pixels about.
MOVING = (
    "Slice Split Upsample Im2Col Col2Im Unfold GridSampler Roll Flip Fft PixelShuffle Index Gather Take Sort Topk Cum "
    "FractionalMaxPool"
).split()


def _step(node, before):
    """(side, jump, receptive field) behind a step that is no layer."""
    name, (side, jump, field) = node.name(), before
    if jump is None or _over_channels(node):
        return before
    if isinstance(node, torch.autograd.function.BackwardCFunction) or "CppNode" in name:
        raise ValueError(f"receptive_field cannot trace {name}, a function with a backward of its own")
    if any(kind in name for kind in MOVING):
        raise ValueError(f"receptive_field cannot trace {name.removesuffix('Backward0')}, which moves pixels about")
    if "Pad" in name:
        pad = node._saved_pad if "Constant" in name else node._saved_padding
        # Autograd keeps a negative padding, which crops, as a number without sign.
        return side + sum(p - 2**64 if p >= 2**63 else p for p in pad[:2]), jump, field
    if any(kind in name for kind in ("Mean", "Sum", "Amax", "MaxBackward", "AdaptiveMax")):
        return 1, None, None  # over the whole image
    if name.endswith(("mmBackward0", "MmBackward0")):  # a matrix product
        constant = any(parent is None for parent, _ in node.next_functions)  # a linear layer, not attention
        rows = math.prod(node._input_metadata[0].shape[:-1])
        if rows == 1 or not constant:
            return 1, None, None  # over the whole image
        if rows != side * side:  # neither over the channels of each pixel
            raise ValueError("receptive_field cannot trace a linear layer along the rows of an image")
    return before


def _over_channels(node):
    """Whether a step slices, averages ... along the channels, which are dimension 1, or -3 (without its sign)."""
    dims = getattr(node, "_saved_dim", ())
    dims = dims if isinstance(dims, tuple) else (dims,)
    return len(dims) == 1 and dims[0] in (0, 1, 2**64 - 3)  # torch 2.6 slices the batch as well


def _layer(node, call):
    """(side before it, kernel, stride, padding, dilation, groups) of a convolution or pooling, else None."""
    name = node.name()
    if "Convolution" in name:
        shape, kernel = node._saved_input.shape, node._saved_weight.shape[2:]
        rest = node._saved_stride, node._saved_padding, node._saved_dilation, (node._saved_groups,)
        if node._saved_transposed:
            raise ValueError("receptive_field cannot trace a transposed convolution")
    elif "MaxPool2D" in name and not ("Adaptive" in name or "Fractional" in name):
        shape, kernel = node._saved_self.shape, node._saved_kernel_size
        rest = node._saved_stride or kernel, node._saved_padding, node._saved_dilation, (1,)
    elif "AvgPool2D" in name and "Adaptive" not in name:
        shape, kernel = node._saved_self.shape, node._saved_kernel_size
        rest = node._saved_stride or kernel, node._saved_padding, (1,), (1,)
    elif call is not None and call[2] == (1,) and ("Mean" in name or "AdaptiveMax" in name):  # how torch pools globally
        shape = node._saved_self_sym_sizes if "Mean" in name else node._saved_self.shape
        kernel, rest = shape[2:], ((1,), (0,), (1,), (1,))
    elif "Adaptive" in name:
        raise ValueError("receptive_field traces adaptive pooling only to one output, as nn.AdaptiveAvgPool2d(1)")
    else:
        return None
    sides = [tuple(shape[2:]), tuple(kernel), *map(tuple, rest)]
    if any(len(set(side)) > 1 for side in sides):
        raise ValueError(
            f"receptive_field traces square images and kernels; {call[0] if call else name} has, of image, kernel, "
            f"stride, padding and dilation, {sides[:5]}"
        )
    return tuple(int(side[0]) for side in sides)


def post_receptive_field(model, rows, images=None, path=None):
    """What an output sees: the theoretical receptive field layer by layer, and beside it the effective one.

    Args:
        model: the network.
        rows: what `receptive_field(model)` returned.
        images: batch (N, 3, H, W) to average over, on the model's device; by default noise of a size that holds the
            whole theoretical field. The effective field is the mean absolute gradient of the centre output of the last
            layer before global pooling with respect to the input (Luo et al., NeurIPS 2016).
        path: file to save the figure to.

    Returns:
        The figure.

    Raises:
        ValueError: rows of another model.
    """
    model = unwrap(model)
    rows = [row for row in rows if row.receptive_field is not None]
    modules = dict(model.named_modules())
    last = next((row for row in reversed(rows) if row.name), None)
    if last is None or last.name not in modules:
        raise ValueError("rows are not of this model; pass what receptive_field(model) returns")
    parameter = next(model.parameters())
    if images is None:
        side = last.receptive_field + 2 * last.jump + 1
        images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    images = images.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    outputs = []
    hook = modules[last.name].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with evaluation_mode(model), torch.enable_grad():
            model(images)
            output = outputs[-1]
            centre = output.shape[-1] // 2
            # A random sign for each channel, or the channels would cancel out.
            signs = torch.randint(0, 2, output.shape[1:2], generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
            (gradient,) = torch.autograd.grad((output[:, :, centre, centre] * signs.to(output)).sum(), images)
    finally:
        hook.remove()
    field = gradient.abs().mean(dim=(0, 1)).cpu().numpy()

    figure, (growth, effective) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    growth.barh(range(len(rows)), [row.receptive_field for row in rows], color="tab:blue")
    growth.set_yticks(range(len(rows)), [f"{row.name}  {row.kernel}x{row.kernel}" for row in rows], fontsize=8)
    for position, row in enumerate(rows):
        growth.text(row.receptive_field + 1, position, row.receptive_field, va="center", fontsize=8)
    growth.invert_yaxis()
    growth.set(xlabel="receptive field (pixels)", title="Theoretical receptive field, layer by layer")

    shown = effective.imshow(field / field.max(), cmap="magma")
    figure.colorbar(shown, ax=effective, label="mean absolute gradient (largest = 1)")
    ys, xs = np.nonzero(field > 1e-5 * field.max())  # a GPU's convolutions leave rounding errors around it
    left, top, width, height = xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1
    boxes = [(left, top, width, height, "cyan", f"all that it sees, {width}x{height}")]
    if min(width, height) > 32:
        boxes.append((left + (width - 32) / 2, top + (height - 32) / 2, 32, 32, "white", "an image of 32x32 pixels"))
    for x, y, width, height, color, label in boxes:
        box = plt.Rectangle((x - 0.5, y - 0.5), width, height, fill=False, color=color, label=label)
        effective.add_patch(box)
    effective.legend(loc="upper center", ncols=2, fontsize=8, facecolor="dimgray", labelcolor="white")
    effective.set(
        xlabel="x (pixels)",
        ylabel="y (pixels)",
        title=f"Effective receptive field of the centre output of {last.name}\n"
        f"theoretical: {last.receptive_field}x{last.receptive_field}",
    )
    return save_figure(figure, path)
