"""What datasets/geometry.py promises: an image and its objects move together."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from datasets.geometry import AUGMENTATIONS, Geometry, identity, large_scale_jitter, shortest_side

# ---- One description for pixels, polygons and masks ------------------------------------------------------------------


@st.composite
def geometries(draw, height, width, largest=2):
    """Any transposition, flip, whole-number enlargement, crop and padding."""
    transpose, horizontal, vertical = draw(st.tuples(*[st.booleans()] * 3))
    size = (width, height) if transpose else (height, width)
    size = tuple(side * draw(st.integers(1, largest)) for side in size)
    offset = tuple(draw(st.integers(0, side - 1)) for side in size)
    output = tuple(draw(st.integers(1, side + 20)) for side in size)
    return Geometry(size, output, offset, transpose, horizontal, vertical)


@st.composite
def rectangles(draw, height, width):
    """(x0, y0, x1, y1), whole numbers, inside."""
    x0 = draw(st.integers(0, width - 2))
    y0 = draw(st.integers(0, height - 2))
    return x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))


def filled(rectangle, height, width):
    x0, y0, x1, y1 = rectangle
    mask = np.zeros((height, width), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def bitmask(geometry, mask):
    return geometry.bitmask(rle.encode(np.asfortranarray(mask)))


@given(st.data(), st.integers(2, 40), st.integers(2, 40))
@settings(deadline=None, max_examples=200)
def test_polygons_and_bitmasks_of_one_region_stay_one_region(source, height, width):
    x0, y0, x1, y1 = rectangle = source.draw(rectangles(height, width))
    geometry = source.draw(geometries(height, width, largest=4))
    polygon = geometry.polygons([[x0, y0, x1, y0, x1, y1, x0, y1]], height, width)
    assert np.array_equal(polygon, bitmask(geometry, filled(rectangle, height, width)))


@given(st.data(), st.integers(2, 40), st.integers(2, 40))
@settings(deadline=None, max_examples=200)
def test_pixels_move_exactly_as_masks_do(source, height, width):
    mask = filled(source.draw(rectangles(height, width)), height, width)
    geometry = source.draw(geometries(height, width))
    image = geometry.image(Image.fromarray(mask * 255).convert("RGB"))
    # Enlarged twice, a white corner keeps 9/16 of its brightness, 143, above the padding's 128 and what spills, 112.
    assert np.array_equal(np.asarray(image)[..., 0] > 140, bitmask(geometry, mask) == 1)


@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None, max_examples=100)
def test_a_crop_is_a_part_of_the_whole(source, height, width, new_height, new_width):
    random = np.random.default_rng(source.draw(st.integers(0, 99)))
    mask = random.integers(0, 2, (height, width)).astype(np.uint8)
    top, left = source.draw(st.integers(0, new_height - 1)), source.draw(st.integers(0, new_width - 1))
    whole = Geometry((new_height, new_width), (new_height, new_width))
    crop = whole._replace(offset=(top, left), output=(new_height - top, new_width - left))
    assert np.array_equal(bitmask(crop, mask), bitmask(whole, mask)[top:, left:])
    picture = Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
    part, image = (np.asarray(g.image(picture)).astype(int) for g in (crop, whole))
    assert abs(part - image[top:, left:]).max() <= 2  # Pillow resizes in two passes, each rounded to whole grey values


polygons = st.lists(st.tuples(st.floats(0, 30), st.floats(0, 20)), min_size=3, max_size=6)


@given(polygons, st.integers(1, 50), st.integers(1, 50), st.integers(0, 49), st.integers(0, 49))
@settings(deadline=None, max_examples=100)
def test_the_crop_of_a_polygon_is_cut_from_pycocotools_whole_mask(corners, height, width, top, left):
    top, left = min(top, height - 1), min(left, width - 1)
    resized = (np.array(corners) * (width / 30, height / 20)).ravel().tolist()
    whole = rle.decode(rle.merge(rle.frPyObjects([resized], height, width)))
    geometry = Geometry((height, width), (height - top, width - left), (top, left))
    assert np.array_equal(geometry.polygons([np.ravel(corners).tolist()], 20, 30), whole[top:, left:])


def test_a_bitmask_is_read_at_the_centres_of_the_pixels():
    mask = np.tile(np.array([0, 1, 0], np.uint8), (3, 3))
    assert bitmask(Geometry((1, 3), (1, 3)), mask).tolist() == [[1, 1, 1]]
    assert bitmask(Geometry((3, 3), (2, 2), (1, 1), transpose=True), mask).tolist() == [[1, 1], [1, 1]]


def test_an_image_is_resized_bilinearly():
    image = Image.fromarray(np.tile(np.array([0, 255], np.uint8)[None, :, None], (1, 1, 3)))
    assert np.asarray(Geometry((1, 4), (1, 4)).image(image))[0, :, 0].tolist() == [0, 64, 191, 255]


def test_what_lies_beyond_the_image_is_grey_and_in_no_mask():
    geometry = Geometry((60, 80), (64, 100))
    pixels = np.asarray(geometry.image(Image.new("RGB", (80, 60), "white")))
    assert (pixels[60:] == 128).all() and (pixels[:, 80:] == 128).all()
    assert geometry.polygons([[-9, -9, 99, -9, 99, 99, -9, 99]], 60, 80).sum() == 60 * 80


# ---- Testing and training --------------------------------------------------------------------------------------------


SIZES = {  # of originals and of what the network gets
    (640, 480): (1067, 800),
    (480, 640): (800, 1067),
    (2000, 1000): (1333, 667),
    (50, 5000): (13, 1333),
    (1, 5000): (1, 1333),
    (5000, 1): (1333, 1),
}


@pytest.mark.parametrize(("original", "resized"), SIZES.items())
def test_evaluation_resizes_to_a_shortest_side_of_800_and_at_most_1333(original, resized):
    assert shortest_side(800, 1333)(None, *original) == Geometry(resized[::-1], resized[::-1])


@given(st.sampled_from(sorted(AUGMENTATIONS)), st.integers(0, 2**32), st.integers(1, 3000), st.integers(1, 3000))
@settings(deadline=None, max_examples=50)
def test_every_augmentation_gives_a_square_that_shows_the_image(name, seed, width, height):
    geometry = AUGMENTATIONS[name](96, np.random.default_rng(seed), width, height)
    assert geometry.output == (96, 96)
    for start, length in zip(geometry.offset, geometry.size, strict=True):
        assert length >= 1 and 0 <= start <= max(0, length - 96)
    assert name == "jitter" or max(geometry.size) == 96


def test_jitter_scales_from_a_tenth_to_double_and_flips_half_the_images():
    drawn = [large_scale_jitter(1024, np.random.default_rng(seed), 640, 480) for seed in range(2000)]
    scales = [max(geometry.size) / 1024 for geometry in drawn]
    assert 0.1 <= min(scales) < 0.12 and 1.98 < max(scales) <= 2.0
    # 2,000 coins fall within five standard deviations, 112, of one half.
    assert abs(sum(geometry.horizontal_flip for geometry in drawn) - 1000) < 112


def test_a_jittered_crop_starts_anywhere_in_the_image_up_to_its_last_place():
    drawn = [large_scale_jitter(8, np.random.default_rng(seed), 10, 10) for seed in range(3000)]
    for size in range(1, 16):
        starts = {geometry.offset for geometry in drawn if geometry.size[0] == size}
        places = set(range(max(size - 8, 0) + 1))
        assert {y for y, _ in starts} == {x for _, x in starts} == places


def test_flips_and_transposes_turn_an_image_in_eight_ways_equally_often():
    drawn = [AUGMENTATIONS["flips"](64, np.random.default_rng(seed), 64, 32) for seed in range(4000)]
    ways = Counter((g.transpose, g.horizontal_flip, g.vertical_flip) for g in drawn)
    assert len(ways) == 8 and all(abs(n - 500) < 105 for n in ways.values())  # five standard deviations
    assert all(g.size == ((64, 32) if g.transpose else (32, 64)) for g in drawn)


def test_an_image_that_fits_is_as_large_as_the_square_allows():
    assert AUGMENTATIONS["none"](96, None, 200, 100) == Geometry((48, 96), (96, 96))
    assert AUGMENTATIONS["none"](96, None, 1, 1000) == Geometry((96, 1), (96, 96))
    assert identity(None, 200, 100) == Geometry((100, 200), (100, 200))
