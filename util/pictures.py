"""Pictures of objects: masks, boxes, classes and scores drawn onto an image, the truth beside what was found."""

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from datasets.checks import compressed
from datasets.coco import CocoDataset, read_record

FONT = os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
SIDE = 640  # px: small images are enlarged to about this, so that the words fit
SCORE = 0.3  # least score of what is drawn


def draw(image: Image.Image, objects: list[dict], names: dict[int, str], score: float = SCORE) -> Image.Image:
    """The image with masks, boxes, classes and scores of all objects that reach `score`.

    image: RGB, of the size that the objects speak of; objects: COCO results, or annotations, which have no score;
    names: class name by category_id. Of results that differ in nothing but the class, which a model gives where it
    doubts, the best is drawn. Masks lie over one another from large to small.
    """
    zoom = max(1, round(SIDE / max(image.size)))
    line = max(2, round(max(image.size) * zoom / 400))
    canvas = np.asarray(image).repeat(zoom, 0).repeat(zoom, 1).astype(np.float32)
    shown = best_of_each(o for o in objects if o.get("score", 1) >= score)
    shown.sort(key=lambda o: rle.area(compressed(o["segmentation"], image.height, image.width)), reverse=True)
    colors = [color(o["category_id"], names) for o in shown]
    for one, rgb in zip(shown, colors, strict=True):
        mask = rle.decode(compressed(one["segmentation"], image.height, image.width)).astype(bool)
        if mask.any():
            _paint(canvas, mask, np.array(rgb, np.float32), zoom, line)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for one, rgb in zip(shown, colors, strict=True):
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
    place = sorted(names).index(category_id)
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(place * 0.618 % 1, 0.85, 1))


def _paint(canvas, mask, rgb, zoom, line):
    """Colour a mask [h w] on a canvas [H W 3], which it changes, with an outline that shows on every ground."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
    part = np.pad(mask[top:bottom, left:right].repeat(zoom, 0).repeat(zoom, 1), 1)
    window = canvas[zoom * top : zoom * bottom, zoom * left : zoom * right]
    inner, dark = _eroded(part, line), _eroded(part, line + 1)
    part, inner, dark = (x[1:-1, 1:-1] for x in (part, inner, dark))
    window[part] = 0.6 * window[part] + 0.4 * rgb
    window[part & ~dark] = 0
    window[part & ~inner] = rgb


def _eroded(mask, times):
    for _ in range(times):
        smaller = mask.copy()
        smaller[1:] &= mask[:-1]
        smaller[:-1] &= mask[1:]
        smaller[:, 1:] &= mask[:, :-1]
        smaller[:, :-1] &= mask[:, 1:]
        mask = smaller
    return mask


def _label(pen, size, shown, colors, names, zoom):
    """Class and score at the upper left corner of every box, or where there is room near it."""
    font, taken = ImageFont.truetype(FONT, max(14, max(size) // 60)), []
    for one, rgb in zip(shown, colors, strict=True):
        text = names[one["category_id"]] + (f" {one['score']:.2f}" if "score" in one else "")
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        width, height = right - left + 6, bottom - top + 6
        x = min(max(zoom * one["bbox"][0], 0), max(size[0] - width, 0))
        y = min(max(zoom * one["bbox"][1], 0), max(size[1] - height, 0))
        places = sorted((y + n * height for n in range(-20, 20)), key=lambda place: abs(place - y))
        free = [p for p in places if 0 <= p <= size[1] - height and not _covers(taken, x, p, width, height)]
        y = free[0] if free else y
        taken.append((x, y, width, height))
        pen.rectangle((x, y, x + width, y + height), fill=rgb)
        dark = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 120
        pen.text((x + 3 - left, y + 3 - top), text, fill="black" if dark else "white", font=font)


def _covers(taken, x, y, width, height):
    return any(x < a + w and a < x + width and y < b + h and b < y + height for a, b, w, h in taken)


def beside(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one size side by side, with a title above each."""
    font = ImageFont.truetype(FONT, 16)
    width, height = pictures[0][1].size
    canvas = Image.new("RGB", (len(pictures) * (width + 8) - 8, height + 26), "white")
    pen = ImageDraw.Draw(canvas)
    for place, (title, picture) in enumerate(pictures):
        pen.text((place * (width + 8) + 4, 3), title, fill="black", font=font)
        canvas.paste(picture, (place * (width + 8), 26))
    return canvas


def draw_dataset(
    dataset: CocoDataset, results: list[dict], places: list[int], folder: Path, score: float = SCORE
) -> float:
    """Pictures of the images at the given places of the data set, the truth beside what was found, as
    folder/<image id>.png.

    Where nothing in them reaches the score, the best results are drawn, as many as there are objects. Returns the least
    score drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(dataset.category_ids, dataset.classes, strict=True))
    ids = [dataset.image_ids[place] for place in places]
    found, truth = (
        {i: [o for o in all_ if o["image_id"] == i] for i in ids} for all_ in (results, dataset.json["annotations"])
    )
    scores = sorted((one["score"] for i in ids for one in best_of_each(found[i])), reverse=True)
    if scores and scores[0] < score:
        score = scores[min(len(scores), max(1, sum(map(len, truth.values())))) - 1]
    for i in ids:
        image = read_record(dataset.folder, dataset.images[i])
        shown = [
            ("truth", draw(image, truth[i], names)),
            (f"found, score of {score:.2g} or more", draw(image, found[i], names, score)),
        ]
        beside(shown).save(folder / f"{i}.png")
    return score
