"""Measures a DI-MaskDINO: AP, AP at every decoder layer, speed, pictures, predictions for your own images.

    python evaluate.py --ckpt runs/demo/best.pt                      AP_box and AP_mask on the validation images
    python evaluate.py --ckpt runs/demo/best.pt --layers             the same at every decoder layer (figure 1)
    python evaluate.py --ckpt runs/demo/best.pt --images a.jpg --out found --score 0.3
    torchrun --nproc-per-node 4 evaluate.py --ckpt ...               the images shared out over four processes

As a library: `evaluate(model, dataset, device)` is what train.py calls after every epoch.

Predictions are COCO results throughout: dicts of `image_id`, `category_id`, `bbox` (x, y, w, h in pixels of the
original image), `segmentation` (compressed RLE of the original size) and `score`. All AP are in percent. Images go
through the model one by one, so that neither padding nor sharing them out over processes changes a digit.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
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
AREAS = {"": 0, "_50": 1, "_S": 3, "_M": 4, "_L": 5}            # suffix of the metric -> place in COCOeval.stats


# ---- Predictions


def autocast(device, amp):
    return torch.autocast(device.type, AUTOCAST.get(amp), enabled=amp != "off")


def detect(model, image, size, device, amp="off", every_layer=False):
    """Detections of one image [3 H W] in pixels of `size` (H, W): a list with one dict of postprocess for the final
    prediction, or with every_layer for each prediction from layer 0 on."""
    with autocast(device, amp):
        outputs = model(image[None].to(device))
    wanted = outputs["layers"] if every_layer else [outputs]
    return [postprocess(layer, [image.shape[-2:]], [size])[0] for layer in wanted]


def coco_results(detections, image_id, category_ids):
    """COCO results of one image. detections: a dict of postprocess; category_ids: label -> category_id."""
    x0, y0, x1, y1 = detections["boxes"].float().cpu().unbind(1)
    boxes = torch.stack([x0, y0, x1 - x0, y1 - y0], 1)
    # pycocotools wants uint8 in Fortran order [H W n]: the transpose is cheaper where the masks are than in numpy.
    masks = detections["masks"].transpose(1, 2).contiguous().cpu().numpy().transpose(2, 1, 0)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score,
         "segmentation": {"size": code["size"], "counts": code["counts"].decode()}}
        for label, box, score, code in zip(detections["labels"].tolist(), boxes.tolist(),
                                           detections["scores"].tolist(), rle.encode(masks.view(np.uint8)), strict=True)
    ]


def size_of(dataset, image_id):
    """(H, W) of the original image."""
    return dataset.images[image_id]["height"], dataset.images[image_id]["width"]


@torch.inference_mode()
def predict(model, dataset, device, workers=0, amp="off", every_layer=False):
    """COCO results of the whole data set: a list for each wanted layer (see detect), on rank 0; None on other ranks.

    Each process takes every world-th image; none is counted twice. The model is left in evaluation mode.
    """
    model.eval()
    rank, world = rank_and_world()
    mine = range(rank, len(dataset), world)
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers,
                        worker_init_fn=keep_working)  # fmt: skip
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


# ---- AP


def average_precision(truth, results):
    """AP_box and AP_mask with S, M, L and 50 (the AP at IoU 0.5) by pycocotools, in percent.

    truth: a COCO dict; results: COCO results. None stands where the truth has no object of that size.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ground = coco_index({**truth, "annotations": [dict(a) for a in truth["annotations"]]})
        metrics = {}
        for name, kind in (("AP_box", "bbox"), ("AP_mask", "segm")):
            # With a box beside the mask, pycocotools would sort masks into S, M and L by the area of their boxes.
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


def evaluate(model, dataset, device, workers=0, amp="off"):
    """(metrics of average_precision on every rank, COCO results on rank 0 and None elsewhere)."""
    layers = predict(model, dataset, device, workers, amp)
    metrics = [layers and average_precision(dataset.json, layers[0])]
    if dist.is_initialized():
        dist.broadcast_object_list(metrics)
    return metrics[0], layers and layers[0]


def table(rows):
    """The paper's table of (name, metrics) rows, as text."""
    columns = [name + suffix for name in ("AP_box", "AP_mask") for suffix in ("", "_S", "_M", "_L")]
    heads = [c if c in ("AP_box", "AP_mask") else c[-1] for c in columns]
    lines = [f"| {'':<12} |" + "".join(f" {h:>7} |" for h in heads), "|---|" + "---|" * len(heads)]
    for name, metrics in rows:
        cells = ["-" if metrics[c] is None else f"{metrics[c]:.1f}" for c in columns]
        lines.append(f"| {name:<12} |" + "".join(f" {cell:>7} |" for cell in cells))
    return "\n".join(lines)


# ---- Speed


@torch.inference_mode()
def speed(model, dataset, device, amp="off", warm_up=5, most=50):
    """Images a second, one at a time and without loading them: the median over at most `most` images, for the model
    alone and with post-processing to masks of the original size, as the paper's tables count it."""
    model.eval()
    samples = [dataset[i] for i in range(min(most, len(dataset)))]
    seconds = {"FPS": [], "FPS_without_postprocessing": []}
    for step in range(warm_up + len(samples)):
        image, target = samples[step % len(samples)]
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


# ---- Pictures


def draw(image, results, names, score=0.3, side=640):
    """The image with masks, boxes, classes and scores of all results that reach `score`.

    image: RGB PIL image of the size that the results speak of; names: category_id -> class name. Small images are
    enlarged to about `side` pixels so that the words fit. Returns uint8 [3 H' W'].
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
    font = os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return pictures.draw_bounding_boxes(image, zoom * corners, labels, colors, width=2, font=font, font_size=14,
                                        fill_labels=True)


def draw_dataset(dataset, results, indices, folder, score=0.3):
    """Pictures of the images at the given places of the data set, as folder/<image id>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(dataset.category_ids, dataset.classes, strict=True))
    for index in indices:
        image_id = dataset.image_ids[index]
        mine = [r for r in results if r["image_id"] == image_id]
        picture = draw(data.read_record(dataset.folder, dataset.images[image_id]), mine, names, score)
        pictures.save_image(picture / 255, folder / f"{image_id}.png")


# ---- The command line


def evaluate_images(model, files, classes, geometry, device, args):
    """Pictures and predictions.json of the user's own images, detections below args.score left out."""
    if len({file.stem for file in files}) < len(files):
        raise ValueError("two of the --images have the same name, and their pictures would too")
    args.out.mkdir(parents=True, exist_ok=True)
    names, found = dict(enumerate(classes)), []
    for file in files:
        image = data.read_image(file)
        resized = pil_to_tensor(geometry(None, image.width, image.height).image(image))
        with torch.inference_mode():
            detections = detect(model, resized, (image.height, image.width), device, args.amp)[0]
        detections["boxes"] = clip_boxes_to_image(detections["boxes"], (image.height, image.width))
        results = [r for r in coco_results(detections, file.name, range(len(classes))) if r["score"] >= args.score]
        pictures.save_image(draw(image, results, names, args.score) / 255, args.out / f"{file.stem}_found.png")
        found_here = [f"{names[r['category_id']]} {r['score']:.2f}" for r in results]
        print(f"{file.name}: {', '.join(found_here) or 'nothing'}")
        found += [{**r, "category": names[r["category_id"]]} for r in results]
    (args.out / "predictions.json").write_text(json.dumps(found))


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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
    add("--test-size", type=int, nargs=2, metavar=("SHORT", "LONG"), help="shortest and longest side of the images; "
        "None: as trained")
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
        geometry = shortest_side(*(args.test_size or model.test_size))
        if args.images:
            return evaluate_images(model, args.images, model.classes, geometry, device, args)
        name = args.data or model.trained_on
        dataset = data.open_dataset(name, args.data_root, "val", geometry, training=False)
        if dataset.classes != model.classes:
            raise ValueError(f"{args.ckpt} knows other classes ({', '.join(model.classes)}) than {name} has "
                             f"({', '.join(dataset.classes)})")  # fmt: skip
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    evaluate_dataset(model, dataset, device, args)


def evaluate_dataset(model, dataset, device, args):
    """The table, and what else the command line asks for."""
    layers = predict(model, dataset, device, args.workers, args.amp, every_layer=args.layers)
    if layers is None:
        return
    rows = [(f"layer {i}" if args.layers else "DI-MaskDINO", average_precision(dataset.json, layer))
            for i, layer in enumerate(layers)]  # fmt: skip
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
        draw_dataset(dataset, layers[-1], data.evenly_spaced(args.draw, len(dataset)), args.out / "pictures", args.score)
    if args.json:
        args.json.write_text(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
