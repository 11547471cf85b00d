"""Data: any folder in COCO format, COCO and BDD100K in their official layouts, and the synthetic images of shapes.py.

    open_dataset, CocoDataset      images and targets; `collate` makes a batch of them
    check                          what is wrong with a data set, before a training run finds out
    read_image, upright_rgb        any image file, or any PIL image, as upright RGB

Boxes of a target are (cx, cy, w, h) in [0, 1] of the network's input, which is the image padded on the right and at the
bottom to a multiple of 32. What users can mend raises ValueError or FileNotFoundError with a message of one line.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as rle
from torch.utils.data import Dataset

from geometry import decode, run_lengths
from shapes import SHAPES, make_shapes

STRIDE = 32  # the network's input is padded to a multiple of this


# ---- Images and objects ----------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Image.Image:
    """The image of a file as upright RGB, whatever its mode and EXIF orientation. ValueError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB with 8 bits a channel, turned as its EXIF orientation says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion would clip to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


def read_record(folder: Path, record: dict) -> Image.Image:
    """The image of a json's record as upright RGB. ValueError if it cannot be read or its size is not as recorded."""
    path = folder / record["file_name"]
    image = read_image(path)
    if image.size != (record["width"], record["height"]):
        raise ValueError(
            f"{path} (image {record['id']}) is {image.width} x {image.height} once upright, "
            f"the json says {record['width']} x {record['height']}"
        )
    return image


def _compressed(segmentation, height, width):
    """Polygons or run lengths of either kind as pycocotools' compressed run-length encoding."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def _mask(segmentation, geometry, height, width):
    if isinstance(segmentation, dict):
        return geometry.bitmask(decode(_compressed(segmentation, height, width)))
    return geometry.polygons(segmentation, height, width)


def _boxes(masks):
    """(x0, y0, x1, y1) in pixels around each mask of [n H W], float32 [n 4]; x1 and y1 lie behind the last pixel."""
    sides = []
    for occupied in (masks.any(1), masks.any(2)):  # columns [n W], then rows [n H]
        sides.append((occupied.argmax(1), occupied.shape[1] - occupied[:, ::-1].argmax(1)))
    (x0, x1), (y0, y1) = sides
    return np.stack((x0, y0, x1, y1), 1).astype(np.float32)


class CocoDataset(Dataset):
    """`dataset[i] -> (image uint8 RGB [3 H W], target)` of a COCO dict, with the target of the module's convention:

    labels int64 [n] in 0..K-1, boxes float32 [n 4], masks bool [n H W] (what `geometry` leaves visible of each object),
    image_id int. Boxes are drawn around what the masks show. Crowds and objects that are not visible are left out.

    geometry(rng, width, height) chooses the Geometry from the size of the upright original. rng depends on nothing but
    `seed`, the attribute `epoch` (set it before each epoch, before workers start) and the image's id.
    training: leave out images on which there is nothing to learn, as the released recipe does.

    classes: names by label. category_ids: the json's category_id by label. image_ids: in the order of the index.
    images: the json's records by image id. json: the COCO dict without annotations that cannot be used, and with
    `iscrowd`, `area` and `bbox` in all others, as evaluation needs them. report: what is wrong with it, see `check`.
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
        if not self.image_ids:
            self.report.fatal["no images" + " with objects" * training].append(f"in {folder}")

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
    """Images [B 3 H W] uint8 and their targets. Raises ValueError if the images differ in size."""
    images, targets = zip(*batch, strict=True)
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"a batch needs images of one size, not {sorted({tuple(i.shape[1:]) for i in images})}")
    return torch.stack(images), list(targets)


def evenly_spaced(count: int, length: int) -> list[int]:
    """At most `count` places at equal distances in range(length), always the same ones."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


# ---- Check -----------------------------------------------------------------------------------------------------------


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
    """All that is wrong with a data set: `fatal` faults must stop a run, those in `warnings` are left out of the data.

    Ids, categories, paths, files, boxes and segmentations are examined when the data set is opened. decode: read every
    image as well, on all cores, which takes a while.
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


def _sound(coco, folder, report):
    """A copy of the COCO dict without what cannot be used, which goes to `report`."""
    categories = _unique(coco["categories"], "category", {"id": int, "name": str}, report)
    images = _unique(coco["images"], "image", {"id": int, "file_name": str, "width": int, "height": int}, report)
    annotations = _unique(coco["annotations"], "annotation", {"id": int, "image_id": int, "category_id": int}, report)
    if 0 in annotations:  # pycocotools takes a match with annotation 0 for no match
        annotations[0] = {**annotations[0], "id": max(annotations) + 1}
    if not categories:
        report.fatal["no categories"].append(f"images in {folder}")
    sound = {image_id for image_id, image in images.items() if _is_sound(image, folder, report)}
    annotations = [_complete(a, images, sound, categories, report) for a in annotations.values()]
    return {
        **coco,
        "categories": list(categories.values()),
        "images": [image for image_id, image in images.items() if image_id in sound],
        "annotations": [annotation for annotation in annotations if annotation],
    }


def _unique(records, kind, fields, report):
    """Records by id, without those that lack a field or have the id of an earlier one."""
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


def _is_sound(image, folder, report):
    name, where = PureWindowsPath(image["file_name"]), f"image {image['id']} ({image['file_name']})"
    if image["id"] < 0 or image["width"] < 1 or image["height"] < 1:
        report.fatal["images with a negative id or without pixels"].append(where)
    elif name.anchor or ".." in name.parts:  # Windows' rules cover all separators and drives
        report.fatal["paths that leave the image folder"].append(where)
    elif not (folder / image["file_name"]).is_file():
        report.fatal[f"files missing in {folder}"].append(where)
    else:
        return True
    return False


def _complete(annotation, images, sound, categories, report):
    """The annotation with all the fields that evaluation needs, or None if it cannot be used."""
    where = f"annotation {annotation['id']}"
    if annotation["category_id"] not in categories:
        report.fatal["category_id not among the categories"].append(f"{where} ({annotation['category_id']})")
        return None
    if annotation["image_id"] not in images:
        report.warnings["annotations of unknown images"].append(f"{where} (image {annotation['image_id']})")
        return None
    if annotation["image_id"] not in sound:
        return None
    height, width = (images[annotation["image_id"]][side] for side in ("height", "width"))
    segmentation, box, area = (annotation.get(key) for key in ("segmentation", "bbox", "area"))
    if isinstance(segmentation, dict):
        usable = segmentation if _fills(segmentation, height, width) else None
    else:
        usable = [p for p in segmentation if _is_polygon(p)] if isinstance(segmentation, list) else None
    if not usable:
        report.warnings["segmentations that cannot be decoded"].append(where)
        return None
    if len(usable) < len(segmentation):
        report.warnings["polygons of less than three points or not finite"].append(where)
    if box is not None and not (isinstance(box, list) and len(box) == 4 and _finite(box) and min(box[2:]) > 0):
        report.warnings["boxes that are not finite and positive"].append(where)
        box = None
    if box is None or not _finite([area]):
        runs = _compressed(usable, height, width)
        box, area = box or rle.toBbox(runs).tolist(), area if _finite([area]) else int(rle.area(runs))
    iscrowd = int(bool(annotation.get("iscrowd")))
    return {**annotation, "iscrowd": iscrowd, "segmentation": usable, "bbox": box, "area": area}


def _is_polygon(polygon):
    """Whether it has three points or more, all at coordinates that a rasteriser can handle."""
    sides = len(polygon) if isinstance(polygon, list) else 0
    return sides >= 6 and sides % 2 == 0 and _finite(polygon) and max(polygon) < 1e5 and min(polygon) > -1e5


def _finite(numbers):
    try:
        return math.isfinite(sum(numbers))
    except TypeError:
        return False


def _fills(segmentation, height, width):
    """Whether a run-length encoding is well formed and covers its image: pycocotools reads beyond the end of others."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return False
    if isinstance(counts, str):
        counts = run_lengths(counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
        return False
    return sum(counts) == height * width


# ---- Data sets -------------------------------------------------------------------------------------------------------

COCO_LAYOUT = (
    "expected annotations/instances_{train,val}2017.json, train2017/*.jpg and val2017/*.jpg there; the publisher "
    "offers them at https://cocodataset.org/#download (train2017.zip, val2017.zip, annotations_trainval2017.zip)"
)
BDD100K_LAYOUT = (
    "expected images/10k/{train,val}/*.jpg and labels/ins_seg/rles/ins_seg_{train,val}.json or "
    "labels/ins_seg/bitmasks/{train,val}/*.png there; the publisher offers them at https://bdd-data.berkeley.edu "
    '("10K Images" and "Instance Segmentation", see https://doc.bdd100k.com/download.html)'
)
FOLDER_LAYOUT = (
    "expected annotations/instances_train*.json and annotations/instances_val*.json, and the images in folders of "
    "the same names (train*, val*) or where the json's file names lead to from there"
)


def open_dataset(
    data: str, root: str | Path, split: str, geometry: Callable, training: bool, seed: int = 0
) -> CocoDataset:
    """The data set `data`: "shapes", "shapes-full", "coco" or "bdd100k" under `root`, or else a folder in COCO layout.

    split: "train" or "val". geometry, training, seed: see CocoDataset. FileNotFoundError says what layout is expected,
    ValueError what is wrong with the json.
    """
    if data == "bdd100k":
        coco, images = _read_bdd100k(_inside(root, "bdd100k", "labels"), split)
    elif data == "coco":
        coco, images = _read_coco(_inside(root, "coco", "annotations"), split, COCO_LAYOUT)
    else:
        folder = Path(root) / data if data in SHAPES else Path(data)
        if data in SHAPES:
            make_shapes(folder, SHAPES[data])
        coco, images = _read_coco(folder, split, FOLDER_LAYOUT)
    return CocoDataset(coco, images, geometry, training, seed)


def _inside(root, name, content):
    """root/name, or root where that is the data set itself."""
    root = Path(root)
    return root if (root / content).is_dir() and not (root / name).is_dir() else root / name


def _read_json(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no json: {error}") from None


def _read_coco(folder, split, layout):
    """The json of a folder in COCO layout, and the folder in which its file names are found."""
    found = sorted(folder.glob(f"annotations/instances_{split}*.json"))
    if not found:
        raise FileNotFoundError(f"no {split} data in {folder}: {layout}")
    if len(found) > 1:
        raise ValueError(f"which one is the {split} data: {' or '.join(map(str, found))}? Leave one there")
    coco = _read_json(found[0])
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise ValueError(f"{found[0]} is no COCO json: it has no list named {key}")
    first = coco["images"][0] if coco["images"] else None
    first = str(first.get("file_name")) if isinstance(first, dict) else ""
    suffix = found[0].stem.removeprefix("instances_")
    candidates = (folder / suffix, folder, folder / "images" / suffix, folder / "images")
    return coco, next((c for c in candidates if (c / first).is_file()), candidates[0])


# ---- BDD100K ---------------------------------------------------------------------------------------------------------

BDD100K = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")  # ids 1 to 8
BDD100K_ALIASES = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle", "van": "car", "caravan": "car"}
BDD100K_IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}


def _read_bdd100k(folder, split):
    """BDD100K's instance segmentation as a COCO dict. Crowds and ignored objects become `iscrowd`, as BDD100K's
    documentation asks: they are not trained on, and detections of them count neither for nor against."""
    images, labels = folder / "images" / "10k" / split, folder / "labels" / "ins_seg"
    rles, bitmasks = labels / "rles" / f"ins_seg_{split}.json", sorted((labels / "bitmasks" / split).glob("*.png"))
    if not images.is_dir() or not (rles.is_file() or bitmasks):
        raise FileNotFoundError(f"no {split} data in {folder}: {BDD100K_LAYOUT}")
    if rles.is_file():
        frames = _read_json(rles)
        try:
            frames = frames["frames"] if isinstance(frames, dict) else frames
            objects = {frame["name"]: _frame_objects(frame.get("labels") or []) for frame in frames}
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{rles} is no json of BDD100K's rles") from None
    else:
        with ProcessPoolExecutor() as pool:
            names = [f"{path.stem}.jpg" for path in bitmasks]
            objects = dict(zip(names, pool.map(_bitmask_objects, bitmasks, chunksize=16), strict=True))
    coco = {"images": [], "annotations": [], "categories": []}
    coco["categories"] = [{"id": number, "name": name} for number, name in enumerate(BDD100K, 1)]
    for image_id, name in enumerate(sorted(objects), 1):
        coco["images"].append({"id": image_id, "file_name": name, "width": 1280, "height": 720})
        for found in objects[name]:
            coco["annotations"].append({"id": len(coco["annotations"]) + 1, "image_id": image_id, **found})
    return coco, images


def _frame_objects(labels):
    """The objects of a frame of the rles json, as annotations without ids."""
    objects = []
    for label in labels:
        name, attributes = label["category"], label.get("attributes") or {}
        crowd = name in BDD100K_IGNORED or attributes.get("crowd") or attributes.get("ignored")
        name = BDD100K_IGNORED.get(name) or BDD100K_ALIASES.get(name, name)
        if name in BDD100K:
            category_id, iscrowd = BDD100K.index(name) + 1, int(bool(crowd))
            objects.append({"category_id": category_id, "iscrowd": iscrowd, "segmentation": label.get("rle")})
    return objects


def _bitmask_objects(path):
    """The objects of a bitmask: red is the category, the last two bits of green mean crowd and ignored, blue and alpha
    are the object's number."""
    try:
        with Image.open(path) as image:
            red, green, blue, alpha = np.moveaxis(np.asarray(image.convert("RGBA")).astype(np.int64), 2, 0)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a bitmask: {error}") from None
    pixels = (blue << 24) + (alpha << 16) + (red << 8) + green
    objects = []
    for value in np.unique(pixels[red > 0]).tolist():
        runs = rle.encode(np.asfortranarray(pixels == value, np.uint8))
        segmentation = {"size": runs["size"], "counts": runs["counts"].decode()}
        objects.append({"category_id": value >> 8 & 255, "iscrowd": int(value & 3 > 0), "segmentation": segmentation})
    return objects
