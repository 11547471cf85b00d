"""The made-up numbers on which the authors' code was run: weights, images, and what stood for chance.

Every number follows from a name or a seed, so that no weights have to be kept. They come from NumPy's PCG64 in float64
and become float32 at the end; the order of the arithmetic matters to the last bit.
"""

import math
import re
import zlib

import numpy as np
import torch

from goldens import HERE


def generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


# ---- Weights ---------------------------------------------------------------------------------------------------------

# name: mean and deviation of the numbers of a vector. Few pixels of a mask are inside, few classes are likely.
VECTORS = [
    (r"sampling_offsets\.bias$", 0, 2.0),
    (r"class_embed\.bias$", -7.0, 1.0),
    (r"pixel_decoder\.mask_features\.bias$", 0.3, 0.1),
    (r"mask_embed\.layers\.2\.bias$", -0.05, 0.05),
    (r"", 0, 0.05),
]
# name: the factor of a matrix, whose numbers have a deviation of 1 over the root of its inputs. What is added to a
# token is small beside it, so that tokens stay distinct.
MATRICES = [
    (r"^backbone", math.sqrt(2)),
    (r"class_embed\.weight$", 3.0),
    (r"(out_proj|output_proj|linear2)\.weight$", 0.6),
    (r"sampling_offsets\.weight$", 0.5),
    (r"in_proj_weight$", 1.4),
    (r"mask_embed\.layers\.2\.weight$", 0.5),
    (r"bbox_embed(\.0)?\.layers\.2\.weight", 0.6),
    (r"(\.layers\.[01]|\.linear1)\.weight", math.sqrt(2)),
    (r"", 1.0),
]


def rule(rules, name):
    return next(values for pattern, *values in rules if re.search(pattern, name))


def numbers(name, shape, seed):
    """The tensor of a name, in float64."""
    draw = generator(zlib.crc32(name.encode()) ^ seed)
    if name == "criterion.empty_weight":
        return np.append(np.ones(shape[0] - 1), 0.1)
    if name.endswith("running_var"):
        return draw.uniform(0.5, 1.5, shape)
    normal = draw.standard_normal(shape)
    if name.endswith("running_mean"):
        return 0.1 * normal
    if name.endswith(("level_embed", "label_enc.weight")):
        return normal * (0.5 if name.endswith("level_embed") else 1)
    if len(shape) == 1 and name.endswith(".weight"):  # of a norm; a residual of the backbone adds half
        return (0.5 if re.search(r"^backbone.*\.conv3\.norm\.", name) else 1) * (1 + 0.1 * normal.clip(-3, 3))
    if len(shape) == 1:
        mean, deviation = rule(VECTORS, name)
        return mean + deviation * normal
    if "stem" not in name:  # each row sums to zero: inputs that have met a ReLU have a mean
        normal = normal - normal.mean(axis=tuple(range(1, normal.ndim)), keepdims=True)
    (gain,) = rule(MATRICES, name)
    return gain * (1 / math.sqrt(math.prod(shape[1:]))) * normal


def weights(model, seed):
    """The authors' state dict of a model, "dimaskdino_r50", "dimaskdino_swinl" or "maskdino3s_r50", for a seed."""
    tensors = {}
    for line in (HERE / f"{model}.txt").read_text().splitlines():
        name, what = line.split(maxsplit=1)
        if what.startswith("= "):  # the same tensor under another name
            tensors[name] = tensors[what[2:]]
            continue
        shape = tuple(map(int, what.split("x")))
        tensors[name] = torch.from_numpy(np.asarray(numbers(name, shape, seed), np.float32))
        if name.endswith("relative_position_bias_table"):
            tensors[name.replace("bias_table", "index")] = positions_in_window((math.isqrt(shape[0]) + 1) // 2)
    return tensors


def positions_in_window(side):
    """Swin's row in the table of position biases, for each two places of a window [side^2 side^2]."""
    y, x = torch.arange(side * side) // side, torch.arange(side * side) % side
    return (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1


# ---- Images ----------------------------------------------------------------------------------------------------------


def image(height, width, seed):
    """Gradients, seven ellipses, seven rectangles and a little noise: RGB, uint8 [3 H W]."""
    draw = generator(seed)
    y, x = np.mgrid[:height, :width].astype(float)
    channels = []
    for _ in range(3):
        across, along, phase = draw.uniform(0.5, 3), draw.uniform(0.5, 3), draw.uniform(0, 6.28)
        waves = 120 + 70 * np.sin(across * 3.14159 * y / height + along * 3.14159 * x / width + phase)
        channels.append(waves + draw.uniform(-40, 40) * (x / width) + draw.uniform(-40, 40) * (y / height))
    pixels = np.stack(channels)
    for i in range(14):
        cy, cx = draw.uniform(0, height), draw.uniform(0, width)
        half_y, half_x = draw.uniform(0.04, 0.25) * height, draw.uniform(0.04, 0.25) * width
        colour = draw.uniform(0, 255, 3)
        if i % 2:
            inside = (abs(y - cy) < half_y) & (abs(x - cx) < half_x)
        else:
            turn = draw.uniform(0, 3.14159)
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            inside = (u / half_x) ** 2 + (v / half_y) ** 2 < 1
        pixels[:, inside] = 0.25 * pixels[:, inside] + 0.75 * colour[:, None]
    return np.rint(pixels + 6 * draw.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8)


# ---- Chance ----------------------------------------------------------------------------------------------------------
# What stood for torch's functions of the same names: only how many numbers are asked for decides which.


def rand(*shape, device=None):
    n = math.prod(shape)
    return torch.from_numpy(generator(n).random(n).astype(np.float32).reshape(shape)).to(device or "cpu")


def rand_like(x):
    return rand(*x.shape, device=x.device)


def randint_like(x, low, high):
    return torch.from_numpy(generator(x.numel()).integers(low, high, x.numel())).reshape(x.shape).to(x.device)
