"""What weights.py promises: any file of weights that fits is read, safely, and what does not fit is named."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from small_models import SMALL, build, pictures
from weights import config_of, load_weights, read_checkpoint

# ---- Weights ---------------------------------------------------------------------------------------------------------


def test_weights_saved_and_loaded_give_the_same_model(tmp_path):
    a, b, images = build(seed=0), build(seed=1), pictures(1, 3, 64, 64)
    torch.save({"model": a.state_dict(), "config": dataclasses.asdict(a.config)}, tmp_path / "a.pt")
    assert config_of(read_checkpoint(tmp_path / "a.pt")) == a.config
    assert load_weights(b, tmp_path / "a.pt") == []
    assert torch.equal(a(images)["masks"], b(images)["masks"])


def test_a_file_that_does_not_fit_names_the_odd_tensors_with_both_shapes_and_changes_nothing():
    model, other = build(), build(num_classes=7)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"det_head.classifier.bias: \(7,\) in the file, \(5,\) in the model"):
        load_weights(model, other.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_partial_loading_keeps_what_fits_and_lists_the_rest():
    model, other = build(seed=0), build(seed=1, num_classes=7)
    left_out = load_weights(model, other.state_dict(), partial=True)
    names = {"det_head.classifier.weight", "det_head.classifier.bias", "label_embed.weight"}
    assert {line.split(":")[0] for line in left_out} == names
    assert torch.equal(model.head_norm.weight, other.head_norm.weight)


def detectron2_names(state):
    """torchvision's names of a ResNet -> detectron2's."""
    renamed = {}
    for name, x in state.items():
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for i in (1, 2, 3):
            name = name.replace(f"bn{i}", f"conv{i}.norm").replace(f"layer{i}.", f"res{i + 1}.")
        name = name.replace("layer4.", "res5.").replace("fc.", "stem.fc.")
        renamed[name if name.startswith(("res", "stem")) else f"stem.{name}"] = x
    return {name: x for name, x in renamed.items() if "num_batches_tracked" not in name}


def microsoft_names(state):
    """torchvision's names of a Swin Transformer -> Microsoft's."""
    renamed = {"layers.0.blocks.1.attn_mask": torch.zeros(3)}
    for name, x in state.items():
        if name.startswith("features"):
            _, n, rest = name.split(".", 2)
            if n == "0":
                name = "patch_embed." + rest.replace("0.", "proj.", 1).replace("2.", "norm.", 1)
            elif int(n) % 2:
                name = f"layers.{int(n) // 2}.blocks.{rest}".replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
            else:
                name = f"layers.{int(n) // 2 - 1}.downsample.{rest}"
        if name.endswith("relative_position_index"):
            x = x.view(49, 49)
        renamed[name] = x
    return renamed


@pytest.mark.parametrize(
    "backbone, naming",
    [("resnet18", dict), ("resnet18", detectron2_names), ("swin_t", dict), ("swin_t", microsoft_names)],
    ids=["torchvision resnet", "detectron2 resnet", "torchvision swin", "microsoft swin"],
)
@torch.no_grad()
def test_imagenet_backbones_load_under_every_common_naming(backbone, naming):
    torch.manual_seed(1)
    source, model = getattr(torchvision.models, backbone)(weights=None).eval(), build(backbone=backbone)
    assert load_weights(model, {"model": naming(source.state_dict())}) == []
    image = torch.rand(1, 3, 64, 64)
    if backbone == "resnet18":
        body = nn.Sequential(*list(source.children())[:-2])
        assert torch.equal(model.backbone(image)[-1], body(image))
    else:
        assert torch.equal(model.backbone.stages[3](model.backbone.stages[2](model.backbone.stages[1](
            model.backbone.stages[0](image)))), source.features(image))  # fmt: skip


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_file_that_carries_code_is_refused_and_nothing_of_it_runs(tmp_path, suffix):
    file, crater = tmp_path / f"weights{suffix}", tmp_path / "crater"
    content = {"model": {"head_norm.weight": torch.ones(2) if suffix == ".pth" else np.ones(2), "x": Bomb(crater)}}
    torch.save(content, file) if suffix == ".pth" else file.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="weights.* cannot be read as weights"):
        load_weights(build(), file)
    assert not crater.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_arrays_loads(tmp_path, protocol):
    source, model = torchvision.models.resnet18(weights=None), build(backbone="resnet18")
    arrays = {name: x.numpy() for name, x in detectron2_names(source.state_dict()).items()}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision"}, protocol))
    assert load_weights(model, tmp_path / "R-18.pkl") == []
    assert torch.equal(model.backbone.stages[0].conv1.weight, source.conv1.weight)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not a checkpoint"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(ValueError, match="broken.pth cannot be read as weights"):
        load_weights(build(), tmp_path / "broken.pth")


def test_a_checkpoint_made_before_settings_of_training_left_the_config_still_loads():
    config = dataclasses.asdict(SMALL) | {"detection_loss": 1.0, "denoising": 100, "mask_points": 12544}
    assert config_of({"config": config}) == SMALL


def test_a_field_of_a_checkpoints_config_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match="not know: colour"):
        config_of({"config": {**dataclasses.asdict(SMALL), "colour": "red"}})
