"""What training minimises: denoising queries, matching, and the criterion, as in MaskDINO (appendix B of the paper).

targets: a list with one dict per image of
    labels [n] int64 in 0..K-1,
    boxes [n 4] (cx, cy, w, h) in [0, 1] of the network's input, that is of the image after padding to a multiple of 32,
    masks [n H W] bool, over the same padded input,
    image_id, for messages.
Predictions are the dicts of `logits`, `boxes` and mostly `masks` that DIMaskDINO returns, at every stage.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

# For the cost of a match and for the loss alike (released code).
WEIGHTS = {"class": 4.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}
DETECTION = ("class", "box", "giou")


# ---- Denoising queries -----------------------------------------------------------------------------------------------


class Denoising(NamedTuple):
    """Noised objects that are to be restored. Slot j of each group holds object j of the image."""

    labels: Tensor  # [B D] int64, -1 in the empty slots of an image with fewer objects than another
    boxes_logit: Tensor  # [B D 4]
    groups: int  # D = groups * the largest number of objects in an image

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
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).repeat(groups)
    slot = torch.cat([torch.arange(n) + group * size for group in range(groups) for n in counts] or [image[:0]])
    labels = torch.cat([target["labels"] for target in targets]).repeat(groups)
    boxes = torch.cat([target["boxes"] for target in targets]).repeat(groups, 1)

    replaced = (torch.rand_like(labels.float()) < label_noise).nonzero()[:, 0]
    labels[replaced] = torch.randint_like(labels[replaced], 0, num_classes)
    reach = torch.cat((boxes[:, 2:] / 2, boxes[:, 2:]), 1)
    boxes = (boxes + (torch.rand_like(boxes) * 2 - 1) * reach * box_noise).clamp(0, 1)

    slots = (len(targets), groups * size)
    slot_labels, slot_boxes = labels.new_full(slots, -1), boxes.new_zeros(*slots, 4)
    slot_labels[image, slot], slot_boxes[image, slot] = labels, boxes.logit(1e-5)
    return Denoising(slot_labels, slot_boxes, groups)


# ---- Costs and losses of one set of predictions ----------------------------------------------------------------------


def sample(maps, points):
    """Bilinear values [n m P] of maps [n m H W] at points [n P 2], (x, y) in [0, 1]; zero outside."""
    return nnf.grid_sample(maps, points[:, :, None] * 2 - 1, align_corners=False)[..., 0]


def sample_objects(masks, objects, points):
    """Bilinear values [M P] of masks [n H W] (bool), for each M that of one object [M], at points [M P 2].

    Object by object, as many predictions share a mask that is large.
    """
    order, counts = objects.argsort().to(points.device), objects.bincount(minlength=len(masks)).tolist()
    values = torch.zeros_like(points[..., 0])
    for mask, chosen in zip(masks, order.split(counts), strict=True):
        values[chosen] = sample(mask[None, None].float(), points[chosen].flatten(0, 1)[None]).view_as(values[chosen])
    return values


def costs(logits, boxes, target):
    """The class, box and GIoU cost of every prediction [Q K], [Q 4] for every object: three of [Q n]."""
    p = logits.sigmoid()
    present = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    absent = 0.75 * p**2 * -(1 - p + 1e-8).log()
    pairs = (len(boxes), len(target["boxes"]), 4)
    a = box_convert(boxes, "cxcywh", "xyxy")[:, None].expand(pairs)
    b = box_convert(target["boxes"], "cxcywh", "xyxy").expand(pairs)
    return {
        "class": (present - absent)[:, target["labels"]],
        "box": (boxes[:, None] - target["boxes"]).abs().sum(-1),
        "giou": generalized_box_iou_loss(a, b, eps=1e-6) - 1,
    }


def mask_costs(masks, target):
    """The cross-entropy and dice cost of sampled masks [Q P] for the objects' sampled masks [n P]: two of [Q n]."""
    p = masks.sigmoid()
    return {
        "mask": (nnf.softplus(masks).sum(-1, keepdim=True) - masks @ target.T) / masks.shape[1],
        "dice": 1 - (2 * p @ target.T + 1) / (p.sum(-1, keepdim=True) + target.sum(-1) + 1),
    }


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
        prediction is not finite, with its name.
        """
        num_objects = max(sum(len(t["labels"]) for t in targets) if num_objects is None else num_objects, 1)
        sets = {"selection": outputs["selection"]} | {f"{i}": x for i, x in enumerate(outputs["layers"])}
        noised = {f"denoising_{i}": x for i, x in enumerate(outputs["denoising"])}
        without_masks = {f"interaction_{i}": x for i, x in enumerate(outputs["interaction"])}
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            pairs = self.match(sets | without_masks, targets)
            normalizers = dict.fromkeys(pairs, num_objects)
            if noised:
                *slots, groups = self.slots(outputs["denoising"][0], targets)
                pairs |= dict.fromkeys(noised, slots)
                normalizers |= dict.fromkeys(noised, num_objects * groups)
            sets = sets | noised | without_masks  # those with masks first
            terms = self.losses(list(sets.values()), targets, [pairs[name] for name in sets])
        return {
            f"{term}_{name}": self.weights[term] * value.sum() / normalizers[name]
            for term, values in terms.items()
            for name, value in zip(sets, values, strict=False)
        }

    @torch.no_grad()
    def match(self, sets, targets):
        """The best one-to-one match of each set of predictions: {name: (queries [M], objects [M])}, both numbered
        through the batch, on the CPU. It waits for the device once, whatever the number of sets and images."""
        sizes = [prediction["logits"].shape[1] for prediction in sets.values()]
        costs = [self.costs_of_image(sets.values(), b, target) for b, target in enumerate(targets)]
        costs = torch.cat([cost.flatten() for cost in costs]).cpu().split([cost.numel() for cost in costs])
        matches, before = {name: ([], []) for name in sets}, 0
        for b, (target, flat) in enumerate(zip(targets, costs, strict=True)):
            number = len(target["labels"])
            parts = flat.view(sum(sizes), number).split(sizes)
            for (name, match), size, cost in zip(matches.items(), sizes, parts, strict=True):
                if not cost.isfinite().all():
                    raise FloatingPointError(explain(name, b, sets[name], target))
                queries, objects = linear_sum_assignment(cost.numpy())
                match[0].extend(queries + b * size)
                match[1].extend(objects + before)
            before += number
        return {name: [torch.tensor(i, dtype=torch.long) for i in match] for name, match in matches.items()}

    def costs_of_image(self, sets, b, target):
        """The costs of all queries of all sets, those with masks first, for the objects of an image [sum of Q, n].

        Masks are compared at random points, the same for all of the image.
        """
        points = torch.rand(1, self.points, 2, device=target["boxes"].device)
        logits, boxes = (torch.cat([x[part][b] for x in sets]).float() for part in ("logits", "boxes"))
        if len(target["labels"]) == 0:
            return logits.new_zeros(len(logits), 0)
        cost = sum(WEIGHTS[term] * x for term, x in costs(logits, boxes, target).items())
        masks = [sample(x["masks"][b][None].float(), points)[0] for x in sets if "masks" in x]
        if masks:
            terms = mask_costs(torch.cat(masks), sample(target["masks"][None].float(), points)[0])
            mask_cost = sum(WEIGHTS[term] * x for term, x in terms.items())
            cost[: len(mask_cost)] += mask_cost
        return cost

    def slots(self, noised, targets):
        """The slots of denoising queries that hold an object, the object of each, both numbered through the batch, and
        the number of groups."""
        counts = [len(target["labels"]) for target in targets]
        total, size = noised["logits"].shape[1], max(counts)
        groups = total // size if size else 0
        slot = torch.arange(groups)[:, None] * size
        queries = [(slot + torch.arange(n) + b * total).flatten() for b, n in enumerate(counts)]
        objects = [(torch.arange(n) + sum(counts[:b])).repeat(groups) for b, n in enumerate(counts)]
        return torch.cat(queries), torch.cat(objects), max(groups, 1)

    def losses(self, sets, targets, pairs):
        """The losses of all sets at once, given which queries of each (numbered through the batch) are which objects.

        {term: one tensor for each set}: of "class" for every query, of the others for every pair; of "mask" and "dice"
        for those sets, the first ones, that have masks.
        """
        logits, predicted = (torch.cat([x[part].flatten(0, 1) for x in sets]).float() for part in ("logits", "boxes"))
        sizes = [x["logits"].shape[:2].numel() for x in sets]
        queries = torch.cat([q + sum(sizes[:i]) for i, (q, _) in enumerate(pairs)]).to(logits.device)
        objects, numbers = torch.cat([o for _, o in pairs]), [len(q) for q, _ in pairs]
        objects_there = objects.to(logits.device)
        labels, boxes, wanted = (torch.cat([t[part] for t in targets]) for part in ("labels", "boxes", "masks"))
        labels, boxes = (x[objects_there] for x in (labels, boxes))
        classes = torch.zeros_like(logits)
        classes[queries, labels] = 1
        predicted = predicted[queries]
        corners = (box_convert(x, "cxcywh", "xyxy") for x in (predicted, boxes))
        terms = {
            "class": sigmoid_focal_loss(logits, classes).sum(1).split(sizes),
            "box": (predicted - boxes).abs().sum(1).split(numbers),
            "giou": generalized_box_iou_loss(*corners, eps=1e-6).split(numbers),
        }
        masked = sum("masks" in x for x in sets)
        masks = [
            x["masks"].flatten(0, 1).index_select(0, q.to(logits.device))
            for x, (q, _) in zip(sets[:masked], pairs, strict=False)
        ]
        masks, numbers = torch.cat(masks).float(), numbers[:masked]
        with torch.no_grad():
            points = self.uncertain_points(masks, numbers)
            inside = sample_objects(wanted, objects[: len(masks)], points)
        masks = sample(masks[:, None], points)[:, 0]
        p = masks.sigmoid()
        terms["mask"] = nnf.binary_cross_entropy_with_logits(masks, inside, reduction="none").mean(1).split(numbers)
        terms["dice"] = (1 - (2 * (p * inside).sum(1) + 1) / (p.sum(1) + inside.sum(1) + 1)).split(numbers)
        return terms

    def uncertain_points(self, masks, numbers):
        """Points [M P 2] for masks [M H W]: of 3 P random ones the 3/4 P where the mask is least certain, and 1/4 P
        more; numbers: how many of the masks are of each set."""
        kept = int(0.75 * self.points)
        points = torch.cat([torch.rand(n, 3 * self.points, 2, device=masks.device) for n in numbers])
        certainty = sample(masks[:, None], points)[:, 0].abs()
        chosen = certainty.topk(kept, largest=False, sorted=False).indices
        random = torch.cat([torch.rand(n, self.points - kept, 2, device=masks.device) for n in numbers])
        return torch.cat((points.gather(1, chosen[..., None].expand(-1, -1, 2)), random), 1)


def explain(name, b, prediction, target):
    """Which prediction or target of an image makes its matching cost infinite or NaN."""
    found = [f"predicted {part}" for part, x in prediction.items() if not x[b].isfinite().all()]
    if not target["boxes"].isfinite().all():
        found.append("the target's boxes")
    source = " and ".join(found) or "the cost itself"
    return f"matching met a number that is not finite: {source}, in set {name}, image {target.get('image_id', b)}"
