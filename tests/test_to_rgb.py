"""to_rgb: pictures of any mode and size as uint8 (32, 32, 3), against Pillow's own conversions and by hand."""

import io

import numpy as np
import pytest
from PIL import Image
from test_image_sets import picture

import image_sets

GREY = picture(1)[..., 0]
GREY3 = np.stack([GREY] * 3, -1)
BLACK_AND_WHITE = np.where(GREY[..., None] > 127, 255, 0).astype(np.uint8).repeat(3, -1)


def through_png(image):
    image.save(file := io.BytesIO(), "PNG")
    return Image.open(file)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(Image.fromarray(picture(1)), picture(1), id="RGB"),
        pytest.param(Image.fromarray(GREY), GREY3, id="L"),
        pytest.param(Image.fromarray(GREY > 127), BLACK_AND_WHITE, id="1"),
        pytest.param(Image.fromarray(GREY.astype(np.uint16) * 257), GREY3, id="I;16"),
        pytest.param(through_png(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY3, id="16-bit PNG"),
        pytest.param(Image.fromarray(GREY.astype(np.int32) * 257), GREY3, id="I"),
        pytest.param(Image.fromarray(GREY.astype(np.int32)), GREY3, id="I of 8 bits"),
        pytest.param(Image.fromarray((GREY / 255).astype(np.float32)), GREY3, id="F"),
        pytest.param(Image.fromarray(GREY.astype(">u2") * 257), GREY3, id="I;16B"),
        pytest.param(Image.fromarray(picture(1)).quantize(256), None, id="P"),
        pytest.param(Image.fromarray(picture(1)).convert("CMYK"), picture(1), id="CMYK"),
    ],
)
def test_to_rgb_of_each_mode(image, expected):
    if expected is None:
        expected = np.asarray(image.convert("RGB"))
    array = image_sets.to_rgb(image)
    assert array.dtype == np.uint8 and array.shape == (32, 32, 3) and array.flags.writeable
    np.testing.assert_array_equal(array, expected)
    assert image_sets.to_rgb(image, size=8).shape == (8, 8, 3)


def transparent_palette():
    image = Image.new("P", (32, 32), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 16, 32))
    image.info["transparency"] = 0  # the red, right half
    return image


def left_blue_right_clear(mode, blue, clear):
    image = Image.new(mode, (32, 32), clear)
    image.paste(blue, (0, 0, 16, 32))
    return image


@pytest.mark.parametrize(
    ("image", "left"),
    [
        pytest.param(left_blue_right_clear("RGBA", (0, 0, 255, 255), (255, 0, 0, 0)), (0, 0, 255), id="RGBA"),
        pytest.param(left_blue_right_clear("LA", (9, 255), (0, 0)), (9, 9, 9), id="LA"),
        pytest.param(transparent_palette(), (0, 0, 255), id="P"),
        pytest.param(through_png(transparent_palette()), (0, 0, 255), id="P from a PNG"),
    ],
)
def test_to_rgb_puts_transparency_over_white(image, left):
    array = image_sets.to_rgb(image)
    assert (array[:, :16] == left).all() and (array[:, 16:] == 255).all()


def test_to_rgb_half_transparent_is_half_white():
    assert abs(int(image_sets.to_rgb(Image.new("RGBA", (32, 32), (0, 0, 0, 128)))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_to_rgb_averages_when_it_shrinks(mode):
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)  # without antialiasing: all 0 or all 255
    array = image_sets.to_rgb(Image.fromarray(checks).convert(mode))
    assert abs(array.astype(int) - 127).max() <= 3


def test_to_rgb_turns_a_photo_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees clockwise
    Image.fromarray(picture(3)).save(file := io.BytesIO(), "PNG", exif=exif)
    np.testing.assert_array_equal(image_sets.to_rgb(Image.open(file)), np.rot90(picture(3), -1))
