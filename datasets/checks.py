"""Checks and mends the records of a COCO json.

    sound       a copy as training and pycocotools need it
    Report      what was wrong with the original, and where

Whole numbers written as text or floats (3.0, "3") are converted silently. What else is mended or left out is reported.
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from operator import mul
from pathlib import Path, PureWindowsPath

import numpy as np
from pycocotools import mask as rle

from datasets.geometry import run_lengths
from datasets.images import FileNames, shortened

MOST_OBJECTS = 100  # detections of an image that AP counts
NO_MASK = (
    "objects without a mask, which boxes alone cannot train: draw outlines in CVAT, Label Studio or Roboflow, or let "
    "Segment Anything make masks of the boxes"
)
CROWD = (
    "objects that are crowds (iscrowd: 1), not trained on, and in AP neither for nor against; CVAT marks every brush "
    "mask so: set iscrowd to 0 where it is one object"
)


@dataclass
class Report:
    """What is wrong with a data set: for each kind of problem, the records that have it."""

    fatal: dict[str, list[str]] = field(default_factory=partial(defaultdict, list))  # stop a run
    warnings: dict[str, list[str]] = field(default_factory=partial(defaultdict, list))  # mended or left out

    def __str__(self):
        lines = []
        for severity, problems in (("error", self.fatal), ("warning", self.warnings)):
            for problem, records in problems.items():
                lines.append(f"{severity}: {problem} ({len(records):,}): {shortened(records)}")
        return "\n".join(lines)


def sound(coco: dict, folder: Path) -> tuple[dict, Report]:
    """A copy of the COCO dict without what cannot be used, and the report. folder: of the images.

    In the copy ids are whole numbers, class names differ, no two images share a file, and each annotation has a mask
    that is not empty, `iscrowd`, `area` and `bbox`.
    """
    report = Report()
    categories = _by_id(coco["categories"], "category", {"id": int, "name": str}, report)
    images = _by_id(coco["images"], "image", {"id": int, "file_name": str, "width": int, "height": int}, report)
    annotations = _by_id(coco["annotations"], "annotation", {"id": int, "image_id": int, "category_id": int}, report)
    if not categories:
        report.fatal["no categories"].append(f"images in {folder}")
    _tell_apart(categories.values(), report)
    _find_files(images, FileNames(folder), report)
    if annotations:
        _merge(images, report)
    if 0 in annotations:  # pycocotools takes a match with annotation 0 for no match
        annotations[0]["id"] = max(annotations) + 1
    known = shortened([str(category_id) for category_id in categories])
    objects = []
    boxes = []  # around their outlines or masks
    for one in annotations.values():
        where = f"annotation {one['id']}"
        if one["category_id"] not in categories:
            report.fatal[f"category_id not among the categories, {known}"].append(f"{where} ({one['category_id']})")
            continue
        if one["image_id"] not in images:
            report.warnings["annotations of unknown images"].append(f"{where} (image {one['image_id']})")
            continue
        image = images[one["image_id"]]
        if image is None:
            continue
        height = image["height"]
        width = image["width"]
        one["image_id"] = image["id"]
        one["segmentation"], fault = _segmentation(one.get("segmentation"), height, width)
        if fault:
            report.warnings[fault].append(where)
        if one["segmentation"] is None:
            continue
        box = _box_around(one["segmentation"], height, width) or _box_of_mask(one, image)
        if not box[2]:
            report.warnings["objects of which nothing lies in the image"].append(where)
            continue
        if not (_is_number(one.get("area")) and 0 < one["area"] <= height * width):
            if one.get("area"):
                report.warnings["areas that no object in the image can have, taken from the mask"].append(where)
            one["area"] = int(rle.area(compressed(one["segmentation"], height, width)))
        one["iscrowd"] = int(str(one.get("iscrowd")).lower() in ("1", "1.0", "true"))
        if one["iscrowd"]:
            report.warnings[CROWD].append(where)
        objects.append(one)
        boxes.append(box)
    _mend_boxes(objects, boxes, images, report)
    for image_id, count in Counter(one["image_id"] for one in objects if not one["iscrowd"]).items():
        if count > MOST_OBJECTS:
            problem = f"images with more than {MOST_OBJECTS} objects, which is as many as AP counts"
            report.warnings[problem].append(f"image {image_id} ({count})")
    images = [image for image_id, image in images.items() if image and image["id"] == image_id]
    return {**coco, "categories": list(categories.values()), "images": images, "annotations": objects}, report


# ---- Records ---------------------------------------------------------------------------------------------------------


def _by_id(records, kind, fields, report):
    """Copies of the records by id, without those that lack a field or have the id of an earlier one."""
    found = {}
    for position, record in enumerate(records):
        record = dict(record) if isinstance(record, dict) else {}
        for name in fields:
            record[name] = _whole(record.get(name)) if fields[name] is int else record.get(name)
        wrong = next((name for name in fields if not isinstance(record[name], fields[name])), None)
        if wrong:
            value = "is missing" if record[wrong] is None else f"is {str(record[wrong])[:30]!r}"
            wanted = "a whole number" if fields[wrong] is int else "text"
            place = f"{kind} at position {position} ({wrong} {value}, not {wanted})"
            report.fatal[f"{kind} without a usable {wrong}"].append(place)
        elif record["id"] in found:
            report.fatal[f"{kind} ids used twice"].append(f"{kind} {record['id']}")
        else:
            found[record["id"]] = record
    return found


def _whole(value):
    """Converts 3.0, "3" and "3.0" to 3; returns anything else unchanged."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\d+(\.0*)?", value.strip()):
        return int(value.split(".")[0])
    return value


def _tell_apart(categories, report):
    """Adds their ids to the names of classes that share one."""
    names = Counter(category["name"] for category in categories)
    for category in categories:
        if names[category["name"]] > 1:
            category["name"] = f"{category['name']} ({category['id']})"
            report.warnings["classes of one name, told apart by their ids"].append(category["name"])


def _find_files(images, files, report):
    """Gives each image the exact name of its file; replaces images that cannot be used by None."""
    for image_id, image in images.items():
        where = f"image {image_id} ({image['file_name']})"
        name = files.inside(image["file_name"])
        parts = PureWindowsPath(name)  # its rules cover all separators and drives
        if not 0 <= image_id < 2**63 or image["width"] < 1 or image["height"] < 1:
            report.fatal["images with an id that is negative or too long, or without pixels"].append(where)
        elif parts.anchor or ".." in parts.parts:
            report.fatal["paths that leave the image folder"].append(where)
        elif found := files(name):
            if found != name:
                report.warnings["files whose names only look as in the json"].append(f"{where}: {found}")
            image["file_name"] = Path(found).as_posix()  # a.png for ./a.png
            continue
        else:
            missing = report.fatal[f"files missing in {files.folder}"]
            near = None if missing else files.nearest(name)  # only for the first, as it compares all names
            missing.append(f"{where}, the nearest is {near}" if near else where)
        images[image_id] = None


def _merge(images, report):
    """Merges images of one file, each of which lacks the others' objects: all their ids lead to the first."""
    by_file = {}
    for image_id, image in images.items():
        if image:
            first = images[image_id] = by_file.setdefault(image["file_name"], image)
            if first is not image:
                problem = "files with several ids, taken as one image with the objects of all"
                report.warnings[problem].append(f"{image['file_name']} ({first['id']} and {image_id})")


# ---- Masks -----------------------------------------------------------------------------------------------------------


def compressed(segmentation, height: int, width: int) -> dict:
    """pycocotools' compressed run-length encoding of polygons, or of run lengths, compressed or not."""
    if isinstance(segmentation, list):
        parts = rle.frPyObjects(segmentation, height, width)
        return rle.merge(parts) if len(parts) > 1 else parts[0]
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def _segmentation(given, height, width):
    """(usable part of a segmentation or None, what is wrong with it or None)."""
    if not given or given == [[]] or isinstance(given, float):  # NaN in place of what is missing
        return None, NO_MASK
    if isinstance(given, dict):
        return _runs(given, height, width)
    if not isinstance(given, list):
        return None, "segmentations that are neither polygons nor run lengths"
    if all(map(_is_number, given)):
        given = [given]  # one polygon without the list around it
    polygons = [polygon for polygon in given if _is_polygon(polygon)]
    if not polygons:
        return None, _cause(given[0])
    if max(map(max, polygons)) <= 1 < max(height, width):
        return None, "polygons in shares of the image (0 to 1), where pixels are expected"
    return polygons, None if len(polygons) == len(given) else _cause(None)


def _cause(given):
    """Why something is no polygon."""
    parts = given if isinstance(given, list) else [given]
    if len(parts) == 2 or any(isinstance(part, list | dict) for part in parts):
        return "polygons that are lists of points, where [x0, y0, x1, y1, ...] is expected"
    if any(isinstance(part, str) for part in parts):
        return "polygons whose numbers are text"
    return "polygons of less than three points or not finite"


def _is_polygon(polygon):
    """Whether it has three points or more, all at coordinates that a rasteriser can handle."""
    sides = len(polygon) if isinstance(polygon, list) else 0
    try:
        return sides >= 6 and sides % 2 == 0 and math.isfinite(sum(polygon)) and max(map(abs, polygon)) < 1e5
    except (TypeError, OverflowError):
        return False


def _runs(given, height, width):
    """As _segmentation. Runs must cover their image exactly: with others, pycocotools reads beyond the end."""
    size = given.get("size")
    counts = given.get("counts")
    if size != [height, width]:  # 48.0 equals 48
        if size == [width, height]:
            return None, "run lengths whose size is [width, height], where [height, width] is expected"
        return None, "run lengths of another size than their image"
    if isinstance(counts, str) and counts.startswith(("b'", 'b"')):
        return None, "run lengths that Python wrote as bytes (b'...'): decode() them first"
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(_is_number(run) and run == int(run) >= 0 for run in runs):
        return None, "run lengths that cannot be decoded"
    if sum(runs) != height * width:
        return None, "run lengths that do not cover their image"
    whole = counts if isinstance(counts, str) else [int(run) for run in runs]
    return {"size": [height, width], "counts": whole}, None


# ---- Boxes -----------------------------------------------------------------------------------------------------------


def _box_around(polygons, height, width):
    """The box (x, y, w, h) around polygons, which is near that of their mask and made much sooner. None where a part
    leaves the image or none is so large that pixels are inside for sure, and for run lengths."""
    if not isinstance(polygons, list):
        return None
    left = width
    top = height
    right = 0
    bottom = 0
    seen = False
    for polygon in polygons:
        x = polygon[::2]
        y = polygon[1::2]
        x0 = min(x)
        y0 = min(y)
        x1 = max(x)
        y1 = max(y)
        left = min(left, x0)
        top = min(top, y0)
        right = max(right, x1)
        bottom = max(bottom, y1)
        if not seen:
            twice = sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))  # the area
            seen = abs(twice) > 8 * (x1 - x0 + y1 - y0)
    inside = left > -1 and top > -1 and right < width + 1 and bottom < height + 1
    return (left, top, right - left, bottom - top) if seen and inside else None


def _box_of_mask(one, image):
    return rle.toBbox(compressed(one["segmentation"], image["height"], image["width"])).tolist()


def _mend_boxes(objects, around, images, report):
    """Give every object a box: its own, or that of its mask where it has none or one that does not fit what is around
    the object (n of 4). Where more than a tenth do not fit, the form of all is in doubt, and all are taken from the
    masks."""
    given = np.array([one.get("bbox") is not None for one in objects], bool)
    own = [one["bbox"] if _is_box(one.get("bbox")) else (0, 0, 0, 0) for one in objects]
    own, around = (np.array(boxes, float).reshape(-1, 4).T for boxes in (own, around))
    unfit = given & (_iou(own, around) < 0.5)
    doubtful = unfit.sum() > given.sum() / 10
    for index in np.flatnonzero(unfit | ~given | doubtful):
        objects[index]["bbox"] = _box_of_mask(objects[index], images[objects[index]["image_id"]])
    if unfit.any():
        sides = [(images[one["image_id"]]["width"], images[one["image_id"]]["height"]) for one in objects]
        form = _form(*(of[:, unfit & (own[2] > 0)] for of in (own, around, np.array(sides).T)))
        problem = f"boxes that do not fit their masks and are taken from those; they look like {form}"
        report.warnings[problem] += [f"annotation {objects[index]['id']}" for index in np.flatnonzero(unfit)]


def _form(boxes, masks, sides):
    """The format of most boxes [4 n], if not (x, y, w, h): guessed from the masks' boxes and the images' sides."""
    x, y, w, h = boxes
    width, height = sides
    across, down = np.median(masks[2:] / boxes[2:], 1) if len(x) else (1, 1)
    forms = {
        "(x0, y0, x1, y1)": (x, y, w - x, h - y),
        "(centre x, centre y, w, h)": (x - w / 2, y - h / 2, w, h),
        "shares of the image": (x * width, y * height, w * width, h * height),
        "centres and sizes in shares": ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height),
        "those of a smaller or larger image": (x * across, y * down, w * across, h * down),
    }
    for form, turned in forms.items():
        if np.median(_iou(turned, masks) if len(x) else 0) > 0.7:
            return form
    return "nothing known"


def _is_box(box):
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) > 0


def _iou(a, b):
    """IoU [n] of boxes [4 n] as x, y, w, h."""
    width = np.minimum(a[0] + a[2], b[0] + b[2]) - np.maximum(a[0], b[0])
    height = np.minimum(a[1] + a[3], b[1] + b[3]) - np.maximum(a[1], b[1])
    inside = width.clip(0) * height.clip(0)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def _is_number(x):
    return isinstance(x, (int, float)) and abs(x) < 1e9  # neither NaN nor beyond any image
