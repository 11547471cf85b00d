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
import torch.nn.functional as nnf
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
        self.model = trained.model.eval()
        self.picture = shortest_side(*test_size)(None, *picture.size).image(picture)
        self.modules = dict(self.model.named_modules())
        self.inputs = {}
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
        self.trace = self.outputs["trace"]
        self.level_shapes = self.inputs[RESIDUAL][4]
        self.index_1 = self.trace["index_1"][0].numpy()
        self.index_2 = self.trace["index_2"][0].numpy()
        self.size = self.picture.height, self.picture.width
        self.padded = np.array([side + -side % 32 for side in self.picture.size])  # of x, of y
        self.scores = self.outputs["logits"][0].float().sigmoid()
        self.objects = self.find_objects()
        x, y = (cell_centers(self.level_shapes, None).numpy() * self.padded).astype(int).T
        inside = (x < self.picture.width) & (y < self.picture.height)
        masks = self.masks_of(self.outputs, self.objects).numpy()
        self.on = np.zeros((len(masks), len(x)), bool)  # [n N]: which tokens have their centre on which object
        self.on[:, inside] = masks[:, y[inside], x[inside]]

    def find_objects(self):
        best = self.scores.amax(-1)
        count = int((best >= SCORE).sum().clamp(1, 100))
        order = best.topk(count).indices.tolist()
        token = np.prod(self.padded) / np.prod(self.level_shapes[0])
        found = []
        masks = []
        for query, mask in zip(order, self.masks_of(self.outputs, order)):
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

    def layers_of(self, query):
        """Eq. 9: in each layer, a query's box, its mask, and the IoU of the box and the one around the mask."""
        layers = []
        for prediction in self.outputs["layers"]:
            mask = self.masks_of(prediction, [query])[0]
            box = self.boxes_of(prediction, [query])
            fit = float(box_iou(box, around(mask)))
            layers.append({"box": rounded(box[0], 1), "mask": mask_png(mask), "fit": round(fit, 3)})
        return layers

    def attention(self, place):
        """The weights [Q K] of an attention of the model, mean over its heads: it is called again on what it got."""
        _, query, key, value = self.inputs[place][:4]
        return self.modules[place].mha(query, key, value, need_weights=True)[1][0].float().numpy()

    def selection(self, index, tokens):
        """Eq. 1, 3: selected tokens, the score and the label of each one's best class, and the share on an object."""
        best = self.model.det_head.classifier(tokens[0].float()).sigmoid().max(-1)
        return {
            "index": index.tolist(),
            "scores": rounded(best.values, 3),
            "labels": best.indices.tolist(),
            "on": mean(self.on.any(0)[index]),
        }

    def samples(self, query):
        """Eq. 4: where a query reads T_i, as (x, y, level, weight) [h*L*P 4]. The weights sum to 1."""
        attention = self.modules[RESIDUAL]
        config = self.model.config
        x, position, reference = self.inputs[RESIDUAL][:3]
        token = (x + position)[0, query]
        shape = config.heads, config.levels, config.points
        offsets = attention.offsets(token).float().view(*shape, 2)
        weights = attention.weights(token).float().view(config.heads, -1).softmax(-1).view(*shape, 1) / config.heads
        center, size = reference[0, query].float().chunk(2)
        points = (center + offsets * size * (0.5 / config.points)) * torch.from_numpy(self.padded)
        level = torch.arange(config.levels)[:, None, None].expand(*shape, 1)
        return rounded(torch.cat([points, level, weights], -1).flatten(0, 2), 5)

    def guides(self):
        """Eq. 5 to 7: the object that each guiding token's prediction shows [G], -1 for none, its box [G 4], and the
        cosine of it and of each object's most alike guiding token [n G]."""
        config = self.model.config
        layers = self.outputs["layers"]
        prediction = {"Q_bal": layers[1], "T_s2": layers[0], "T_s1": self.outputs["selection"]}[config.guidance]
        queries = torch.arange(prediction["logits"].shape[1])
        if config.guiding_tokens:
            scores = self.model.det_head.classifier(self.trace[config.guidance][0].float()).amax(-1)
            queries = scores.topk(min(config.guiding_tokens, len(scores))).indices
        fits = overlap(mask_logits(self.outputs, 0, self.objects) > 0, mask_logits(prediction, 0, queries) > 0)
        own = fits.argmax(1)
        owner = torch.where(fits.amax(0) >= SAME, fits.argmax(0), -1)
        for i in reversed(range(len(own))):
            owner[own[i]] = i
        unit = nnf.normalize(self.trace["T_g"][0].float(), dim=1)
        return {
            "object": owner.tolist(),
            "boxes": rounded(self.boxes_of(prediction, queries), 1),
            "alike": rounded(unit[own] @ unit.T, 2),
        }


def around(mask):
    """The box [1 4] around the largest piece of a mask [H W]."""
    pieces, count = ndimage.label(mask.numpy())
    if not count:
        return torch.zeros(1, 4)
    largest = 1 + np.bincount(pieces.flatten())[1:].argmax()
    return masks_to_boxes(torch.from_numpy(pieces == largest)[None]) + torch.tensor([0, 0, 1, 1])


def overlap(a, b):
    """The IoU of masks [n H W] and [m H W]: [n m]"""
    a = a.flatten(1).float()
    b = b.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


# ---- What the page gets: numbers, bytes, images ----------------------------------------------------------------------


def rounded(x, digits):
    return np.round(np.asarray(x, float), digits).tolist()


def mean(values):
    return round(float(values.mean()), 4) if values.size else None


def heat(values):
    """Values from 0 on as bytes in base64, 255 for the largest."""
    top = float(max(values.max(), 1e-9))
    return {"top": top, "bytes": base64.b64encode((values / top * 255).round().astype(np.uint8).tobytes()).decode()}


def attention_share(weights, keys, queries):
    """How much of its attention [Q K] each query gives to some keys: as heat, the mean of some queries and of the rest,
    and by chance. keys [K], queries [Q]: bool."""
    share = weights[:, keys].sum(1)
    return {"on": mean(share[queries]), "off": mean(share[~queries]), "chance": mean(keys)} | heat(share)


def png(image, **options):
    """An image as an address that holds it."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def mask_png(mask):
    """A mask [H W], orange, transparent elsewhere."""
    image = Image.fromarray(mask.numpy().astype(np.uint8))
    image.putpalette((0, 0, 0, 224, 138, 0))
    return png(image, transparency=0)


def as_colours(story):
    """The finest level of T_i and of T_bal as images: the three directions in which they vary most are red, green and
    blue."""
    height, width = story.level_shapes[0]
    maps = np.stack([story.trace[name][0, : height * width].float().numpy() for name in ("T_i", "T_bal")])
    maps -= maps.mean(1, keepdims=True)
    directions = np.linalg.svd(np.concatenate(maps), full_matrices=False)[2][:3].T
    low, high = np.percentile(maps @ directions, (2, 98), 1, keepdims=True)
    colours = ((maps @ directions - low) / (high - low + 1e-9)).clip(0, 1)
    return [png(Image.fromarray(x.reshape(height, width, 3))) for x in (255 * colours).round().astype(np.uint8)]


@torch.inference_mode()
def page_data(trained, picture, against=None):
    """All that the page shows of a PIL image, as built-in types."""
    story = Story(trained, picture, trained.test_size)
    model = story.model
    T_s1 = story.trace["T_s1"]
    T_s2 = story.trace["T_s2"]
    data = {
        "config": dataclasses.asdict(model.config),
        "classes": trained.classes,
        "picture": png(story.picture),
        "size": story.picture.size,
        "padded": story.padded.tolist(),
        "levels": story.level_shapes,
        "shapes": {name: list(x.shape[1:]) for name, x in story.trace.items()},
        "first": story.selection(story.index_1, T_s1),
        "second": story.selection(story.index_2, model.interactions[-1].norm(T_s2) if model.interactions else T_s2),
        "on": mean(story.on.any(0)),
        "objects": [],
    }
    for query in story.objects:
        best = story.scores[query].sort(descending=True)
        data["objects"].append({
            "query": query,
            "classes": [*zip(best.indices[:5].tolist(), rounded(best.values[:5], 3))],
            "layers": story.layers_of(query),
            "probability": heat(mask_logits(story.outputs, 0, [query])[0].float().sigmoid().numpy()),
            "samples": story.samples(query),
        })  # fmt: skip
    if model.interactions:
        weights = story.attention(INTERACTION)
        listened = (-weights).argsort(1, kind="stable")[:, :LISTENED]
        data["listens"] = {"to": listened.tolist(), "weights": rounded(np.take_along_axis(weights, listened, 1), 4)}
        for one, on in zip(data["objects"], story.on[:, story.index_1]):
            one["listens"] = attention_share(weights, on, on)
    if model.config.bato:
        weights = story.attention(BATO)
        data["guides"] = story.guides()
        data["colours"] = as_colours(story)
        for i, (one, on) in enumerate(zip(data["objects"], story.on)):
            one["attend"] = attention_share(weights, np.array(data["guides"]["object"]) == i, on)
    if against:
        other = Story(against, picture, trained.test_size)
        same = overlap(mask_logits(story.outputs, 0, story.objects) > 0, mask_logits(other.outputs, 0) > 0).argmax(1)
        data["against"] = [other.layers_of(query) for query in same.tolist()]
    return data


def page(trained, picture, against=None):
    """The page as HTML. trained, against: models as load_model returns them; picture: a PIL image, RGB."""
    data = json.dumps(page_data(trained, picture, against), allow_nan=False, separators=(",", ":"))
    return Path(__file__).with_suffix(".html").read_text().replace("/*DATA*/ null", data.replace("<", "\\u003c"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("image", type=user_path, help="any image file")
    parser.add_argument("--ckpt", required=True, type=user_path, help="a checkpoint of train.py, or the authors'")
    parser.add_argument("--against", type=user_path, metavar="CKPT", help="another one, shown beside it at Eq. 9")
    parser.add_argument("--out", type=user_path, help="the page (explained.html, or a name that is free)")
    args = parser.parse_args(arguments)
    try:
        out = args.out or unused(Path("explained.html"))
        try_output(out, is_folder=False)
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
