"""What util/weights.py promises: any file of weights that fits is read, safely, and what does not fit is named."""

import dataclasses
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from datasets import Source
from dimaskdino import SWINS, Backbone, Config, DIMaskDINO, mask_logits
from goldens import HERE
from small_models import SMALL, build, pictures
from util.weights import (
    Trained,
    config_of,
    imagenet,
    load_model,
    load_weights,
    read_checkpoint,
    translate,
)

# ---- Weights ---------------------------------------------------------------------------------------------------------


def test_weights_saved_and_loaded_give_the_same_model(tmp_path):
    a, b, images = build(seed=0), build(seed=1), pictures(1, 3, 64, 64)
    torch.save({"model": a.state_dict(), "config": dataclasses.asdict(a.config)}, tmp_path / "a.pt")
    assert config_of(read_checkpoint(tmp_path / "a.pt")) == a.config
    assert load_weights(b, tmp_path / "a.pt") == []
    assert torch.equal(mask_logits(a(images)), mask_logits(b(images)))


def test_what_does_not_fit_is_named_with_both_shapes_and_not_loaded():
    model, other = build(), build(seed=1, num_classes=7).state_dict()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(model, other | {f"other.{i}": torch.zeros(3) for i in range(30)})
    first, bias, *_, last = str(error.value).splitlines()
    assert first == "33 tensors do not fit, and nothing was loaded:"
    assert bias == "  det_head.classifier.bias: (7,) in the file, (5,) in the model"
    assert last == "  other.23: (3,) in the file, missing in the model"  # the twentieth
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_partial_loading_keeps_what_fits_and_lists_the_rest():
    model, other = build(seed=0), build(seed=1, num_classes=7)
    left_out = load_weights(model, other.state_dict(), partial=True)
    names = {"det_head.classifier.weight", "det_head.classifier.bias", "label_embed.weight"}
    assert {line.split(":")[0] for line in left_out} == names
    assert torch.equal(model.head_norm.weight, other.head_norm.weight)


@pytest.mark.parametrize("backbone", ["resnet18", "swin_t"])
def test_backbones_of_torchvision_load_and_give_its_features(backbone, monkeypatch):
    torch.manual_seed(1)
    image = torch.rand(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    if backbone == "resnet18":
        source = torchvision.models.resnet18(weights=None).eval().to(memory_format=torch.channels_last)
        expected = nn.Sequential(*list(source.children())[:-2])(image)
    else:  # a narrow one with as many stages
        monkeypatch.setitem(SWINS, "swin_t", (24, (1, 1, 2, 1), (1, 2, 4, 8), 7, 0.0))
        source = torchvision.models.SwinTransformer([4, 4], 24, [1, 1, 2, 1], [1, 2, 4, 8], [7, 7]).eval()
        source = source.to(memory_format=torch.channels_last)
        expected = source.features(image)
    model = build(backbone=backbone)
    assert load_weights(model, {"model": source.state_dict()}) == []
    assert torch.equal(nn.Sequential(*model.backbone.stages)(image), expected)


@pytest.mark.parametrize(
    "recorded, backbone", [("dimaskdino_r50", "resnet50"), ("dimaskdino_swinl", "swin_l")], ids=["detectron2", "swin"]
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_names_of_detectron2_and_of_microsofts_swin_are_known(recorded, backbone, prefix):
    """Of a file of the backbone alone, and of a whole model."""
    lines = (HERE / f"{recorded}.txt").read_text().splitlines()
    theirs = [prefix + line.split()[0].removeprefix("backbone.") for line in lines if line.startswith("backbone.")]
    with torch.device("meta"):
        own = Backbone(backbone).state_dict(prefix="backbone.")
    made = {name for name in own if not name.endswith(("num_batches_tracked", "relative_position_index"))}
    assert translate(dict.fromkeys(theirs, torch.zeros(1)))[0].keys() == made


def test_torchvisions_weights_are_checked_and_run_no_code(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **rest: (url, rest))
    url, rest = imagenet("resnet50")
    assert url == torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
    assert rest == {"map_location": "cpu", "check_hash": True, "weights_only": True}


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError("no network"), "https://.*pth cannot be downloaded (no network): give .* --backbone-weights,"),
        (RuntimeError("bad hash\nmore"), "/hub/checkpoints/resnet18-.*pth is damaged (bad hash): delete it, and it is"),
        (EOFError(), "checkpoints/resnet18-.*pth is damaged (EOFError): delete it, and it is"),
    ],
)
def test_torchvisions_weights_that_cannot_be_had_are_named(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        imagenet("resnet18")


def test_swin_l_which_torchvision_has_not_is_told_where_its_weights_are():
    with pytest.raises(ValueError, match="no Swin-L: give swin_large_.*pth of https://.* with --backbone-weights"):
        imagenet("swin_l")


# ---- Others' names ---------------------------------------------------------------------------------------------------

PIXEL, HEAD = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
NAMES = {  # of tensors that others of the same shape could be taken for
    PIXEL + "transformer.level_embed": "encoder.level_embed",
    PIXEL + "transformer.encoder.layers.0.norm1.weight": "encoder.layers.0.attention.norm.weight",
    PIXEL + "transformer.encoder.layers.0.norm2.bias": "encoder.layers.0.ffn.norm.bias",
    PIXEL + "transformer.encoder.layers.5.self_attn.value_proj.weight": "encoder.layers.5.attention.value.weight",
    PIXEL + "transformer.encoder.layers.5.self_attn.output_proj.weight": "encoder.layers.5.attention.output.weight",
    PIXEL + "transformer.encoder.layers.1.linear2.bias": "encoder.layers.1.ffn.linear2.bias",
    PIXEL + "input_proj.2.0.weight": "encoder.projections.2.0.weight",
    PIXEL + "adapter_1.weight": "encoder.lateral.0.weight",
    PIXEL + "adapter_1.norm.bias": "encoder.lateral.1.bias",
    PIXEL + "layer_1.weight": "seg_head.fuse.0.weight",
    PIXEL + "layer_1.norm.weight": "seg_head.fuse.1.weight",
    PIXEL + "mask_features.weight": "seg_head.embed.weight",
    HEAD + "enc_output.weight": "transform.0.weight",
    HEAD + "enc_output_norm.weight": "transform.1.weight",
    HEAD + "class_embed.bias": "det_head.classifier.bias",
    HEAD + "mask_embed.layers.1.weight": "seg_head.mask_mlp.layers.1.weight",
    HEAD + "_bbox_embed.layers.1.weight": "det_head.box_mlp.layers.1.weight",
    HEAD + "decoder.bbox_embed.2.layers.0.weight": "det_head.box_mlp.layers.0.weight",
    HEAD + "decoder.norm.weight": "head_norm.weight",
    HEAD + "decoder_norm.bias": "head_norm.bias",
    HEAD + "label_enc.weight": "label_embed.weight",
    HEAD + "_oldm_bbox_embed.layers.1.bias": "interactions.0.box_mlp.layers.1.bias",
    HEAD + "oldm.bbox_embed.1.layers.1.weight": "interactions.0.box_mlp.layers.1.weight",
    HEAD + "oldm.norm.weight": "interactions.0.norm.weight",
    HEAD + "oldm.ref_point_head.layers.1.weight": "interactions.0.position.layers.1.weight",
    HEAD + "oldm.layers.1.self_attn.in_proj_weight": "interactions.0.layers.1.attention.mha.in_proj_weight",
    HEAD + "oldm.layers.1.norm1.weight": "interactions.0.layers.1.attention.norm.weight",
    HEAD + "oldm.layers.1.norm2.weight": "interactions.0.layers.1.ffn.norm.weight",
    HEAD + "decoder.ref_point_head.layers.1.weight": "position.layers.1.weight",
    HEAD + "decoder.layers.0.norm1.weight": "residual.cross_attention.norm.weight",
    HEAD + "decoder.layers.0.norm2.weight": "residual.self_attention.norm.weight",
    HEAD + "decoder.layers.0.norm3.weight": "residual.ffn.norm.weight",
    HEAD + "decoder.layers.3.norm1.bias": "decoder.2.cross_attention.norm.bias",
    HEAD + "decoder.layers.3.norm2.bias": "decoder.2.self_attention.norm.bias",
    HEAD + "decoder.layers.3.norm3.bias": "decoder.2.ffn.norm.bias",
    HEAD + "decoder.layers.3.self_attn.out_proj.weight": "decoder.2.self_attention.mha.out_proj.weight",
    HEAD + "decoder.layers.3.cross_attn.value_proj.weight": "decoder.2.cross_attention.value.weight",
    HEAD + "decoder.layers.3.linear1.weight": "decoder.2.ffn.linear1.weight",
    HEAD + "decoder.query_guide_feature_update.multihead_attn.in_proj_bias": "bato.attention.mha.in_proj_bias",
    HEAD + "decoder.query_guide_feature_update.norm1.weight": "bato.attention.norm.weight",
    HEAD + "query_guide_feature_update.norm2.weight": "bato.ffn.norm.weight",
    HEAD + "query_guide_feature_update.linear2.weight": "bato.ffn.linear2.weight",
    HEAD + "decoder.mask_output_conv.weight": "seg_head.update.0.weight",
    HEAD + "decoder.mask_output_conv.norm.weight": "seg_head.update.1.weight",
}


def test_each_of_the_authors_tensors_goes_to_the_module_that_it_is_of():
    with torch.device("meta"):
        own = DIMaskDINO(Config.released()).state_dict()
    for theirs, name in NAMES.items():
        state, foreign = translate({"model": {theirs: torch.zeros(1)}})
        assert foreign and [*state] == [name] and name in own


WRAPPINGS = {
    "DistributedDataParallel": ("module.", "model"),
    "torch.compile": ("_orig_mod.", "model"),
    "both": ("module._orig_mod.", None),
    "Lightning": ("model.", "state_dict"),
    "Lightning, compiled": ("model._orig_mod.", "state_dict"),
    "PyTorch's tutorials": ("", "model_state_dict"),
}


@pytest.mark.parametrize("prefix, key", WRAPPINGS.values(), ids=WRAPPINGS)
def test_weights_of_a_wrapped_model_load(prefix, key):
    model, other = build(seed=0), build(seed=1)
    wrapped = {prefix + name: x for name, x in model.state_dict().items()}
    assert load_weights(other, {key: wrapped, "epoch": 1} if key else wrapped) == []
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in other.state_dict().items())


def test_a_bare_state_dict_tells_its_model():
    for preset, backbone, changes in [
        ("released", "resnet18", {"decoder_layers": 4}), ("released", "swin_l", {"num_classes": 7}),
        ("maskdino", "swin_b", {"dim": 64}), ("paper", "swin_t", {"encoder_layers": 2}),
        ("tiny", "tiny", {"ffn": 48, "bato": False, "selection": (30,)}),
    ]:  # fmt: skip
        config = dataclasses.replace(getattr(Config, preset)(), backbone=backbone, **changes)
        with torch.device("meta"):
            assert config_of(DIMaskDINO(config).state_dict()) == config


def test_where_nothing_fits_two_names_of_each_side_are_shown():
    odd = {"a.weight": torch.zeros(7), "b.weight": torch.zeros(7), "c": torch.zeros(7)}
    with pytest.raises(ValueError, match="^no tensor .* the file has a.weight and b.weight, the model backbone.* and "):
        load_weights(build(), odd, partial=True)
    with pytest.raises(ValueError, match="^it holds no .*MaskDINO .* a.weight and b.weight, .* --backbone-weights$"):
        config_of(odd)
    with pytest.raises(ValueError, match="^its backbone is none of resnet18, .*swin_l, tiny$"):
        config_of(build().state_dict() | {"backbone.stages.0.0.weight": torch.zeros(64, 3, 4, 4)})


def test_levels_of_the_authors_decoder_alone_are_turned():
    model, bias = build(), torch.arange(2 * 4 * 4 * 2.0)  # heads, levels, points, x and y
    decoder = "sem_seg_head.predictor.decoder.layers.0.cross_attn.sampling_offsets.bias"
    encoder = "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.bias"
    load_weights(model, {decoder: bias, encoder: bias}, partial=True)
    assert torch.equal(model.residual.cross_attention.offsets.bias, bias.view(2, 4, 8).flip(1).flatten())
    assert torch.equal(model.encoder.layers[0].attention.offsets.bias, bias)


def test_tensors_that_stand_for_one_have_to_be_equal():
    one, other = "sem_seg_head.predictor.class_embed.bias", "sem_seg_head.predictor.decoder.class_embed.bias"
    state, foreign = translate({"model": {one: torch.ones(3), other: torch.ones(3)}})
    assert foreign and state.keys() == {"det_head.classifier.bias"}
    with pytest.raises(ValueError, match=f"^{other} differs from another .* stands for det_head.classifier.bias$"):
        translate({one: torch.ones(3), other: torch.zeros(3)})


def test_what_has_no_part_in_the_model_is_no_odd_tensor():
    source, model = torchvision.models.resnet18(weights=None).state_dict(), build(backbone="resnet18")
    extra = ("head.bias", "criterion.empty_weight", "stem.fc.bias", "norm.bias", "layers.0.blocks.1.attn_mask")
    assert load_weights(model, source | dict.fromkeys(extra, torch.ones(3))) == []


def test_norms_of_a_pretrained_backbone_are_frozen_and_stay_as_saved():
    def changes_in_training(model):
        with torch.no_grad():
            norm, image = model.backbone.stages[0].bn1, torch.rand(2, 64, 5, 5)
            return not torch.equal(norm.eval()(image), norm.train()(image))

    model, again = build(backbone="resnet18"), build(backbone="resnet18")
    load_weights(model, again.state_dict())
    assert model.backbone.stages[0].bn1.weight.requires_grad and changes_in_training(model)
    load_weights(model, torchvision.models.resnet18(weights=None).state_dict())
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.weight.requires_grad for m in norms) and not changes_in_training(model)
    load_weights(again, model.state_dict())
    assert not changes_in_training(again)


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
    with pytest.raises(ValueError, match="weights.* cannot be read as weights") as error:
        load_weights(build(), file)
    assert suffix == ".pth" or "it asks for posix.mkdir, which is no array" in str(error.value)
    assert not crater.exists()


def test_a_pickle_may_ask_for_what_makes_arrays_and_for_nothing_beside_it(tmp_path):
    for module, name in ("numpy._core.multiarray", "fromfile"), ("posix", "ndarray"):
        (tmp_path / "odd.pkl").write_bytes(f"c{module}\n{name}\n.".encode())
        with pytest.raises(ValueError, match=f"it asks for {module}.{name}, which is no array"):
            read_checkpoint(tmp_path / "odd.pkl")


def test_a_pickle_of_arrays_loads_also_of_an_older_numpy(tmp_path):
    model, array = build(backbone="resnet18"), np.random.rand(64, 3, 7, 7).astype(np.float32)
    content = pickle.dumps({"model": OrderedDict({"stem.conv1.weight": array}), "__author__": "torchvision"}, 3)
    (tmp_path / "R-18.pkl").write_bytes(content.replace(b"numpy._core.", b"numpy.core."))
    load_weights(model, tmp_path / "R-18.pkl", partial=True)
    assert np.array_equal(model.backbone.stages[0].conv1.weight.detach(), array)


def test_a_damaged_file_is_named(tmp_path):
    for content in (b"", b"PK\x03\x04 cut", b"not a checkpoint"):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(ValueError, match="broken.pth cannot be read as weights"):
            load_weights(build(), tmp_path / "broken.pth")


# ---- What a checkpoint knows -----------------------------------------------------------------------------------------


def saved(path, model, **known):
    torch.save({"model": model.state_dict(), "config": dataclasses.asdict(model.config)} | known, path)
    return load_model(path)


def facts(trained: Trained):
    assert not trained.model.training
    return trained.named, trained.classes, trained.category_ids, trained.test_size, trained.source


def test_a_loaded_model_comes_with_its_classes_test_size_and_data(tmp_path):
    source = Source("x", val_json="a")
    known = {"classes": list("abcde"), "category_ids": [9, 7, 5, 3, 1], "source": dataclasses.asdict(source)}
    found = facts(saved(tmp_path / "whole.pt", build(), **known, recipe={"test_size": [64, 96]}))
    assert found == (True, list("abcde"), [9, 7, 5, 3, 1], (64, 96), source)


def test_classes_without_names_are_numbered_and_80_are_cocos(tmp_path):
    found = facts(saved(tmp_path / "bare.pt", build()))
    assert found == (False, [f"class {i}" for i in range(5)], [0, 1, 2, 3, 4], (800, 1333), None)
    _, classes, ids, size, source = facts(saved(tmp_path / "coco.pt", build(num_classes=80)))
    assert (classes[0], classes[79], ids[0], ids[79]) == ("person", "toothbrush", 1, 90)
    assert (len(classes), len(ids), size, source) == (80, 80, (800, 1333), Source("coco"))


def test_a_loaded_model_is_on_the_device_that_is_asked_for(tmp_path):
    saved(tmp_path / "small.pt", build())
    assert {x.device.type for x in load_model(tmp_path / "small.pt", "meta").model.parameters()} == {"meta"}
    for device, count in ("cuda", 0), ("cuda:1", 1):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=f"GPU here, not {device}: use the"):
            patch.setattr(torch.cuda, "device_count", lambda count=count: count)
            load_model(tmp_path / "small.pt", device)


def test_a_file_that_holds_no_model_or_another_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt cannot be read as weights .* it holds a list$"):
        load_model(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="^.*a.pt does not fit: [0-9]+ tensors do not fit, and nothing was loaded:"):
        saved(tmp_path / "a.pt", build(), config=dataclasses.asdict(SMALL) | {"dim": 64})
    with pytest.raises(ValueError, match="^.*a.pt does not fit: .* unexpected keyword argument 'colour'$"):
        saved(tmp_path / "a.pt", build(), config=dataclasses.asdict(SMALL) | {"colour": "red"})
    (tmp_path / "a.ckpt").write_bytes(b'\x20\0\0\0\0\0\0\0{"__metadata__":{}}')
    with pytest.raises(ValueError, match="a.ckpt is in safetensors format: save its tensors with torch.save$"):
        load_model(tmp_path / "a.ckpt")
