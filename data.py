"""Data: any COCO-format folder, COCO and BDD100K in their official layouts, and `shapes`, synthetic images made on the spot.

    Geometry                       how an original image becomes the network's input, applied alike to pixels and masks
    CocoDataset, open_dataset      images and targets; `collate` makes a batch of them
    check                          what is wrong with a data set, before a training run finds out
    make_shapes                    the synthetic images

Boxes of a target are (cx, cy, w, h) in [0, 1] of the network's input: of the image after padding, on the right and
at the bottom, to a multiple of 32.  User errors are ValueError or FileNotFoundError with a one-line message.
"""

import json
import math
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as rle
from torch.utils.data import Dataset

STRIDE = 32  # the network's input is padded to a multiple of this
GREY = 128  # what lies beyond a training image, as in the released code (which pads test images with the mean instead)


# ---- Geometry: one description for pixels and masks ----------------------------------------------------------------


class Geometry(NamedTuple):
    """How an original image becomes the network's: transpose, flip, resize, crop, pad, in this order.

    size: (height, width) of the whole image once transposed and resized; offset: (y, x) of the crop in it, inside it;
    output: (height, width) of the crop.  Where the crop reaches beyond the image, right or bottom, it is grey.
    """

    size: tuple[int, int]
    output: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    transpose: bool = False
    horizontal_flip: bool = False
    vertical_flip: bool = False

    def image(self, image: Image.Image) -> Image.Image:
        """Transform an RGB image.  Only the pixels that the crop needs are resized."""
        if self.transpose:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        if self.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.vertical_flip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        (top, left), (height, width) = self.offset, self._filled()
        scale_y, scale_x = image.height / self.size[0], image.width / self.size[1]
        right, bottom = min((left + width) * scale_x, image.width), min((top + height) * scale_y, image.height)
        region = (left * scale_x, top * scale_y, right, bottom)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=region)
        if (height, width) == self.output:
            return image
        canvas = Image.new("RGB", self.output[::-1], (GREY, GREY, GREY))
        canvas.paste(image)
        return canvas

    def polygons(self, polygons: list, height: int, width: int) -> np.ndarray:
        """Rasterise [x0, y0, x1, y1, ...] of a height x width image after moving the vertices: uint8 [H W] of the output.

        The result is exactly the crop of what pycocotools rasterises in the resized image.  It works in fifths of a
        pixel and rounds with C's cast, which truncates toward zero; so vertices are rounded that way before the crop
        moves them, and those that land left of or above the crop are placed where the cast gives them back unchanged.
        """
        moved = []
        for polygon in polygons:
            points = np.asarray(polygon, float).reshape(-1, 2)
            if self.transpose:
                points = points[:, ::-1]
            whole = np.array((height, width) if self.transpose else (width, height), float)
            points = np.where((self.horizontal_flip, self.vertical_flip), whole - points, points)
            fifths = np.trunc(5 * (points * (np.array(self.size[::-1]) / whole)) + 0.5) - 5 * np.array(self.offset[::-1])
            moved.append(((fifths - (fifths < 0)) / 5).ravel().tolist())
        return rle.decode(rle.merge(rle.frPyObjects(moved, *self.output)))

    def bitmask(self, mask: np.ndarray) -> np.ndarray:
        """Transform a bitmask [h w]: an output pixel takes the value at its centre, so the mask stays the same region."""
        if self.transpose:
            mask = mask.T
        height, width = self._filled()
        rows = ((np.arange(height) + self.offset[0] + 0.5) * (mask.shape[0] / self.size[0])).astype(int)
        columns = ((np.arange(width) + self.offset[1] + 0.5) * (mask.shape[1] / self.size[1])).astype(int)
        rows = mask.shape[0] - 1 - rows if self.vertical_flip else rows
        columns = mask.shape[1] - 1 - columns if self.horizontal_flip else columns
        output = np.zeros(self.output, np.uint8)
        output[:height, :width] = mask[rows[:, None], columns]
        return output

    def _filled(self) -> tuple[int, int]:
        """(height, width) of the part of the output that shows the image."""
        return tuple(min(o, s - start) for o, s, start in zip(self.output, self.size, self.offset, strict=True))


def identity(rng: np.random.Generator, width: int, height: int) -> Geometry:
    """The image as it is."""
    return Geometry((height, width), (height, width))


def shortest_side(shortest: int, longest: int) -> Callable[[np.random.Generator, int, int], Geometry]:
    """Evaluation: resize, keeping the aspect, to a shortest side of `shortest` or as far as `longest` lets it grow."""
    return partial(_shortest_side, shortest, longest)


def _shortest_side(shortest, longest, rng, width, height):
    scale = min(shortest / min(width, height), longest / max(width, height))
    size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    return Geometry(size, size)


# ---- Images and objects ----------------------------------------------------------------------------------------------


def read_image(path: Path) -> Image.Image:
    """The image as upright RGB, whatever its mode and EXIF orientation.  ValueError where it cannot be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion would clip to white
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def read_record(folder: Path, record: dict) -> Image.Image:
    """The image of a json's record, upright RGB.  ValueError where it is unreadable or not of the size in the record."""
    path = folder / record["file_name"]
    image = read_image(path)
    if image.size != (record["width"], record["height"]):
        raise ValueError(
            f"{path} (image {record['id']}) is {image.width} x {image.height} once upright, "
            f"the json says {record['width']} x {record['height']}"
        )
    return image


def _compressed(segmentation: list | dict, height: int, width: int) -> dict:
    """Polygons or run lengths of either kind as pycocotools' compressed run-length encoding."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def _mask(segmentation: list | dict, geometry: Geometry, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, dict):
        return geometry.bitmask(rle.decode(_compressed(segmentation, height, width)))
    return geometry.polygons(segmentation, height, width)


def _boxes(masks: np.ndarray) -> np.ndarray:
    """(x0, y0, x1, y1) in pixels around each mask of [n H W], float32 [n 4]; x1 and y1 lie behind the last pixel."""
    sides = []
    for occupied in (masks.any(1), masks.any(2)):  # columns [n W], then rows [n H]
        sides.append((occupied.argmax(1), occupied.shape[1] - occupied[:, ::-1].argmax(1)))
    (x0, x1), (y0, y1) = sides
    return np.stack((x0, y0, x1, y1), 1).astype(np.float32)


class CocoDataset(Dataset):
    """`dataset[i] -> (image uint8 RGB [3 H W], target)` of a COCO dict, with the target of the module's convention:

    labels int64 [n] in 0..K-1, boxes float32 [n 4], masks bool [n H W] (what `geometry` leaves visible of each object;
    boxes are drawn around them), image_id int.  Crowds and objects of which nothing is visible are in no target.

    geometry(rng, width, height) of the upright original chooses the Geometry; its random stream depends on `seed`, the
    attribute `epoch` (set it before each epoch, before workers start) and the image's id alone.
    training: leave out images on which there is nothing to learn, as the released recipe does.

    classes: names by label.  category_ids: the json's category_id by label.  image_ids: in the order of the index.
    images: the json's records by image id.  json: the COCO dict without its unusable annotations; evaluation's ground
    truth, complete with `iscrowd`, `area` and `bbox`.  report: what is wrong with it, see `check`.
    """

    def __init__(self, coco: dict, folder: Path, geometry: Callable, training: bool, seed: int = 0):
        self.folder, self.geometry, self.seed, self.epoch = Path(folder), geometry, seed, 0
        self.report = Report(defaultdict(list), defaultdict(list))
        self.json = _sound(coco, self.folder, self.report)
        categories = sorted(self.json["categories"], key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self.images = {image["id"]: image for image in self.json["images"]}
        self.annotations = {image_id: [] for image_id in self.images}
        for annotation in self.json["annotations"]:
            if not annotation["iscrowd"]:
                self.annotations[annotation["image_id"]].append(annotation)
        self.image_ids = sorted(i for i in self.images if self.annotations[i] or not training)

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        image_id = self.image_ids[index]
        record = self.images[image_id]
        height, width = record["height"], record["width"]
        image = read_record(self.folder, record)
        geometry = self.geometry(np.random.default_rng((self.seed, self.epoch, image_id)), width, height)
        pixels = torch.from_numpy(np.array(geometry.image(image))).permute(2, 0, 1).contiguous()
        labels, masks = [], []
        for annotation in self.annotations[image_id]:
            mask = _mask(annotation["segmentation"], geometry, height, width)
            if mask.any():
                labels.append(self.labels[annotation["category_id"]])
                masks.append(mask)
        masks = np.stack(masks) if masks else np.zeros((0, *geometry.output), np.uint8)
        x0, y0, x1, y1 = _boxes(masks).T
        padded = np.array([math.ceil(side / STRIDE) * STRIDE for side in geometry.output[::-1]] * 2, np.float32)
        boxes = np.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), 1) / padded
        return pixels, {
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": torch.from_numpy(boxes),
            "masks": torch.from_numpy(masks).view(torch.bool),
            "image_id": image_id,
        }


def collate(batch: list) -> tuple[torch.Tensor, list[dict]]:
    """Images [B 3 H W] uint8, which must be of one size, and their targets."""
    images, targets = zip(*batch, strict=True)
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"a batch needs images of one size, not {sorted({tuple(i.shape[1:]) for i in images})}")
    return torch.stack(images), list(targets)


# ---- Check -------------------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What is wrong with a data set: for each kind of problem, every place where it was found."""

    fatal: dict[str, list[str]]
    warnings: dict[str, list[str]]

    def __str__(self):
        lines = []
        for severity, problems in (("error", self.fatal), ("warning", self.warnings)):
            for problem, places in problems.items():
                more = f" and {len(places) - 5:,} more" if len(places) > 5 else ""
                lines.append(f"{severity}: {problem} ({len(places):,}): {', '.join(places[:5])}{more}")
        return "\n".join(lines)


def check(dataset: CocoDataset, decode: bool) -> Report:
    """All that is wrong with a data set.  What is in `fatal` must stop a run; what is in `warnings` is left out of it.

    Ids, categories, paths, files, boxes and segmentations were looked at when the data set was opened;
    decode: also read every image, on all cores, which takes its time.
    """
    fatal = {problem: list(places) for problem, places in dataset.report.fatal.items()}
    if decode:
        with ProcessPoolExecutor() as pool:
            errors = pool.map(_reading_error, repeat(dataset.folder), dataset.images.values(), chunksize=32)
            unreadable = [error for error in errors if error]
        if unreadable:
            fatal["images that do not load"] = unreadable
    return Report(fatal, dict(dataset.report.warnings))


def _reading_error(folder, record):
    try:
        read_record(folder, record)
    except ValueError as error:
        return str(error)


def _sound(coco, folder, report) -> dict:
    """The COCO dict without what cannot be used, which goes to `report`; the dict given stays as it is."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise ValueError(f"this is no COCO json: it has no list named {key}")
    categories = _unique(coco["categories"], "category", {"id": int, "name": str}, report)
    images = _unique(coco["images"], "image", {"id": int, "file_name": str, "width": int, "height": int}, report)
    annotations = _unique(coco["annotations"], "annotation", {"id": int, "image_id": int, "category_id": int}, report)
    for kind, records in (("categories", categories), ("images", images)):
        if not records:
            report.fatal[f"no {kind}"].append(str(folder))
    images = {i: image for i, image in images.items() if _file_is_sound(image, folder, report)}
    sound = (_sound_annotation(a, images, categories, report) for a in annotations.values())
    return {
        **coco,
        "categories": list(categories.values()),
        "images": list(images.values()),
        "annotations": [annotation for annotation in sound if annotation],
    }


def _unique(records, kind, fields, report) -> dict[int, dict]:
    """Records by id, without those that lack a field or share another's id."""
    unique = {}
    for position, record in enumerate(records):
        wrong = [k for k, t in fields.items() if not isinstance(record, dict) or not isinstance(record.get(k), t)]
        if wrong:
            report.fatal[f"{kind} without a usable {wrong[0]}"].append(f"{kind} at position {position}")
        elif record["id"] in unique:
            report.fatal[f"{kind} ids used twice"].append(f"{kind} {record['id']}")
        else:
            unique[record["id"]] = record
    return unique


def _file_is_sound(image, folder, report) -> bool:
    name = PurePosixPath(image["file_name"].replace("\\", "/"))
    where = f"image {image['id']} ({image['file_name']})"
    if image["id"] < 0 or image["width"] < 1 or image["height"] < 1:
        report.fatal["images with a negative id or without pixels"].append(where)
    elif name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        report.fatal["paths that leave the image folder"].append(where)
    elif not (folder / image["file_name"]).is_file():
        report.fatal[f"files missing in {folder}"].append(where)
    else:
        return True
    return False


def _sound_annotation(annotation, images, categories, report) -> dict | None:
    """The annotation with all that evaluation asks for, or None."""
    where = f"annotation {annotation['id']}"
    if annotation["category_id"] not in categories:
        report.fatal["unknown categories"].append(f"{where} (category_id {annotation['category_id']})")
        return None
    image = images.get(annotation["image_id"])
    if image is None:
        report.warnings["annotations of unknown images"].append(f"{where} (image_id {annotation['image_id']})")
        return None
    height, width = image["height"], image["width"]
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        usable = segmentation if _runs_fill(segmentation, height, width) else None
    else:
        usable = [p for p in segmentation if _is_polygon(p)] if isinstance(segmentation, list) else []
    if not usable:
        report.warnings["segmentations that cannot be decoded"].append(where)
        return None
    if len(usable) < len(segmentation):
        report.warnings["polygons that enclose nothing or are malformed"].append(where)
    annotation = {"iscrowd": 0, **annotation, "segmentation": usable}
    box = annotation.get("bbox")
    if box is not None and not (isinstance(box, list) and len(box) == 4 and _finite(box) and min(box[2:]) > 0):
        report.warnings["boxes that are not finite and positive"].append(where)
        box = None
    if box is None or not _finite([annotation.get("area")]):
        runs = _compressed(usable, height, width)
        annotation["bbox"] = rle.toBbox(runs).tolist() if box is None else box
        annotation["area"] = annotation.get("area") or int(rle.area(runs))
    return annotation


def _is_polygon(polygon) -> bool:
    """Three points or more, with coordinates that a rasteriser can work with."""
    sides = len(polygon) if isinstance(polygon, list) else 0
    return sides >= 6 and sides % 2 == 0 and _finite(polygon) and max(polygon) < 1e5 and min(polygon) > -1e5


def _finite(numbers) -> bool:
    try:
        return math.isfinite(sum(numbers))
    except TypeError:
        return False


def _runs_fill(segmentation, height, width) -> bool:
    """Whether a run-length encoding is well formed and fills its image; pycocotools would read beyond a short one."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return False
    if isinstance(counts, str):
        counts = _runs(counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
        return False
    return sum(counts) == height * width


def _runs(counts: str) -> list[int] | None:
    """The runs of a compressed encoding: five bits a character, the sixth says that more follow, from the fourth run on
    as the difference to the last but one.  None where it breaks off.  Source: COCO API, maskApi.c."""
    runs, value, shift = [], 0, 0
    for character in counts.encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16 > 0) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return None if shift else runs


# ---- Data sets -----------------------------------------------------------------------------------------------------------

COCO_LAYOUT = (
    "expected annotations/instances_{train,val}2017.json, train2017/*.jpg and val2017/*.jpg there; the publisher offers "
    "them at https://cocodataset.org/#download (train2017.zip, val2017.zip, annotations_trainval2017.zip)"
)
BDD100K_LAYOUT = (
    "expected images/10k/{train,val}/*.jpg and labels/ins_seg/rles/ins_seg_{train,val}.json or "
    "labels/ins_seg/bitmasks/{train,val}/*.png there; the publisher offers them at https://bdd-data.berkeley.edu "
    '("10K Images" and "Instance Segmentation", see https://doc.bdd100k.com/download.html)'
)
FOLDER_LAYOUT = (
    "expected annotations/instances_train*.json, annotations/instances_val*.json and the images in folders of the same "
    "name (train*, val*) or where the json's file names lead to from there"
)


def open_dataset(data: str, root: str | Path, split: str, geometry: Callable, training: bool, seed: int = 0) -> CocoDataset:
    """The data set `data`: "shapes", "shapes-full", "coco" or "bdd100k" under `root`, or else a folder in COCO layout.

    split: "train" or "val".  FileNotFoundError says what layout is expected, ValueError what is wrong with the json.
    """
    if data in SHAPES:
        folder = Path(root) / data
        make_shapes(folder, SHAPES[data])
        coco, images = _read_coco(folder, split, FOLDER_LAYOUT)
    elif data == "coco":
        coco, images = _read_coco(_inside(root, "coco", "annotations"), split, COCO_LAYOUT)
    elif data == "bdd100k":
        coco, images = _read_bdd100k(_inside(root, "bdd100k", "labels"), split)
    else:
        coco, images = _read_coco(Path(data), split, FOLDER_LAYOUT)
    return CocoDataset(coco, images, geometry, training, seed)


def _inside(root, name, content) -> Path:
    """root/name, or root where that is the data set itself."""
    root = Path(root)
    return root if (root / content).is_dir() and not (root / name).is_dir() else root / name


def _read_json(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no json: {error}") from None


def _read_coco(folder: Path, split: str, layout: str) -> tuple[dict, Path]:
    """The json of a folder in COCO layout and the folder that its file names start from."""
    found = sorted(folder.glob(f"annotations/instances_{split}*.json"))
    if not found:
        raise FileNotFoundError(f"no {split} data in {folder}: {layout}")
    if len(found) > 1:
        raise ValueError(f"which one is the {split} data: {' or '.join(map(str, found))}? Leave one there")
    coco = _read_json(found[0])
    try:
        first = coco["images"][0]["file_name"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{found[0]} is no COCO json with images") from None
    suffix = found[0].stem.removeprefix("instances_")
    candidates = (folder / suffix, folder, folder / "images" / suffix, folder / "images")
    return coco, next((c for c in candidates if (c / str(first)).is_file()), candidates[0])


# ---- BDD100K ---------------------------------------------------------------------------------------------------------------

BDD100K = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")  # ids 1 to 8
BDD100K_ALIASES = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle", "van": "car", "caravan": "car"}
BDD100K_IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}


def _read_bdd100k(folder: Path, split: str) -> tuple[dict, Path]:
    """BDD100K's instance segmentation as a COCO dict.  Crowds and ignored objects become `iscrowd`: neither is trained
    on, and evaluation holds neither against a detection, as its documentation asks."""
    images = folder / "images" / "10k" / split
    frames = folder / "labels" / "ins_seg" / "rles" / f"ins_seg_{split}.json"
    bitmasks = sorted((folder / "labels" / "ins_seg" / "bitmasks" / split).glob("*.png"))
    if not images.is_dir() or not (frames.is_file() or bitmasks):
        raise FileNotFoundError(f"no {split} data in {folder}: {BDD100K_LAYOUT}")
    if frames.is_file():
        frames = _read_json(frames)
        objects = {f["name"]: _frame_objects(f) for f in (frames["frames"] if isinstance(frames, dict) else frames)}
    else:
        with ProcessPoolExecutor() as pool:
            names = [path.stem + ".jpg" for path in bitmasks]
            objects = dict(zip(names, pool.map(_bitmask_objects, bitmasks, chunksize=16), strict=True))
    records, annotations = [], []
    for image_id, name in enumerate(sorted(objects), 1):
        records.append({"id": image_id, "file_name": name, "width": 1280, "height": 720})
        for number, (category_id, iscrowd, runs) in enumerate(objects[name], len(annotations) + 1):
            record = {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": iscrowd}
            annotations.append({**record, "segmentation": runs})
    categories = [{"id": number, "name": name} for number, name in enumerate(BDD100K, 1)]
    return {"images": records, "annotations": annotations, "categories": categories}, images


def _frame_objects(frame) -> list[tuple[int, int, dict]]:
    """(category_id, iscrowd, run-length encoding) of each object in a frame of the rles json."""
    objects = []
    for label in frame.get("labels") or []:
        name, attributes = label["category"], label.get("attributes") or {}
        ignored = name in BDD100K_IGNORED or attributes.get("crowd") or attributes.get("ignored")
        name = BDD100K_IGNORED.get(name) or BDD100K_ALIASES.get(name, name)
        if name in BDD100K and label.get("rle"):
            objects.append((BDD100K.index(name) + 1, int(bool(ignored)), label["rle"]))
    return objects


def _bitmask_objects(path) -> list[tuple[int, int, dict]]:
    """The same from a bitmask: red is the category, green's last two bits are crowd and ignored, blue and alpha the id."""
    with Image.open(path) as image:
        red, green, blue, alpha = np.moveaxis(np.asarray(image.convert("RGBA")).astype(np.int64), 2, 0)
    pixels = (blue << 24) + (alpha << 16) + (red << 8) + green
    objects = []
    for value in np.unique(pixels[red > 0]).tolist():
        runs = rle.encode(np.asfortranarray(pixels == value, np.uint8))
        objects.append((value >> 8 & 255, int(value & 3 > 0), {**runs, "counts": runs["counts"].decode()}))
    return objects


# ---- Shapes: synthetic images in COCO format -----------------------------------------------------------------------------


class Shapes(NamedTuple):
    """What makes a set of synthetic images easy or hard; lengths in pixels."""

    images: dict[str, int]  # of each split
    side: tuple[int, int]  # of an image, from and to
    objects: int  # at most, in one image
    diameter: tuple[int, int]  # of an object, from and to, log-uniform
    clutter: int  # strokes and arcs at most: drawn like objects, labelled as nothing
    texture: float  # of objects, and
    background: float  # of the background: amplitudes in grey values
    noise: float  # standard deviation in grey values
    colours: int  # tries to find a colour unlike those already in the image


SHAPES = {
    "shapes": Shapes({"train": 4000, "val": 100}, (128, 128), 4, (24, 90), 3, 12, 12, 2, 6),
    "shapes-full": Shapes({"train": 4000, "val": 500}, (256, 384), 14, (16, 240), 10, 40, 30, 4, 2),
}
SHAPE_IDS = (2, 3, 5, 7, 11, 13, 17, 19)  # category ids with gaps, like COCO's
MIN_VISIBLE = 0.4  # no object is placed that would hide more of an earlier one


def _to_polygon(x, y, vertices):
    """Signed distance of points to a polygon, negative inside; two vertices make a line, which has no inside."""
    inside, nearest = np.zeros(x.shape, bool), np.full(x.shape, np.inf)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, 0), strict=True):
        dx, dy, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        nearest = np.minimum(nearest, np.hypot(px - along * dx, py - along * dy))
        if dy:
            inside ^= ((py < 0) != (y < by)) & (px < py * dx / dy)
    return np.where(inside, -nearest, nearest)


def _wheel(*radii):
    """The polygon with vertices at these distances from the origin, at equal angles."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack((np.cos(angles), np.sin(angles)), 1) * np.array(radii)[:, None]


CROSS = np.array([(3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1)])
BAR = np.array([(1, 0.22), (-1, 0.22), (-1, -0.22), (1, -0.22)])
OUTLINES = {  # signed distance to the outline of a shape of radius 1, in the order of SHAPE_IDS
    "disk": lambda x, y: np.hypot(x, y) - 1,
    "square": partial(_to_polygon, vertices=_wheel(1, 1, 1, 1)),
    "triangle": partial(_to_polygon, vertices=_wheel(1, 1, 1)),
    "star": partial(_to_polygon, vertices=_wheel(*(1, 0.42) * 5)),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.25,
    "cross": partial(_to_polygon, vertices=CROSS / 10**0.5),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.9 - np.hypot(x - 0.55, y)),
    "bar": partial(_to_polygon, vertices=BAR),
}
CLUTTER = (
    lambda x, y: abs(_to_polygon(x, y, np.array([(-1, 0), (1, 0)]))) - 0.04,
    lambda x, y: np.maximum(abs(np.hypot(x, y) - 0.9) - 0.05, y),
)


def make_shapes(folder: Path, shapes: Shapes) -> None:
    """Write the data set into `folder` unless it is there.  It appears whole or not at all, and is the same everywhere."""
    if folder.is_dir():
        return
    print(f"making {sum(shapes.images.values()):,} synthetic images in {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary) / folder.name
        (whole / "annotations").mkdir(parents=True)
        with ProcessPoolExecutor() as pool:
            for split, count in shapes.images.items():
                (whole / split).mkdir()
                made = list(pool.map(partial(_make_image, shapes, whole / split), range(1, count + 1), chunksize=16))
                annotations = [a for _, objects in made for a in objects]
                for number, annotation in enumerate(annotations, 1):
                    annotation["id"] = number
                categories = [{"id": i, "name": n} for i, n in zip(SHAPE_IDS, OUTLINES, strict=True)]
                coco = {"images": [image for image, _ in made], "annotations": annotations, "categories": categories}
                (whole / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker, and its images are the same
                raise


def _make_image(shapes: Shapes, folder: Path, image_id: int) -> tuple[dict, list[dict]]:
    """Draw one image, write it and return its records.  All that is random comes from the split and the image's id."""
    rng = np.random.default_rng((*folder.name.encode(), image_id))
    height, width = rng.integers(shapes.side[0], shapes.side[1] + 1, 2).tolist()
    waves = [Image.fromarray(grid.astype(np.float32)) for grid in rng.normal(size=(3, 5, 5))]
    waves = [np.asarray(wave.resize((width, height), Image.Resampling.BICUBIC)) for wave in waves]
    colours = [rng.uniform(50, 206, 3)]
    canvas = colours[0] + shapes.background * np.stack(waves, -1)  # [H W 3]
    owner = np.zeros((height, width), int)  # what each pixel shows: 0 the background, then a number for each thing
    places, areas, category_ids = [], [0], [None]  # areas of objects before others hide them, 0 for all else
    objects = 0 if rng.random() < 0.03 else rng.integers(1, shapes.objects + 1)
    things = rng.permutation([True] * objects + [False] * rng.integers(shapes.clutter + 1))
    for is_object in things.astype(bool):
        kind = rng.integers(len(OUTLINES if is_object else CLUTTER))
        outline = (list(OUTLINES.values()) if is_object else CLUTTER)[kind]
        for _attempt in range(8):
            radius = np.exp(rng.uniform(*np.log(shapes.diameter))) / 2
            centre = rng.uniform(0, (width, height))
            if places and rng.random() < 0.5:  # onto an earlier thing
                near, reach = places[rng.integers(len(places))]
                centre = near + rng.uniform(-0.7, 0.7, 2) * (radius + reach)
            centre = centre.clip(0.6 * radius, np.array((width, height)) - 0.6 * radius)
            window, x, y = _turned(centre, radius, rng.uniform(0, 2 * np.pi), height, width)
            distance = radius * outline(x, y)
            after = owner.copy()
            after[window][distance < 0] = len(areas)
            if (np.bincount(after.ravel(), minlength=len(areas))[: len(areas)] >= MIN_VISIBLE * np.array(areas)).all():
                break
        else:
            continue
        owner = after
        places.append((centre, radius))
        areas.append((distance < 0).sum() if is_object else 0)
        category_ids.append(SHAPE_IDS[kind] if is_object else None)
        candidates = rng.uniform(20, 236, (shapes.colours, 1, 3))
        colours.append(candidates[np.linalg.norm(candidates - colours, axis=2).min(1).argmax(), 0])
        fill = colours[-1] + shapes.texture * _texture(rng, radius * x, radius * y)
        canvas[window] += np.clip(0.5 - distance, 0, 1)[..., None] * (fill - canvas[window])
    canvas += shapes.noise * rng.standard_normal(canvas.shape, np.float32)
    record = {"id": image_id, "file_name": f"{image_id:06}.jpg", "width": width, "height": height}
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(folder / record["file_name"], quality=92, subsampling=0)
    annotations = []
    for number, category_id in enumerate(category_ids):
        if category_id:
            runs = rle.encode(np.asfortranarray(owner == number, np.uint8))
            segmentation = {"size": runs["size"], "counts": runs["counts"].decode()}
            annotation = {"image_id": image_id, "category_id": category_id, "iscrowd": 0, "segmentation": segmentation}
            annotations.append({**annotation, "area": int(rle.area(runs)), "bbox": rle.toBbox(runs).tolist()})
    return record, annotations


def _turned(centre, radius, angle, height, width):
    """The window of the image that a shape can touch, and its pixel centres in the shape's own turned coordinates."""
    low = np.floor(centre - radius - 1).clip(0).astype(int)
    high = np.ceil(centre + radius + 1).astype(int)
    window = slice(low[1], min(high[1], height)), slice(low[0], min(high[0], width))
    y, x = np.mgrid[window]
    x, y = (x + 0.5 - centre[0]) / radius, (y + 0.5 - centre[1]) / radius
    return window, x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _texture(rng, x, y):
    """Plain, waves, stripes or a checkerboard, tinted, in -1..1: [h w 3]."""
    angle, phase, period = rng.uniform(0, 2 * np.pi, 2).tolist() + [np.exp(rng.uniform(np.log(6), np.log(40)))]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wave, other = np.cos(2 * np.pi * along / period + phase), np.cos(2 * np.pi * across / period)
    pattern = (0 * wave, wave, np.sign(wave), np.sign(wave) * np.sign(other))[rng.integers(4)]
    return pattern[..., None] * rng.uniform(-1, 1, 3)
