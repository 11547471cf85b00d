"""What training minimises: denoising queries, matching, and the criterion, as in MaskDINO (appendix B of the paper).

targets: a list with one dict per image of
    labels [n] int64 in 0..K-1,
    boxes [n 4] (cx, cy, w, h) in [0, 1] of the network's input, that is of the image after padding to a multiple of 32,
    masks [n H W] bool, over the same padded input,
    image_id, for messages.
Predictions are the dicts of `logits`, `boxes` and mostly `masks` that DIMaskDINO returns, at every stage.
"""

import math
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, sigmoid_focal_loss

from dimaskdino import Masks, mask_product

# For the cost of a match and for the loss alike (released code).
WEIGHTS = {"class": 4.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}
DETECTION = ("class", "box", "giou")
LARGEST = 2**25  # pixels of objects' masks that are compared at a time
PORTION = 2**23  # sampled logits of masks that matching compares at a time, which bounds its memory


# ---- Denoising queries -----------------------------------------------------------------------------------------------


class Denoising(NamedTuple):
    """Noised objects that are to be restored. Slot j of each group holds object j of the image."""

    labels: Tensor  # [B D] int64, -1 in the empty slots of an image with fewer objects than another
    boxes_logit: Tensor  # [B D 4]
    groups: int  # D = groups * the largest number of objects in an image

    def to(self, device):
        labels, boxes_logit = (x.to(device, non_blocking=True) for x in (self.labels, self.boxes_logit))
        return Denoising(labels, boxes_logit, self.groups)

    def attention_mask(self, queries):
        """Who may not look at whom, [D+queries D+queries]: the groups at each other, the other queries at any group."""
        size = self.labels.shape[1] // max(self.groups, 1)
        group = torch.arange(self.groups, device=self.labels.device).repeat_interleave(size)
        group = torch.cat((group, group.new_full((queries,), -1)))
        return (group[:, None] != group) & (group >= 0)


def denoising_queries(targets, num_classes, queries=100, label_noise=0.2, box_noise=0.4):
    """As many groups of noised objects as fit into `queries`; none if an image has more objects, or no image has any.

    label_noise: the share of labels replaced by a random one. box_noise: centres move by up to this share of half the
    size, sizes change by up to this share.
    """
    counts = [len(target["labels"]) for target in targets]
    size = max(counts)
    groups = queries // size if size else 0
    labels = torch.cat([target["labels"] for target in targets]).repeat(groups)
    boxes = torch.cat([target["boxes"] for target in targets]).repeat(groups, 1)

    replaced = (torch.rand_like(labels.float()) < label_noise).nonzero()[:, 0]
    labels[replaced] = torch.randint_like(labels[replaced], 0, num_classes)
    reach = torch.cat((boxes[:, 2:] / 2, boxes[:, 2:]), 1)
    boxes = (boxes + (torch.rand_like(boxes) * 2 - 1) * reach * box_noise).clamp(0, 1)

    slots = [np.arange(n) + (b * groups + g) * size for g in range(groups) for b, n in enumerate(counts)]
    slots, shape = numbers(slots, labels.device), (len(targets), groups * size)
    slot_labels = labels.new_full((shape[0] * shape[1],), -1).index_copy(0, slots, labels)
    slot_boxes = boxes.new_zeros(shape[0] * shape[1], 4).index_copy(0, slots, boxes.logit(1e-5))
    return Denoising(slot_labels.view(shape), slot_boxes.view(*shape, 4), groups)


def numbers(lists, device="cpu"):
    """Lists of whole numbers as one tensor. Nobody waits for its copy."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *lists])).to(device, non_blocking=True)


# ---- Costs of predictions for objects --------------------------------------------------------------------------------


def random_points(*shape, device):
    """Points [... 2] anywhere in [-1, 1]."""
    return torch.rand(*shape, 2, device=device).mul(2).sub_(1)


def sample(maps, points):
    """Bilinear values [n m P] of maps [n m H W] at points [n P 2], (x, y) in [-1, 1]; zero outside."""
    return nnf.grid_sample(maps, points[:, :, None], align_corners=False)[..., 0]


def sample_objects(masks, objects, points):
    """Bilinear values [M P] of masks [n H W] (bool), for each M that of one object (an array [M]), at points [M P 2].

    Every object that is there is there equally often, so that its mask is read once, at the points of all of its M.
    """
    order = np.argsort(objects)
    present, values = np.unique(objects), []
    together = points.index_select(0, numbers([order], points.device)).view(len(present), -1, 2)
    for some in np.array_split(np.arange(len(present)), math.ceil(len(present) * masks[0].numel() / LARGEST)):
        chosen = masks.index_select(0, numbers([present[some]], masks.device)).float()
        values.append(sample(chosen[:, None], together[some[0] : some[-1] + 1])[:, 0])
    return torch.cat(values).view(points.shape[:2]).index_select(0, numbers([np.argsort(order)], points.device))


def giou(a, b):
    """The generalized IoU [...] of boxes (x0, y0, x1, y1) [... 4], pair by pair.

    torchvision's picks the pairs that meet by a mask, for which a GPU would wait. released code: + 1e-6, as there.
    """
    (a0, a1), (b0, b1) = a.split(2, -1), b.split(2, -1)
    meet = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0)
    hull, of_a, of_b = torch.maximum(a1, b1) - torch.minimum(a0, b0), a1 - a0, b1 - b0
    meet, hull, of_a, of_b = (sides[..., 0] * sides[..., 1] for sides in (meet, hull, of_a, of_b))
    union = of_a + of_b - meet
    return meet / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def class_and_box_costs(logits, boxes, labels, wanted):
    """Of predictions, logits [B Q K] and boxes [B Q 4], for objects, labels [B n] and boxes [B n 4]: [B Q n]."""
    p = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1)).sigmoid()
    present = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    absent = 0.75 * p**2 * -(1 - p + 1e-8).log()
    overlap = giou(box_convert(boxes, "cxcywh", "xyxy")[:, :, None], box_convert(wanted, "cxcywh", "xyxy")[:, None])
    distance = torch.cdist(boxes, wanted, 1)
    return WEIGHTS["class"] * (present - absent) + WEIGHTS["box"] * distance - WEIGHTS["giou"] * overlap


def mask_costs(logits, inside):
    """Of masks, sampled logits [B Q P], for objects, sampled masks [B n P]: cross-entropy and dice, [B Q n]."""
    p, inside_T = logits.sigmoid(), inside.transpose(1, 2)
    entropy = -(nnf.logsigmoid(-logits).sum(-1, keepdim=True) + logits @ inside_T) / logits.shape[2]
    dice = 1 - (2 * p @ inside_T + 1) / (p.sum(-1, keepdim=True) + inside.sum(-1)[:, None] + 1)
    return WEIGHTS["mask"] * entropy + WEIGHTS["dice"] * dice


# ---- The criterion ---------------------------------------------------------------------------------------------------


class Criterion(nn.Module):
    """The loss of DIMaskDINO's outputs: of the first selection, each token-interaction layer, the initial prediction
    and every decoder layer, matched to the objects one to one, and of the denoising queries, which need no matching.
    """

    def __init__(self, recipe):
        super().__init__()
        self.points = recipe.mask_points
        self.weights = {name: w * (recipe.detection_loss if name in DETECTION else 1) for name, w in WEIGHTS.items()}

    def forward(self, outputs, targets, num_objects=None):
        """outputs of DIMaskDINO, targets as above -> weighted losses {"class_selection": scalar, ..., "dice_6": ...}.

        The loss to minimise is their sum. num_objects: what they are divided by, the number of objects in the batch of
        all processes over the number of processes; None: that of these targets. Raises FloatingPointError where a
        prediction is not finite for an image with objects, with its name.
        """
        num_objects = max(sum(len(t["labels"]) for t in targets), 1) if num_objects is None else num_objects
        sets = {"selection": outputs["selection"]} | {f"{i}": x for i, x in enumerate(outputs["layers"])}
        noised = {f"denoising_{i}": x for i, x in enumerate(outputs["denoising"])}
        without_masks = {f"interaction_{i}": x for i, x in enumerate(outputs["interaction"])}
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            pairs = self.match(sets | without_masks, targets)
            divisors = dict.fromkeys(pairs, float(num_objects))
            if noised:
                *slots, groups = self.slots(outputs["denoising"][0], targets)
                pairs |= dict.fromkeys(noised, slots)
                divisors |= dict.fromkeys(noised, float(num_objects * groups))
            sets = sets | noised | without_masks  # those with masks first
            pairs, divisors = [pairs[name] for name in sets], [divisors[name] for name in sets]
            sums = self.class_and_box_losses([*sets.values()], targets, pairs)
            sums |= self.mask_losses([*filter(None, map(mask_product, sets.values()))], targets, pairs)
        divisors, losses = torch.tensor(divisors).to(outputs["logits"].device, non_blocking=True), {}
        for term, values in sums.items():
            weighted = self.weights[term] * values / divisors[: len(values)]
            losses |= {f"{term}_{name}": value for name, value in zip(sets, weighted.unbind(), strict=False)}
        return losses

    @torch.no_grad()
    def match(self, sets, targets):
        """The best one-to-one match of each set of predictions: {name: (queries [M], objects [M])}, both numbered
        through the batch, image by image, on the CPU. It waits for the device once, however many sets there are."""
        costs, before = self.costs([*sets.values()], targets).cpu().numpy(), 0
        counts, matches = [len(target["labels"]) for target in targets], {}
        for name, prediction in sets.items():
            size, queries, objects = prediction["logits"].shape[1], [], []
            for b, n in enumerate(counts):
                cost = costs[b, before : before + size, :n]
                if not np.isfinite(cost).all():
                    raise FloatingPointError(explain(name, b, prediction, targets[b]))
                matched = linear_sum_assignment(cost)
                queries.append(matched[0] + b * size)
                objects.append(matched[1] + sum(counts[:b]))
            matches[name], before = (numbers(queries), numbers(objects)), before + size
        return matches

    def costs(self, sets, targets):
        """The cost of each query for each object of its image [B, queries of all sets, most objects of an image].

        Sets with masks come first. Masks are compared at random points, the same for all of an image.
        """
        logits, boxes = (torch.cat([x[part] for x in sets], 1).float() for part in ("logits", "boxes"))
        labels, wanted = (pad_sequence([t[part] for t in targets], batch_first=True) for part in ("labels", "boxes"))
        costs = class_and_box_costs(logits, boxes, labels, wanted)
        points = torch.cat([random_points(1, self.points, device=boxes.device) for _ in targets])
        inside = [
            sample(t["masks"][:, None].float(), p.expand(len(t["masks"]), -1, -1))[:, 0]
            for t, p in zip(targets, points, strict=True)
        ]
        inside, query = pad_sequence(inside, batch_first=True), 0
        for masks, _ in joined([*filter(None, map(mask_product, sets))]):
            pixels = sample(masks.pixels.float(), points).to(masks.embedding.dtype)  # [B C P]
            for embedding in masks.embedding.split(max(1, PORTION // pixels[:, 0].numel()), 1):
                cost = mask_costs((embedding @ pixels).float(), inside)
                costs[:, query : query + cost.shape[1]] += cost
                query += cost.shape[1]
        return costs

    def slots(self, noised, targets):
        """The slots of denoising queries that hold an object and the object of each, both numbered through the batch,
        image by image, and the number of groups."""
        counts = [len(target["labels"]) for target in targets]
        total, size = noised["logits"].shape[1], max(counts)
        groups = total // size if size else 0
        slots = [np.arange(n) + b * total + g * size for b, n in enumerate(counts) for g in range(groups)]
        objects = [np.arange(n) + sum(counts[:b]) for b, n in enumerate(counts) for _ in range(groups)]
        return numbers(slots), numbers(objects), max(groups, 1)

    def class_and_box_losses(self, sets, targets, pairs):
        """{term: its sums over the sets}, given which queries of each set (numbered through the batch) are which
        objects: of "class" over all queries, of "box" and "giou" over the pairs."""
        logits, predicted = (torch.cat([x[part].flatten(0, 1) for x in sets]).float() for part in ("logits", "boxes"))
        sizes, numbers_of_pairs = [x["logits"].shape[:2].numel() for x in sets], [len(q) for q, _ in pairs]
        queries = numbers([q.numpy() + sum(sizes[:i]) for i, (q, _) in enumerate(pairs)], logits.device)
        objects = numbers([o.numpy() for _, o in pairs], logits.device)
        labels, boxes = (torch.cat([t[part] for t in targets])[objects] for part in ("labels", "boxes"))
        classes = torch.zeros_like(logits)
        classes[queries, labels] = 1
        predicted = predicted.index_select(0, queries)
        overlap = giou(*(box_convert(x, "cxcywh", "xyxy") for x in (predicted, boxes)))
        return {
            "class": sums_of(sizes, sigmoid_focal_loss(logits, classes).sum(1)),
            "box": sums_of(numbers_of_pairs, (predicted - boxes).abs().sum(1)),
            "giou": sums_of(numbers_of_pairs, 1 - overlap),
        }

    def mask_losses(self, masks, targets, pairs):
        """{"mask", "dice": their sums over the pairs of each set}, compared at points. The points of one set are drawn
        at a time, as those of all would be large."""
        wanted, logits, inside = torch.cat([target["masks"] for target in targets]), [], []
        for predicted, (_, objects) in zip(self.pair_masks(masks, pairs), pairs, strict=False):
            points = self.uncertain_points(predicted)
            logits.append(sample(predicted[:, None], points)[:, 0])
            inside.append(sample_objects(wanted, objects.numpy(), points) if len(objects) else points[..., 0])
        logits, inside = torch.cat(logits), torch.cat(inside)
        p, sizes = logits.sigmoid(), [len(objects) for _, objects in pairs[: len(masks)]]
        entropy = nnf.binary_cross_entropy_with_logits(logits, inside, reduction="none").mean(1)
        dice = 1 - (2 * (p * inside).sum(1) + 1) / (p.sum(1) + inside.sum(1) + 1)
        return {"mask": sums_of(sizes, entropy), "dice": sums_of(sizes, dice)}

    def pair_masks(self, masks, pairs):
        """The mask logits [M H W] of each set's pairs: one product for all sets with the same pixels, of no other mask.

        An image's queries are rows of a table [B R] that the image with the most of them fills.
        """
        found = []
        for joint, sizes in joined(masks):
            offsets, queries = (
                np.cumsum([0, *sizes]),
                [q.numpy() for q, _ in pairs[len(found) : len(found) + len(sizes)]],
            )
            image = np.concatenate([q // size for q, size in zip(queries, sizes, strict=True)])
            query = np.concatenate([q % n + o for q, n, o in zip(queries, sizes, offsets, strict=False)])
            counts = np.bincount(image, minlength=len(joint.pixels))
            row = np.empty_like(image)
            row[np.argsort(image)] = np.concatenate([np.arange(n) for n in counts])
            table = np.zeros((len(counts), counts.max()), image.dtype)
            table[image, row] = query
            table = torch.from_numpy(table).to(joint.pixels.device, non_blocking=True)
            embedding = joint.embedding.gather(1, table[..., None].expand(-1, -1, joint.embedding.shape[2]))
            products = Masks(embedding, joint.pixels).all().flatten(0, 1)
            place = numbers([image * table.shape[1] + row], products.device)
            found += products.index_select(0, place).float().split([*map(len, queries)])
        return found

    @torch.no_grad()
    def uncertain_points(self, masks):
        """Points [M P 2] for masks [M H W]: of 3 P random ones the 3/4 P where the mask is least certain, and 1/4 P
        more."""
        kept = int(0.75 * self.points)
        points = random_points(len(masks), 3 * self.points, device=masks.device)
        certainty = sample(masks[:, None], points)[:, 0].abs_()
        chosen = certainty.topk(kept, largest=False, sorted=False).indices
        points = points.gather(1, chosen[..., None].expand(-1, -1, 2))
        return torch.cat((points, random_points(len(masks), self.points - kept, device=masks.device)), 1)


def joined(masks):
    """Consecutive Masks with the same pixels as one, and how many queries each of them has."""
    for _, same in groupby(masks, lambda x: id(x.pixels)):
        embeddings, pixels = zip(*same, strict=True)
        yield Masks(torch.cat(embeddings, 1), pixels[0]), [x.shape[1] for x in embeddings]


def sums_of(sizes, values):
    """The sums [len(sizes)] of consecutive parts of values, of the given sizes."""
    part = numbers([np.full(size, i) for i, size in enumerate(sizes)], values.device)
    return values.new_zeros(len(sizes)).index_add(0, part, values)


def explain(name, b, prediction, target):
    """Which prediction or target of an image makes its matching cost infinite or NaN."""
    parts = ("logits", "boxes", "masks") if mask_product(prediction) else ("logits", "boxes")
    found = [f"predicted {part}" for part in parts if not prediction[part][b].isfinite().all()]
    if not target["boxes"].isfinite().all():
        found.append("the target's boxes")
    source = " and ".join(found) or "the cost itself"
    return f"matching met a number that is not finite: {source}, in set {name}, image {target.get('image_id', b)}"
