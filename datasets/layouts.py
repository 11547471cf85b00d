"""Finds the json and the images of a data set: COCO, BDD100K, and the folders that labelling tools export.

    Source          where a user's data lie
    find_data       the COCO dict of a split and the folder of its images

Users' errors raise ValueError or FileNotFoundError with a message of one line.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets.images import FileNames
from datasets.shapes import make_shapes

COCO_LAYOUT = (
    "expected annotations/instances_{train,val}2017.json, train2017/*.jpg and val2017/*.jpg there; the publisher "
    "offers them at https://cocodataset.org/#download (train2017.zip, val2017.zip, annotations_trainval2017.zip)"
)
BDD100K_LAYOUT = (
    "expected images/10k/{train,val}/*.jpg and labels/ins_seg/rles/ins_seg_{train,val}.json there; the publisher "
    'offers them at https://bdd-data.berkeley.edu ("10K Images" and "Instance Segmentation")'
)
FOLDER_LAYOUT = (
    "expected annotations/instances_train*.json and annotations/instances_val*.json with images in folders of the same "
    "names (train*, val*), in images/ or where the names lead; or {train,valid}/_annotations.coco.json beside the "
    "images, as Roboflow exports; or annotations/instances_default.json of CVAT or result.json of Label Studio, with "
    "images/. Other files can be given with --train-json, --val-json and --image-folder"
)
ROBOFLOW = {"train": ("train",), "val": ("valid", "val", "test")}  # its folders
SINGLE = ("annotations/instances_default.json", "result.json", "_annotations.coco.json")  # for both splits


@dataclass(frozen=True)
class Source:
    """Where the data of a run lie, in plain types, as checkpoints store it (`dataclasses.asdict`)."""

    data: str  # "shapes", "coco", "bdd100k" or a folder
    root: str = "data"  # the folder of the named ones
    train_json: str | None = None  # files given outright, in place of `data`
    val_json: str | None = None
    image_folder: str | None = None  # in place of the usual ones around a json


class Found(NamedTuple):
    """A COCO dict, the folder of its images, whether it is for both splits, and what people should know of it."""

    coco: dict
    images: Path
    shared: bool = False
    warnings: Mapping[str, list[str]] = {}


def find_data(source: Source, split: str) -> Found:
    """The data of a split. Raises FileNotFoundError with the layout that is expected.

    split: "train", "val", or "test", 1,000 images of shapes whose first 100 are val. Other data have val in its place.
    """
    root = Path(source.root)
    images = source.image_folder and Path(source.image_folder)
    given = {"train": source.train_json, "val": source.val_json or source.train_json}
    if source.data == "shapes" and not given["val"]:
        make_shapes(root / "shapes", split)
        return _found(root / "shapes" / "annotations" / f"instances_{split}.json", root / "shapes", None)
    split = "train" if split == "train" else "val"
    if given["val"]:
        if not given[split]:
            raise ValueError("--val-json alone has no training images: add --train-json")
        path = Path(given[split])
        folder = path.parent.parent if path.parent.name == "annotations" else path.parent
        return _found(path, folder, images, shared=not source.val_json)
    if source.data == "bdd100k":
        if images:
            raise ValueError("bdd100k has its own places for images: leave out --image-folder")
        return _read_bdd100k(_official(root, "bdd100k", "labels"), split)
    if source.data == "coco":
        return _find_coco(_official(root, "coco", "annotations"), split, images, COCO_LAYOUT)
    return _find_coco(Path(source.data), split, images, FOLDER_LAYOUT)


def _official(root, name, content):
    """root/name, or root where that is the data set itself."""
    return root if (root / content).is_dir() and not (root / name).is_dir() else root / name


# ---- COCO ------------------------------------------------------------------------------------------------------------


def _find_coco(folder, split, images, layout):
    """The data of a split of a folder. A single json, named as one for training or as tools name it, is for both."""
    jsons = _jsons_of(folder, split)
    shared = layout == FOLDER_LAYOUT and not _jsons_of(folder, "val")
    if shared:
        jsons = _jsons_of(folder, "train") or [folder / name for name in SINGLE if (folder / name).is_file()]
    if not jsons:
        raise FileNotFoundError(f"no {split} data in {folder}: {layout}")
    path, *others = sorted(jsons, key=lambda path: not path.stem.endswith("2017"))
    if others and not path.stem.endswith("2017"):
        raise ValueError(f"which one is the {split} data: {' or '.join(map(str, jsons))}? Leave one there")
    return _found(path, folder, images, shared, others)


def _jsons_of(folder, split):
    """The jsons of a split as COCO, CVAT or else Roboflow name them."""
    found = sorted(folder.glob("annotations/instances_*.json"))
    found = [path for path in found if path.stem.removeprefix("instances_").lower().startswith(split)]
    roboflow = [folder / name / "_annotations.coco.json" for name in ROBOFLOW[split]]
    return found or [path for path in roboflow if path.is_file()][:1]


def _found(path, folder, images, shared=False, others=()):
    """The data of a json. folder: of the data set; images: None to look for them in the usual places."""
    coco = _read_coco(path)
    warnings = {}
    if others:
        warnings[f"other years than {path.name}, which is taken"] = [str(other) for other in others]
    if shared:
        warnings["one json for training and validation, so every tenth image is held out for the latter"] = [str(path)]
    return Found(coco, images or _image_folder(coco, path, folder), shared, warnings)


def _read_coco(path):
    coco = _read_json(path)
    if isinstance(coco, dict) and coco.get("annotations") is None:
        coco["annotations"] = []  # a test set
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise ValueError(f"{path} is no COCO json: it has no list named {key}")
    return coco


def _image_folder(coco, path, folder):
    """The usual place around a json, of a data set's folder, in which most of its file names are found."""
    suffix = path.stem.removeprefix("instances_")
    names = [str(image.get("file_name")) for image in coco["images"] if isinstance(image, dict)]
    names = names[:: len(names) // 200 + 1]  # some of them, evenly spaced
    places = (folder / suffix, path.parent, folder, folder / "images" / suffix, folder / "images")
    return max(places, key=lambda place: _count(FileNames(place), names))


def _count(files, names):
    return sum(files.find(name) is not None for name in names)


def _read_json(path):
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no json: {error}") from None


# ---- BDD100K ---------------------------------------------------------------------------------------------------------

BDD100K = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")  # ids 1 to 8
BDD100K_ALIASES = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle", "van": "car", "caravan": "car"}
BDD100K_IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}


def _read_bdd100k(folder, split):
    """BDD100K's instance segmentation. Crowds and ignored objects become `iscrowd`, as BDD100K's documentation asks."""
    images = folder / "images" / "10k" / split
    path = folder / "labels" / "ins_seg" / "rles" / f"ins_seg_{split}.json"
    if not (images.is_dir() and path.is_file()):
        raise FileNotFoundError(f"no {split} data in {folder}: {BDD100K_LAYOUT}")
    frames = _read_json(path)
    coco = {"images": [], "annotations": []}
    coco["categories"] = [{"id": number, "name": name} for number, name in enumerate(BDD100K, 1)]
    try:
        frames = frames["frames"] if isinstance(frames, dict) else frames
        for image_id, frame in enumerate(sorted(frames, key=lambda frame: frame["name"]), 1):
            coco["images"].append({"id": image_id, "file_name": frame["name"], "width": 1280, "height": 720})
            for found in map(_bdd100k_object, frame.get("labels") or []):
                if found:
                    coco["annotations"].append({"id": len(coco["annotations"]) + 1, "image_id": image_id, **found})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not one of BDD100K's jsons of instance segmentation (rles)") from None
    return Found(coco, images)


def _bdd100k_object(label):
    """The annotation of a label, without ids, or None for what instance segmentation does not count."""
    name = label["category"]
    attributes = label.get("attributes") or {}
    crowd = name in BDD100K_IGNORED or attributes.get("crowd") or attributes.get("ignored")
    name = BDD100K_IGNORED.get(name) or BDD100K_ALIASES.get(name, name)
    if name not in BDD100K:
        return None
    return {"category_id": BDD100K.index(name) + 1, "iscrowd": int(bool(crowd)), "segmentation": label.get("rle")}
