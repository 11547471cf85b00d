"""What dimaskdino.py promises, in the paper's order. `pytest -v` reads as the list of promises."""

import dataclasses
import math
import re

import pytest
import torch
import torch.nn.functional as nnf
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torchvision.ops import StochasticDepth

import dimaskdino
from deform_attn_cuda import deform_attn, deform_attn_pytorch, status
from dimaskdino import (
    MLP,
    Backbone,
    BoxPosition,
    Config,
    DeformableAttention,
    DIMaskDINO,
    mask_logits,
    mask_to_box,
    postprocess,
    refine,
    select,
    sine_of_grid,
    token_anchors,
)
from losses import Denoising, denoising_queries
from small_attention import DEVICES, TOLERANCES, assert_agrees, inputs, problems
from small_models import RELEASED, SMALL, TRAINING, build, close, factors_of, law, objects, pictures, step
from util.weights import load_weights

# ---- Config ----------------------------------------------------------------------------------------------------------


PAPER = [  # field, value, where the paper says so
    ("num_classes", 80, "4.1, COCO"),
    ("backbone", "resnet50", "4.1"),
    ("dim", 256, "appendix B"),
    ("heads", 8, "as MaskDINO"),
    ("levels", 4, "3.2.1, i = 3 to 6"),
    ("points", 4, "as MaskDINO"),
    ("ffn", 2048, "appendix B"),
    ("encoder_layers", 6, "3.2.1, appendix B"),
    ("decoder_layers", 6, "table 9"),
    ("selection", (600, 300), "tables 7 and 8"),
    ("interaction_layers", 2, "3.2.2, Eq. 2"),
    ("bato", True, "table 4"),
    ("guidance", "Q_bal", "table 5"),
    ("gtg", True, "table 6"),
    ("position_token", "learned", "table 3"),
    ("box_guide", "query", "Eq. 6"),
    ("guiding_tokens", None, "Eq. 7"),
    ("guide_value", "T_g", "Eq. 8"),
    ("pixel_tokens", "T_i", "Eq. 11"),
]


def test_every_default_is_the_papers():
    assert dataclasses.asdict(Config()) == {field: value for field, value, _ in PAPER}


@pytest.mark.parametrize(
    "preset, parameters",  # released, maskdino: of the authors' models
    [("paper", 51_893_272), ("tiny", 1_131_184), ("released", 52_286_232), ("maskdino", 52_058_004)],
)
def test_a_preset_trains_so_many_parameters_of_a_pretrained_model(preset, parameters):
    with torch.device("meta"):
        model = DIMaskDINO(getattr(Config, preset)())
        model.backbone.freeze_norm()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"guidance": "T_i"}, "guidance='T_i' is not one of Q_bal, T_s1, T_s2"),
        ({"backbone": "vgg"}, "backbone='vgg' is not one of resnet18, resnet50, swin_t, swin_s, swin_b, swin_l, tiny"),
        ({"selection": ()}, "selection=() must be counts that do not grow, like (600, 300)"),
        ({"selection": (300, 600)}, "selection=(300, 600) must be counts that do not grow, like (600, 300)"),
        ({"selection": (1, 0)}, "selection=(1, 0) must be counts that do not grow, like (600, 300)"),
        ({"dim": 30}, "dim=30 must be a multiple of 4, above 64 of 32, and of heads=2"),
        ({"dim": 36, "heads": 8}, "dim=36 must be a multiple of 4, above 64 of 32, and of heads=8"),
        ({"dim": 100, "heads": 4}, "dim=100 must be a multiple of 4, above 64 of 32, and of heads=4"),
        ({"guiding_tokens": 0}, "guiding_tokens=0 is less than 1"),
        ({"levels": 2}, "levels=2 or decoder_layers=3 is less than 3 or 2"),
        ({"decoder_layers": 1}, "levels=4 or decoder_layers=1 is less than 3 or 2"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_by_field(wrong, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(SMALL, **wrong)
    assert str(error.value) == message


# ---- Leaf blocks -----------------------------------------------------------------------------------------------------


def test_an_mlp_has_a_relu_between_its_layers_and_none_after_the_last():
    mlp = MLP(1, 1, 1, 3)
    for parameter in mlp.parameters():
        nn.init.constant_(parameter, 1.0 if parameter.ndim == 2 else 0.0)
    nn.init.constant_(mlp.layers[2].weight, -1.0)
    assert mlp(torch.tensor([[-2.0], [3.0]])).flatten().tolist() == [0.0, -3.0]


def test_a_state_dict_holds_parameters_and_batch_statistics_alone():
    with torch.device("meta"):
        model = DIMaskDINO(dataclasses.replace(SMALL, backbone="resnet18"))
    others = model.state_dict().keys() - dict(model.named_parameters()).keys()
    assert {name.rpartition(".")[2] for name in others} == {"running_mean", "running_var", "num_batches_tracked"}


# ---- Feature Tokens Extractor (3.2.1) --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "swin_t", "swin_s", "swin_b", "swin_l", "tiny"])
def test_backbones_give_features_at_strides_4_to_32(name):
    with torch.device("meta"):  # shapes without arithmetic
        backbone = Backbone(name)
        features = backbone.eval()(torch.empty(1, 3, 256, 384))
    assert [tuple(x.shape) for x in features] == [
        (1, c, 256 // s, 384 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("name, drop", [("swin_t", 0.2), ("swin_s", 0.3), ("swin_b", 0.5)])
def test_a_swin_backbone_has_the_shape_and_drop_of_torchvisions(name, drop):
    with torch.device("meta"):
        ours, theirs = Backbone(name), getattr(torchvision.models, name)().features
    shapes = [sorted(tuple(p.shape) for p in x.parameters()) for x in (ours.stages, theirs)]
    drops = [max(m.p for m in x.modules() if isinstance(m, StochasticDepth)) for x in (ours, theirs)]
    assert shapes[0] == shapes[1] and drops == [drop, drop]


def test_images_are_normalised_as_imagenets_and_padded_right_and_below():
    mean, deviation = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])  # of ImageNet, RGB
    images = (mean + deviation)[None, :, None, None].expand(1, 3, 40, 70)
    expected = torch.zeros(1, 3, 64, 96)
    expected[..., :40, :70] = 1
    close(build().normalize(images), expected, 1e-5)


def test_frozen_batch_norms_do_and_train_the_convolutions_as_in_evaluation():
    backbone, images = build().backbone.double(), torch.rand(2, 3, 64, 64).double()
    backbone.train()(images)
    before = backbone.eval()(images)
    convolutions = [m.weight for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    gradients = torch.autograd.grad(before[-1].sin().sum(), convolutions)
    backbone.freeze_norm()
    state = {name: x.clone() for name, x in backbone.state_dict().items()}
    after = backbone.train()(images)
    with torch.no_grad():
        folded = backbone(images)
    gradients_after = torch.autograd.grad(after[-1].sin().sum(), convolutions)
    for a, b in zip((*before, *before, *gradients), (*after, *folded, *gradients_after), strict=True):
        close(a, b)
    assert all(torch.equal(state[name], x) for name, x in backbone.state_dict().items())
    assert not any(m.weight.requires_grad for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))


@torch.no_grad()
def test_maps_and_convolutions_are_channels_last():
    model = build(**RELEASED)
    out = model(pictures(2, 3, 64, 96), trace=True)
    maps = (out["trace"]["F_cnn"], *(x["pixels"] for x in out["layers"]))
    weights = (m.weight for m in model.modules() if isinstance(m, nn.Conv2d))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (*maps, *weights))


@torch.no_grad()
def test_each_stage_of_a_swin_backbone_has_a_norm_of_its_own():
    backbone = Backbone("swin_t")
    for i, norm in enumerate(backbone.norms):
        nn.init.zeros_(norm.weight)
        nn.init.constant_(norm.bias, i)
    features = backbone.eval()(torch.rand(1, 3, 64, 64))
    assert [x.unique().tolist() for x in features] == [[0.0], [1.0], [2.0], [3.0]]


@law
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 2), st.sampled_from([3, 4, 6]))
@torch.no_grad()
def test_N_is_the_sum_over_levels_and_bounds_both_selections(height, width, batch, levels):
    model = build(selection=(60, 30), levels=levels, decoder_layers=2)
    out = model(torch.zeros(batch, 3, height, width), trace=True)
    height, width = (-(-side // 32) * 32 for side in (height, width))  # padded
    N = sum(math.ceil(height / 2**i) * math.ceil(width / 2**i) for i in range(3, 3 + levels))
    Q = min(30, N)
    assert [out["trace"][name].shape[1] for name in ("T_i", "T_s1", "T_s2", "T_bal")] == [N, min(60, N), Q, N]
    assert out["logits"].shape == (batch, Q, 5) and out["boxes"].shape == (batch, Q, 4)
    assert mask_logits(out).shape == (batch, Q, height // 4, width // 4)


@torch.no_grad()
def test_tokens_run_from_the_finest_level_to_the_coarsest_row_by_row():
    model, maps = build(encoder_layers=0), []
    for projection in model.encoder.projections:
        projection.register_forward_hook(lambda _, inputs, output: maps.append(output))
    T_i = model(pictures(1, 3, 64, 96), trace=True)["trace"]["T_i"]
    assert [tuple(x.shape[2:]) for x in maps] == [(8, 12), (4, 6), (2, 3), (1, 2)]
    assert torch.equal(T_i, torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2))


def test_the_position_of_a_cell_counts_from_1_and_turns_once_over_a_side():
    position = sine_of_grid([(4, 8)], 8, "cpu").view(4, 8, 8)  # sine, cosine, and a hundredth of the turn; y, then x
    for place, channels, turns in [
        ((0, 0), slice(0, 2), 1 / 4), ((1, 7), slice(0, 2), 2 / 4), ((3, 0), slice(2, 4), 1 / 100),
        ((3, 0), slice(4, 6), 1 / 8), ((2, 5), slice(4, 6), 6 / 8), ((0, 3), slice(6, 8), 4 / 8 / 100),
    ]:  # fmt: skip
        close(position[place][channels], torch.tensor([math.sin(math.tau * turns), math.cos(math.tau * turns)]))


def test_the_encoder_knows_place_and_level_of_a_token_by_their_sum():
    model, seen = build(), []
    model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(pictures(1, 3, 64, 64))
    level = model.encoder.level_embed.repeat_interleave(torch.tensor([64, 16, 4, 1]), 0)
    assert torch.equal(seen[0], sine_of_grid([(8, 8), (4, 4), (2, 2), (1, 1)], 32, "cpu") + level)


def test_the_position_of_a_box_turns_with_cy_cx_w_and_h():
    position, seen = BoxPosition(8), []  # for each of the four: sine, cosine, and a hundredth of the turn
    position.layers[0].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    position(torch.tensor([[[0.25, 0.5, 1.0, 0.75]]]))
    turns = torch.tensor([0.5, 0.25, 1.0, 0.75])[:, None] / torch.tensor([1, 100])
    close(seen[0][0, 0].view(4, 2, 2), torch.stack(((math.tau * turns).sin(), (math.tau * turns).cos()), -1))


DIRECTIONS = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]).float()


def test_attention_starts_with_points_1_to_4_cells_away_in_8_directions():
    attention = DeformableAttention(dataclasses.replace(SMALL, heads=8))
    attention.initialize()
    offsets = attention.offsets(torch.rand(32)).view(8, 4, 4, 2)  # head, level, point, (x, y)
    close(offsets, (DIRECTIONS[:, None, None] * torch.arange(1, 5)[:, None]).expand(-1, 4, -1, -1))
    assert not attention.weights(torch.rand(32)).any()  # all 16 weigh the same


@torch.no_grad()
def test_a_batch_of_equal_sized_images_equals_the_images_one_by_one():
    model, images = build(), pictures(3, 3, 64, 96)
    batch = model(images)
    for b in range(3):
        alone = model(images[b : b + 1])
        for name in ("logits", "boxes", "mask_embedding", "pixels"):
            close(batch[name][b], alone[name][0])  # sums in another order: some 1e-6


# ---- Deformable attention: kernel = fallback -------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@settings(deadline=None, max_examples=40)
@given(problem=problems)
def test_kernel_and_fallback_agree(device, dtype, problem):
    """Values and all gradients, of any shapes, offsets and references, on borders of cells and outside."""
    if "fallback" in status(device, dtype):
        pytest.skip(status(device, dtype))
    assert_agrees(deform_attn, problem["level_shapes"], inputs(**problem, dtype=dtype, device=device))


# ---- Every equation (3.2) --------------------------------------------------------------------------------------------


def decoder_layer(model, layer, Q, box, memory, shapes):
    """A decoder layer by its formula: self-attention, deformable attention from fine to coarse, feed-forward."""
    place = model.position(box)
    attention, cross, ffn = layer.self_attention, layer.cross_attention, layer.ffn
    Q = attention.norm(Q + attention.mha(Q + place, Q + place, Q)[0])
    B, n, C = Q.shape
    value = cross.value(memory).view(B, -1, 2, C // 2)  # two heads
    offsets = cross.offsets(Q + place).view(B, n, 2, 4, 4, 2)  # head, level, point, (x, y)
    logits = cross.weights(Q + place).view(B, n, 2, 4, 4)
    Q = cross.norm(Q + cross.output(deform_attn_pytorch(value, shapes, box, offsets, logits)))
    return ffn.norm(Q + ffn.linear2(ffn.linear1(Q).relu()))


def enlarged(tokens, like):
    """The 8 x 12 tokens of the finest level as a map of another's size."""
    return nnf.interpolate(tokens[:, :96].transpose(1, 2).unflatten(2, (8, 12)), like.shape[2:], mode="bilinear")


@pytest.mark.parametrize("preset", [{}, {**RELEASED, "guiding_tokens": 3}], ids=["paper", "released"])
@torch.no_grad()
def test_each_symbol_is_what_its_equation_makes_of_those_before_it(preset):
    model, images, shapes = build(**preset), pictures(2, 3, 64, 96), [(8, 12), (4, 6), (2, 3), (1, 2)]
    out = model(images, trace=True)
    t = out["trace"]
    every, interaction = torch.arange(2)[:, None], model.interactions[0]
    det, seg, norm, bato = model.det_head, model.seg_head, model.head_norm, model.bato
    T_i, *_, F_cnn = model.encoder(model.backbone(model.normalize(images)))
    pixels = seg.embed(seg.fuse(F_cnn + enlarged(T_i, F_cnn)).relu())

    scores, index = det.classifier(model.transform(T_i)).amax(-1).sort(1, descending=True)  # Eq. 1
    T_s1 = model.transform(T_i)[every, index[:, :12]]
    box_s1 = mask_to_box(torch.einsum("bqc,bchw->bqhw", seg.mask_mlp(norm(T_s1)), pixels))
    T_s1_sa, box_s1_sa = T_s1, box_s1
    for layer in interaction.layers:  # Eq. 2
        mha, placed = layer.attention, T_s1_sa + interaction.position(box_s1_sa)
        T_s1_sa = layer.ffn(mha.norm(T_s1_sa + mha.mha(placed, placed, T_s1_sa)[0]))
        box_s1_sa = (interaction.box_mlp(T_s1_sa) + box_s1_sa.logit(1e-5)).sigmoid()
    scores_2, kept = det.classifier(interaction.norm(T_s1_sa)).amax(-1).sort(1, descending=True)  # Eq. 3
    T_s2, box_s2 = T_s1_sa[every, kept[:, :6]], box_s1_sa[every, kept[:, :6]]
    Q_bal = decoder_layer(model, model.residual, T_s2, box_s2, T_i, shapes)  # Eq. 4
    box_bal = (det.box_mlp(Q_bal) + box_s2.logit(1e-5)).sigmoid()
    guide, box = Q_bal, box_bal
    if preset:
        best = det.classifier(Q_bal).amax(-1).sort(1, descending=True).indices[:, :3]
        guide, box = Q_bal[every, best], box_bal[every, best]
    T_g_mask = seg.mask_mlp(guide)  # Eq. 5
    T_g_box = model.position(box) if preset else model.box_guide(guide)  # Eq. 6
    T_g = T_g_mask + T_g_box  # Eq. 7
    told = bato.attention.mha(T_i + sine_of_grid(shapes, 32, "cpu"), T_g, T_g_mask if preset else T_g)[0]  # Eq. 8
    T_bal = bato.ffn(bato.attention.norm(T_i + told))
    Q, box = Q_bal, box_bal
    for layer in model.decoder:  # Eq. 9
        before, Q = box, decoder_layer(model, layer, Q, box, T_bal, shapes)
        box = (det.box_mlp(Q) + box.logit(1e-5)).sigmoid()
    Q_ref = norm(Q)
    c, b = det.classifier(norm(Q_ref)), (det.box_mlp(Q_ref) + before.logit(1e-5)).sigmoid()  # Eq. 10
    if preset:
        pixels = seg.update(pixels + enlarged(T_bal, pixels)).relu()
    m = torch.einsum("bqc,bchw->bqhw", seg.mask_mlp(norm(Q_ref)), pixels)  # Eq. 11

    made = {
        "F_cnn": F_cnn, "T_i": T_i, "scores_1": scores[:, :12], "index_1": index[:, :12], "T_s1": T_s1,
        "box_s1": box_s1, "T_s1_sa": T_s1_sa, "box_s1_sa": box_s1_sa, "scores_2": scores_2[:, :6],
        "index_2": index.gather(1, kept[:, :6]), "T_s2": T_s2, "box_s2": box_s2, "Q_bal": Q_bal, "box_bal": box_bal,
        "T_g_mask": T_g_mask, "T_g_box": T_g_box, "T_g": T_g, "T_bal": T_bal, "Q_ref": Q_ref, "c": c, "b": b, "m": m,
    }  # fmt: skip
    assert t.keys() == made.keys()
    for name, expected in made.items():
        assert torch.allclose(t[name], expected, atol=1e-5, rtol=1e-5), f"{name} is the first to part"
    assert torch.equal(out["logits"], t["c"]) and torch.equal(out["boxes"], t["b"])
    assert torch.equal(mask_logits(out), t["m"])
    assert len(out["layers"]) == 1 + model.config.decoder_layers  # the initial prediction, and one after each layer
    assert all(torch.equal(out[name], x) for name, x in out["layers"][-1].items())


# ---- De-Imbalance (3.2.2, Eq. 1-4) -----------------------------------------------------------------------------------


@law
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 50))
def test_eq1_and_eq3_keep_exactly_the_k_best_with_ties_or_fewer_than_k(scores, k):
    scores = torch.tensor([scores], dtype=torch.float)
    kept, index = select(scores, k)
    assert index.unique().numel() == index.numel() == min(k, scores.numel())
    assert kept[0].tolist() == sorted(scores[0].tolist(), reverse=True)[:k]


@torch.no_grad()
def test_first_boxes_are_on_their_cell_and_double_towards_the_finest_level():
    out = build(trained=False, selection=(340, 6))(pictures(1, 3, 128, 128), trace=True)  # fresh: nothing is refined
    boxes = out["selection"]["boxes"][0, out["trace"]["index_1"][0].argsort()]
    sizes = torch.cat([torch.full((n, 2), size) for n, size in ((256, 0.4), (64, 0.2), (16, 0.1), (4, 0.05))])
    close(boxes[:, 2:], sizes, 1e-6)
    close(boxes[[0, 1, 16, 339], :2], torch.tensor([[1, 1], [3, 1], [1, 3], [24, 24]]) / 32, 1e-6)


@pytest.mark.parametrize("cells, border", [(49, False), (50, True)])
def test_tokens_at_the_border_of_maps_of_50_cells_or_more_have_no_anchor(cells, border):
    anchors_logit, inside = token_anchors([(2, cells)], "cpu")
    without = torch.zeros(2, cells, dtype=torch.bool)
    without[:, [0, -1]] = border
    assert torch.equal(anchors_logit.isinf().all(-1), without.flatten()) and torch.equal(inside, ~without.flatten())


@pytest.mark.parametrize(
    "symbol, part, trains",
    [
        ("T_i", "encoder.level_embed", True),
        ("T_s1", "transform.0.weight", False),
        ("box_s1", "seg_head.embed.weight", False),
        ("T_s2", "transform.0.weight", False),
        ("T_s2", "interactions.0.layers.0.ffn.linear1.weight", True),
        ("T_s2", "interactions.0.box_mlp.layers.0.weight", False),
        ("box_s2", "interactions.0.box_mlp.layers.0.weight", True),
        ("box_s2", "interactions.0.layers.0.ffn.linear1.weight", True),
        ("Q_bal", "interactions.0.layers.0.ffn.linear1.weight", True),
        ("Q_bal", "interactions.0.box_mlp.layers.0.weight", True),
        ("Q_bal", "encoder.level_embed", True),
        ("Q_bal", "transform.0.weight", False),
        ("T_g_mask", "residual.ffn.linear1.weight", True),
        ("T_g_box", "residual.ffn.linear1.weight", True),
        ("T_bal", "encoder.level_embed", True),
        ("T_bal", "seg_head.mask_mlp.layers.0.weight", True),
        ("T_bal", "box_guide.layers.0.weight", True),
        ("Q_ref", "bato.ffn.linear1.weight", True),
        ("Q_ref", "residual.ffn.linear1.weight", True),
        ("Q_ref", "det_head.box_mlp.layers.0.weight", False),
        ("m", "seg_head.embed.weight", True),
        ("m", "encoder.lateral.0.weight", True),
        ("m", "bato.ffn.linear1.weight", True),
    ],
)
def test_a_symbol_trains_what_made_it_up_to_where_gradients_are_detached(symbol, part, trains):
    model = build()
    value = model(pictures(1, 3, 64, 64), trace=True)["trace"][symbol].sin().sum()
    weight = model.get_parameter(part)
    (gradient,) = torch.autograd.grad(value, weight, allow_unused=True) if value.requires_grad else (None,)
    assert (gradient is not None and gradient.any().item()) == trains


def deltas(prediction, bias):
    """Through how many changes a predicted box trains the last bias of the network that makes them."""
    boxes = prediction["boxes"][0]
    box = boxes[torch.minimum(boxes, 1 - boxes).amin(-1).argmax()]  # far from 0 and 1, where logits are clamped
    (gradient,) = torch.autograd.grad(box.logit().sum(), bias, allow_unused=True, retain_graph=True)
    return 0 if gradient is None else round(gradient.mean().item(), 3)


def test_predicted_boxes_train_their_delta_and_the_one_before_it():
    model = build()
    out = model(pictures(1, 3, 64, 64))
    assert out["denoising"] == [] and "trace" not in out
    bias, interaction_bias = (x.box_mlp.layers[-1].bias for x in (model.det_head, model.interactions[0]))
    assert deltas(out["selection"], bias) == 1
    assert [deltas(x, interaction_bias) for x in out["interaction"]] == [2, 2]
    assert [deltas(x, bias) for x in out["layers"]] == [0, 1, 2, 2]  # the initial prediction changes nothing


@law
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_the_box_of_a_mask_goes_from_its_first_to_its_last_pixel(height, width, seed):
    masks = torch.randn(4, height, width, generator=torch.Generator().manual_seed(seed)) - 1
    masks[0] = 0  # a pixel of which nothing is known is not inside
    boxes = mask_to_box(masks[None])[0]
    assert torch.equal(boxes[0], torch.tensor([1, 1, 0, 0.0]).clamp(1e-5, 1 - 1e-5))  # no mask: nowhere
    for mask, box in zip(masks, boxes, strict=True):
        if (mask > 0).any():
            pixels = torchvision.ops.masks_to_boxes((mask > 0)[None])
            expected = torchvision.ops.box_convert(pixels, "xyxy", "cxcywh") / torch.tensor([width, height] * 2)
            close(box, expected[0], 2e-5)  # the clamp to (1e-5, 1 - 1e-5)


# ---- Balance-Aware Tokens Optimization (3.2.3, Eq. 5-8) --------------------------------------------------------------


def test_released_box_guiding_tokens_do_not_train_the_boxes_they_come_from():
    model = build(box_guide="box")
    box = torch.rand(1, 6, 4, requires_grad=True)
    model.N_box(torch.rand(1, 6, 32), box).sum().backward()
    assert box.grad is None and model.position.layers[0].weight.grad.any()


# ---- Transformer decoder and heads (3.2.4, Eq. 9-11) -----------------------------------------------------------------


def test_a_box_at_the_border_of_the_image_can_still_be_refined():
    refined = refine(torch.tensor([3.0, -3.0]), torch.tensor([0.0, 1.0]))
    close(refined, torch.tensor([1e-5 * math.e**3, 1 - 1e-5 * math.e**3]), 1e-6)


@torch.no_grad()
def test_eq2_and_eq10_classes_and_boxes_are_float32_even_under_autocast():
    model, x = build(), torch.randn(1, 7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        classes, boxes = model.det_head.classes(x), [part.box_mlp(x) for part in (model.det_head, *model.interactions)]
    assert torch.equal(classes, model.det_head.classifier(x))
    for found, part in zip(boxes, (model.det_head, *model.interactions), strict=True):
        assert torch.equal(found, part.box_mlp(x)) and found.dtype == torch.float32


def test_classes_start_at_the_focal_prior_of_one_in_a_hundred():
    close(build(trained=False).det_head.classifier.bias.sigmoid(), torch.full((5,), 0.01), 1e-6)


def test_eq11_masks_are_products_of_query_and_pixel_embeddings():
    prediction = {"mask_embedding": torch.rand(2, 3, 32), "pixels": torch.rand(2, 32, 6, 5)}
    masks = mask_logits(prediction)
    assert masks.shape == (2, 3, 6, 5)
    close(masks[1, :, 4, 2], prediction["mask_embedding"][1] @ prediction["pixels"][1, :, 4, 2])
    close(mask_logits(prediction, 1, [2, 0]), masks[1, [2, 0]])


@torch.no_grad()
def test_eq11_refreshed_pixels_keep_their_type_under_autocast():
    head, pixels = build(pixel_tokens="T_bal").seg_head, torch.rand(1, 32, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        refreshed = head.refreshed(pixels, torch.ones(1, 64, 32), [(8, 8)])
    assert refreshed.dtype == torch.float32


@torch.no_grad()
def test_eq11_refreshed_pixels_serve_the_layers_after_eq4_alone():
    first, of_eq4, *later = build(pixel_tokens="T_bal")(pictures(1, 3, 64, 64))["layers"]
    assert torch.equal(first["pixels"], of_eq4["pixels"])
    assert all((layer["pixels"] != first["pixels"]).any() for layer in later)


def test_matrices_start_uniform_within_the_bound_of_xavier():
    model = build(trained=False, dim=64)
    for part in (model.encoder.layers, model.residual, model.decoder, model.position, model.bato):
        for name, x in part.named_parameters():
            if x.ndim > 1 and x.any():  # offsets and weights of deformable attention are zero
                assert 0.9 < x.abs().max() / (6 / sum(x.shape)) ** 0.5 <= 1, name


def test_convolutions_start_within_the_bound_of_xavier_or_kaiming():
    model = build(trained=False, dim=64)
    for convs, bound in [
        ([x[0] for x in model.encoder.projections], lambda inputs, outputs: 6 / (inputs + outputs)),
        ([model.encoder.lateral[0], model.seg_head.fuse[0], model.seg_head.embed], lambda inputs, _: 3 / inputs),
    ]:
        for conv in convs:
            inputs, outputs = conv.weight[0].numel(), conv.weight[:, 0].numel()
            assert 0.9 < conv.weight.abs().max() / bound(inputs, outputs) ** 0.5 <= 1
            assert conv.bias is None or not conv.bias.any()


def test_levels_and_labels_start_apart_and_random_boxes_lie_in_the_image():
    model = build(trained=False, dim=256, position_token="random")
    for embedding in (model.encoder.level_embed, model.label_embed.weight):
        assert embedding.std().item() == pytest.approx(1, abs=0.1) and embedding.mean().abs() < 0.1
    assert model.random_box.min() >= 0 and model.random_box.max() <= 1


def test_a_fresh_model_refines_no_box():
    out = build(trained=False)(pictures(1, 3, 64, 64), trace=True)
    trace = out["trace"]
    rank = (trace["index_2"][0][:, None] == trace["index_1"][0]).int().argmax(1)
    for layer in out["layers"]:
        close(layer["boxes"][0], trace["box_s1"][0, rank], 2e-5)


def test_a_backbone_starts_as_torchvision_makes_it():
    weight = build(trained=False, backbone="resnet18").backbone.stages[1][0].conv1.weight  # normal, by the outputs
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)  # of 36,864 numbers: ten sigma


# ---- Switches --------------------------------------------------------------------------------------------------------

ORDER = [
    "F_cnn", "T_i", "T_s1", "box_s1", "T_s1_sa", "T_s2", "box_s2", "Q_bal", "box_bal", "T_g", "T_bal", "Q_ref", "m",
]  # fmt: skip


SWITCHES = [  # of the paper's tables: the change, and the first symbol that it changes
    ({"selection": (9, 6)}, "T_s1"), ({"selection": (12, 5)}, "T_s2"), ({"selection": (12, 9, 6)}, "T_s1_sa"),
    ({"interaction_layers": 1}, "T_s1_sa"), ({"position_token": "random"}, "box_bal"),
    ({"guidance": "T_s1"}, "T_g"), ({"guidance": "T_s2"}, "T_g"), ({"box_guide": "box"}, "T_g"),
    ({"guiding_tokens": 3}, "T_g"), ({"gtg": False}, "T_g"), ({"guide_value": "T_g_mask"}, "T_bal"),
    ({"pixel_tokens": "T_bal"}, "m"), ({"decoder_layers": 4}, "Q_ref"),
]  # fmt: skip
ALONE = [  # without a step, or with all of the released code
    {"selection": (12,)}, {"selection": (6, 6)}, {"bato": False}, {"selection": (12,), "bato": False},
    {"position_token": "random", "selection": (12,)}, {"decoder_layers": 2}, {**RELEASED, "guiding_tokens": 3},
]  # fmt: skip


@pytest.mark.parametrize("change, first", SWITCHES, ids=str)
@torch.no_grad()
def test_a_switch_changes_its_own_step_and_nothing_before_it(change, first):
    plain, switched = build(), build(**change)
    load_weights(switched, plain.state_dict(), partial=True)
    images = pictures(2, 3, 96, 96)
    a, b = (model(images, trace=True)["trace"] for model in (plain, switched))
    same = ORDER[: ORDER.index(first)] + (["T_bal", "Q_ref"] if first == "m" else [])
    if change.get("selection") == (12, 9, 6):  # T_s1_sa is that of the last of two interactions
        same = ["F_cnn", "T_i", "T_s1", "box_s1"]
    for name in same:
        assert torch.equal(a[name], b[name]), f"{name} changed"
    assert a[first].shape != b[first].shape or (a[first] != b[first]).any(), f"{first} is as before"


def test_table4_without_bato_nothing_of_it_is_left_of_the_released_code():
    assert build(bato=False, **RELEASED).state_dict().keys() == build(bato=False).state_dict().keys()


@pytest.mark.parametrize(
    "change, symbol, same, left_out",
    [
        ({"bato": False}, "T_bal", "T_i", "T_g"),  # table 4
        ({"gtg": False}, "T_g", "Q_bal", None),  # table 6
        ({"selection": (6,)}, "T_s2", "T_s1", "T_s1_sa"),  # table 7
    ],
)
@torch.no_grad()
def test_a_step_that_is_switched_off_passes_on_what_it_got(change, symbol, same, left_out):
    trace = build(**change)(pictures(1, 3, 64, 64), trace=True)["trace"]
    assert torch.equal(trace[symbol], trace[same]) and left_out not in trace


@torch.no_grad()
def test_table3_random_position_tokens_are_one_for_all_images_and_saved():
    for selection in ((12, 6), (6,)):  # DI-MaskDINO: of Q_bal; MaskDINO: of its query
        model = build(position_token="random", selection=selection)
        trace = model(pictures(2, 3, 96, 96), denoising_queries(objects(2, 3), 5, 9), trace=True)["trace"]
        box = trace["box_bal" if len(selection) == 2 else "box_s2"]
        assert torch.equal(box[0], model.state_dict()["random_box"]) and torch.equal(box[0], box[1])


def test_table3_the_detection_loss_factor_scales_class_box_and_giou_alone():
    model, images, targets = build(), pictures(2, 3, 64, 64), objects(2, 3)
    full = step(model, images, targets)
    tolerant = dataclasses.replace(TRAINING, detection_loss=0.1)
    for name, value in step(model, images, targets, tolerant).items():
        close(value, full[name] * (0.1 if name.split("_")[0] in ("class", "box", "giou") else 1), 1e-6)


@pytest.mark.parametrize("change", [change for change, _ in SWITCHES] + ALONE, ids=str)
def test_gradients_reach_every_parameter_for_every_switch(change):
    model = build(**change).train()
    sum(step(model, pictures(2, 3, 64, 64), objects(2, 3)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} has a gradient of zero"


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [{}, RELEASED], ids=["paper", "released"])
@torch.no_grad()
def test_bf16_autocast_stays_near_fp32(preset):
    # Untrained weights rank tokens almost at random, so all of them are kept, 340 at 128x128, and all guide. In a
    # smaller image the coarsest level is one pixel, where GroupNorm turns two nearly equal channels into 1 and -1.
    model, images = build(selection=(340, 340), **preset), pictures(2, 3, 128, 128)
    model.backbone.freeze_norm()  # folded into the convolutions
    exact = model(images, trace=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images, trace=True)
    order = [x["trace"]["index_2"].argsort() for x in (exact, rounded)]
    for name in ("logits", "boxes"):
        a, b = (x[name][torch.arange(2)[:, None], o] for x, o in zip((exact, rounded), order, strict=True))
        # bf16 keeps 8 bits: 0.4 % at each of some twenty roundings on the way, of values with unit deviation
        assert (a - b).abs().mean() < 0.02 * max(1, a.std().item()) and b.dtype == torch.float32


def test_everything_is_made_on_the_device_of_the_model(monkeypatch):
    monkeypatch.setattr(dimaskdino, "deform_attn", deform_attn_pytorch)
    with FakeTensorMode():  # tensors without numbers: a GPU is not needed, and what mixes devices is refused
        with torch.device("cuda"):
            model, images = DIMaskDINO(SMALL), torch.zeros(2, 3, 64, 96)
            denoising = Denoising(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, 4), 2, [])
        trace = model(images, denoising, trace=True)["trace"]
    assert {symbol.device.type for symbol in trace.values()} == {"cuda"}


@torch.no_grad()
def test_the_model_exports_for_any_batch_and_multiples_of_32_from_96_on():
    model, sizes = build(decoder_layers=2, interaction_layers=1), {0: torch.export.Dim("batch", max=16)}
    sizes |= {place: 32 * torch.export.Dim(name, min=3, max=64) for place, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(model, (pictures(2, 3, 96, 128).float(),), dynamic_shapes=(sizes,)).module()
    topk = [node for node in program.graph.nodes if node.target == torch.ops.aten.topk.default]
    assert [node.args[1] for node in topk] == [*model.config.selection]  # constants, whatever the size
    for shape in ((1, 3, 128, 96), (3, 3, 96, 160)):
        images = pictures(*shape).float()
        for name in ("logits", "boxes", "mask_embedding", "pixels"):
            close(program(images)[name], model(images)[name])


# ---- From predictions to objects -------------------------------------------------------------------------------------


def hand_made_outputs():
    """Two queries on an image of 48x64 padded to 64x64: query 1 is a class-2 object at its left half, 0 is nothing."""
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, 1, 2] = 2.0
    masks = torch.full((1, 2, 16, 16), -8.0)
    masks[0, 1, :, :8] = 8.0
    boxes = torch.tensor([[[0.5, 0.5, 1, 1], [0.25, 0.375, 0.5, 0.75]]])
    return {"logits": logits, "boxes": boxes} | factors_of(masks)


def test_postprocess_maps_the_padded_input_to_the_output():
    (found,) = postprocess(hand_made_outputs(), [(40, 50)], [(80, 150)], top=1)  # twice as high, three times as wide
    assert found["labels"].tolist() == [2] and found["masks"].shape == (1, 80, 150)
    close(found["boxes"], torch.tensor([[0.0, 0.0, 3 * 32, 2 * 48]]))
    assert torch.equal(found["masks"][0], torch.arange(150).expand(80, -1) < 3 * 32)
    assert 0.85 < found["scores"].item() < torch.tensor(2.0).sigmoid()  # class score times the mask's certainty


@law
@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 70), st.integers(1, 70))
def test_postprocess_gives_the_best_of_all_classes_at_any_output_size(queries, top, height, width):
    torch.manual_seed(0)
    logits, boxes, masks = torch.randn(1, queries, 7), torch.rand(1, queries, 4), torch.randn(1, queries, 8, 8)
    outputs = {"logits": logits, "boxes": boxes} | factors_of(masks)
    (found,) = postprocess(outputs, [(20, 30)], [(height, width)], top)
    assert len(found["scores"]) == min(top, queries * 7)
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
    assert found["masks"].shape == (len(found["scores"]), height, width) and found["masks"].dtype == torch.bool


def test_a_query_may_be_found_as_two_classes_before_another_query_is_found():
    outputs = hand_made_outputs()
    outputs["logits"][0, 1, 0] = 1.0
    (found,) = postprocess(outputs, [(48, 64)], [(48, 64)], top=2)
    assert found["labels"].tolist() == [2, 0] and torch.equal(found["boxes"][0], found["boxes"][1])


def test_a_mask_is_enlarged_bilinearly_between_the_centres_of_its_cells():
    ramp = (torch.arange(16.0) - 5.3).expand(1, 1, 16, 16)  # at pixel p of 64: (p + 1/2) / 4 - 1/2 - 5.3
    outputs = {"logits": torch.full((1, 1, 1), 2.0), "boxes": torch.full((1, 1, 4), 0.5)} | factors_of(ramp)
    (found,) = postprocess(outputs, [(64, 64)], [(64, 64)], top=1)
    logits = ((torch.arange(64) + 0.5) / 4 - 0.5).clamp(0, 15) - 5.3
    assert torch.equal(found["masks"][0], (logits > 0).expand(64, -1))
    expected = torch.tensor(2.0).sigmoid() * logits[logits > 0].sigmoid().mean()
    close(found["scores"][0], expected, 1e-5)


def test_at_most_100_objects_are_found_unless_told_otherwise():
    outputs = {"logits": torch.rand(1, 30, 5), "boxes": torch.rand(1, 30, 4)} | factors_of(torch.rand(1, 30, 8, 8))
    assert len(postprocess(outputs, [(32, 32)], [(32, 32)])[0]["scores"]) == 100


def test_an_empty_mask_scores_zero():
    outputs = hand_made_outputs()
    outputs["pixels"][:] = -8.0
    assert not postprocess(outputs, [(48, 64)], [(48, 64)])[0]["scores"].any()


# ---- The file as a program -------------------------------------------------------------------------------------------


def test_run_as_a_program_it_prints_what_each_equation_makes(monkeypatch, capsys):
    monkeypatch.setattr(Config, "paper", lambda: dataclasses.replace(SMALL, selection=(600, 300)))
    dimaskdino.main()
    head, *steps = capsys.readouterr().out.splitlines()
    assert head.endswith("parameters, image [1, 3, 800, 1216]")
    made = [re.fullmatch(r"(FTE|Eq. \d+) +(\w+) +(\[.*\])", line).groups() for line in steps]
    assert [equation for equation, *_ in made[1:]] == [f"Eq. {number}" for number in range(1, 12)]
    shapes = {symbol: shape for _, symbol, shape in made}
    assert [shapes[x] for x in ("T_i", "T_s1", "T_s2")] == ["[1, 20197, 32]", "[1, 600, 32]", "[1, 300, 32]"]
    assert shapes["T_bal"] == "[1, 20197, 32]" and shapes["m"] == "[1, 300, 200, 304]"
