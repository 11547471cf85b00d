"""What evaluate.py promises."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
from datasets import Source, open_dataset
from datasets import coco as data
from datasets.geometry import Geometry, identity, shortest_side
from dimaskdino import Config, DIMaskDINO, postprocess
from small_runs import exit_code, log_of, same, write_images
from util import pictures
from util.distributed import amp_for, warn_of_emulation
from util.log import new_folder, write_json
from util.pictures import draw, draw_dataset
from util.weights import load_model, read_checkpoint

CPU = torch.device("cpu")
DOCS = Path(__file__).parents[1] / "docs"


def opened(folder):
    return open_dataset(Source(str(folder)), "val", identity, training=False)


def run(checkpoint, *flags):
    return exit_code(evaluate.main, ["--ckpt", str(checkpoint), "--device", "cpu", *map(str, flags)])


def changed(trained, path, **changes):
    """A copy of a run's checkpoint in which some entries differ, or are missing if they are None here."""
    checkpoint = {**read_checkpoint(trained / "best.pt"), **changes}
    torch.save({name: value for name, value in checkpoint.items() if value is not None}, path)
    return path


def spoiled(folder, copy, change):
    """A copy of the data whose validation json is changed."""
    shutil.copytree(folder, copy)
    path = copy / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    change(content, copy)
    path.write_text(json.dumps(content))
    return copy


def photos(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(folder / name)
    return folder


def found_in(out):
    return sorted({result["image_id"] for result in json.loads((out / "predictions.json").read_text())})


@pytest.fixture(scope="module")
def best(trained):
    return trained / "best.pt"


@pytest.fixture(scope="module")
def loaded(trained):
    return load_model(trained / "best.pt")


# ---- AP --------------------------------------------------------------------------------------------------------------


def coco_index(content):
    index = COCO()
    index.dataset = json.loads(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def compressed(mask):
    return evaluate.encode(torch.as_tensor(mask, dtype=torch.bool)[None])[0]


def predictions(truth, shift=0, score=0.9):
    """Every object of a COCO dict as a result, its mask moved right by some pixels and its box by twice as many."""
    index, results = coco_index(truth), []
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        result = {name: annotation[name] for name in ("image_id", "category_id")}
        mask = compressed(np.roll(index.annToMask(annotation), shift, 1))
        results.append({**result, "score": score, "bbox": [x + 2 * shift, y, w, h], "segmentation": mask})
    return results


def test_perfect_predictions_give_100_and_none_gives_0(folder):
    truth = opened(folder).json
    perfect = evaluate.average_precision(truth, predictions(truth))
    nothing = evaluate.average_precision(truth, [])
    present = {name for name, value in perfect.items() if value is not None}
    assert {"AP_box", "AP_mask", "AP_box_S"} <= present
    for name in perfect:
        assert perfect[name] == (pytest.approx(100) if name in present else None)
        assert nothing[name] == (0 if name in present else None)


@pytest.mark.parametrize("shift", [0, 2, 7])
def test_average_precision_is_that_of_pycocotools(folder, shift):
    truth = opened(folder).json
    truth["categories"].reverse()  # any order will do
    results = [r for i in range(3) for r in predictions(truth, shift * i, score=0.3 + 0.3 * i)]
    for number, annotation in enumerate(truth["annotations"]):  # small, medium and large ones, and a crowd
        annotation.update(area=(500, 2000, 10000)[number % 3], iscrowd=int(number == 5))
    ours = evaluate.average_precision(truth, results, per_class=True)
    for name, kind in (("AP_box", "bbox"), ("AP_mask", "segm")):
        ground = coco_index(truth)
        kept = [{k: v for k, v in r.items() if k != "bbox" or kind == "bbox"} for r in results]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(ground, ground.loadRes(kept), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        theirs = evaluation.stats[[0, 1, 3, 4, 5]]
        of_sizes = [ours[name + suffix] for suffix in ("", "_50", "_S", "_M", "_L")]
        assert of_sizes == pytest.approx(100 * theirs, abs=1e-9)
        of_classes = evaluation.eval["precision"][..., 0, -1].mean((0, 1))
        assert [ours["classes"][i][name] for i in (2, 5, 8)] == pytest.approx(100 * of_classes, abs=1e-9)


def test_ap_is_of_boxes_that_are_not_clipped_to_the_image(folder, loaded, monkeypatch):
    dataset = opened(folder)  # of 64 x 48 pixels, which the network sees as 64 x 64
    for annotation in dataset.json["annotations"]:
        annotation.update(bbox=[0, 0, 20, 32], category_id=2)
    action = evaluate.outputs_of

    def leaving(*args):
        outputs = action(*args)
        box = torch.tensor([-5.0, 16, 50, 32]) / 64  # from -30 to 20: an IoU of 0.4
        logits = torch.tensor([9.0, -9, -9]).expand_as(outputs["logits"])
        return {**outputs, "boxes": box.expand_as(outputs["boxes"]), "logits": logits}

    monkeypatch.setattr(evaluate, "outputs_of", leaving)
    metrics, results = evaluate.evaluate(loaded.model, dataset, CPU)
    assert results[0]["bbox"] == pytest.approx([-30, 0, 50, 32]) and metrics["AP_box"] == 0
    assert evaluate.predict(loaded, folder / "val" / "1.png")["boxes"][0].tolist() == pytest.approx([0, 0, 20, 32])


def test_the_table_has_the_papers_columns_and_a_dash_for_no_object():
    metrics = {name + area: 12.345 for name in ("AP_box", "AP_mask") for area in ("", "_50", "_S", "_M", "_L")}
    head, _, row = evaluate.table([("tiny", {**metrics, "AP_mask_L": None})]).splitlines()
    assert head.replace("|", "").split() == ["AP_box", "S", "M", "L", "AP_mask", "S", "M", "L"]
    assert row.replace("|", "").split() == ["tiny", *["12.3"] * 7, "-"]


def test_evaluation_gives_the_ap_that_training_logged_and_every_layers(folder, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Geometry, "polygons", None)  # masks of targets are not made
    flags = ["--data", folder, "--layers", "--per-class", "--speed", "--draw", 2, "--json", tmp_path / "m.json"]
    assert run(trained / "last.pt", *flags, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert said.count("| layer ") == len(metrics["layers"]) == 3  # the initial prediction and two decoder layers
    assert f"over 5 images with {len(opened(folder).json['annotations'])} objects" in said
    logged = log_of(trained)[-1]
    for name in ("AP_box", "AP_mask", "AP_box_S"):
        assert metrics[name] == metrics["layers"][-1][name] == pytest.approx(logged[name], rel=1e-5)
    for name in ("AP_box", "AP_mask"):  # every class has objects
        assert np.mean([of_class[name] for of_class in metrics["classes"].values()]) == pytest.approx(metrics[name])
    assert [*metrics["classes"]] == ["box", "plate", "tile"]
    assert metrics["FPS_without_postprocessing"] >= metrics["FPS"] > 0
    model = load_model(trained / "last.pt").model
    assert metrics["GFLOP"] == evaluate.flop_of(model, torch.zeros(1, 3, 48, 64, dtype=torch.uint8)) / 1e9 > 0
    assert metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "predictions.json").read_bytes() == (trained / "predictions.json").read_bytes()
    assert len(list((tmp_path / "pictures").iterdir())) == 3 and found_in(tmp_path) == [1, 2, 3, 4, 5]


def test_the_ap_of_a_model_is_that_of_its_last_layer(folder, best, tmp_path, monkeypatch):
    measured, action = iter(range(3)), evaluate.average_precision
    monkeypatch.setattr(evaluate, "average_precision", lambda *args: action(*args) | {"AP_box": next(measured)})
    assert run(best, "--data", folder, "--layers", "--json", tmp_path / "m.json", "--out", tmp_path) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["AP_box"] == 2 and [row["AP_box"] for row in metrics["layers"]] == [0, 1, 2]


def test_operations_of_matrices_convolutions_and_attention_are_counted():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(2), torch.nn.Linear(36, 10))
    model.append(torch.nn.TransformerEncoderLayer(10, 1, 20, batch_first=True))
    attention = 4 * (4 * 10 * 10) + 2 * (4 * 4 * 10)  # four projections, scores, weighted sum
    products = 4 * 36 * 27 + 4 * 36 * 10 + attention + 2 * (4 * 10 * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "mask_logits", lambda _: None)
        assert evaluate.flop_of(model.train(), torch.rand(1, 3, 8, 8)) == 2 * products


@pytest.mark.parametrize("images, split", [((), "test"), (("--images", "nothing.jpg"), "val")])
def test_ap_is_of_the_test_images(folder, best, tmp_path, monkeypatch, images, split):
    asked = []
    monkeypatch.setattr(evaluate, "open_dataset", lambda _, split, *rest, **more: asked.append(split) or opened(folder))
    run(best, "--data", folder, "--out", tmp_path, *images)
    assert asked == [split]


def test_a_json_without_annotations_gives_predictions_and_no_ap(folder, best, tmp_path, capsys):
    copy = spoiled(folder, tmp_path / "data", lambda coco, _: coco.pop("annotations"))
    json_of_test = copy / "annotations" / "instances_val.json"
    flags = ["--layers", "--per-class", "--draw", 1, "--json", tmp_path / "m.json", "--out", tmp_path / "out"]
    assert run(best, "--val-json", json_of_test, "--image-folder", copy / "val", *flags) == 0
    assert "no annotations, so there is no AP" in capsys.readouterr().out
    assert found_in(tmp_path / "out") == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "m.json").read_text()) == {"images": 5, "objects": 0}


# ---- Autocast --------------------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts how often each of a model's weights is cast. nn.MultiheadAttention splits its own before."""

    def __init__(self, model):
        super().__init__()
        self.counts = {x.data_ptr(): 0 for name, x in model.named_parameters() if "in_proj" not in name}

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator is torch.ops.aten._to_copy.default and arguments[0].data_ptr() in self.counts:
            self.counts[arguments[0].data_ptr()] += 1
        return operator(*arguments, **options or {})


def test_weights_are_cast_to_16_bit_once_for_all_images(loaded, best, folder, tmp_path, monkeypatch):
    with Casts(loaded.model) as casts:
        evaluate.predict_dataset(loaded.model, opened(folder), CPU, amp="bf16")
    assert max(casts.counts.values()) == 1
    monkeypatch.setattr(evaluate, "load_model", lambda *_: loaded)
    with Casts(loaded.model) as casts:
        assert run(best, "--amp", "bf16", "--images", folder / "val", "--out", tmp_path) == 0
    assert max(casts.counts.values()) == 1


def give_instructions(patch, names):
    """A CPU has these; or a GPU has those for bf16, if it is named."""
    patch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or "bf16" in names)


@pytest.mark.parametrize(
    "device, instructions, amp, tiny, emulated",
    [
        ("cuda", ("bf16",), "bf16", "bf16", ()),
        ("cuda", (), "off", "off", ("bf16",)),
        ("cpu", (), "off", "off", ("bf16", "fp16")),
        ("cpu", ("avx512_fp16",), "off", "off", ("bf16",)),
        ("cpu", ("amx_fp16",), "off", "off", ("bf16",)),
        ("cpu", ("avx512_bf16",), "bf16", "off", ("fp16",)),
        ("cpu", ("amx_bf16",), "bf16", "off", ("fp16",)),
    ],
)
def test_autocast_is_bf16_where_it_pays_and_emulation_warned_of(
    device, instructions, amp, tiny, emulated, monkeypatch, capsys
):
    give_instructions(monkeypatch, instructions)
    device = torch.device(device)
    assert amp_for(device, "resnet50") == amp_for(device, "swin_l") == amp and amp_for(device, "tiny") == tiny
    for asked in ("bf16", "fp16", "off"):
        warn_of_emulation(device, asked)
        assert (f"no instructions for {asked}" in capsys.readouterr().out) == (asked in emulated)


def test_evaluation_takes_the_autocast_that_pays_or_that_is_asked_for(
    folder, best, loaded, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "amp_for", lambda *_: "bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    path = folder / "val" / "1.png"
    found, half, whole = (evaluate.predict(loaded, path, amp=amp)["scores"] for amp in (None, "bf16", "off"))
    assert torch.equal(found, half) and not torch.equal(found, whole)
    for flags, used in ((), "bf16"), (("--amp", "off"), "off"):
        assert run(best, "--data", folder, "--out", tmp_path / used, *flags) == 0
        said = capsys.readouterr().out
        assert f"autocast {used}" in said and ("no instructions for bf16" in said) == (used == "bf16")


# ---- One image -------------------------------------------------------------------------------------------------------


def test_predict_finds_the_same_in_a_file_a_picture_an_array_and_a_tensor(folder, loaded):
    path = folder / "val" / "1.png"
    picture = Image.open(path)
    array = np.asarray(picture)
    tensor = torch.tensor(array).permute(2, 0, 1)
    expected = evaluate.predict(loaded, path)
    for image in (str(path), picture, array, tensor):
        found = evaluate.predict(loaded, image)
        assert found.pop("names") == expected["names"]
        assert same(found, {name: expected[name] for name in found})


def test_predict_gives_what_reaches_the_score_best_first(folder, loaded):
    path = folder / "val" / "1.png"  # 64 x 48
    found = evaluate.predict(loaded, path)
    scores = found["scores"].tolist()
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 2
    assert found["names"] == [loaded.classes[label] for label in found["labels"]]
    assert found["masks"].shape == (18, 48, 64) and found["masks"].dtype == torch.bool
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([64, 48, 64, 48])).all()
    for least in (scores[2], 1.1):
        fewer = evaluate.predict(loaded, path, least)
        count = sum(score >= least for score in scores)
        assert fewer["scores"].tolist() == scores[:count] and len(fewer["names"]) == count
        assert torch.equal(fewer["masks"], found["masks"][:count])


ODD_IMAGES = [
    *(None, [[1, 2, 3]], Image.new("RGB", (0, 5))),
    *(np.zeros(shape, np.uint8) for shape in ((4, 4), (0, 4, 3))),
    *(np.zeros((4, 4, 3)), torch.zeros(4, 4, 3).byte(), torch.zeros(3, 4, 4)),
]


@pytest.mark.parametrize("image", ODD_IMAGES, ids=lambda image: type(image).__name__)
def test_predict_says_what_an_image_is_where_it_gets_something_else(loaded, image):
    with pytest.raises(ValueError, match="uint8, as an array .H W 3. or a tensor .3 H W."):
        evaluate.predict(loaded, image)


@pytest.mark.parametrize("size", [(1, 1), (200, 4), (3, 150), (33, 31)])
def test_images_of_any_size_give_boxes_inside_and_masks_of_their_size(best, tmp_path, monkeypatch, size):
    boxes = evaluate.full_size_boxes
    monkeypatch.setattr(evaluate, "full_size_boxes", lambda *args: 10 * boxes(*args))  # far beyond the image
    Image.new("RGB", size, "blue").save(tmp_path / "image.png")
    assert run(best, "--out", tmp_path, "--score", 0, "--images", tmp_path / "image.png") == 0
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert results
    for x, y, w, h in (result["bbox"] for result in results):
        assert x >= 0 and y >= 0 and x + w <= size[0] + 1e-3 and y + h <= size[1] + 1e-3  # sums of float32
    assert {tuple(result["segmentation"]["size"]) for result in results} == {size[::-1]}


def test_masks_made_a_few_at_a_time_are_those_of_postprocess(folder, loaded, monkeypatch):
    made, action = [], evaluate.full_size_masks

    def counting(masks, *sizes):
        made.append(len(masks))
        return action(masks, *sizes)

    monkeypatch.setattr(evaluate, "PIXELS", 5 * 30 * 70)
    monkeypatch.setattr(evaluate, "full_size_masks", counting)
    image = torch.from_numpy(np.array(Image.open(folder / "val" / "1.png"))).permute(2, 0, 1)
    with torch.inference_mode():
        outputs = evaluate.outputs_of(loaded.model, image, CPU)
        (whole,) = postprocess(outputs, [(40, 64)], [(30, 70)])
        found = evaluate.objects_of(outputs, (40, 64), (30, 70), list)
        assert made == [5, 1]  # each of six queries once, in whatever number of classes
        none = evaluate.objects_of(outputs, (40, 64), (30, 70), list, score=1.1)
    assert made == [5, 1] and none["masks"] == [] and none["boxes"].shape == (0, 4)
    torch.testing.assert_close({**found, "masks": torch.stack(found["masks"])}, {k: whole[k] for k in found})


def test_results_carry_pixels_of_the_image_and_category_ids():
    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 5:9, 11:13] = True
    found = {"boxes": [[11.0, 5.0, 13.0, 9.0]], "labels": [1], "scores": [0.5]}
    found = {name: torch.tensor(x) for name, x in found.items()} | {"masks": evaluate.encode(masks)}
    (result,) = evaluate.coco_results(found, 42, [3, 17])
    assert (result["image_id"], result["category_id"], result["bbox"], result["score"]) == (42, 17, [11, 5, 2, 4], 0.5)
    assert np.array_equal(rle.decode(result["segmentation"]), masks[0].numpy())


# ---- Pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(folder):
    """An image, what was found on it, and the names of classes."""
    dataset = opened(folder)
    image = data.read_record(dataset.folder, dataset.images[1])
    found = [r for r in predictions(dataset.json) if r["image_id"] == 1]
    return image, found, dict(zip(dataset.category_ids, dataset.classes))


def test_a_picture_shows_what_reaches_the_score_and_nothing_else(drawn):
    image, found, names = drawn
    found[0]["bbox"] = [-30, -5, 400, 0]  # boxes are not clipped to the image
    plain, shown = (np.asarray(draw(image, found, names, score)) for score in (0.95, 0.5))
    assert plain.shape == shown.shape == (480, 640, 3)
    assert np.array_equal(plain[5::10, 5::10], np.asarray(image)) and not np.array_equal(plain, shown)


def test_each_query_is_drawn_once_with_its_best_class(drawn):
    image, found, names = drawn
    doubts = [{**one, "category_id": c, "score": 0.4} for one in found for c in names if c != one["category_id"]]
    assert np.array_equal(np.asarray(draw(image, doubts + found, names)), np.asarray(draw(image, found, names)))


def test_a_mask_is_tinted_inside_of_an_outline_and_hides_nothing():
    image, black = Image.new("RGB", (400, 400), "white"), Image.new("RGB", (400, 400))
    mask = np.zeros((400, 400))
    mask[100:300, 50:350] = 1
    one = {"category_id": 1, "score": 0.9, "bbox": [0, 0, 9, 9], "segmentation": compressed(mask)}
    on_white, on_black = (np.asarray(draw(x, [one], {1: "a"})) for x in (image, black))
    rgb = pictures.color(1, {1: "a"})
    inside, edge, outside = (400, 400), (400, 100), (400, 99)  # small images are enlarged, here to 800 x 800
    assert (on_white[edge] == rgb).all() and (on_black[edge] == rgb).all()
    assert (on_white[outside] == 255).all() and (on_black[outside] == 0).all()
    assert (on_white[inside] > on_black[inside]).all() and (on_black[inside] == np.round(0.4 * np.array(rgb))).all()


def test_names_in_other_scripts_are_written_or_replaced_by_their_ids(capsys, monkeypatch):
    assert pictures.written("čaša", 7) == ("čaša", pictures.FONT)
    noto = SimpleNamespace(fname="noto.ttf")
    monkeypatch.setattr(pictures.font_manager.fontManager, "ttflist", [noto])
    monkeypatch.setattr(pictures, "letters", lambda path: {0x732B} if path == "noto.ttf" else {0x61})
    assert pictures.written("\u732b", 7) == ("\u732b", "noto.ttf")
    assert pictures.written("\u72ac", 8) == pictures.written("\u72ac", 8) == ("8", pictures.FONT)
    said = capsys.readouterr().out
    assert said.count("no font here has its letters") == 1 and "8 for the class '\u72ac'" in said


def test_where_nothing_reaches_the_score_the_best_are_drawn(folder, tmp_path):
    dataset = opened(folder)
    assert draw_dataset(dataset, predictions(dataset.json, score=0.02), [0, 1], tmp_path) == 0.02
    assert draw_dataset(dataset, predictions(dataset.json), [0, 1, 4], tmp_path) == 0.3
    assert {path.name for path in tmp_path.iterdir()} == {"1.png", "2.png", "5.png", "all.png"}
    assert Image.open(tmp_path / "1.png").size == (2 * 640 + 8, 480 + 26)  # the truth beside what was found
    assert Image.open(tmp_path / "all.png").size == (4 * (256 + 8) - 8, 2 * (192 + 8) - 8 + 26)  # pairs, small


# ---- Data, names and ids ---------------------------------------------------------------------------------------------

FAULTS = {
    "missing file": (lambda coco, copy: (copy / "val" / "2.png").unlink(), 2, "2.png"),
    "no image": (lambda coco, copy: coco.update(images=[], annotations=[]), 2, "no images"),
    "crowd": (lambda coco, copy: coco["annotations"][0].update(iscrowd=1), 0, "are crowds"),
}


@pytest.mark.parametrize(("change", "code", "said"), [pytest.param(*case, id=name) for name, case in FAULTS.items()])
def test_evaluation_stops_for_or_warns_of_faults_of_the_data(folder, best, tmp_path, capsys, change, code, said):
    copy = spoiled(folder, tmp_path / "data", change)
    assert run(best, "--data", copy, "--out", tmp_path / "out") == code
    assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "flags, source",
    [
        ((), Source("shapes", "a", image_folder="b")),
        (("--data-root", "c", "--image-folder", "d"), Source("shapes", "c", image_folder="d")),
        (("--data", "x"), Source("x")),
    ],
)
def test_data_are_those_of_the_training_wherever_they_are_now(folder, trained, tmp_path, monkeypatch, flags, source):
    asked = []
    monkeypatch.setattr(evaluate, "open_dataset", lambda source, *_, **__: asked.append(source) or opened(folder))
    path = changed(trained, tmp_path / "a.pt", source=dataclasses.asdict(Source("shapes", "a", image_folder="b")))
    assert run(path, "--out", tmp_path / "out", *flags) == 0
    assert asked == [source]


def test_data_of_other_classes_are_refused_and_those_that_differ_named(best, tmp_path, capsys):
    write_images(tmp_path, "val", 1, classes=("box", "lid"))
    assert run(best, "--data", tmp_path) == 2
    message = capsys.readouterr().err
    assert "best.pt has plate, tile;" in message and "has lid" in message and "box" not in message


def test_two_classes_of_one_name_have_a_row_and_an_entry_each(folder, trained, tmp_path, capsys):
    copy = spoiled(folder, tmp_path / "data", lambda coco, _: coco["categories"][2].update(name="box"))
    path = changed(trained, tmp_path / "a.pt", classes=["box (2)", "plate", "box (8)"])
    assert run(path, "--data", copy, "--per-class", "--json", tmp_path / "m.json", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert [*metrics["classes"]] == ["box (2)", "plate", "box (8)"]
    assert np.mean([x["AP_box"] for x in metrics["classes"].values()]) == pytest.approx(metrics["AP_box"])
    assert all(f"| {name} " in said for name in metrics["classes"])


def test_classes_without_names_get_neutral_ones_or_those_of_the_data(folder, trained, tmp_path, capsys):
    bare = changed(trained, tmp_path / "bare.pt", classes=None, category_ids=None, source=None)
    image = ["--images", folder / "val" / "1.png", "--score", 0]
    assert run(bare, *image, "--out", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "class 0" in said and "--data" in said and "person" not in said
    assert run(bare, *image, "--data", folder, "--out", tmp_path / "b") == 0
    assert "plate" in capsys.readouterr().out
    assert run(bare, "--out", tmp_path / "c") == 2 and "add --data" in capsys.readouterr().err


def test_80_classes_without_names_are_said_to_be_cocos(tmp_path, capsys):
    model = DIMaskDINO(dataclasses.replace(Config.tiny(), num_classes=80))
    torch.save({"model": model.state_dict()}, tmp_path / "80.pt")
    photos(tmp_path, "a.jpg")
    assert run(tmp_path / "80.pt", "--images", tmp_path / "a.jpg", "--test-size", 64, 64, "--out", tmp_path) == 0
    assert "they are called person, bicycle, car" in capsys.readouterr().out


# ---- Nothing is lost -------------------------------------------------------------------------------------------------


def test_own_images_get_pictures_and_what_reaches_the_score_by_its_ids(best, tmp_path):
    photos(tmp_path, "photo.jpg")
    kept = []
    for score in (0, 0.02, 1):
        assert run(best, "--out", tmp_path / "found", "--images", tmp_path / "photo.jpg", "--score", score) == 0
        kept.append(json.loads((tmp_path / "found" / "predictions.json").read_text()))
    assert len(kept[0]) == 18 and kept[1] == [x for x in kept[0] if x["score"] >= 0.02]
    assert kept[0][0]["segmentation"]["size"] == [30, 40] and kept[2] == []
    assert {(r["category_id"], r["category"]) for r in kept[0]} <= {(2, "box"), (5, "plate"), (8, "tile")}
    assert (tmp_path / "found" / "photo_found.png").exists()


@pytest.mark.parametrize("flags, size", [((), [3, 48, 64]), (("--test-size", 30, 20), [3, 15, 20])])
def test_images_have_the_size_of_the_training_or_that_asked_for(best, tmp_path, monkeypatch, flags, size):
    photos(tmp_path, "photo.jpg")  # 40 x 30; the training was at 64
    monkeypatch.setattr(evaluate, "outputs_of", lambda model, image, *_: sys.exit([*image.shape]))
    assert run(best, "--images", tmp_path / "photo.jpg", "--out", tmp_path, *flags) == size


def test_an_unreadable_image_is_named_and_the_others_are_found(best, tmp_path, capsys):
    photos(tmp_path / "in", "a.jpg", "c.jpg")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no image")
    assert run(best, "--images", tmp_path / "in", "--out", tmp_path / "out", "--score", 0) == 2
    assert found_in(tmp_path / "out") == ["a.jpg", "c.jpg"] and "b.jpg cannot be read" in capsys.readouterr().err


def fail_at(patch, call, failure):
    """Something happens at a call of the model."""
    action, calls = evaluate.outputs_of, []

    def failing(*args):
        calls.append(1)
        if len(calls) == call:
            failure()
        return action(*args)

    patch.setattr(evaluate, "outputs_of", failing)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_found_on_own_images(folder, best, tmp_path, monkeypatch, capsys, number):
    fail_at(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    assert run(best, "--images", folder / "val", "--out", tmp_path, "--score", 0) == 128 + number
    assert len(found_in(tmp_path)) == 1 and "found on 1 of 5 images" in capsys.readouterr().out


def test_too_little_memory_ends_in_a_line_and_leaves_no_empty_folder(folder, trained, tmp_path, monkeypatch):
    def too_large():
        raise torch.OutOfMemoryError("out of memory")

    fail_at(monkeypatch, 3, too_large)
    path = changed(trained, tmp_path / "a.pt")
    assert "smaller --test-size" in run(path, "--data", folder)
    assert [*tmp_path.iterdir()] == [path]


def test_the_metrics_are_kept_where_measuring_the_speed_fails(folder, best, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "speed", lambda *_: sys.exit(7))
    assert run(best, "--data", folder, "--speed", "--json", tmp_path / "m.json", "--out", tmp_path) == 7
    assert "AP_box" in json.loads((tmp_path / "m.json").read_text())


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_no_command_takes_or_changes_what_was_there(folder, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    photos(tmp_path / "photos", "a.jpg")
    best = tmp_path / "run" / "best.pt"
    commands = [("--data", folder, "--draw", 1), ("--images", tmp_path / "photos")]
    for flags in (*commands * 2, ("--data", folder, "--out", tmp_path / "run")):
        before = tree(tmp_path)
        run(best, *flags)
        assert tree(tmp_path).items() >= before.items()
    assert "holds a run" in capsys.readouterr().err
    new = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} - {"pictures"}
    data_name = f"best_on_{folder.name}"
    assert new == {data_name, f"{data_name}_2", "best_on_images", "best_on_images_2"}


def test_a_json_that_the_disk_has_no_room_for_is_named_and_none_is_left(tmp_path):
    (tmp_path / "a.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"a\.json was not written: No space left"):
        write_json(tmp_path / "a.json", [])
    assert not any(tmp_path.iterdir())


def test_a_device_or_pipe_is_written_to_and_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", [1])
    assert os.read(reader, 9) == b"[1]" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_nobody_else_can_choose_a_new_folder_at_the_same_moment(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.exists", lambda _: False)  # as it was when the other one looked
    assert [new_folder(tmp_path / "v1.5").name for _ in range(3)] == ["v1.5", "v1.5_2", "v1.5_3"]


@pytest.mark.parametrize(
    "flags",
    [("--json", "new/m.json"), ("--out", "file/b"), ("--out", "file"), ("--json", "file/m.json"), ("--json", ".")],
)
def test_outputs_are_made_or_refused_before_any_work(folder, best, tmp_path, monkeypatch, capsys, flags):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    sound = flags[1] == "new/m.json"
    if not sound:
        monkeypatch.setattr(evaluate, "outputs_of", None)
    assert run(best, "--data", folder, "--out", "out", *flags) == (0 if sound else 2)
    assert (tmp_path / "new" / "m.json").exists() == sound
    assert sound or flags[1] in capsys.readouterr().err


@pytest.mark.parametrize("out", ["photos", ".", "photos/found"])
def test_images_are_found_wherever_the_results_go(best, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", "a.jpg")
    for _ in range(2 if out == "photos/found" else 1):  # what was drawn there is no photo
        assert run(best, "--images", "photos", "--out", out, "--score", 0) == 0
        assert found_in(tmp_path / out) == ["a.jpg"]


def test_folders_of_images_are_searched_and_equal_names_stay_apart(best, tmp_path):
    photos(tmp_path / "in", "a.jpg", "x/a.JPG", "x/y/b.png", "x/b.jpg")
    (tmp_path / "in" / "notes.txt").write_text("")
    assert run(best, "--images", tmp_path / "in", "--out", tmp_path / "out", "--score", 0) == 0
    assert found_in(tmp_path / "out") == ["a.jpg", "x/a.JPG", "x/b.jpg", "x/y/b.png"]
    drawn = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert drawn == {"a_found.png", "x/a_found.png", "x/b_found.png", "x/y/b_found.png"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--workers", -1), "-1 is not at least 0"),
        (("--test-size", 0, 9), "0 is not at least 1"),
        (("--device", "gpu"), "gpu is none of cpu, cuda"),
        (("--ckpt", "nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (("--ckpt", "."), ". is a folder"),
        (("--images", "nothing.jpg"), "nothing.jpg cannot be read as an image: there is no such file"),
        (("--images", "nothing.jpg", "--json", "a.json", "--per-class"), "leave out --per-class and --json"),
    ],
)
def test_a_wrong_flag_gets_a_line_and_exit_code_2(best, tmp_path, capsys, flags, named):
    assert run(best, "--out", tmp_path, *flags) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message and "Errno" not in message


def test_names_that_the_terminal_has_no_letters_for_are_shown(trained, tmp_path, monkeypatch):
    path = changed(trained, tmp_path / "a.pt", classes=["\u76d2\u5b50", "\u010da\u0161a", "b"])
    photos(tmp_path, "\u00e9.jpg")
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    assert run(path, "--images", tmp_path / "\u00e9.jpg", "--score", 0, "--out", tmp_path / "out") == 0
    sys.stdout.flush()
    assert b"\\xe9.jpg: " in terminal.getvalue()


# ---- The model in the repository -------------------------------------------------------------------------------------


def test_the_models_file_in_docs_finds_what_it_found(tmp_path):
    # The first 100 held-out images. Roundings in another order move AP by a few tenths.
    trained = load_model(DOCS / "shapes.pt")
    shapes = open_dataset(Source("shapes", str(tmp_path)), "val", shortest_side(*trained.test_size), training=False)
    metrics, _ = evaluate.evaluate(trained.model, shapes, CPU, amp="off")
    assert [metrics["AP_box"], metrics["AP_mask"]] == pytest.approx([79.1, 85.4], abs=0.5)
