"""Data in COCO format: images with their masks, boxes and labels.

    open_dataset, CocoDataset       images and targets; `collate` makes a batch of them
    require_sound                   raises or reports what is wrong with a data set
    seen_in_training                validation images that are training images

Boxes of a target are (cx, cy, w, h) in [0, 1] of the network's input, which is the image padded on the right and at the
bottom to a multiple of 32. Users' errors raise ValueError or FileNotFoundError with a message of one line.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha1
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from datasets.checks import Report, compressed, sound
from datasets.geometry import Geometry
from datasets.images import read_image, shortened
from datasets.layouts import Source, find_data

STRIDE = 32  # the network's input is padded to a multiple of this
HELD_OUT = 10  # a single json for both splits gives every tenth image to validation


# ---- Images and objects ----------------------------------------------------------------------------------------------


class CocoDataset(Dataset):
    """`dataset[i] -> (image uint8 RGB [3 H W], target)` of a sound COCO dict, with this target:

    labels int64 [n] in 0..K-1, boxes float32 [n 4], masks bool [n H W] (what `geometry` leaves visible of each object),
    image_id int. Boxes are drawn around what the masks show. Crowds and objects that are not visible are left out.

    geometry(rng, width, height) chooses the Geometry from the size of the upright original. rng depends on nothing but
    `seed`, the attribute `epoch` (set it before each epoch, before workers start) and the image's id.
    training: leave out images on which there is nothing to learn, as the released recipe does.

    classes: names by label. category_ids: the json's category_id by label. image_ids: in the order of the index.
    images: the json's records by image id. json: the COCO dict, as evaluation needs it. annotated: whether it has any
    annotation, so that AP can be measured. report: what is wrong with the data, see `sound`.
    """

    def __init__(self, coco: dict, report: Report, folder: Path, geometry: Callable, training: bool, seed: int = 0):
        self.json = coco
        self.report = report
        self.folder = Path(folder)
        self.geometry = geometry
        self.seed = seed
        self.epoch = 0
        categories = sorted(coco["categories"], key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self.images = {image["id"]: image for image in coco["images"]}
        self.annotated = bool(coco["annotations"])
        self.annotations = {image_id: [] for image_id in self.images}
        for annotation in coco["annotations"]:
            if not annotation["iscrowd"]:
                self.annotations[annotation["image_id"]].append(annotation)
        self.objects = sum(map(len, self.annotations.values()))
        self.image_ids = sorted(i for i in self.images if self.annotations[i] or not training)
        if not self.image_ids:
            self.report.fatal["no images with objects" if training else "no images"].append(f"in {folder}")
        if not self.annotated:
            problem = "no usable annotations: objects can be found, but no AP measured"
            self.report.warnings[problem].append(f"in {folder}")

    def __len__(self):
        return len(self.image_ids)

    def image(self, index: int) -> tuple[torch.Tensor, Geometry]:
        """The image of `dataset[index]`, without the cost of its target, and the Geometry that made it."""
        record = self.images[self.image_ids[index]]
        rng = np.random.default_rng((self.seed, self.epoch, record["id"]))
        geometry = self.geometry(rng, record["width"], record["height"])
        picture = geometry.image(read_record(self.folder, record))
        return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy()), geometry

    def __getitem__(self, index):
        image_id = self.image_ids[index]
        pixels, geometry = self.image(index)
        height = self.images[image_id]["height"]
        width = self.images[image_id]["width"]
        labels = []
        masks = [np.zeros((0, *geometry.output), np.uint8)]
        boxes = []
        for annotation in self.annotations[image_id]:
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, list):
                mask = geometry.polygons(segmentation, height, width)
            else:
                mask = geometry.bitmask(compressed(segmentation, height, width))
            x = np.flatnonzero(mask.any(0))
            y = np.flatnonzero(mask.any(1))
            if len(x):
                labels.append(self.labels[annotation["category_id"]])
                masks.append(mask[None])
                boxes.append((x[0], y[0], x[-1] + 1, y[-1] + 1))
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        height, width = (math.ceil(side / STRIDE) * STRIDE for side in geometry.output)  # padded
        return pixels, {
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": box_convert(boxes, "xyxy", "cxcywh") / torch.tensor([width, height, width, height]),
            "masks": torch.from_numpy(np.concatenate(masks)).view(torch.bool),
            "image_id": image_id,
        }


def read_record(folder: Path, record: dict) -> Image.Image:
    """The image of a json's record as upright RGB. ValueError if it cannot be read or its size is not as recorded."""
    path = folder / record["file_name"]
    image = read_image(path)
    width = record["width"]
    height = record["height"]
    if image.size == (width, height):
        return image
    upright = f"{image.width} x {image.height} once upright"
    said = f"{path} (image {record['id']}) is {upright}, the json has {width} x {height}"
    if image.size == (height, width):
        said += ": if it was labelled lying on its side, take out its EXIF orientation"
    raise ValueError(said)


class Images(Dataset):
    """The images of a data set at some indices, as the network gets them, without their targets."""

    def __init__(self, dataset: CocoDataset, indices: Sequence[int]):
        self.dataset = dataset
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset.image(self.indices[index])[0]


def collate(batch: list) -> tuple[torch.Tensor, list[dict]]:
    """Images [B 3 H W] uint8 and their targets. Raises ValueError if the images differ in size."""
    images, targets = zip(*batch)
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"a batch needs images of one size, not {sorted({tuple(i.shape[1:]) for i in images})}")
    return torch.stack(images), list(targets)


def evenly_spaced(count: int, length: int) -> list[int]:
    """At most `count` evenly spaced indices of range(length)."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


# ---- Data sets -------------------------------------------------------------------------------------------------------


def open_dataset(source: Source, split: str, geometry: Callable, training: bool, seed: int = 0) -> CocoDataset:
    """The data set of a source. split: "train", "val" or "test", see find_data; the other arguments: see CocoDataset.

    Raises FileNotFoundError with the layout that is expected, ValueError for a json that is none. What else is wrong
    stands in the data set's report: see require_sound.
    """
    found = find_data(source, split)
    coco, report = sound(found.coco, found.images)
    report.warnings.update(found.warnings)
    if found.shared:
        images = coco["images"]
        coco["images"] = images[::HELD_OUT]
        if split == "train":
            coco["images"] = [image for index, image in enumerate(images) if index % HELD_OUT] or images
        ids = {image["id"] for image in coco["images"]}
        coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] in ids]
    return CocoDataset(coco, report, found.images, geometry, training, seed)


def require_sound(dataset: CocoDataset, name: str, decode: bool = False) -> str:
    """The warnings of a data set's report, "" if there are none. Raises ValueError with the report if a fault is fatal.

    decode: also decode every image, on all cores.
    """
    report = Report(dict(dataset.report.fatal), dataset.report.warnings)
    if decode:
        with ProcessPoolExecutor() as pool:
            errors = pool.map(_reading_error, repeat(dataset.folder), dataset.images.values(), chunksize=32)
            if unreadable := [error for error in errors if error]:
                report.fatal["images that do not load"] = unreadable
    if report.fatal:
        raise ValueError(f"{name}:\n{report}")
    return f"{name}:\n{report}" if report.warnings else ""


def _reading_error(folder, record):
    try:
        read_record(folder, record)
    except ValueError as error:
        return str(error)


def require_same_classes(ours: list[str], theirs: list[str], who: str, whose: str) -> None:
    """Raises ValueError, which names the differences, unless two lists of class names are equal."""
    if ours == theirs:
        return
    differences = []
    for name, classes, others in ((who, ours, theirs), (whose, theirs, ours)):
        if alone := [one for one in classes if one not in others]:
            differences.append(f"only {name} has {shortened(alone)}")
    said = "; ".join(differences) or "they are the same in another order"
    raise ValueError(f"{who} has other classes ({len(ours)}) than {whose} ({len(theirs)}): {said}")


def seen_in_training(train_set: CocoDataset, val_set: CocoDataset) -> str:
    """A warning that lists validation images whose files equal, byte by byte, those of training images; "" if none."""
    train = _sizes(train_set)
    val = _sizes(val_set)
    common = set(train.values()) & set(val.values())  # few files need to be read
    seen = {_digest(path) for path, size in train.items() if size in common}
    names = [path.name for path, size in val.items() if size in common and _digest(path) in seen]
    return f"warning: validation images that are training images ({len(names):,}): {shortened(names)}" if names else ""


def _sizes(dataset):
    """(width, height, bytes) of each image's file, by its path."""
    records = [dataset.images[image_id] for image_id in dataset.image_ids]
    paths = [dataset.folder / record["file_name"] for record in records]
    return {path: (one["width"], one["height"], path.stat().st_size) for path, one in zip(paths, records)}


def _digest(path):
    return sha1(path.read_bytes()).digest()
