"""Small data, small runs: what the tests of the programs share."""

import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

import train
from datasets import collate
from dimaskdino import DIMaskDINO
from losses import Criterion
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


def flags_of(folder, out, *more):
    """Flags of a small run; later ones override those of SMALL."""
    return [*SMALL, "--data", str(folder), "--out", str(out), *map(str, more)]


def train_in(folder, out, *more):
    """The exit code of train.py, in this process."""
    return exit_code(train.main, flags_of(folder, out, *more))


def exit_code(action, *arguments):
    try:
        action(*arguments)
    except SystemExit as end:
        return end.code
    return 0


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out, name="last.pt"):
    return read_checkpoint(out / name)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- Single steps ----------------------------------------------------------------------------------------------------


class Steps:
    """A small model and what a step of it needs, with the losses and the gradient of the last one."""

    def __init__(self, amp="off", **recipe):
        args = train.parse_training(SMALL)
        self.recipe = train.choose_recipe(args).replace(**recipe)
        torch.manual_seed(0)
        self.model = DIMaskDINO(train.choose_config(args, 3)).train()
        self.parallel = self.model
        self.criterion = Criterion(self.recipe)
        self.optimizer = train.make_optimizer(self.model, self.recipe)
        self.amp = amp
        self.scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=amp == "fp16")
        self.optimizer.register_step_pre_hook(self.look)

    def look(self, *_):
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def __call__(self, *micro_batches):
        self.losses, self.norm = train.train_step(
            self.parallel, self.criterion, self.optimizer, self.scaler, micro_batches, self.recipe, self.amp
        )
        return self


@contextlib.contextmanager
def without_chance():
    """Sampled points and noise are always the same, so that runs differ in nothing but how they divide a batch."""

    def same_points(number, points, device):
        return torch.linspace(-0.8, 0.8, 2 * points).view(1, points, 2).repeat(number, 1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("losses.random_points", same_points)
        patch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 0.4))
        patch.setattr(torch, "randint_like", lambda like, low, high: torch.full_like(like, low))
        yield


def comparable():
    """Steps whose gradients can be compared, whole and unclipped.

    In a fresh model, boxes and sampling points lie exactly on edges and centres of pixels, as the targets do. There the
    losses and bilinear interpolation have kinks, so the last bit decides between two gradients. Moving the weights a
    little avoids that. The images have 128 px, as the coarsest level of 64 px is a single pixel: GroupNorm over two
    channels makes 1 and -1 of it, however nearly equal they are. Batch statistics are fixed, as they depend on how a
    batch is divided.
    """
    steps = Steps(clip=1e9, image_size=128)
    with torch.no_grad():
        for parameter in steps.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    steps.model.backbone.eval()
    return steps


def gradient_of(steps, *micro_batches):
    with without_chance():
        return steps(*micro_batches).gradient


def assert_same_gradient(a, b):
    """Up to float32 sums in another order, which differ by 1e-6 of the norm."""
    assert (a - b).norm() < 1e-5 * b.norm()


def open_training(folder, *more):
    """The training set of a small run."""
    args = train.parse_training(flags_of(folder, "unused", *more))
    return train.open_data(args, train.choose_recipe(args))[0]


def batch_of(dataset, *indices):
    return collate([dataset[i] for i in indices])


# Images 0, 3, 6 and 9 hold two objects each, so that every division makes as many groups of denoising queries.
FOUR = (0, 3, 6, 9)
