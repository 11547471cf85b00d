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
from concurrent.futures import ThreadPoolExecutor
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
# How much is computed at a time, which bounds the memory. What is smaller than 32 MB, glibc uses again.
MOST_CANDIDATES = 2**21  # for importance sampling
MOST_LOGITS = 2**22  # at the points of matching
MOST_PIXELS = 2**25  # of objects' masks, as float32


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
        labels, boxes_logit = (x.to(device, non_blocking=True) for x in self[:2])
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
    labels = torch.cat([t["labels"] for t in targets]).repeat(groups)
    boxes = torch.cat([t["boxes"] for t in targets]).repeat(groups, 1)

    replaced = (torch.rand_like(labels.float()) < label_noise).nonzero()[:, 0]
    labels[replaced] = torch.randint_like(labels[replaced], 0, num_classes)
    reach = torch.cat((boxes[:, 2:] / 2, boxes[:, 2:]), 1)
    boxes = (boxes + (torch.rand_like(boxes) * 2 - 1) * reach * box_noise).clamp(0, 1)

    # Of each image [n groups], padded to [B size groups].
    labels = pad_sequence(labels.view(groups, sum(counts)).T.split(counts), batch_first=True, padding_value=-1)
    boxes_logit = boxes.logit(1e-5).view(groups, sum(counts), 4).transpose(0, 1)
    boxes_logit = pad_sequence(boxes_logit.split(counts), batch_first=True)
    pairs = []
    for n in counts:
        slots = np.arange(groups)[:, None] * size + np.arange(n)  # [groups n]
        pairs.append((slots.flatten(), np.tile(np.arange(n), groups)))
    return Denoising(labels.mT.flatten(1), boxes_logit.transpose(1, 2).flatten(1, 2), groups, pairs)


# ---- Sampling and costs ----------------------------------------------------------------------------------------------


def random_points(number, points, device):
    """Points [number points 2], uniform in [-1, 1), on a grid of 65,536 x 65,536. Two points share a random number of
    64 bits, which a CPU draws in a fraction of the time that torch.rand takes for four."""
    pairs = math.ceil(points / 2)
    words = torch.empty(number, pairs, dtype=torch.int64, device=device).random_(-(2**63), None)
    coordinates = words.view(torch.int16).view(number, 2 * pairs, 2)[:, :points]
    return coordinates.float().mul_(2**-15)


def smallest(values, number):
    """Indices [m number] of the smallest values in each row of values [m n], in any order."""
    if not values.is_cpu:
        return values.topk(number, largest=False, sorted=False).indices
    rows = np.array_split(values.numpy(), torch.get_num_threads())
    with ThreadPoolExecutor() as pool:  # a third of topk's time
        index = pool.map(lambda some: np.argpartition(some, number)[:, :number], rows)
        return torch.from_numpy(np.concatenate([*index]))


def sample(maps, points):
    """Bilinear values [n m P] of maps [n m H W] at points [n P 2], (x, y) in [-1, 1]; zero outside."""
    return nnf.grid_sample(maps, points[:, :, None], align_corners=False)[..., 0]


def sample_objects(masks, objects, points):
    """Bilinear values [m P] of the masks [n H W] (bool) of some objects, an array [m], at points [m P 2].

    Every object that occurs has to occur equally often, as in a set of predictions: once, or once in each denoising
    group. Each mask is then read once, at all of its points.
    """
    present = np.unique(objects)
    portions = math.ceil(len(present) * masks[0].numel() / MOST_PIXELS)
    rows = np.argsort(objects, kind="stable").reshape(len(present), -1)
    values = points.new_empty(points.shape[:2])
    for some, of_some in zip(np.array_split(present, portions), np.array_split(rows, portions)):
        chosen = masks.index_select(0, to_device(some, masks.device)).float()
        index = to_device(of_some.flatten(), points.device)
        grouped = points.index_select(0, index).view(len(some), -1, 2)
        values.index_copy_(0, index, sample(chosen[:, None], grouped).view(len(index), -1))
    return values


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
    points = logits.shape[2]
    p = logits.sigmoid()
    inside_T = inside.transpose(1, 2)
    # Softplus is max(logit, 0) - log(max(p, 1 - p)): one logarithm for the product of up to 64 numbers of at least 1/2.
    likelier = torch.maximum(p, 1 - p).unflatten(2, (-1, math.gcd(points, 64))).prod(3)
    softplus = logits.clamp(min=0).sum(2) - likelier.log().sum(2)
    bce = (softplus[..., None] - logits @ inside_T) / points
    dice = 1 - (2 * (p @ inside_T) + 1) / (p.sum(2, keepdim=True) + inside.sum(2)[:, None] + 1)
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
            divisors = [num_objects] * len(sets)
            for layer, prediction in enumerate(outputs["denoising"]):
                sets[f"denoising_{layer}"] = prediction
                pairs[f"denoising_{layer}"] = denoising.pairs
                divisors.append(num_objects * max(denoising.groups, 1))

            # For each set of predictions, the sum of each loss over its matched pairs; all sets at once.
            classes, boxes, gious = self.class_and_box_losses(sets, targets, pairs)
            masks, dices = self.mask_losses(sets, targets, pairs)
            factors = np.divide.outer([*self.weights.values()], divisors).astype(np.float32)
            weighted = torch.stack((classes, boxes, gious, masks, dices)) * to_device(factors, masks.device)  # [5 sets]

        losses = {}
        for term, of_term in zip(self.weights, weighted.unbind()):
            for (name, prediction), loss in zip(sets.items(), of_term.unbind()):
                if term in DETECTION or "pixels" in prediction:
                    losses[f"{term}_{name}"] = loss
        return losses

    def match(self, sets, targets):
        """Hungarian (bipartite) matching: for each set of predictions {name: prediction} the pairs of least total cost,
        {name: pairs}. One synchronisation for all sets."""
        costs = self.costs(sets, targets).cpu().split([x["logits"].shape[1] for x in sets.values()], 1)
        pairs = {}
        for (name, prediction), of_set in zip(sets.items(), costs):
            pairs[name] = []
            for b, target in enumerate(targets):
                cost = of_set[b, :, : len(target["labels"])].numpy()
                if not np.isfinite(cost).all():
                    raise FloatingPointError(explain(name, b, prediction, target))
                pairs[name].append(linear_sum_assignment(cost))
        return pairs

    @torch.no_grad()
    def costs(self, sets, targets):
        """Matching cost of each query with each object of its image [B, queries of all sets, most objects of an image].

        Masks are compared at random points, the same for all predictions of an image.
        """
        logits = torch.cat([x["logits"] for x in sets.values()], 1).float()
        boxes = torch.cat([x["boxes"] for x in sets.values()], 1).float()
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
        wanted = pad_sequence([t["boxes"] for t in targets], batch_first=True)
        costs = class_and_box_costs(logits, boxes, labels, wanted)

        points = torch.cat([random_points(1, self.points, boxes.device) for _ in targets])  # [B P 2]
        inside = [sample(t["masks"][None].float(), x[None])[0] for t, x in zip(targets, points)]
        inside = pad_sequence(inside, batch_first=True)  # [B n P]

        sampled = {}  # the pixels at the points [B C P]; most sets have the same
        step = max(1, MOST_LOGITS // points[..., 0].numel())  # queries
        for prediction, of_set in zip(sets.values(), costs.split([x["logits"].shape[1] for x in sets.values()], 1)):
            if "pixels" in prediction:
                pixels = prediction["pixels"]
                if id(pixels) not in sampled:
                    last = pixels.float().contiguous(memory_format=torch.channels_last)  # quicker to sample
                    sampled[id(pixels)] = sample(last, points).to(pixels.dtype)
                for embedding, cost in zip(prediction["mask_embedding"].split(step, 1), of_set.split(step, 1)):
                    cost += mask_costs((embedding @ sampled[id(pixels)]).float(), inside)
        return costs

    def class_and_box_losses(self, sets, targets, pairs):
        """Sums [sets] of each set's losses: focal loss of all queries, L1 and GIoU of the matched boxes."""
        logits = torch.cat([x["logits"] for x in sets.values()], 1).float()  # [B Q K], the sets side by side
        boxes = torch.cat([x["boxes"] for x in sets.values()], 1).float()
        queries_of_sets = [x["logits"].shape[1] for x in sets.values()]
        found = [indices(of_set, targets) for of_set in pairs.values()]
        pairs_of_sets = [len(image) for image, *_ in found]
        image, query, objects = (np.concatenate(x) for x in zip(*found))
        query += np.repeat(np.cumsum([0, *queries_of_sets[:-1]]), pairs_of_sets)
        image, query, objects = (to_device(x, logits.device) for x in (image, query, objects))

        labels = torch.cat([t["labels"] for t in targets])[objects]
        wanted = torch.cat([t["boxes"] for t in targets])[objects]
        classes = torch.zeros_like(logits)
        classes[image, query, labels] = 1
        focal = sigmoid_focal_loss(logits, classes).sum((0, 2))  # [Q]
        matched = boxes[image, query]
        l1 = (matched - wanted).abs().sum(1)
        overlap = giou(box_convert(matched, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
        return sums(focal, queries_of_sets), sums(l1, pairs_of_sets), sums(1 - overlap, pairs_of_sets)

    def mask_losses(self, sets, targets, pairs):
        """Sums [sets] of each set's losses: binary cross-entropy and dice of the matched masks, at points drawn by
        importance sampling, one set at a time to bound the memory."""
        masks = torch.cat([target["masks"] for target in targets])  # [n H W]
        predicted = matched_masks(sets, pairs)
        logits = []
        inside = []
        for name, of_set in predicted.items():
            *_, objects = indices(pairs[name], targets)
            points = self.uncertain_points(of_set)  # [m P 2]
            logits.append(sample(of_set[:, None], points)[:, 0])
            inside.append(sample_objects(masks, objects, points) if len(objects) else points[..., 0])
        logits = torch.cat(logits)
        inside = torch.cat(inside)
        p = logits.sigmoid()
        bce = (nnf.softplus(logits).sum(1) - (logits * inside).sum(1)) / logits.shape[1]
        dice = 1 - (2 * (p * inside).sum(1) + 1) / (p.sum(1) + inside.sum(1) + 1)
        pairs_of_sets = [len(predicted.get(name, ())) for name in sets]
        return sums(bce, pairs_of_sets), sums(dice, pairs_of_sets)

    @torch.no_grad()
    def uncertain_points(self, masks):
        """Importance sampling of points [m P 2] for mask logits [m H W], as PointRend: of 3 P random points the 3/4 P
        where the mask is least certain, and 1/4 P random ones."""
        kept = int(0.75 * self.points)
        points = masks.new_empty(len(masks), self.points, 2)
        points[:, kept:] = random_points(len(masks), self.points - kept, masks.device)
        step = max(1, MOST_CANDIDATES // (3 * self.points))
        for some, of_some in zip(masks.split(step), points.split(step)):
            candidates = random_points(len(some), 3 * self.points, masks.device)
            certainty = sample(some[:, None], candidates)[:, 0].abs_()
            chosen = torch.view_as_complex(candidates).gather(1, smallest(certainty, kept))
            of_some[:, :kept] = torch.view_as_real(chosen)
        return points


def indices(pairs, targets):
    """A set's pairs as three arrays of indices [m]: image, query, and object among those of all images."""
    image = np.repeat(np.arange(len(pairs)), [len(queries) for queries, _ in pairs])
    query, objects = (np.concatenate(x) for x in zip(*pairs))
    first = np.cumsum([0, *(len(target["labels"]) for target in targets)])
    return image, query, first[image] + objects


def matched_masks(sets, pairs):
    """Mask logits [m H/4 W/4] of each set's matched queries, image by image: {name: logits}. Sets with the same pixels
    share one product for each image."""
    found = {name: [] for name, prediction in sets.items() if "pixels" in prediction}
    together = {}
    for name in found:
        together.setdefault(id(sets[name]["pixels"]), []).append(name)
    for names in together.values():
        pixels = sets[names[0]]["pixels"]
        embedding = torch.cat([sets[name]["mask_embedding"] for name in names], 1)  # [B Q C], the sets side by side
        first_query = np.cumsum([0, *(sets[name]["mask_embedding"].shape[1] for name in names)])
        for b, (embedding_b, pixels_b) in enumerate(zip(embedding.unbind(), pixels.unbind())):
            queries = [first + pairs[name][b][0] for first, name in zip(first_query, names)]
            matched = embedding_b.index_select(0, to_device(np.concatenate(queries), pixels.device))
            masks = torch.einsum("qc,chw->qhw", matched, pixels_b).float()
            for name, of_set in zip(names, masks.split([len(x) for x in queries])):
                found[name].append(of_set)
    return {name: torch.cat(masks) for name, masks in found.items()}


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
