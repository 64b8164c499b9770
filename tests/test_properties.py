"""The numeric functions on whatever inputs hypothesis thinks of, against a formula or NumPy."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import layers
import utils
from models import receptive_field

convolutions = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 3))


@given(st.lists(convolutions, min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_receptive_field_is_the_formula_on_any_chain(chain):
    modules = [
        nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False) for kernel, stride, padding, dilation in chain
    ]
    rows = receptive_field(nn.Sequential(*modules), input_size=600)
    jumps = np.cumprod([1] + [stride for _, stride, _, _ in chain])
    fields = 1 + np.cumsum([(kernel - 1) * dilation * jump for (kernel, _, _, dilation), jump in zip(chain, jumps)])
    assert [row.receptive_field for row in rows] == fields.tolist() and rows.total == fields[-1]
    assert [row.jump for row in rows] == jumps[1:].tolist()
    sizes, side = [], 600
    for kernel, stride, padding, dilation in chain:
        side = (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        sizes.append(side)
    assert [row.size for row in rows] == sizes


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
@settings(deadline=None, max_examples=60)
def test_pixels_survive_normalisation_and_back(pixels):
    normalised = utils.get_test_transforms()(image=pixels)["image"]
    before = normalised.clone()
    assert np.array_equal(utils.get_image_from_tensor(normalised), pixels)
    assert torch.equal(normalised, before)


@given(hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(deadline=None, max_examples=60)
def test_any_finite_image_is_shown(image):
    pixels = utils.get_image_from_tensor(torch.from_numpy(image))
    assert pixels.dtype == np.uint8 and pixels.shape == (4, 5, 3)
    bright, dark = image.transpose(1, 2, 0) > 10, image.transpose(1, 2, 0) < -10
    assert (pixels[bright] == 255).all() and (pixels[dark] == 0).all()


@given(st.floats(0.001, 0.999), st.integers(0, 2**32), st.lists(st.integers(0, 30), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_dropout_keeps_its_share(p, seed, shape):
    torch.manual_seed(seed)
    output = layers.Dropout(p).train()(torch.ones(shape))
    kept, n = int((output != 0).sum()), math.prod(shape)
    scale = 1 / (1 - p)  # which torch's own dropout, at p from 0.99, rounds differently
    assert output.shape == torch.Size(shape) and torch.all((output == 0) | torch.isclose(output, torch.tensor(scale)))
    spread = math.sqrt(n * p * (1 - p))
    assert abs(kept - n * (1 - p)) <= 6 * spread + 12  # beyond it once in a hundred million draws


@given(hnp.arrays(np.int64, st.integers(0, 40), elements=st.integers(0, 9)), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_correct_count_is_numpys(labels, seed):
    scores = np.random.default_rng(seed).normal(size=(len(labels), 10)).astype(np.float32)
    expected = int((scores.argmax(axis=1) == labels).sum())
    for predictions in (scores, scores.argmax(axis=1), scores.argmax(axis=1, keepdims=True)):
        counted = utils.GetCorrectPredCount(torch.from_numpy(predictions), torch.from_numpy(labels))
        assert counted == expected and isinstance(counted, int)
