"""Measures a DI-MaskDINO: AP, AP at every decoder layer, speed, pictures, predictions for your own images.

    python evaluate.py --ckpt runs/demo/best.pt                      AP_box and AP_mask on the validation images
    python evaluate.py --ckpt runs/demo/best.pt --layers             the same at every decoder layer (figure 1)
    python evaluate.py --ckpt runs/demo/best.pt --images a.jpg folder --out found --score 0.3
    torchrun --nproc-per-node 4 evaluate.py --ckpt ...               the images shared out over four processes

From Python: `predict(model, image)` finds the objects of one image; `evaluate(model, dataset, device)` is what train.py
calls after every epoch.

COCO results are dicts of `image_id`, `category_id`, `bbox` (x, y, w, h in pixels of the original image), `segmentation`
(compressed run lengths of the original size) and `score`. Every AP is in percent. Images go through the model one by
one, so that neither padding nor the number of processes changes a digit. Without --out, results go into a new folder
beside the checkpoint. What was found before Ctrl-C, or before an image that cannot be read, is kept.
"""

import argparse
import math
import os
import pickle
import signal
import statistics
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from datasets import coco as data
from datasets.geometry import shortest_side
from datasets.images import find_images, read_image, upright_rgb
from dimaskdino import mask_logits, postprocess
from util.distributed import (
    Interruption,
    amp_for,
    join,
    keep_working,
    print_anything,
    rank_and_world,
    samples,
    say,
    warn_of_emulation,
    workers_for,
)
from util.flags import AMP_HELP, add_data_flags, at_least, files_of, user_path
from util.log import table, try_output, unused, write_json
from util.pictures import SCORE, draw, draw_dataset
from util.weights import load_model

aten = torch.ops.aten
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PIXELS = 2**26  # of all masks that are made at a time
MEASURING = ("layers", "per_class", "speed", "draw", "json")  # flags that mean nothing with --images
AREAS = {"": 0, "_50": 1, "_S": 3, "_M": 4, "_L": 5}  # suffix of the metric -> place in COCOeval.stats


# ---- One image -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: nn.Module, image: str | Path | Image.Image | np.ndarray | Tensor, score: float = 0.0, amp: str | None = None
) -> dict:
    """The objects in one image, best first: those, of the model's 100 best guesses, that reach a score.

    model: from `load_model`; it is put in evaluation mode. image: a file, a PIL image, an array [H W 3] or a tensor
    [3 H W], the last two uint8 in RGB. It is resized to `model.test_size` inside. amp: "off", "bf16" or "fp16"; None:
    what --amp has by default.

    Returns a dict on the model's device, all in pixels of the image as it was given (a file or PIL image: upright):
        scores [n] float32, labels [n] int64, names (a list of n strings, the labels' in `model.classes`),
        boxes [n 4] float32 (x0, y0, x1, y1), clipped to the image, masks [n H W] bool.
    Raises ValueError for a file that is no image, and for an array or tensor of another shape or type.
    """
    picture = as_picture(image)
    size = picture.height, picture.width
    outputs, seen = look_at(model, picture, amp)
    (found,) = postprocess(outputs, [seen], [size])
    found = {name: x[found["scores"] >= score] for name, x in found.items()}
    names = [model.classes[label] for label in found["labels"].tolist()]
    return {**found, "names": names, "boxes": clip_boxes_to_image(found["boxes"], size)}


def as_picture(image):
    """The image, in any form that `predict` takes, as an upright RGB PIL image."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    array = image.movedim(0, -1).cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(
            f"an image is uint8, as an array [H W 3] or a tensor [3 H W]; this one is {array.dtype}, {image.shape}"
        )
    return Image.fromarray(array)


def look_at(model, picture, amp):
    """What the model says of an upright PIL image, and the size (H, W) in which it saw it."""
    resized = pil_to_tensor(shortest_side(*model.test_size)(None, *picture.size).image(picture))
    (outputs,) = outputs_of(model.eval(), resized, next(model.parameters()).device, amp)
    return outputs, resized.shape[-2:]


def outputs_of(model, image, device, amp=None, every_layer=False):
    """What the model says of one image [3 H W]: a list of its final prediction, or of each."""
    with autocast(device, amp or amp_for(device, model.config.backbone)):
        outputs = model(image[None].to(device))
    return outputs["layers"] if every_layer else [outputs]


def few_at_a_time(outputs: dict, image_size: tuple, size: tuple, top: int = 100) -> Iterator[dict]:
    """What `postprocess` gives for one image, in parts whose masks have few pixels together: those of a large photo
    take much memory."""
    few = max(1, PIXELS // (size[0] * size[1]))
    logits = outputs["logits"].float()
    best = logits.sigmoid().flatten().topk(min(top, logits.numel())).indices
    for part in best.split(few):
        alone = torch.full_like(logits, -math.inf)
        alone.view(-1)[part] = logits.view(-1)[part]
        yield postprocess({**outputs, "logits": alone}, [image_size], [size], top=len(part))[0]


def results_of(outputs, image_size, size, image_id, category_ids, score=0.0, clip=False) -> list[dict]:
    """COCO results of one image from the model's outputs, best first, those that reach a score."""
    results = []
    for found in few_at_a_time(outputs, image_size, size):
        found = {name: x[found["scores"] >= score] for name, x in found.items()}
        if clip:
            found["boxes"] = clip_boxes_to_image(found["boxes"], size)
        results += coco_results(found, image_id, category_ids)
    return sorted(results, key=lambda result: -result["score"])


def autocast(device, amp):
    return torch.autocast(device.type, AUTOCAST.get(amp), enabled=amp != "off")


# ---- A data set ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_dataset(
    model: nn.Module,
    dataset: data.CocoDataset,
    device: torch.device,
    workers: int = 0,
    amp: str | None = None,
    every_layer: bool = False,
    found: dict[int, list] | None = None,
) -> Iterator[list[dict]] | None:
    """COCO results of the whole data set: one list, or with every_layer one for each prediction from layer 0 on.

    The processes share out the images; process 0 gets an iterator, which makes each list when its turn comes, the
    others None. The model is left in evaluation mode. found: a dict to fill, image by image, with the results by layer,
    `packed`, under the image's place in the data set; in process 0 those of all processes in the end.
    """
    model.eval()
    rank, world = rank_and_world()
    mine, found = range(rank, len(dataset), world), {} if found is None else found
    loader = DataLoader(data.Images(dataset, mine), batch_size=None, num_workers=workers, worker_init_fn=keep_working)
    for index, image in zip(mine, progress(samples(loader), len(mine), "evaluating"), strict=True):
        image_id, size = dataset.image_ids[index], size_of(dataset, dataset.image_ids[index])
        layers = outputs_of(model, image, device, amp, every_layer)
        found[index] = [packed(results_of(x, image.shape[-2:], size, image_id, dataset.category_ids)) for x in layers]
    if world > 1:
        shards = [None] * world if rank == 0 else None
        dist.gather_object(found, shards)
        if rank != 0:
            return None
        for shard in shards:
            found.update(shard)
    return map(unpacked, zip(*(found[index] for index in sorted(found)), strict=True))


def packed(results: list[dict]) -> bytes:
    """COCO results of one image in a tenth of the memory: those of ten layers of COCO's 5,000 images are many."""
    return zlib.compress(pickle.dumps(results), 1)


def unpacked(images: Iterable[bytes]) -> list[dict]:
    return [result for image in images for result in pickle.loads(zlib.decompress(image))]


def progress(things, total, what):
    """The things, with a progress bar where there is a terminal."""
    hidden = rank_and_world()[0] != 0 or not sys.stderr.isatty()
    return tqdm(things, total=total, desc=what, unit="image", leave=False, dynamic_ncols=True, disable=hidden)


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
    model: nn.Module, dataset: data.CocoDataset, device: torch.device, workers: int = 0, amp: str | None = None
) -> tuple[dict, list[dict] | None]:
    """The metrics of `average_precision` in every process, and the COCO results in process 0 (None in the others)."""
    layers = predict_dataset(model, dataset, device, workers, amp)
    results = None if layers is None else next(layers)
    metrics = [None if layers is None else average_precision(dataset.json, results)]
    if dist.is_initialized():
        dist.broadcast_object_list(metrics)
    return metrics[0], results


def average_precision(truth: dict, results: list[dict], per_class: bool = False) -> dict[str, float | None]:
    """AP_box and AP_mask, and each at IoU 0.5 (_50) and for objects of one size (_S, _M, _L), in percent.

    truth: a COCO dict; results: COCO results. The numbers are pycocotools', which takes five times as long; None where
    no object has that size. per_class: `classes` has AP_box and AP_mask by category_id, None where there is no object.
    """
    quiet, metrics = {"print_function": lambda *_: None}, {}
    classes = {category: {} for category in sorted(category["id"] for category in truth["categories"])}
    ground = COCO({**truth, "annotations": [dict(a) for a in truth["annotations"]]}, **quiet)
    for name, kind in (("AP_box", "bbox"), ("AP_mask", "segm")):
        # Given a box beside the mask, masks would be sorted into S, M and L by the area of their boxes.
        kept = [{k: v for k, v in r.items() if k != "bbox" or kind == "bbox"} for r in results]
        found = ground.loadRes(kept) if kept else COCO({**truth, "annotations": []}, **quiet)
        evaluation = COCOeval_faster(ground, found, kind, **quiet)
        evaluation.run()
        for suffix, place in AREAS.items():
            value = float(evaluation.stats[place])
            metrics[name + suffix] = None if value < 0 else 100 * value
        precision = evaluation.eval["precision"][..., 0, -1]  # IoU, recall, class, of all sizes and 100 objects
        for category, of_class in zip(classes, np.moveaxis(precision, 2, 0), strict=True):
            classes[category][name] = None if of_class.min() < 0 else 100 * float(of_class.mean())
    return {**metrics, "classes": classes} if per_class else metrics


# ---- Speed -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def speed(model, dataset, device, amp=None, warm_up=5, most=50):
    """Images a second as the paper's tables count them: one at a time, without the time to load them, post-processed to
    masks of the original size; and the same without post-processing, which multiplies the masks. The median over the
    first `most` images. The mean GFLOP for one of these (see `flop`), and the number of parameters."""
    model.eval()
    loaded = [dataset.image(place)[0] for place in range(min(most, len(dataset)))]
    seconds = {"FPS": [], "FPS_without_postprocessing": []}
    for step in range(warm_up + len(loaded)):
        place = step % len(loaded)
        image, start = loaded[place].to(device), clock(device)
        (outputs,) = outputs_of(model, image, device, amp)
        middle = clock(device)
        postprocess(outputs, [image.shape[-2:]], [size_of(dataset, dataset.image_ids[place])])
        if step >= warm_up:
            seconds["FPS_without_postprocessing"].append(middle - start)
            seconds["FPS"].append(clock(device) - start)
    of_each_size = {image.shape: image for image in loaded}
    flop = {size: flop_of(model, image[None].to(device)) for size, image in of_each_size.items()}
    return {
        **{name: 1 / statistics.median(times) for name, times in seconds.items()},
        "GFLOP": statistics.fmean(flop[image.shape] for image in loaded) / 1e9,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# A multiplication and an addition are two operations; elementwise operators are none, and so is deformable attention
# that is not compiled.


def flop(func, args, kwargs, result) -> int:
    """Floating point operations of one call of an operator."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if func.namespace == "deform_attn":  # a sample reads four corners; the gradient needs two products with each
        value, samples = (next(x for x in tensors if x.ndim == n) for n in (4, 6))  # [B N h c], [B Q h L P 2]
        return 4 * value.shape[-1] * (samples.numel() // 2) * (4 if "backward" in func.name() else 2)
    if func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(x.shape for x in tensors[:3]))
    if func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(x.shape for x in tensors[:4]))
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


class Flop(TorchDispatchMode):
    """Adds up in `total` what is called under it. Inference mode would hide what operators consist of."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.total += flop(func, args, kwargs or {}, result)
        return result


def flop_of(model: nn.Module, images: Tensor) -> int:
    """Floating point operations of the model for images [B 3 H W], with the masks of all queries at the last layer."""
    with torch.inference_mode(False), torch.no_grad(), Flop() as counted:
        mask_logits(model(images))
    return counted.total


# ---- The command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", required=True, type=user_path, metavar="CKPT", help="checkpoint, such as runs/demo/best.pt")
    named = "shapes, shapes-full, coco, bdd100k or a folder in COCO layout (that of the training)"
    add_data_flags(add, help=named)
    add("--layers", action="store_true", help="AP at every decoder layer, the initial prediction (layer 0) first")
    add("--per-class", action="store_true", help="AP of each class as well")
    add("--speed", action="store_true", help="images a second, with and without post-processing; GFLOP; parameters")
    add("--draw", type=at_least(0), default=0, metavar="N", help="pictures of N images, truth beside what was found")
    add("--json", type=user_path, metavar="OUT", help="write the metrics to this file")
    images = "find objects in these images, and in all in these folders, instead of measuring AP"
    add("--images", type=user_path, nargs="+", metavar="PATH", help=images)
    add("--out", type=user_path, help="folder for pictures and predictions.json (a new one beside the checkpoint)")
    add("--score", type=float, default=SCORE, help="least score of what is drawn, and kept for --images (%(default)s)")
    sides = ("SHORT", "LONG")
    sizes = "shortest and longest side of images (as trained)"
    add("--test-size", type=at_least(1), nargs=2, metavar=sides, help=sizes)
    add("--amp", choices=["bf16", "fp16", "off"], help=AMP_HELP)
    add("--device", choices=["cpu", "cuda"], help="(a GPU where there is one)")
    add("--workers", type=at_least(0), help="processes that load images (4 for a GPU, 0 for a CPU)")
    return parser.parse_args(arguments)


def main(arguments=None):
    print_anything()
    Interruption().saved = True  # a signal ends this at once, as if by sys.exit
    args = parse_arguments(arguments)
    try:
        device = join(args.device)
        if args.workers is None:
            args.workers = workers_for(device)
        model = load_model(args.ckpt, device)
        args.amp = args.amp or amp_for(device, model.config.backbone)
        warn_of_emulation(device, args.amp)
        model.test_size = args.test_size or model.test_size
        name = args.val_json or args.data or (None if args.images else model.trained_on)
        dataset = open_data(model, name, args) if name else None
        if not (dataset or args.images):
            raise ValueError(f"{args.ckpt} does not say which data it was trained on: add --data or --val-json")
        if args.images and rank_and_world()[1] > 1:
            raise ValueError("--images works in one process: start it without torchrun")
        if args.images and (measuring := [f"--{name.replace('_', '-')}" for name in MEASURING if vars(args)[name]]):
            raise ValueError(f"--images measures nothing: leave out {' and '.join(measuring)}")
        prepare_output(args, "images" if args.images else Path(name).stem)
        if args.images:
            return evaluate_images(model, args)
        evaluate_dataset(model, dataset, device, args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{error}\n--amp bf16 or a smaller --test-size takes less memory")
    except SystemExit as end:
        if end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            print("stopped by a signal", file=sys.stderr)
        raise


def open_data(model, name, args):
    """The validation images to measure on, or to take class names from. Raises ValueError where they do not fit."""
    files = files_of(args)
    if not (args.data or args.val_json):
        files = model.trained_files | files
    size = shortest_side(*model.test_size)
    dataset = data.open_dataset(str(name), args.data_root, "val", size, training=False, files=files)
    if sound := data.require_sound(dataset, f"validation images of {name}"):
        say(sound)
    if not model.named and len(model.classes) == len(dataset.classes):
        if model.classes != dataset.classes:
            say(f"{args.ckpt} has no names of its classes: they are called as those of {name}")
        model.classes, model.category_ids, model.named = dataset.classes, dataset.category_ids, True
    data.require_same_classes(model.classes, dataset.classes, str(args.ckpt), str(name))
    return dataset


def prepare_output(args, what):
    """Settle the folder for results and try all that will be written, before any work."""
    if args.out and (args.out / "log.jsonl").exists():
        raise ValueError(f"{args.out} holds a run, whose predictions and pictures would be lost: choose another --out")
    args.out = args.out or unused(args.ckpt.parent / f"{args.ckpt.stem}_on_{what}")
    if rank_and_world()[0] == 0:
        try_output(args.out)
        for file in filter(None, (args.out / "predictions.json", args.json)):
            try_output(file, folder=False)


def evaluate_images(model, args):
    """A picture of each of the user's own images, and predictions.json of all of them. Images that cannot be read are
    named, and the exit code is then 2 in the end."""
    files = find_images(args.images, args.out)
    stems = [os.path.splitext(name)[0] for name in files]
    names = dict(zip(model.category_ids, model.classes, strict=True))
    if not model.named:
        say(
            f"{args.ckpt} has no names of its classes: {'COCO has as many, so those are taken' * (len(names) == 80)}"
            f"{'they are numbered; --data takes those of a data set' * (len(names) != 80)}"
        )
    predictions, unread, done = [], 0, 0
    try:
        for (name, file), stem in zip(progress(files.items(), len(files), "finding"), stems, strict=True):
            try:
                picture = read_image(file)
            except ValueError as error:
                unread += 1
                tqdm.write(str(error), file=sys.stderr)
                continue
            results = find(model, picture, name, args.score, args.amp)
            drawn = args.out / f"{stem if stems.count(stem) == 1 else name}_found.png"
            drawn.parent.mkdir(parents=True, exist_ok=True)
            draw(picture, results, names, args.score).save(drawn)
            predictions += [{**result, "category": names[result["category_id"]]} for result in results]
            said = ", ".join(f"{names[r['category_id']]} {r['score']:.2f}" for r in results)
            say(f"{name}: {said or 'nothing'}")
            done += 1
    finally:
        write_json(args.out / "predictions.json", predictions)
        say(f"{args.out} has what was found on {done:,} of {len(files):,} images")
    if unread:
        print(f"{unread} of {len(files)} images could not be read", file=sys.stderr)
        sys.exit(2)


@torch.inference_mode()
def find(model, picture, image_id, score, amp):
    """COCO results of one upright PIL image, in a little memory: what `predict` finds."""
    outputs, seen = look_at(model, picture, amp)
    size = picture.height, picture.width
    return results_of(outputs, seen, size, image_id, model.category_ids, score, clip=True)


def keep_found(path, found, count):
    """Write what an evaluation found before it ended; where that fails, the reason of the end is still what is said."""
    try:
        write_json(path, unpacked(layers[-1] for layers in found.values()))
        print(f"stopped: {path} has what was found on {count}", file=sys.stderr)
    except OSError as error:
        print(f"warning: {path} was not written ({error})", file=sys.stderr)


def evaluate_dataset(model, dataset, device, args):
    """The table, and what else the command line asks for."""
    found, rows = {}, []
    try:
        layers = predict_dataset(model, dataset, device, args.workers, args.amp, args.layers, found)
        if layers is None:
            return
        for number, results in enumerate(layers):
            metrics = average_precision(dataset.json, results, args.per_class)
            rows.append((f"layer {number}" if args.layers else "DI-MaskDINO", metrics))
    except BaseException:  # a signal, too little memory, a bug: what was found stays
        if rank_and_world()[0] == 0 and found:
            keep_found(args.out / "predictions.json", found, f"{len(found):,} of {len(dataset):,} images")
            if rows:
                print(table(rows))
        raise
    write_json(args.out / "predictions.json", results)
    print(table(rows))
    if args.per_class:
        classes = metrics["classes"] = dict(zip(dataset.classes, metrics["classes"].values(), strict=True))
        print(f"\n{table(classes.items(), ['AP_box', 'AP_mask'])}\n")
    print(
        f"over {len(dataset):,} images with {dataset.objects:,} objects, autocast {args.amp}; "
        f"{args.out} has all that was found"
    )
    metrics = {**metrics, "images": len(dataset), "objects": dataset.objects}
    if args.layers:
        metrics["layers"] = [row for _, row in rows]
    try:
        if args.speed:
            metrics.update(speed(model, dataset, device, args.amp))
            print(
                f"{metrics['FPS']:.1f} images/s ({metrics['FPS_without_postprocessing']:.1f} without post-processing), "
                f"{metrics['GFLOP']:,.1f} GFLOP, {metrics['parameters']:,} parameters"
            )
    finally:
        if args.json:
            write_json(args.json, metrics, indent=2)
    if args.draw:
        indices = data.evenly_spaced(args.draw, len(dataset))
        score = draw_dataset(dataset, results, indices, args.out / "pictures", args.score)
        if score < args.score:
            print(f"nothing on the pictures reaches a score of {args.score}: they show what reaches {score:.2g}")


if __name__ == "__main__":
    main()
