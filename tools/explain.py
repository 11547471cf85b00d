"""A page that explains the model with your own image: eleven steps, and any object under the pointer.

    python -m tools.explain --ckpt runs/demo/best.pt image.jpg                  explained.html
    python -m tools.explain --ckpt di.pt --against maskdino.pt image.jpg        beside a second model's boxes and masks

The page is one file that a browser opens without a network. Its numbers are made here, from `model(image, trace=True)`
and from what goes into three modules; explain.html shows them. From Python: `page(trained, picture)` is the HTML.
"""

import argparse
import base64
import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torchvision.ops import box_iou, masks_to_boxes
from torchvision.transforms.functional import pil_to_tensor

from datasets.geometry import shortest_side
from datasets.images import read_image
from dimaskdino import cell_centers, full_size_boxes, full_size_masks, mask_logits
from util.flags import user_path
from util.log import try_output, unused
from util.weights import load_model

MOST = 9  # objects on the page: keys 1 to 9
SCORE = 0.3  # least score of an object
SAME = 0.5  # IoU from which two masks show the same object
LISTENED = 10  # tokens that Eq. 2 draws for each
INTERACTION = "interactions.0.layers.0.attention"
RESIDUAL = "residual.cross_attention"
BATO = "bato.attention"


class Story:
    """An image's way through a model: the trace, the inputs of some modules, and the objects that it finds.

    Lengths are in pixels of the resized image, boxes are (x0, y0, x1, y1). objects: the queries, best first, that reach
    SCORE and show different objects larger than a token; if there is none, the best query.
    """

    def __init__(self, trained, picture, test_size):
        self.model, self.classes = trained.model.eval(), trained.classes
        self.picture = shortest_side(*test_size)(None, *picture.size).image(picture)
        self.modules, self.inputs = dict(self.model.named_modules()), {}
        hooks = [
            self.modules[place].register_forward_pre_hook(lambda _, x, at=place: self.inputs.update({at: x}))
            for place in (INTERACTION, RESIDUAL, BATO)
            if place in self.modules
        ]
        try:
            self.outputs = self.model(pil_to_tensor(self.picture)[None], trace=True)
        finally:
            for hook in hooks:
                hook.remove()
        self.trace, self.level_shapes = self.outputs["trace"], self.inputs[RESIDUAL][4]
        self.index_1, self.index_2 = (self.trace[f"index_{i}"][0].numpy() for i in (1, 2))
        self.size = self.picture.height, self.picture.width
        self.padded = np.array([side + -side % 32 for side in self.picture.size])  # of x, of y
        self.scores = self.outputs["logits"][0].float().sigmoid()
        self.objects = self.find_objects()
        x, y = (cell_centers(self.level_shapes, None).numpy() * self.padded).astype(int).T
        padding = [(0, 0), *((0, padded - side) for padded, side in zip(self.padded[::-1], self.size, strict=True))]
        masks = np.pad(self.masks_of(self.outputs, self.objects).numpy(), padding)
        self.on = masks[:, y, x]  # [n N]: which tokens have their centre on which object

    def find_objects(self):
        best = self.scores.amax(-1)
        order = best.argsort(descending=True)[: max(1, min(100, int((best >= SCORE).sum())))].tolist()
        found, masks, token = [], [], np.prod(self.padded) / np.prod(self.level_shapes[0])
        for query, mask in zip(order, self.masks_of(self.outputs, order), strict=True):
            if mask.sum() >= token and not any(overlap(mask[None], other[None]) >= SAME for other in masks):
                found.append(query)
                masks.append(mask)
        return found[:MOST] or order[:1]

    def masks_of(self, prediction, queries):
        """Masks [n H W] (bool) of queries in a prediction of the model."""
        return full_size_masks(mask_logits(prediction, 0, queries), self.size, self.size)[0]

    def boxes_of(self, prediction, queries):
        """Boxes [n 4] of queries in a prediction of the model."""
        return full_size_boxes(prediction, 0, queries, self.size, self.size)

    def layers_of(self, queries):
        """Of each query, in each layer's prediction: its box, its mask as run lengths, and how well they fit."""
        layers = []
        for prediction in self.outputs["layers"]:
            masks, boxes = self.masks_of(prediction, queries), self.boxes_of(prediction, queries)
            fits = [round(float(box_iou(box[None], around(mask))), 3) for box, mask in zip(boxes, masks, strict=True)]
            shown = zip(rounded(boxes, 1), [runs(mask.numpy()) for mask in masks], fits, strict=True)
            layers.append([{"box": box, "mask": mask, "fit": fit} for box, mask, fit in shown])
        return [list(one) for one in zip(*layers, strict=True)]

    def attention(self, place):
        """The weights [Q K] of an attention of the model, mean over its heads: it is called again on what it got."""
        _, query, key, value = self.inputs[place][:4]
        return self.modules[place].mha(query, key, value, need_weights=True)[1][0].float().numpy()

    def selection(self, index, tokens):
        """Eq. 1, 3: selected tokens, the score and the label of each one's best class."""
        best = self.model.det_head.classifier(tokens[0].float()).sigmoid().max(-1)
        return {"index": index.tolist(), "scores": rounded(best.values, 3), "labels": best.indices.tolist()}

    def residual(self, query):
        """Eq. 4: the points [h L P 2] where a query reads T_i, their weights [h L P], which sum to 1 for each head, and
        the share of the weight on tokens that the selections dropped."""
        attention, config = self.modules[RESIDUAL], self.model.config
        x, position, reference = self.inputs[RESIDUAL][:3]
        token, shape = (x + position)[0, query], (config.heads, config.levels, config.points)
        offsets = attention.offsets(token).float().view(*shape, 2)
        weights = attention.weights(token).float().view(config.heads, -1).softmax(-1).view(shape).numpy()
        center, size = reference[0, query].float().chunk(2)
        points, dropped, start = (center + offsets * size * (0.5 / config.points)).numpy(), 0, 0
        for level, (height, width) in enumerate(self.level_shapes):
            x, y = np.floor(points[:, level] * (width, height)).astype(int).transpose(2, 0, 1)
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            lost = inside & ~np.isin(start + y * width + x, self.index_2)
            dropped += (weights[:, level] * lost).sum() / config.heads
            start += height * width
        return {
            "points": rounded(points * self.padded, 1),
            "weights": rounded(weights, 4),
            "dropped": rounded(dropped, 4),
        }

    def guides(self):
        """Eq. 5 to 7: the object [G] that each guiding token's prediction shows, -1 for none, and its box [G 4]."""
        config, layers = self.model.config, self.outputs["layers"]
        prediction = {"Q_bal": layers[1], "T_s2": layers[0], "T_s1": self.outputs["selection"]}[config.guidance]
        queries = torch.arange(prediction["logits"].shape[1])
        if config.guiding_tokens:
            scores = self.model.det_head.classifier(self.trace[config.guidance][0].float()).amax(-1)
            queries = scores.topk(min(config.guiding_tokens, len(scores))).indices
        alike = overlap(mask_logits(self.outputs, 0, self.objects) > 0, mask_logits(prediction, 0, queries) > 0)
        owner = torch.where(alike.amax(0) >= SAME, alike.argmax(0), -1)
        for i in reversed(range(len(self.objects))):  # the most alike one is its own
            owner[alike[i].argmax()] = i
        return owner.numpy(), self.boxes_of(prediction, queries)


def around(mask):
    """The box [1 4] around the largest piece of a mask [H W]."""
    pieces, count = ndimage.label(mask.numpy())
    if not count:
        return torch.zeros(1, 4)
    largest = 1 + np.bincount(pieces.flatten())[1:].argmax()
    return masks_to_boxes(torch.from_numpy(pieces == largest)[None]) + torch.tensor([0, 0, 1, 1])


def overlap(a, b):
    """The IoU of masks [n H W] and [m H W]: [n m]"""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


# ---- What the page gets: numbers, run lengths, bytes -----------------------------------------------------------------


def rounded(x, digits):
    return np.round(np.asarray(x, float), digits).tolist()


def mean(values, digits=4):
    return round(float(values.mean()), digits) if values.size else None


def runs(mask):
    """A mask [H W] as the lengths of its runs, row by row, the first outside of the mask."""
    edges = np.flatnonzero(np.diff(np.pad(mask.reshape(-1).astype(np.int8), 1)))
    return np.diff(edges, prepend=0).tolist()


def heat(values):
    """Values from 0 on as bytes in base64, 255 for the largest."""
    top = float(max(values.max(), 1e-9))
    return {"top": top, "bytes": base64.b64encode((values / top * 255).round().astype(np.uint8).tobytes()).decode()}


def png(pixels):
    """An image [H W 3] as an address that holds it."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def alike(tokens, owner, count):
    """The mean cosine [n+1 n+1] of the guiding tokens [G C] of two objects, in the last row of none. No token is
    compared with itself; None where there is nothing to compare."""
    unit = tokens / (np.linalg.norm(tokens, axis=1, keepdims=True) + 1e-9)
    cosine, others = unit @ unit.T, ~np.eye(len(unit), dtype=bool)
    members = [owner == i for i in (*range(count), -1)]
    return [[mean(cosine[np.outer(a, b) & others], 2) for b in members] for a in members]


def as_colours(story):
    """The finest level of T_i and of T_bal as images: the three directions in which they vary most are red, green and
    blue."""
    height, width = story.level_shapes[0]
    maps = [story.trace[name][0, : height * width].float().numpy() for name in ("T_i", "T_bal")]
    maps = [x - x.mean(0) for x in maps]
    directions = np.linalg.svd(np.concatenate(maps), full_matrices=False)[2][:3].T
    images = []
    for x in maps:
        low, high = np.percentile(x @ directions, (2, 98), 0)
        levels = 255 * ((x @ directions - low) / (high - low + 1e-9)).clip(0, 1)
        images.append(png(levels.round().astype(np.uint8).reshape(height, width, 3)))
    return images


@torch.inference_mode()
def page_data(trained, picture, against=None):
    """All that the page shows of a PIL image, as built-in types."""
    story = Story(trained, picture, trained.test_size)
    model, trace, index_1, index_2 = story.model, story.trace, story.index_1, story.index_2
    interacted = model.interactions[-1].norm(trace["T_s2"]) if model.interactions else trace["T_s2"]
    data = {
        "config": dataclasses.asdict(model.config),
        "classes": story.classes,
        "picture": png(story.picture),
        "size": story.size[::-1],
        "padded": story.padded.tolist(),
        "levels": story.level_shapes,
        "shapes": {name: list(x.shape[1:]) for name, x in trace.items()},
        "first": story.selection(index_1, trace["T_s1"]),
        "second": story.selection(index_2, interacted),
        "on": [mean(story.on.any(0)[index]) for index in (slice(None), index_1, index_2)],
        "objects": [],
    }
    for query, on, layers in zip(story.objects, story.on, story.layers_of(story.objects), strict=True):
        best = story.scores[query].sort(descending=True)
        data["objects"].append({
            "query": query,
            "classes": [*zip(best.indices[:5].tolist(), rounded(best.values[:5], 3), strict=True)],
            "tokens": [int(on[index].sum()) for index in (slice(None), index_1, index_2)],
            "layers": layers,
            "probability": heat(mask_logits(story.outputs, 0, [query])[0].float().sigmoid().numpy()),
            "residual": story.residual(query),
        })  # fmt: skip
    if model.interactions:
        weights, on = story.attention(INTERACTION), story.on[:, index_1]  # [k1 k1], [n k1]
        listened = (-weights).argsort(1, kind="stable")[:, :LISTENED]
        data["listens"] = {"to": listened.tolist(), "weights": rounded(np.take_along_axis(weights, listened, 1), 4)}
        data["listens"]["shares"] = rounded(weights @ on.T, 4)  # [k1 n]: of a token's attention, on each object
        data["listens"]["object"] = np.where(on.any(0), on.argmax(0), -1).tolist()
        for one, here, shares in zip(data["objects"], on, on @ weights.T, strict=True):
            one["listens"] = {"on": mean(shares[here]), "off": mean(shares[~here]), "chance": mean(here)}
    if model.config.bato:
        owner, boxes = story.guides()
        names, weights, count = ("T_g_mask", "T_g_box", "T_g"), story.attention(BATO), len(story.objects)
        data["guides"] = {name: alike(trace[name][0].float().numpy(), owner, count) for name in names}
        data["guides"] |= {"object": owner.tolist(), "boxes": rounded(boxes, 1)}
        data["colours"] = as_colours(story)
        for i, (one, on) in enumerate(zip(data["objects"], story.on, strict=True)):
            share = weights[:, owner == i].sum(1)  # [N]
            one["attend"] = {"on": mean(share[on]), "off": mean(share[~on]), "chance": mean(owner == i)} | heat(share)
    if against:
        other = Story(against, picture, trained.test_size)
        same = overlap(mask_logits(story.outputs, 0, story.objects) > 0, mask_logits(other.outputs, 0) > 0).argmax(1)
        data["against"] = {"config": dataclasses.asdict(other.model.config), "layers": other.layers_of(same.tolist())}
    return data


def page(trained, picture, against=None):
    """The page as HTML. trained, against: models as load_model returns them; picture: a PIL image, RGB."""
    data = json.dumps(page_data(trained, picture, against), allow_nan=False, separators=(",", ":"))
    return Path(__file__).with_suffix(".html").read_text().replace("/*DATA*/ null", data.replace("<", "\\u003c"))


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("image", type=user_path, help="any image file")
    add("--ckpt", required=True, type=user_path, metavar="CKPT", help="a checkpoint of train.py, or the authors'")
    add("--against", type=user_path, metavar="CKPT", help="another one, whose boxes and masks are shown beside")
    add("--out", type=user_path, help="the page (explained.html, or a name that is free)")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    try:
        out = args.out or unused(Path("explained.html"))
        try_output(out, folder=False)
        against = load_model(args.against) if args.against else None
        html = page(load_model(args.ckpt), read_image(args.image), against)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{out} explains what {args.ckpt} does with {args.image}")


if __name__ == "__main__":
    main()
