"""DI-MaskDINO in one file, to be read beside the paper: start at DIMaskDINO.forward.

    Nan, Li, Xiang, Dai: DI-MaskDINO: A Joint Object Detection and Instance Segmentation Model, NeurIPS 2024

    section                                  equation   here
    3.2.1 Feature Tokens Extractor           T_i        Backbone, FeatureTokens
    3.2.2 De-Imbalance                       (1)        select, mask_to_box
                                             (2)        TokenInteraction
                                             (3)        select
                                             (4)        DecoderLayer  (DIMaskDINO.residual)
    3.2.3 Balance-Aware Tokens Optimization  (5)        DIMaskDINO.N_mask
                                             (6)        DIMaskDINO.N_box
                                             (7)        a sum in DIMaskDINO.forward
                                             (8)        AttentionLayer  (DIMaskDINO.bato)
    3.2.4 Transformer Decoder                (9)        DecoderLayer  (DIMaskDINO.decoder, run by N_de)
                                             (10)       DetectionHead  (DIMaskDINO.det_head)
                                             (11)       SegmentationHead  (DIMaskDINO.seg_head), mask_logits

Shapes: B images, L levels, N tokens, Q queries, C channels, K classes, G guiding tokens, h heads, P points, H W pixels,
l decoder layers, D denoising queries. Batch is first, but for l.
Tokens run from the finest level (1/8) to the coarsest (1/64), row by row within a level.
Boxes are (cx, cy, w, h) in [0, 1] of the network's input, that is of the image after padding to a multiple of 32. The
position token of T_x is box_x, always beside its token. There are no padding masks: padding is part of the image.
A tensor whose name ends in _logit is in logit space. Attention masks are True where attention is masked.
Where this code follows the authors' code against or beyond the paper's text, a comment says "released code".
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as nnf
import torchvision
from einops import rearrange
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import box_convert

from deform_attn_cuda import deform_attn

RESNETS = {"resnet18": (64, 128, 256, 512), "resnet50": (256, 512, 1024, 2048)}  # channels at strides 4 to 32
SWINS = {  # embedding, depths, heads, window, stochastic depth
    "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 0.2),
    "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 0.3),
    "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 0.5),
    "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 0.3),
}
CHOICES = {
    "backbone": (*RESNETS, *SWINS, "tiny"),
    "guidance": ("Q_bal", "T_s1", "T_s2"),
    "position_token": ("learned", "random"),
    "box_guide": ("query", "box"),
    "guide_value": ("T_g", "T_g_mask"),
    "pixel_tokens": ("T_i", "T_bal"),
}


@dataclass(frozen=True)
class Config:
    """The model's sizes, and every switch that the paper ablates. The defaults are the paper."""

    num_classes: int = 80
    backbone: str = "resnet50"
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
    box_guide: str = "query"  # Eq. 6: N_box is an MLP on Q_bal; "box": the position MLP of Q_bal's box
    guiding_tokens: int | None = None  # Eq. 7: how many, by class score; None: all
    guide_value: str = "T_g"  # Eq. 8: the value of the attention; "T_g_mask"
    pixel_tokens: str = "T_i"  # Eq. 11: "T_bal" refreshes the pixel embedding with the balance-aware tokens

    @classmethod
    def paper(cls):
        return cls()

    @classmethod
    def released(cls):
        """The model of the authors' code: with these four fields, their weights give their results."""
        return cls(box_guide="box", guiding_tokens=50, guide_value="T_g_mask", pixel_tokens="T_bal")

    @classmethod
    def maskdino(cls):
        """MaskDINO, the baseline: neither De-Imbalance nor Balance-Aware Tokens Optimization."""
        return cls(selection=(300,), bato=False, decoder_layers=9)

    @classmethod
    def tiny(cls):
        """All of DI-MaskDINO at 1.1 M parameters: learns the synthetic `shapes` on a CPU in minutes."""
        return cls(
            num_classes=8, backbone="tiny", dim=64, heads=4, ffn=128, encoder_layers=1, decoder_layers=3,
            selection=(60, 30),
        )  # fmt: skip

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("num_classes", "dim", "heads", "points", "ffn", "guiding_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is less than 1")
        if not self.selection or min(self.selection) < 1 or list(self.selection) != sorted(self.selection)[::-1]:
            raise ValueError(f"selection={self.selection} must be counts that do not grow, like (600, 300)")
        if self.dim % 4 or self.dim % self.heads or (self.dim > 64 and self.dim % 32):  # GroupNorm has 32 groups
            raise ValueError(f"dim={self.dim} must be a multiple of 4, above 64 of 32, and of heads={self.heads}")
        if self.levels < 3 or self.decoder_layers < 2:  # Eq. 4 is one, Eq. 9 at least another
            raise ValueError(f"levels={self.levels} or decoder_layers={self.decoder_layers} is less than 3 or 2")


# ---- Leaf blocks -----------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs, hidden, outputs, depth):
        super().__init__()
        sizes = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """x = norm(x + W2 relu(W1 x))"""

    def __init__(self, dim, hidden):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(x + self.linear2(self.linear1(x).relu_()))


class Attention(nn.Module):
    """x = norm(x + MHA(query, key, value)), multi-head attention by scaled_dot_product_attention."""

    def __init__(self, dim, heads):
        super().__init__()
        self.mha = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, query, key, value, attn_mask=None):
        return self.norm(x + self.mha(query, key, value, attn_mask=attn_mask, need_weights=False)[0])


class AttentionLayer(nn.Module):
    """Attention and a feed-forward network: a layer of Eq. 2, and Eq. 8."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.dim, config.heads)
        self.ffn = FeedForward(config.dim, config.ffn)

    def forward(self, x, query, key, value):
        return self.ffn(self.attention(x, query, key, value))


class DeformableAttention(nn.Module):
    """x = norm(x + D), where D is the deformable attention of the query x + position to a memory of L levels."""

    def __init__(self, config):
        super().__init__()
        self.split = {"h": config.heads, "L": config.levels, "P": config.points}
        samples = config.heads * config.levels * config.points
        self.offsets = nn.Linear(config.dim, samples * 2)
        self.weights = nn.Linear(config.dim, samples)
        self.value = nn.Linear(config.dim, config.dim)
        self.output = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x, position, reference, memory, level_shapes):
        """x, position [B Q C]; memory [B N C]; reference points: centres [Q 2], or boxes [B Q 4] (see `deform_attn`)"""
        query = x + position
        value = rearrange(self.value(memory), "B N (h c) -> B N h c", h=self.split["h"])
        offsets = rearrange(self.offsets(query), "B Q (h L P xy) -> B Q h L P xy", xy=2, **self.split)
        logits = rearrange(self.weights(query), "B Q (h L P) -> B Q h L P", **self.split)
        return self.norm(x + self.output(deform_attn(value, level_shapes, reference, offsets, logits)))

    def initialize(self):
        """Points each head in a direction of its own: point i lies i cells away, and all weights are equal."""
        heads, levels, points = self.split.values()
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = nnf.normalize(torch.stack((angle.cos(), angle.sin()), -1), torch.inf)
        distance = torch.arange(1, points + 1)[:, None]
        offsets = (direction[:, None, None] * distance).expand(-1, levels, -1, -1)  # [h L P 2]
        self.offsets.bias.data.copy_(offsets.flatten())
        for zero in (self.offsets.weight, *self.weights.parameters(), self.value.bias, self.output.bias):
            nn.init.zeros_(zero)


def sine(positions, channels):
    """Sine position embedding [... C] of positions [...] in 0..1: sines on even channels, cosines on odd ones."""
    wavelengths = 10000 ** (torch.arange(0, channels, 2, device=positions.device) / channels)
    angles = (positions * 2 * math.pi)[..., None] / wavelengths
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def sine_of_grid(level_shapes, dim, device):
    """Sine position embedding of every token [N C]: half of the channels for y, half for x, both counted from 1."""
    positions = []
    for height, width in level_shapes:
        y = sine(torch.arange(1, height + 1, device=device) / (height + 1e-6), dim // 2)  # [H C/2]
        x = sine(torch.arange(1, width + 1, device=device) / (width + 1e-6), dim // 2)  # [W C/2]
        grid = torch.cat((y[:, None].expand(-1, width, -1), x.expand(height, -1, -1)), -1)  # [H W C]
        positions.append(grid.flatten(0, 1))
    return torch.cat(positions)


def cell_centers(level_shapes, device):
    """The centres of all tokens' cells [N 2] as (x, y) in [0, 1]."""
    centers = []
    for height, width in level_shapes:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        centers.append(torch.cartesian_prod(y, x).flip(-1))
    return torch.cat(centers)


class BoxPosition(MLP):
    """Position embedding of boxes: [B Q 4] -> [B Q C]."""

    def __init__(self, dim):
        super().__init__(2 * dim, dim, dim, 2)

    def forward(self, box):
        cx, cy, w, h = box.float().unbind(-1)
        channels = self.layers[-1].out_features // 2  # of each of the four
        return super().forward(sine(torch.stack((cy, cx, w, h), -1), channels).flatten(-2))


class BoxMLP(MLP):
    """Predicts a box delta in logit space, zero at the start: [... C] -> [... 4]. float32: bfloat16 is too coarse."""

    def __init__(self, dim):
        super().__init__(dim, dim, 4, 3)
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def refine(delta, box):
    """Applies a predicted box delta in logit space [... 4] to a box [... 4]."""
    return (delta.float() + box.logit(1e-5)).sigmoid()


def normed_conv(inputs, outputs, kernel, stride=1, bias=False):
    """A convolution and its GroupNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.GroupNorm(min(32, outputs // 2), outputs))


# ---- Feature Tokens Extractor (3.2.1) --------------------------------------------------------------------------------


class Norm(nn.BatchNorm2d):
    """Batch norm. Once frozen (in a state dict: without num_batches_tracked), it is part of the convolution before it
    in inference, and in training a multiplication and an addition, whose gradient does not need the input."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_load_state_dict_post_hook(lambda norm, _: norm.freeze() if norm.frozen else None)

    @property
    def frozen(self):
        return self.num_batches_tracked is None

    @property
    def folded(self):
        return self.frozen and not torch.is_grad_enabled()

    def freeze(self):
        self.num_batches_tracked = None
        self.requires_grad_(False)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", (self.bias - self.running_mean * scale)[:, None, None], persistent=False)

    def convolve(self, conv, x):
        """The convolution before this norm, with the norm in it where it is folded."""
        if self.folded:
            return conv._conv_forward(x, conv.weight * self.scale[..., None], self.shift.flatten())
        return conv._conv_forward(x, conv.weight, conv.bias)

    def forward(self, x):
        if self.folded:
            return x
        if self.frozen:
            return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))
        return super().forward(x)


class Backbone(nn.Module):
    """torchvision's ResNet or Swin Transformer, or a tiny ResNet: image [B 3 H W], normalised -> features at strides 4,
    8, 16, 32, fine to coarse."""

    def __init__(self, name):
        super().__init__()
        if name in RESNETS:
            self.channels = RESNETS[name]
            net = getattr(torchvision.models, name)(weights=None, norm_layer=Norm)
            stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
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
            stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2, bias=False), Norm(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
            self.stages = nn.ModuleList([stem, BasicBlock(32, 32, norm_layer=Norm)])
            for inputs, outputs in pairwise(self.channels):
                shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), Norm(outputs))
                self.stages.append(BasicBlock(inputs, outputs, 2, shortcut, norm_layer=Norm))
        for module in self.modules():
            for conv, norm in pairwise(module.children()):
                if isinstance(norm, Norm):
                    conv.forward = partial(norm.convolve, conv)

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        if hasattr(self, "norms"):
            return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, features)]
        return features[1:]  # without the stem

    def freeze_norm(self):
        """Keeps pretrained batch statistics as they are (FrozenBatchNorm), because detection batches are small."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.freeze()


class EncoderLayer(nn.Module):
    """Deformable self-attention of the tokens x [B N C] around their cell centres, and a feed-forward network."""

    def __init__(self, config):
        super().__init__()
        self.attention = DeformableAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn)

    def forward(self, x, position, centers, level_shapes):
        return self.ffn(self.attention(x, position, centers, x, level_shapes))


class FeatureTokens(nn.Module):
    """Backbone features -> T_i, the initial feature tokens of all levels, and F_cnn, the feature at 1/4."""

    def __init__(self, config, channels):
        super().__init__()
        c4, *inputs = channels
        self.lateral = normed_conv(c4, config.dim, 1)
        self.projections = nn.ModuleList(normed_conv(c, config.dim, 1, bias=True) for c in inputs)
        for i in range(config.levels - 3):  # 1/64 from the backbone's 1/32, and coarser levels after it
            self.projections.append(normed_conv(config.dim if i else inputs[-1], config.dim, 3, stride=2, bias=True))
        self.level_embed = nn.Parameter(torch.randn(config.levels, config.dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, features):
        """features at 1/4 to 1/32 -> T_i [B N C], its position in the grid [N C], level_shapes [(H, W)], and
        F_cnn [B C H/4 W/4]"""
        F_cnn = self.lateral(features[0])
        maps = [project(x) for project, x in zip(self.projections[:3], features[1:])]
        x = features[-1]
        for project in self.projections[3:]:
            x = project(x)
            maps.append(x)
        level_shapes = [tuple(x.shape[-2:]) for x in maps]
        T_i = torch.cat([rearrange(x, "B C H W -> B (H W) C") for x in maps], 1)  # [B N C]
        grid = sine_of_grid(level_shapes, T_i.shape[-1], T_i.device)  # [N C]
        level = [embed.expand(height * width, -1) for embed, (height, width) in zip(self.level_embed, level_shapes)]
        position = grid + torch.cat(level)  # [N C]
        centers = cell_centers(level_shapes, T_i.device)  # [N 2]
        for layer in self.layers:
            T_i = layer(T_i, position, centers, level_shapes)
        return T_i, grid, level_shapes, F_cnn


# ---- De-Imbalance (3.2.2, Eq. 1-4) -----------------------------------------------------------------------------------


def select(scores, k, *tokens):
    """Eq. 1 and 3.  S(., k): in each image, the k tokens with the highest class score, best first.

    scores [B N]: best class logit of each token. Returns the k scores, their indices [B k], and those of each of
    `tokens` [B N ...] as [B k ...]. An image with fewer than k tokens keeps all.
    """
    N = scores.shape[1]
    k = k if k < N else N  # min() would make k a symbol in compiled and exported programs
    best, index = scores.topk(k)
    image = torch.arange(index.shape[0], device=index.device)[:, None]
    return best, index, *(x[image, index] for x in tokens)


def token_anchors(level_shapes, device):
    """Two-stage anchors [N 4] in logit space, boxes around the tokens' cells that the first predictions refine, and a
    mask [N] of the tokens that have one.

    released code: the size doubles from the coarsest level (0.05) to the finest. A token whose anchor leaves
    (0.01, 0.99), at the border of maps with sides of 50 cells or more, has none: its logits are infinite.
    """
    sizes = []
    for level, (height, width) in enumerate(level_shapes, 1):
        size = 0.05 * 2 ** (len(level_shapes) - level)
        sizes.append(torch.full((height * width, 2), size, device=device))
    anchors = torch.cat((cell_centers(level_shapes, device), torch.cat(sizes)), -1)
    inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1)
    return anchors.logit().masked_fill(~inside[:, None], math.inf), inside


def mask_to_box(mask_logits):
    """Boxes [B Q 4] around the positive pixels of mask logits [B Q H W].

    released code: from the first to the last pixel's index, so a box is one pixel short. An empty mask gives a
    degenerate box at (1, 1).
    """
    inside = mask_logits > 0
    height, width = inside.shape[-2:]
    columns = inside.any(-2)
    rows = inside.any(-1)
    x0 = columns.byte().argmax(-1)
    y0 = rows.byte().argmax(-1)
    x1 = width - 1 - columns.flip(-1).byte().argmax(-1)
    y1 = height - 1 - rows.flip(-1).byte().argmax(-1)
    box = box_convert(torch.stack((x0 / width, y0 / height, x1 / width, y1 / height), -1), "xyxy", "cxcywh")
    empty = (torch.arange(4, device=box.device) < 2).float()  # (1, 1, 0, 0), made on the device
    return torch.where(columns.any(-1)[..., None], box, empty).clamp(1e-5, 1 - 1e-5)


class TokenInteraction(nn.Module):
    """Eq. 2.  T_s1^sa = MHSA(T_s1): the selected tokens of an object tell each other where and what it is.

    released code: every layer has a feed-forward network, refines the boxes, and makes auxiliary predictions of classes
    and boxes for the loss; the auxiliary boxes apply the box MLP once more to boxes that it has already refined.
    """

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(AttentionLayer(config) for _ in range(config.interaction_layers))
        self.position = BoxPosition(config.dim)
        self.box_mlp = BoxMLP(config.dim)  # shared by the layers
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, T_s1, box_s1):
        """[B k C], [B k 4] -> T_s1_sa, box_s1_sa, and every layer's auxiliary (normed token, box)"""
        T_s1_sa = T_s1
        box_s1_sa = box_s1
        auxiliary = []
        for layer in self.layers:
            box = box_s1_sa.detach()  # released code: a layer is not trained through the box that it starts from
            placed = T_s1_sa + self.position(box)
            T_s1_sa = layer(T_s1_sa, placed, placed, T_s1_sa)
            box_s1_sa = refine(self.box_mlp(T_s1_sa), box)
            normed = self.norm(T_s1_sa)
            auxiliary.append((normed, refine(self.box_mlp(normed), box_s1_sa)))
        return T_s1_sa, box_s1_sa, auxiliary


class DecoderLayer(nn.Module):
    """A layer of Eq. 9, and Eq. 4 (released code): self-attention, deformable cross-attention at boxes, FFN."""

    def __init__(self, config):
        super().__init__()
        self.self_attention = Attention(config.dim, config.heads)
        self.cross_attention = DeformableAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn)

    def forward(self, Q, position, box, memory, level_shapes, attn_mask=None):
        """Q, position [B Q C], box [B Q 4], memory [B N C], attn_mask [Q Q], True = masked -> [B Q C]"""
        placed = Q + position
        Q = self.self_attention(Q, placed, placed, Q, attn_mask)
        return self.ffn(self.cross_attention(Q, position, box, memory, level_shapes))


# ---- Heads (3.2.4, Eq. 10-11) ----------------------------------------------------------------------------------------


class DetectionHead(nn.Module):
    """Eq. 10.  {c, b} = N_det(Q_ref), in float32 even under autocast, as bfloat16 is too coarse to rank scores."""

    def __init__(self, config):
        super().__init__()
        self.classifier = nn.Linear(config.dim, config.num_classes)
        self.box_mlp = BoxMLP(config.dim)  # shared by the decoder's layers

    def forward(self, normed, Q_ref, box):
        """normed: Q_ref normed once more [... Q C]; box to be refined [... Q 4] -> class logits c [... Q K],
        boxes b [... Q 4]"""
        return self.classes(normed), refine(self.box_mlp(Q_ref), box)

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
        refreshed = config.bato and config.pixel_tokens == "T_bal"
        self.update = normed_conv(config.dim, config.dim, 3) if refreshed else None

    def pixel_embedding(self, T_i, level_shapes, F_cnn):
        """T_i [B N C], F_cnn [B C H/4 W/4] -> [B C H/4 W/4]"""
        return self.embed(self.fuse(F_cnn + finest_level(T_i, level_shapes, F_cnn)).relu())

    def refreshed(self, pixels, T_bal, level_shapes):
        """The pixel embedding [B C H/4 W/4] for layers after Eq. 4: unchanged. released code: refreshed with T_bal."""
        if self.update is None:
            return pixels
        return self.update(pixels + finest_level(T_bal, level_shapes, pixels)).relu().to(pixels.dtype)


def finest_level(tokens, level_shapes, like):
    """The tokens at 1/8 as a map, resized to the size of another: [B N C] -> [B C H/4 W/4]"""
    height, width = level_shapes[0]
    x = rearrange(tokens[:, : height * width], "B (H W) C -> B C H W", H=height)
    return nnf.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def mask_logits(prediction, image=slice(None), queries=slice(None)):
    """The product of Eq. 11: [B Q H/4 W/4], or [n H/4 W/4] for some queries of one image. Large, so it is made only
    where it is read: a prediction keeps its factors mask_embedding [B Q C] and pixels [B C H/4 W/4]."""
    embedding = prediction["mask_embedding"][image][..., queries, :]
    return torch.einsum("...qc,...chw->...qhw", embedding, prediction["pixels"][image])


def part(prediction, first, last):
    """The prediction of the queries from first up to last (a slice object would make D a constant of the graph)."""
    return {name: x if name == "pixels" else x[:, first:last] for name, x in prediction.items()}


# ---- The model (3.2) -------------------------------------------------------------------------------------------------


class DIMaskDINO(nn.Module):
    """Joint object detection and instance segmentation.

    images: RGB in 0..255, uint8 or float, [B 3 H W], any H and W.
    denoising: the denoising queries of losses.denoising_queries, in training.
    trace: True to get every symbol of the paper by its name.

    A prediction is a dict of logits [B Q K], boxes [B Q 4] and, where there are masks, their factors mask_embedding
    [B Q C] and pixels [B C H/4 W/4], where H W are those of the padded image; `mask_logits` multiplies them. Returns
    the last decoder layer's prediction, and beside it
        layers: predictions at every stage, the initial one (of T_s2) first, the last layer's last;
        selection: the auxiliary prediction of the k1 tokens of the first selection;
        interaction: the auxiliary predictions of each token interaction layer, without masks;
        denoising: those of the denoising queries, layer by layer, or an empty list;
        trace: if asked for, what this model has of T_i, T_s1, T_s1_sa, T_s2, Q_bal, T_g_mask, T_g_box, T_g, T_bal,
            Q_ref, F_cnn, their box_*, c, b, m, the selections' index_1, index_2 (indices into T_i), scores_1, scores_2.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim = config.dim
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375])[:, None, None], persistent=False)
        self.backbone = Backbone(config.backbone)
        self.encoder = FeatureTokens(config, self.backbone.channels)
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.interactions = nn.ModuleList(TokenInteraction(config) for _ in config.selection[1:])
        self.residual = DecoderLayer(config)
        of_query = config.bato and config.gtg and config.box_guide == "query"
        self.box_guide = MLP(dim, dim, dim, 3) if of_query else None
        self.bato = AttentionLayer(config) if config.bato else None
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers - 1))
        self.position = BoxPosition(dim)
        self.head_norm = nn.LayerNorm(dim)
        self.det_head = DetectionHead(config)
        self.seg_head = SegmentationHead(config)
        self.label_embed = nn.Embedding(config.num_classes, dim)
        random_box = torch.rand(config.selection[-1], 4) if config.position_token == "random" else None  # table 3
        self.register_buffer("random_box", random_box)
        initialize(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=torch.channels_last))

    def forward(self, images, denoising=None, trace=False):
        config = self.config

        # Feature Tokens Extractor
        T_i, grid, level_shapes, F_cnn = self.encoder(self.backbone(self.normalize(images)))  # [B N C], [B C H/4 W/4]
        pixels = self.seg_head.pixel_embedding(T_i, level_shapes, F_cnn)  # [B C H/4 W/4], what Eq. 11 reads of both

        # Eq. 1  T_s1 = S(T_i, k1); released code: of a transform of T_i, and what follows does not train T_s1
        anchors_logit, inside = token_anchors(level_shapes, T_i.device)  # [N 4], [N]
        tokens = self.transform(T_i * inside[:, None])
        scores_1, index_1, T_s1 = select(self.det_head.scores(tokens), config.selection[0], tokens)  # T_s1 [B k1 C]
        selection = self.predict(T_s1, (self.det_head.box_mlp(T_s1) + anchors_logit[index_1]).sigmoid(), pixels)
        T_s1 = T_s1.detach()
        with torch.no_grad():  # released code: the boxes around its masks
            box_s1 = mask_to_box(mask_logits(selection))  # [B k1 4]

        T_s1_sa = box_s1_sa = None
        T_s2 = T_s1  # with a single selection
        box_s2 = box_s1
        scores_2 = scores_1
        index_2 = index_1
        interaction = []
        for interact, k2 in zip(self.interactions, config.selection[1:]):  # once; twice for a triple selection
            # Eq. 2  T_s1^sa = MHSA(T_s1)
            T_s1_sa, box_s1_sa, auxiliary = interact(T_s2, box_s2)  # [B k1 C]
            interaction += [self.predict(tokens, boxes) for tokens, boxes in auxiliary]
            # Eq. 3  T_s2 = S(T_s1^sa, k2); released code: scores are of normed tokens, and Eq. 4's losses train box_s2
            scores = self.det_head.scores(interact.norm(T_s1_sa))
            scores_2, _, T_s2, box_s2, index_2 = select(scores, k2, T_s1_sa, box_s1_sa, index_2)  # T_s2 [B k2 C]
        if self.random_box is not None and not self.interactions:  # table 3
            box_s2 = self.random_box[: box_s2.shape[1]].expand_as(box_s2)

        # Eq. 4  Q_bal = MHCA(T_s2, T_i); in training, D denoising queries go along in front, from here to the heads
        Q_0, box_0, attn_mask, D = self.with_denoising(denoising, T_s2, box_s2)
        Q_1, box_1 = self.decode(self.residual, Q_0, box_0, T_i, level_shapes, attn_mask)
        if self.random_box is not None and self.interactions:
            box_1 = torch.cat((box_1[:, :D], self.random_box[: box_s2.shape[1]].expand_as(box_s2)), 1)
        Q_bal = Q_1[:, D:]  # [B k2 C]
        box_bal = box_1[:, D:]  # [B k2 4]

        T_g_mask = T_g_box = T_g = None
        T_bal = T_i  # table 4, without BATO
        if config.bato:
            guides = {"Q_bal": (Q_bal, box_bal), "T_s1": (T_s1, box_s1), "T_s2": (T_s2, box_s2)}
            guide, box_guide = guides[config.guidance]  # table 5
            if config.guiding_tokens:  # released code: the 50 best
                scores = self.det_head.scores(guide)
                *_, guide, box_guide = select(scores, config.guiding_tokens, guide, box_guide)
            # Eq. 5  T_g^mask = N_mask(Q_bal)
            T_g_mask = self.N_mask(guide)  # [B G C]
            # Eq. 6  T_g^box = N_box(Q_bal)
            T_g_box = self.N_box(guide, box_guide)  # [B G C]
            # Eq. 7  T_g = T_g^mask + T_g^box
            T_g = T_g_mask + T_g_box  # [B G C]
            # Eq. 8  T_bal = MHCA(T_i, T_g); released code: the values are T_g^mask
            T_bal = self.bato(T_i, T_i + grid, T_g, T_g if config.guide_value == "T_g" else T_g_mask)  # [B N C]

        # Eq. 9  Q_ref = N_de(Q_bal, T_bal), after each of the layers l, of which Eq. 4 is the first
        Q_ref, box_ref = self.N_de(Q_1, box_0, box_1, T_bal, level_shapes, attn_mask)  # [l B D+k2 C], [l B D+k2 4]
        normed = self.head_norm(Q_ref)  # released code: normed again, for classes and masks, after N_de has normed it
        # Eq. 10  {c, b} = N_det(Q_ref)
        c, b = self.det_head(normed, Q_ref, box_ref)  # [l B D+k2 K], [l B D+k2 4]
        # Eq. 11  m = N_seg(Q_ref, T_i, F_cnn): the product of m_q and pixels, left to mask_logits
        m_q = self.seg_head.mask_mlp(normed)  # [l B D+k2 C]
        refreshed = self.seg_head.refreshed(pixels, T_bal, level_shapes)  # released code: after Eq. 8

        predictions = [self.predict(Q_0, box_0, pixels)]  # layer 0 is the initial prediction, of T_s2
        for layer, (logits, boxes, embedding) in enumerate(zip(c, b, m_q)):
            of_layer = refreshed if layer else pixels
            predictions.append({"logits": logits, "boxes": boxes, "mask_embedding": embedding, "pixels": of_layer})
        layers = [part(prediction, D, None) for prediction in predictions]
        outputs = {**layers[-1], "layers": layers, "selection": selection, "interaction": interaction, "denoising": []}
        if denoising is not None:
            outputs["denoising"] = [part(prediction, 0, D) for prediction in predictions]
        if trace:
            symbols = {
                "F_cnn": F_cnn, "T_i": T_i, "T_s1": T_s1, "box_s1": box_s1, "scores_1": scores_1, "index_1": index_1,
                "T_s1_sa": T_s1_sa, "box_s1_sa": box_s1_sa, "T_s2": T_s2, "box_s2": box_s2, "scores_2": scores_2,
                "index_2": index_2, "Q_bal": Q_bal, "box_bal": box_bal, "T_g_mask": T_g_mask, "T_g_box": T_g_box,
                "T_g": T_g, "T_bal": T_bal, "Q_ref": Q_ref[-1][:, D:], "c": outputs["logits"], "b": outputs["boxes"],
                "m": mask_logits(outputs),
            }  # fmt: skip
            outputs["trace"] = {name: x for name, x in symbols.items() if x is not None}
        return outputs

    def normalize(self, images):
        """Normalises RGB in 0..255 with ImageNet's mean and deviation; pads right and bottom to a multiple of 32."""
        height, width = images.shape[-2:]
        images = images.float().contiguous(memory_format=torch.channels_last)
        return nnf.pad((images - self.mean) / self.std, (0, -width % 32, 0, -height % 32))

    def with_denoising(self, denoising, T_s2, box_s2):
        """Puts D denoising queries (see losses.Denoising) in front of T_s2: queries, boxes, attention mask, D."""
        if denoising is None:
            return T_s2, box_s2, None, 0
        used = denoising.labels >= 0  # the empty slots of an image with fewer objects hold zeros
        content = self.label_embed(denoising.labels.clamp(min=0)) * used[..., None]
        Q = torch.cat((content, T_s2), 1)
        box = torch.cat((denoising.boxes_logit.sigmoid(), box_s2), 1)
        return Q, box, denoising.attention_mask(T_s2.shape[1]), content.shape[1]

    def decode(self, layer, Q, box, memory, level_shapes, attn_mask):
        """Runs a decoder layer: queries [B Q C] and boxes [B Q 4] -> both refined"""
        Q = layer(Q, self.position(box), box, memory, level_shapes, attn_mask)
        return Q, refine(self.det_head.box_mlp(Q), box)

    def N_mask(self, Q_bal):
        """Eq. 5.  T_g^mask = N_mask(Q_bal): what the mask of each query's object looks like, [B G C] -> [B G C].

        released code: N_mask is the mask head's MLP, as the paper leaves open. Table 6, without guiding tokens: Q_bal.
        """
        return self.seg_head.mask_mlp(Q_bal) if self.config.gtg else Q_bal

    def N_box(self, Q_bal, box_bal):
        """Eq. 6.  T_g^box = N_box(Q_bal): where each query's object is, by a three-layer MLP, [B G C] -> [B G C].

        released code, box_guide="box": the position embedding of box_bal [B G 4], which does not train the boxes.
        """
        if not self.config.gtg:
            return torch.zeros_like(Q_bal)  # table 6
        return self.box_guide(Q_bal) if self.box_guide else self.position(box_bal.detach())

    def N_de(self, Q_1, box_0, box_1, T_bal, level_shapes, attn_mask):
        """Eq. 9.  Q_ref = N_de(Q_bal, T_bal): the normed queries [l B Q C] after each layer (Eq. 4 is the first),
        and the boxes [l B Q 4] that each layer's prediction refines.

        Q_1: queries after Eq. 4; box_0, box_1: boxes before and after it. released code: the box that a layer starts
        from is detached for the layer, but not for its prediction (look forward twice).
        """
        queries = [Q_1]
        boxes = [box_0]
        Q = Q_1
        box = box_1
        for layer in self.decoder:
            boxes.append(box)
            Q, box = self.decode(layer, Q, box.detach(), T_bal, level_shapes, attn_mask)
            queries.append(Q)
        return self.head_norm(torch.stack(queries)), torch.stack(boxes)

    def predict(self, tokens, boxes, pixels=None):
        """The heads' auxiliary prediction for tokens [B Q C] whose boxes [B Q 4] stay as they are."""
        normed = self.head_norm(tokens)
        prediction = {"logits": self.det_head.classes(normed), "boxes": boxes}
        if pixels is not None:
            prediction["mask_embedding"] = self.seg_head.mask_mlp(normed)
            prediction["pixels"] = pixels
        return prediction


def initialize(model):
    """Initialises the weights. released code, but for the class bias, which is the focal prior (0.01), and for the
    layers of Eq. 2, which are independent of one another."""
    for module in (model.encoder.layers, model.residual, model.decoder, model.position, model.bato):
        for parameter in module.parameters() if module else ():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("backbone"):
            if "projections" in name:
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, DeformableAttention):
            module.initialize()
    nn.init.constant_(model.det_head.classifier.bias, -math.log(99))


# ---- From predictions to objects -------------------------------------------------------------------------------------


@torch.no_grad()
def postprocess(outputs, image_sizes, output_sizes, top=100):
    """The best objects of every image.

    outputs: a prediction of the model (see DIMaskDINO).
    image_sizes, output_sizes: (height, width) of each image as given to the model, and of the masks to be made.
    Returns for each image a dict, best score first, of scores [n], labels [n], boxes [n 4] (x0, y0, x1, y1 in output
    pixels, not clipped), masks [n H W] (bool), n = min(top, Q K). A score is that of the class times the mean of the
    mask's probabilities inside the mask. The same query may appear under several classes.
    """
    results = []
    for b, (image_size, output_size) in enumerate(zip(image_sizes, output_sizes, strict=True)):
        scores, labels, queries = top_predictions(outputs, b, top)
        boxes = full_size_boxes(outputs, b, queries, image_size, output_size)
        masks, quality = full_size_masks(mask_logits(outputs, b, queries), image_size, output_size)
        scores, order = (scores * quality).sort(descending=True)
        results.append({"scores": scores, "labels": labels[order], "boxes": boxes[order], "masks": masks[order]})
    return results


def top_predictions(outputs, b, top=100):
    """The best pairs of query and class of image b: class scores [n], labels [n], queries [n], best score first."""
    class_scores = outputs["logits"][b].float().sigmoid()  # [Q K]
    scores, flat = class_scores.flatten().topk(min(top, class_scores.numel()))
    return scores, flat % class_scores.shape[1], flat // class_scores.shape[1]


def full_size_boxes(outputs, b, queries, image_size, output_size):
    """The boxes [n 4] of some queries of image b as (x0, y0, x1, y1) in pixels of the output, not clipped."""
    padded_height, padded_width = (4 * side for side in outputs["pixels"].shape[-2:])
    scale_x = padded_width * output_size[1] / image_size[1]
    scale_y = padded_height * output_size[0] / image_size[0]
    boxes = box_convert(outputs["boxes"][b, queries].float(), "cxcywh", "xyxy")
    return boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])


def full_size_masks(logits, image_size, output_size):
    """Mask logits [n H/4 W/4] of the padded image -> masks [n H W] (bool) of the output, and their quality [n], the
    mean probability inside the mask."""
    height, width = image_size
    padded = [4 * side for side in logits.shape[-2:]]
    masks = []
    qualities = []
    for few in logits.float().split(8):  # bounds the memory
        few = nnf.interpolate(few[None], padded, mode="bilinear", align_corners=False)[..., :height, :width]
        few = nnf.interpolate(few, tuple(output_size), mode="bilinear", align_corners=False)[0]
        inside = few > 0
        masks.append(inside)
        qualities.append((few.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6))
    return torch.cat(masks), torch.cat(qualities)


def main():
    """Takes an image of 800x1216 through a fresh model and prints the shape of what each equation makes."""
    model = DIMaskDINO(Config.paper()).eval()
    image = torch.randint(0, 256, (1, 3, 800, 1216))
    with torch.inference_mode():
        trace = model(image, trace=True)["trace"]
    print(f"DI-MaskDINO, {sum(p.numel() for p in model.parameters()):,} parameters, image {[*image.shape]}")
    made = ("T_i", "T_s1", "T_s1_sa", "T_s2", "Q_bal", "T_g_mask", "T_g_box", "T_g", "T_bal", "Q_ref", "b", "m")
    for equation, symbol in enumerate(made):  # T_i comes before Eq. 1
        print(f"{f'Eq. {equation}' if equation else 'FTE':8}{symbol:10}{[*trace[symbol].shape]}")


if __name__ == "__main__":
    main()
