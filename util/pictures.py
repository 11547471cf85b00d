"""Pictures of objects: masks, boxes, classes and scores drawn onto an image, the truth beside what was found."""

import colorsys
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager, ft2font
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from datasets import CocoDataset
from datasets.checks import compressed
from datasets.coco import read_record
from util.distributed import say

FONT = os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
SIDE = 640  # px: small images are enlarged to about this, so that the words fit
SMALL = 256  # px: the same on sheets of many
SCORE = 0.3  # least score of what is drawn
GAP = 8  # px between pictures on a sheet
HEAD = 26  # px for the titles above them


# ---- One image -------------------------------------------------------------------------------------------------------


def draw(
    image: Image.Image, objects: list[dict], names: dict[int, str], score: float = SCORE, side: int = SIDE
) -> Image.Image:
    """The image with masks, boxes, classes and scores of all objects that reach `score`.

    image: RGB, of the size that the objects speak of; objects: COCO results, or annotations, which have no score;
    names: class name by category_id; side: small images are enlarged to about so many px. Of results that differ in
    nothing but the class, which a model gives where it doubts, the best is drawn. Masks lie over one another from large
    to small.
    """
    zoom = max(1, round(side / max(image.size)))
    line = max(2, round(max(image.size) * zoom / 400))
    shown = best_of_each(o for o in objects if o.get("score", 1) >= score)
    runs = [compressed(o["segmentation"], image.height, image.width) for o in shown]
    colors = [color(o["category_id"], names) for o in shown]
    picture = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
    for i in np.argsort([-int(rle.area(code)) for code in runs], kind="stable"):
        _paint(picture, rle.decode(runs[i]), colors[i], zoom, line)
    pen = ImageDraw.Draw(picture)
    for one, rgb in zip(shown, colors):
        x, y, w, h = (zoom * side for side in one["bbox"])
        pen.rectangle((x, y, x + max(w, 1) - 1, y + max(h, 1) - 1), outline=rgb, width=max(1, line // 2))
    _label(pen, picture.size, shown, colors, names, zoom)
    return picture


def best_of_each(results):
    """Of the results of one query, which have one box and one mask, that of the best class."""
    best = {}
    for one in sorted(results, key=lambda o: -o.get("score", 1)):
        same = (one["id"],) if "score" not in one else (*one["bbox"], str(one["segmentation"]["counts"]))
        best.setdefault(same, one)
    return list(best.values())


def color(category_id, names):
    """A bright colour for each class, neighbours far apart."""
    index = sorted(names).index(category_id)
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(index * 0.618 % 1, 0.85, 1))


def _paint(picture, mask, rgb, zoom, line):
    """Tints a mask [H W] of 0 and 1 on a picture, with an outline that shows on every ground."""
    if not mask.any():
        return
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    top = rows[0]
    left = columns[0]
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    if zoom > 1:
        part = part.repeat(zoom, 0).repeat(zoom, 1)
    size = part.shape[::-1]
    coarse = max(1, line // 5)  # of a photo with 4,000 px and more, edges are drawn in steps of so many
    part = part[::coarse, ::coarse]
    inner = _eroded(part, line // coarse)
    inmost = _eroded(inner, 1)
    shade = (1 - (inner ^ inmost))[..., None] * np.array(rgb, np.uint8)  # a black line inside the outline
    opacity = Image.fromarray(102 * inmost + 255 * (part ^ inmost)).resize(size, Image.Resampling.NEAREST)
    shade = Image.fromarray(shade).resize(size, Image.Resampling.NEAREST)
    picture.paste(shade, (int(zoom * left), int(zoom * top)), opacity)


def _eroded(mask, distance):
    """The pixels of a mask [H W] of 0 and 1 that are more than so many rows and columns away from what is outside.

    The minimum over windows of 2 distance + 1 pixels, along one axis after the other; a window is joined from two
    smaller ones, so that a distance of 20 takes six steps.
    """
    for _axis in (0, 1):
        window = np.pad(mask, ((distance, distance), (0, 0)))
        reach = 1
        while reach < 2 * distance + 1:
            step = min(reach, 2 * distance + 1 - reach)
            window = window[:-step] & window[step:]
            reach += step
        mask = window.T
    return mask


def _label(pen, size, shown, colors, names, zoom):
    """Class and score at the upper left corner of every box, or where there is room near it."""
    taken = []
    for one, rgb in zip(shown, colors):
        text, path = _written(names[one["category_id"]], one["category_id"])
        font = ImageFont.truetype(path, max(14, max(size) // 60))
        text += f" {one['score']:.2f}" if "score" in one else ""
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        width = right - left + 6
        height = bottom - top + 6
        x = min(max(zoom * one["bbox"][0], 0), max(size[0] - width, 0))
        y = min(max(zoom * one["bbox"][1], 0), max(size[1] - height, 0))
        rows = sorted((y + n * height for n in range(-20, 20)), key=lambda row: abs(row - y))
        free = [row for row in rows if 0 <= row <= size[1] - height and not _covers(taken, x, row, width, height)]
        y = free[0] if free else y
        taken.append((x, y, width, height))
        pen.rectangle((x, y, x + width, y + height), fill=rgb)
        bright = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 120
        pen.text((x + 3 - left, y + 3 - top), text, fill="black" if bright else "white", font=font)


def _covers(taken, x, y, width, height):
    return any(x < a + w and a < x + width and y < b + h and b < y + height for a, b, w, h in taken)


@functools.cache
def _written(name, category_id):
    """A class name and a font that has all its letters. Where no font has them: the id instead, and a line says so."""
    for path in _fonts():
        if set(map(ord, name)) <= _letters(path):
            return name, path
    say(f"pictures show {category_id} for the class {name!r}: no font here has its letters (fonts-noto-cjk may)")
    return str(category_id), FONT


def _fonts():
    """The files of matplotlib's own font, and then of all that are installed, which are looked for only if need be."""
    yield FONT
    yield from sorted(font.fname for font in font_manager.fontManager.ttflist if "LastResort" not in font.fname)


@functools.cache
def _letters(path):
    """The code points that a font has, with those that are never drawn."""
    return {*ft2font.FT2Font(path).get_charmap(), 0x200B, 0x200C, 0x200D, 0xFE0F}


# ---- Sheets of several -----------------------------------------------------------------------------------------------


def sheet(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Pictures in rows of as many as there are titles, which stand above the columns. Rows are as high as need be."""
    columns = len(titles)
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(picture.width for picture in pictures) + GAP
    heights = [max(picture.height for picture in row) + GAP for row in rows]
    canvas = Image.new("RGB", (columns * width - GAP, HEAD + sum(heights) - GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        pen.text((column * width + 4, 3), title, fill="black", font=ImageFont.truetype(FONT, 16))
        for row, line in enumerate(rows):
            if column < len(line):
                canvas.paste(line[column], (column * width, HEAD + sum(heights[:row])))
    return canvas


def draw_dataset(
    dataset: CocoDataset, results: list[dict], indices: list[int], folder: Path, score: float = SCORE
) -> float:
    """Pictures of some images of a data set, the truth beside what was found: each as folder/<image id>.png, and all of
    them, small, as folder/all.png.

    Where nothing in them reaches the score, the best results are drawn, as many as there are objects. Returns the least
    score drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(dataset.category_ids, dataset.classes))
    ids = [dataset.image_ids[index] for index in indices]
    truth, found = (
        {i: [o for o in objects if o["image_id"] == i] for i in ids}
        for objects in (dataset.json["annotations"], results)
    )
    scores = sorted((one["score"] for i in ids for one in best_of_each(found[i])), reverse=True)
    if scores and scores[0] < score:
        score = scores[min(len(scores), max(1, sum(map(len, truth.values())))) - 1]
    small = []
    for i in ids:
        image = read_record(dataset.folder, dataset.images[i])
        pair = [draw(image, truth[i], names), draw(image, found[i], names, score)]
        sheet(pair, ["truth", f"found, score of {score:.2g} or more"]).save(folder / f"{i}.png")
        small += [draw(image, truth[i], names, side=SMALL), draw(image, found[i], names, score, side=SMALL)]
    sheet(small, ["truth", f"found (score {score:.2g} or more)", "truth", "found"]).save(folder / "all.png")
    return score
