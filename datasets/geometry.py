"""Transforms of an image and its objects into the network's input: resizing for tests, augmentation for training.

    Geometry                    one description of resize, flips and crop, applied alike to pixels, polygons and masks
    shortest_side, identity     for evaluation
    AUGMENTATIONS               for training, by name

Augmentations and `shortest_side` choose a Geometry from the size of the original: (rng, width, height) -> Geometry.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle

GREY = 128  # fills a training image beyond its edges, as in the released code (which fills test images with the mean)


class Geometry(NamedTuple):
    """Transform of an original image into the network's: transpose, flip, resize, crop, pad, in this order.

    size: (height, width) in pixels of the whole image once transposed and resized; offset: (y, x) where the crop starts
    in it; output: (height, width) of the crop. Where the crop reaches beyond the image, right or bottom, it is grey.
    """

    size: tuple[int, int]
    output: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    transpose: bool = False
    horizontal_flip: bool = False
    vertical_flip: bool = False

    def image(self, image: Image.Image) -> Image.Image:
        """Transforms an RGB image. Only the pixels that the crop needs are resized."""
        if self.transpose:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        if self.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.vertical_flip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        top, left = self.offset
        height, width = self._filled()
        scale_y = image.height / self.size[0]
        scale_x = image.width / self.size[1]
        right = min((left + width) * scale_x, image.width)
        bottom = min((top + height) * scale_y, image.height)
        region = (left * scale_x, top * scale_y, right, bottom)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=region)
        if (height, width) == self.output:
            return image
        canvas = Image.new("RGB", self.output[::-1], (GREY, GREY, GREY))
        canvas.paste(image)
        return canvas

    def polygons(self, polygons: list[list[float]], height: int, width: int) -> np.ndarray:
        """The mask, uint8 [H W], of an object given by polygons [x0, y0, x1, y1, ...] in a height x width image.

        It equals the crop of what pycocotools rasterises in the whole resized image. pycocotools rounds vertices to
        fifths of a pixel, toward zero, as C's cast does. So they are rounded that way before the crop moves them, and
        vertices left of or above the crop are shifted so that the cast does not round them again.
        """
        whole = np.array((height, width) if self.transpose else (width, height), float)
        scale = np.array(self.size[::-1]) / whole
        offset = np.array(self.offset[::-1])
        moved = []
        for polygon in polygons:
            points = np.asarray(polygon, float).reshape(-1, 2)
            points = points[:, ::-1] if self.transpose else points
            points = np.where((self.horizontal_flip, self.vertical_flip), whole - points, points)
            fifths = np.trunc(5 * (points * scale) + 0.5) - 5 * offset
            moved.append((fifths - (fifths < 0)) / 5)
        ends = np.ceil(np.concatenate(moved).max(0)) + 1  # nothing lies beyond
        width, height = np.clip(ends, 1, self._filled()[::-1]).astype(int).tolist()
        encoded = rle.merge(rle.frPyObjects([points.ravel().tolist() for points in moved], height, width))
        x, y, w, h = rle.toBbox(encoded).astype(int)
        output = np.zeros(self.output, np.uint8)
        output[y : y + h, x : x + w] = rle.decode(encoded)[y : y + h, x : x + w]
        return output

    def bitmask(self, encoded: dict) -> np.ndarray:
        """Transforms a mask in run-length encoding into uint8 [H W] by nearest neighbour at the pixels' centres."""
        mask = rle.decode(encoded)
        x, y, w, h = rle.toBbox(encoded).astype(int)
        if self.transpose:
            mask = mask.T
            x, y, w, h = y, x, h, w
        height, width = self._filled()
        rows = ((np.arange(height) + self.offset[0] + 0.5) * (mask.shape[0] / self.size[0])).astype(int)
        columns = ((np.arange(width) + self.offset[1] + 0.5) * (mask.shape[1] / self.size[1])).astype(int)
        rows = mask.shape[0] - 1 - rows if self.vertical_flip else rows
        columns = mask.shape[1] - 1 - columns if self.horizontal_flip else columns
        within_y = np.flatnonzero((rows >= y) & (rows < y + h))
        within_x = np.flatnonzero((columns >= x) & (columns < x + w))
        output = np.zeros(self.output, np.uint8)
        output[np.ix_(within_y, within_x)] = mask[np.ix_(rows[within_y], columns[within_x])]
        return output

    def _filled(self):
        """(height, width) of the part of the output that shows the image."""
        return tuple(min(o, s - start) for o, s, start in zip(self.output, self.size, self.offset))


# ---- For evaluation --------------------------------------------------------------------------------------------------


def identity(rng: np.random.Generator | None, width: int, height: int) -> Geometry:
    """The image as it is."""
    return Geometry((height, width), (height, width))


def shortest_side(shortest: int, longest: int) -> Callable[[np.random.Generator | None, int, int], Geometry]:
    """The whole image with a shortest side of `shortest` px, or smaller so that the longest has at most `longest`."""
    return partial(_shortest_side, shortest, longest)


def _shortest_side(shortest, longest, rng, width, height):
    scale = min(shortest / min(width, height), longest / max(width, height))
    size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    return Geometry(size, size)


# ---- For training ----------------------------------------------------------------------------------------------------


def large_scale_jitter(side: int, rng: np.random.Generator, width: int, height: int) -> Geometry:
    """Flip half of the images, resize to 0.1 to 2.0 of a square of `side` px, crop that square at a random place."""
    scale = rng.uniform(0.1, 2.0) * side / max(width, height)
    size = tuple(max(1, round(length * scale)) for length in (height, width))
    offset = tuple(int(rng.integers(max(length - side, 0) + 1)) for length in size)
    return Geometry(size, (side, side), offset, horizontal_flip=bool(rng.random() < 0.5))


def flips_and_transposes(side: int, rng: np.random.Generator, width: int, height: int) -> Geometry:
    """The image flipped or turned in one of eight ways, at the size that just fits into a square of `side` px."""
    transpose, horizontal, vertical = (bool(coin) for coin in rng.random(3) < 0.5)
    if transpose:
        width, height = height, width
    size = fit(side, rng, width, height).size
    return Geometry(size, (side, side), (0, 0), transpose, horizontal, vertical)


def fit(side: int, rng: np.random.Generator | None, width: int, height: int) -> Geometry:
    """The whole image at the size that just fits into a square of `side` px, grey beyond it."""
    size = tuple(max(1, round(length * side / max(width, height))) for length in (height, width))
    return Geometry(size, (side, side))


AUGMENTATIONS = {"jitter": large_scale_jitter, "flips": flips_and_transposes, "none": fit}
