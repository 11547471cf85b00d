"""How a model is trained: the paper's settings (4.1, appendix B), schedule and parameter groups."""

import dataclasses
import math
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are the paper's for COCO; what it leaves open follows the released code."""

    epochs: int = 50
    batch_size: int = 16  # over all processes and accumulated parts
    lr: float = 1e-4
    backbone_lr: float = 0.1  # times lr
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05  # but none for norms and embeddings
    clip: float = 0.01  # norm of the gradient of the whole model
    detection_loss: float = 1.0  # factor on the weights of class and box losses; table 3: 0.1
    mask_points: int = 12544  # points at which masks are compared
    denoising: int = 100  # queries that training adds, at most
    label_noise: float = 0.2  # share of the denoising queries with a random label
    warmup: int = 0  # steps
    schedule: str = "steps"  # the rate falls to a tenth at each of `drops`; "cosine": to zero along a cosine
    drops: tuple[float, ...] = (0.9, 0.95)  # as fractions of all steps
    augmentation: str = "jitter"  # "flips", "none": see geometry.AUGMENTATIONS
    image_size: int = 1024  # side of the square training images
    test_size: tuple[int, int] = (800, 1333)  # shortest side of test images, and how far the longest may go

    @classmethod
    def bdd100k(cls) -> "Recipe":
        return cls(epochs=68, batch_size=8, drops=(50 / 68,))

    @classmethod
    def tiny(cls) -> "Recipe":
        """For Config.tiny() on `shapes`: all of it learns from scratch, in few steps."""
        return cls(
            epochs=12,
            batch_size=8,
            lr=2e-3,
            backbone_lr=1.0,
            betas=(0.9, 0.98),
            clip=0.1,
            mask_points=256,
            denoising=16,
            label_noise=0.5,
            warmup=100,
            schedule="cosine",
            augmentation="flips",
            image_size=128,
            test_size=(128, 128),
        )

    def __post_init__(self):
        if self.schedule not in ("steps", "cosine"):
            raise ValueError(f"schedule={self.schedule!r} is not one of steps, cosine")
        for name in ("epochs", "batch_size", "lr", "clip", "mask_points", "image_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0")

    def replace(self, **changes) -> "Recipe":
        """The recipe with some fields changed; the size of test images goes with that of training images."""
        zoom = changes.get("image_size", self.image_size) / self.image_size
        return dataclasses.replace(self, test_size=tuple(round(side * zoom) for side in self.test_size), **changes)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, 0 <= step < steps, as a factor of lr."""
        warmup = min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            return warmup * (1 + math.cos(math.pi * step / steps)) / 2
        return warmup * 0.1 ** sum(step >= round(fraction * steps) for fraction in self.drops)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Groups for an optimizer: weight decay for all but norms, tables of embeddings and Swin's position biases, and a
    learning rate of its own, `base_lr`, for the backbone."""
    groups = {}
    for prefix, module in model.named_modules():
        plain = not isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d | nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                kind = prefix.startswith("backbone"), plain and name != "relative_position_bias_table"
                groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": recipe.lr * (recipe.backbone_lr if backbone else 1),
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), parameters in groups.items()
    ]
