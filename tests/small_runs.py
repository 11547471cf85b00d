"""Small data, small runs: what the tests of the programs share."""

import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

import train
from datasets import coco as data
from util.flags import parse_training
from util.weights import read_checkpoint

FLAGS = (
    "--preset tiny --image-size 64 --batch-size 4 --lr 1e-3 --epochs 1 --device cpu --workers 0 --set dim=32 "
    "--set heads=2 --set ffn=48 --set encoder_layers=1 --set decoder_layers=2 --set selection=(12,6) "
    "--set denoising=8 --set mask_points=32"
)
SMALL = FLAGS.split()


def write_images(folder, split, count, classes=("box", "plate", "tile")):
    """Images of 64 x 48 with one to three rectangles each, in COCO layout. Category ids have gaps."""
    rng = np.random.default_rng(len(split))
    ids = [2 + 3 * label for label in range(len(classes))]
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for image_id in range(1, count + 1):
        pixels = np.full((48, 64, 3), 90, np.uint8)
        for _ in range(1 + image_id % 3):
            x, y, w, h = (int(rng.integers(low, high)) for low, high in ((0, 40), (0, 24), (12, 24), (12, 24)))
            label = int(rng.integers(len(classes)))
            pixels[y : y + h, x : x + w] = 60 * label + 100
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[label],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [corners],
                }
            )
        name = f"{image_id}.png"
        Image.fromarray(pixels).save(folder / split / name)
        images.append({"id": image_id, "file_name": name, "width": 64, "height": 48})
    categories = [{"id": i, "name": name} for i, name in zip(ids, classes, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def train_in(folder, out, *more):
    """The exit code of train.py, in this process; later flags override those of SMALL."""
    return exit_code(train.main, [*SMALL, "--data", str(folder), "--out", str(out), *map(str, more)])


def exit_code(action, *arguments):
    try:
        action(*arguments)
    except SystemExit as end:
        return end.code
    return 0


def new_run(folder, out, *more):
    args = parse_training([*SMALL, "--data", str(folder), "--out", str(out), *map(str, more)], "")
    return train.Run(args, torch.device("cpu"))


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out, name="last.pt"):
    return read_checkpoint(out / name)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- Gradients that can be compared ----------------------------------------------------------------------------------


@contextlib.contextmanager
def without_chance():
    """Sampled points and noise are always the same, so that runs differ in nothing but how they divide a batch."""

    def points(*size, device=None):
        return torch.linspace(0.1, 0.9, size[-2] * 2).view(-1, 2).expand(size).clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", points)
        patch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 0.4))
        patch.setattr(torch, "randint_like", lambda like, low, high: torch.full_like(like, low))
        yield


def gradients_of(run, parts):
    """The gradients of one step as one vector. Batch statistics are fixed, as they depend on how a batch is divided."""
    run.model.train()
    run.model.backbone.eval()
    run.model.zero_grad()
    with without_chance():
        train.gradients(run, parts)
    return torch.cat([p.grad.flatten() for p in run.model.parameters()])


def gradient_run(folder, out, *more):
    """A run whose gradients can be compared.

    In a fresh model, boxes and sampling points lie exactly on edges and centres of pixels, as the targets do. There the
    losses and bilinear interpolation have kinks, so the last bit decides between two gradients. Moving the weights a
    little avoids that. The images have 128 px, as the coarsest level of 64 px is a single pixel: GroupNorm over two
    channels makes 1 and -1 of it, however nearly equal they are.
    """
    run = new_run(folder, out, "--image-size", 128, *more)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return run


def assert_same_gradient(a, b):
    """Up to float32 sums in another order, which differ by 1e-6 of the norm."""
    assert (a - b).norm() < 1e-5 * b.norm()


def parts_of(run, *parts):
    return [data.collate([run.train_set[i] for i in part]) for part in parts]


# Images 0, 3, 6 and 9 hold two objects each, so that every division makes as many groups of denoising queries.
FOUR = (0, 3, 6, 9)
