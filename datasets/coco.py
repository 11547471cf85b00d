"""Data: any folder in COCO format, COCO and BDD100K in their official layouts, and the synthetic images of shapes.py.

    open_dataset, CocoDataset      images and targets; `collate` makes a batch of them
    check, require_sound           what is wrong with a data set, before a training run finds out

Boxes of a target are (cx, cy, w, h) in [0, 1] of the network's input, which is the image padded on the right and at the
bottom to a multiple of 32. What users can mend raises ValueError or FileNotFoundError with a message of one line.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.checks import Report, compressed, sound
from datasets.geometry import Geometry, decode
from datasets.images import read_image
from datasets.layouts import Source, find_data

STRIDE = 32  # the network's input is padded to a multiple of this


# ---- Images and objects ----------------------------------------------------------------------------------------------


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


def _mask(segmentation, geometry, height, width):
    if isinstance(segmentation, dict):
        return geometry.bitmask(decode(compressed(segmentation, height, width)))
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
        self.json, self.report = sound(coco, self.folder)
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
        self.objects = sum(map(len, self.annotations.values()))
        self.crowds = len(self.json["annotations"]) - self.objects
        if not self.image_ids:
            why = f" ({self.crowds_in_words()})" if self.crowds else ""
            self.report.fatal["no images" + " with objects" * training].append(f"in {folder}{why}")

    def __len__(self):
        return len(self.image_ids)

    def crowds_in_words(self) -> str:
        """How many objects are crowds, and what that means; an empty string if none is."""
        if not self.crowds:
            return ""
        text = f"{self.crowds:,} of {self.objects + self.crowds:,} objects are crowds (iscrowd: 1): nothing is trained "
        text += "on them, and in AP they count neither for nor against"
        many = self.crowds > self.objects  # in COCO it is one of a hundred
        return text + ". CVAT marks every brush mask so: set iscrowd to 0 if each is one object" * many

    def image(self, index: int) -> tuple[torch.Tensor, Geometry]:
        """An image as `dataset[index]` gives it, without the work of making its target, and what was done to it."""
        record = self.images[self.image_ids[index]]
        rng = np.random.default_rng((self.seed, self.epoch, record["id"]))
        geometry = self.geometry(rng, record["width"], record["height"])
        picture = geometry.image(read_record(self.folder, record))
        return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy()), geometry

    def __getitem__(self, index):
        image_id = self.image_ids[index]
        pixels, geometry = self.image(index)
        height, width = self.images[image_id]["height"], self.images[image_id]["width"]
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


class Images(Dataset):
    """The images at some places of a data set, as the network gets them, without their targets."""

    def __init__(self, dataset: CocoDataset, places: Sequence[int]):
        self.dataset, self.places = dataset, places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        return self.dataset.image(self.places[index])[0]


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


def check(dataset: CocoDataset, decode: bool) -> Report:
    """All that is wrong with a data set: `fatal` faults must stop a run, those in `warnings` are mended or left out.

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


def require_sound(dataset: CocoDataset, name: str, decode: bool = False) -> str:
    """What people should know of a data set before it is used, as lines. ValueError if a fault must stop a run."""
    report = check(dataset, decode)
    if report.fatal:
        raise ValueError(f"{name}:\n{report}")
    return "\n".join([f"{name}:\n{report}"] * bool(report.warnings) + list(filter(None, [dataset.crowds_in_words()])))


def require_same_classes(ours: list[str], theirs: list[str], who: str, whose: str) -> None:
    """ValueError, with those that differ, unless two lists of class names are equal."""
    if ours == theirs:
        return
    alone = [[name for name in a if name not in b] for a, b in ((ours, theirs), (theirs, ours))]
    said = [
        f"only {w} has {', '.join(x[:8])}{', ...' * (len(x) > 8)}"
        for w, x in zip((who, whose), alone, strict=True)
        if x
    ]
    said = said or ["they are the same in another order" if len(ours) == len(theirs) else "some are there twice"]
    raise ValueError(f"{who} has other classes ({len(ours)}) than {whose} ({len(theirs)}): {'; '.join(said)}")


# ---- Data sets -------------------------------------------------------------------------------------------------------


def open_dataset(source: Source, split: str, geometry: Callable, training: bool, seed: int = 0) -> CocoDataset:
    """The data set of a source (see layouts.py). split: "train" or "val". geometry, training, seed: see CocoDataset.

    FileNotFoundError says what layout is expected, ValueError what is wrong with the json.
    """
    found = find_data(source, split)
    dataset = CocoDataset(found.coco, found.images, geometry, training, seed)
    if found.shared:
        problem = "one json for training and validation, so every tenth image is held out for the latter"
        dataset.report.warnings[problem].append(str(found.shared))
    return dataset
