"""Backbones: torchvision's ResNet and Swin Transformer, and a tiny ResNet, as four features at strides 4 to 32."""

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

RESNETS = {"resnet18": (64, 128, 256, 512), "resnet50": (256, 512, 1024, 2048)}
SWINS = {  # embedding, depths, heads, window, stochastic depth
    "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 0.2),
    "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 0.3),
    "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 0.5),
    "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 0.3),
}


class Norm(nn.BatchNorm2d):
    """Batch norm. Once it is frozen, it is a multiplication and an addition, which need not keep their input."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_load_state_dict_post_hook(lambda norm, _: norm.freeze() if norm.frozen else None)

    @property
    def frozen(self):
        return self.num_batches_tracked is None

    def freeze(self):
        """It no longer counts its batches: in a checkpoint, a frozen norm is one without num_batches_tracked."""
        self.num_batches_tracked = None
        self.requires_grad_(False).eval()
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", (self.bias - self.running_mean * scale)[:, None, None], persistent=False)

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def forward(self, x):
        if not self.frozen:
            return super().forward(x)
        return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))


class Backbone(nn.Module):
    """Image [B 3 H W], normalised -> features at strides 4, 8, 16, 32, fine to coarse."""

    def __init__(self, name):
        super().__init__()
        if name in RESNETS:
            self.channels = RESNETS[name]
            net = getattr(torchvision.models, name)(weights=None, norm_layer=Norm)
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
            stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2, bias=False), Norm(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
            self.stages = nn.ModuleList([stem])
            for inputs, outputs, stride in zip((32, *self.channels), self.channels, (1, 2, 2, 2), strict=False):
                shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), Norm(outputs))
                self.stages.append(
                    BasicBlock(inputs, outputs, stride, None if stride == 1 else shortcut, norm_layer=Norm)
                )

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        if hasattr(self, "norms"):
            return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, features, strict=True)]
        return features[1:]  # without the stem

    def freeze_norm(self):
        """Pretrained batch statistics stay as they are (FrozenBatchNorm), because detection batches are small."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.freeze()
