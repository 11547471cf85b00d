"""What datasets/ promises."""

import contextlib
import io
import json
import shutil
import struct
import unicodedata
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
from datasets.images import find_images, read_image
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


def write(folder, objects, names=((1, "a.png"), (2, "b.png")), **lists):
    """A COCO folder with grey images of 80 x 60 and objects, whose defaults are an id and a square on image 1.

    lists: of the json, to put in place of the sound ones.
    """
    (folder / "val").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for _, name in names:
        Image.new("RGB", (80, 60), (90, 90, 90)).save(folder / "val" / name)
    default = {"image_id": 1, "category_id": 7, "segmentation": [SQUARE]}
    coco = {
        "images": [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in names],
        "annotations": [{"id": number, **default, **a} for number, a in enumerate(objects, 100)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        **lists,
    }
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(coco))
    return folder


def opened(folder, geometry=identity, training=False, split="val", source=None):
    return open_dataset(source or Source(str(folder)), split, geometry, training)


def said(dataset, decode=False):
    """What is said of a data set, and whether a fault would stop a run."""
    try:
        return data.require_sound(dataset, "it", decode), False
    except ValueError as error:
        return str(error), True


# ---- COCO's own annotations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_annotation_of_coco_loads_as_pycocotools_decodes_it(folder, split):
    """96 photos of COCO where they lie beside the clone, else made-up ones."""
    if COCO_MINI.is_dir():
        path = COCO_MINI / "annotations" / f"instances_{split}2017.json"
        dataset = opened(folder, split=split, source=Source("coco", str(COCO_MINI)))
    else:
        path = folder / "annotations" / f"instances_{split}.json"
        dataset = opened(folder, split=split)
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


# ---- Images ----------------------------------------------------------------------------------------------------------

HALVES = Image.fromarray(np.repeat([[0] * 40 + [255] * 40], 60, 0).astype(np.uint8))  # black and white
SIXTEEN = Image.fromarray(np.asarray(HALVES).astype(np.uint16) * 257)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned clockwise by 90 degrees when shown


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "16 bit", "EXIF"])
def test_images_of_every_mode_load_as_upright_rgb(tmp_path, mode):
    path = write(tmp_path, [{}]) / "val" / "a.png"
    if mode == "16 bit":
        SIXTEEN.save(path)
    elif mode == "EXIF":
        HALVES.transpose(Image.Transpose.ROTATE_90).save(path, exif=EXIF)
    else:
        HALVES.convert("RGB").convert(mode).save(path, format="JPEG" if mode == "CMYK" else None)
    pixels, _ = opened(tmp_path)[0]
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
    assert said(dataset) == ("", False)
    text, stops = said(dataset, decode=True)
    assert stops and "a.png" in text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: Image.fromarray(np.float32([[0, 1e6]])).save(path, "TIFF"), "32 bits"),
        (lambda path: Image.fromarray(np.int32([[0, 1e6]])).save(path, "TIFF"), "32 bits"),
        (lambda path: path.write_text("P6 15000 13000 255 "), "truncated"),  # Pillow's own limit is 178 million
        (lambda path: path.write_text("P6 35000 30000 255 "), "1050000000 pixels"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: None, "there is no such file"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, make, words):
    make(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"a.png cannot be read as an image: .*{words}"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), KeyError(7), MemoryError(), OverflowError("x")])
def test_whatever_pillow_raises_names_the_file_in_one_line(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ValueError, match="a.png cannot be read as an image: .+") as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


MAKER = struct.pack(">HHII", 0x010F, 2, 500, 9999)  # a text that begins far behind the end
TURNED = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)


@pytest.mark.parametrize("tags", [MAKER + TURNED + bytes(4), TURNED + MAKER, TURNED + MAKER[:5]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_photo_is_upright_though_the_rest_of_its_metadata_is_damaged(tmp_path, tags):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + tags)
    assert read_image(tmp_path / "a.jpg").size == (20, 30)


def save(path, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4)).save(path, format=kind)


def test_a_folder_of_images_is_what_a_person_sees_in_it(tmp_path, capsys):
    folder = tmp_path / "photos"
    kinds = {"a.jpg": "JPEG", "b.jfif": "JPEG", "c.TGA": "TGA", "d": "WEBP", "in/e.photo": "TIFF"}
    for name, kind in kinds.items():
        save(folder / name, kind)
    save(folder / "out" / "a_found.png")
    save(tmp_path / "elsewhere" / "f.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "in" / "above").symlink_to(folder)
    for name in (".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/._a.jpg", ".DS_Store", "e.heic", "g.json"):
        save(folder / name)
    (folder / "e.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "g.json").write_text("{}")
    (folder / "broken.png").write_text("")
    found = ["a.jpg", "b.jfif", "broken.png", "c.TGA", "d", "in/e.photo", "link/f.png"]
    assert list(find_images([folder], folder / "out")) == found
    assert "passed over 5" in (text := capsys.readouterr().err) and "e.heic" in text and "\n" not in text.strip()


def test_images_are_called_by_their_paths_from_what_they_have_in_common(tmp_path):
    for name in ("x/a.png", "y/a.png"):
        save(tmp_path / name)
    (tmp_path / "x" / "broken.jpg").write_text("")
    out = tmp_path / "out"
    assert list(find_images([tmp_path / "x" / "broken.jpg", tmp_path / "x" / "a.png"], out)) == ["broken.jpg", "a.png"]
    assert list(find_images([tmp_path / "x" / "a.png", tmp_path / "y"], out)) == ["x/a.png", "y/a.png"]
    (tmp_path / "z").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        find_images([tmp_path / "z"], out)


# ---- Targets ---------------------------------------------------------------------------------------------------------

TWO_PARTS = [[10, 20, 20, 20, 20, 40, 10, 40], [20, 20, 30, 20, 30, 40, 20, 40]]


@pytest.mark.parametrize("segmentation", [[SQUARE], TWO_PARTS, compressed(MASK), uncompressed(MASK)])
def test_polygons_and_both_kinds_of_run_lengths_give_one_mask(tmp_path, segmentation):
    dataset = opened(write(tmp_path, [{"segmentation": segmentation}]))
    assert np.array_equal(dataset[0][1]["masks"].numpy(), MASK[None].astype(bool))


def test_a_target_has_labels_in_the_order_of_category_ids_and_padded_boxes(tmp_path):
    dataset = opened(write(tmp_path, [{"category_id": 7}, {"category_id": 3}]))
    _, target = dataset[0]
    assert dataset.classes == ["dog", "cat"] and dataset.category_ids == [3, 7] and target["image_id"] == 1
    assert target["labels"].tolist() == [1, 0] and target["labels"].dtype == torch.int64
    assert target["masks"].dtype == torch.bool and target["boxes"].dtype == torch.float32
    # 80 x 60 is padded to 96 x 64.
    assert torch.allclose(target["boxes"], torch.tensor([20 / 96, 30 / 64, 20 / 96, 20 / 64]).expand(2, 4))


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


def test_what_a_crop_leaves_of_an_object_is_its_mask_and_its_box(tmp_path):
    folder = write(tmp_path, [{"segmentation": [[50, 0, 80, 0, 80, 60, 50, 60]], "category_id": 3}, {}])
    image, target = opened(folder, lambda rng, width, height: Geometry((60, 80), (32, 32), (25, 15)))[0]
    assert image.shape == (3, 32, 32)
    assert target["labels"].tolist() == [1]
    assert np.array_equal(target["masks"][0], MASK[25:57, 15:47] == 1)
    assert torch.allclose(target["boxes"], torch.tensor([[7.5, 7.5, 15, 15]]) / 32)


def test_ground_truth_is_complete_for_evaluation(tmp_path):
    dataset = opened(write(tmp_path, [{"id": 0}, {"id": 5, "area": 1.5, "bbox": [11, 22, 18, 17]}]))
    first, second = dataset.json["annotations"]
    assert (first["iscrowd"], first["area"], first["bbox"]) == (0, 400, [10, 20, 20, 20])
    assert first["id"] == 6  # pycocotools takes annotation 0 for no match
    assert (second["area"], second["bbox"]) == (1.5, [11, 22, 18, 17])


def test_the_chance_of_a_sample_depends_on_seed_epoch_and_image_alone(tmp_path):
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


# ---- What is wrong with the data -------------------------------------------------------------------------------------


def image(**changes):
    return {"images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60} | changes]}


def annotation(**changes):
    return {"annotations": [{"id": 100, "image_id": 1, "category_id": 7, "segmentation": [SQUARE]} | changes]}


def segmentation(value):
    return annotation(segmentation=value)


FATAL = {
    "unknown category": (annotation(category_id=91), "the categories, 7, 3 (1): annotation 100 (91)"),
    "annotation id twice": ({"annotations": annotation()["annotations"] * 2}, "annotation 100"),
    "image id twice": ({"images": image()["images"] * 2}, "image 1"),
    "category name of no text": (
        {"categories": [{"id": 7, "name": 5}]},
        "name is not text (1): category at position 0",
    ),
    "no categories": ({"categories": [], "annotations": []}, "no categories"),
    "no images": ({"images": [], "annotations": []}, "no images"),
    "image without a size": (image(width=None), "width is not a whole number (1): image at position 0 (None)"),
    "image without pixels": (image(width=0), "image 1"),
    "image id of words": (image(id="first"), "id is not a whole number (1): image at position 0 (first)"),
    "image id below zero": (image(id=-1), "negative"),
    "annotation without an image": (annotation(image_id=None), "annotation at position 0"),
    "annotation that is no object": ({"annotations": ["?"]}, "annotation at position 0"),
    "missing file": (image(file_name="c.png"), "image 1 (c.png)"),
    "path upwards": (image(file_name="../val/a.png"), "files missing in"),
    "path upwards for Windows": (image(file_name="..\\val\\a.png"), "files missing in"),
    "absolute path": (image(file_name="/etc/passwd"), "files missing in"),
    "empty path": (image(file_name=""), "image 1 ()"),
}
HALF = {"size": [60, 80], "counts": [1200]}
RUNS = compressed(MASK)["counts"]
FOREIGN = RUNS[:-1] + chr(ord(RUNS[-1]) - 32)  # the same five bits, in a character that the format does not have
WARNING = {
    "unknown image": (annotation(image_id=9), "unknown images"),
    "no segmentation": (segmentation(None), "without a mask"),
    "empty segmentation": (segmentation([]), "without a mask"),
    "empty polygon": (segmentation([[]]), "without a mask"),
    "segmentation of an empty cell": (segmentation(float("nan")), "without a mask"),
    "polygon of two points": (segmentation([[1, 2, 3, 4]]), "three points or more"),
    "polygon of an odd length": (segmentation([SQUARE[:7]]), "three points or more"),
    "polygon that is not finite": (segmentation([[*SQUARE[:7], float("nan")]]), "finite numbers"),
    "polygon beyond any image": (segmentation([[*SQUARE[:7], 1e9]]), "finite numbers"),
    "polygon of text": (segmentation([["1", "2"] * 3]), "finite numbers"),
    "polygon of points": (segmentation([[[10, 20], [30, 20], [30, 40]]]), "[x0, y0, x1, y1, ...]"),
    "polygon of named points": (segmentation([{"x": 10, "y": 20}]), "[x0, y0, x1, y1, ...]"),
    "polygon of shares": (segmentation([[0.1, 0.2, 0.5, 0.2, 0.5, 0.6]]), "shares of the image"),
    "one bad polygon of two": (segmentation([SQUARE, [1, 2]]), "three points or more"),
    "text": (segmentation("[[1, 2, 3, 4, 5, 6]]"), "[x0, y0, x1, y1, ...]"),
    "runs of width and height": (segmentation(compressed(MASK.T)), "[height, width] of their image"),
    "runs of another size": (segmentation(compressed(MASK[1:])), "[height, width] of their image"),
    "runs too short": (segmentation(HALF), "do not cover"),
    "runs below zero": (segmentation({**HALF, "counts": [4801, -1]}), "cannot be decoded"),
    "compressed runs too short": (segmentation({**HALF, "counts": "o0o0o0"}), "do not cover"),
    "compressed runs that break off": (segmentation({**HALF, "counts": RUNS + "P"}), "cannot be decoded"),
    "runs in other characters": (segmentation({**HALF, "counts": FOREIGN}), "cannot be decoded"),
    "runs that Python printed": (segmentation({**HALF, "counts": f"b'{RUNS}'"}), "bytes"),
    "runs that are none": (segmentation({**HALF, "counts": None}), "cannot be decoded"),
    "box that is not finite": (annotation(bbox=[1, 2, float("inf"), 4]), "boxes"),
    "box without a width": (annotation(bbox=[1, 2, 0, 4]), "boxes"),
    "box of three numbers": (annotation(bbox=[1, 2, 3]), "boxes"),
    "box outside the image": (annotation(bbox=[90, 5, 20, 20]), "boxes"),
    "area below zero": (annotation(area=-3), "areas"),
    "area beyond any": (annotation(area=1e11), "areas"),
    "polygon outside the image": (segmentation([[200, 200, 220, 200, 220, 220]]), "nothing lies in the image"),
    "polygon without area": (segmentation([[10, 10, 20, 10, 30, 10]]), "nothing lies in the image"),
    "runs without a pixel": (segmentation(compressed(0 * MASK)), "nothing lies in the image"),
}


@pytest.mark.parametrize(("fault", "words"), FATAL.values(), ids=FATAL)
def test_a_fault_that_must_stop_a_run_is_found_and_named(tmp_path, fault, words):
    text, stops = said(opened(write(tmp_path, [{}], **fault)))
    assert stops and words in text


@pytest.mark.parametrize(("fault", "words"), WARNING.values(), ids=WARNING)
def test_a_fault_that_can_be_left_out_is_told_by_its_cause_and_left_out(tmp_path, fault, words):
    dataset = opened(write(tmp_path, [], **fault))
    text, stops = said(dataset)
    (line,) = (line for line in text.splitlines() if "annotation 100" in line)
    assert not stops and words in line
    for whole in dataset.json["annotations"]:
        assert np.array_equal(rle.decode(compressed_runs(whole["segmentation"], 60, 80)), MASK)
        assert whole["bbox"] == [10, 20, 20, 20]


@pytest.mark.parametrize("form", [compressed, uncompressed])
@pytest.mark.parametrize("other", [float, str])
def test_ids_of_another_type_that_mean_the_same_are_the_same(tmp_path, form, other):
    """In a single json too. Of floats, run lengths too: one empty cell of a table makes floats of all."""
    path = write(tmp_path, [{"segmentation": form(MASK)}, {"image_id": 2}]) / "annotations" / "instances_val.json"
    content = json.loads(path.read_text(), parse_int=float if other is float else None)
    for key, fields in {"images": ["id", "width"], "annotations": ["image_id", "category_id"]}.items():
        for field in fields:
            content[key][0][field] = other(content[key][0][field])
    path.with_stem("instances_train").write_text(json.dumps(content))
    path.unlink()
    (tmp_path / "val").rename(tmp_path / "train")
    train, val = (opened(tmp_path, training=True, split=split) for split in ("train", "val"))
    assert (train.image_ids, val.image_ids) == ([2], [1]) and "unknown" not in said(val)[0]
    assert np.array_equal(val[0][1]["masks"][0], MASK == 1)


NAMES = {  # in the json, on the disk
    "composed": ("\u00fcber.png", unicodedata.normalize("NFD", "\u00fcber.png")),
    "capitals": ("Photo.JPG", "photo.jpg"),
    "escaped": ("a%20b.png", "a b.png"),
    "folder": ("In/a.png", "in/a.png"),
    "backslash": ("in\\a.png", "in/a.png"),
    "absolute": ("{folder}/val/a.png", "a.png"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_mean_a_file_lead_to_it_and_are_told_if_they_look_other(tmp_path, name):
    listed, stored = NAMES[name]
    folder = write(tmp_path, [{}], **image(file_name=listed.format(folder=tmp_path)))
    (folder / "val" / stored).parent.mkdir(exist_ok=True)
    (folder / "val" / "a.png").replace(folder / "val" / stored)
    dataset = opened(folder)
    text, stops = said(dataset)
    assert not stops and len(dataset[0][1]["labels"]) == 1
    assert (stored in text) == bool(text) == (name not in ("backslash", "absolute"))


def test_the_nearest_name_is_shown_where_none_is_the_same(tmp_path):
    folder = write(tmp_path, [{}], [(1, "IMG_0001.png"), (2, "b.png")], **image(file_name="IMG_0001.jpg"))
    assert "nearest is IMG_0001.png" in said(opened(folder))[0]


BOXES = {  # of an object at x 10 to 30, y 20 to 40 of 80 x 60
    "corners": [10, 20, 30, 40],
    "centre": [20, 30, 20, 20],
    "shares": [10 / 80, 20 / 60, 20 / 80, 20 / 60],
    "of a smaller image": [5, 10, 10, 10],
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize(("fitting", "left"), [(1, 20), (20, 18)])
def test_boxes_that_do_not_fit_their_masks_are_taken_from_those(tmp_path, box, fitting, left):
    """And all the others too where more than a tenth do not fit, as the format of all is in doubt."""
    dataset = opened(write(tmp_path, [{"bbox": box}, *[{"bbox": [11, 21, 18, 18]}] * fitting]))
    text, stops = said(dataset)
    assert not stops and "[x, y, width, height]" in text and "(1): annotation 100" in text
    boxes = [a["bbox"][2:] for a in dataset.json["annotations"]]
    assert boxes == [[20, 20]] + [[left, left]] * fitting


def test_a_file_under_several_ids_is_one_image_with_all_their_objects(tmp_path):
    twice = {"images": image()["images"] + image(id=5, file_name="./a.png")["images"]}
    dataset = opened(write(tmp_path, [{}, {"image_id": 5}], **twice))
    text, stops = said(dataset)
    assert not stops and "a.png (1 and 5)" in text
    assert dataset.image_ids == [1] and len(dataset[0][1]["labels"]) == 2
    assert opened(write(tmp_path, [], **twice)).image_ids == [1, 5]  # a test set: results under each id are wanted


def test_validation_images_that_are_training_images_are_found(tmp_path):
    train, val = (opened(write(tmp_path / name, [{}])) for name in ("train", "val"))
    Image.new("RGB", (80, 60), (90, 90, 91)).save(val.folder / "a.png")
    (train.folder / "b.png").rename(train.folder / "c.png")
    train.images[2]["file_name"] = "c.png"
    assert data.seen_in_training(train, val).endswith("(1): b.png")
    assert data.seen_in_training(train, opened(write(tmp_path, [], [], images=[]))) == ""


def test_classes_of_one_name_are_told_apart(tmp_path):
    dataset = opened(write(tmp_path, [{}, {"category_id": 3}], categories=[{"id": i, "name": "cat"} for i in (7, 3)]))
    assert dataset.classes == ["cat (3)", "cat (7)"] and "classes of one name" in said(dataset)[0]


def test_a_json_without_annotations_opens_for_prediction_alone(tmp_path):
    path = write(tmp_path, []) / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in ("images", "categories")}))
    dataset = opened(tmp_path)
    text, stops = said(dataset)
    assert not stops and not dataset.annotated and len(dataset) == 2 and "no AP" in text
    assert opened(write(tmp_path, [{}])).annotated
    assert "no images with objects" in said(opened(write(tmp_path, []), training=True))[0]


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
def test_perfect_predictions_of_what_the_check_lets_pass_have_an_ap_of_100(annotations):
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


def test_crowds_are_counted_with_what_that_means(tmp_path):
    folder = write(tmp_path, [{"iscrowd": 1}, {"iscrowd": "1"}, {"image_id": 2, "iscrowd": "0"}])
    assert "are crowds (iscrowd: 1)" in (text := said(opened(folder))[0]) and "(2): annotation 100, " in text
    text, stops = said(opened(write(folder, [{"iscrowd": 1}]), training=True))
    assert stops and "no images with objects" in text and "CVAT" in text


def test_all_problems_are_counted_and_the_first_five_shown(tmp_path):
    text, _ = said(opened(write(tmp_path, [{"category_id": 91}] * 7 + [{"segmentation": []}, {}])))
    _, errors, warnings = text.splitlines()
    assert errors.startswith("error: ") and "(7): annotation 100 (91), " in errors
    assert "annotation 104" in errors and "annotation 105" not in errors and errors.endswith(" and 2 more")
    assert warnings.startswith("warning: ") and warnings.endswith("(1): annotation 107")


# ---- Layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "name"), [("val", "a.png"), (".", "pictures/a.png"), ("images/val", "a.png"), ("images", "x/a.png")]
)
def test_images_are_found_in_the_usual_places(tmp_path, images, name):
    write(tmp_path, [{}], names=[(1, "a.png")], **image(file_name=name))
    (tmp_path / images / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "val" / "a.png").rename(tmp_path / images / name)
    dataset = opened(tmp_path)
    assert said(dataset) == ("", False) and len(dataset[0][1]["labels"]) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("coco", ["instances_{train,val}2017.json", "https://cocodataset.org/#download"]),
        ("bdd100k", ["images/10k", "ins_seg", "https://bdd-data.berkeley.edu"]),
        ("somewhere", ["annotations/instances_train*.json"]),
    ],
)
def test_data_that_are_not_there_say_what_is_expected_and_from_whom(tmp_path, name, words):
    with pytest.raises(FileNotFoundError) as error:
        open_dataset(Source(name, str(tmp_path)), "train", identity, training=True)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_coco_lies_under_the_data_root_or_is_the_data_root(tmp_path):
    write(tmp_path / "coco", [{}])
    for root in (tmp_path, tmp_path / "coco"):
        assert len(opened(tmp_path, training=True, source=Source("coco", str(root)))) == 1


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


ROBOFLOW = "_annotations.coco.json"
EXPORTS = {  # of each split the json, the folder of the images, and what stands before their names
    "Roboflow": [(f"{name}/{ROBOFLOW}", name, "") for name in ("train", "valid")],
    "Roboflow without valid": [(f"{name}/{ROBOFLOW}", name, "") for name in ("train", "test")],
    "CVAT": [("annotations/instances_default.json", "images", "")],
    "CVAT subsets": [(f"annotations/instances_{name}.json", f"images/{name}", "") for name in ("Train", "Validation")],
    "Label Studio": [("result.json", "images", "images\\")],
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_what_labelling_tools_export_opens_as_it_is(tmp_path, tool):
    original = write(tmp_path / "original", [{}, {"image_id": 2}])
    content = json.loads((original / "annotations" / "instances_val.json").read_text())
    folder = tmp_path / "exported"
    for path, images, before in EXPORTS[tool]:
        shutil.copytree(original / "val", folder / images)
        (folder / path).parent.mkdir(exist_ok=True)
        for record, name in zip(content["images"], ("a.png", "b.png"), strict=True):
            record["file_name"] = before + name
        (folder / path).write_text(json.dumps(content))
    sets = [opened(folder, training=split == "train", split=split) for split in ("train", "val")]
    shared = len(EXPORTS[tool]) == 1  # one image of ten, here one of two, is held out
    assert [len(dataset) for dataset in sets] == ([1, 1] if shared else [2, 2])
    assert [said(dataset)[1] for dataset in sets] == [False, False]
    assert [bool(said(dataset)[0]) for dataset in sets] == [shared, shared]
    assert not shared or set(sets[0].image_ids).isdisjoint(sets[1].image_ids)


def test_of_several_years_of_coco_2017_is_taken_and_said(tmp_path):
    path = write(tmp_path, [{}]) / "annotations" / "instances_val.json"
    for year in (2014, 2017):
        shutil.copy(path, path.with_name(f"instances_val{year}.json"))
        shutil.copytree(tmp_path / "val", tmp_path / f"val{year}")
    path.unlink()
    dataset = opened(tmp_path)
    assert dataset.folder.name == "val2017"
    assert "instances_val2017.json, which is taken" in said(dataset)[0] and "instances_val2014.json" in said(dataset)[0]


def test_a_json_and_a_folder_can_be_given_outright(tmp_path):
    write(tmp_path, [{}, {"image_id": 2}])
    (tmp_path / "val").rename(tmp_path / "photos")
    path = (tmp_path / "annotations" / "instances_val.json").rename(tmp_path / "my.json")
    for jsons, lengths in (({"train_json": path}, [1, 1]), ({"train_json": path, "val_json": path}, [2, 2])):
        source = Source("x", image_folder=str(tmp_path / "photos"), **jsons)
        assert [len(opened(tmp_path, split=split, source=source)) for split in ("train", "val")] == lengths


def test_images_are_taken_from_the_folder_that_has_most_of_them(tmp_path):
    write(tmp_path, [{}], names=[(i, f"{i}.png") for i in range(1, 4)])
    (tmp_path / "images").mkdir()
    for name in ("2.png", "3.png"):
        (tmp_path / "val" / name).rename(tmp_path / "images" / name)
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
BDD100K_MASKS = np.zeros((len(BDD100K_OBJECTS), 720, 1280), np.uint8)
for number, mask in enumerate(BDD100K_MASKS):
    mask[100 * number : 100 * number + 60, 50 : 300 + number] = 1


def write_bdd100k(root):
    """An image with objects and one without in BDD100K's layout. Returns the path of the json."""
    (root / "images" / "10k" / "val").mkdir(parents=True)
    for name in ("x.jpg", "y.jpg"):
        Image.new("RGB", (1280, 720)).save(root / "images" / "10k" / "val" / name)
    labels = []
    for (name, attributes, _), mask in zip(BDD100K_OBJECTS, BDD100K_MASKS):
        labels.append({"id": name, "category": name, "attributes": attributes, "rle": compressed(mask)})
    path = root / "labels" / "ins_seg" / "rles" / "ins_seg_val.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"frames": [{"name": "y.jpg"}, {"name": "x.jpg", "labels": labels}]}))
    return path


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"name": "x.jpg", "labels": [{}]}]'])
def test_a_file_that_is_no_json_of_bdd100k_is_named(tmp_path, content):
    write_bdd100k(tmp_path).write_text(content)
    with pytest.raises(ValueError, match="ins_seg_val.json"):
        opened(tmp_path, source=Source("bdd100k", str(tmp_path)))


def test_bdd100k_is_read_with_crowds_and_ignored_objects_set_apart(tmp_path):
    write_bdd100k(tmp_path / "bdd100k")
    dataset = opened(tmp_path, source=Source("bdd100k", str(tmp_path)))
    assert not said(dataset, decode=True)[1] and len(dataset) == 2
    assert dataset.classes == ["pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    found = [(a["category_id"], a["iscrowd"]) for a in dataset.json["annotations"]]
    assert found == [expected for *_, expected in BDD100K_OBJECTS if expected]
    _, target = dataset[0]
    found = dict(zip(target["labels"].tolist(), target["masks"].numpy(), strict=True))
    assert sorted(found) == [0, 2, 7]
    for label, number in ((2, 0), (0, 1), (7, 2)):
        assert np.array_equal(found[label], BDD100K_MASKS[number] == 1)


# ---- Shapes ----------------------------------------------------------------------------------------------------------


def made(root, split="test"):
    shapes.IMAGES.update(train=6, val=4, test=20)  # in another process too
    return opened(root, split=split, source=Source("shapes", str(root)))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The root of a few synthetic images of each split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "IMAGES", {})
        root = tmp_path_factory.mktemp("few")
        for split in ("test", "train", "val"):
            made(root, split)
        yield root


def test_shapes_are_the_same_in_any_order_and_number_of_workers(tmp_path, few):
    (tmp_path / "test").mkdir()
    for image_id in (17, 3):  # alone, in this process
        shapes._make_image(tmp_path / "test", image_id)
        name = f"test/{image_id:06}.jpg"
        assert (tmp_path / name).read_bytes() == (few / "shapes" / name).read_bytes()
    assert (tmp_path / "test/000003.jpg").read_bytes() != (few / "shapes/train/000003.jpg").read_bytes()


def test_the_test_split_begins_with_the_images_of_val(few):
    test = made(few, "test")
    val = made(few, "val")
    assert (len(test), len(val)) == (20, 4)
    for index in range(4):
        assert torch.equal(test[index][0], val[index][0])
        assert torch.equal(test[index][1]["masks"], val[index][1]["masks"])


def test_other_data_have_their_validation_images_for_a_test_split(tmp_path):
    write(tmp_path, [{}])
    assert opened(tmp_path, split="test").image_ids == opened(tmp_path).image_ids


def test_masks_of_shapes_are_what_can_be_seen_and_nothing_is_wrong(few):
    dataset = made(few)
    assert said(dataset, decode=True) == ("", False)
    for pixels, target in dataset:
        assert pixels.shape == (3, 128, 128) and len(target["labels"]) <= 4
        assert target["masks"].sum(0).max() <= 1  # no pixel belongs to two objects
    assert dataset.category_ids == [2, 3, 5, 7, 11, 13, 17, 19]
    assert dataset.classes == ["disk", "square", "triangle", "star", "ring", "cross", "crescent", "bar"]


def test_shapes_are_made_once_and_an_interrupted_split_leaves_nothing(tmp_path, few, monkeypatch):
    monkeypatch.setattr(shapes, "_make_image", fails_in_the_end)
    with pytest.raises(RuntimeError, match="interrupted"):
        made(tmp_path)
    assert not list(tmp_path.rglob("*.jpg")) + list(tmp_path.rglob("*.json"))
    assert len(made(few)) == 20


def fails_in_the_end(folder, image_id):
    if image_id == 20:
        raise RuntimeError("interrupted")
    return {}, []


def test_processes_that_make_one_split_at_a_time_end_with_a_whole_one(tmp_path, few):
    with ProcessPoolExecutor(2) as pool:
        assert [len(dataset) for dataset in pool.map(made, [tmp_path] * 2)] == [20, 20]
    assert sorted(path.name for path in (tmp_path / "shapes").iterdir()) == ["annotations", "test"]
    assert said(made(tmp_path), decode=True) == ("", False)


def test_the_first_held_out_images_are_those_that_earlier_curves_are_of(few):
    dataset = made(few, "val")
    objects = [(a["image_id"], a["category_id"]) for a in dataset.json["annotations"]]
    assert objects[:4] == [(1, 2), (2, 17), (2, 19), (3, 5)]
    areas = [a["area"] for a in dataset.json["annotations"]]
    assert areas[:4] == pytest.approx([736, 1366, 467, 993], abs=2)  # another machine may round a pixel differently
