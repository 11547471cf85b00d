"""`shapes`: synthetic images in COCO format, made on first use, always the same ones.

Eight classes differ in their outline alone: colours and textures are random. Objects hide each other, and a mask is the
visible part of its object, which may have holes or several pieces. The border cuts some objects, clutter looks like
parts of them, and some images are empty. Each image has its own random numbers, so the order in which images are made
and the number of processes do not matter.
"""

import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

IMAGES = {"train": 4000, "val": 100, "test": 1000}  # of each split; test begins with the images of val
SIDE = 128  # of an image, in pixels
MOST_OBJECTS = 4  # in one image; clutter, drawn alike but without a label, is always less
DIAMETER = (24, 90)  # of an object, from and to, in pixels, log-uniform
TEXTURE = 12  # amplitude in grey values
MIN_VISIBLE = 0.4  # share of an object that later ones must leave visible
SHAPE_IDS = (2, 3, 5, 7, 11, 13, 17, 19)  # category ids with gaps, like COCO's


def _to_polygon(x, y, vertices):
    """Signed distance of points to a polygon, negative inside. Two vertices make a line, which has no inside."""
    inside = np.zeros(x.shape, bool)
    nearest = np.full(x.shape, np.inf)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, 0)):
        dx = bx - ax
        dy = by - ay
        px = x - ax
        py = y - ay
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        nearest = np.minimum(nearest, np.hypot(px - along * dx, py - along * dy))
        if dy:
            inside ^= ((py < 0) != (y < by)) & (px < py * dx / dy)
    return np.where(inside, -nearest, nearest)


def _wheel(*radii):
    """The polygon with vertices at these distances from the origin, at equal angles."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack((np.cos(angles), np.sin(angles)), 1) * np.array(radii)[:, None]


CROSS = np.array(
    [(3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1)]
)
BAR = np.array([(1, 0.22), (-1, 0.22), (-1, -0.22), (1, -0.22)])
OUTLINES = {  # signed distance to the outline of a shape of radius 1, in the order of SHAPE_IDS
    "disk": lambda x, y: np.hypot(x, y) - 1,
    "square": partial(_to_polygon, vertices=_wheel(1, 1, 1, 1)),
    "triangle": partial(_to_polygon, vertices=_wheel(1, 1, 1)),
    "star": partial(_to_polygon, vertices=_wheel(1, 0.42, 1, 0.42, 1, 0.42, 1, 0.42, 1, 0.42)),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.25,
    "cross": partial(_to_polygon, vertices=CROSS / 10**0.5),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.9 - np.hypot(x - 0.55, y)),
    "bar": partial(_to_polygon, vertices=BAR),
}
CLUTTER = {
    "stroke": lambda x, y: _to_polygon(x, y, np.array([(-1, 0), (1, 0)])) - 0.04,
    "arc": lambda x, y: np.maximum(abs(np.hypot(x, y) - 0.9) - 0.05, y),
}


def make_shapes(folder: Path, split: str) -> None:
    """Write a split, "train", "val" or "test", into a COCO folder if its json is not there yet.

    It appears complete or not at all: the json comes last, and images are moved into place together.
    """
    file = folder / "annotations" / f"instances_{split}.json"
    if file.is_file():
        return
    print(f"making {IMAGES[split]:,} synthetic images in {folder / split}", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        images = Path(temporary) / split
        images.mkdir()
        with ProcessPoolExecutor() as pool:
            made = list(pool.map(partial(_make_image, images), range(1, IMAGES[split] + 1), chunksize=16))
        objects = [one for _, annotations in made for one in annotations]
        coco = {
            "images": [record for record, _ in made],
            "annotations": [{"id": number, **one} for number, one in enumerate(objects, 1)],
            "categories": [{"id": number, "name": name} for number, name in zip(SHAPE_IDS, OUTLINES)],
        }
        (Path(temporary) / file.name).write_text(json.dumps(coco))
        try:
            images.rename(folder / split)
        except OSError:
            if not (folder / split).is_dir():  # if it is there, another process was quicker: its images are the same
                raise
        (Path(temporary) / file.name).replace(file)


def _make_image(folder, image_id):
    """Draw one image, write it, and return its records. Its random numbers depend on the split and its id alone."""
    split = "val" if folder.name == "test" else folder.name
    picture, owner, category_ids = _draw(np.random.default_rng((*split.encode(), image_id)))
    record = {"id": image_id, "file_name": f"{image_id:06}.jpg", "width": SIDE, "height": SIDE}
    Image.fromarray(picture).save(folder / record["file_name"], quality=92, subsampling=0)
    annotations = []
    for number, category_id in enumerate(category_ids):
        if category_id:
            runs = rle.encode(np.asfortranarray(owner == number, np.uint8))
            segmentation = {"size": runs["size"], "counts": runs["counts"].decode()}
            annotation = {"image_id": image_id, "category_id": category_id, "iscrowd": 0, "segmentation": segmentation}
            annotations.append({**annotation, "bbox": rle.toBbox(runs).tolist(), "area": int(rle.area(runs))})
    return record, annotations


def _draw(rng):
    """A picture [H W 3], which thing each pixel shows [H W], and the category id of each thing (None: no object)."""
    waves = [Image.fromarray(grid.astype(np.float32)) for grid in rng.normal(0, 0.8, (3, 5, 5))]
    waves = [np.asarray(wave.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for wave in waves]
    colours = [rng.uniform(50, 206, 3)]
    canvas = colours[0] + TEXTURE * np.stack(waves, -1)  # [H W 3]
    owner = np.zeros((SIDE, SIDE), int)
    places = []  # centre and radius of each thing but the background
    category_ids = [None]  # thing 0 is the background
    visible = np.array([owner.size])  # pixels of each thing
    demanded = np.zeros(1)  # pixels of each thing that must stay visible
    objects = 0 if rng.random() < 0.03 else rng.integers(1, MOST_OBJECTS + 1)
    clutter = rng.integers(MOST_OBJECTS)
    for is_object in rng.permutation([True] * objects + [False] * clutter).astype(bool):
        name = rng.choice(list(OUTLINES if is_object else CLUTTER))
        for _attempt in range(8):
            radius = np.exp(rng.uniform(*np.log(DIAMETER))) / 2
            centre = rng.uniform(0, SIDE, 2)
            if places and rng.random() < 0.5:  # onto an earlier thing
                near, reach = places[rng.integers(len(places))]
                centre = near + rng.uniform(-0.7, 0.7, 2) * (radius + reach)
            centre = centre.clip(0.6 * radius, SIDE - 0.6 * radius)  # the border may cut it
            window, x, y = _turned(centre, radius, rng.uniform(0, 2 * np.pi))
            distance = radius * (OUTLINES if is_object else CLUTTER)[name](x, y)
            hidden = np.bincount(owner[window][distance < 0], minlength=len(visible))
            if (visible - hidden >= demanded).all():
                break
        else:
            continue
        owner[window][distance < 0] = len(visible)
        visible = np.append(visible - hidden, hidden.sum())
        demanded = np.append(demanded, MIN_VISIBLE * hidden.sum() * is_object)
        places.append((centre, radius))
        category_ids.append(SHAPE_IDS[list(OUTLINES).index(name)] if is_object else None)
        candidates = rng.uniform(20, 236, (4, 1, 3))  # the colour least like those in use
        colours.append(candidates[np.linalg.norm(candidates - colours, axis=2).min(1).argmax(), 0])
        fill = colours[-1] + TEXTURE * _texture(rng, radius * x, radius * y)
        canvas[window] += np.clip(0.5 - distance, 0, 1)[..., None] * (fill - canvas[window])
    canvas += TEXTURE / 8 * rng.standard_normal(canvas.shape, np.float32)
    return canvas.clip(0, 255).astype(np.uint8), owner, category_ids


def _turned(centre, radius, angle):
    """The window of the image that a shape can touch, and the window's pixel centres in the shape's own coordinates."""
    low = np.floor(centre - radius - 1).clip(0).astype(int)
    high = np.ceil(centre + radius + 1).astype(int)
    window = slice(low[1], min(high[1], SIDE)), slice(low[0], min(high[0], SIDE))
    y, x = np.mgrid[window]
    x = (x + 0.5 - centre[0]) / radius
    y = (y + 0.5 - centre[1]) / radius
    return window, x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _texture(rng, x, y):
    """A tinted plain, wavy, striped or checked texture in -1..1, [h w 3]."""
    angle, phase, period = rng.uniform(0, 2 * np.pi, 2).tolist() + [np.exp(rng.uniform(np.log(6), np.log(40)))]
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    wave = np.cos(2 * np.pi * along / period + phase)
    other = np.cos(2 * np.pi * across / period)
    pattern = (0 * wave, wave, np.sign(wave), np.sign(wave) * np.sign(other))[rng.integers(4)]
    return pattern[..., None] * rng.uniform(-1, 1, 3)
