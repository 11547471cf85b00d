"""Checks and mends the records of a COCO json.

    sound       a copy as training and pycocotools need it
    Report      what was wrong with the original, and where

Whole numbers written as text or floats (3.0, "3") are converted silently. What else is mended or left out is reported.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import mul
from pathlib import Path

from pycocotools import mask as rle

from datasets.images import FileNames, shortened

FIELDS = {  # that a record needs, with their types
    "category": {"id": int, "name": str},
    "image": {"id": int, "file_name": str, "width": int, "height": int},
    "annotation": {"id": int, "image_id": int, "category_id": int},
}
NO_MASK = (
    "objects without a mask, which boxes alone cannot train: draw outlines in CVAT, Label Studio or Roboflow, or let "
    "Segment Anything make masks of the boxes"
)
CROWD = (
    "objects that are crowds (iscrowd: 1), not trained on, and in AP neither for nor against; CVAT marks every brush "
    "mask so: set iscrowd to 0 where it is one object"
)
NO_POLYGON = "polygons other than [x0, y0, x1, y1, ...] of three points or more, all finite numbers"
NO_RUNS = "run lengths that cannot be decoded, such as what Python prints of bytes (b'...')"
WRONG_BOXES = "boxes that are not [x, y, width, height] around their masks, and are taken from those"


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
    categories = _categories(coco["categories"], report)
    annotations = _by_id(coco["annotations"], "annotation", report)
    images = _find_files(_by_id(coco["images"], "image", report), FileNames(folder), report)
    if annotations:  # of a test set, results under every id are wanted
        _merge_copies(images, report.warnings)
    if 0 in annotations:  # pycocotools takes a match with annotation 0 for no match
        annotations[0]["id"] = max(annotations) + 1
    known = shortened([str(category_id) for category_id in categories])
    objects = []
    for one in annotations.values():
        where = f"annotation {one['id']}"
        if one["category_id"] not in categories:
            report.fatal[f"category_id not among the categories, {known}"].append(f"{where} ({one['category_id']})")
        elif one["image_id"] not in images:
            report.warnings["annotations of unknown images"].append(f"{where} (image {one['image_id']})")
        elif image := images[one["image_id"]]:
            one["image_id"] = image["id"]
            if _mend(one, image, report.warnings):
                objects.append(one)
    if len(report.warnings.get(WRONG_BOXES, ())) > len(objects) / 10:
        for one in objects:  # as the format of all boxes is in doubt
            one["bbox"] = _box_of_mask(one, images[one["image_id"]])
    images = [image for image_id, image in images.items() if image and image["id"] == image_id]
    return {**coco, "categories": list(categories.values()), "images": images, "annotations": objects}, report


# ---- Records ---------------------------------------------------------------------------------------------------------


def _by_id(records, kind, report):
    """Copies of the records by id, without those that lack a field or have the id of an earlier one."""
    found = {}
    for position, record in enumerate(records):
        record = dict(record) if isinstance(record, dict) else {}
        for name, wanted in FIELDS[kind].items():
            value = record.get(name)
            if wanted is int and not isinstance(value, int):
                value = record[name] = _whole(value)
            if not isinstance(value, wanted):
                problem = f"{kind} whose {name} is not {'text' if wanted is str else 'a whole number'}"
                report.fatal[problem].append(f"{kind} at position {position} ({str(value)[:30]})")
                break
        else:
            if record["id"] in found:
                report.fatal[f"{kind} ids used twice"].append(f"{kind} {record['id']}")
            found.setdefault(record["id"], record)
    return found


def _categories(records, report):
    """The categories by id. Ids stand behind the names that several of them have."""
    categories = _by_id(records, "category", report)
    if not categories:
        report.fatal["no categories"].append("in the json")
    names = Counter(category["name"] for category in categories.values())
    for category_id, category in categories.items():
        if names[category["name"]] > 1:
            category["name"] += f" ({category_id})"
            report.warnings["classes of one name, told apart by their ids"].append(category["name"])
    return categories


def _whole(value):
    """Converts 3.0, "3" and "3.0" to 3; returns anything else unchanged."""
    try:
        return int(str(value).removesuffix(".0"))
    except ValueError:
        return value


def _find_files(images, files, report):
    """The images by id, with the exact names of their files; None for those that cannot be used."""
    usable = {}
    for image_id, image in images.items():
        name = image["file_name"]
        where = f"image {image_id} ({name})"
        found = files.find(name)
        usable[image_id] = None
        if not 0 <= image_id < 2**63 or image["width"] < 1 or image["height"] < 1:
            report.fatal["images with an id that is negative or too long, or without pixels"].append(where)
        elif not found:
            missing = report.fatal[f"files missing in {files.folder}"]
            near = None if missing else files.nearest(name)  # only for the first, as it compares all names
            missing.append(f"{where}, the nearest is {near}" if near else where)
        else:
            if not name.replace("\\", "/").endswith(found):
                report.warnings["files whose names only look as in the json"].append(f"{where}: {found}")
            usable[image_id] = image | {"file_name": found}
    return usable


def _merge_copies(images, warnings):
    """Leads all ids of a file to its first record, as each lacks the objects of the others."""
    by_file = {}
    for image_id, image in images.items():
        if image:
            images[image_id] = first = by_file.setdefault(image["file_name"], image)
            if first is not image:
                problem = "files with several ids, taken as one image with the objects of all"
                warnings[problem].append(f"{image['file_name']} ({first['id']} and {image_id})")


# ---- Objects ---------------------------------------------------------------------------------------------------------


def _mend(one, image, warnings):
    """Gives an annotation a usable mask, `iscrowd`, `area` and `bbox`. False where it has no mask in its image."""
    where = f"annotation {one['id']}"
    height = image["height"]
    width = image["width"]
    one["segmentation"], fault = _segmentation(one.get("segmentation"), height, width)
    if fault:
        warnings[fault].append(where)
    if not one["segmentation"]:
        return False
    box = _around(one["segmentation"], height, width) or _box_of_mask(one, image)
    if not box[2]:
        warnings["objects of which nothing lies in the image"].append(where)
        return False
    area = one.get("area")
    if not (_is_number(area) and 0 < area <= height * width):
        one["area"] = int(rle.area(compressed(one["segmentation"], height, width)))
        if area:
            warnings["areas that no object in the image can have, taken from the mask"].append(where)
    if not _fits(one.get("bbox"), box):
        if one.get("bbox") is not None:
            warnings[WRONG_BOXES].append(where)
        one["bbox"] = _box_of_mask(one, image)
    one["iscrowd"] = int(str(one.get("iscrowd")).lower() in ("1", "1.0", "true"))
    if one["iscrowd"]:
        warnings[CROWD].append(where)
    return True


def _box_of_mask(one, image):
    return rle.toBbox(compressed(one["segmentation"], image["height"], image["width"])).tolist()


def _around(polygons, height, width):
    """The box (x, y, w, h) around polygons, near that of their mask and found sooner. None where only the mask can
    tell: for run lengths, outside of the image, and where the first part is so small that it may show no pixel."""
    if not isinstance(polygons, list):
        return None
    points = list(chain.from_iterable(polygons))
    left = min(points[::2])
    top = min(points[1::2])
    right = max(points[::2])
    bottom = max(points[1::2])
    if left <= -1 or top <= -1 or right >= width + 1 or bottom >= height + 1:
        return None
    x = polygons[0][::2]
    y = polygons[0][1::2]
    area = abs(sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))) / 2
    return (left, top, right - left, bottom - top) if area > 4 * (right - left + bottom - top) else None


def _fits(box, other):
    """Whether the first is a box (x, y, w, h), and the IoU of the two at least one half."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) <= 0:
        return False
    x, y, w, h = box
    left, top, width, height = other
    across = min(x + w, left + width) - max(x, left)
    down = min(y + h, top + height) - max(y, top)
    return across > 0 and down > 0 and 3 * across * down >= w * h + width * height


# ---- Masks -----------------------------------------------------------------------------------------------------------


def compressed(segmentation, height: int, width: int) -> dict:
    """pycocotools' compressed run-length encoding of polygons, or of run lengths, compressed or not."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def _segmentation(given, height, width):
    """(usable part of a segmentation or None, what is wrong with it or None)."""
    if not given or given == [[]] or isinstance(given, float):  # NaN in place of what is missing
        return None, NO_MASK
    if isinstance(given, dict):
        return _runs(given, height, width)
    given = given if isinstance(given, list) and isinstance(given[0], list) else [given]  # one polygon alone
    polygons = [polygon for polygon in given if _is_polygon(polygon)]
    if polygons and max(map(max, polygons)) <= 1 < max(height, width):
        return None, "polygons in shares of the image (0 to 1), where pixels are expected"
    return polygons, None if len(polygons) == len(given) else NO_POLYGON


def _is_polygon(polygon):
    """Whether it has three points or more, all at coordinates that a rasteriser can handle."""
    sides = len(polygon) if isinstance(polygon, list) else 0
    try:
        return sides >= 6 and sides % 2 == 0 and math.isfinite(sum(polygon)) and max(map(abs, polygon)) < 1e5
    except (TypeError, OverflowError):
        return False


def _is_number(x):
    return isinstance(x, (int, float)) and abs(x) < 1e9  # neither NaN nor beyond any image


def _runs(given, height, width):
    """As _segmentation. Runs must cover their image exactly: with others, pycocotools reads beyond the end."""
    counts = given.get("counts")
    if given.get("size") != [height, width]:  # 48.0 equals 48
        return None, "run lengths whose size is not [height, width] of their image"
    runs = _uncompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(_is_number(run) and run == int(run) >= 0 for run in runs):
        return None, NO_RUNS
    if sum(runs) != height * width:
        return None, "run lengths that do not cover their image"
    whole = counts if isinstance(counts, str) else [int(run) for run in runs]
    return {"size": [height, width], "counts": whole}, None


def _uncompressed(counts):
    """The lengths of the runs in the `counts` of a compressed encoding, or None if it is malformed.

    Each character holds five bits of a number, and a sixth that says whether more follow. From the fourth run on the
    number is the difference to the run two before. Source: COCO API, maskApi.c.
    """
    runs = []
    value = 0
    shift = 0
    for character in counts.encode():
        bits = character - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits < 32:
            value -= (bits >> 4) << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = 0
            shift = 0
    return None if shift else runs
