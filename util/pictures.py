"""Pictures of objects: masks, boxes, classes and scores drawn onto an image, the truth beside what was found."""

import colorsys
import functools
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager, ft2font
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle
from scipy.ndimage import minimum_filter

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
    masks = [compressed(o["segmentation"], image.height, image.width) for o in shown]
    colors = [color(o["category_id"], names) for o in shown]
    picture = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
    for i in sorted(range(len(shown)), key=lambda i: -int(rle.area(masks[i]))):
        paint(picture, masks[i], colors[i], zoom, line)
    pen = ImageDraw.Draw(picture)
    for one, rgb in zip(shown, colors):
        x, y, w, h = (zoom * length for length in one["bbox"])
        pen.rectangle((x, y, x + max(w, 1) - 1, y + max(h, 1) - 1), outline=rgb, width=max(1, line // 2))
    taken = np.zeros((picture.height, picture.width), bool)
    for one, rgb in zip(shown, colors):
        label(pen, one, rgb, names, zoom, taken)
    return picture


def best_of_each(results):
    """Of the results of one query, which have one box and one mask, that of the best class."""
    best = {}
    for one in sorted(results, key=lambda o: -o.get("score", 1)):
        same = one.get("id", str((one["bbox"], one["segmentation"])))  # annotations have an id
        best.setdefault(same, one)
    return list(best.values())


def color(category_id, names):
    """A bright colour for each class, neighbours far apart."""
    index = sorted(names).index(category_id)
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(index * 0.618 % 1, 0.85, 1))


def paint(picture, mask, rgb, zoom, line):
    """Tints a mask, in run lengths, on a picture, with an outline that a black line inside shows on every ground."""
    x, y, w, h = rle.toBbox(mask).astype(int).tolist()
    if not w:
        return
    coarse = max(1, line // 5)  # of a photo with 4,000 px and more, edges are drawn in steps of so many
    part = Image.fromarray(rle.decode(mask)[y : y + h, x : x + w])
    part = np.asarray(part.resize((-(-zoom * w // coarse), -(-zoom * h // coarse)), Image.Resampling.NEAREST))
    inner = minimum_filter(part, 2 * (line // coarse) + 1, mode="constant")  # erodes it, also at the image's edge
    inmost = minimum_filter(inner, 3, mode="constant")
    shade = (1 - (inner - inmost))[..., None] * np.array(rgb, np.uint8)
    opacity = 102 * inmost + 255 * (part - inmost)
    whole = zoom * w, zoom * h
    shade, opacity = (Image.fromarray(x).resize(whole, Image.Resampling.NEAREST) for x in (shade, opacity))
    picture.paste(shade, (zoom * x, zoom * y), opacity)


def label(pen, one, rgb, names, zoom, taken):
    """Writes class and score at the upper left corner of an object's box, or where there is room above or below.

    taken: the pixels [H W] of earlier labels.
    """
    text, path = written(names[one["category_id"]], one["category_id"])
    text += f" {one['score']:.2f}" if "score" in one else ""
    height, width = taken.shape
    font = ImageFont.truetype(path, max(14, max(height, width) // 60))
    left, top, right, bottom = map(int, pen.textbbox((0, 0), text, font=font))
    w = right - left + 6
    h = bottom - top + 6
    x = int(np.clip(zoom * one["bbox"][0], 0, max(width - w, 0)))
    y = int(np.clip(zoom * one["bbox"][1], 0, max(height - h, 0)))
    rows = [y + n * h for n in sorted(range(-20, 20), key=abs)]
    free = [row for row in rows if 0 <= row <= height - h and not taken[row : row + h, x : x + w].any()]
    y = free[0] if free else y
    taken[y : y + h, x : x + w] = True
    pen.rectangle((x, y, x + w, y + h), fill=rgb)
    bright = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 120
    pen.text((x + 3 - left, y + 3 - top), text, fill="black" if bright else "white", font=font)


@functools.cache
def written(name, category_id):
    """A class name and a font that has all its letters. Where no font has them: the id instead, and a line says so."""
    installed = sorted(font.fname for font in font_manager.fontManager.ttflist if "LastResort" not in font.fname)
    for path in (FONT, *installed):
        if set(map(ord, name)) <= letters(path):
            return name, path
    say(f"pictures show {category_id} for the class {name!r}: no font here has its letters (fonts-noto-cjk may)")
    return str(category_id), FONT


@functools.cache
def letters(path):
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
    y = HEAD
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            canvas.paste(picture, (column * width, y))
        y += height
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
    image_ids = [dataset.image_ids[index] for index in indices]
    found = defaultdict(list)
    for result in results:
        found[result["image_id"]].append(result)
    scores = sorted((one["score"] for i in image_ids for one in best_of_each(found[i])), reverse=True)
    if scores and scores[0] < score:
        objects = sum(len(dataset.annotations[i]) for i in image_ids)
        score = scores[min(len(scores), max(1, objects)) - 1]
    small = []
    for image_id in image_ids:
        image = read_record(dataset.folder, dataset.images[image_id])
        both = dataset.annotations[image_id], found[image_id]
        pair = [draw(image, objects, names, score) for objects in both]
        sheet(pair, ["truth", f"found, score of {score:.2g} or more"]).save(folder / f"{image_id}.png")
        small += [draw(image, objects, names, score, SMALL) for objects in both]
    sheet(small, ["truth", f"found (score {score:.2g} or more)", "truth", "found"]).save(folder / "all.png")
    return score
