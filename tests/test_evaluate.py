"""What evaluate.py promises."""

import contextlib
import dataclasses
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
from datasets import coco as data
from datasets.geometry import identity
from dimaskdino import Config, DIMaskDINO, postprocess
from evaluate import flop_of
from small_runs import exit_code, log_of, same, train_in, write_images
from util.distributed import amp_for, warn_of_emulation
from util.pictures import draw, draw_dataset
from util.weights import load_model, read_checkpoint

HERE = Path(__file__).parents[1]

# ---- Evaluation ------------------------------------------------------------------------------------------------------


def coco_index(content):
    index = COCO()
    index.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def predictions(truth, shift=0, score=0.9):
    """Every object of a COCO dict as a result, its mask moved right by some pixels and its box by twice as many."""
    index, results = coco_index(json.loads(json.dumps(truth))), []
    for annotation in truth["annotations"]:
        mask = np.roll(index.annToMask(annotation), shift, 1)
        code = rle.encode(np.asfortranarray(mask))
        x, y, w, h = annotation["bbox"]
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "score": score,
                "bbox": [x + 2 * shift, y, w, h],
                "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
            }
        )
    return results


def truth_of(folder):
    return data.open_dataset(str(folder), ".", "val", identity, training=False).json


def test_perfect_predictions_give_100_and_none_gives_0(folder):
    perfect = evaluate.average_precision(truth_of(folder), predictions(truth_of(folder)))
    nothing = evaluate.average_precision(truth_of(folder), [])
    present = {name for name, value in perfect.items() if value is not None}
    assert {"AP_box", "AP_mask", "AP_box_S"} <= present
    for name in perfect:
        assert perfect[name] == (pytest.approx(100) if name in present else None)
        assert nothing[name] == (0 if name in present else None)


def square(x, y, width, height):
    """A mask of 160 x 160 pixels, run-length encoded."""
    mask = np.zeros((160, 160), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    code = rle.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


@pytest.mark.parametrize("shift", [0, 2, 7])
def test_average_precision_is_that_of_pycocotools(folder, shift):
    truth = truth_of(folder)
    results = [r for i in range(3) for r in predictions(truth, shift * i, score=0.9 - 0.3 * i)]
    ours = evaluate.average_precision(truth, results, per_class=True)
    for name, kind in (("AP_box", "bbox"), ("AP_mask", "segm")):
        ground = coco_index(json.loads(json.dumps(truth)))
        kept = [{k: v for k, v in r.items() if k != "bbox" or kind == "bbox"} for r in results]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(ground, ground.loadRes(kept), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for suffix, place in evaluate.AREAS.items():
            theirs = evaluation.stats[place]
            assert ours[name + suffix] == (None if theirs < 0 else pytest.approx(100 * theirs, abs=1e-9))
        of_classes = evaluation.eval["precision"][..., 0, -1].mean((0, 1))
        assert [ours["classes"][i][name] for i in (2, 5, 8)] == pytest.approx(100 * of_classes, abs=1e-9)


def test_average_precision_of_a_small_set_is_what_one_works_out_by_hand():
    medium, small, crowd = (10, 10, 40, 40), (60, 60, 20, 20), (110, 110, 50, 50)  # x, y, width, height
    objects = [
        {
            "id": i,
            "bbox": list(box),
            "area": box[2] * box[3],
            "segmentation": square(*box),
            "iscrowd": int(box == crowd),
        }
        for i, box in enumerate((medium, small, crowd), 1)
    ]
    truth = {
        "images": [{"id": 7, "file_name": "7.png", "width": 160, "height": 160}],
        "categories": [{"id": 4, "name": "a"}],
        "annotations": [{**one, "image_id": 7, "category_id": 4} for one in objects],
    }
    found = [  # score, box, mask
        (0.9, (110, 110, 20, 20), square(110, 110, 20, 20)),  # on the crowd, so it counts neither for nor against
        (0.8, medium, square(*medium)),  # perfect
        (0.7, (0, 0, 100, 100), square(0, 140, 10, 10)),  # wrong: a large box with a small mask
        (0.6, (60, 60, 20, 15.5), square(*small)),  # a perfect mask, but the IoU of the box is 15.5 / 20 = 0.775
    ]
    results = [
        {"image_id": 7, "category_id": 4, "score": score, "bbox": list(box), "segmentation": mask}
        for score, box, mask in found
    ]
    # AP is the mean, over the IoU thresholds 0.5, 0.55, ..., 0.95, of the precision at recall 0, 0.01, ..., 1.
    # Where both objects count as found, the order is right, wrong, right: precision 1 up to a recall of 0.5, which is
    # 51 of the 101 places, and 2/3 at the other 50. Where the small one does not, nothing is found beyond 0.5.
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 101
    expected = {
        "AP_box": (6 * both + 4 * one) / 10,  # thresholds 0.5 to 0.75 accept the small box, the other four do not
        "AP_box_50": both,
        "AP_box_S": 0.6,  # only what is small counts: the wrong box is large, the small object is found 6 times of 10
        "AP_box_M": 1,
        "AP_mask": both,
        "AP_mask_50": both,
        "AP_mask_S": 0.5,  # the wrong mask is small and comes first: precision 1/2 at every recall
        "AP_mask_M": 1,
    }
    metrics = evaluate.average_precision(truth, results)
    assert metrics == {name: pytest.approx(100 * value) for name, value in expected.items()} | {
        "AP_box_L": None,
        "AP_mask_L": None,
    }


def test_results_carry_pixels_of_the_original_image_and_category_ids():
    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 5:9, 11:13] = True
    detections = {
        "boxes": torch.tensor([[11.0, 5.0, 13.0, 9.0]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.5]),
        "masks": masks,
    }
    (result,) = evaluate.coco_results(detections, 42, [3, 17])
    assert (result["image_id"], result["category_id"], result["bbox"], result["score"]) == (42, 17, [11, 5, 2, 4], 0.5)
    assert np.array_equal(rle.decode(result["segmentation"]), masks[0].numpy())


def test_the_table_has_the_papers_columns_and_a_dash_where_there_is_no_object():
    metrics = {name + area: 12.345 for name in ("AP_box", "AP_mask") for area in ("", "_50", "_S", "_M", "_L")}
    head, _, row = evaluate.table([("tiny", {**metrics, "AP_mask_L": None})]).splitlines()
    assert head.replace("|", "").split() == ["AP_box", "S", "M", "L", "AP_mask", "S", "M", "L"]
    assert row.replace("|", "").split() == ["tiny", *["12.3"] * 7, "-"]


def test_evaluate_prints_the_ap_that_training_logged_and_every_layers(folder, trained, tmp_path, capsys):
    flags = [
        "--ckpt",
        trained / "last.pt",
        "--data",
        folder,
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--layers",
        "--per-class",
        "--speed",
        "--draw",
        2,
        "--json",
        tmp_path / "metrics.json",
    ]
    assert exit_code(evaluate.main, [*map(str, flags)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| layer")]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(rows) == len(metrics["layers"]) == 1 + read_checkpoint(trained / "last.pt")["config"]["decoder_layers"]
    logged = [record for record in log_of(trained) if "AP_box" in record][-1]
    for name in ("AP_box", "AP_mask", "AP_box_S"):
        assert metrics[name] == metrics["layers"][-1][name] == pytest.approx(logged[name], rel=1e-5)
    assert metrics["FPS_without_postprocessing"] >= metrics["FPS"] > 0
    model = load_model(trained / "last.pt")
    assert metrics["GFLOP"] == flop_of(model, torch.zeros(1, 3, 48, 64, dtype=torch.uint8)) / 1e9 > 0
    assert metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for name in ("AP_box", "AP_mask"):  # every class has objects
        assert np.mean([of_class[name] for of_class in metrics["classes"].values()]) == pytest.approx(metrics[name])
    assert [*metrics["classes"]] == model.classes
    assert len(list((tmp_path / "pictures").iterdir())) == 2 and (tmp_path / "predictions.json").exists()


@pytest.mark.parametrize("validation, images", [((), 2), (("--val-json", "instances_val.json"), 5)])
def test_a_checkpoint_finds_the_files_it_was_trained_with(folder, tmp_path, capsys, validation, images):
    """Without one for validation, every tenth of the 12 images of the only json."""
    annotations = folder / "annotations"
    validation = [annotations / x if x.endswith(".json") else x for x in validation]
    assert train_in("none", tmp_path, "--train-json", annotations / "instances_train.json", *validation) == 0
    assert run(tmp_path / "last.pt", "--out", tmp_path / "found", "--device", "cpu") == 0
    assert f"over {images} images" in capsys.readouterr().out


def test_evaluate_refuses_data_of_other_classes_and_names_those_that_differ(trained, tmp_path, capsys):
    write_images(tmp_path, "val", 1, classes=("box", "lid"))
    assert exit_code(evaluate.main, ["--ckpt", str(trained / "last.pt"), "--data", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "last.pt has plate, tile;" in message and f"{tmp_path} has lid" in message and "box" not in message


def test_own_images_get_pictures_and_only_what_reaches_the_score(folder, trained, tmp_path):
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (90, 70), "red").save(photo)
    flags = ["--ckpt", trained / "last.pt", "--device", "cpu", "--out", tmp_path / "found", "--images", photo]
    kept = []
    for score in ("0", "0.02", "1"):
        assert exit_code(evaluate.main, [*map(str, flags), "--score", score]) == 0
        kept.append(json.loads((tmp_path / "found" / "predictions.json").read_text()))
    assert len(kept[0]) == 18 and kept[2] == []
    assert kept[1] == [result for result in kept[0] if result["score"] >= 0.02]
    assert kept[0][0]["segmentation"]["size"] == [70, 90] and kept[0][0]["category"] in ("box", "plate", "tile")
    assert (tmp_path / "found" / "photo_found.png").exists()


@pytest.fixture(scope="module")
def model(trained):
    return load_model(trained / "last.pt")


def test_of_all_layers_results_only_one_layers_are_held_at_a_time(folder, trained, tmp_path, monkeypatch):
    held, measure = [], evaluate.average_precision

    def counting(truth, results, per_class):
        gc.collect()
        held.append(sum(type(x) is dict and {"score", "segmentation"} <= x.keys() for x in gc.get_objects()))
        assert len(results) == 5 * 18  # of each image
        return measure(truth, results, per_class)

    monkeypatch.setattr(evaluate, "average_precision", counting)
    assert run(trained / "last.pt", "--data", folder, "--layers", "--out", tmp_path) == 0
    assert len(held) == 3 and max(held) < 2 * 5 * 18


def give_instructions(patch, names):
    """A CPU has these; or a GPU has those for bf16, if it is named."""
    patch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or "bf16" in names)


@pytest.mark.parametrize(
    "device, backbone, instructions, amp",
    [
        ("cuda", "tiny", ("bf16",), "bf16"),
        ("cuda", "resnet50", (), "off"),
        ("cpu", "resnet50", (), "off"),
        ("cpu", "resnet50", ("avx512_bf16",), "bf16"),
        ("cpu", "swin_l", ("amx_bf16",), "bf16"),
        ("cpu", "tiny", ("avx512_bf16", "amx_bf16"), "off"),
    ],
)
def test_autocast_is_bf16_where_it_pays(device, backbone, instructions, amp, monkeypatch):
    give_instructions(monkeypatch, instructions)
    assert amp_for(torch.device(device), backbone) == amp


@pytest.mark.parametrize(
    "device, amp, instructions, warned",
    [
        ("cpu", "bf16", (), True),
        ("cpu", "bf16", ("avx512_fp16",), True),
        ("cpu", "fp16", ("avx512_bf16", "amx_bf16"), True),
        ("cpu", "fp16", ("amx_fp16",), False),
        ("cpu", "bf16", ("avx512_bf16",), False),
        ("cpu", "off", (), False),
        ("cuda", "bf16", ("bf16",), False),
        ("cuda", "bf16", (), True),
        ("cuda", "fp16", (), False),
    ],
)
def test_who_asks_for_emulated_numbers_is_warned(device, amp, instructions, warned, monkeypatch, capsys):
    give_instructions(monkeypatch, instructions)
    warn_of_emulation(torch.device(device), amp)
    assert (f"no instructions for {amp}" in capsys.readouterr().out) == warned


def test_training_and_evaluation_warn_of_emulation(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert train_in(folder, tmp_path / "run", "--amp", "bf16") == 0
    assert capsys.readouterr().out.count("no instructions for bf16") == 1
    assert run(tmp_path / "run" / "last.pt", "--data", folder, "--amp", "bf16", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("no instructions for bf16") == 1


def test_whoever_does_not_say_gets_the_autocast_that_pays(folder, trained, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "amp_for", lambda *_: "bf16")
    path = folder / "val" / "1.png"
    found, half, whole = (evaluate.predict(model, path, amp=amp)["scores"] for amp in (None, "bf16", "off"))
    assert torch.equal(found, half) and not torch.equal(found, whole)
    for flags, used in ((), "bf16"), (("--amp", "off"), "off"):
        assert run(trained / "last.pt", "--data", folder, "--out", tmp_path / used, *flags) == 0
        assert f"autocast {used}" in capsys.readouterr().out
    both = [json.loads((tmp_path / used / "predictions.json").read_text()) for used in ("bf16", "off")]
    assert both[0] != both[1]


def test_predict_takes_a_file_a_picture_an_array_or_a_tensor_and_finds_the_same(folder, model):
    path = folder / "val" / "1.png"
    picture = Image.open(path)
    array = np.asarray(picture)
    tensor = torch.tensor(array).permute(2, 0, 1)
    expected = evaluate.predict(model, path)
    for image in (str(path), picture, array, tensor):
        found = evaluate.predict(model, image)
        assert found.pop("names") == expected["names"]
        assert same(found, {name: expected[name] for name in found})


def test_predict_gives_what_reaches_the_score_best_first_in_pixels_of_the_image(folder, model):
    path = folder / "val" / "1.png"  # 64 x 48
    found = evaluate.predict(model, path)
    scores = found["scores"].tolist()
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 2
    assert found["names"] == [model.classes[label] for label in found["labels"]]
    assert found["masks"].shape == (18, 48, 64) and found["masks"].dtype == torch.bool
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([64, 48, 64, 48])).all()
    for least in (scores[2], 1.1):
        fewer = evaluate.predict(model, path, least)
        assert fewer["scores"].tolist() == [score for score in scores if score >= least]
        assert len(fewer["masks"]) == len(fewer["names"]) == len(fewer["scores"]) < 18


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        torch.zeros(4, 4, 3).byte(),
        torch.zeros(4, 4).byte(),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_predict_says_what_an_image_is_where_it_gets_something_else(model, image):
    with pytest.raises(ValueError, match="uint8, as an array .H W 3. or a tensor .3 H W."):
        evaluate.predict(model, image)


@pytest.mark.parametrize("size", [(1, 1), (200, 4), (3, 150), (33, 31)])
def test_images_of_any_size_and_shape_give_boxes_inside_them_and_masks_of_their_size(trained, tmp_path, size):
    Image.new("RGB", size, "blue").save(tmp_path / "image.png")
    flags = ["--ckpt", trained / "last.pt", "--device", "cpu", "--out", tmp_path, "--score", "0"]
    assert exit_code(evaluate.main, [*map(str, flags), "--images", str(tmp_path / "image.png")]) == 0
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert results
    for x, y, w, h in (result["bbox"] for result in results):
        assert x >= 0 and y >= 0 and x + w <= size[0] + 1e-3 and y + h <= size[1] + 1e-3  # sums of float32
    assert {tuple(result["segmentation"]["size"]) for result in results} == {size[::-1]}


def test_a_picture_shows_what_reaches_the_score_and_nothing_else(folder):
    dataset = data.open_dataset(str(folder), ".", "val", identity, training=False)
    image = data.read_record(dataset.folder, dataset.images[1])
    names = dict(zip(dataset.category_ids, dataset.classes, strict=True))
    found = [r for r in predictions(dataset.json) if r["image_id"] == 1]
    found[0]["bbox"] = [-30, -5, 400, 0]  # boxes are not clipped to the image
    plain, shown = (np.asarray(draw(image, found, names, score)) for score in (0.95, 0.5))
    assert plain.shape == shown.shape == (480, 640, 3)
    assert np.array_equal(plain[5::10, 5::10], np.asarray(image)) and not np.array_equal(plain, shown)


def test_each_query_is_drawn_once_with_its_best_class_and_masks_never_hide_one_another_in_black(folder):
    dataset = data.open_dataset(str(folder), ".", "val", identity, training=False)
    image = data.read_record(dataset.folder, dataset.images[1])
    names = dict(zip(dataset.category_ids, dataset.classes, strict=True))
    found = [r for r in predictions(dataset.json) if r["image_id"] == 1]
    doubts = [{**one, "category_id": c, "score": 0.4} for one in found for c in names if c != one["category_id"]]
    best = draw(image, found, names)
    assert np.array_equal(np.asarray(draw(image, doubts + found, names)), np.asarray(best))
    whole = {**found[0], "bbox": [0, 0, 64, 48], "category_id": 5, "segmentation": compressed(np.ones((48, 64)))}
    black = (np.asarray(draw(image, [whole, *found], names)) == 0).all(2)
    assert black.mean() < 0.1  # the thin line inside an outline


def compressed(mask):
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


def test_where_nothing_reaches_the_score_the_best_are_drawn(folder, tmp_path):
    dataset = data.open_dataset(str(folder), ".", "val", identity, training=False)
    assert draw_dataset(dataset, predictions(dataset.json, score=0.02), [0, 1], tmp_path) == 0.02
    assert draw_dataset(dataset, predictions(dataset.json), [0, 1], tmp_path) == 0.3
    assert Image.open(tmp_path / "1.png").size == (2 * 640 + 8, 480 + 26)  # the truth beside what was found


# ---- Data, names and ids ---------------------------------------------------------------------------------------------


def run(checkpoint, *flags):
    return exit_code(evaluate.main, ["--ckpt", str(checkpoint), "--device", "cpu", *map(str, flags)])


def spoiled(folder, tmp_path, change):
    """A copy of the data whose validation json is changed."""
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    path = copy / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    change(content, copy)
    path.write_text(json.dumps(content))
    return copy


FAULTS = {
    "missing file": (lambda coco, copy: (copy / "val" / "2.png").unlink(), 2, "2.png"),
    "ids twice": (lambda coco, copy: coco["images"].append(coco["images"][0]), 2, "ids used twice"),
    "unknown category": (lambda coco, copy: coco["annotations"][0].update(category_id=91), 2, "(91)"),
    "no image": (lambda coco, copy: coco.update(images=[], annotations=[]), 2, "no images"),
    "no mask": (lambda coco, copy: coco["annotations"][0].update(segmentation=None), 0, "cannot be decoded (1)"),
    "crowd": (lambda coco, copy: coco["annotations"][0].update(iscrowd=1), 0, "are crowds"),
}


@pytest.mark.parametrize(("change", "code", "said"), [pytest.param(*case, id=name) for name, case in FAULTS.items()])
def test_evaluation_stops_and_warns_as_training_does(folder, trained, tmp_path, capsys, change, code, said):
    copy = spoiled(folder, tmp_path, change)
    assert run(trained / "best.pt", "--data", copy, "--out", tmp_path / "out") == code
    evaluated = "".join(capsys.readouterr())
    assert train_in(copy, tmp_path / "run") == code
    assert said in evaluated and said in "".join(capsys.readouterr())


def test_evaluation_says_over_how_many_images_and_objects_ap_is(folder, trained, tmp_path, capsys):
    assert run(trained / "best.pt", "--data", folder, "--out", tmp_path) == 0
    assert f"over 5 images with {len(truth_of(folder)['annotations'])} objects" in capsys.readouterr().out


def test_category_ids_are_kept_and_written_everywhere(folder, trained, tmp_path):
    assert read_checkpoint(trained / "best.pt")["category_ids"] == [2, 5, 8]
    image = folder / "val" / "1.png"
    assert run(trained / "best.pt", "--images", image, "--out", tmp_path, "--score", 0) == 0
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert {(r["category_id"], r["category"]) for r in found} <= {(2, "box"), (5, "plate"), (8, "tile")}


def changed(trained, path, **changes):
    checkpoint = {**read_checkpoint(trained / "best.pt"), **changes}
    torch.save({name: value for name, value in checkpoint.items() if value is not None}, path)
    return path


def test_an_older_checkpoint_without_ids_still_evaluates_and_finds(folder, trained, tmp_path):
    old = changed(trained, tmp_path / "old.pt", category_ids=None)
    assert load_model(old).category_ids == [0, 1, 2]
    assert run(old, "--data", folder, "--out", tmp_path / "a") == 0
    assert run(old, "--images", folder / "val" / "1.png", "--out", tmp_path / "b") == 0


def test_a_file_without_names_gets_neutral_ones_or_those_of_the_data_but_never_cocos(folder, trained, tmp_path, capsys):
    bare = changed(trained, tmp_path / "bare.pt", classes=None, category_ids=None, data=None)
    image = ["--images", folder / "val" / "1.png", "--score", 0]
    assert run(bare, *image, "--out", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "class 0" in said and "--data" in said and "person" not in said
    assert run(bare, *image, "--data", folder, "--out", tmp_path / "b") == 0
    assert "plate" in capsys.readouterr().out
    assert run(bare, "--data", folder, "--out", tmp_path / "c") == 0
    assert run(bare, "--out", tmp_path / "d") == 2 and "add --data" in capsys.readouterr().err


def test_80_classes_without_names_are_cocos_with_its_ids(trained, tmp_path):
    model = DIMaskDINO(dataclasses.replace(Config.tiny(), num_classes=80))
    torch.save({"model": model.state_dict(), "config": dataclasses.asdict(model.config)}, tmp_path / "80.pt")
    loaded = load_model(tmp_path / "80.pt")
    assert (loaded.classes[79], loaded.category_ids[79], loaded.trained_on) == ("toothbrush", 90, "coco")


# ---- Nothing is lost -------------------------------------------------------------------------------------------------


def photos(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(folder / name)
    return folder


def found_in(out):
    return sorted({result["image_id"] for result in json.loads((out / "predictions.json").read_text())})


def test_an_unreadable_image_is_named_and_the_others_are_found(trained, tmp_path, capsys):
    photos(tmp_path / "in", "a.jpg", "c.jpg")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no image")
    assert run(trained / "best.pt", "--images", tmp_path / "in", "--out", tmp_path / "out", "--score", 0) == 2
    assert found_in(tmp_path / "out") == ["a.jpg", "c.jpg"] and "b.jpg cannot be read" in capsys.readouterr().err


def signal_in(patch, name, number):
    """A signal at the second call of a function of evaluate.py."""
    action, calls = getattr(evaluate, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return action(*args)

    patch.setattr(evaluate, name, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", ["--images", "--data"])
def test_a_signal_ends_in_a_line_and_keeps_what_was_found(folder, trained, tmp_path, monkeypatch, capsys, number, work):
    signal_in(monkeypatch, "outputs_of", number)
    where = folder / "val" if work == "--images" else folder
    assert run(trained / "best.pt", work, where, "--out", tmp_path, "--score", 0) == 128 + number
    assert len(found_in(tmp_path)) == 1
    said = "".join(capsys.readouterr())
    assert "found on 1 of 5 images" in said and "Traceback" not in said


def test_a_signal_or_a_fault_while_ap_is_measured_keeps_what_was_found(folder, trained, tmp_path, monkeypatch, capsys):
    signal_in(monkeypatch, "average_precision", signal.SIGINT)
    flags = ("--data", folder, "--layers", "--out")
    assert run(trained / "best.pt", *flags, tmp_path) == 128 + signal.SIGINT
    said = capsys.readouterr()
    assert "found on 5 of 5 images" in said.err and "| layer 0 " in said.out
    monkeypatch.setattr(evaluate, "average_precision", None)
    with pytest.raises(TypeError):
        run(trained / "best.pt", *flags, tmp_path / "again")
    assert found_in(tmp_path) == found_in(tmp_path / "again") and len(found_in(tmp_path)) == 5
    monkeypatch.setattr(evaluate, "outputs_of", None)  # where nothing was found, what an earlier command left stays
    with pytest.raises(TypeError):
        run(trained / "best.pt", *flags, tmp_path)
    assert len(found_in(tmp_path)) == 5


def test_too_little_memory_ends_in_a_line_and_keeps_what_was_found(folder, trained, tmp_path, monkeypatch, capsys):
    action, calls = evaluate.outputs_of, []

    def too_large(*args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return action(*args)

    monkeypatch.setattr(evaluate, "outputs_of", too_large)
    assert "smaller --test-size" in run(trained / "best.pt", "--data", folder, "--out", tmp_path)
    assert len(found_in(tmp_path)) == 2


def test_the_metrics_are_kept_where_measuring_the_speed_fails(folder, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "speed", lambda *_: sys.exit(7))
    flags = ("--speed", "--json", tmp_path / "m.json", "--out", tmp_path)
    assert run(trained / "best.pt", "--data", folder, *flags) == 7
    assert "AP_box" in json.loads((tmp_path / "m.json").read_text())


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_no_command_takes_or_changes_what_was_there(folder, trained, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(trained, home / "run")
    shutil.copytree(folder, home / "data")
    photos(home / "photos", "a.jpg")
    best = home / "run" / "best.pt"
    commands = [
        lambda: run(best, "--data", home / "data", "--draw", 1),
        lambda: run(best, "--images", home / "photos"),
        lambda: run(best, "--images", home / "photos", "--out", home / "run"),
        lambda: train_in(home / "data", home / "run"),
        lambda: train_in(home / "data", home / "run", "--check"),
    ]
    for command in commands * 2:
        before = tree(home)
        command()
        after = tree(home)
        assert all(after.get(path) == content for path, content in before.items())
    names = {path.name for path in (home / "run").iterdir() if path.is_dir()}
    assert names == {"pictures", "best_on_data", "best_on_data_2", "best_on_images", "best_on_images_2"}


@pytest.mark.parametrize(
    "flags",
    [("--json", "new/m.json"), ("--out", "file/b"), ("--out", "file"), ("--json", "file/m.json"), ("--json", ".")],
)
def test_outputs_are_made_or_refused_before_any_work(folder, trained, tmp_path, monkeypatch, capsys, flags):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    sound = flags[1] == "new/m.json"
    if not sound:
        monkeypatch.setattr(evaluate, "outputs_of", None)
    assert run(trained / "best.pt", "--data", folder, "--out", "out", *flags) == (0 if sound else 2)
    assert (tmp_path / "new" / "m.json").exists() == sound
    assert sound or flags[1] in capsys.readouterr().err
    if flags[0] == "--out":
        assert train_in(folder, flags[1]) == 2 and flags[1] in capsys.readouterr().err


@pytest.mark.parametrize("out", ["photos", ".", "photos/found"])
def test_images_are_found_wherever_the_results_go(trained, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", "a.jpg")
    assert run(trained / "best.pt", "--images", "photos", "--out", out, "--score", 0) == 0
    assert found_in(tmp_path / out) == ["a.jpg"]
    if out == "photos/found":  # what was drawn there is no photo
        assert run(trained / "best.pt", "--images", "photos", "--out", out, "--score", 0) == 0
        assert found_in(tmp_path / out) == ["a.jpg"]


def test_folders_of_images_are_searched_and_equal_names_stay_apart(trained, tmp_path):
    photos(tmp_path / "in", "a.jpg", "x/a.JPG", "x/y/b.png", "x/b.jpg")
    (tmp_path / "in" / "notes.txt").write_text("")
    assert run(trained / "best.pt", "--images", tmp_path / "in", "--out", tmp_path / "out", "--score", 0) == 0
    assert found_in(tmp_path / "out") == ["a.jpg", "x/a.JPG", "x/b.jpg", "x/y/b.png"]
    drawn = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert drawn == {"a_found.png", "x/a_found.png", "x/b_found.png", "x/y/b_found.png"}
    files = [tmp_path / "in" / name for name in ("a.jpg", "x/a.JPG")]
    assert run(trained / "best.pt", "--images", *files, "--out", tmp_path / "two", "--score", 0) == 0
    assert found_in(tmp_path / "two") == ["a.jpg", "x/a.JPG"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--workers", -1), "-1 is not at least 0"),
        (("--draw", -2), "-2 is not at least 0"),
        (("--test-size", 0, 9), "0 is not at least 1"),
        (("--ckpt", "nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (("--ckpt", "."), ". is a folder"),
        (("--images", "nothing.jpg"), "nothing.jpg cannot be read as an image: there is no such file"),
        (("--images", "nothing.jpg", "--json", "a.json", "--per-class"), "leave out --per-class and --json"),
        (("--images", "nothing.jpg", "--draw", 1), "leave out --draw"),
    ],
)
def test_a_wrong_flag_gets_a_line_and_exit_code_2(trained, tmp_path, capsys, flags, named):
    assert run(trained / "best.pt", "--out", tmp_path, *flags) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message and "Errno" not in message


def test_masks_are_encoded_a_few_at_a_time_and_equal_those_of_all_at_once(model, folder, monkeypatch):
    monkeypatch.setattr(evaluate, "PIXELS", 8 * 48 * 64)
    image = torch.from_numpy(np.array(Image.open(folder / "val" / "1.png"))).permute(2, 0, 1)
    with torch.inference_mode():
        (outputs,) = evaluate.outputs_of(model, image, torch.device("cpu"))
        whole = evaluate.coco_results(postprocess(outputs, [(48, 64)], [(48, 64)])[0], 1, [2, 5, 8])
        parts = [*evaluate.few_at_a_time(outputs, (48, 64), (48, 64))]
        found = evaluate.results_of(outputs, (48, 64), (48, 64), 1, [2, 5, 8])
    assert [len(part["masks"]) for part in parts] == [8, 8, 2]
    assert [r["segmentation"] for r in found] == [r["segmentation"] for r in whole]
    assert [r["score"] for r in found] == pytest.approx([r["score"] for r in whole])


def test_evaluation_reads_no_target_masks(folder, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_mask", None)
    assert run(trained / "best.pt", "--data", folder, "--out", tmp_path, "--speed") == 0


def test_names_that_the_terminal_has_no_letters_for_are_shown_and_not_fatal(trained, tmp_path):
    changed(trained, tmp_path / "a.pt", classes=["盒子", "čaša", "b"])
    photos(tmp_path, "é.jpg")
    command = [
        sys.executable,
        "evaluate.py",
        "--ckpt",
        tmp_path / "a.pt",
        "--images",
        tmp_path / "é.jpg",
        "--score",
        "0",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*map(str, command)], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "\\u" in done.stdout
