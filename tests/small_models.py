"""A small model, made-up images and objects: what the tests of the model, the losses and the weights share."""

import dataclasses

import torch
from hypothesis import settings

from dimaskdino import Config, DIMaskDINO
from losses import Criterion, denoising_queries
from train import Recipe

law = settings(deadline=None, max_examples=25)

SMALL = dataclasses.replace(
    Config.tiny(), num_classes=5, dim=32, heads=2, ffn=48, encoder_layers=1, decoder_layers=3, selection=(12, 6),
)  # fmt: skip
TRAINING = dataclasses.replace(Recipe.tiny(), denoising=9, mask_points=48)
RELEASED = {name: getattr(Config.released(), name) for name in ("box_guide", "guide_value", "pixel_tokens")}


def build(seed=0, trained=True, **changes):
    """A small model; `trained` moves its weights off their start, where some are zero."""
    torch.manual_seed(seed)
    model = DIMaskDINO(dataclasses.replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters() if trained else ():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def pictures(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def objects(*counts, size=(64, 64), classes=5, seed=0):
    """Targets with so many objects in each image: boxes anywhere inside, masks that fill them."""
    generator, targets = torch.Generator().manual_seed(seed), []
    for n in counts:
        centers = torch.rand(n, 2, generator=generator) * 0.4 + 0.3
        sides = torch.rand(n, 2, generator=generator) * 0.4 + 0.1
        masks = torch.zeros(n, *size, dtype=torch.bool)
        corners = torch.cat((centers - sides / 2, centers + sides / 2), 1) * torch.tensor([size[1], size[0]] * 2)
        for mask, (x0, y0, x1, y1) in zip(masks, corners.int().tolist(), strict=True):
            mask[y0 : y1 + 1, x0 : x1 + 1] = True
        labels, boxes = torch.randint(0, classes, (n,), generator=generator), torch.cat((centers, sides), 1)
        targets.append({"labels": labels, "boxes": boxes, "masks": masks, "image_id": len(targets)})
    return targets


def step(model, images, targets, recipe=TRAINING):
    """The losses of one training step, with the random points of seed 0."""
    torch.manual_seed(0)
    denoising = denoising_queries(targets, model.config.num_classes, recipe.denoising)
    return Criterion(recipe)(model(images, denoising), targets, denoising=denoising)


def factors_of(masks):
    """Mask logits [B Q H W] as the factors that a prediction has of its masks: each is its own pixels."""
    embedding = torch.eye(masks.shape[1], dtype=masks.dtype).repeat(len(masks), 1, 1)
    return {"mask_embedding": embedding, "pixels": masks}


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
