"""What a model does with one image: the trace, and what goes into some of its modules. explain.py draws it."""

import numpy as np
import torch
import torch.nn.functional as nnf
from scipy import ndimage
from torchvision.ops import box_convert, box_iou, masks_to_boxes
from torchvision.transforms.functional import pil_to_tensor

from datasets.geometry import shortest_side
from dimaskdino import cell_centers, mask_logits, select

MOST, SAME = 5, 0.5  # objects on the page; the IoU from which two masks show the same object


class Story:
    """An image's way through the model: trace, inputs and outputs of some modules, and the objects that it found.

    Lengths are in pixels of the resized image, boxes are (x0, y0, x1, y1). objects: the queries, best first, that show
    different objects, larger than a token, and reach `score`, but at least two where there are; masks[i], kinds[i] (its
    class) and names[i] (class and score) are those of object i.
    """

    @torch.inference_mode()
    def __init__(self, model, picture, score=0.3):
        resize = shortest_side(*model.test_size)(None, *picture.size)
        self.model, self.picture = model.eval(), resize.image(picture)
        self.calls, modules = {}, dict(model.named_modules())
        places = ("encoder", "interactions.0.layers.0.attention", "residual.cross_attention", "bato.attention")
        hooks = [
            modules[place].register_forward_hook(
                lambda _, inputs, made, at=place: self.calls.update({at: (inputs, made)})
            )
            for place in places
            if place in modules
        ]
        try:
            image = pil_to_tensor(self.picture)[None].to(next(model.parameters()).device)
            self.outputs = model(image, trace=True)
        finally:
            for hook in hooks:
                hook.remove()
        self.trace, (_, (_, _, self.level_shapes, _)) = self.outputs["trace"], self.calls["encoder"]
        self.height, self.width = image.shape[-2:]
        self.padded = [side + -side % 32 for side in (self.width, self.height)]  # of x, of y
        device = image.device
        self.centers = (cell_centers(self.level_shapes, device).cpu() * torch.tensor(self.padded)).numpy()  # [N 2]
        self.sides = np.concatenate([np.full(h * w, self.padded[1] / h) for h, w in self.level_shapes])  # [N]
        self.find_objects(score)

    def find_objects(self, score):
        best, labels = self.outputs["logits"][0].float().sigmoid().max(-1)
        order = best.argsort(descending=True)[:100].tolist()
        masks = dict(zip(order, self.masks_of(self.outputs, order), strict=True))
        self.objects = []
        for query in order:
            others = torch.stack([masks[other] for other in self.objects]) if self.objects else None
            fresh = masks[query].sum() >= self.sides[0] ** 2 and (
                others is None or overlap(masks[query][None], others).max() < SAME
            )
            if fresh and len(self.objects) < MOST and (best[query] >= score or len(self.objects) < 2):
                self.objects.append(query)
        self.objects = self.objects or order[:1]
        self.masks = torch.stack([masks[query] for query in self.objects])  # [n H W]
        self.sure = bool(best[self.objects[0]] >= score)
        self.kinds = [self.model.classes[labels[q]] for q in self.objects]
        self.names = [f"{kind} {best[q]:.2f}" for kind, q in zip(self.kinds, self.objects, strict=True)]

    def masks_of(self, prediction, queries):
        """Masks of queries [n H W] (bool) in the resized image."""
        logits = mask_logits(prediction, 0, torch.as_tensor(queries)).float().cpu()
        full = nnf.interpolate(logits[None], self.padded[::-1], mode="bilinear", align_corners=False)
        return full[0, :, : self.height, : self.width] > 0

    def boxes_of(self, box):
        """Boxes [n 4] of the model in pixels."""
        return box_convert(box.float().cpu(), "cxcywh", "xyxy") * torch.tensor(self.padded * 2)

    def at(self, layer):
        """Boxes and masks of the page's objects in the prediction of a layer, and how well they fit: the mean IoU of
        each box with the box around the largest piece of its mask."""
        prediction = self.outputs["layers"][layer]
        masks, boxes = self.masks_of(prediction, self.objects), self.boxes_of(prediction["boxes"][0, self.objects])
        fits = [float(box_iou(box[None], around(mask))) for box, mask in zip(boxes, masks, strict=True)]
        return {"boxes": boxes, "masks": masks}, sum(fits) / len(fits)

    def on_object(self, i, tokens=slice(None)):
        """Which tokens of T_i have their centre on an object's mask [N]."""
        x, y = self.centers[tokens].astype(int).T
        inside = (x < self.width) & (y < self.height)
        return inside & self.masks[i].numpy()[y.clip(max=self.height - 1), x.clip(max=self.width - 1)]

    @torch.inference_mode()
    def attention(self, place):
        """The weights [Q K] of an attention of the model, mean over its heads: it is called again on what it got."""
        _, query, key, value = self.calls[place][0][:4]
        return (
            dict(self.model.named_modules())[place]
            .mha(query, key, value, need_weights=True)[1][0]
            .float()
            .cpu()
            .numpy()
        )

    def index(self, selection):
        """The tokens of a selection, the second or, where there is one alone, that: places in T_i [k]."""
        return self.trace[f"index_{selection}"][0].cpu().numpy()

    def scores(self, selection):
        """Their class scores, as probabilities [k]."""
        return self.trace[f"scores_{selection}"][0].float().sigmoid().cpu().numpy()

    def finest(self, values):
        """Values of tokens [N ...] at the finest level as a map [H W ...]."""
        height, width = self.level_shapes[0]
        return np.asarray(values[: height * width]).reshape(height, width, *np.shape(values)[1:])

    @torch.inference_mode()
    def guiding(self, i):
        """Which guiding tokens [G] are an object's: those whose prediction shows it."""
        config, layers = self.model.config, self.outputs["layers"]
        prediction = {"Q_bal": layers[1], "T_s2": layers[0], "T_s1": self.outputs["selection"]}[config.guidance]
        queries = torch.arange(prediction["logits"].shape[1])
        if config.guiding_tokens:
            guides = self.trace[config.guidance]
            queries = select(self.model.det_head.scores(guides), config.guiding_tokens)[1][0].cpu()
        logits = mask_logits(prediction, 0, queries).float().cpu()
        height, width = -(-self.height // 4), -(-self.width // 4)
        own = (
            nnf.interpolate(self.masks[i][None, None].float(), (height, width))[0] > 0
        )  # at 1/4, as masks are predicted
        alike = overlap(own, logits[:, :height, :width] > 0)[0]
        own = alike >= SAME
        own[alike.argmax()] = True
        return own.numpy()

    @torch.inference_mode()
    def samples(self, query):
        """Where a query of Eq. 4 reads T_i: points [n 2], and their weights [n]."""
        attention, (x, position, reference, *_) = (
            self.model.residual.cross_attention,
            self.calls["residual.cross_attention"][0],
        )
        placed = (x + position)[0, query]
        shape = (attention.heads, attention.levels, attention.points)  # heads, levels, points
        offsets = attention.offsets(placed).float().view(*shape, 2).cpu()
        weights = attention.weights(placed).float().view(shape[0], -1).softmax(-1).flatten().cpu()
        center, size = reference[0, query].float().cpu().chunk(2)
        points = (center + offsets * size * (0.5 / shape[-1])).view(-1, 2) * torch.tensor(self.padded)
        return points.numpy(), weights.numpy()


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
