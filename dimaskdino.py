"""DI-MaskDINO in one file, to be read beside the paper: start at DIMaskDINO.forward.

    Nan, Li, Xiang, Dai: DI-MaskDINO: A Joint Object Detection and Instance Segmentation Model, NeurIPS 2024

    section                                  equation   here
    3.2.1 Feature Tokens Extractor           T_i        Backbone, FeatureTokens
    3.2.2 De-Imbalance                       (1)        select, mask_to_box  (DIMaskDINO.candidates)
                                             (2)        TokenInteraction
                                             (3)        select
                                             (4)        DecoderLayer  (DIMaskDINO.residual)
    3.2.3 Balance-Aware Tokens Optimization  (5)        MaskGuide  (DIMaskDINO.N_mask)
                                             (6)        BoxGuide  (DIMaskDINO.N_box)
                                             (7)        a sum in DIMaskDINO.forward
                                             (8)        BalanceAwareTokens  (DIMaskDINO.bato)
    3.2.4 Transformer Decoder                (9)        DecoderLayer  (DIMaskDINO.decoder, run by N_de)
                                             (10)       DetectionHead  (DIMaskDINO.det_head)
                                             (11)       SegmentationHead  (DIMaskDINO.seg_head)

Shapes: B images, L levels, N tokens, Q queries, C channels, K classes, G guiding tokens, h heads, P points, H W pixels.
Tokens run from the finest level (1/8) to the coarsest (1/64), row by row within a level.
Boxes are (cx, cy, w, h) in [0, 1] of the network's input, that is of the image after padding to a multiple of 32. The
position token of T_x is box_x, always beside its token. There are no padding masks: padding is part of the image.
A tensor whose name ends in _logit has not met its sigmoid yet. Where this code follows the authors' code against or
beyond the paper's text, a comment says "released code".
"""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import box_convert

from backbones import RESNETS, SWINS, Backbone
from deform_attn_cuda import deform_attn


@dataclass(frozen=True)
class Config:
    """The model's sizes, and every switch that the paper ablates. The defaults are the paper."""

    num_classes: int = 80
    backbone: str = "resnet50"  # resnet18, resnet50, swin_t, swin_s, swin_b, swin_l, tiny
    dim: int = 256  # C, the channels of tokens and queries
    heads: int = 8
    levels: int = 4  # 1/8, 1/16, 1/32, 1/64
    points: int = 4  # sampled by each head on each level
    ffn: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6  # Eq. 4 is the first of them; table 9: 3, 9
    selection: tuple[int, ...] = (600, 300)  # k1, k2; tables 7, 8: (300,) is DI off, (600, 450, 300), (300, 300)
    interaction_layers: int = 2  # self-attention layers of Eq. 2
    bato: bool = True  # table 4; False: the decoder attends to T_i
    guidance: str = "Q_bal"  # table 5: "T_s1", "T_s2"
    gtg: bool = True  # table 6, guiding token generation; False: T_g = Q_bal
    position_token: str = "learned"  # table 3; "random": the query's boxes are drawn once, at random
    guide_networks: str = "own"  # Eq. 5, 6: two MLPs; "heads": the mask head's MLP, and the position MLP of the box
    guiding_tokens: int | None = None  # Eq. 7: how many, by class score; None: all
    guide_value: str = "T_g"  # Eq. 8: the value of the attention; "T_g_mask"
    pixel_tokens: str = "T_i"  # Eq. 11: "T_bal" refreshes the pixel embedding with the balance-aware tokens

    @classmethod
    def paper(cls):
        return cls()

    @classmethod
    def released(cls):
        """What the authors' code computes: their weights give their results with these four."""
        return cls(guide_networks="heads", guiding_tokens=50, guide_value="T_g_mask", pixel_tokens="T_bal")

    @classmethod
    def maskdino(cls):
        """MaskDINO, the baseline: neither De-Imbalance nor Balance-Aware Tokens Optimization."""
        return cls(selection=(300,), bato=False, decoder_layers=9)

    @classmethod
    def tiny(cls):
        """All of DI-MaskDINO at 1.1 M parameters: learns the synthetic `shapes` on a CPU in minutes."""
        sizes = {"dim": 64, "heads": 4, "ffn": 128, "encoder_layers": 1, "decoder_layers": 3, "selection": (60, 30)}
        return cls(num_classes=8, backbone="tiny", **sizes)

    def __post_init__(self):
        object.__setattr__(self, "selection", tuple(self.selection))
        choices = {
            "backbone": (*RESNETS, *SWINS, "tiny"),
            "guidance": ("Q_bal", "T_s1", "T_s2"),
            "position_token": ("learned", "random"),
            "guide_networks": ("own", "heads"),
            "guide_value": ("T_g", "T_g_mask"),
            "pixel_tokens": ("T_i", "T_bal"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("num_classes", "dim", "heads", "points", "ffn", "guiding_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is less than 1")
        if not self.selection or min(self.selection) < 1 or list(self.selection) != sorted(self.selection)[::-1]:
            raise ValueError(f"selection={self.selection} must be counts that do not grow, like (600, 300)")
        if self.dim % 4 or self.dim % self.heads or self.dim > 64 and self.dim % 32:  # 32 groups are normed alike
            raise ValueError(f"dim={self.dim} must be a multiple of 4, above 64 of 32, and of heads={self.heads}")
        if self.levels < 3 or self.decoder_layers < 2:  # Eq. 4 is one, Eq. 9 at least another
            raise ValueError(f"levels={self.levels} or decoder_layers={self.decoder_layers} is less than 3 or 2")


# ---- Leaf blocks -----------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs, hidden, outputs, depth):
        super().__init__()
        sizes = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """x = norm(x + W2 relu(W1 x))"""

    def __init__(self, dim, hidden):
        super().__init__()
        self.linear1, self.linear2, self.norm = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(x + self.linear2(self.linear1(x).relu_()))


class Attention(nn.Module):
    """x = norm(x + MHA(query, key, value)). PyTorch's module runs scaled_dot_product_attention."""

    def __init__(self, dim, heads):
        super().__init__()
        self.mha, self.norm = nn.MultiheadAttention(dim, heads, batch_first=True), nn.LayerNorm(dim)

    def forward(self, x, query, key, value, blocked=None):
        return self.norm(x + self.mha(query, key, value, attn_mask=blocked, need_weights=False)[0])


class DeformableAttention(nn.Module):
    """x = norm(x + D), where D is the deformable attention of the query x + position to a memory of L levels."""

    def __init__(self, config):
        super().__init__()
        self.split = {"h": config.heads, "L": config.levels, "P": config.points}
        samples = config.heads * config.levels * config.points
        self.offsets, self.weights = nn.Linear(config.dim, samples * 2), nn.Linear(config.dim, samples)
        self.value, self.output = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def start(self):
        """Each head looks one way, its point i at a distance of i, all with the same weight."""
        heads, levels, points = self.split.values()
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = nnf.normalize(torch.stack((angle.cos(), angle.sin()), -1), torch.inf)
        distance = torch.arange(1, points + 1)[None, None, :, None]
        with torch.no_grad():
            self.offsets.bias.copy_((direction[:, None, None] * distance).expand(-1, levels, -1, -1).flatten())
        for zero in (self.offsets.weight, *self.weights.parameters(), self.value.bias, self.output.bias):
            nn.init.zeros_(zero)

    def forward(self, x, position, reference, memory, level_shapes):
        """x, position [B Q C]; memory [B N C]; reference: centres [Q 2] or boxes [B Q 4], as `deform_attn` says."""
        query = x + position
        value = rearrange(self.value(memory), "B N (h c) -> B N h c", h=self.split["h"])
        offsets = rearrange(self.offsets(query), "B Q (h L P xy) -> B Q h L P xy", **self.split, xy=2)
        logits = rearrange(self.weights(query), "B Q (h L P) -> B Q h L P", **self.split)
        return self.norm(x + self.output(deform_attn(value, level_shapes, reference, offsets, logits)))


def wavelengths(channels, device=None):
    """10000^(2i / channels) for the channels of a position: [channels / 2]."""
    return 10000 ** (torch.arange(0, channels, 2, device=device) / channels)


def sine(positions, lengths):
    """Sines on even, cosines on odd channels, of positions [...] in turns over lengths [c]: [... 2c]."""
    angles = (positions * 2 * math.pi)[..., None] / lengths
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def sine_of_grid(level_shapes, dim, device):
    """The position of every token [N C]: half of the channels for y, half for x, both counted from 1."""
    sides = [side for shape in level_shapes for side in shape]
    counted = torch.cat([torch.arange(1, side + 1, device=device) / (side + 1e-6) for side in sides])
    sines, positions = sine(counted, wavelengths(dim // 2, device)).split(sides), []
    for (height, width), y, x in zip(level_shapes, sines[::2], sines[1::2], strict=True):
        positions.append(torch.cat((y[:, None].expand(-1, width, -1), x.expand(height, -1, -1)), -1).flatten(0, 1))
    return torch.cat(positions)


class BoxPosition(MLP):
    """What attention reads of a query's box: box [B Q 4] -> [B Q C]."""

    def __init__(self, dim):
        super().__init__(2 * dim, dim, dim, 2)
        self.register_buffer("wavelengths", wavelengths(dim // 2), persistent=False)  # for each of cy, cx, w, h

    def forward(self, box):
        cx, cy, w, h = box.float().unbind(-1)
        return super().forward(sine(torch.stack((cy, cx, w, h), -1), self.wavelengths).flatten(-2))


def cell_centers(level_shapes, device):
    """The centres of all tokens [N 2] as (x, y) in [0, 1]."""
    centers = []
    for height, width in level_shapes:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        centers.append(torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1))
    return torch.cat(centers)


class BoxMLP(MLP):
    """The change of a box in logit space, none at the start: [... C] -> [... 4]. float32, as bfloat16 is too coarse."""

    def __init__(self, dim):
        super().__init__(dim, dim, 4, 3)
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def normed_conv(inputs, outputs, kernel, stride=1, bias=False):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.GroupNorm(min(32, outputs // 2), outputs))


# ---- Feature Tokens Extractor (3.2.1) --------------------------------------------------------------------------------


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.ffn = DeformableAttention(config), FeedForward(config.dim, config.ffn)

    def forward(self, x, position, centers, level_shapes):
        return self.ffn(self.attention(x, position, centers, x, level_shapes))


class FeatureTokens(nn.Module):
    """Backbone features -> T_i, the initial feature tokens of all levels, and F_cnn, the feature at 1/4."""

    def __init__(self, config, channels):
        super().__init__()
        dim, (c4, *inputs) = config.dim, channels
        self.lateral = normed_conv(c4, dim, 1)
        self.projections = nn.ModuleList(normed_conv(c, dim, 1, bias=True) for c in inputs)
        for i in range(config.levels - 3):  # 1/64, and coarser ones after it
            self.projections.append(normed_conv(dim if i else inputs[-1], dim, 3, stride=2, bias=True))
        self.level_embed = nn.Parameter(torch.randn(config.levels, dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, features):
        """features at 1/4 to 1/32 -> T_i [B N C], its position in the grid [N C], level_shapes [(H, W)], and
        F_cnn [B C H/4 W/4]"""
        F_cnn = self.lateral(features[0])
        levels = [project(x) for project, x in zip(self.projections, features[1:], strict=False)]
        coarser = features[-1]
        for project in self.projections[3:]:
            coarser = project(coarser)
            levels.append(coarser)
        level_shapes = [tuple(x.shape[-2:]) for x in levels]
        x = torch.cat([x.flatten(2) for x in levels], 2).transpose(1, 2)  # [B N C]
        level = torch.cat([e.expand(h * w, -1) for e, (h, w) in zip(self.level_embed, level_shapes, strict=True)])
        grid = sine_of_grid(level_shapes, x.shape[-1], x.device)  # [N C]
        position = grid + level
        centers = cell_centers(level_shapes, x.device)
        for layer in self.layers:
            x = layer(x, position, centers, level_shapes)
        return x, grid, level_shapes, F_cnn


# ---- De-Imbalance (3.2.2, Eq. 1-4) -----------------------------------------------------------------------------------


def select(scores, k, *tokens):
    """Eq. 1 and 3.  T_s = S(T, k): in each image the k tokens with the best scores, best first.

    scores [B N]: best class logit of each token; tokens: tensors [B N ...], gathered alike. Small images have fewer
    than k tokens: all are kept. Returns the k scores [B k], their index [B k], and the gathered tensors.
    """
    scores, index = scores.topk(min(k, scores.shape[1]))
    image = torch.arange(index.shape[0], device=index.device)[:, None]
    return scores, index, *(x[image, index] for x in tokens)


def token_anchors(level_shapes, device):
    """The box around each token's cell that first predictions refine, as a logit [N 4], and which tokens have one [N].

    released code: the size doubles from the coarsest level (0.05) to the finest, and a token whose anchor leaves
    (0.01, 0.99), at the border of maps with sides of 50 cells or more, has none: its logit is infinite.
    """
    sizes = [0.05 * 2**i for i in reversed(range(len(level_shapes)))]
    sizes = torch.cat([torch.full((h * w, 2), s, device=device) for s, (h, w) in zip(sizes, level_shapes, strict=True)])
    anchors = torch.cat((cell_centers(level_shapes, device), sizes), -1)
    inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1)
    return anchors.logit().masked_fill(~inside[:, None], math.inf), inside


def mask_to_box(mask_logits):
    """The boxes [B Q 4] around the masks [B Q H W] where their logit is positive.

    released code: from the first to the last pixel's index, so a box is one pixel short; no mask, no box: the
    smallest one at the far corner.
    """
    inside = mask_logits > 0
    height, width = inside.shape[-2:]
    columns, rows = inside.any(-2), inside.any(-1)
    x0, x1 = columns.byte().argmax(-1), width - 1 - columns.flip(-1).byte().argmax(-1)
    y0, y1 = rows.byte().argmax(-1), height - 1 - rows.flip(-1).byte().argmax(-1)
    box = box_convert(torch.stack((x0 / width, y0 / height, x1 / width, y1 / height), -1), "xyxy", "cxcywh")
    nowhere = (torch.arange(4, device=box.device) < 2).float()  # (1, 1, 0, 0)
    return torch.where(columns.any(-1)[..., None], box, nowhere).clamp(1e-5, 1 - 1e-5)


def refine(delta, box):
    """The box that a predicted change, in logit space, makes of a box [... 4]."""
    return (delta.float() + box.logit(1e-5)).sigmoid()


class TokenInteractionLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.ffn = Attention(config.dim, config.heads), FeedForward(config.dim, config.ffn)

    def forward(self, x, position):
        placed = x + position
        return self.ffn(self.attention(x, placed, placed, x))


class TokenInteraction(nn.Module):
    """Eq. 2.  T_s1^sa = MHSA(T_s1): the selected tokens of an object tell each other where and what it is.

    released code: every layer has a feed-forward network, refines the boxes, and makes auxiliary predictions of classes
    and boxes for the loss; the auxiliary boxes apply the box MLP once more to boxes that it has already refined.
    """

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(TokenInteractionLayer(config) for _ in range(config.interaction_layers))
        self.position, self.box_mlp = BoxPosition(config.dim), BoxMLP(config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, T_s1, box_s1):
        """[B k C], [B k 4] -> T_s1_sa, box_s1_sa, and every layer's auxiliary (normed token, box)"""
        T_s1_sa, box_s1_sa, auxiliary = T_s1, box_s1, []
        for layer in self.layers:
            box = box_s1_sa.detach()
            T_s1_sa = layer(T_s1_sa, self.position(box))
            box_s1_sa = refine(self.box_mlp(T_s1_sa), box)
            normed = self.norm(T_s1_sa)
            auxiliary.append((normed, refine(self.box_mlp(normed), box_s1_sa)))
        return T_s1_sa, box_s1_sa, auxiliary


class DecoderLayer(nn.Module):
    """A layer of Eq. 9, and Eq. 4 (released code): self-attention, deformable attention at boxes, feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.self_attention = Attention(config.dim, config.heads)
        self.cross_attention = DeformableAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn)

    def forward(self, Q, position, box, memory, level_shapes, blocked=None):
        """Q, position [B Q C], box [B Q 4], memory [B N C], blocked [Q Q]: True where a query may not look"""
        placed = Q + position
        Q = self.self_attention(Q, placed, placed, Q, blocked)
        return self.ffn(self.cross_attention(Q, position, box, memory, level_shapes))


# ---- Balance-Aware Tokens Optimization (3.2.3, Eq. 5-8) --------------------------------------------------------------


class MaskGuide(nn.Module):
    """Eq. 5.  T_g^mask = N_mask(Q_bal): what the mask of each query's object looks like, by a three-layer MLP.

    released code, guide_networks="heads": by the mask head's MLP. Table 6, without guiding token generation: Q_bal.
    """

    def __init__(self, config):
        super().__init__()
        self.network = config.guide_networks if config.bato and config.gtg else None
        self.mlp = MLP(config.dim, config.dim, config.dim, 3) if self.network == "own" else None

    def forward(self, Q_bal, mask_mlp):
        """[B G C] -> [B G C]"""
        if self.network is None:
            return Q_bal
        return self.mlp(Q_bal) if self.network == "own" else mask_mlp(Q_bal)


class BoxGuide(MaskGuide):
    """Eq. 6.  T_g^box = N_box(Q_bal): where each query's object is, by a three-layer MLP.

    released code, guide_networks="heads": by the decoder's MLP for the positions of boxes; boxes are not trained by it.
    Table 6, without guiding token generation: nothing.
    """

    def forward(self, Q_bal, box_bal, position):
        """[B G C], [B G 4] -> [B G C]"""
        if self.network is None:
            return torch.zeros_like(Q_bal)
        return self.mlp(Q_bal) if self.network == "own" else position(box_bal.detach())


class BalanceAwareTokens(nn.Module):
    """Eq. 8.  T_bal = MHCA(T_i, T_g): every token moves towards the guiding tokens of its object.

    released code: a token's query has its position in the grid, and a feed-forward network follows;
    guide_value="T_g_mask": the keys are T_g, the values T_g^mask. Table 4, without BATO: T_bal = T_i.
    """

    def __init__(self, config):
        super().__init__()
        self.bato, self.value = config.bato, config.guide_value
        if config.bato:
            self.attention, self.ffn = Attention(config.dim, config.heads), FeedForward(config.dim, config.ffn)

    def forward(self, T_i, position, T_g, T_g_mask):
        """T_i [B N C], its position in the grid [N C], T_g and T_g_mask [B G C] -> T_bal [B N C]"""
        if not self.bato:
            return T_i
        return self.ffn(self.attention(T_i, T_i + position, T_g, T_g if self.value == "T_g" else T_g_mask))


# ---- Heads (3.2.4, Eq. 10-11) ----------------------------------------------------------------------------------------


class DetectionHead(nn.Module):
    """Eq. 10.  {c, b} = N_det(Q_ref), in float32 even under autocast, as bfloat16 is too coarse to rank scores."""

    def __init__(self, config):
        super().__init__()
        self.classifier, self.box_mlp = nn.Linear(config.dim, config.num_classes), BoxMLP(config.dim)

    def forward(self, x, Q_ref, box):
        """x: Q_ref normed once more [... Q C]; box: to be refined [... Q 4] -> c [... Q K] (logits), b [... Q 4]"""
        return self.classes(x), refine(self.box_mlp(Q_ref), box)

    def classes(self, x):
        """[B Q C] -> class logits [B Q K]"""
        with torch.autocast(x.device.type, enabled=False):
            return self.classifier(x.float())

    def scores(self, x):
        """[B Q C] -> the logit of the best class [B Q]"""
        return self.classes(x).amax(-1)


class SegmentationHead(nn.Module):
    """Eq. 11.  m = N_seg(Q_ref, T_i, F_cnn): the product of each query's mask embedding with each pixel's embedding."""

    def __init__(self, config):
        super().__init__()
        self.fuse = normed_conv(config.dim, config.dim, 3)
        self.embed = nn.Conv2d(config.dim, config.dim, 1)
        self.mask_mlp = MLP(config.dim, config.dim, config.dim, 3)
        self.update = normed_conv(config.dim, config.dim, 3) if config.bato and config.pixel_tokens == "T_bal" else None

    def pixel_embedding(self, T_i, level_shapes, F_cnn):
        """T_i [B N C], F_cnn [B C H/4 W/4] -> [B C H/4 W/4]"""
        return self.embed(self.fuse(F_cnn + finest_level(T_i, level_shapes, F_cnn)).relu())

    def updated(self, pixels, T_bal, level_shapes):
        """The pixel embedding for what comes after Eq. 8: the same. released code: refreshed with T_bal."""
        if self.update is None:
            return pixels
        return self.update(pixels + finest_level(T_bal, level_shapes, pixels)).relu().to(pixels.dtype)

    def forward(self, Q_ref, pixels):
        """Q_ref [layers B Q C], and the layers' pixel embeddings -> the layers' Masks"""
        return [Masks(*factors) for factors in zip(self.mask_mlp(Q_ref), pixels, strict=True)]


def finest_level(tokens, level_shapes, like):
    """The tokens at 1/8 as a map, enlarged to the size of another: [B N C] -> [B C H/4 W/4]"""
    height, width = level_shapes[0]
    x = rearrange(tokens[:, : height * width], "B (H W) C -> B C H W", H=height)
    return nnf.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class Masks(NamedTuple):
    """Masks as the product that they are, multiplied only where somebody reads them."""

    embedding: Tensor  # [B Q C]
    pixels: Tensor  # [B C H/4 W/4]

    def all(self):
        """Mask logits [B Q H/4 W/4]"""
        return torch.einsum("bqc,bchw->bqhw", self.embedding, self.pixels)

    def of(self, b, queries):
        """Mask logits [n H/4 W/4] of n queries of image b"""
        return torch.einsum("qc,chw->qhw", self.embedding[b, queries], self.pixels[b])


class Prediction(dict):
    """Class `logits` [B Q K], `boxes` [B Q 4] and, at most stages, `masks` [B Q H/4 W/4] (logits). These are no key:
    `prediction["masks"]` multiplies the key `mask_product`, what they are made of, whenever it is read."""

    def __missing__(self, name):
        if name == "masks" and "mask_product" in self:
            return self["mask_product"].all()
        raise KeyError(name)

    def split(self, number):
        """The predictions of the first queries, and those of the others."""
        embedding, pixels = self["mask_product"]
        sizes = number, embedding.shape[1] - number
        parts = (x.split(sizes, 1) for x in (self["logits"], self["boxes"], embedding))
        return [Prediction(logits=c, boxes=b, mask_product=Masks(m, pixels)) for c, b, m in zip(*parts, strict=True)]


def mask_product(prediction):
    """The Masks of a prediction, None where it has none; masks given as they are [B Q H/4 W/4] are their own pixels."""
    if "mask_product" in prediction or "masks" not in prediction:
        return prediction.get("mask_product")
    masks = prediction["masks"]
    return Masks(torch.eye(masks.shape[1], dtype=masks.dtype, device=masks.device).expand(len(masks), -1, -1), masks)


# torch.export has to know what outputs are made of.
torch.utils._pytree.register_pytree_node(
    Prediction,
    lambda prediction: (list(prediction.values()), list(prediction)),
    lambda values, names: Prediction(zip(names, values, strict=True)),
    serialized_type_name="dimaskdino.Prediction",
)


# ---- The model (3.2) -------------------------------------------------------------------------------------------------


class DIMaskDINO(nn.Module):
    """Joint object detection and instance segmentation.

    images: RGB in 0..255, uint8 or float, [B 3 H W], any H and W.
    denoising: the noised queries of losses.denoising_queries, in training.
    trace: True to get every symbol of the paper by its name.
    Returns a Prediction, that is a dict of
        logits [B Q K], boxes [B Q 4], masks [B Q H/4 W/4] (logits): the last decoder layer's predictions, where H W are
            those of the padded image; masks are computed when they are read;
        layers: such Predictions at every stage, the initial one (of T_s2) first, the last layer's last;
        selection: that of the k1 tokens of the first selection;
        interaction: those of each token interaction layer, without masks;
        denoising: those of the denoising queries, layer by layer, or an empty list;
        trace: if asked for, what this model has of T_i, T_s1, T_s1_sa, T_s2, Q_bal, T_g_mask, T_g_box, T_g, T_bal,
            Q_ref, F_cnn, their box_*, c, b, m, the selections' index_1, index_2, counted in T_i, scores_1, scores_2.
    """

    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.dim
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375])[:, None, None], persistent=False)
        self.backbone = Backbone(config.backbone)
        self.encoder = FeatureTokens(config, self.backbone.channels)
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.interactions = nn.ModuleList(TokenInteraction(config) for _ in config.selection[1:])
        self.residual = DecoderLayer(config)
        self.bato = BalanceAwareTokens(config)
        self.N_mask, self.N_box = MaskGuide(config), BoxGuide(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers - 1))
        self.position = BoxPosition(dim)
        self.head_norm = nn.LayerNorm(dim)
        self.det_head, self.seg_head = DetectionHead(config), SegmentationHead(config)
        self.label_embed = nn.Embedding(config.num_classes, dim)
        if config.position_token == "random":
            self.register_buffer("random_box", torch.rand(config.selection[-1], 4))
        initialize(self)

    def forward(self, images, denoising=None, trace=False):
        k1, *ks = self.config.selection

        # Feature Tokens Extractor. The pixels' embedding is what Eq. 11 reads of T_i and F_cnn.
        T_i, grid, level_shapes, F_cnn = self.encoder(self.backbone(self.normalize(images)))  # [B N C], [B C H/4 W/4]
        pixels = self.seg_head.pixel_embedding(T_i, level_shapes, F_cnn)  # [B C H/4 W/4]

        # Eq. 1  T_s1 = S(T_i, k1); released code: T_i is transformed for it
        tokens, anchors = self.candidates(T_i, level_shapes)
        scores_1, index_1, T_s1, anchor_s1 = select(self.det_head.scores(tokens), k1, tokens, anchors)  # [B k1 C]
        T_s1, box_s1, selection = self.cut_off(T_s1, anchor_s1, pixels)

        T, box, scores_2, index_2, interaction = T_s1, box_s1, scores_1, index_1, []
        for interact, k2 in zip(self.interactions, ks, strict=True):  # once; twice for a triple selection
            # Eq. 2  T_s1^sa = MHSA(T_s1)
            T_s1_sa, box_s1_sa, auxiliary = interact(T, box)  # [B k1 C]
            # Eq. 3  T_s2 = S(T_s1^sa, k2); the scores are of normed tokens, those kept are not; index_2 counts in T_i
            scores = self.det_head.scores(interact.norm(T_s1_sa))
            scores_2, _, T, box, index_2 = select(scores, k2, T_s1_sa, box_s1_sa, index_2)  # [B k2 C]
            interaction += [self.predict(*tokens) for tokens in auxiliary]
        T_s2, box_s2 = T, self.starting_box(box, of="T_s2")  # released code: what follows trains box_s2; table 3

        # Eq. 4  Q_bal = MHCA(T_s2, T_i); in training, D denoising queries go along in front, from here to the heads
        Q_0, box_0, blocked, D = self.with_denoising(denoising, T_s2, box_s2)
        Q_1, box_1 = self.decode(self.residual, Q_0, box_0, T_i, level_shapes, blocked)
        Q_bal, box_bal = Q_1[:, D:], self.starting_box(box_1[:, D:], of="Q_bal")  # [B k2 C]

        # Eq. 5  T_g^mask = N_mask(Q_bal)
        guide, box_guide = self.guides(T_s1=(T_s1, box_s1), T_s2=(T_s2, box_s2), Q_bal=(Q_bal, box_bal))  # Q_bal
        T_g_mask = self.N_mask(guide, self.seg_head.mask_mlp)  # [B G C]
        # Eq. 6  T_g^box = N_box(Q_bal)
        T_g_box = self.N_box(guide, box_guide, self.position)  # [B G C]
        # Eq. 7  T_g = T_g^mask + T_g^box
        T_g = T_g_mask + T_g_box  # [B G C]
        # Eq. 8  T_bal = MHCA(T_i, T_g)
        T_bal = self.bato(T_i, grid, T_g, T_g_mask)  # [B N C]

        # Eq. 9  Q_ref = N_de(Q_bal, T_bal), after each of the layers l, of which Eq. 4 is the first
        start = Q_1, torch.cat((box_1[:, :D], box_bal), 1)  # Q_bal behind the denoising queries
        Q_ref, box_before = self.N_de((Q_0, box_0), start, T_bal, level_shapes, blocked)  # [l B D+k2 C]
        normed = self.head_norm(Q_ref)  # released code: classes and masks see the norm twice
        # Eq. 10  {c, b} = N_det(Q_ref)
        c, b = self.det_head(normed, Q_ref, box_before)  # [l B D+k2 K], [l B D+k2 4]
        # Eq. 11  m = N_seg(Q_ref, T_i, F_cnn)
        updated = self.seg_head.updated(pixels, T_bal, level_shapes)
        m = self.seg_head(normed, [pixels] + [updated] * len(self.decoder))  # Masks [B D+k2 H/4 W/4] of each layer

        layers = [Prediction(logits=c, boxes=b, mask_product=m) for c, b, m in zip(c, b, m, strict=True)]
        layers = [self.predict(Q_0, box_0, pixels), *layers]  # layer 0 is what the heads say of T_s2
        noised, layers = zip(*(layer.split(D) for layer in layers), strict=True)
        outputs = Prediction(layers[-1], layers=list(layers), selection=selection, interaction=interaction)
        outputs["denoising"] = [] if denoising is None else list(noised)
        if trace:
            symbols = dict(F_cnn=F_cnn, T_i=T_i, T_s1=T_s1, box_s1=box_s1, scores_1=scores_1, index_1=index_1)
            symbols |= dict(T_s1_sa=T_s1_sa, box_s1_sa=box_s1_sa) if self.interactions else {}
            symbols |= dict(T_s2=T_s2, box_s2=box_s2, scores_2=scores_2, index_2=index_2, Q_bal=Q_bal, box_bal=box_bal)
            symbols |= dict(T_g_mask=T_g_mask, T_g_box=T_g_box, T_g=T_g) if self.config.bato else {}
            symbols |= dict(T_bal=T_bal, Q_ref=Q_ref[-1][:, D:], c=outputs["logits"], b=outputs["boxes"])
            outputs["trace"] = symbols | dict(m=outputs["masks"])
        return outputs

    def normalize(self, images):
        """RGB in 0..255 -> zero mean, unit deviation, padded with zeros at the right and bottom to a multiple of 32."""
        height, width = images.shape[-2:]
        return nnf.pad((images.float() - self.mean) / self.std, (0, -width % 32, 0, -height % 32))

    def candidates(self, T_i, level_shapes):
        """The tokens as they are scored and selected [B N C], and their anchors [B N 4] as logits. released code: they
        are a transform of T_i."""
        anchors_logit, inside = token_anchors(level_shapes, T_i.device)
        return self.transform(T_i * inside[:, None]), anchors_logit.expand(T_i.shape[0], -1, -1)

    def cut_off(self, T_s1, anchor_logit, pixels):
        """The selected tokens [B k C] and their boxes [B k 4] as what follows sees them, and their predictions.

        released code: what follows does not train the tokens, their predictions do; the boxes are those of the masks.
        """
        prediction = self.predict(T_s1, (self.det_head.box_mlp(T_s1) + anchor_logit).sigmoid(), pixels)
        with torch.no_grad():
            return T_s1.detach(), mask_to_box(prediction["masks"]), prediction

    def starting_box(self, box, of):
        """The boxes [B Q 4] as they are. Table 3, position_token="random": boxes that were drawn once, the same for
        every image, stand for those of Q_bal, and for those of T_s2 where there is no De-Imbalance."""
        stage = "Q_bal" if self.interactions else "T_s2"
        if self.config.position_token == "random" and of == stage:
            return self.random_box[: box.shape[1]].expand_as(box)
        return box

    def with_denoising(self, denoising, T_s2, box_s2):
        """D denoising queries (see losses.Denoising) and T_s2 as one: queries, boxes, who may not look at whom, D."""
        if denoising is None:
            return T_s2, box_s2, None, 0
        used = denoising.labels >= 0  # a slot that an image with fewer objects leaves empty holds zeros
        content = self.label_embed(denoising.labels.clamp(min=0)) * used[..., None]
        Q, box = torch.cat((content, T_s2), 1), torch.cat((denoising.boxes_logit.sigmoid(), box_s2), 1)
        return Q, box, denoising.attention_mask(T_s2.shape[1]), content.shape[1]

    def decode(self, layer, Q, box, memory, level_shapes, blocked):
        """A decoder layer: queries [B Q C] and boxes [B Q 4] -> both refined"""
        Q = layer(Q, self.position(box), box, memory, level_shapes, blocked)
        return Q, refine(self.det_head.box_mlp(Q), box)

    def guides(self, **tokens):
        """What guides T_i, [B G C] with boxes [B G 4]: Q_bal; table 5: T_s1 or T_s2. released code: the best 50."""
        guide, box = tokens[self.config.guidance]
        if self.config.guiding_tokens:
            *_, guide, box = select(self.det_head.scores(guide), self.config.guiding_tokens, guide, box)
        return guide, box

    def N_de(self, before, start, T_bal, level_shapes, blocked):
        """The decoder: of Eq. 4 and each layer after it the normed queries [l B Q C], and the boxes that they refine.

        before, start: queries and boxes before and after Eq. 4. released code: a layer is not trained through the box
        that it starts from, but its prediction is.
        """
        stages = [before, start]
        for layer in self.decoder:
            Q, box = stages[-1]
            stages.append(self.decode(layer, Q, box.detach(), T_bal, level_shapes, blocked))
        Q, box = zip(*stages, strict=True)
        return self.head_norm(torch.stack(Q[1:])), torch.stack(box[:-1])

    def predict(self, x, boxes, pixels=None):
        """What the heads say of tokens [B Q C] with boxes [B Q 4] that stay as they are, for the losses."""
        x = self.head_norm(x)
        masks = {} if pixels is None else {"mask_product": Masks(self.seg_head.mask_mlp(x), pixels)}
        return Prediction(logits=self.det_head.classes(x), boxes=boxes, **masks)


def initialize(model):
    """Start values. released code, but the class bias is the focal prior, 1 in 100, and the layers of Eq. 2 differ."""
    for part in (model.encoder.layers, model.residual, model.decoder, model.position, model.bato):
        for parameter in part.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("backbone"):
            start = nn.init.xavier_uniform_ if "projections" in name else nn.init.kaiming_uniform_
            start(module.weight, **({} if "projections" in name else {"a": 1}))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, DeformableAttention):
            module.start()
    nn.init.constant_(model.det_head.classifier.bias, -math.log(99))


# ---- From predictions to objects -------------------------------------------------------------------------------------


@torch.no_grad()
def postprocess(outputs, image_sizes, output_sizes, top=100):
    """The best objects of every image.

    outputs: logits [B Q K], boxes [B Q 4], masks [B Q H/4 W/4] of the model (or of one of its `layers`).
    image_sizes, output_sizes: (height, width) of each image as the model got it, and as the objects are wanted.
    Returns for each image a dict, best score first, of scores [n], labels [n], boxes [n 4] (x0, y0, x1, y1 in output
    pixels, not clipped), masks [n H W] (bool), n = min(top, Q K). A score is that of the class times the mean of the
    mask's probabilities inside the mask. The same query may appear under several classes.
    """
    results = []
    for b, ((height, width), output) in enumerate(zip(image_sizes, output_sizes, strict=True)):
        class_scores = outputs["logits"][b].float().sigmoid()
        scores, flat = class_scores.flatten().topk(min(top, class_scores.numel()))
        query, labels = flat // class_scores.shape[1], flat % class_scores.shape[1]
        found_masks, masks, qualities = mask_product(outputs).of(b, query), [], []
        padded = [4 * side for side in found_masks.shape[-2:]]
        for mask in found_masks.float().split(8):  # a few at a time: the output may be large
            mask = nnf.interpolate(mask[None], padded, mode="bilinear", align_corners=False)[..., :height, :width]
            mask = nnf.interpolate(mask, tuple(output), mode="bilinear", align_corners=False)[0]
            inside = mask > 0
            masks.append(inside)
            qualities.append((mask.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6))
        scores, order = (scores * torch.cat(qualities)).sort(descending=True)
        to_output = [padded[1] * output[1] / width, padded[0] * output[0] / height] * 2
        boxes = box_convert(outputs["boxes"][b, query].float(), "cxcywh", "xyxy") * scores.new_tensor(to_output)
        found = {"labels": labels, "boxes": boxes, "masks": torch.cat(masks)}
        results.append({"scores": scores} | {name: x[order] for name, x in found.items()})
    return results


# ---- One image through a fresh model, equation by equation -----------------------------------------------------------


def main():
    """One image of 800x1216 through a fresh model: what each equation makes, its shape, its time."""
    model, image = DIMaskDINO(Config.paper()).eval(), torch.randint(0, 256, (1, 3, 800, 1216))
    interaction = model.interactions[0]
    steps = [  # symbol, equation, and what is told the end of the step: the end or the begin of a module
        ("T_i", "FTE        F_cnn, T_i: backbone, encoder", model.seg_head.embed.register_forward_hook),
        ("T_s1", "Eq. 1      T_s1 = S(T_i, k1)", interaction.register_forward_pre_hook),
        ("T_s1_sa", "Eq. 2      T_s1^sa = MHSA(T_s1)", interaction.register_forward_hook),
        ("T_s2", "Eq. 3      T_s2 = S(T_s1^sa, k2)", model.residual.register_forward_pre_hook),
        ("Q_bal", "Eq. 4      Q_bal = MHCA(T_s2, T_i)", model.residual.register_forward_hook),
        ("T_g_mask", "Eq. 5      T_g^mask = N_mask(Q_bal)", model.N_mask.register_forward_hook),
        ("T_g_box", "Eq. 6      T_g^box = N_box(Q_bal)", model.N_box.register_forward_hook),
        ("T_g", "Eq. 7      T_g = T_g^mask + T_g^box", model.bato.register_forward_pre_hook),
        ("T_bal", "Eq. 8      T_bal = MHCA(T_i, T_g)", model.bato.register_forward_hook),
        ("Q_ref", "Eq. 9      Q_ref = N_de(Q_bal, T_bal)", model.det_head.register_forward_pre_hook),
        ("b", "Eq. 10     {c, b} = N_det(Q_ref)", model.det_head.register_forward_hook),
        ("m", "Eq. 11     m = N_seg(Q_ref, T_i, F_cnn)", model.register_forward_hook),
    ]
    times = {}
    model.register_forward_pre_hook(lambda *_: times.update(start=time.perf_counter()))
    for symbol, _, register in steps:
        register(lambda *_, symbol=symbol: times.update({symbol: time.perf_counter()}))
    with torch.inference_mode():
        model(image)  # the first run also sets up threads and memory
        symbols = model(image, trace=True)["trace"]
    print(f"DI-MaskDINO, {sum(p.numel() for p in model.parameters()):,} parameters, image {[*image.shape]}")
    before = times["start"]
    for symbol, step, *_ in steps:
        print(f"{step:42}{symbol:9}{str([*symbols[symbol].shape]):22}{1000 * (times[symbol] - before):8.1f} ms")
        before = times[symbol]
    print("tokens: " + " -> ".join(f"{symbols[name].shape[1]:,}" for name in ("T_i", "T_s1", "T_s2")))


if __name__ == "__main__":
    main()
