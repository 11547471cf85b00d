"""What is wrong with a COCO json, and the json without it.

    sound       a copy in which all is as training and pycocotools need it
    Report      what was wrong with the original, and where

Whole numbers that came as floats, missing boxes and areas, and names with backslashes are mended without a word.
"""

import math
from collections import defaultdict
from operator import mul
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from pycocotools import mask as rle

from datasets.geometry import run_lengths

MOST_OBJECTS = 100  # detections of an image that AP counts


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


def sound(coco: dict, folder: Path) -> tuple[dict, Report]:
    """A copy of the COCO dict without what cannot be used, every annotation with `iscrowd`, `area` and `bbox`, and the
    report on what was wrong. folder: that of the images. Masks that nothing of would be seen are left out, so every
    object in the copy can be found."""
    report = Report(defaultdict(list), defaultdict(list))
    categories = _unique(coco["categories"], "category", {"id": int, "name": str}, report)
    images = _unique(coco["images"], "image", {"id": int, "file_name": str, "width": int, "height": int}, report)
    annotations = _unique(coco["annotations"], "annotation", {"id": int, "image_id": int, "category_id": int}, report)
    if 0 in annotations:  # pycocotools takes a match with annotation 0 for no match
        annotations[0]["id"] = max(annotations) + 1
    if not categories:
        report.fatal["no categories"].append(f"images in {folder}")
    usable = {image_id for image_id, image in images.items() if _is_usable(image, folder, report)}
    objects = [o for a in annotations.values() if (o := _object(a, images, usable, categories, report))]
    _mend_boxes(objects, images, report)
    per_image = defaultdict(int)
    for one in objects:
        per_image[one["image_id"]] += not one["iscrowd"]
    for image_id, count in per_image.items():
        if count > MOST_OBJECTS:
            problem = f"images with more than {MOST_OBJECTS} objects, which is as many as AP counts"
            report.warnings[problem].append(f"image {image_id} ({count})")
    images = [image for image_id, image in images.items() if image_id in usable]
    return {**coco, "categories": list(categories.values()), "images": images, "annotations": objects}, report


def _unique(records, kind, fields, report):
    """Copies of the records by id, without those that lack a field or have the id of an earlier one."""
    unique, wanted = {}, {int: "a whole number", str: "text"}
    for position, record in enumerate(records):
        record = dict(record) if isinstance(record, dict) else {}
        for name, value in record.items():
            if fields.get(name) is int and isinstance(value, float) and value.is_integer():
                record[name] = int(value)
        wrong = next((name for name, t in fields.items() if not isinstance(record.get(name), t)), None)
        if wrong:
            value = f"is {str(record[wrong])[:30]!r}" if record.get(wrong) is not None else "is missing"
            place = f"{kind} at position {position} ({wrong} {value}, not {wanted[fields[wrong]]})"
            report.fatal[f"{kind} without a usable {wrong}"].append(place)
        elif record["id"] in unique:
            report.fatal[f"{kind} ids used twice"].append(f"{kind} {record['id']}")
        else:
            unique[record["id"]] = record
    return unique


def _is_usable(image, folder, report):
    where = f"image {image['id']} ({image['file_name']})"
    name = image["file_name"] = name_in(image["file_name"], folder)
    parts = PureWindowsPath(name)  # its rules cover all separators and drives
    if not 0 <= image["id"] < 2**63 or image["width"] < 1 or image["height"] < 1:
        report.fatal["images with an id that is negative or too long, or without pixels"].append(where)
    elif parts.anchor or ".." in parts.parts:
        report.fatal["paths that leave the image folder"].append(where)
    elif not (folder / name).is_file():
        report.fatal[f"files missing in {folder}"].append(where)
    else:
        return True
    return False


def name_in(name: str, folder: Path) -> str:
    """A json's name of an image, from the folder on: with / for \\ where no file has the name as it is, and without the
    folder's own path."""
    if "\\" in name and not (folder / name).is_file():
        name = name.replace("\\", "/")
    if Path(name).is_absolute():
        for root in (folder.absolute(), folder.resolve()):
            if Path(name).is_relative_to(root):
                return Path(name).relative_to(root).as_posix()
    return name


# ---- Objects ---------------------------------------------------------------------------------------------------------


def _object(annotation, images, usable, categories, report):
    """The annotation with a usable segmentation, `iscrowd`, `bbox` and `area`, or None if nothing can be made of it."""
    where = f"annotation {annotation['id']}"
    if annotation["category_id"] not in categories:
        report.fatal["category_id not among the categories"].append(f"{where} ({annotation['category_id']})")
        return None
    if annotation["image_id"] not in images:
        report.warnings["annotations of unknown images"].append(f"{where} (image {annotation['image_id']})")
        return None
    if annotation["image_id"] not in usable:
        return None
    height, width = (images[annotation["image_id"]][side] for side in ("height", "width"))
    given = annotation.get("segmentation")
    if isinstance(given, list) and given and all(_is_number(x) for x in given):
        given = [given]  # one polygon without the list around it
    if isinstance(given, dict):
        usable = _runs(given, height, width)
    else:
        usable = [p for p in given if _is_polygon(p)] if isinstance(given, list) else None
    if not usable:
        report.warnings["segmentations that cannot be decoded"].append(where)
        return None
    if isinstance(usable, list) and len(usable) < len(given):
        report.warnings["polygons of less than three points or not finite"].append(where)
    if isinstance(usable, dict) or not _plainly_seen(usable, height, width):
        runs = compressed(usable, height, width)
        if not rle.area(runs):
            report.warnings["objects of which nothing lies in the image"].append(where)
            return None
    iscrowd = annotation.get("iscrowd")
    iscrowd = int(bool(iscrowd) and iscrowd not in ("0", "false", "False"))
    annotation = {**annotation, "segmentation": usable, "iscrowd": iscrowd}
    area = annotation.get("area")
    if not (_is_number(area) and 0 < area <= height * width):
        annotation["area"] = int(rle.area(compressed(usable, height, width)))
        if _is_number(area) and area != 0:
            report.warnings["areas that no object in the image can have, taken from the mask"].append(where)
    return annotation


def _mend_boxes(objects, images, report):
    """Give every object a box: its own, or the one around its mask where it has none that can be right."""
    records = [images[o["image_id"]] for o in objects]
    boxes = [o.get("bbox") for o in objects]
    positive = [
        isinstance(b, list) and len(b) == 4 and all(map(_is_number, b)) and min(b[2:]) > 0 and max(map(abs, b)) < 1e6
        for b in boxes
    ]
    own = [(b, r) for b, r, good in zip(boxes, records, positive, strict=True) if good]
    leave = sum(x + w > r["width"] + 1 or y + h > r["height"] + 1 for (x, y, w, h), r in own)
    corners = sum(x < x1 <= r["width"] + 1 and y < y1 <= r["height"] + 1 for (x, y, x1, y1), r in own)
    as_corners = leave > len(own) / 2 and corners > 0.9 * len(own)
    for one, box, record, good in zip(objects, boxes, records, positive, strict=True):
        if box is not None and not good:
            problem = "boxes that are not finite and positive"
        elif good and as_corners:
            problem = "boxes that are (x0, y0, x1, y1), not (x, y, w, h)"
        elif good and not _overlaps(box, record["width"], record["height"]):
            problem = "boxes of which nothing lies in the image"
        elif good:
            continue
        else:
            problem = None
        one["bbox"] = rle.toBbox(compressed(one["segmentation"], record["height"], record["width"])).tolist()
        if problem:
            report.warnings[f"{problem}"].append(f"annotation {one['id']}")


def _overlaps(box, width, height):
    x, y, w, h = box
    return x < width and y < height and x + w > 0 and y + h > 0


def compressed(segmentation, height: int, width: int) -> dict:
    """Polygons or run lengths of either kind as pycocotools' compressed run-length encoding."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def _plainly_seen(polygons, height, width):
    """Whether a polygon lies in the image and is so large that pixels are in it without rasterising them."""
    for polygon in polygons:
        x, y = polygon[::2], polygon[1::2]
        left, right, top, bottom = min(x), max(x), min(y), max(y)
        area = abs(sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))) / 2
        inside = left > -1 and top > -1 and right < width + 1 and bottom < height + 1
        if inside and area > 4 * (right - left + bottom - top):
            return True
    return False


def _is_polygon(polygon):
    """Whether it has three points or more, all at coordinates that a rasteriser can handle."""
    sides = len(polygon) if isinstance(polygon, list) else 0
    try:
        return sides >= 6 and sides % 2 == 0 and math.isfinite(sum(polygon)) and max(map(abs, polygon)) < 1e5
    except (TypeError, OverflowError):
        return False


def _is_number(x):
    return isinstance(x, int | float) and abs(x) < 1e300  # neither infinite nor NaN


def _runs(segmentation, height, width):
    """A run-length encoding with whole numbers, or None unless it covers its image exactly: pycocotools reads beyond
    the end of others."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:  # 48.0 equals 48
        return None
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(_is_number(run) and run == int(run) >= 0 for run in runs):
        return None
    whole = counts if isinstance(counts, str) else [int(run) for run in runs]
    return {"size": [height, width], "counts": whole} if sum(runs) == height * width else None
