"""What training minimises: denoising queries, Hungarian matching and the criterion, as in MaskDINO (appendix B).

targets: a list with one dict per image of
    labels [n] int64 in 0..K-1,
    boxes [n 4] (cx, cy, w, h) in [0, 1] of the network's input, that is of the image after padding to a multiple of 32,
    masks [n H W] bool, over the same padded input,
    image_id, for messages.
Predictions are the dicts that DIMaskDINO returns at every stage: logits, boxes and, except for Eq. 2, factors of masks.
Pairs are the matched queries and objects of one set of predictions: a list with (query indices, object indices), two
arrays [m], for each image.

The criterion computes the losses of all sets of predictions at once; tests/test_losses.py compares it with a plain loop
over the sets.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, sigmoid_focal_loss

from dimaskdino import mask_logits

# For the cost of matching and for the loss alike (released code).
WEIGHTS = {"class": 4.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}
DETECTION = ("class", "box", "giou")
MOST_PIXELS = 2**25  # of the masks that become float32 at a time: bounds the memory of sampling
MOST_LOGITS = 2**23  # sampled mask logits whose costs are computed at a time: bounds the memory of matching


def to_device(array, device):
    """A numpy array as a tensor, copied without a synchronisation."""
    return torch.from_numpy(array).to(device, non_blocking=True)


# ---- Denoising queries -----------------------------------------------------------------------------------------------


class Denoising(NamedTuple):
    """Denoising queries: groups of noised objects for the model to restore. Slot j of each group holds object j."""

    labels: Tensor  # [B D] int64, -1 in the empty slots of an image with fewer objects than another
    boxes_logit: Tensor  # [B D 4]
    groups: int  # D = groups * the largest number of objects in an image
    pairs: list  # the slots that hold an object and its index: (queries [m], objects [m]) of each image, on the CPU

    def to(self, device):
        labels = self.labels.to(device, non_blocking=True)
        boxes_logit = self.boxes_logit.to(device, non_blocking=True)
        return self._replace(labels=labels, boxes_logit=boxes_logit)

    def attention_mask(self, queries):
        """Attention mask [D+queries D+queries], True = masked: groups do not see each other, nor the others a group."""
        D = self.labels.shape[1]
        place = torch.arange(D + queries, device=self.labels.device)
        group = place * self.groups // max(D, 1)  # that of a query which is not a denoising one is none of theirs
        return (group[:, None] != group) & (place < D)


def denoising_queries(targets, num_classes, queries=100, label_noise=0.2, box_noise=0.4):
    """Makes as many groups of noised objects as fit into `queries`: none if an image has more, or no image has any.

    label_noise: share of the labels that are replaced by random ones. box_noise: centres move by up to this share of
    half the box, sizes change by up to this share.
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

    slot_labels = labels.new_full((len(targets), groups, size), -1)
    slot_boxes = boxes.new_zeros(len(targets), groups, size, 4)
    pairs = []
    labels = labels.view(groups, sum(counts)).split(counts, 1)  # of each image [groups n]
    boxes = boxes.logit(1e-5).view(groups, sum(counts), 4).split(counts, 1)
    for b, n in enumerate(counts):
        slot_labels[b, :, :n] = labels[b]
        slot_boxes[b, :, :n] = boxes[b]
        slots = np.arange(groups)[:, None] * size + np.arange(n)  # [groups n]
        pairs.append((slots.flatten(), np.tile(np.arange(n), groups)))
    return Denoising(slot_labels.flatten(1), slot_boxes.flatten(1, 2), groups, pairs)


# ---- Sampling and costs ----------------------------------------------------------------------------------------------


def random_points(*shape, device):
    """Points [... 2], uniform in [-1, 1]."""
    return torch.rand(*shape, 2, device=device).mul(2).sub_(1)


def sample(maps, points):
    """Bilinear values [n m P] of maps [n m H W] at points [n P 2], (x, y) in [-1, 1]; zero outside."""
    return nnf.grid_sample(maps, points[:, :, None], align_corners=False)[..., 0]


def sample_objects(masks, objects, points):
    """Bilinear values [m P] of the masks [n H W] (bool) of some objects, an array [m], at points [m P 2].

    Every object that occurs has to occur equally often, as in a set of predictions: once, or once in each denoising
    group. Each mask is then read once, at all of its points.
    """
    order = np.argsort(objects, kind="stable")
    present = np.unique(objects)
    grouped = points.index_select(0, to_device(order, points.device)).view(len(present), -1, 2)
    values = []
    first = 0
    for some in np.array_split(present, math.ceil(len(present) * masks[0].numel() / MOST_PIXELS)):
        chosen = masks.index_select(0, to_device(some, masks.device)).float()
        values.append(sample(chosen[:, None], grouped[first : first + len(some)])[:, 0])
        first += len(some)
    restored = to_device(np.argsort(order), points.device)
    return torch.cat(values).view(points.shape[:2]).index_select(0, restored)


def giou(a, b):
    """Generalized IoU [...] of boxes (x0, y0, x1, y1) [... 4], pair by pair.

    torchvision's indexes with a boolean mask, which is a synchronisation. released code: + 1e-6.
    """
    a0, a1 = a.split(2, -1)
    b0, b1 = b.split(2, -1)
    intersection = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod(-1)
    hull = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod(-1)
    union = (a1 - a0).prod(-1) + (b1 - b0).prod(-1) - intersection
    return intersection / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def class_and_box_costs(logits, boxes, labels, wanted):
    """Matching cost [B Q n] of every prediction (logits [B Q K], boxes [B Q 4]) with every object (labels [B n], wanted
    boxes [B n 4]): focal class cost, L1 and GIoU of the boxes."""
    p = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1)).sigmoid()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    distance = torch.cdist(boxes, wanted, 1)
    overlap = giou(box_convert(boxes, "cxcywh", "xyxy")[:, :, None], box_convert(wanted, "cxcywh", "xyxy")[:, None])
    return WEIGHTS["class"] * (positive - negative) + WEIGHTS["box"] * distance - WEIGHTS["giou"] * overlap


def mask_costs(logits, inside):
    """Matching cost [B Q n] of every predicted mask (logits at P points [B Q P]) with every object's mask (at these
    points [B n P]): binary cross-entropy and dice."""
    p = logits.sigmoid()
    inside_T = inside.transpose(1, 2)
    bce = -(nnf.logsigmoid(-logits).sum(-1, keepdim=True) + logits @ inside_T) / logits.shape[2]
    dice = 1 - (2 * p @ inside_T + 1) / (p.sum(-1, keepdim=True) + inside.sum(-1)[:, None] + 1)
    return WEIGHTS["mask"] * bce + WEIGHTS["dice"] * dice


# ---- The criterion ---------------------------------------------------------------------------------------------------


class Criterion(nn.Module):
    """The loss of DIMaskDINO's outputs. For each set of predictions (first selection, token interaction layers, initial
    prediction, decoder layers), Hungarian matching, and class, box, GIoU, mask and dice losses of the matched pairs.
    Denoising queries need no matching: slot j of a group is object j."""

    def __init__(self, recipe):
        super().__init__()
        self.points = recipe.mask_points
        self.weights = {name: w * (recipe.detection_loss if name in DETECTION else 1) for name, w in WEIGHTS.items()}

    def forward(self, outputs, targets, num_objects=None, denoising=None):
        """outputs of DIMaskDINO, targets as above -> weighted losses {"class_selection": scalar, ..., "dice_6": ...}.

        The loss to minimise is their sum. num_objects: what they are divided by, the number of objects in the batch of
        all processes over the number of processes; None: that of these targets. denoising: the denoising queries that
        the model was given, if any. Raises FloatingPointError, which names the prediction, where one for an image with
        objects is not finite.
        """
        if num_objects is None:
            num_objects = max(sum(len(t["labels"]) for t in targets), 1)
        sets = {"selection": outputs["selection"]}
        sets |= {f"{layer}": prediction for layer, prediction in enumerate(outputs["layers"])}
        sets |= {f"interaction_{layer}": prediction for layer, prediction in enumerate(outputs["interaction"])}
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            pairs = self.match(sets, targets)
            divisors = dict.fromkeys(sets, num_objects)
            for layer, prediction in enumerate(outputs["denoising"]):
                name = f"denoising_{layer}"
                sets[name] = prediction
                pairs[name] = denoising.pairs
                divisors[name] = num_objects * max(denoising.groups, 1)

            # For each set of predictions, the sum of each loss over its matched pairs; all sets at once.
            with_masks = {name: prediction for name, prediction in sets.items() if "pixels" in prediction}
            classes, boxes, gious = self.class_and_box_losses(sets, targets, pairs)
            masks, dices = self.mask_losses(with_masks, targets, pairs)
            losses = self.weighted("class", classes, sets, divisors)
            losses |= self.weighted("box", boxes, sets, divisors)
            losses |= self.weighted("giou", gious, sets, divisors)
            losses |= self.weighted("mask", masks, with_masks, divisors)
            losses |= self.weighted("dice", dices, with_masks, divisors)
        return losses

    def weighted(self, term, sums, sets, divisors):
        """The sums [sets] of one term, weighted and divided, by name: {"<term>_<set>": scalar}"""
        divisor = to_device(np.array([divisors[name] for name in sets], np.float32), sums.device)
        values = self.weights[term] * sums / divisor
        return {f"{term}_{name}": value for name, value in zip(sets, values.unbind())}

    @torch.no_grad()
    def match(self, sets, targets):
        """Hungarian (bipartite) matching: for each set of predictions {name: prediction} the pairs of least total cost,
        {name: pairs}. One synchronisation for all sets."""
        costs = self.costs(sets, targets).cpu().numpy()  # [B Q n], the queries of all sets one after another
        pairs = {}
        first = 0
        for name, prediction in sets.items():
            last = first + prediction["logits"].shape[1]
            pairs[name] = []
            for b, target in enumerate(targets):
                cost = costs[b, first:last, : len(target["labels"])]
                if not np.isfinite(cost).all():
                    raise FloatingPointError(explain(name, b, prediction, target))
                pairs[name].append(linear_sum_assignment(cost))
            first = last
        return pairs

    def costs(self, sets, targets):
        """Matching cost of each query with each object of its image [B, queries of all sets, most objects of an image].

        Masks are compared at random points, the same for all predictions of an image.
        """
        logits = torch.cat([x["logits"] for x in sets.values()], 1).float()
        boxes = torch.cat([x["boxes"] for x in sets.values()], 1).float()
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
        wanted = pad_sequence([t["boxes"] for t in targets], batch_first=True)
        costs = class_and_box_costs(logits, boxes, labels, wanted)

        points = torch.cat([random_points(1, self.points, device=boxes.device) for _ in targets])  # [B P 2]
        inside = []
        for target, of_image in zip(targets, points):
            masks = target["masks"][:, None].float()
            inside.append(sample(masks, of_image.expand(len(masks), -1, -1))[:, 0])
        inside = pad_sequence(inside, batch_first=True)  # [B n P]

        sampled = {}  # the pixels at the points [B C P]; most sets have the same
        first = 0
        for prediction in sets.values():
            last = first + prediction["logits"].shape[1]
            if "pixels" in prediction:
                pixels = prediction["pixels"]
                if id(pixels) not in sampled:
                    sampled[id(pixels)] = sample(pixels.float(), points).to(pixels.dtype)
                step = max(1, MOST_LOGITS // points[..., 0].numel())
                for query in range(first, last, step):
                    embedding = prediction["mask_embedding"][:, query - first : query - first + step]
                    cost = mask_costs((embedding @ sampled[id(pixels)]).float(), inside)
                    costs[:, query : query + cost.shape[1]] += cost
            first = last
        return costs

    def class_and_box_losses(self, sets, targets, pairs):
        """Sums [sets] of each set's losses: focal loss of all queries, L1 and GIoU of the matched boxes."""
        logits = torch.cat([x["logits"] for x in sets.values()], 1).float()  # [B Q K], the sets side by side
        boxes = torch.cat([x["boxes"] for x in sets.values()], 1).float()
        image, query, objects = self.indices(sets, targets, pairs)
        labels = torch.cat([t["labels"] for t in targets])[objects]
        wanted = torch.cat([t["boxes"] for t in targets])[objects]
        classes = torch.zeros_like(logits)
        classes[image, query, labels] = 1
        focal = sigmoid_focal_loss(logits, classes).sum((0, 2))  # [Q]
        matched = boxes[image, query]
        l1 = (matched - wanted).abs().sum(1)
        overlap = giou(box_convert(matched, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
        queries_of_sets = [x["logits"].shape[1] for x in sets.values()]
        pairs_of_sets = [sum(len(queries) for queries, _ in pairs[name]) for name in sets]
        return sums(focal, queries_of_sets), sums(l1, pairs_of_sets), sums(1 - overlap, pairs_of_sets)

    def indices(self, sets, targets, pairs):
        """The pairs of all sets as three tensors of indices [M]: image, query (all sets concatenated), object (all
        images, concatenated)."""
        image = []
        query = []
        objects = []
        first_query = 0
        for name, prediction in sets.items():
            first_object = 0
            for b, (queries, found) in enumerate(pairs[name]):
                image.append(np.full(len(queries), b))
                query.append(first_query + queries)
                objects.append(first_object + found)
                first_object += len(targets[b]["labels"])
            first_query += prediction["logits"].shape[1]
        device = targets[0]["labels"].device
        return [to_device(np.concatenate(index), device) for index in (image, query, objects)]

    def mask_losses(self, sets, targets, pairs):
        """Sums [sets] of each set's losses: binary cross-entropy and dice of the matched masks, at points drawn by
        importance sampling, one set at a time to bound the memory."""
        masks = torch.cat([target["masks"] for target in targets])  # [n H W]
        first_object = np.cumsum([0, *(len(target["masks"]) for target in targets)])
        predicted = matched_masks(sets, pairs)
        logits = []
        inside = []
        for name in sets:
            objects = np.concatenate([first + found for first, (_, found) in zip(first_object, pairs[name])])
            points = self.uncertain_points(predicted[name])  # [m P 2]
            logits.append(sample(predicted[name][:, None], points)[:, 0])
            inside.append(sample_objects(masks, objects, points) if len(objects) else points[..., 0])
        pairs_of_sets = [len(x) for x in logits]
        logits = torch.cat(logits)
        inside = torch.cat(inside)
        p = logits.sigmoid()
        bce = nnf.binary_cross_entropy_with_logits(logits, inside, reduction="none").mean(1)
        dice = 1 - (2 * (p * inside).sum(1) + 1) / (p.sum(1) + inside.sum(1) + 1)
        return sums(bce, pairs_of_sets), sums(dice, pairs_of_sets)

    @torch.no_grad()
    def uncertain_points(self, masks):
        """Importance sampling of points [m P 2] for mask logits [m H W], as PointRend: of 3 P random points the 3/4 P
        where the mask is least certain, and 1/4 P random ones."""
        kept = int(0.75 * self.points)
        points = random_points(len(masks), 3 * self.points, device=masks.device)
        certainty = sample(masks[:, None], points)[:, 0].abs_()
        chosen = certainty.topk(kept, largest=False, sorted=False).indices
        points = points.gather(1, chosen[..., None].expand(-1, -1, 2))
        return torch.cat((points, random_points(len(masks), self.points - kept, device=masks.device)), 1)


def matched_masks(sets, pairs):
    """Mask logits [m H/4 W/4] of each set's matched queries, image by image: {name: logits}. Sets with the same pixels
    share one product for each image."""
    together = {}
    for name, prediction in sets.items():
        together.setdefault(id(prediction["pixels"]), []).append(name)
    found = {}
    for names in together.values():
        pixels = sets[names[0]]["pixels"]
        embedding = torch.cat([sets[name]["mask_embedding"] for name in names], 1)  # [B Q C], the sets side by side
        first_query = np.cumsum([0, *(sets[name]["mask_embedding"].shape[1] for name in names)])
        by_image = []
        for b, (embedding_b, pixels_b) in enumerate(zip(embedding.unbind(), pixels.unbind())):
            queries = [first + pairs[name][b][0] for first, name in zip(first_query, names)]
            matched = embedding_b.index_select(0, to_device(np.concatenate(queries), pixels.device))
            product = torch.einsum("qc,chw->qhw", matched, pixels_b).float()
            by_image.append(product.split([len(x) for x in queries]))
        found |= {name: torch.cat(of_set) for name, of_set in zip(names, zip(*by_image))}
    return found


def sums(values, sizes):
    """Sums [len(sizes)] of consecutive parts of values, of the given sizes."""
    part = np.repeat(np.arange(len(sizes)), sizes)
    return values.new_zeros(len(sizes)).index_add(0, to_device(part, values.device), values)


def explain(name, b, prediction, target):
    """Names the prediction or target of an image that makes its matching cost infinite or NaN."""
    found = [f"predicted {part}" for part in ("logits", "boxes") if not prediction[part][b].isfinite().all()]
    if "pixels" in prediction and not mask_logits(prediction, b).isfinite().all():
        found.append("predicted masks")
    if not target["boxes"].isfinite().all():
        found.append("the target's boxes")
    source = " and ".join(found) or "the cost itself"
    return f"matching met a number that is not finite: {source}, in set {name}, image {target.get('image_id', b)}"
