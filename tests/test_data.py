"""What datasets/ promises."""

import contextlib
import io
import json
import shutil
import struct
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from datasets import Source, checks, collate, open_dataset, shapes
from datasets import coco as data
from datasets.checks import compressed as compressed_runs
from datasets.geometry import Geometry, identity
from datasets.images import read_image
from evaluate import average_precision

COCO_MINI = Path(__file__).parents[2] / "shared" / "coco_mini"
SQUARE = [10, 20, 30, 20, 30, 40, 10, 40]  # a polygon: x 10 to 30, y 20 to 40
MASK = np.zeros((60, 80), np.uint8)
MASK[20:40, 10:30] = 1


def compressed(mask):
    runs = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": runs["size"], "counts": runs["counts"].decode()}


def uncompressed(mask):
    flat = np.asarray(mask).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def write(folder, annotations, images=((1, "a.png"), (2, "b.png")), fault=()):
    """A COCO folder with grey images of 80 x 60 and annotations, whose defaults are an id and a square on image 1.

    fault: lists of the json to put in place of the sound ones.
    """
    (folder / "val").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for _, name in images:
        Image.new("RGB", (80, 60), (90, 90, 90)).save(folder / "val" / name)
    default = {"image_id": 1, "category_id": 7, "segmentation": [SQUARE]}
    coco = {
        "images": [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in images],
        "annotations": [{"id": number, **default, **a} for number, a in enumerate(annotations, 100)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        **dict(fault),
    }
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(coco))
    return folder


def opened(folder, geometry=identity, training=False):
    return open_dataset(Source(str(folder)), "val", geometry, training)


# ---- COCO's own annotations ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def annotated(folder):
    """(json file, data set) of a split: of 96 photos of COCO where they lie beside the clone, else made-up ones."""

    def opened(split):
        if COCO_MINI.is_dir():
            path = COCO_MINI / "annotations" / f"instances_{split}2017.json"
            return path, open_dataset(Source("coco", str(COCO_MINI)), split, identity, training=False)
        path = folder / "annotations" / f"instances_{split}.json"
        return path, open_dataset(Source(str(folder)), split, identity, training=False)

    return opened


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_annotation_of_coco_loads_as_pycocotools_decodes_it(annotated, split):
    path, dataset = annotated(split)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    for index, image_id in enumerate(dataset.image_ids):
        image, target = dataset[index]
        expected = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
        masks = [coco.annToMask(annotation) for annotation in expected]
        assert [dataset.category_ids[label] for label in target["labels"]] == [a["category_id"] for a in expected]
        assert np.array_equal(target["masks"].numpy(), np.array(masks).reshape(-1, *image.shape[1:]))
        x, y, w, h = np.array([rle.toBbox(coco.annToRLE(a)) for a in expected]).reshape(-1, 4).T
        right, bottom = (-(-side // 32) * 32 for side in image.shape[:0:-1])
        boxes = np.stack(((x + w / 2) / right, (y + h / 2) / bottom, w / right, h / bottom), 1)
        assert np.allclose(target["boxes"], boxes, atol=1e-6)


def test_a_crop_of_a_resized_coco_mask_is_cut_from_pycocotools_mask_of_the_resized_polygon(annotated):
    _, dataset = annotated("val")
    rng = np.random.default_rng(0)
    for annotation in dataset.json["annotations"]:
        record, polygons = dataset.images[annotation["image_id"]], annotation["segmentation"]
        if isinstance(polygons, dict):
            continue
        size, offset = rng.integers(20, 900, 2), rng.integers(0, 20, 2)
        scale = np.tile([size[1] / record["width"], size[0] / record["height"]], 10_000)
        resized = [(np.array(p) * scale[: len(p)]).tolist() for p in polygons]
        expected = rle.decode(rle.merge(rle.frPyObjects(resized, *size.tolist())))[offset[0] :, offset[1] :]
        geometry = Geometry(tuple(size), expected.shape, tuple(offset))
        assert np.array_equal(geometry.polygons(polygons, record["height"], record["width"]), expected)


def test_flips_and_transposes_undone_leave_a_coco_mask_within_its_outline(annotated):
    _, dataset = annotated("val")
    for annotation in dataset.json["annotations"][:100]:
        height, width = (dataset.images[annotation["image_id"]][side] for side in ("height", "width"))
        if isinstance(annotation["segmentation"], dict):
            continue
        turn = Geometry((width, height), (width, height), (0, 0), True, True, True)
        plain, turned = (
            geometry.polygons(annotation["segmentation"], height, width).astype(int)
            for geometry in (identity(None, width, height), turn)
        )
        back = turned[::-1, ::-1].T
        edges = sum(abs(np.diff(np.pad(plain, 1), axis=axis)).sum() for axis in (0, 1))
        # pycocotools' rasteriser rounds down, so a mirrored outline may move by a fifth of a pixel.
        assert abs(back - plain).sum() <= 0.3 * edges


# ---- Images ----------------------------------------------------------------------------------------------------------


def image_file(path, mode):
    """An image of 80 x 60 whose left half is black and right half white, once upright."""
    picture = Image.fromarray(np.repeat([[0] * 40 + [255] * 40], 60, 0).astype(np.uint8))
    if mode == "16 bit":
        Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save(path)
    elif mode == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by 90 degrees when shown
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    else:
        picture.convert("RGB").convert(mode).save(path, format="JPEG" if mode == "CMYK" else None)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "16 bit", "EXIF"])
def test_images_of_every_mode_load_as_upright_rgb(tmp_path, mode):
    folder = write(tmp_path, [{}])
    image_file(folder / "val" / "a.png", mode)
    pixels, _ = opened(folder)[0]
    assert pixels.shape == (3, 60, 80) and pixels.dtype == torch.uint8
    assert pixels[:, :, :30].float().mean() < 5 and pixels[:, :, 50:].float().mean() > 250  # JPEG and palettes round


def test_16_bits_a_pixel_become_8(tmp_path):
    Image.fromarray(np.full((2, 2), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    assert np.unique(read_image(tmp_path / "a.png")).tolist() == [100]


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated", "another size"])
def test_an_unreadable_image_is_named_and_no_other_is_affected(tmp_path, content):
    folder = write(tmp_path, [{}])
    path = folder / "val" / "a.png"
    if content == "another size":
        Image.new("RGB", (60, 80)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:-40] if content == "truncated" else content)
    dataset = opened(folder)
    with pytest.raises(ValueError, match="a.png"):
        dataset[0]
    assert dataset[1][0].shape == (3, 60, 80)
    assert not data.check(dataset, decode=False).fatal
    assert "a.png" in str(data.check(dataset, decode=True))


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_float_images_of_either_range_keep_their_greys(tmp_path, white):
    Image.fromarray(np.array([[0, 0.4, 1, np.nan]], np.float32) * white).save(tmp_path / "a.tif")
    assert np.asarray(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 102, 255, 0]


@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_32_bits_a_pixel_become_8_whatever_is_white(tmp_path, white):
    Image.fromarray(np.array([[0, white // 2, white]], np.int32)).save(tmp_path / "a.tif")
    assert np.asarray(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 127, 255]


def test_a_photo_is_turned_upright_though_the_rest_of_its_metadata_is_damaged(tmp_path):
    maker = struct.pack(">HHII", 0x010F, 2, 500, 9999)  # a text that begins far behind the end
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + maker + turned + bytes(4)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (20, 30)


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), KeyError(7), MemoryError(), OverflowError("x")])
def test_whatever_the_image_library_raises_names_the_file_in_one_line(tmp_path, monkeypatch, error):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: raised(error))
    with pytest.raises(ValueError, match="a.png cannot be read as an image: ") as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def raised(error):
    raise error


def test_a_folder_and_a_missing_file_are_called_so(tmp_path):
    for path, word in ((tmp_path, "is a folder"), (tmp_path / "a.png", "no such file")):
        with pytest.raises(ValueError, match=word):
            read_image(path)


# ---- Targets ---------------------------------------------------------------------------------------------------------

TWO_PARTS = [[10, 20, 20, 20, 20, 40, 10, 40], [20, 20, 30, 20, 30, 40, 20, 40]]


@pytest.mark.parametrize("segmentation", [[SQUARE], TWO_PARTS, compressed(MASK), uncompressed(MASK)])
def test_polygons_and_both_kinds_of_run_lengths_give_one_mask(tmp_path, segmentation):
    dataset = opened(write(tmp_path, [{"segmentation": segmentation}]))
    assert np.array_equal(dataset[0][1]["masks"].numpy(), MASK[None].astype(bool))


def test_a_target_has_the_promised_types_and_boxes_are_relative_to_the_padded_image(tmp_path):
    _, target = opened(write(tmp_path, [{}, {"category_id": 3}]))[0]
    assert target["labels"].dtype == torch.int64 and target["boxes"].dtype == torch.float32
    assert target["masks"].dtype == torch.bool and target["image_id"] == 1
    # 80 x 60 is padded to 96 x 64.
    assert torch.allclose(target["boxes"], torch.tensor([20 / 96, 30 / 64, 20 / 96, 20 / 64]).expand(2, 4))


def test_labels_count_the_sorted_category_ids(tmp_path):
    dataset = opened(write(tmp_path, [{"category_id": 7}, {"category_id": 3}]))
    assert dataset.classes == ["dog", "cat"] and dataset.category_ids == [3, 7]
    assert dataset[0][1]["labels"].tolist() == [1, 0]


def test_a_crowd_is_never_trained_on_and_kept_for_evaluation(tmp_path):
    folder = write(tmp_path, [{"iscrowd": 1, "segmentation": uncompressed(MASK)}, {"image_id": 2}])
    training = opened(folder, training=True)
    assert training.image_ids == [2]
    assert opened(folder)[0][1]["labels"].shape == (0,)
    assert [a["iscrowd"] for a in training.json["annotations"]] == [1, 0]


def test_an_image_without_objects_is_evaluated_and_not_trained_on(tmp_path):
    folder = write(tmp_path, [{}])
    assert opened(folder, training=True).image_ids == [1]
    _, target = opened(folder)[1]
    assert [tuple(target[k].shape) for k in ("labels", "boxes", "masks")] == [(0,), (0, 4), (0, 60, 80)]


def test_what_a_crop_leaves_of_an_object_is_its_mask_and_box_and_what_it_leaves_nothing_of_is_gone(tmp_path):
    folder = write(tmp_path, [{"segmentation": [[50, 0, 80, 0, 80, 60, 50, 60]], "category_id": 3}, {}])
    image, target = opened(folder, lambda rng, width, height: Geometry((60, 80), (32, 32), (25, 15)))[0]
    assert image.shape == (3, 32, 32)
    assert target["labels"].tolist() == [1]
    assert np.array_equal(target["masks"][0], MASK[25:57, 15:47] == 1)
    assert torch.allclose(target["boxes"], torch.tensor([[7.5, 7.5, 15, 15]]) / 32)


def test_objects_of_no_area_or_outside_the_image_are_in_no_target(tmp_path):
    segmentations = [[10, 10, 20, 10, 30, 10]], [[200, 200, 220, 200, 220, 220]], compressed(0 * MASK)
    dataset = opened(write(tmp_path, [{"segmentation": s} for s in segmentations] + [{}, {}]))
    assert len(dataset[0][1]["labels"]) == 2  # two objects in one place are two objects


def test_ground_truth_is_complete_for_evaluation(tmp_path):
    dataset = opened(write(tmp_path, [{"id": 0}, {"id": 5, "area": 1.5, "bbox": [1, 2, 3, 4]}]))
    first, second = dataset.json["annotations"]
    assert (first["iscrowd"], first["area"], first["bbox"]) == (0, 400, [10, 20, 20, 20])
    assert first["id"] == 6  # pycocotools takes annotation 0 for no match
    assert (second["area"], second["bbox"]) == (1.5, [1, 2, 3, 4])


def test_the_random_stream_of_a_sample_depends_on_seed_epoch_and_image_alone(tmp_path):
    images = [(i, f"{i}.png") for i in range(1, 7)]

    def drawn(epoch, seed, first=0, **loading):
        folder = write(tmp_path, [{"image_id": i} for i, _ in images[first:]], images[first:])
        dataset = open_dataset(Source(str(folder)), "val", at_random, training=True, seed=seed)
        dataset.epoch = epoch
        loader = torch.utils.data.DataLoader(dataset, collate_fn=collate, **loading)
        return {target["image_id"]: target["boxes"].tolist() for _, (target,) in loader}

    plain = drawn(3, 1)
    assert len({str(boxes) for boxes in plain.values()}) == 6
    assert drawn(3, 1, num_workers=2, shuffle=True) == plain
    assert drawn(4, 1) != plain and drawn(3, 2) != plain
    assert drawn(3, 1, first=2) == {image_id: boxes for image_id, boxes in plain.items() if image_id > 2}


def at_random(rng, width, height):
    return Geometry((height, width), (height, width), (int(rng.integers(20)), int(rng.integers(10))))


def test_a_batch_is_of_one_size(tmp_path):
    dataset = opened(write(tmp_path, [{}]))
    images, targets = collate([dataset[0], dataset[1]])
    assert images.shape == (2, 3, 60, 80) and [t["image_id"] for t in targets] == [1, 2]
    with pytest.raises(ValueError, match="one size"):
        collate([dataset[0], (torch.zeros(3, 32, 32, dtype=torch.uint8), {})])


# ---- Check -----------------------------------------------------------------------------------------------------------


def image(**changes):
    return {"images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60} | changes]}


def segmentation(value):
    return {"annotations": [{"id": 100, "image_id": 1, "category_id": 7, "segmentation": value}]}


def annotation(**changes):
    return {"annotations": [{"id": 100, "image_id": 1, "category_id": 7, "segmentation": [SQUARE]} | changes]}


FATAL = {
    "unknown category": (annotation(category_id=91), "annotation 100 (91)"),
    "annotation id twice": ({"annotations": annotation()["annotations"] * 2}, "annotation 100"),
    "image id twice": ({"images": image()["images"] * 2}, "image 1"),
    "category id twice": ({"categories": [{"id": 7, "name": "cat"}] * 2}, "category 7"),
    "no categories": ({"categories": [], "annotations": []}, "no categories"),
    "no images": ({"images": [], "annotations": []}, "no images"),
    "image without a size": (image(width=None), "image without a usable width (1): image at position 0"),
    "image without pixels": (image(width=0), "image 1"),
    "image of less than none": (image(height=-60), "image 1"),
    "annotation without an image": (annotation(image_id=None), "annotation at position 0"),
    "annotation that is no object": ({"annotations": ["?"]}, "annotation at position 0"),
    "missing file": (image(file_name="c.png"), "image 1 (c.png)"),
    "path upwards": (image(file_name="../val/a.png"), "leave the image folder (1): image 1"),
    "path upwards for Windows": (image(file_name="..\\val\\a.png"), "leave the image folder (1): image 1"),
    "absolute path": (image(file_name="/etc/passwd"), "leave the image folder (1): image 1"),
    "drive": (image(file_name="C:a.png"), "leave the image folder (1): image 1"),
    "empty path": (image(file_name=""), "image 1 ()"),
}
HALF = {"size": [60, 80], "counts": [1200]}
RUNS = compressed(MASK)["counts"]
FOREIGN = RUNS[:-1] + chr(ord(RUNS[-1]) - 32)  # the same five bits, in a character that the format does not have
WARNING = {
    "unknown image": (annotation(image_id=9), "annotation 100 (image 9)"),
    "no segmentation": (segmentation(None), "annotation 100"),
    "empty segmentation": (segmentation([]), "annotation 100"),
    "polygon of two points": (segmentation([[1, 2, 3, 4]]), "annotation 100"),
    "polygon of an odd length": (segmentation([SQUARE[:7]]), "annotation 100"),
    "polygon that is not finite": (segmentation([[*SQUARE[:7], float("nan")]]), "annotation 100"),
    "polygon beyond any image": (segmentation([[*SQUARE[:7], 1e9]]), "annotation 100"),
    "polygon of text": (segmentation([["1", "2"] * 3]), "annotation 100"),
    "one bad polygon of two": (segmentation([SQUARE, [1, 2]]), "annotation 100"),
    "runs of another size": (segmentation(compressed(MASK.T)), "annotation 100"),
    "runs too short": (segmentation(HALF), "annotation 100"),
    "runs below zero": (segmentation({**HALF, "counts": [4801, -1]}), "annotation 100"),
    "compressed runs too short": (segmentation({**HALF, "counts": "o0o0o0"}), "annotation 100"),
    "compressed runs that break off": (segmentation({**HALF, "counts": RUNS + "P"}), "annotation 100"),
    "runs in other characters": (segmentation({**HALF, "counts": FOREIGN}), "annotation 100"),
    "runs that are none": (segmentation({**HALF, "counts": None}), "annotation 100"),
    "box that is not finite": (annotation(bbox=[1, 2, float("inf"), 4]), "annotation 100"),
    "box without a width": (annotation(bbox=[1, 2, 0, 4]), "annotation 100"),
    "box of three numbers": (annotation(bbox=[1, 2, 3]), "annotation 100"),
    "box outside the image": (annotation(bbox=[90, 5, 20, 20]), "annotation 100"),
    "box of corners": (annotation(bbox=[70, 50, 75, 58]), "(x0, y0, x1, y1), not (x, y, w, h) (1): annotation 100"),
    "area below zero": (annotation(area=-3), "annotation 100"),
    "area beyond any": (annotation(area=1e11), "annotation 100"),
    "polygon outside the image": (segmentation([[200, 200, 220, 200, 220, 220]]), "annotation 100"),
    "polygon without area": (segmentation([[10, 10, 20, 10, 30, 10]]), "annotation 100"),
    "runs without a pixel": (segmentation(compressed(0 * MASK)), "annotation 100"),
}


@pytest.mark.parametrize(("fault", "place"), [pytest.param(*case, id=name) for name, case in FATAL.items()])
def test_a_fault_that_must_stop_a_run_is_found_and_named(tmp_path, fault, place):
    report = data.check(opened(write(tmp_path, [{}], fault=fault)), decode=False)
    assert report.fatal and place in str(report)


@pytest.mark.parametrize(("fault", "place"), [pytest.param(*case, id=name) for name, case in WARNING.items()])
def test_a_fault_that_can_be_left_out_is_a_warning_and_left_out(tmp_path, fault, place):
    dataset = opened(write(tmp_path, [{}], fault=fault))
    report = data.check(dataset, decode=False)
    assert not report.fatal and len(report.warnings) == 1 and place in str(report)
    assert all(len(target["labels"]) <= 1 for _, target in dataset)
    for whole in dataset.json["annotations"]:
        assert np.array_equal(rle.decode(compressed_runs(whole["segmentation"], 60, 80)), MASK)
        assert whole["bbox"] == [10, 20, 20, 20]


def numbers_as_floats(coco):
    return json.loads(json.dumps(coco), parse_int=float)


@pytest.mark.parametrize("form", [compressed, uncompressed])
def test_whole_numbers_that_passed_through_floats_are_whole_again(tmp_path, form):
    folder = write(tmp_path, [{"segmentation": form(MASK)}])
    path = folder / "annotations" / "instances_val.json"
    path.write_text(json.dumps(numbers_as_floats(json.loads(path.read_text()))))
    dataset = opened(folder)
    assert str(data.check(dataset, decode=True)) == ""
    assert np.array_equal(dataset[0][1]["masks"][0], MASK == 1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (image(id="7"), "id is '7', not a whole number"),
        (image(width="80"), "width is '80', not a whole number"),
        (annotation(category_id="cat"), "category_id is 'cat', not a whole number"),
        ({"categories": [{"id": 7, "name": 5}]}, "name is '5', not text"),
    ],
)
def test_a_field_of_the_wrong_type_is_shown_with_what_is_wanted(tmp_path, fault, said):
    assert said in str(data.check(opened(write(tmp_path, [{}], fault=fault)), decode=False))


def test_names_with_backslashes_and_absolute_ones_inside_the_folder_are_found(tmp_path):
    folder = write(tmp_path, [{}])
    for name in ("val\\a.png", str(folder / "val" / "a.png")):
        dataset = opened(write(folder, [{}], fault=image(file_name=name)))
        assert str(data.check(dataset, decode=True)) == "" and len(dataset[0][1]["labels"]) == 1


place = st.integers(-30, 110)
outlines = st.lists(place | st.floats(-5, 90), min_size=4, max_size=12)
runs = st.sampled_from([compressed(MASK), uncompressed(MASK), compressed(0 * MASK)])
anything = st.fixed_dictionaries(
    {
        "segmentation": st.lists(outlines, max_size=2) | runs,
        "iscrowd": st.sampled_from([0, 0, 0, 1, "0", None]),
        "image_id": st.sampled_from([1, 2]),
        "category_id": st.sampled_from([3, 7]),
    },
    optional={
        "bbox": st.lists(place, min_size=4, max_size=4),
        "area": st.sampled_from([0, -1, 5, 1e11, "7", None, float("nan")]),
    },
)


@settings(deadline=None, max_examples=60)
@given(st.lists(anything, max_size=8))
def test_perfect_predictions_of_whatever_the_check_lets_pass_have_an_ap_of_100(annotations):
    truth, _ = checks.sound(
        {
            "images": [{"id": i, "file_name": "conftest.py", "width": 80, "height": 60} for i in (1, 2)],
            "annotations": [{"id": number, **a} for number, a in enumerate(annotations)],
            "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        },
        Path(__file__).parent,
    )
    seen = [a for a in truth["annotations"] if not a["iscrowd"]]
    keys = ("image_id", "category_id", "bbox")
    masks = [compressed_runs(a["segmentation"], 60, 80) for a in seen]
    perfect = [{k: a[k] for k in keys} | {"segmentation": m, "score": 0.9} for a, m in zip(seen, masks, strict=True)]
    metrics = average_precision(truth, perfect)
    assert all(value is None or value == pytest.approx(100) for value in metrics.values())
    assert not seen or metrics["AP_box"] == metrics["AP_mask"] == pytest.approx(100)


def test_crowds_are_counted_with_what_that_means_and_said_to_be_why_nothing_is_left(tmp_path):
    folder = write(tmp_path, [{"iscrowd": 1}, {"iscrowd": 1}, {"image_id": 2}])
    assert "2 of 3 objects are crowds" in data.require_sound(opened(folder), "x")
    with pytest.raises(ValueError, match="no images with objects.*CVAT"):
        data.require_sound(opened(write(folder, [{"iscrowd": 1}]), training=True), "x")


def test_more_objects_in_an_image_than_ap_counts_are_reported(tmp_path):
    assert "image 1 (101)" in str(data.check(opened(write(tmp_path, [{}] * 101)), decode=False))


def test_sound_data_has_nothing_to_report(tmp_path):
    report = data.check(opened(write(tmp_path, [{}, {"segmentation": compressed(MASK), "iscrowd": 1}])), decode=True)
    assert (report.fatal, report.warnings, str(report)) == ({}, {}, "")


def test_all_problems_are_counted_and_the_first_five_shown(tmp_path):
    report = data.check(opened(write(tmp_path, [{"category_id": 91}] * 7 + [{"segmentation": []}])), decode=False)
    errors, warnings = str(report).splitlines()
    assert errors.startswith("error: ") and "(7): annotation 100 (91), " in errors
    assert "annotation 104" in errors and "annotation 105" not in errors and errors.endswith(" and 2 more")
    assert warnings == "warning: segmentations that cannot be decoded (1): annotation 107"


def test_training_needs_an_object_somewhere(tmp_path):
    assert "no images with objects" in str(data.check(opened(write(tmp_path, []), training=True), decode=False))


# ---- Layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "name"), [("val", "a.png"), (".", "pictures/a.png"), ("images/val", "a.png"), ("images", "x/a.png")]
)
def test_images_are_found_in_the_usual_places(tmp_path, images, name):
    write(tmp_path, [{}], images=[(1, "a.png")])
    (tmp_path / images / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "val" / "a.png").rename(tmp_path / images / name)
    json_file = tmp_path / "annotations" / "instances_val.json"
    json_file.write_text(json_file.read_text().replace("a.png", name))
    dataset = opened(tmp_path)
    assert not data.check(dataset, decode=True).fatal and len(dataset[0][1]["labels"]) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("coco", ["instances_{train,val}2017.json", "https://cocodataset.org/#download"]),
        ("bdd100k", ["images/10k", "ins_seg", "https://bdd-data.berkeley.edu"]),
        ("somewhere", ["annotations/instances_train*.json"]),
    ],
)
def test_data_that_are_not_there_say_what_is_expected_and_who_offers_it(tmp_path, name, words):
    with pytest.raises(FileNotFoundError) as error:
        open_dataset(Source(name, str(tmp_path)), "train", identity, training=True)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_coco_lies_under_the_data_root_or_is_the_data_root(tmp_path):
    write(tmp_path / "coco", [{}])
    for root in (tmp_path, tmp_path / "coco"):
        assert len(open_dataset(Source("coco", str(root)), "val", identity, training=True)) == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"images": [], "annotations": {}, "categories": []}'])
def test_a_file_that_is_no_coco_json_is_named(tmp_path, content):
    (write(tmp_path, []) / "annotations" / "instances_val.json").write_text(content)
    with pytest.raises(ValueError, match="instances_val.json"):
        opened(tmp_path)


def test_two_jsons_for_one_split_are_refused(tmp_path):
    folder = write(tmp_path, []) / "annotations"
    shutil.copy(folder / "instances_val.json", folder / "instances_val2.json")
    with pytest.raises(ValueError, match="which one"):
        opened(tmp_path)


def exported(folder, layout):
    """The folder of `write` as a tool exports it."""
    content = json.loads((write(folder, [{}, {"image_id": 2}]) / "annotations" / "instances_val.json").read_text())
    (folder / "annotations" / "instances_val.json").unlink()
    file = "_annotations.coco.json"
    cvat = [(f"annotations/instances_{subset}.json", f"images/{subset}", "") for subset in ("Train", "Validation")]
    places = {  # json, folder of the images, and what stands before their names
        "Roboflow": [(f"train/{file}", "train", ""), (f"valid/{file}", "valid", "")],
        "Roboflow without valid": [(f"train/{file}", "train", ""), (f"test/{file}", "test", "")],
        "CVAT": [("annotations/instances_default.json", "images", "")],
        "CVAT subsets": cvat,
        "Label Studio": [("result.json", "images", "images\\")],
    }[layout]
    for path, images, before in places:
        (folder / images).mkdir(parents=True, exist_ok=True)
        (folder / path).parent.mkdir(exist_ok=True)
        for image, name in zip(content["images"], ("a.png", "b.png"), strict=True):
            image["file_name"] = before + name
            shutil.copy(folder / "val" / name, folder / images / name)
        (folder / path).write_text(json.dumps(content))
    shutil.rmtree(folder / "val")
    return folder


@pytest.mark.parametrize("layout", ["Roboflow", "Roboflow without valid", "CVAT", "CVAT subsets", "Label Studio"])
def test_what_labelling_tools_export_opens_as_it_is(tmp_path, layout):
    folder = exported(tmp_path, layout)
    sets = [open_dataset(Source(str(folder)), split, identity, split == "train") for split in ("train", "val")]
    shared = layout in ("CVAT", "Label Studio")  # a single json: one image of ten, here one of two, is held out
    assert [len(dataset) for dataset in sets] == ([1, 1] if shared else [2, 2])
    for dataset in sets:
        report = data.check(dataset, decode=True)
        assert not report.fatal and bool(report.warnings) == shared
    if shared:
        assert set(sets[0].image_ids).isdisjoint(sets[1].image_ids)


def test_a_json_and_a_folder_can_be_given_outright(tmp_path):
    write(tmp_path, [{}, {"image_id": 2}])
    (tmp_path / "val").rename(tmp_path / "photos")
    path = (tmp_path / "annotations" / "instances_val.json").rename(tmp_path / "my.json")
    for jsons, lengths in (({"train_json": path}, [1, 1]), ({"train_json": path, "val_json": path}, [2, 2])):
        source = Source("x", image_folder=str(tmp_path / "photos"), **jsons)
        sets = [open_dataset(source, split, identity, False) for split in ("train", "val")]
        assert [len(dataset) for dataset in sets] == lengths


def test_images_are_taken_from_the_folder_that_has_most_of_them(tmp_path):
    write(tmp_path, [{}], images=[(i, f"{i}.png") for i in range(1, 6)])
    (tmp_path / "images").mkdir()
    for number in range(2, 6):
        (tmp_path / "val" / f"{number}.png").rename(tmp_path / "images" / f"{number}.png")
    assert opened(tmp_path).folder == tmp_path / "images"


# ---- BDD100K ---------------------------------------------------------------------------------------------------------

BDD100K_OBJECTS = [  # names as in the rles json, with attributes and what they must become: (category_id, iscrowd)
    ("car", {}, (3, 0)),
    ("person", {"occluded": True}, (1, 0)),
    ("bike", {}, (8, 0)),
    ("rider", {"crowd": True}, (2, 1)),
    ("bus", {"ignored": True}, (5, 1)),
    ("other vehicle", {}, (3, 1)),
    ("traffic light", {}, None),
]


def bdd100k_masks():
    masks = np.zeros((len(BDD100K_OBJECTS), 720, 1280), np.uint8)
    for number, mask in enumerate(masks):
        mask[100 * number : 100 * number + 60, 50 : 300 + number] = 1
    return masks


def write_bdd100k(root, form):
    """An image with objects and one without in BDD100K's layout, in one of its two formats."""
    (root / "images" / "10k" / "val").mkdir(parents=True)
    for name in ("x.jpg", "y.jpg"):
        Image.new("RGB", (1280, 720)).save(root / "images" / "10k" / "val" / name)
    labels, pixels = [], np.zeros((720, 1280, 4), np.uint8)
    for number, mask in enumerate(bdd100k_masks(), 255):
        name, attributes, expected = BDD100K_OBJECTS[number - 255]
        labels.append({"id": str(number), "category": name, "attributes": attributes, "rle": compressed(mask)})
        if expected:
            flags = 4 * attributes.get("occluded", 0) + 2 * attributes.get("crowd", 0) + attributes.get("ignored", 0)
            flags |= name == "other vehicle"
            pixels[mask == 1] = (expected[0], flags, number >> 8, number & 255)
    folder = root / "labels" / "ins_seg"
    if form == "rles":
        (folder / "rles").mkdir(parents=True)
        frames = [{"name": "x.jpg", "labels": labels}, {"name": "y.jpg"}]
        (folder / "rles" / "ins_seg_val.json").write_text(json.dumps({"frames": frames}))
    else:
        (folder / "bitmasks" / "val").mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "bitmasks" / "val" / "x.png")
        Image.fromarray(0 * pixels).save(folder / "bitmasks" / "val" / "y.png")


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"name": "x.jpg", "labels": [{}]}]'])
def test_a_file_that_is_no_json_of_bdd100k_is_named(tmp_path, content):
    write_bdd100k(tmp_path, "rles")
    (tmp_path / "labels" / "ins_seg" / "rles" / "ins_seg_val.json").write_text(content)
    with pytest.raises(ValueError, match="ins_seg_val.json"):
        open_dataset(Source("bdd100k", str(tmp_path)), "val", identity, training=False)


@pytest.mark.parametrize("form", ["rles", "bitmasks"])
def test_bdd100k_is_read_with_crowds_and_ignored_objects_set_apart(tmp_path, form):
    write_bdd100k(tmp_path / "bdd100k", form)
    dataset = open_dataset(Source("bdd100k", str(tmp_path)), "val", identity, training=False)
    assert not data.check(dataset, decode=True).fatal and len(dataset) == 2
    assert dataset.classes == ["pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert sorted((a["category_id"], a["iscrowd"]) for a in dataset.json["annotations"]) == sorted(
        expected for *_, expected in BDD100K_OBJECTS if expected
    )
    _, target = dataset[0]
    found = dict(zip(target["labels"].tolist(), target["masks"].numpy(), strict=True))
    assert sorted(found) == [0, 2, 7]
    for label, number in ((2, 0), (0, 1), (7, 2)):
        assert np.array_equal(found[label], bdd100k_masks()[number] == 1)


# ---- Shapes ----------------------------------------------------------------------------------------------------------


def made(folder, name="shapes"):
    shapes.make_shapes(folder, shapes.SHAPES[name]._replace(images={"train": 6, "val": 24}))
    return opened(folder)


def test_shapes_are_the_same_in_any_order_and_with_any_number_of_workers(tmp_path):
    made(tmp_path / "set", "shapes-full")
    (tmp_path / "val").mkdir()
    for image_id in (17, 3):  # alone, in this process
        shapes._make_image(shapes.SHAPES["shapes-full"], tmp_path / "val", image_id)
        name = f"val/{image_id:06}.jpg"
        assert (tmp_path / name).read_bytes() == (tmp_path / "set" / name).read_bytes()
    assert (tmp_path / "set/val/000003.jpg").read_bytes() != (tmp_path / "set/train/000003.jpg").read_bytes()


@pytest.mark.parametrize("name", ["shapes", "shapes-full"])
def test_masks_of_shapes_are_what_can_be_seen_and_the_check_finds_nothing(tmp_path, name):
    dataset = made(tmp_path / name, name)
    assert str(data.check(dataset, decode=True)) == ""
    recipe = shapes.SHAPES[name]
    for pixels, target in dataset:
        assert recipe.side[0] <= min(pixels.shape[1:]) and max(pixels.shape[1:]) <= recipe.side[1]
        assert len(target["labels"]) <= recipe.objects
        assert target["masks"].sum(0).max() <= 1  # no pixel belongs to two objects
    assert dataset.category_ids == [2, 3, 5, 7, 11, 13, 17, 19]
    assert dataset.classes == ["disk", "square", "triangle", "star", "ring", "cross", "crescent", "bar"]


def test_shapes_are_made_once_and_an_interrupted_set_leaves_nothing(tmp_path, monkeypatch):
    made(tmp_path / "whole")
    monkeypatch.setattr(shapes, "_make_image", fails_in_the_end)
    with pytest.raises(RuntimeError, match="interrupted"):
        made(tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert len(made(tmp_path / "whole")) == 24


def fails_in_the_end(recipe, folder, image_id):
    if image_id == 20:
        raise RuntimeError("interrupted")
    return {}, []


def test_processes_that_make_one_set_at_a_time_end_with_one_whole_set(tmp_path):
    with ProcessPoolExecutor(2) as pool:
        assert [len(dataset) for dataset in pool.map(made, [tmp_path / "set"] * 2)] == [24, 24]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert data.check(opened(tmp_path / "set"), decode=True).fatal == {}


def test_shapes_are_reachable_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "shapes", shapes.SHAPES["shapes"]._replace(images={"train": 5, "val": 2}))
    assert len(open_dataset(Source("shapes", str(tmp_path)), "val", identity, training=False)) == 2
    assert (tmp_path / "shapes" / "annotations" / "instances_train.json").is_file()


AREAS = {  # of the outlines at radius 1, by geometry
    "disk": np.pi,
    "square": 2,
    "triangle": 3 * 3**0.5 / 4,
    "star": 5 * 0.42 * np.sin(np.pi / 5),
    "ring": np.pi * (1 - 0.25),
    "cross": 20 / 10,
    "bar": 4 * 0.22,
}


@pytest.mark.parametrize("name", AREAS)
def test_outlines_enclose_the_area_that_geometry_gives_them(name):
    y, x = np.mgrid[-1.2:1.2:0.005, -1.2:1.2:0.005]
    inside = shapes.OUTLINES[name](x, y) < 0
    assert inside.sum() * 0.005**2 == pytest.approx(AREAS[name], rel=0.01)  # the grid's error
