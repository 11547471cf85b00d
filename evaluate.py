"""Measures a DI-MaskDINO: AP, AP at every decoder layer, speed, pictures, predictions for your own images.

    python evaluate.py --ckpt runs/demo/best.pt                      AP_box and AP_mask on the test images
    python evaluate.py --ckpt runs/demo/best.pt --layers             the same at every decoder layer (figure 1)
    python evaluate.py --ckpt runs/demo/best.pt --images a.jpg folder --out found --score 0.3
    torchrun --nproc-per-node 4 evaluate.py --ckpt ...               the images shared out over four processes

From Python: `predict(load_model(path), image)` finds the objects of one image; `evaluate(model, dataset, device)` is
what train.py calls after every epoch.

COCO results are dicts of `image_id`, `category_id`, `bbox` (x, y, w, h in pixels of the original image), `segmentation`
(compressed run lengths of the original size) and `score`. Every AP is in percent. Images go through the model one by
one, so that neither padding nor the number of processes changes a digit.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from datasets import CocoDataset, open_dataset
from datasets.coco import Images, evenly_spaced, require_same_classes, require_sound
from datasets.geometry import shortest_side
from datasets.images import find_images, read_image, shortened, upright_rgb
from dimaskdino import full_size_boxes, full_size_masks, mask_logits, postprocess, top_predictions
from util.compiled import compile_in_place
from util.distributed import (
    Interruption,
    amp_for,
    batches_of,
    join,
    print_anything,
    rank_and_world,
    say,
    warn_of_emulation,
    workers_for,
)
from util.flags import add_data_flags, add_device_flags, at_least, source_of, user_path
from util.log import new_folder, table, try_output, write_json
from util.pictures import SCORE, draw, draw_dataset
from util.weights import Trained, load_model

AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PIXELS = 2**26  # of the full-size masks made at a time: bounds the memory
MEASURING = ("layers", "per_class", "speed", "draw", "json")  # flags that --images excludes
STATS = {"": 0, "_50": 1, "_S": 3, "_M": 4, "_L": 5}  # suffix of a metric -> index in COCOeval.stats


# ---- The command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", required=True, type=user_path, metavar="CKPT", help="checkpoint, such as runs/demo/best.pt")
    add_data_flags(add, help="shapes, coco, bdd100k or a folder in COCO layout (that of the training)")
    add("--layers", action="store_true", help="AP at every decoder layer, the initial prediction (layer 0) first")
    add("--per-class", action="store_true", help="AP of each class as well")
    add("--speed", action="store_true", help="images a second, with and without post-processing; GFLOP; parameters")
    add("--draw", type=at_least(0), default=0, metavar="N", help="pictures of N images, truth beside what was found")
    add("--json", type=user_path, metavar="OUT", help="write the metrics to this file")
    images = "find objects in these images, and in all in these folders, instead of measuring AP"
    add("--images", type=user_path, nargs="+", metavar="PATH", help=images)
    add("--out", type=user_path, help="folder for pictures and predictions.json (a new one beside the checkpoint)")
    add("--score", type=float, default=SCORE, help="least score of what is drawn, and kept for --images (%(default)s)")
    sizes = "shortest and longest side of images (as trained)"
    add("--test-size", type=at_least(1), nargs=2, metavar=("SHORT", "LONG"), help=sizes)
    add_device_flags(add)
    return parser.parse_args(arguments)


def main(arguments=None):
    print_anything()
    Interruption()  # a signal ends the program by sys.exit
    args = parse_arguments(arguments)
    try:
        device = join(args.device)
        trained = load_model(args.ckpt, device)
        trained.test_size = args.test_size or trained.test_size
        args.amp = args.amp or amp_for(device, trained.model.config.backbone)
        warn_of_emulation(device, args.amp)
        if args.compile:
            compile_in_place(trained.model)
        if args.images:
            with autocast(device, args.amp):  # around the whole loop, so that each weight is cast once
                evaluate_images(trained, args)
        else:
            evaluate_dataset(trained, device, args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{error}\n--amp bf16 or a smaller --test-size takes less memory")


def evaluate_dataset(trained, device, args):
    """Writes predictions.json, prints the table of AP, and draws and measures what else the command line asks for."""
    dataset, name = open_data(trained, args, "test")
    default = require_writable(args, name)
    workers = workers_for(device) if args.workers is None else args.workers
    layers = predict_dataset(trained.model, dataset, device, workers, args.amp, args.layers)
    if layers is None:
        return
    out = args.out or new_folder(default)
    write_json(out / "predictions.json", layers[-1])
    metrics = {"images": len(dataset), "objects": dataset.objects}
    if dataset.annotated:
        rows = [average_precision(dataset.json, results, args.per_class) for results in layers]
        print(table((f"layer {number}" if args.layers else "DI-MaskDINO", row) for number, row in enumerate(rows)))
        metrics |= rows[-1]
        if args.per_class:
            metrics["classes"] = dict(zip(dataset.classes, rows[-1]["classes"].values()))
            print(f"\n{table(metrics['classes'].items(), ['AP_box', 'AP_mask'])}\n")
        if args.layers:
            metrics["layers"] = rows
    else:
        print("the json has no annotations, so there is no AP")
    print(f"over {len(dataset):,} images with {dataset.objects:,} objects, autocast {args.amp}; results in {out}")
    try:
        if args.draw:
            indices = evenly_spaced(args.draw, len(dataset))
            score = draw_dataset(dataset, layers[-1], indices, out / "pictures", args.score)
            if score < args.score:
                print(f"nothing on the pictures reaches a score of {args.score}: they show what reaches {score:.2g}")
        if args.speed:
            metrics.update(speed(trained.model, dataset, device, args.amp))
            print(
                f"{metrics['FPS']:.1f} images/s ({metrics['FPS_without_postprocessing']:.1f} without "
                f"post-processing), {metrics['GFLOP']:,.1f} GFLOP, {metrics['parameters']:,} parameters"
            )
    finally:
        if args.json:
            write_json(args.json, metrics, indent=2)


def evaluate_images(trained, args):
    """--images: draws the objects in each of the user's images and writes predictions.json. Images that cannot be read
    are named and skipped, with exit code 2 at the end. What was found before a signal or an error is kept."""
    if rank_and_world()[1] > 1:
        raise ValueError("--images works in one process: start it without torchrun")
    if measuring := [f"--{name.replace('_', '-')}" for name in MEASURING if vars(args)[name]]:
        raise ValueError(f"--images measures nothing: leave out {' and '.join(measuring)}")
    if args.data or args.val_json:
        open_data(trained, args, "val")
    elif not trained.named:
        called = shortened(trained.classes)
        say(f"{args.ckpt} has no names of its classes: they are called {called}; --data takes those of a data set")
    names = dict(zip(trained.category_ids, trained.classes))
    default = require_writable(args, "images")
    files = find_images(args.images, args.out or default)
    out = args.out or new_folder(default)
    stems = Counter(os.path.splitext(name)[0] for name in files)
    predictions = []
    done = 0
    try:
        for name, file in progress(files.items(), len(files), "finding"):
            try:
                picture = read_image(file)
            except ValueError as error:
                tqdm.write(str(error), file=sys.stderr)
                continue
            found = find(trained, picture, args.score, args.amp, encode)
            results = coco_results(found, name, trained.category_ids)
            predictions += [{**result, "category": names[result["category_id"]]} for result in results]
            stem = os.path.splitext(name)[0]
            drawn = out / f"{stem if stems[stem] == 1 else name}_found.png"
            drawn.parent.mkdir(parents=True, exist_ok=True)
            draw(picture, results, names, args.score).save(drawn)
            said = ", ".join(f"{names[result['category_id']]} {result['score']:.2f}" for result in results)
            say(f"{name}: {said or 'nothing'}")
            done += 1
    finally:
        write_json(out / "predictions.json", predictions)
        say(f"{out} has what was found on {done:,} of {len(files):,} images")
    if done < len(files):
        print(f"{len(files) - done} of {len(files)} images could not be read", file=sys.stderr)
        sys.exit(2)


def require_writable(args, what):
    """Raises, before any work, where results cannot be written. Returns the folder for them if none is given."""
    if args.out and (args.out / "log.jsonl").exists():
        raise ValueError(f"{args.out} holds a run, whose predictions and pictures would be lost: choose another --out")
    if rank_and_world()[0] == 0:
        try_output(args.out or args.ckpt.parent)
        if args.json:
            try_output(args.json, is_folder=False)
    return args.ckpt.parent / f"{args.ckpt.stem}_on_{what}"


def open_data(trained, args, split):
    """Opens the data set of the command line, or else that of the training: (dataset, its name). A checkpoint without
    class names gets those of the data set. Raises ValueError where the classes do not fit."""
    if args.data or args.val_json:
        source = source_of(args)
    elif trained.source:
        source = trained.source
        if args.image_folder:
            source = replace(source, image_folder=str(args.image_folder))
        if args.data_root != Path("data"):
            source = replace(source, root=str(args.data_root))
    else:
        raise ValueError(f"{args.ckpt} does not say which data it was trained on: add --data or --val-json")
    name = Path(source.val_json or source.data).stem
    dataset = open_dataset(source, split, shortest_side(*trained.test_size), training=False)
    if sound := require_sound(dataset, f"{split} images of {name}"):
        say(sound)
    if not trained.named and len(trained.classes) == len(dataset.classes):
        if trained.classes != dataset.classes:
            say(f"{args.ckpt} has no names of its classes: they are called as those of {name}")
        trained.classes = dataset.classes
        trained.category_ids = dataset.category_ids
    require_same_classes(trained.classes, dataset.classes, str(args.ckpt), name)
    return dataset, name


def progress(things, total, what):
    """The things, with a progress bar where there is a terminal."""
    hidden = rank_and_world()[0] != 0 or not sys.stderr.isatty()
    return tqdm(things, total=total, desc=what, unit="image", leave=False, dynamic_ncols=True, disable=hidden)


# ---- Predictions -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    trained: Trained, image: str | Path | Image.Image | np.ndarray | Tensor, score: float = 0.0, amp: str | None = None
) -> dict:
    """The objects in one image, best first: of the model's 100 best predictions, those that reach a score.

    trained: from `load_model`. image: a file, a PIL image, an array [H W 3] or a tensor [3 H W], the last two uint8 in
    RGB. It is resized to `trained.test_size` inside. amp: "off", "bf16" or "fp16"; None: what --amp has by default.

    Returns a dict on the model's device, all in pixels of the image as it was given (a file or PIL image: upright):
        scores [n] float32, labels [n] int64, names (a list of n strings, the labels' in `trained.classes`),
        boxes [n 4] float32 (x0, y0, x1, y1), clipped to the image, masks [n H W] bool.
    Raises ValueError for a file that is no image, and for anything else that is none of these.
    """
    picture = as_picture(image)
    found = find(trained, picture, score, amp, form=list)
    empty = found["boxes"].new_zeros(0, picture.height, picture.width, dtype=torch.bool)
    names = [trained.classes[label] for label in found["labels"].tolist()]
    return {**found, "names": names, "masks": torch.stack(found["masks"]) if names else empty}


def as_picture(image):
    """The image, in any form that `predict` takes, as an upright RGB PIL image."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image) and image.width and image.height:
        return upright_rgb(image)
    given = f"{type(image).__name__} {getattr(image, 'dtype', '')} {[*getattr(image, 'shape', '')]}"
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        image = image.movedim(0, -1).cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        raise ValueError(f"not {given}: a file, a PIL image, or uint8, as an array [H W 3] or a tensor [3 H W]")
    return Image.fromarray(image)


@torch.no_grad()
def find(trained, picture, score, amp, form):
    """The objects of an upright PIL image, see `objects_of`, in boxes that are clipped to the image."""
    resized = pil_to_tensor(shortest_side(*trained.test_size)(None, *picture.size).image(picture))
    device = next(trained.model.parameters()).device
    outputs = outputs_of(trained.model.eval(), resized, device, amp)
    size = picture.height, picture.width
    found = objects_of(outputs, resized.shape[-2:], size, form, score)
    return {**found, "boxes": clip_boxes_to_image(found["boxes"], size)}


@torch.no_grad()
def predict_dataset(model, dataset, device, workers=0, amp=None, every_layer=False):
    """COCO results of the whole data set: a list of one list, or with every_layer of one for each prediction from
    layer 0 on.

    The images are shared out over the processes, and process 0 gets the results, the others None. The model is left in
    evaluation mode.
    """
    model.eval()
    rank, world = rank_and_world()
    mine = range(rank, len(dataset), world)
    found = {}  # index of the image -> its results by layer
    loader = DataLoader(Images(dataset, mine), batch_size=None, num_workers=workers)
    amp = amp or amp_for(device, model.config.backbone)
    with autocast(device, amp):  # around the whole loop, so that each weight is cast once
        for index, image in zip(mine, progress(batches_of(loader), len(mine), "evaluating")):
            outputs = outputs_of(model, image, device, amp)
            found[index] = []
            for layer in outputs["layers"] if every_layer else [outputs]:
                objects = objects_of(layer, image.shape[-2:], size_of(dataset, index), encode)
                found[index].append(coco_results(objects, dataset.image_ids[index], dataset.category_ids))
    if world > 1:
        shards = [None] * world if rank == 0 else None
        dist.gather_object(found, shards)
        if rank != 0:
            return None
        for shard in shards:
            found.update(shard)
    layers = zip(*(found[index] for index in sorted(found)))
    return [[*chain.from_iterable(images)] for images in layers]


def outputs_of(model, image, device, amp=None):
    """Runs the model on one image [3 H W] uint8. Gradients have to be off, but not by inference mode, in which autocast
    keeps no weight that it has cast."""
    with autocast(device, amp or amp_for(device, model.config.backbone)):
        return model(image[None].to(device))


def autocast(device, amp):
    return torch.autocast(device.type, AUTOCAST[amp], enabled=amp != "off")


def size_of(dataset, index):
    """(H, W) of an original image."""
    record = dataset.images[dataset.image_ids[index]]
    return record["height"], record["width"]


def objects_of(prediction, image_size, size, form, score=0.0):
    """The objects of one image that reach a score, as `postprocess` gives them, but with bounded memory.

    Masks of the original size (H, W) are made a few at a time, once for all classes of a query, and only where the
    class score suffices. form(masks [n H W] bool) turns them into a list of n masks, for example encoded ones.
    """
    best = top_predictions(prediction, 0)
    enough = best[0] >= score  # the mask's quality, at most 1, can only lower the score
    class_scores, labels, queries = (x[enough] for x in best)
    once, which = queries.unique(return_inverse=True)
    masks = []
    qualities = [class_scores.new_zeros(0)]  # for an image without objects
    for few in once.split(max(1, PIXELS // (size[0] * size[1]))) if len(once) else ():
        with autocast(few.device, "off"):  # the product in the type of its factors
            full, quality = full_size_masks(mask_logits(prediction, 0, few), image_size, size)
        masks += form(full)
        qualities.append(quality)
    scores, order = (class_scores * torch.cat(qualities)[which]).sort(descending=True)
    order = order[scores >= score]
    return {
        "scores": scores[: len(order)],
        "labels": labels[order],
        "boxes": full_size_boxes(prediction, 0, queries[order], image_size, size),
        "masks": [masks[i] for i in which[order].tolist()],
    }


def encode(masks):
    """COCO's compressed run lengths of masks [n H W] bool."""
    # pycocotools wants uint8 [H W n] in Fortran order. The transpose is cheaper on the masks' device than in numpy.
    columns = masks.transpose(1, 2).contiguous().cpu().numpy().transpose(2, 1, 0)
    size = [*masks.shape[1:]]
    return [{"size": size, "counts": code["counts"].decode()} for code in rle.encode(columns.view(np.uint8))]


def coco_results(found, image_id, category_ids):
    """COCO results of one image from its objects with encoded masks. category_ids: by label."""
    boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score, "segmentation": mask}
        for label, box, score, mask in zip(found["labels"].tolist(), boxes, found["scores"].tolist(), found["masks"])
    ]


# ---- AP --------------------------------------------------------------------------------------------------------------


def evaluate(model, dataset: CocoDataset, device, workers=0, amp=None) -> tuple[dict, list[dict] | None]:
    """The metrics of `average_precision` in every process, and the COCO results in process 0 (None in the others)."""
    [results] = predict_dataset(model, dataset, device, workers, amp) or [None]
    metrics = [None if results is None else average_precision(dataset.json, results)]
    if dist.is_initialized():
        dist.broadcast_object_list(metrics)
    return metrics[0], results


def average_precision(truth: dict, results: list[dict], per_class: bool = False) -> dict[str, float | None]:
    """AP_box and AP_mask, and each at IoU 0.5 (_50) and for objects of one size (_S, _M, _L), in percent.

    truth: a COCO dict; results: COCO results. The numbers equal those of pycocotools, in a fifth of the time; None
    where no object has that size. per_class: `classes` has AP_box and AP_mask by category_id, None without objects.
    """
    quiet = {"print_function": lambda *_: None}
    metrics = {}
    classes = {category: {} for category in sorted(category["id"] for category in truth["categories"])}
    ground = COCO({**truth, "annotations": [dict(a) for a in truth["annotations"]]}, **quiet)
    for name, kind in (("AP_box", "bbox"), ("AP_mask", "segm")):
        # With a bbox beside it, a mask would count as S, M or L by the area of the box.
        kept = [{k: v for k, v in r.items() if k != "bbox" or kind == "bbox"} for r in results]
        found = ground.loadRes(kept) if kept else COCO({**truth, "annotations": []}, **quiet)
        evaluation = COCOeval_faster(ground, found, kind, **quiet)
        evaluation.run()
        for suffix, index in STATS.items():
            value = float(evaluation.stats[index])
            metrics[name + suffix] = None if value < 0 else 100 * value
        precision = evaluation.eval["precision"][..., 0, -1]  # IoU, recall, class, of all sizes and 100 objects
        for category, of_class in zip(classes, np.moveaxis(precision, 2, 0)):
            classes[category][name] = None if of_class.min() < 0 else 100 * float(of_class.mean())
    return {**metrics, "classes": classes} if per_class else metrics


# ---- Speed -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def speed(model, dataset, device, amp=None):
    """FPS as in the paper's tables: images one at a time, already loaded, post-processed to masks of their full size;
    and FPS without post-processing, which includes the product of the masks. Medians over the first 50 images, after
    five to warm up. Also the mean GFLOP of an image (see `flop_of`), and the number of parameters."""
    model.eval()
    images = [dataset.image(index)[0].to(device) for index in range(min(50, len(dataset)))]
    seconds = []
    for step in range(5 + len(images)):
        index = step % len(images)
        start = clock(device)
        outputs = outputs_of(model, images[index], device, amp)
        middle = clock(device)
        postprocess(outputs, [images[index].shape[-2:]], [size_of(dataset, index)])
        seconds.append((clock(device) - start, middle - start))
    whole, without = map(statistics.median, zip(*seconds[5:]))
    flop = functools.cache(lambda size: flop_of(model, torch.zeros(1, *size, dtype=torch.uint8, device=device)))
    return {
        "FPS": 1 / whole,
        "FPS_without_postprocessing": 1 / without,
        "GFLOP": statistics.fmean(flop(image.shape) for image in images) / 1e9,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def flop_of(model, images):
    """Floating point operations of the model for images [B 3 H W], with the masks of all queries of the last layer.

    A multiplication and an addition count as two. Elementwise operators are not counted, nor is deformable attention
    where it is not compiled.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        mask_logits(type(model).forward(model, images))  # not compiled, as it counts PyTorch's operators
    return counted.get_total_flops()


if __name__ == "__main__":
    main()
