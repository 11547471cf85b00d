"""Files of weights, ours and others': reading them safely, translating their names, filling a model.

load_model       a model that is ready for use, with what its checkpoint says of it
load_weights     fills a model that exists
load_backbone    fills its backbone alone
imagenet         torchvision's weights of a backbone
read_checkpoint  the content of a file, without running any code that it may hold
"""

import contextlib
import dataclasses
import os
import pickle
import re
from collections.abc import Mapping

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from datasets import Source
from dimaskdino import RESNETS, SWINS, Backbone, Config, DIMaskDINO

# Names in the files of others -> names here, read top to bottom: every line that matches is applied.
RENAMES = [
    # Backbones: in files of ImageNet's weights their names have no prefix
    (r"^(?=(conv1|bn1|layer\d|features|stem|res\d|patch_embed|layers|norm\d)\.)", "backbone."),
    # torchvision
    (r"^backbone\.(conv1|bn1)\.", r"backbone.stages.0.\1."),
    (r"^backbone\.layer(\d)\.", r"backbone.stages.\1."),
    (r"^backbone\.features\.(\d)\.", lambda m: f"backbone.stages.{int(m[1]) // 2}.{m[1]}."),
    # detectron2, whose convolutions hold their norm
    (r"^backbone\.stem", "backbone.stages.0"),
    (r"^backbone\.res(\d)", lambda m: f"backbone.stages.{int(m[1]) - 1}"),
    (r"conv(\d)\.norm", r"bn\1"),
    (r"\b(shortcut|adapter_1|layer_1|mask_output_conv)\.norm", r"\1.1"),
    (r"\b(shortcut|adapter_1|layer_1|mask_output_conv)\.(weight|bias)", r"\1.0.\2"),
    (r"shortcut", "downsample"),
    # Microsoft's Swin
    (r"^backbone\.patch_embed\.proj", "backbone.stages.0.0.0"),
    (r"^backbone\.patch_embed\.norm", "backbone.stages.0.0.2"),
    (r"^backbone\.layers\.(\d)\.blocks", lambda m: f"backbone.stages.{m[1]}.{2 * int(m[1]) + 1}"),
    (r"^backbone\.layers\.(\d)\.downsample", lambda m: f"backbone.stages.{int(m[1]) + 1}.{2 * int(m[1]) + 2}"),
    (r"\.mlp\.fc1", ".mlp.0"),
    (r"\.mlp\.fc2", ".mlp.3"),
    (r"^backbone\.norm(\d)", r"backbone.norms.\1"),
    # MaskDINO and DI-MaskDINO: T_i, F_cnn and the pixel embedding
    (r"^sem_seg_head\.(pixel_decoder|predictor)\.", "theirs."),
    (r"^theirs\.input_proj", "encoder.projections"),
    (r"^theirs\.transformer\.(encoder\.)?(layers|level_embed)", r"encoder.\2"),
    (r"^theirs\.adapter_1", "encoder.lateral"),
    (r"^theirs\.layer_1", "seg_head.fuse"),
    (r"^theirs\.mask_features", "seg_head.embed"),
    (r"^theirs\.decoder\.mask_output_conv", "seg_head.update"),
    # Eq. 1, and the heads, which the authors' files hold under several names
    (r"^theirs\.enc_output\.", "transform.0."),
    (r"^theirs\.enc_output_norm", "transform.1"),
    (r"^theirs\.(oldm\.|decoder\.)?class_embed", "det_head.classifier"),
    (r"^theirs\.(decoder\.)?mask_embed", "seg_head.mask_mlp"),
    (r"^theirs\.(decoder\.)?_?bbox_embed(\.\d)?\.layers", "det_head.box_mlp.layers"),
    (r"^theirs\.decoder[._]norm", "head_norm"),
    (r"^theirs\.label_enc", "label_embed"),
    # Eq. 2, Eq. 4 (the first layer of their decoder), Eq. 8 and Eq. 9
    (r"^theirs\._?oldm[._]", "interactions.0."),
    (r"^interactions\.0\.bbox_embed(\.\d)?\.layers", "interactions.0.box_mlp.layers"),
    (r"^theirs\.decoder\.layers\.0", "residual"),
    (r"^theirs\.decoder\.layers\.(\d+)", lambda m: f"decoder.{int(m[1]) - 1}"),
    (r"^theirs\.(decoder\.)?query_guide_feature_update", "bato"),
    (r"(^theirs\.decoder\.)?ref_point_head", "position"),
    # Inside layers
    (r"^(residual|decoder\.\d)\.cross_attn", r"\1.cross_attention"),
    (r"^(residual|decoder\.\d)\.norm1", r"\1.cross_attention.norm"),
    (r"^(residual|decoder\.\d)\.self_attn", r"\1.self_attention.mha"),
    (r"^(residual|decoder\.\d)\.norm2", r"\1.self_attention.norm"),
    (r"^(residual|decoder\.\d)\.norm3", r"\1.ffn.norm"),
    (r"^(encoder\.layers\.\d)\.self_attn", r"\1.attention"),
    (r"^(interactions\.0\.layers\.\d)\.self_attn", r"\1.attention.mha"),
    (r"^bato\.multihead_attn", "bato.attention.mha"),
    (r"^((encoder|interactions|bato)\b.*)\.norm1", r"\1.attention.norm"),
    (r"^((encoder|interactions|bato)\b.*)\.norm2", r"\1.ffn.norm"),
    (r"^((encoder|interactions|residual|decoder|bato)\b.*)\.linear(\d)", r"\1.ffn.linear\3"),
    (r"\.sampling_offsets", ".offsets"),
    (r"\.attention_weights", ".weights"),
    (r"\.(value|output)_proj", r".\1"),
]
COCO = {  # category_id -> name; ids that nothing has are called N/A there
    category_id: name
    for category_id, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if name[0] not in "_N"
}

# Keys under which files keep a state dict, and what wrappers of a model put before and between its names.
CONTAINERS = ("model", "state_dict", "model_state_dict")
WRAPPERS = r"(?<![^.])(module|model|_orig_mod)\."

# Tensors that have no part in this model: the ImageNet classifier, Swin's last norm, cached masks, a loss's constant.
UNUSED = r"^(fc|head|norm|stem\.fc|classifier)\.|\.attn_mask$|^criterion\.|\.num_batches_tracked$"


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """The dict in a file of weights (.pt, .pth, .pkl), without running any code that it may hold.

    Raises ValueError for a file that is cut, foreign, or holds more than arrays and plain values.
    """
    try:
        if str(path).endswith(".pkl"):
            with open(path, "rb") as file:
                content = ArrayUnpickler(file).load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, Mapping):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a checkpoint such as {path}/best.pt") from None
    except Exception as error:  # the readers raise a dozen types on damaged input
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(10)[8:] == b'{"':
                raise ValueError(f"{path} is in safetensors format: save its tensors with torch.save") from None
        reason = first_line(error)
        raise ValueError(f"{path} cannot be read as weights (cut short, or not a file of tensors): {reason}") from error


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and built-in types, which is what detectron2's .pkl files hold, and nothing else."""

    admitted = {
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy._core.multiarray._reconstruct": np._core.multiarray._reconstruct,
        "collections.OrderedDict": dict,
    }

    def find_class(self, module, name):
        asked = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # its older name
        if asked not in self.admitted:
            raise ValueError(f"it asks for {asked}, which is no array")
        return self.admitted[asked]


def state_dict_of(checkpoint):
    """The tensors of a checkpoint by name, without what DistributedDataParallel, torch.compile and others add."""
    for key in CONTAINERS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    tensors = {name: x for name, x in checkpoint.items() if isinstance(x, Tensor | np.ndarray)}
    return {re.sub(WRAPPERS, "", name): torch.as_tensor(x) for name, x in tensors.items()}


def translate(checkpoint):
    """The tensors of a checkpoint under the names of dimaskdino.py, and whether they had others."""
    state = state_dict_of(checkpoint)
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


def config_of(checkpoint):
    """The Config of a checkpoint: saved with it, or recognised from the names and shapes of its tensors."""
    if "config" in checkpoint:
        return Config(**checkpoint["config"])
    state, _ = translate(checkpoint)
    needed = {"det_head.classifier.weight", "head_norm.weight"}
    if not needed <= state.keys():
        found = f"no DI-MaskDINO or MaskDINO model ({names_of(state, needed)})"
        raise ValueError(f"it holds {found}; a backbone's weights go to --backbone-weights")
    backbone = backbone_of(state)
    preset = Config.released() if "seg_head.update.0.weight" in state else Config.paper()
    if backbone == "tiny":
        preset = Config.tiny()
    return dataclasses.replace(
        preset,
        num_classes=len(state["det_head.classifier.bias"]),
        backbone=backbone,
        dim=len(state["head_norm.weight"]),
        ffn=len(state["residual.ffn.linear1.bias"]),
        encoder_layers=count(state, "encoder.layers"),
        decoder_layers=1 + count(state, "decoder"),
        selection=preset.selection if count(state, "interactions") else preset.selection[-1:],
        bato="bato.ffn.norm.weight" in state,
    )


def backbone_of(state):
    """The backbone whose weights have the names and shapes of those in a state dict."""
    weights = {name: x.shape for name, x in state.items() if re.match(r"backbone\.stages.*\.weight$", name)}
    for name in (*RESNETS, *SWINS, "tiny"):
        with torch.device("meta"):
            stages = Backbone(name).stages.state_dict(prefix="backbone.stages.")
        if weights == {name: x.shape for name, x in stages.items() if name.endswith(".weight")}:
            return name
    raise ValueError(f"its backbone is none of {', '.join((*RESNETS, *SWINS, 'tiny'))}")


def count(state, prefix):
    """The number of modules `prefix`.0, `prefix`.1, ... in a state dict."""
    return len({name.removeprefix(prefix).split(".")[1] for name in state if name.startswith(f"{prefix}.")})


# ---- Filling a model -------------------------------------------------------------------------------------------------


def load_weights(model, source, partial=False):
    """Fill a model from a path or a dict of tensors (bare, or under "model"): our checkpoints, the authors' of
    DI-MaskDINO and MaskDINO, or an ImageNet backbone (ResNet: torchvision, detectron2; Swin: torchvision, Microsoft).

    Every tensor of the file and of the model (of its backbone, if the file is one) is accounted for, or ValueError
    lists the odd ones with both shapes and nothing is loaded. partial: keep what fits instead, for other classes or
    sizes. Returns the list of what did not fit. Pretrained batch norms are frozen, so load before making an optimizer.
    """
    state, foreign = tensors_of(source)
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
    fitting = {name: x for name, x in state.items() if shape(own, name) == shape(state, name)}
    if not fitting:
        raise ValueError(f"no tensor of the file fits the model: {names_of(state, own)}")
    odd = [
        f"{name}: {shape(state, name)} in the file, {shape(own, name)} in the model"
        for name in sorted((state.keys() | own.keys()) - fitting.keys())
    ]
    if odd and not partial:
        listed = "\n  ".join(odd[:20])
        raise ValueError(f"{len(odd)} tensors do not fit, and nothing was loaded:\n  {listed}")
    model.load_state_dict(fitting, strict=False)
    if frozen:
        model.backbone.freeze_norm()
    return odd


def load_backbone(model, source):
    """Fill a model's backbone alone, from a file of one or of a whole model, and freeze its batch norms, as those of
    ImageNet backbones are. Raises ValueError as load_weights does."""
    state, _ = tensors_of(source)
    backbone = {name: x for name, x in state.items() if re.match(r"backbone\.(?!norms)", name)}
    load_weights(model, backbone or state)


def tensors_of(source):
    """The tensors of a path or dict under the names of dimaskdino.py, and whether they had others."""
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    try:
        return translate(checkpoint)
    except ValueError as error:
        raise ValueError(f"{error}" if checkpoint is source else f"{source}: {error}") from None


def shape(state, name):
    return tuple(state[name].shape) if name in state else "missing"


def names_of(theirs, ours):
    """Two names of each side, by which one sees why nothing fits."""
    found = " and ".join(sorted(theirs)[:2]) or "no tensors"
    return f"the file has {found}, the model {' and '.join(sorted(ours)[:2])}"


def coarse_to_fine(x, config):
    """Turns the levels of sampling offsets or weights [h*L*P*xy ...]: the authors' decoder counts from the coarsest."""
    return x.unflatten(0, (config.heads, config.levels, -1)).flip(1).flatten(0, 2)


# ---- A model that is ready for use -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Trained:
    """A model with what its checkpoint says of it."""

    model: DIMaskDINO
    classes: list[str]  # names by label
    category_ids: list[int]  # ids by label
    test_size: tuple[int, int]  # shortest side of test images in px, and how far the longest may go
    source: Source | None  # the data it was trained on, if the file says so
    named: bool  # False: the file has no class names (the authors' files)


def load_model(path, device="cpu") -> Trained:
    """The model of a checkpoint, ours or the authors', in evaluation mode on a device ("cpu", "cuda", "cuda:1").

    Of 80 classes without names, COCO's are assumed; others are called "class 0" and so on. Raises FileNotFoundError,
    or ValueError where the file holds no such model or there is no such device.
    """
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"torch finds {torch.cuda.device_count() or 'no'} GPU here, not {device}: use the CPU")
    checkpoint = read_checkpoint(path)
    try:
        model = DIMaskDINO(config_of(checkpoint))
        load_weights(model, checkpoint)
        source = Source(**checkpoint["source"]) if "source" in checkpoint else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit: {error}") from None
    labels = range(model.config.num_classes)
    named = "classes" in checkpoint
    classes = checkpoint.get("classes", [f"class {label}" for label in labels])
    category_ids = checkpoint.get("category_ids", [*labels])
    if not named and len(labels) == len(COCO):
        classes = [*COCO.values()]
        category_ids = [*COCO]
        source = source or Source("coco")
    test_size = tuple(checkpoint.get("recipe", {}).get("test_size", (800, 1333)))
    return Trained(model.to(device).eval(), classes, category_ids, test_size, source, named)


def imagenet(backbone):
    """Torchvision's weights of a backbone trained on ImageNet-1k, downloaded on first use. Raises ValueError, with the
    way out, where they cannot be had."""
    if backbone == "swin_l":
        source = "swin_large_patch4_window12_384_22k.pth of https://github.com/microsoft/Swin-Transformer"
        raise ValueError(f"torchvision has no Swin-L: give {source} with --backbone-weights")
    url = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:
        message = f"{url} cannot be downloaded ({error}): give the file with --backbone-weights, or none to go without"
        raise ValueError(message) from None
    except Exception as error:  # the readers raise a dozen types on damaged files
        path = os.path.join(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        raise ValueError(f"{path} is damaged ({first_line(error)}): delete it, and it is downloaded again") from None
