"""DI-MaskDINO in one file, to be read beside the paper.

    Nan, Li, Xiang, Dai: DI-MaskDINO: A Joint Object Detection and Instance Segmentation Model, NeurIPS 2024

    section                                  equation   here
    3.2.1 Feature Tokens Extractor           T_i        Backbone, FeatureTokens
    3.2.2 De-Imbalance                       Eq. 1      select, mask_to_box
                                             Eq. 2      TokenInteraction
                                             Eq. 3      select
                                             Eq. 4      DecoderLayer  (DIMaskDINO.residual)
    3.2.3 Balance-Aware Tokens Optimization  Eq. 5-7    DIMaskDINO.guiding_tokens
                                             Eq. 8      BalanceAwareTokens
    3.2.4 Transformer Decoder                Eq. 9      DecoderLayer  (DIMaskDINO.decoder)
                                             Eq. 10     DetectionHead
                                             Eq. 11     SegmentationHead

Shapes: B images, L levels, N tokens, Q queries, C channels, K classes, G guiding tokens, h heads, P points, H W pixels.
Tokens run from the finest level (1/8) to the coarsest (1/64), row by row within a level.
Boxes are (cx, cy, w, h) in [0, 1] of the network's input, that is of the image after padding to a multiple of 32. The
position token of T_x is box_x, always beside its token. There are no padding masks: padding is part of the image.
A tensor whose name ends in _logit has not met its sigmoid yet. Where this code follows the authors' code against or
beyond the paper's text, a comment says "released code".
"""

import dataclasses
import math
import pickle
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
import torchvision
from einops import rearrange
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import box_convert

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
    detection_loss: float = 1.0  # table 3, the factor on the weights of class and box losses: 0.1
    guide_networks: str = "own"  # Eq. 5, 6: two MLPs; "heads": the mask head's MLP, and the position MLP of the box
    guiding_tokens: int | None = None  # Eq. 7: how many, by class score; None: all
    guide_value: str = "T_g"  # Eq. 8: the value of the attention; "T_g_mask"
    pixel_tokens: str = "T_i"  # Eq. 11: "T_bal" refreshes the pixel embedding with the balance-aware tokens
    denoising: int = 100  # queries that training adds
    mask_points: int = 12544  # points at which training compares masks

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
        return cls(
            num_classes=8, backbone="tiny", dim=64, heads=4, ffn=128, encoder_layers=1, decoder_layers=3,
            selection=(60, 30), denoising=16, mask_points=256,
        )  # fmt: skip

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
        if not self.selection or min(self.selection) < 1 or list(self.selection) != sorted(self.selection)[::-1]:
            raise ValueError(f"selection={self.selection} must be counts that do not grow, like (600, 300)")
        if self.dim % 4 or self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be a multiple of 4 and of heads={self.heads}")
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
    """x = norm(x + deformable attention of x + position to a memory of L levels)."""

    def __init__(self, config):
        super().__init__()
        self.split = {"h": config.heads, "L": config.levels, "P": config.points}
        samples = config.heads * config.levels * config.points
        self.offsets, self.weights = nn.Linear(config.dim, samples * 2), nn.Linear(config.dim, samples)
        self.value, self.output = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x, position, reference, memory, level_shapes):
        """x, position [B Q C]; memory [B N C]; reference: cell centres [Q 2], from which offsets are in cells of their
        level, or boxes [B Q 4], where they are in halves of the box, shared out among the points."""
        query = x + position
        value = rearrange(self.value(memory), "B N (h c) -> B N h c", h=self.split["h"])
        offsets = rearrange(self.offsets(query), "B Q (h L P xy) -> B Q h L P xy", **self.split, xy=2)
        logits = rearrange(self.weights(query), "B Q (h L P) -> B Q h L P", **self.split)
        return self.norm(x + self.output(deform_attn(value, level_shapes, reference, offsets, logits)))


def sine(angle, channels):
    """Sines on even, cosines on odd channels, of angle [...] over 10000^(2i / channels): [... channels]."""
    i = torch.arange(channels // 2, device=angle.device)
    angle = angle[..., None] / 10000 ** (2 * i / channels)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)


def sine_of_grid(level_shapes, dim, device):
    """The position of every token [N C]: half of the channels for y, half for x, both counted from 1."""
    positions = []
    for height, width in level_shapes:
        y = sine(torch.arange(1, height + 1, device=device) / (height + 1e-6) * 2 * math.pi, dim // 2)
        x = sine(torch.arange(1, width + 1, device=device) / (width + 1e-6) * 2 * math.pi, dim // 2)
        positions.append(torch.cat((y[:, None].expand(-1, width, -1), x.expand(height, -1, -1)), -1).flatten(0, 1))
    return torch.cat(positions)


def sine_of_box(box, dim):
    """The position of a box [... 2C]: half of C channels for each of cy, cx, w, h."""
    return sine(box[..., [1, 0, 2, 3]].float() * 2 * math.pi, dim // 2).flatten(-2)


def cell_centers(level_shapes, device):
    """The centres of all tokens [N 2] as (x, y) in [0, 1]."""
    centers = []
    for height, width in level_shapes:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        centers.append(torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1))
    return torch.cat(centers)


def normed_conv(inputs, outputs, kernel, stride=1, bias=False):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.GroupNorm(min(32, outputs // 2), outputs))


# ---- Feature Tokens Extractor (3.2.1) --------------------------------------------------------------------------------

RESNETS = {"resnet18": (64, 128, 256, 512), "resnet50": (256, 512, 1024, 2048)}
SWINS = {  # embedding, depths, heads, window, stochastic depth
    "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 0.2),
    "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 0.3),
    "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 0.5),
    "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 0.3),
}


class Backbone(nn.Module):
    """Image [B 3 H W], normalised -> features at strides 4, 8, 16, 32, fine to coarse."""

    def __init__(self, name):
        super().__init__()
        if name in RESNETS:
            self.channels = RESNETS[name]
            net = getattr(torchvision.models, name)(weights=None)
            stem = nn.Sequential()
            for part in ("conv1", "bn1", "relu", "maxpool"):
                stem.add_module(part, getattr(net, part))
            self.stages = nn.ModuleList([stem, net.layer1, net.layer2, net.layer3, net.layer4])
        elif name in SWINS:
            width, depths, heads, window, drop = SWINS[name]
            self.channels = tuple(width * 2**i for i in range(4))
            net = torchvision.models.SwinTransformer(
                [4, 4], width, list(depths), list(heads), [window] * 2, stochastic_depth_prob=drop
            ).features
            # A stage is the downsampling before it and its blocks; maps are channels last inside.
            self.stages = nn.ModuleList([net[:2], net[2:4], net[4:6], net[6:8]])
            self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        else:  # "tiny": ResNet's stem and basic blocks, narrow
            self.channels = (32, 64, 128, 128)
            stem = nn.Sequential(
                nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
            )
            self.stages = nn.ModuleList([stem])
            for inputs, outputs, stride in zip((32, *self.channels), self.channels, (1, 2, 2, 2), strict=False):
                shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
                self.stages.append(BasicBlock(inputs, outputs, stride, None if stride == 1 else shortcut))

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        if hasattr(self, "norms"):
            return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, features, strict=True)]
        return features[1:]  # without the stem

    def freeze_norm(self):
        """Pretrained batch statistics stay as they are (FrozenBatchNorm), because detection batches are small.

        A frozen norm no longer counts its batches: in a checkpoint, it is the one without num_batches_tracked.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.num_batches_tracked is None:
                module.eval()
        return self


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
        """features at 1/4 to 1/32 -> T_i [B N C], level_shapes [(H, W)], F_cnn [B C H/4 W/4]"""
        F_cnn = self.lateral(features[0])
        levels = [project(x) for project, x in zip(self.projections, features[1:], strict=False)]
        coarser = features[-1]
        for project in self.projections[3:]:
            coarser = project(coarser)
            levels.append(coarser)
        level_shapes = [tuple(x.shape[-2:]) for x in levels]
        x = torch.cat([x.flatten(2) for x in levels], 2).transpose(1, 2)  # [B N C]
        level = torch.cat([e.expand(h * w, -1) for e, (h, w) in zip(self.level_embed, level_shapes, strict=True)])
        position = sine_of_grid(level_shapes, x.shape[-1], x.device) + level  # [N C]
        centers = cell_centers(level_shapes, x.device)
        for layer in self.layers:
            x = layer(x, position, centers, level_shapes)
        return x, level_shapes, F_cnn


# ---- De-Imbalance (3.2.2, Eq. 1-4) -----------------------------------------------------------------------------------


def select(scores, k, *tokens):
    """Eq. 1 and 3.  T_s = S(T, k): keep, in each image, the k tokens with the highest class score, best first.

    scores [B N]: best class logit of each token; tokens: tensors [B N ...], gathered alike. Small images have fewer
    than k tokens: all are kept. Returns index [B k] and the gathered tensors.
    """
    index = scores.topk(min(k, scores.shape[1])).indices
    image = torch.arange(len(index), device=index.device)[:, None]
    return index, *(x[image, index] for x in tokens)


def token_anchors(level_shapes, device):
    """The box around each token's cell that first predictions refine, as a logit [N 4], and which tokens have one [N].

    released code: the size doubles from the coarsest level (0.05) to the finest, and a token whose anchor leaves
    (0.01, 0.99), at the border of maps wider than 50 cells, has none: its logit is infinite.
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
    box = torch.stack((x0 / width, y0 / height, x1 / width, y1 / height), -1)
    box = box_convert(box, "xyxy", "cxcywh")
    nowhere = torch.tensor([1.0, 1.0, 0.0, 0.0], device=box.device)
    return torch.where(columns.any(-1)[..., None], box, nowhere).clamp(1e-5, 1 - 1e-5)


def refine(delta, box):
    """The box that a predicted change, in logit space, makes of a box [... 4]."""
    return (delta.float() + box.logit(1e-5)).sigmoid()


class TokenInteractionLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.ffn = Attention(config.dim, config.heads), FeedForward(config.dim, config.ffn)

    def forward(self, x, position):
        return self.ffn(self.attention(x, x + position, x + position, x))


class TokenInteraction(nn.Module):
    """Eq. 2.  T_s1^sa = MHSA(T_s1): the selected tokens of an object tell each other where and what it is.

    released code: every layer has a feed-forward network, refines the boxes, and predicts classes and boxes that are
    trained; the trained boxes apply the box MLP once more to boxes that it has already refined.
    """

    def __init__(self, config):
        super().__init__()
        self.dim = config.dim
        self.layers = nn.ModuleList(TokenInteractionLayer(config) for _ in range(config.interaction_layers))
        self.position = MLP(2 * config.dim, config.dim, config.dim, 2)
        self.box_mlp = MLP(config.dim, config.dim, 4, 3)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, T_s1, box_s1):
        """[B k C], [B k 4] -> T_s1_sa, box_s1_sa, and (normed token, trained box) of every layer"""
        T_s1_sa, box_s1_sa, trained = T_s1, box_s1, []
        for layer in self.layers:
            box = box_s1_sa.detach()
            T_s1_sa = layer(T_s1_sa, self.position(sine_of_box(box, self.dim)))
            box_s1_sa = refine(self.box_mlp(T_s1_sa), box)
            normed = self.norm(T_s1_sa)
            trained.append((normed, refine(self.box_mlp(normed), box_s1_sa)))
        return T_s1_sa, box_s1_sa, trained


class DecoderLayer(nn.Module):
    """Eq. 4 and, stacked, Eq. 9: self-attention, deformable cross-attention at the queries' boxes, feed-forward.

    Eq. 4: Q_bal = MHCA(T_s2, T_i), the residual that gives back what two selections have lost.
    Eq. 9: Q_ref = N_de(Q_bal, T_bal).
    """

    def __init__(self, config):
        super().__init__()
        self.self_attention = Attention(config.dim, config.heads)
        self.cross_attention = DeformableAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn)

    def forward(self, Q, position, box, memory, level_shapes, blocked=None):
        """Q, position [B Q C], box [B Q 4], memory [B N C], blocked [Q Q]: True where a query may not look"""
        Q = self.self_attention(Q, Q + position, Q + position, Q, blocked)
        return self.ffn(self.cross_attention(Q, position, box, memory, level_shapes))


# ---- Balance-Aware Tokens Optimization (3.2.3, Eq. 5-8) --------------------------------------------------------------


class BalanceAwareTokens(nn.Module):
    """Eq. 8.  T_bal = MHCA(T_i, T_g): every token moves towards the guiding tokens of its object."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.ffn = Attention(config.dim, config.heads), FeedForward(config.dim, config.ffn)

    def forward(self, T_i, position, T_g, value):
        """[B N C], [N C], [B G C], [B G C] -> T_bal [B N C]"""
        return self.ffn(self.attention(T_i, T_i + position, T_g, value))


# ---- Heads (3.2.4, Eq. 10-11) ----------------------------------------------------------------------------------------


class DetectionHead(nn.Module):
    """Eq. 10.  {c, b} = N_det(Q_ref). In fp32 also under autocast: 8 bits rank no scores and place no box."""

    def __init__(self, config):
        super().__init__()
        self.classifier = nn.Linear(config.dim, config.num_classes)
        self.box_mlp = MLP(config.dim, config.dim, 4, 3)

    def classes(self, x):
        """[B Q C] -> class logits [B Q K]"""
        with torch.autocast(x.device.type, enabled=False):
            return self.classifier(x.float())

    def scores(self, x):
        """[B Q C] -> the logit of the best class [B Q]"""
        return self.classes(x).amax(-1)

    def delta(self, x):
        """[B Q C] -> change of the box, in logit space [B Q 4]"""
        with torch.autocast(x.device.type, enabled=False):
            return self.box_mlp(x.float())


class SegmentationHead(nn.Module):
    """Eq. 11.  m = N_seg(Q_ref, T_i, F_cnn): the product of each query's mask embedding with each pixel's embedding."""

    def __init__(self, config):
        super().__init__()
        self.fuse = normed_conv(config.dim, config.dim, 3)
        self.embed = nn.Conv2d(config.dim, config.dim, 1)
        self.mask_mlp = MLP(config.dim, config.dim, config.dim, 3)

    def pixel_embedding(self, T_i, level_shapes, F_cnn):
        """T_i [B N C], F_cnn [B C H/4 W/4] -> [B C H/4 W/4]"""
        return self.embed(self.fuse(F_cnn + finest_level(T_i, level_shapes, F_cnn)).relu())

    def forward(self, Q_ref, pixels):
        """[B Q C], [B C H/4 W/4] -> mask logits [B Q H/4 W/4]"""
        return torch.einsum("bqc,bchw->bqhw", self.mask_mlp(Q_ref), pixels)


def finest_level(tokens, level_shapes, like):
    """The tokens at 1/8 as a map, enlarged to the size of another: [B N C] -> [B C H/4 W/4]"""
    height, width = level_shapes[0]
    x = rearrange(tokens[:, : height * width], "B (H W) C -> B C H W", H=height)
    return nnf.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


# ---- The model (3.2) -------------------------------------------------------------------------------------------------


class DIMaskDINO(nn.Module):
    """Joint object detection and instance segmentation.

    images: RGB in 0..255, uint8 or float, [B 3 H W], any H and W.
    denoising: the noised queries of losses.denoising_queries, in training.
    trace: True, or a dict to fill, to get every symbol of the paper by its name.
    Returns a dict of
        logits [B Q K], boxes [B Q 4], masks [B Q H/4 W/4] (logits): the last decoder layer's predictions, where H W are
            those of the padded image;
        layers: such dicts for every prediction, the initial one (of T_s2) first, the last layer's last;
        selection: the predictions of the k1 tokens of Eq. 1;
        interaction: those of each layer of Eq. 2, without masks;
        denoising: those of the denoising queries, layer by layer, or an empty list;
        trace: if asked for, T_i, T_s1, T_s1_sa, T_s2, Q_bal, T_g_mask, T_g_box, T_g, T_bal, Q_ref, F_cnn, their box_*,
            and the selections' index_1, index_2, counted in T_i, and scores_1, scores_2.
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
        if config.bato:
            self.bato = BalanceAwareTokens(config)
            if config.gtg and config.guide_networks == "own":
                self.mask_net, self.box_net = MLP(dim, dim, dim, 3), MLP(dim, dim, dim, 3)
            if config.pixel_tokens == "T_bal":
                self.pixel_update = normed_conv(dim, dim, 3)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers - 1))
        self.position = MLP(2 * dim, dim, dim, 2)
        self.head_norm = nn.LayerNorm(dim)
        self.det_head, self.seg_head = DetectionHead(config), SegmentationHead(config)
        self.label_embed = nn.Embedding(config.num_classes, dim)
        if config.position_token == "random":
            self.register_buffer("random_box", torch.rand(config.selection[-1], 4))
        initialize(self)

    def forward(self, images, denoising=None, trace=False):
        config, symbols = self.config, trace if isinstance(trace, dict) else {}

        # Feature Tokens Extractor
        T_i, level_shapes, F_cnn = self.encoder(self.backbone(self.normalize(images)))
        pixels = self.seg_head.pixel_embedding(T_i, level_shapes, F_cnn)
        symbols.update(F_cnn=F_cnn, T_i=T_i)

        # Eq. 1  T_s1 = S(T_i, k1). released code: T_i is transformed before it is scored; T_s1 is not trained through
        # what follows, but by predictions of its own; its boxes are those of its masks.
        tokens, anchors_logit = self.candidates(T_i, level_shapes)
        scores = self.det_head.scores(tokens)
        index_1, scores_1, T_s1, anchor_logit = select(scores, config.selection[0], scores, tokens, anchors_logit)
        selection = self.predict(T_s1, (self.det_head.delta(T_s1) + anchor_logit).sigmoid(), pixels)
        T_s1, box_s1 = T_s1.detach(), mask_to_box(selection["masks"].detach())
        symbols.update(T_s1=T_s1, box_s1=box_s1, scores_1=scores_1, index_1=index_1)

        # Eq. 2  T_s1^sa = MHSA(T_s1), and Eq. 3  T_s2 = S(T_s1^sa, k2): once; twice for a triple selection
        T_s2, box_s2, scores_2, index_2, interaction = T_s1, box_s1, scores_1, index_1, []
        for interact, k in zip(self.interactions, config.selection[1:], strict=True):
            T_s1_sa, box_s1_sa, trained = interact(T_s2, box_s2)
            symbols.update(T_s1_sa=T_s1_sa, box_s1_sa=box_s1_sa)
            interaction += [self.predict(T, box) for T, box in trained]
            scores = self.det_head.scores(interact.norm(T_s1_sa))
            _, scores_2, T_s2, box_s2, index_2 = select(scores, k, scores, T_s1_sa, box_s1_sa, index_2)
        if config.position_token == "random" and not self.interactions:  # table 3, for MaskDINO
            box_s2 = self.random_box[: T_s2.shape[1]].expand_as(box_s2)
        symbols.update(T_s2=T_s2, box_s2=box_s2, scores_2=scores_2, index_2=index_2)

        # Denoising queries, in training, go with the others, in front
        Q, box, blocked = self.with_denoising(denoising, T_s2, box_s2)
        extra = Q.shape[1] - T_s2.shape[1]
        layers = [self.predict(Q, box, pixels)]

        # Eq. 4  Q_bal = MHCA(T_s2, T_i). released code: it trains the boxes of Eq. 2, while those of later layers are
        # not trained through the layers that start from them.
        Q = self.residual(Q, self.position(sine_of_box(box, config.dim)), box, T_i, level_shapes, blocked)
        layers.append(self.predict_refined(Q, box, pixels))
        box = refine(self.det_head.delta(Q), box)
        if config.position_token == "random" and self.interactions:  # table 3
            box = torch.cat((box[:, :extra], self.random_box[: T_s2.shape[1]].expand_as(box_s2)), 1)
        Q_bal, box_bal = Q[:, extra:], box[:, extra:]
        symbols.update(Q_bal=Q_bal, box_bal=box_bal)

        # Eq. 5-7  T_g = N_mask(Q_bal) + N_box(Q_bal), and Eq. 8  T_bal = MHCA(T_i, T_g)
        T_bal = T_i
        if config.bato:
            guide = {"T_s1": (T_s1, box_s1), "T_s2": (T_s2, box_s2), "Q_bal": (Q_bal, box_bal)}[config.guidance]
            T_g, T_g_mask, T_g_box = self.guiding_tokens(*guide)
            symbols.update(T_g_mask=T_g_mask, T_g_box=T_g_box, T_g=T_g)
            value = T_g if config.guide_value == "T_g" else T_g_mask
            T_bal = self.bato(T_i, sine_of_grid(level_shapes, config.dim, T_i.device), T_g, value)
            if config.pixel_tokens == "T_bal":  # released code
                pixels = self.pixel_update(pixels + finest_level(T_bal, level_shapes, pixels)).relu()
        symbols.update(T_bal=T_bal)

        # Eq. 9  Q_ref = N_de(Q_bal, T_bal)
        refined = []
        for layer in self.decoder:
            reference = box.detach()
            Q = layer(Q, self.position(sine_of_box(reference, config.dim)), reference, T_bal, level_shapes, blocked)
            refined.append((Q, box))
            box = refine(self.det_head.delta(Q), reference)
        symbols.update(Q_ref=self.head_norm(Q[:, extra:]))

        # Eq. 10  {c, b} = N_det(Q_ref), and Eq. 11  m = N_seg(Q_ref, T_i, F_cnn), at every layer
        layers += [self.predict_refined(Q, box, pixels) for Q, box in refined]

        matching = [{name: x[:, extra:] for name, x in layer.items()} for layer in layers]
        noised = [{name: x[:, :extra] for name, x in layer.items()} for layer in layers if denoising is not None]
        outputs = {"layers": matching, "selection": selection, "interaction": interaction, "denoising": noised}
        symbols.update(c=matching[-1]["logits"], b=matching[-1]["boxes"], m=matching[-1]["masks"])
        return {**matching[-1], **outputs} | ({"trace": symbols} if trace is not False else {})

    def normalize(self, images):
        """RGB in 0..255 -> zero mean, unit deviation, padded with zeros at the right and bottom to a multiple of 32."""
        height, width = images.shape[-2:]
        return nnf.pad((images.float() - self.mean) / self.std, (0, -width % 32, 0, -height % 32))

    def candidates(self, T_i, level_shapes):
        """The tokens as they are scored and selected [B N C], and their anchors [B N 4] as logits."""
        anchors_logit, inside = token_anchors(level_shapes, T_i.device)
        return self.transform(T_i * inside[:, None]), anchors_logit.expand(T_i.shape[0], -1, -1)

    def with_denoising(self, denoising, T_s2, box_s2):
        """Queries, boxes and attention mask of the denoising queries (see losses.Denoising) and T_s2, in this order."""
        if denoising is None:
            return T_s2, box_s2, None
        used = denoising.labels >= 0  # a slot that an image with fewer objects leaves empty holds zeros
        content = self.label_embed(denoising.labels.clamp(min=0)) * used[..., None]
        Q, box = torch.cat((content, T_s2), 1), torch.cat((denoising.boxes_logit.sigmoid(), box_s2), 1)
        return Q, box, denoising.attention_mask(T_s2.shape[1])

    def guiding_tokens(self, Q_bal, box_bal):
        """Eq. 5-7.  T_g^mask = N_mask(Q_bal),  T_g^box = N_box(Q_bal),  T_g = T_g^mask + T_g^box: three of [B G C]."""
        if self.config.guiding_tokens:
            _, Q_bal, box_bal = select(self.det_head.scores(Q_bal), self.config.guiding_tokens, Q_bal, box_bal)
        if not self.config.gtg:
            return Q_bal, Q_bal, Q_bal
        if self.config.guide_networks == "own":
            T_g_mask, T_g_box = self.mask_net(Q_bal), self.box_net(Q_bal)
        else:  # released code
            T_g_mask = self.seg_head.mask_mlp(Q_bal)
            T_g_box = self.position(sine_of_box(box_bal.detach(), self.config.dim))
        return T_g_mask + T_g_box, T_g_mask, T_g_box

    def predict(self, x, boxes, pixels=None):
        """Eq. 10 and 11 for tokens [B Q C] with their boxes [B Q 4] as they are."""
        x = self.head_norm(x)
        masks = {} if pixels is None else {"masks": self.seg_head(x, pixels)}
        return {"logits": self.det_head.classes(x), "boxes": boxes, **masks}

    def predict_refined(self, Q, box, pixels):
        """Eq. 10 and 11 for a decoder layer's queries. released code: classes and masks see the norm twice."""
        Q = self.head_norm(Q)
        return self.predict(Q, refine(self.det_head.delta(Q), box), pixels)


def initialize(model):
    """Start values. released code, except that the class bias starts at the focal prior: one class in a hundred."""
    for part in (model.encoder.layers, model.residual, model.decoder, model.position, getattr(model, "bato", None)):
        for parameter in part.parameters() if part is not None else ():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("backbone"):
            start = nn.init.xavier_uniform_ if "projections" in name else nn.init.kaiming_uniform_
            start(module.weight, **({} if "projections" in name else {"a": 1}))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, DeformableAttention):
            heads, levels, points = module.split.values()
            angle = torch.arange(heads) * (2 * math.pi / heads)  # each head looks one way, point i at a distance of i
            direction = torch.stack((angle.cos(), angle.sin()), -1)
            direction = direction / direction.abs().amax(-1, keepdim=True)
            distance = torch.arange(1, points + 1)[None, None, :, None]
            with torch.no_grad():
                module.offsets.bias.copy_((direction[:, None, None] * distance).expand(-1, levels, -1, -1).flatten())
            nn.init.zeros_(module.offsets.weight)
            nn.init.zeros_(module.weights.weight)
            for linear in (module.weights, module.value, module.output):
                nn.init.zeros_(linear.bias)
        elif name.endswith("box_mlp"):
            nn.init.zeros_(module.layers[-1].weight)
            nn.init.zeros_(module.layers[-1].bias)
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
        padded = [4 * side for side in outputs["masks"].shape[-2:]]
        masks, qualities = [], []
        for mask in outputs["masks"][b, query].float().split(8):  # a few at a time: the output may be large
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


# ---- Weights ---------------------------------------------------------------------------------------------------------

# Names in the files of others -> names here, read top to bottom: every line that matches is applied.
RENAMES = [
    # ImageNet backbones: torchvision's names, detectron2's, Microsoft's
    (r"^(conv1|bn1)\.", r"backbone.stages.0.\1."),
    (r"^layer(\d)\.", r"backbone.stages.\1."),
    (r"^(stem|res\d|patch_embed|layers|norm\d)\.", r"backbone.\1."),
    (r"^features\.(\d)\.", lambda m: f"backbone.stages.{int(m[1]) // 2}.{m[1]}."),
    # detectron2's ResNet
    (r"^backbone\.stem\.conv1\.norm", "backbone.stages.0.bn1"),
    (r"^backbone\.stem", "backbone.stages.0"),
    (r"^backbone\.res(\d)", lambda m: f"backbone.stages.{int(m[1]) - 1}"),
    (r"^(backbone\..*)conv(\d)\.norm", r"\1bn\2"),
    (r"^(backbone\..*)shortcut\.norm", r"\1downsample.1"),
    (r"^(backbone\..*)shortcut", r"\1downsample.0"),
    # Microsoft's Swin
    (r"^backbone\.patch_embed\.proj", "backbone.stages.0.0.0"),
    (r"^backbone\.patch_embed\.norm", "backbone.stages.0.0.2"),
    (r"^backbone\.layers\.(\d)\.blocks", lambda m: f"backbone.stages.{m[1]}.{2 * int(m[1]) + 1}"),
    (r"^backbone\.layers\.(\d)\.downsample", lambda m: f"backbone.stages.{int(m[1]) + 1}.{2 * int(m[1]) + 2}"),
    (r"^(backbone\..*\.mlp)\.fc1", r"\1.0"),
    (r"^(backbone\..*\.mlp)\.fc2", r"\1.3"),
    (r"^backbone\.norm(\d)", r"backbone.norms.\1"),
    # The pixel decoder of MaskDINO and DI-MaskDINO: T_i, F_cnn and the pixel embedding
    (r"^sem_seg_head\.pixel_decoder\.input_proj", "encoder.projections"),
    (r"^sem_seg_head\.pixel_decoder\.transformer\.level_embed", "encoder.level_embed"),
    (r"^sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers", "encoder.layers"),
    (r"^(encoder\.layers\.\d)\.self_attn\.", r"\1.attention."),
    (r"^(encoder\.layers\.\d)\.norm1", r"\1.attention.norm"),
    (r"^(encoder\.layers\.\d)\.norm2", r"\1.ffn.norm"),
    (r"^sem_seg_head\.pixel_decoder\.adapter_1\.norm", "encoder.lateral.1"),
    (r"^sem_seg_head\.pixel_decoder\.adapter_1", "encoder.lateral.0"),
    (r"^sem_seg_head\.pixel_decoder\.layer_1\.norm", "seg_head.fuse.1"),
    (r"^sem_seg_head\.pixel_decoder\.layer_1", "seg_head.fuse.0"),
    (r"^sem_seg_head\.pixel_decoder\.mask_features", "seg_head.embed"),
    # Eq. 1
    (r"^sem_seg_head\.predictor\.enc_output\.", "transform.0."),
    (r"^sem_seg_head\.predictor\.enc_output_norm", "transform.1"),
    # Heads; the authors' files hold them under several names
    (r"^sem_seg_head\.predictor\.(oldm\.|decoder\.)?class_embed", "det_head.classifier"),
    (r"^sem_seg_head\.predictor\.(decoder\.)?mask_embed", "seg_head.mask_mlp"),
    (r"^sem_seg_head\.predictor\.(decoder\.)?_?bbox_embed(\.\d)?\.layers", "det_head.box_mlp.layers"),
    (r"^sem_seg_head\.predictor\.decoder[._]norm", "head_norm"),
    (r"^sem_seg_head\.predictor\.label_enc", "label_embed"),
    # Eq. 2
    (r"^sem_seg_head\.predictor\.(oldm\.|_?oldm_)bbox_embed(\.\d)?\.layers", "interactions.0.box_mlp.layers"),
    (r"^sem_seg_head\.predictor\.oldm[._]norm", "interactions.0.norm"),
    (r"^sem_seg_head\.predictor\.oldm\.ref_point_head", "interactions.0.position"),
    (r"^sem_seg_head\.predictor\.oldm\.layers", "interactions.0.layers"),
    (r"^(interactions\.0\.layers\.\d)\.self_attn", r"\1.attention.mha"),
    (r"^(interactions\.0\.layers\.\d)\.norm1", r"\1.attention.norm"),
    (r"^(interactions\.0\.layers\.\d)\.norm2", r"\1.ffn.norm"),
    # Eq. 4 is their decoder's first layer, Eq. 9 the others
    (r"^sem_seg_head\.predictor\.decoder\.ref_point_head", "position"),
    (r"^sem_seg_head\.predictor\.decoder\.layers\.0", "residual"),
    (r"^sem_seg_head\.predictor\.decoder\.layers\.(\d+)", lambda m: f"decoder.{int(m[1]) - 1}"),
    (r"^(residual|decoder\.\d)\.self_attn", r"\1.self_attention.mha"),
    (r"^(residual|decoder\.\d)\.norm2", r"\1.self_attention.norm"),
    (r"^(residual|decoder\.\d)\.cross_attn", r"\1.cross_attention"),
    (r"^(residual|decoder\.\d)\.norm1", r"\1.cross_attention.norm"),
    (r"^(residual|decoder\.\d)\.norm3", r"\1.ffn.norm"),
    # Eq. 8, and the refreshed pixel embedding
    (r"^sem_seg_head\.predictor\.(decoder\.)?query_guide_feature_update", "bato"),
    (r"^bato\.multihead_attn", "bato.attention.mha"),
    (r"^bato\.norm1", "bato.attention.norm"),
    (r"^bato\.norm2", "bato.ffn.norm"),
    (r"^sem_seg_head\.predictor\.decoder\.mask_output_conv\.norm", "pixel_update.1"),
    (r"^sem_seg_head\.predictor\.decoder\.mask_output_conv", "pixel_update.0"),
    # Inside layers
    (r"\.sampling_offsets", ".offsets"),
    (r"\.attention_weights", ".weights"),
    (r"\.value_proj", ".value"),
    (r"\.output_proj", ".output"),
    (r"^((encoder\.layers|interactions|residual|decoder|bato)\b.*?)\.?linear(\d)", r"\1.ffn.linear\3"),
]
# Tensors that have no part in this model: the ImageNet classifier, Swin's last norm, cached masks, a loss's constant.
UNUSED = r"^(fc|head|norm|stem\.fc|classifier)\.|\.attn_mask$|^criterion\.|\.num_batches_tracked$"


def read_checkpoint(path):
    """The content of a file of weights (.pt, .pth, .pkl), without running any code that it may hold.

    Raises ValueError for a file that is cut, foreign, or holds more than arrays and plain values.
    """
    try:
        if str(path).endswith(".pkl"):
            with open(path, "rb") as file:
                return ArrayUnpickler(file, encoding="latin1").load()
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the readers raise a dozen types on damaged input
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights (cut short, or not a file of tensors): {reason}") from error


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and built-in types, which is what detectron2's .pkl files hold, and nothing else."""

    def find_class(self, module, name):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 2's bytes travel
            return lambda text, encoding: text.encode("latin1")
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise ValueError(f"it asks for {module}.{name}, which is no array")


def config_of(checkpoint):
    """The Config of a checkpoint: saved with ours, recognised from the tensors of the authors' files."""
    if "config" in checkpoint:
        return Config(**checkpoint["config"])
    state, _ = translate(checkpoint)
    if "det_head.classifier.weight" not in state:
        raise ValueError("it holds no DI-MaskDINO or MaskDINO model; a backbone's weights go to --backbone-weights")
    preset, backbone = Config.released() if "bato.ffn.norm.weight" in state else Config.maskdino(), "resnet50"
    if "backbone.stages.0.0.0.weight" in state:  # Swin: by its width and the depth of its third stage
        width, depth = len(state["backbone.stages.0.0.0.weight"]), len({n.split(".")[4] for n in state if ".2.5." in n})
        backbone = next(name for name, (w, d, *_) in SWINS.items() if (w, d[2]) == (width, depth))
    return dataclasses.replace(
        preset,
        num_classes=len(state["det_head.classifier.bias"]),
        backbone=backbone,
        decoder_layers=2 + max(int(name.split(".")[1]) for name in state if name.startswith("decoder.")),
    )


def translate(checkpoint):
    """The tensors of a checkpoint under the names of this file, and whether they had others."""
    state = checkpoint.get("model", checkpoint)
    state = {name: torch.as_tensor(x) for name, x in state.items() if isinstance(x, Tensor | np.ndarray)}
    if "head_norm.weight" in state:
        return state, False
    translated = {}
    for original, tensor in state.items():
        name = original
        if re.search(UNUSED, name):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in translated and not torch.equal(translated[name], tensor):
            raise ValueError(f"{original} differs from another tensor of the file that stands for {name}")
        translated[name] = tensor
    return translated, True


def load_weights(model, source, partial=False):
    """Fill a model from a path or a dict of tensors (bare, or under "model"): our checkpoints, the authors' of
    DI-MaskDINO and MaskDINO, or an ImageNet backbone (ResNet: torchvision, detectron2; Swin: torchvision, Microsoft).

    Every tensor of the file and of the model (of its backbone, if the file is one) is accounted for, or ValueError
    lists the odd ones with both shapes and nothing is loaded. partial: keep what fits instead, for other classes or
    sizes. Returns the list of what did not fit. Pretrained batch norms are frozen, so load before making an optimizer.
    """
    state, foreign = translate(source if isinstance(source, Mapping) else read_checkpoint(source))
    own = model.state_dict()
    frozen = foreign or not any(name.endswith("num_batches_tracked") for name in state)
    if frozen:
        own = {name: x for name, x in own.items() if not name.endswith("num_batches_tracked")}
    if all(name.startswith("backbone.") for name in state):
        own = {name: x for name, x in own.items() if re.match(r"backbone\.(?!norms)", name)}
    for name, x in state.items() if foreign else ():
        if re.match(r"(residual|decoder\.\d)\.cross_attention\.(offsets|weights)", name) and name in own:
            state[name] = coarse_to_fine(x, model.config)
        if name.endswith("relative_position_index"):
            state[name] = x.flatten()
    odd = [
        f"{name}: {shape(state, name)} in the file, {shape(own, name)} in the model"
        for name in sorted(state.keys() | own.keys())
        if shape(state, name) != shape(own, name)
    ]
    if odd and not partial:
        listed = "\n  ".join(odd[:20]) + (f"\n  and {len(odd) - 20} more" if len(odd) > 20 else "")
        raise ValueError(f"these {len(odd)} tensors do not fit, and nothing was loaded:\n  {listed}")
    fitting = {name: x for name, x in state.items() if shape(own, name) == tuple(x.shape)}
    if not fitting:
        raise ValueError("no tensor of the file fits the model")
    model.load_state_dict(fitting, strict=False)
    if frozen:
        model.backbone.freeze_norm()
    return odd


def shape(state, name):
    return tuple(state[name].shape) if name in state else "missing"


def coarse_to_fine(x, config):
    """The authors' decoder counts levels from the coarsest: turn the levels of its sampling offsets or weights."""
    split = {"h": config.heads, "L": config.levels, "P": config.points}
    x = rearrange(x, "(h L P xy) ... -> h L P xy ...", **split, xy=len(x) // math.prod(split.values()))
    return rearrange(x.flip(1), "h L P xy ... -> (h L P xy) ...")


# ---- One image through a fresh model, equation by equation -----------------------------------------------------------

STEPS = {  # the symbol that each step makes last
    "T_i": "FTE        F_cnn, T_i: backbone, encoder",
    "T_s1": "Eq. 1      T_s1 = S(T_i, k1)",
    "T_s1_sa": "Eq. 2      T_s1^sa = MHSA(T_s1)",
    "T_s2": "Eq. 3      T_s2 = S(T_s1^sa, k2)",
    "Q_bal": "Eq. 4      Q_bal = MHCA(T_s2, T_i)",
    "T_g_mask": "Eq. 5      T_g^mask = N_mask(Q_bal)",
    "T_g_box": "Eq. 6      T_g^box = N_box(Q_bal)",
    "T_g": "Eq. 7      T_g = T_g^mask + T_g^box",
    "T_bal": "Eq. 8      T_bal = MHCA(T_i, T_g)",
    "Q_ref": "Eq. 9      Q_ref = N_de(Q_bal, T_bal)",
    "c": "Eq. 10     c = N_det(Q_ref)",
    "b": "Eq. 10     b = N_det(Q_ref)",
    "m": "Eq. 11     m = N_seg(Q_ref, T_i, F_cnn)",
}


class Stopwatch(dict):
    """A trace that notes when each symbol was there."""

    def __init__(self):
        super().__init__()
        self.times = {"start": time.perf_counter()}

    def update(self, symbols=(), **more):
        super().update(symbols, **more)
        self.times |= dict.fromkeys(dict(symbols, **more), time.perf_counter())


def main():
    """One image of 800x1216 through a fresh model: what each equation makes, its shape, its time."""
    model, image = DIMaskDINO(Config.paper()).eval(), torch.randint(0, 256, (1, 3, 800, 1216))
    with torch.inference_mode():
        model(image)  # the first run also sets up threads and memory
        symbols = Stopwatch()
        model(image, trace=symbols)
    print(f"DI-MaskDINO, {sum(p.numel() for p in model.parameters()):,} parameters, image {[*image.shape]}")
    previous = symbols.times["start"]
    for symbol, step in STEPS.items():
        elapsed, previous = symbols.times[symbol] - previous, symbols.times[symbol]
        took = f"{elapsed * 1000:8.1f} ms" if elapsed else f"{'..':>8}"  # made together with the one before
        print(f"{step:42}{symbol:9}{str([*symbols[symbol].shape]):22}{took}")
    tokens = [symbols[name].shape[1] for name in ("T_i", "T_s1", "T_s2")]
    print("tokens: " + " -> ".join(f"{n:,}" for n in tokens))


if __name__ == "__main__":
    main()
