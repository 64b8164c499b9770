"""What an output of a network sees of the image: `receptive_field` measures it, `post_receptive_field` shows it."""

import contextlib
import copy
import math
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from devices import unwrap
from output import save_figure, scrolled

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
LAYERS = (*CONVOLUTIONS, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class Row(NamedTuple):
    """A layer, the side of its output, and in input pixels the jump from output to output and how far one sees across.

    The last two are None where there is a single output, or every output sees the whole image.
    """

    name: str
    layer: str
    size: int
    jump: int | None
    receptive_field: int | None


class ReceptiveFieldTable(list):
    """The rows of `receptive_field`, which print as a table; `total` is the largest field of a convolution."""

    total = 1

    def __repr__(self):
        lines = [["name", "layer", "size", "jump", "field"]]
        lines += [["all" if cell is None else str(cell) for cell in row] for row in self]
        name, layer, *_ = (max(map(len, column)) for column in zip(*lines))
        return "\n".join(f"{a:{name}}  {b:{layer}}  {c:>4}  {d:>4}  {e:>5}" for a, b, c, d, e in lines)

    def _repr_html_(self):
        return scrolled(str(self))


@torch.no_grad()
def receptive_field(model, input_size=32):
    """Measure what each output of each convolution and pooling sees of the image.

    Whatever a NaN reaches becomes NaN. A strip is NaN on one side of an edge, then on the other; outputs that are NaN
    both times see both sides. Over the positions of the edge there are (receptive field - 1) / jump of them on average.

    Args:
        model: any network of images; a copy of it runs on the CPU, in evaluation mode. Layers behind a head that takes
            images of one size only are left out. ValueError if none is left, or a step enlarges images or loses NaNs.
        input_size: side of the square input in pixels.

    Returns:
        A `ReceptiveFieldTable`: a `Row` for each layer, in the order of execution.
    """
    # In float64, whose kernels mix no columns that the convolution does not, as the faster ones for float32 do.
    model, outputs = copy.deepcopy(unwrap(model)).cpu().double().eval(), []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            keep = lambda _, __, y, name=name: outputs.append((name, y.isnan().flatten(1, -2).any(dim=1)))  # noqa: E731
            module.register_forward_hook(keep)

    def layers(width, left=None):
        """[(layer, bool (N, columns), where it has NaNs)] of images of zeros, NaN where `left` (N, width) says so."""
        left = torch.zeros(1, width, dtype=torch.bool) if left is None else left
        images = torch.zeros(len(left), _channels(model), input_size, width, dtype=torch.float64)
        outputs.clear()
        with contextlib.nullcontext() if width == input_size else contextlib.suppress(Exception):
            model(images.masked_fill(left[:, None, None], math.nan))
        return [*outputs]

    def both_sides(width, edges):
        """Of each layer, bool (edges, columns), which outputs see both sides of an edge, at so many places."""
        left = torch.arange(width) < width // 2 + torch.arange(edges)[:, None]
        return [nans[:edges] & nans[edges:] for _, nans in layers(width, torch.cat([left, ~left]))]

    def inside(width):
        """Of each layer, whether no output sees from an edge in the middle to the border."""
        return [not both[:, [0, -1]].any() for both in both_sides(width, 1)]

    sizes = [nans.shape[-1] for _, nans in layers(input_size)]
    width, wider, jumps = 2 * input_size, 64, [None]
    if not layers(width):
        raise ValueError(f"no convolution or pooling of {type(model).__name__} takes more than {input_size} pixels")
    for name, nans in layers(width, torch.ones(1, width, dtype=torch.bool)):
        if not nans[:, nans.shape[1] // 2].all():
            raise ValueError(f"receptive_field cannot see through {name}: of an image of NaN, it makes numbers")
    while 2 * max(filter(None, jumps), default=99) ** 2 > wider:  # else a count that is off by one rounds to another
        wider, jumps = 2 * wider, []
        for (name, few), (_, many) in zip(layers(width), layers(width + wider)):
            grown = many.shape[-1] - few.shape[-1]
            if grown > wider:
                raise ValueError(f"receptive_field cannot measure {name}, which has more outputs than pixels")
            jumps.append(round(wider / grown) if grown else None)
    before, measured = [], inside(width)
    while measured != before and not all(measured):  # some layers see all of any width
        width, before, measured = 2 * width, measured, inside(2 * width)
    edges, rows = math.lcm(*filter(None, jumps)), ReceptiveFieldTable()
    for (name, _), size, jump, whole, both in zip(layers(width), sizes, jumps, measured, both_sides(width, edges)):
        layer = model.get_submodule(name)
        field = 1 + math.ceil(int(both.sum()) * jump / edges) if jump and size > 1 and whole else None
        rows.append(Row(name, _described(layer), size, field and jump, field))
        if field and isinstance(layer, CONVOLUTIONS):
            rows.total = max(rows.total, field)
    return rows


def _described(layer):
    """Channels and kernel of a convolution, and what is special in it."""
    if not isinstance(layer, CONVOLUTIONS):
        return type(layer).__name__
    words = [f"{layer.in_channels} -> {layer.out_channels}", "x".join(map(str, layer.kernel_size))]
    words += ["strided"] * (layer.stride[0] > 1) + ["dilated"] * (layer.dilation[0] > 1)
    if layer.groups > 1:
        words.append("depthwise" if layer.groups == layer.in_channels else f"{layer.groups} groups")
    return ", ".join(words)


def _channels(model):
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


def post_receptive_field(model, rows, path=None):
    """What an output sees: the theoretical receptive field layer by layer, and below it the effective one.

    The effective field is the mean absolute gradient of the centre output of the last layer before global pooling with
    respect to the input (Luo et al., NeurIPS 2016), over noise of a size that holds the whole theoretical field.
    `rows` is what `receptive_field(model)` returned.
    """
    model = copy.deepcopy(unwrap(model)).cpu().float().eval()
    rows = [row for row in rows if row.receptive_field is not None]
    last, generator, outputs = rows[-1], torch.Generator().manual_seed(0), []
    side = last.receptive_field + 2 * last.jump + 1
    images = torch.randn(8, _channels(model), side, side, generator=generator).requires_grad_()
    model.get_submodule(last.name).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.enable_grad():
        with contextlib.suppress(RuntimeError):  # of a head that takes images of one size only
            model(images)
        output = outputs[-1]
        centre = output.shape[-1] // 2
        # A random sign for each channel, or the channels would cancel out.
        signs = torch.randint(0, 2, output.shape[1:2], generator=generator).mul(2).sub(1)
        (gradient,) = torch.autograd.grad((output[:, :, centre, centre] * signs).sum(), images)
    field = gradient.abs().mean(dim=(0, 1)).numpy()

    figure, (growth, effective) = plt.subplots(2, 1, figsize=(6.5, 11), layout="constrained")
    bars = growth.barh(range(len(rows)), [row.receptive_field for row in rows], color="tab:blue")
    growth.bar_label(bars, padding=3, fontsize=9)
    growth.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    growth.invert_yaxis()
    growth.set(xlabel="receptive field (pixels)", title="Theoretical receptive field, layer by layer")

    shown = effective.imshow(field / field.max(), cmap="magma")
    figure.colorbar(shown, ax=effective, label="mean absolute gradient (largest = 1)")
    ys, xs = np.nonzero(field)
    left, top, width, height = xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1
    boxes = [(left, top, width, height, "cyan", f"all that it sees, {width}x{height}")]
    if min(width, height) > 32:
        boxes.append((left + (width - 32) / 2, top + (height - 32) / 2, 32, 32, "white", "an image of 32x32 pixels"))
    for x, y, width, height, color, label in boxes:
        effective.add_patch(plt.Rectangle((x - 0.5, y - 0.5), width, height, fill=False, color=color, label=label))
    effective.legend(loc="upper center", ncols=2, fontsize=9, facecolor="dimgray", labelcolor="white")
    theoretical = f"theoretical: {last.receptive_field}x{last.receptive_field}"
    effective.set_title(f"Effective receptive field of the centre output of {last.name}\n{theoretical}")
    effective.set(xlabel="x (pixels)", ylabel="y (pixels)")
    return save_figure(figure, path)
