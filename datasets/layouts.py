"""Where data sets keep their json and images: COCO, BDD100K, and the folders that labelling tools export.

    Source          where a user's data lie
    find_data       the COCO dict of a split and the folder of its images

What users can mend raises ValueError or FileNotFoundError with a message of one line.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from datasets.checks import name_in
from datasets.shapes import SHAPES, make_shapes

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
    "expected annotations/instances_train*.json and annotations/instances_val*.json with images in folders of the same "
    "names (train*, val*), in images/ or where the names lead; or {train,valid}/_annotations.coco.json beside the "
    "images, as Roboflow exports; or annotations/instances_default.json of CVAT or result.json of Label Studio, with "
    "images/. Other files can be given with --train-json, --val-json and --image-folder"
)
ROBOFLOW = {"train": ("train",), "val": ("valid", "val", "test")}  # its folders
HELD_OUT = 10  # of a single json, one image of so many is for validation


@dataclass(frozen=True)
class Source:
    """Where the data of a run lie. Plain types alone, so that checkpoints can hold it (`dataclasses.asdict`)."""

    data: str  # "shapes", "shapes-full", "coco", "bdd100k" or a folder
    root: str = "data"  # the folder of the named ones
    train_json: str | None = None  # files given outright, in place of `data`
    val_json: str | None = None
    image_folder: str | None = None  # in place of the usual ones around a json


class Found(NamedTuple):
    """A COCO dict, the folder in which its file names are found, and the one json that both splits share, if so."""

    coco: dict
    images: Path
    shared: Path | None = None


def find_data(source: Source, split: str) -> Found:
    """The data of a split, "train" or "val". Raises FileNotFoundError with the layout that is expected."""
    images = Path(source.image_folder) if source.image_folder else None
    if source.train_json or source.val_json:
        return _read_files(source, split, images)
    if source.data == "bdd100k":
        if images:
            raise ValueError("bdd100k has its own places for images: leave out --image-folder")
        return read_bdd100k(official(source.root, "bdd100k", "labels"), split)
    if source.data == "coco":
        return find_coco(official(source.root, "coco", "annotations"), split, COCO_LAYOUT, images)
    folder = Path(source.data)
    if source.data in SHAPES:
        folder = Path(source.root) / source.data
        make_shapes(folder, SHAPES[source.data])
    return find_coco(folder, split, FOLDER_LAYOUT, images)


# ---- COCO ------------------------------------------------------------------------------------------------------------


def official(root: str | Path, name: str, content: str) -> Path:
    """root/name, or root where that is the data set itself."""
    root = Path(root)
    return root if (root / content).is_dir() and not (root / name).is_dir() else root / name


def find_coco(folder: Path, split: str, layout: str, image_folder: Path | None = None) -> Found:
    """The data of a split of a folder. Where there is a single json for both splits, they share its images."""
    if path := _json_of(folder, split):
        shared = split == "train" and layout == FOLDER_LAYOUT and not _json_of(folder, "val")
    else:
        names = ("annotations/instances_default.json", "result.json", "_annotations.coco.json")
        single = [folder / name for name in names if (folder / name).is_file()]
        single += [_json_of(folder, "train")] if split == "val" else []
        path, shared = next(filter(None, single), None), True
        if path is None or layout != FOLDER_LAYOUT:
            raise FileNotFoundError(f"no {split} data in {folder}: {layout}")
    coco, images = _read_coco(path, folder, image_folder)
    return Found(_share(coco, split), images, path) if shared else Found(coco, images)


def _json_of(folder, split):
    """The json of a split as COCO, CVAT or Roboflow name it, or None."""
    found = [path for path in folder.glob("annotations/instances_*.json") if path.stem[10:].lower().startswith(split)]
    if len(found) > 1:
        raise ValueError(f"which one is the {split} data: {' or '.join(map(str, sorted(found)))}? Leave one there")
    found += [folder / name / "_annotations.coco.json" for name in ROBOFLOW[split]]
    return next((path for path in found if path.is_file()), None)


def _read_files(source, split, image_folder):
    """The data of a split from files given outright. Without one for validation they share that of training."""
    given = source.val_json if split == "val" and source.val_json else source.train_json
    if given is None:
        raise ValueError("--val-json alone has no training images: add --train-json")
    path = Path(given)
    folder = path.parent.parent if path.parent.name == "annotations" else path.parent
    coco, images = _read_coco(path, folder, image_folder)
    return Found(coco, images) if source.val_json else Found(_share(coco, split), images, path)


def _read_coco(path, folder, images):
    """The COCO dict of a file, and the folder in which most of its file names are found: `images`, or a usual one."""
    coco = _read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise ValueError(f"{path} is no COCO json: it has no list named {key}")
    suffix = path.stem.removeprefix("instances_")
    usual = (folder / suffix, path.parent, folder, folder / "images" / suffix, folder / "images")
    names = [str(image.get("file_name")) for image in coco["images"] if isinstance(image, dict)]
    names = names[:: len(names) // 200 + 1]  # some of them, evenly spaced

    def found(candidate):
        return sum((candidate / name_in(name, candidate)).is_file() for name in names)

    return coco, images or max(usual, key=found)  # the first of the best


def _read_json(path):
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no json: {error}") from None


def _share(coco, split):
    """The images and annotations of a single json that a split takes: every tenth image is held out for validation."""
    images = coco["images"]
    mine = [image for place, image in enumerate(images) if (place % HELD_OUT == 0) == (split == "val")] or images
    kept = {str(image.get("id")) for image in mine if isinstance(image, dict)}
    ours = [a for a in coco["annotations"] if not isinstance(a, dict) or str(a.get("image_id")) in kept]
    return {**coco, "images": mine, "annotations": ours}


# ---- BDD100K ---------------------------------------------------------------------------------------------------------

BDD100K = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")  # ids 1 to 8
BDD100K_ALIASES = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle", "van": "car", "caravan": "car"}
BDD100K_IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}


def read_bdd100k(folder, split):
    """BDD100K's instance segmentation. Crowds and ignored objects become `iscrowd`, as BDD100K's
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
    return Found(coco, images)


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
    except Exception as error:  # see images.read_image
        raise ValueError(f"{path} cannot be read as a bitmask: {error}") from None
    pixels = (blue << 24) + (alpha << 16) + (red << 8) + green
    objects = []
    for value in np.unique(pixels[red > 0]).tolist():
        runs = rle.encode(np.asfortranarray(pixels == value, np.uint8))
        segmentation = {"size": runs["size"], "counts": runs["counts"].decode()}
        objects.append({"category_id": value >> 8 & 255, "iscrowd": int(value & 3 > 0), "segmentation": segmentation})
    return objects
