"""Measures a DI-MaskDINO: AP, AP at every decoder layer, speed, pictures, predictions for your own images.

    python evaluate.py --ckpt runs/demo/best.pt                      AP_box and AP_mask on the validation images
    python evaluate.py --ckpt runs/demo/best.pt --layers             the same at every decoder layer (figure 1)
    python evaluate.py --ckpt runs/demo/best.pt --images a.jpg --out found --score 0.3
    torchrun --nproc-per-node 4 evaluate.py --ckpt ...               the images shared out over four processes

From Python: `predict(model, image)` finds the objects of one image; `evaluate(model, dataset, device)` is what train.py
calls after every epoch.

COCO results are dicts of `image_id`, `category_id`, `bbox` (x, y, w, h in pixels of the original image), `segmentation`
(compressed run lengths of the original size) and `score`. Every AP is in percent. Images go through the model one by
one, so that neither padding nor the number of processes changes a digit.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import utils as pictures
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.functional import pil_to_tensor

import data
from dimaskdino import postprocess
from geometry import shortest_side
from processes import join, keep_working, rank_and_world, samples
from weights import load_model

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
AREAS = {"": 0, "_50": 1, "_S": 3, "_M": 4, "_L": 5}  # suffix of the metric -> place in COCOeval.stats


# ---- One image -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: nn.Module, image: str | Path | Image.Image | np.ndarray | Tensor, score: float = 0.0, amp: str = "off"
) -> dict:
    """The objects in one image, best first: those, of the model's 100 best guesses, that reach a score.

    model: from `load_model`; it is put in evaluation mode. image: a file, a PIL image, an array [H W 3] or a tensor
    [3 H W], the last two uint8 in RGB. It is resized to `model.test_size` inside. amp: "off", "bf16" or "fp16".

    Returns a dict on the model's device, all in pixels of the image as it was given (a file or PIL image: upright):
        scores [n] float32, labels [n] int64, names (a list of n strings, the labels' in `model.classes`),
        boxes [n 4] float32 (x0, y0, x1, y1), clipped to the image, masks [n H W] bool.
    Raises ValueError for a file that is no image, and for an array or tensor of another shape or type.
    """
    picture = as_picture(image)
    size = picture.height, picture.width
    resize = shortest_side(*model.test_size)(None, *picture.size)
    device = next(model.parameters()).device
    (found,) = detect(model.eval(), pil_to_tensor(resize.image(picture)), size, device, amp)
    found = {name: x[found["scores"] >= score] for name, x in found.items()}
    names = [model.classes[label] for label in found["labels"].tolist()]
    return {**found, "names": names, "boxes": clip_boxes_to_image(found["boxes"], size)}


def as_picture(image):
    """The image, in any form that `predict` takes, as an upright RGB PIL image."""
    if isinstance(image, str | os.PathLike):
        return data.read_image(image)
    if isinstance(image, Image.Image):
        return data.upright_rgb(image)
    array = image.movedim(0, -1).cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(
            f"an image is uint8, as an array [H W 3] or a tensor [3 H W]; this one is {array.dtype}, {image.shape}"
        )
    return Image.fromarray(array)


def detect(model, image, size, device, amp="off", every_layer=False):
    """Detections of one image [3 H W] in pixels of `size` (H, W): a list with one dict of `postprocess`, that of the
    final prediction, or with every_layer one for each prediction from layer 0 on."""
    with autocast(device, amp):
        outputs = model(image[None].to(device))
    wanted = outputs["layers"] if every_layer else [outputs]
    return [postprocess(layer, [image.shape[-2:]], [size])[0] for layer in wanted]


def autocast(device, amp):
    return torch.autocast(device.type, AUTOCAST.get(amp), enabled=amp != "off")


# ---- A data set ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_dataset(
    model: nn.Module,
    dataset: data.CocoDataset,
    device: torch.device,
    workers: int = 0,
    amp: str = "off",
    every_layer: bool = False,
) -> list[list[dict]] | None:
    """COCO results of the whole data set: one list, or with every_layer one for each prediction from layer 0 on.

    The processes share out the images; process 0 returns the results, the others None. The model is left in evaluation
    mode.
    """
    model.eval()
    rank, world = rank_and_world()
    mine = range(rank, len(dataset), world)
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers, worker_init_fn=keep_working)
    found = {}
    for index, (image, target) in zip(mine, samples(loader), strict=True):
        image_id = target["image_id"]
        layers = detect(model, image, size_of(dataset, image_id), device, amp, every_layer)
        found[index] = [coco_results(layer, image_id, dataset.category_ids) for layer in layers]
    if world > 1:
        shards = [None] * world if rank == 0 else None
        dist.gather_object(found, shards)
        if rank != 0:
            return None
        found = {index: layers for shard in shards for index, layers in shard.items()}
    by_layer = zip(*(found[index] for index in sorted(found)), strict=True)
    return [[result for image in layer for result in image] for layer in by_layer]


def coco_results(detections: dict, image_id: int | str, category_ids: Sequence[int]) -> list[dict]:
    """COCO results of one image. detections: a dict of `postprocess`; category_ids: the category_id of each label."""
    x0, y0, x1, y1 = detections["boxes"].float().cpu().unbind(1)
    boxes = torch.stack([x0, y0, x1 - x0, y1 - y0], 1).tolist()
    # pycocotools wants uint8 [H W n] in Fortran order. The transpose is cheaper on the masks' device than in numpy.
    masks = detections["masks"].transpose(1, 2).contiguous().cpu().numpy().transpose(2, 1, 0)
    encoded = rle.encode(masks.view(np.uint8))
    labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
            "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        }
        for label, box, score, code in zip(labels, boxes, scores, encoded, strict=True)
    ]


def size_of(dataset, image_id):
    """(H, W) of the original image."""
    return dataset.images[image_id]["height"], dataset.images[image_id]["width"]


# ---- AP --------------------------------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module, dataset: data.CocoDataset, device: torch.device, workers: int = 0, amp: str = "off"
) -> tuple[dict, list[dict] | None]:
    """The metrics of `average_precision` in every process, and the COCO results in process 0 (None in the others)."""
    layers = predict_dataset(model, dataset, device, workers, amp)
    metrics = [layers and average_precision(dataset.json, layers[0])]
    if dist.is_initialized():
        dist.broadcast_object_list(metrics)
    return metrics[0], layers and layers[0]


def average_precision(truth: dict, results: list[dict]) -> dict[str, float | None]:
    """AP_box and AP_mask, and each at IoU 0.5 (_50) and for objects of one size (_S, _M, _L), in percent.

    truth: a COCO dict; results: COCO results. The numbers are pycocotools', None where no object has that size.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ground = coco_index({**truth, "annotations": [dict(a) for a in truth["annotations"]]})
        metrics = {}
        for name, kind in (("AP_box", "bbox"), ("AP_mask", "segm")):
            # Given a box beside the mask, pycocotools would sort masks into S, M and L by the area of their boxes.
            kept = [{k: v for k, v in r.items() if k != "bbox" or kind == "bbox"} for r in results]
            found = ground.loadRes(kept) if kept else coco_index({**truth, "annotations": []})
            evaluation = COCOeval(ground, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for suffix, place in AREAS.items():
                value = float(evaluation.stats[place])
                metrics[name + suffix] = None if value < 0 else 100 * value
    return metrics


def coco_index(content):
    index = COCO()
    index.dataset = content
    index.createIndex()
    return index


def table(rows: list[tuple[str, dict]]) -> str:
    """The paper's table of (name, metrics) rows, in Markdown."""
    columns = [name + suffix for name in ("AP_box", "AP_mask") for suffix in ("", "_S", "_M", "_L")]
    heads = [c if c in ("AP_box", "AP_mask") else c[-1] for c in columns]
    lines = [f"| {'':<12} |" + "".join(f" {h:>7} |" for h in heads), "|---|" + "---|" * len(heads)]
    for name, metrics in rows:
        cells = ["-" if metrics[c] is None else f"{metrics[c]:.1f}" for c in columns]
        lines.append(f"| {name:<12} |" + "".join(f" {cell:>7} |" for cell in cells))
    return "\n".join(lines)


# ---- Speed -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def speed(model, dataset, device, amp="off", warm_up=5, most=50):
    """Images a second as the paper's tables count them: one at a time, without the time to load them, post-processed to
    masks of the original size; and the same without post-processing. The median over the first `most` images."""
    model.eval()
    loaded = [dataset[i] for i in range(min(most, len(dataset)))]
    seconds = {"FPS": [], "FPS_without_postprocessing": []}
    for step in range(warm_up + len(loaded)):
        image, target = loaded[step % len(loaded)]
        image, start = image[None].to(device), clock(device)
        with autocast(device, amp):
            outputs = model(image)
        middle = clock(device)
        postprocess(outputs, [image.shape[-2:]], [size_of(dataset, target["image_id"])])
        if step >= warm_up:
            seconds["FPS_without_postprocessing"].append(middle - start)
            seconds["FPS"].append(clock(device) - start)
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- Pictures --------------------------------------------------------------------------------------------------------


def draw(image: Image.Image, results: list[dict], names: dict[int, str], score: float = 0.3, side: int = 640) -> Tensor:
    """The image, uint8 [3 H' W'], with masks, boxes, classes and scores of all COCO results that reach `score`.

    image: RGB, of the size that the results speak of; names: class name by category_id. Small images are enlarged to
    about `side` px, so that the words fit.
    """
    import colorsys

    import matplotlib

    zoom = max(1, round(side / max(image.size)))
    image = pil_to_tensor(image).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    results = sorted((r for r in results if r["score"] >= score), key=lambda r: r["score"])
    if not results:
        return image
    hues = {category_id: i / len(names) for i, category_id in enumerate(sorted(names))}
    colors = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hues[r["category_id"]], 0.9, 1)) for r in results]
    masks = torch.from_numpy(rle.decode([r["segmentation"] for r in results])).permute(2, 0, 1).bool()
    masks = masks.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    image = pictures.draw_segmentation_masks(image, masks, alpha=0.45, colors=colors)
    corners = torch.tensor([[x, y, x + max(w, 0), y + max(h, 0)] for x, y, w, h in (r["bbox"] for r in results)])
    labels = [f"{names[r['category_id']]} {r['score']:.2f}" for r in results]
    font = {"font": os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), "font_size": 14}
    return pictures.draw_bounding_boxes(image, zoom * corners, labels, colors, width=2, fill_labels=True, **font)


def draw_dataset(
    dataset: data.CocoDataset, results: list[dict], indices: list[int], folder: Path, score: float = 0.3
) -> None:
    """Pictures of the images at the given places of the data set, as folder/<image id>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(dataset.category_ids, dataset.classes, strict=True))
    for index in indices:
        image_id = dataset.image_ids[index]
        mine = [r for r in results if r["image_id"] == image_id]
        picture = draw(data.read_record(dataset.folder, dataset.images[image_id]), mine, names, score)
        pictures.save_image(picture / 255, folder / f"{image_id}.png")


# ---- The command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="CKPT", help="checkpoint of train.py, such as runs/demo/best.pt")
    add("--data", help="shapes, shapes-full, coco, bdd100k or a folder in COCO layout; None: that of the training")
    add("--data-root", default="data", help="where the data sets lie")
    add("--layers", action="store_true", help="AP at every decoder layer, the initial prediction (layer 0) first")
    add("--speed", action="store_true", help="images a second, with and without post-processing")
    add("--draw", type=int, default=0, metavar="N", help="pictures of N images with what was found")
    add("--json", type=Path, metavar="OUT", help="write the metrics to this file")
    add("--images", type=Path, nargs="+", help="find objects in these images instead of measuring AP")
    add("--out", type=Path, help="folder for pictures and predictions.json; None: the checkpoint's")
    add("--score", type=float, default=0.3, help="least score of what is drawn, and of what is kept for --images")
    sides = ("SHORT", "LONG")
    add("--test-size", type=int, nargs=2, metavar=sides, help="shortest and longest side of images; None: as trained")
    add("--amp", choices=["bf16", "fp16", "off"], default="off", help="autocast")
    add("--device", choices=["cpu", "cuda"], help="None: a GPU where there is one")
    add("--workers", type=int, default=0, help="processes that load images")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    args.out = args.out or Path(args.ckpt).parent
    try:
        device = join(args.device)
        model = load_model(args.ckpt, device)
        model.test_size = args.test_size or model.test_size
        if args.images:
            return evaluate_images(model, args)
        name = args.data or model.trained_on
        dataset = data.open_dataset(name, args.data_root, "val", shortest_side(*model.test_size), training=False)
        if dataset.classes != model.classes:
            raise ValueError(
                f"{args.ckpt} knows other classes ({', '.join(model.classes)}) than {name} has "
                f"({', '.join(dataset.classes)})"
            )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    evaluate_dataset(model, dataset, device, args)


def evaluate_images(model, args):
    """A picture of each of the user's own images, and predictions.json of all of them."""
    if len({file.stem for file in args.images}) < len(args.images):
        raise ValueError("two of the --images have the same name, and their pictures would too")
    args.out.mkdir(parents=True, exist_ok=True)
    classes, predictions = dict(enumerate(model.classes)), []
    for file in args.images:
        image = data.read_image(file)
        found = predict(model, image, args.score, args.amp)
        results = coco_results(found, file.name, range(len(classes)))
        pictures.save_image(draw(image, results, classes, args.score) / 255, args.out / f"{file.stem}_found.png")
        objects = zip(found["names"], found["scores"].tolist(), strict=True)
        print(f"{file.name}: {', '.join(f'{name} {score:.2f}' for name, score in objects) or 'nothing'}")
        predictions += [{**r, "category": name} for r, name in zip(results, found["names"], strict=True)]
    (args.out / "predictions.json").write_text(json.dumps(predictions))


def evaluate_dataset(model, dataset, device, args):
    """The table, and what else the command line asks for."""
    layers = predict_dataset(model, dataset, device, args.workers, args.amp, every_layer=args.layers)
    if layers is None:
        return
    names = [f"layer {i}" for i in range(len(layers))] if args.layers else ["DI-MaskDINO"]
    rows = [(name, average_precision(dataset.json, layer)) for name, layer in zip(names, layers, strict=True)]
    print(table(rows))
    metrics = dict(rows[-1][1])
    if args.layers:
        metrics["layers"] = [row for _, row in rows]
    if args.speed:
        metrics.update(speed(model, dataset, device, args.amp))
        print(f"{metrics['FPS']:.1f} images/s ({metrics['FPS_without_postprocessing']:.1f} without post-processing)")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "predictions.json").write_text(json.dumps(layers[-1]))
    if args.draw:
        indices = data.evenly_spaced(args.draw, len(dataset))
        draw_dataset(dataset, layers[-1], indices, args.out / "pictures", args.score)
    if args.json:
        args.json.write_text(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
