"""A page that explains the model with your own image: eleven steps, and any object under the pointer.

    python -m tools.explain --ckpt runs/demo/best.pt image.jpg                  explained.html
    python -m tools.explain --ckpt di.pt --against maskdino.pt image.jpg        beside a second model's boxes and masks

The page is one file that a browser opens without a network. Its numbers are made here, from `model(image, trace=True)`;
explain.html shows them. From Python: `page(trained, picture)` is the HTML.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from contourpy import contour_generator
from matplotlib import colormaps
from PIL import Image
from torchvision.ops import box_iou, nms
from torchvision.transforms.functional import pil_to_tensor

from datasets.geometry import shortest_side
from datasets.images import read_image
from dimaskdino import cell_centers, full_size_boxes, full_size_masks, mask_logits, select, sine_of_grid
from util.flags import user_path
from util.log import try_output, unused
from util.weights import load_model

MOST = 9  # objects on the page: keys 1 to 9
SCORE = 0.3  # least score of an object
SAME = 0.5  # IoU from which two boxes show the same object
LISTENED = 10  # tokens that Eq. 2 draws for each


def boxes_of(prediction, queries=slice(None)):
    """The boxes [n 4] of some queries as (x0, y0, x1, y1) in pixels of the image that the model got."""
    return full_size_boxes(prediction, 0, queries, (1, 1), (1, 1))


@torch.inference_mode()
def page_data(trained, picture, against=None):
    """All that the page shows of a PIL image, as built-in types. Lengths are in pixels of the image that the model got.

    Objects are the queries whose best class reaches SCORE, best first, but one for each object; or the best query.
    """
    picture = shortest_side(*trained.test_size)(None, *picture.size).image(picture)
    pixels = pil_to_tensor(picture)[None]
    model = trained.model
    outputs = model(pixels, trace=True)
    trace = outputs["trace"]
    boxes = boxes_of(outputs)
    height, width = (4 * side for side in outputs["pixels"].shape[2:])  # with padding
    strides = [8 * 2**level for level in range(model.config.levels)]
    levels = [(-(-height // stride), -(-width // stride)) for stride in strides]
    scores, labels = outputs["logits"][0].sigmoid().sort(descending=True)  # [Q K]
    distinct = nms(boxes, scores[:, 0], SAME)
    queries = distinct[: (scores[distinct, 0] >= SCORE).sum().clamp(1, MOST)]  # [n]
    masks, _ = full_size_masks(mask_logits(outputs, 0, queries), (height, width), (height, width))
    padded = torch.tensor([width, height])
    x, y = (cell_centers(levels, None) * padded).long().T
    on = masks[:, y, x]  # [n N]: which tokens have their centre on which object
    data = {
        "config": dataclasses.asdict(model.config),
        "classes": [html.escape(name) for name in trained.classes],
        "picture": png(picture),
        "size": picture.size,
        "padded": [width, height],
        "shades": colormaps["viridis"](range(256), bytes=True)[:, :3].tolist(),
        "levels": levels,
        "shapes": {name: list(x.shape[1:]) for name, x in trace.items()},
        "queries": queries.tolist(),
        "labels": labels[queries, :5].tolist(),
        "scores": scores[queries, :5].tolist(),
        "layers": [layers_of(outputs, query, picture) for query in queries.tolist()],
        "probability": (100 * mask_logits(outputs, 0, queries).sigmoid()).round().int().flatten(1).tolist(),
        **de_imbalance(model, trace, queries, on, padded),
    }
    if model.config.bato:
        data |= bato(model, outputs, levels, boxes[queries], on)
    if against:
        others = against.model(pixels)
        same = box_iou(boxes[queries], boxes_of(others)).argmax(1)
        data["against"] = [layers_of(others, query, picture) for query in same.tolist()]
    return data


def layers_of(outputs, query, picture):
    """Eq. 9: in each layer, a query's box, its mask, and the IoU of the box and that around the mask."""
    size = picture.height, picture.width
    layers = []
    for prediction in outputs["layers"]:
        masks, _ = full_size_masks(mask_logits(prediction, 0, [query]), size, size)
        path, around = outline(masks[0])
        box = boxes_of(prediction, [query])
        layers.append({"box": box[0].tolist(), "mask": path, "fit": box_iou(box, around).item()})
    return layers


def outline(mask):
    """A mask [H W] as an SVG path, halfway between its pixels' centres and those outside, and the box [1 4] around its
    largest piece."""
    lines = [line - 0.5 for line in contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5)]
    largest = max(lines, key=lambda line: np.ptp(line, 0).prod(), default=np.zeros((1, 2)))
    path = ""
    for line in lines:
        steps = np.diff(line, axis=0)
        turns = line[:-1][(steps != np.roll(steps, 1, 0)).any(1)]  # between them a line goes straight on
        path += "M" + "L".join(f"{x:g} {y:g}" for x, y in turns) + "z"
    return path, torch.tensor([[*largest.min(0), *largest.max(0)]])


def de_imbalance(model, trace, queries, on, padded):
    """Eq. 1 to 4: which tokens are selected, whom they listen to, and where the queries [n] read T_i."""
    T_s1 = trace["T_s1"]
    T_s2 = trace["T_s2"]
    normed = model.interactions[-1].norm(T_s2) if model.interactions else T_s2
    data = {"on": mean(on.any(0))}
    for name, index, tokens in (("first", trace["index_1"][0], T_s1), ("second", trace["index_2"][0], normed)):
        best = model.det_head.classes(tokens)[0].sigmoid().max(1)
        data[name] = {
            "index": index.tolist(),
            "scores": best.values.tolist(),
            "labels": best.indices.tolist(),
            "on": mean(on.any(0)[index]),
        }
    if model.interactions:
        placed = T_s1 + model.interactions[0].position(trace["box_s1"])
        weights = model.interactions[0].layers[0].attention.mha(placed, placed, T_s1)[1][0]  # [k1 k1]
        most = weights.topk(min(LISTENED, len(weights)))
        data["to"] = most.indices.tolist()
        data["weights"] = most.values.tolist()
        data["listens"] = [shares(weights, mask, mask) for mask in on[:, trace["index_1"][0]]]
    attention = model.residual.cross_attention
    position = model.position(trace["box_s2"])
    token = model.residual.self_attention(T_s2, T_s2 + position, T_s2 + position, T_s2) + position
    shape = len(queries), model.config.heads, model.config.levels, model.config.points
    offsets = attention.offsets(token)[0, queries].view(*shape, 2)
    weights = attention.weights(token)[0, queries].view(*shape[:2], -1).softmax(-1).view(*shape, 1) / shape[1]
    center, size = trace["box_s2"][0, queries, None, None, None].chunk(2, -1)
    points = (center + offsets * size * (0.5 / shape[3])) * padded
    level = torch.arange(shape[2])[:, None, None].expand(*shape, 1)
    data["samples"] = torch.cat([points, level, weights], -1).flatten(1, 3).tolist()  # of a query, weights sum to 1
    return data


def bato(model, outputs, levels, boxes, on):
    """Eq. 5 to 8: the object that each guiding token's box shows, -1 for none; the cosine of all guiding tokens and the
    one that shows an object best; how much every token attends to the guiding tokens of each object; and T_i and T_bal
    at the finest level, in which the three directions that vary most are red, green and blue."""
    trace = outputs["trace"]
    guidance = model.config.guidance
    stages = {"Q_bal": outputs["layers"][1], "T_s2": outputs["layers"][0], "T_s1": outputs["selection"]}
    guide_boxes = boxes_of(stages[guidance])
    if model.config.guiding_tokens:
        _, best = select(model.det_head.scores(trace[guidance]), model.config.guiding_tokens)
        guide_boxes = guide_boxes[best[0]]
    fits = box_iou(boxes, guide_boxes)
    own = fits.argmax(1)
    owner = torch.where(fits.amax(0) >= SAME, fits.argmax(0), -1)
    owner[own] = torch.arange(len(own))
    unit = nnf.normalize(trace["T_g"][0], dim=1)
    placed = trace["T_i"] + sine_of_grid(levels, model.config.dim, None)
    weights = model.bato.attention.mha(placed, trace["T_g"], trace["T_g"])[1][0]  # [N G]
    height, width = levels[0]
    maps = torch.cat([trace["T_i"], trace["T_bal"]])[:, : height * width]
    maps = maps - maps.mean(1, keepdim=True)
    maps = maps @ torch.linalg.svd(maps.flatten(0, 1), full_matrices=False).Vh[:3].T
    low, high = maps.quantile(torch.tensor([0.02, 0.98]), 1, keepdim=True)
    pixels = ((maps - low) / (high - low + 1e-9)).clamp(0, 1).mul(255).byte().unflatten(1, (height, width))
    return {
        "guides": owner.tolist(),
        "guide_boxes": guide_boxes.tolist(),
        "alike": (unit[own] @ unit.T).tolist(),
        "attends": [shares(weights, owner == i, mask) for i, mask in enumerate(on)],
        "colours": [png(Image.fromarray(x.numpy())) for x in pixels],
    }


def shares(weights, keys, queries):
    """How much of its attention [Q K] each query gives to some keys [K] (bool), the mean of this over some queries [Q]
    (bool) and over the others, and what it is by chance."""
    share = weights[:, keys].sum(1)
    return {"of": share.tolist(), "on": mean(share[queries]), "off": mean(share[~queries]), "chance": mean(keys)}


def mean(values):
    return values.float().mean().item()


def png(image):
    """An image as an address that holds it."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def page(trained, picture, against=None):
    """The page as HTML. trained, against: models as load_model returns them; picture: a PIL image, RGB."""
    data = json.dumps(page_data(trained, picture, against))
    short = json.loads(data, parse_float=lambda x: round(float(x), 4), parse_constant=lambda nan: None)
    text = json.dumps(short, separators=(",", ":")).replace("<", "\\u003c")
    return Path(__file__).with_suffix(".html").read_text().replace("/*DATA*/ null", text)


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
        text = page(load_model(args.ckpt), read_image(args.image), against)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{out} explains what {args.ckpt} does with {args.image}")


if __name__ == "__main__":
    main()
