"""What dimaskdino.py and losses.py promise, in the paper's order. `pytest -v` reads as the list of promises."""

import dataclasses
import itertools
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dimaskdino import Backbone, Config, DIMaskDINO, mask_to_box, postprocess, select
from losses import Criterion, Denoising, denoising_queries
from recipe import Recipe
from weights import config_of, load_weights, read_checkpoint

law = settings(deadline=None, max_examples=25)

SMALL = dataclasses.replace(
    Config.tiny(), num_classes=5, dim=32, heads=2, ffn=48, encoder_layers=1, decoder_layers=3, selection=(12, 6),
)  # fmt: skip
TRAINING = dataclasses.replace(Recipe.tiny(), denoising=9, mask_points=48)
RELEASED = {name: getattr(Config.released(), name) for name in ("guide_networks", "guide_value", "pixel_tokens")}
SWITCHES = [  # every switch of the paper, as it is set in its tables
    {"selection": (12,)}, {"selection": (12, 9, 6)}, {"selection": (6, 6)}, {"selection": (12, 12)}, {"bato": False},
    {"selection": (12,), "bato": False}, {"guidance": "T_s1"}, {"guidance": "T_s2"}, {"gtg": False},
    {"position_token": "random"}, {"position_token": "random", "selection": (12,)}, {"guide_networks": "heads"},
    {"guiding_tokens": 3}, {"guide_value": "T_g_mask"}, {"pixel_tokens": "T_bal"}, 
    {"decoder_layers": 2}, {"interaction_layers": 1}, {**RELEASED, "guiding_tokens": 3}, {},
]  # fmt: skip


def build(seed=0, trained=True, **changes):
    """A small model; `trained` moves its weights off their start, where some are zero."""
    torch.manual_seed(seed)
    model = DIMaskDINO(dataclasses.replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters() if trained else ():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def pictures(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def objects(*counts, size=(64, 64), classes=5, seed=0):
    """Targets with so many objects in each image: boxes anywhere inside, masks that fill them."""
    generator, targets = torch.Generator().manual_seed(seed), []
    for n in counts:
        centers = torch.rand(n, 2, generator=generator) * 0.4 + 0.3
        sides = torch.rand(n, 2, generator=generator) * 0.4 + 0.1
        masks = torch.zeros(n, *size, dtype=torch.bool)
        corners = torch.cat((centers - sides / 2, centers + sides / 2), 1) * torch.tensor([size[1], size[0]] * 2)
        for mask, (x0, y0, x1, y1) in zip(masks, corners.int().tolist(), strict=True):
            mask[y0 : y1 + 1, x0 : x1 + 1] = True
        labels, boxes = torch.randint(0, classes, (n,), generator=generator), torch.cat((centers, sides), 1)
        targets.append({"labels": labels, "boxes": boxes, "masks": masks, "image_id": len(targets)})
    return targets


def step(model, images, targets, recipe=TRAINING):
    """The losses of one training step, with the random points of seed 0."""
    torch.manual_seed(0)
    outputs = model(images, denoising_queries(targets, model.config.num_classes, recipe.denoising))
    return Criterion(recipe)(outputs, targets)


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---- Config ----------------------------------------------------------------------------------------------------------


def test_the_default_config_is_the_paper():
    c = Config()
    assert (c.dim, c.ffn, c.encoder_layers, c.decoder_layers, c.selection) == (256, 2048, 6, 6, (600, 300))
    assert c == Config.paper()


def test_released_differs_from_the_paper_in_four_fields():
    paper, released = dataclasses.asdict(Config.paper()), dataclasses.asdict(Config.released())
    assert {name for name in paper if paper[name] != released[name]} == {*RELEASED, "guiding_tokens"}


@pytest.mark.parametrize("preset, parameters", [("released", 52_286_232), ("maskdino", 52_058_004)])
def test_presets_have_as_many_trained_parameters_as_the_authors_models(preset, parameters):
    model = DIMaskDINO(getattr(Config, preset)())
    model.backbone.freeze_norm()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance": "T_i"},
        {"selection": ()},
        {"selection": (300, 600)},
        {"dim": 30},
        {"backbone": "vgg"},
        {"decoder_layers": 1},
    ],
)
def test_a_config_that_makes_no_model_is_refused_by_the_name_of_its_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(SMALL, **wrong)


# ---- Feature Tokens Extractor (3.2.1) --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "swin_t", "swin_s", "swin_b", "swin_l", "tiny"])
def test_backbones_give_features_at_strides_4_to_32(name):
    with torch.device("meta"):  # shapes without arithmetic
        backbone = Backbone(name)
        features = backbone.eval()(torch.empty(1, 3, 256, 384))
    assert [tuple(x.shape) for x in features] == [
        (1, c, 256 // s, 384 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]


def test_pretrained_batch_norms_are_frozen_and_stay_so_in_training():
    backbone = Backbone("resnet18")
    backbone.freeze_norm()
    norms = [m for m in backbone.train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training or m.weight.requires_grad for m in norms)


@torch.no_grad()
def test_an_image_of_800x1216_becomes_20197_tokens_then_600_then_300():
    trace = build(selection=Config.paper().selection)(pictures(1, 3, 800, 1216), trace=True)["trace"]
    counts = {name: trace[name].shape[1] for name in ("T_i", "T_s1", "T_s1_sa", "T_s2", "Q_bal", "T_bal", "Q_ref")}
    assert counts == {
        "T_i": 20197,
        "T_s1": 600,
        "T_s1_sa": 600,
        "T_s2": 300,
        "Q_bal": 300,
        "T_bal": 20197,
        "Q_ref": 300,
    }


@law
@given(st.integers(32, 100), st.floats(1, 8), st.booleans(), st.integers(1, 2))
@torch.no_grad()
def test_any_image_size_and_aspect_up_to_1_to_8_gives_predictions_of_its_padded_size(short, aspect, upright, batch):
    height, width = (int(short * aspect), short) if upright else (short, int(short * aspect))
    out = build()(torch.zeros(batch, 3, height, width))
    padded = [-(-side // 32) * 32 for side in (height, width)]
    assert out["logits"].shape == (batch, 6, 5) and out["boxes"].shape == (batch, 6, 4)
    assert out["masks"].shape == (batch, 6, padded[0] // 4, padded[1] // 4)


@torch.no_grad()
def test_an_image_with_fewer_tokens_than_k_keeps_them_all():
    out = build(selection=(600, 300))(pictures(1, 3, 32, 32))
    assert out["selection"]["logits"].shape[1] == out["logits"].shape[1] == 16 + 4 + 1 + 1


def test_padding_is_the_mean_colour_at_the_right_and_the_bottom():
    padded = build().normalize(pictures(1, 3, 40, 70))
    assert padded.shape == (1, 3, 64, 96)
    assert not padded[..., 40:, :].any() and not padded[..., 70:].any() and padded[..., :40, :70].any()


@torch.no_grad()
def test_a_batch_of_equal_sized_images_equals_the_images_one_by_one():
    model, images = build(), pictures(3, 3, 64, 96)
    batch = model(images)
    for b in range(3):
        alone = model(images[b : b + 1])
        for name in ("logits", "boxes", "masks"):
            close(batch[name][b], alone[name][0])  # sums in another order: some 1e-6


@torch.no_grad()
def test_the_order_of_a_batch_permutes_the_predictions_alike():
    model, images, order = build(), pictures(3, 3, 64, 96), [2, 0, 1]
    batch, permuted = model(images), model(images[order])
    for name in ("logits", "boxes", "masks"):
        close(batch[name][order], permuted[name])


# ---- De-Imbalance (3.2.2, Eq. 1-4) -----------------------------------------------------------------------------------


@law
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 50))
def test_eq1_and_eq3_keep_exactly_the_k_best_also_with_ties_and_with_fewer_than_k(scores, k):
    scores = torch.tensor([scores], dtype=torch.float)
    kept, index = select(scores, k)
    assert index.unique().numel() == index.numel() == min(k, scores.numel())
    assert kept[0].tolist() == sorted(scores[0].tolist(), reverse=True)[:k]


def test_a_selection_gathers_tokens_of_any_shape_by_the_same_index():
    scores, tokens, boxes = torch.rand(2, 9), torch.rand(2, 9, 7), torch.rand(2, 9, 4)
    _, index, picked, picked_boxes = select(scores, 3, tokens, boxes)
    for b in range(2):
        assert torch.equal(picked[b], tokens[b][index[b]]) and torch.equal(picked_boxes[b], boxes[b][index[b]])


@torch.no_grad()
def test_eq1_selects_no_token_that_scores_less_than_one_it_leaves_out():
    model = build()
    trace = model(pictures(2, 3, 96, 96), trace=True)["trace"]
    scores = model.det_head.scores(model.candidates(trace["T_i"], [(12, 12), (6, 6), (3, 3), (2, 2)])[0])
    left = scores.scatter(1, trace["index_1"], -torch.inf)
    assert (trace["scores_1"].amin(1) >= left.amax(1)).all()
    close(scores.gather(1, trace["index_1"]), trace["scores_1"])


@torch.no_grad()
def test_eq3_selects_among_the_tokens_of_eq1_and_index_2_still_counts_in_T_i():
    trace = build()(pictures(2, 3, 96, 96), trace=True)["trace"]
    for b in range(2):
        rank = {token: rank for rank, token in enumerate(trace["index_1"][b].tolist())}
        chosen = [rank[token] for token in trace["index_2"][b].tolist()]  # a KeyError would be a token from elsewhere
        close(trace["T_s2"][b], trace["T_s1_sa"][b][chosen])
        close(trace["box_s2"][b], trace["box_s1_sa"][b][chosen])


@torch.no_grad()
def test_eq2_does_not_depend_on_the_order_of_the_tokens():
    interact, T, box, order = build().interactions[0], torch.rand(1, 8, 32), torch.rand(1, 8, 4), torch.randperm(8)
    (a, box_a, _), (b, box_b, _) = interact(T, box), interact(T[:, order], box[:, order])
    close(a[:, order], b)
    close(box_a[:, order], box_b)


@torch.no_grad()
def test_eq4_does_not_depend_on_the_order_of_the_queries():
    layer, Q, box, order = build().residual, torch.rand(1, 8, 32), torch.rand(1, 8, 4), torch.randperm(8)
    memory, shapes, position = torch.rand(1, 22, 32), [(4, 4), (2, 2), (1, 1), (1, 1)], torch.rand(1, 8, 32)
    close(
        layer(Q, position, box, memory, shapes)[:, order],
        layer(Q[:, order], position[:, order], box[:, order], memory, shapes),
    )


def test_T_s1_and_its_boxes_are_not_trained_through_what_follows():
    trace = build()(pictures(1, 3, 64, 64), trace=True)["trace"]
    assert not trace["T_s1"].requires_grad and not trace["box_s1"].requires_grad
    assert trace["T_s2"].requires_grad and trace["box_s2"].requires_grad


@law
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_the_box_of_a_mask_goes_from_its_first_to_its_last_pixel(height, width, seed):
    masks = torch.randn(4, height, width, generator=torch.Generator().manual_seed(seed)) - 1
    masks[0] = -1
    boxes = mask_to_box(masks[None])[0]
    assert torch.equal(boxes[0], torch.tensor([1, 1, 0, 0.0]).clamp(1e-5, 1 - 1e-5))  # no mask: nowhere
    for mask, box in zip(masks, boxes, strict=True):
        if (mask > 0).any():
            pixels = torchvision.ops.masks_to_boxes((mask > 0)[None])
            expected = torchvision.ops.box_convert(pixels, "xyxy", "cxcywh") / torch.tensor([width, height] * 2)
            close(box, expected[0], 2e-5)  # the clamp to (1e-5, 1 - 1e-5)


# ---- Balance-Aware Tokens Optimization (3.2.3, Eq. 5-8) --------------------------------------------------------------


@torch.no_grad()
def test_eq7_the_guiding_tokens_are_the_sum_of_mask_and_box_guiding_tokens():
    trace = build()(pictures(1, 3, 64, 64), trace=True)["trace"]
    assert torch.equal(trace["T_g"], trace["T_g_mask"] + trace["T_g_box"])
    assert trace["T_g_mask"].ne(trace["T_g_box"]).any()


@torch.no_grad()
def test_eq8_moves_every_token_of_T_i_and_does_not_depend_on_the_order_of_the_guiding_tokens():
    bato, T_i, T_g, grid = build().bato, torch.rand(1, 20, 32), torch.rand(1, 5, 32), torch.rand(20, 32)
    T_bal, order = bato(T_i, grid, T_g, T_g), torch.randperm(5)
    assert T_bal.shape == T_i.shape and (T_bal != T_i).any(-1).all()
    close(T_bal, bato(T_i, grid, T_g[:, order], T_g[:, order]))


def test_released_box_guiding_tokens_do_not_train_the_boxes_they_come_from():
    model = build(guide_networks="heads")
    box = torch.rand(1, 6, 4, requires_grad=True)
    model.N_box(torch.rand(1, 6, 32), box, model.position).sum().backward()
    assert box.grad is None and model.position.layers[0].weight.grad.any()


# ---- Transformer decoder and heads (3.2.4, Eq. 9-11) -----------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3, 6, 9])
@torch.no_grad()
def test_eq9_there_is_a_prediction_for_T_s2_and_for_every_decoder_layer_eq4_included(layers):
    out = build(decoder_layers=layers)(pictures(1, 3, 64, 64))
    assert len(out["layers"]) == 1 + layers
    assert all(torch.equal(out[name], out["layers"][-1][name]) for name in ("logits", "boxes", "masks"))


@torch.no_grad()
def test_eq10_permuting_the_classes_permutes_the_logits_and_changes_nothing_else():
    model, images, order = build(), pictures(1, 3, 64, 64), [3, 1, 4, 0, 2]
    before = model(images)
    for parameter in model.det_head.classifier.parameters():
        parameter.copy_(parameter[order].clone())
    after = model(images)
    close(before["logits"][..., order], after["logits"], 1e-5)  # the same sums in another order
    assert torch.equal(before["boxes"], after["boxes"]) and torch.equal(before["masks"], after["masks"])


def test_classes_start_at_the_focal_prior_of_one_in_a_hundred():
    out = build(trained=False)(pictures(1, 3, 64, 64))
    assert 0.003 < out["logits"].sigmoid().mean() < 0.03  # the weights around the prior are random


@torch.no_grad()
def test_eq11_masks_are_products_of_query_and_pixel_embeddings():
    head = build().seg_head
    Q, pixels = torch.rand(2, 1, 3, 32), torch.rand(1, 32, 6, 5)
    for x, masks in zip(Q, head(Q, [pixels, pixels]), strict=True):
        close(masks.all()[0, :, 4, 2], head.mask_mlp(x)[0] @ pixels[0, :, 4, 2])


# ---- Switches --------------------------------------------------------------------------------------------------------

ORDER = [
    "F_cnn",
    "T_i",
    "T_s1",
    "box_s1",
    "T_s1_sa",
    "T_s2",
    "box_s2",
    "Q_bal",
    "box_bal",
    "T_g",
    "T_bal",
    "Q_ref",
    "m",
]


@pytest.mark.parametrize(
    "change, first",
    [
        ({"selection": (9, 6)}, "T_s1"),
        ({"selection": (12, 5)}, "T_s2"),
        ({"selection": (12, 9, 6)}, "T_s1_sa"),
        ({"interaction_layers": 1}, "T_s1_sa"),
        ({"position_token": "random"}, "box_bal"),
        ({"guidance": "T_s1"}, "T_g"),
        ({"guidance": "T_s2"}, "T_g"),
        ({"guide_networks": "heads"}, "T_g"),
        ({"guiding_tokens": 3}, "T_g"),
        ({"gtg": False}, "T_g"),
        ({"guide_value": "T_g_mask"}, "T_bal"),
        ({"pixel_tokens": "T_bal"}, "m"),
        ({"decoder_layers": 4}, "Q_ref"),
    ],
    ids=str,
)
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


@torch.no_grad()
def test_table4_without_bato_the_decoder_attends_to_T_i():
    trace = build(bato=False)(pictures(1, 3, 64, 64), trace=True)["trace"]
    assert torch.equal(trace["T_bal"], trace["T_i"]) and "T_g" not in trace


@torch.no_grad()
def test_table6_without_guiding_token_generation_T_g_is_Q_bal():
    trace = build(gtg=False)(pictures(1, 3, 64, 64), trace=True)["trace"]
    assert torch.equal(trace["T_g"], trace["Q_bal"])


@torch.no_grad()
def test_table7_a_single_selection_has_no_token_interaction():
    out = build(selection=(6,))(pictures(1, 3, 64, 64), trace=True)
    assert not out["interaction"] and torch.equal(out["trace"]["T_s2"], out["trace"]["T_s1"])


@torch.no_grad()
def test_table3_random_position_tokens_are_the_same_for_every_image_and_kept_in_the_weights():
    for selection in ((12, 6), (6,)):  # DI-MaskDINO: of Q_bal; MaskDINO: of its query
        model = build(position_token="random", selection=selection)
        trace = model(pictures(2, 3, 96, 96), trace=True)["trace"]
        box = trace["box_bal" if len(selection) == 2 else "box_s2"]
        assert torch.equal(box[0], model.state_dict()["random_box"]) and torch.equal(box[0], box[1])


def test_table3_the_detection_loss_factor_scales_class_box_and_giou_losses_only():
    model, images, targets = build(), pictures(2, 3, 64, 64), objects(2, 3)
    full = step(model, images, targets)
    tolerant = dataclasses.replace(TRAINING, detection_loss=0.1)
    for name, value in step(model, images, targets, tolerant).items():
        close(value, full[name] * (0.1 if name.split("_")[0] in ("class", "box", "giou") else 1), 1e-6)


@pytest.mark.parametrize("change", SWITCHES, ids=str)
def test_gradients_reach_every_parameter_for_every_switch(change):
    model = build(**change).train()
    sum(step(model, pictures(2, 3, 64, 64), objects(2, 3)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} has a gradient of zero"


# ---- Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts",
    [(2, 3), (0, 3), (0, 0), (1, 0), (1, 1), (10, 2), (14, 0)],
    ids=[
        "some",
        "one image empty",
        "all empty",
        "one object",
        "one each",
        "more than denoising slots",
        "more than queries",
    ],
)
def test_losses_and_gradients_are_finite_and_reach_every_parameter_for_any_number_of_objects(counts):
    model = build().train()
    terms = step(model, pictures(2, 3, 64, 64), objects(*counts))
    sum(terms.values()).backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_objects_of_no_size_and_objects_without_a_pixel_train():
    targets = objects(2, 2)
    targets[0]["boxes"][0, 2:] = 0
    targets[1]["masks"][0] = False
    terms = step(build().train(), pictures(2, 3, 64, 64), targets)
    assert all(value.isfinite() for value in terms.values())


def test_every_stage_is_trained_by_every_loss_it_has():
    terms = step(build(), pictures(1, 3, 64, 64), objects(2))
    sets = ["selection", "interaction_0", "interaction_1", *"0123", *(f"denoising_{i}" for i in range(4))]
    losses = ["class", "box", "giou", "mask", "dice"]
    no_masks = {f"{loss}_interaction_{i}" for loss in ("mask", "dice") for i in (0, 1)}
    assert terms.keys() == {f"{loss}_{s}" for s in sets for loss in losses} - no_masks


def test_losses_are_divided_by_the_number_of_objects_that_is_given():
    model, targets = build(), objects(2, 3)
    with torch.no_grad():
        outputs = model(pictures(2, 3, 64, 64))
    criterion = Criterion(TRAINING)
    torch.manual_seed(0)
    own = criterion(outputs, targets)
    torch.manual_seed(0)
    for name, value in criterion(outputs, targets, num_objects=10).items():
        close(value * 2, own[name], 1e-6)


def perfect(targets, queries, classes):
    """Predictions that are the targets, the first objects first, and background."""
    size = [side // 4 for side in targets[0]["masks"].shape[1:]]
    logits, boxes = torch.full((len(targets), queries, classes), -20.0), torch.full((len(targets), queries, 4), 0.5)
    masks = torch.full((len(targets), queries, *size), -20.0)
    for b, target in enumerate(targets):
        n = len(target["labels"])
        logits[b, range(n), target["labels"]], boxes[b, :n] = 20.0, target["boxes"]
        masks[b, :n] = nn.functional.max_pool2d(target["masks"].float(), 4) * 40 - 20
    return {"logits": logits, "boxes": boxes, "masks": masks}


def whole_cells(targets):
    """The same targets with masks that are whole cells of 4x4 pixels."""
    for t in targets:
        t["masks"] = torch.kron(nn.functional.max_pool2d(t["masks"].float(), 4), torch.ones(4, 4)).bool()
    return targets


def test_perfect_predictions_are_matched_to_their_objects_and_cost_almost_nothing():
    torch.manual_seed(0)
    targets, criterion = whole_cells(objects(2, 3)), Criterion(TRAINING)
    best = perfect(targets, 6, 5)
    queries, found = criterion.match({"0": best}, targets)["0"]
    assert queries.tolist() == [0, 1, 6, 7, 8] and found.tolist() == [0, 1, 2, 3, 4]

    def cost(prediction):
        return criterion(
            {**best, "layers": [prediction], "selection": best, "interaction": [], "denoising": []}, targets
        )

    right, inverted = cost(best), cost({**best, "masks": -best["masks"]})
    assert max(right["class_0"], right["box_0"], right["giou_0"]) < 1e-4
    # Masks cost a little where a point falls between two cells; three in four points are chosen there.
    assert right["mask_0"] < 1 < 50 < inverted["mask_0"] and right["dice_0"] < 1 < 4 < inverted["dice_0"]


@law
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_the_match_has_the_least_total_cost_of_all_matches(number, queries, seed):
    torch.manual_seed(seed)
    target, criterion = objects(number, seed=seed)[0], Criterion(TRAINING)
    prediction = {"logits": torch.randn(1, queries, 5), "boxes": torch.rand(1, queries, 4) * 0.5 + 0.2}
    found_queries, found_objects = (x.tolist() for x in criterion.match({"0": prediction}, [target])["0"])
    terms = dimaskdino_costs(prediction, target)
    best = min(
        sum(terms[q, o] for q, o in zip(qs, os_, strict=True))
        for qs in itertools.permutations(range(queries), min(queries, number))
        for os_ in itertools.combinations(range(number), min(queries, number))
    )
    assert sum(terms[q, o] for q, o in zip(found_queries, found_objects, strict=True)) == pytest.approx(best, abs=1e-4)


def dimaskdino_costs(prediction, target):
    """Class, box and GIoU costs, one pair at a time from their definitions: an oracle for small sizes."""
    total = {}
    for q, o in itertools.product(range(prediction["logits"].shape[1]), range(len(target["labels"]))):
        p = prediction["logits"][0, q].double().sigmoid()[target["labels"][o]]
        focal = 0.25 * (1 - p) ** 2 * -torch.log(p) - 0.75 * p**2 * -torch.log(1 - p)
        a, b = prediction["boxes"][0, q], target["boxes"][o]
        corners = [torchvision.ops.box_convert(x[None], "cxcywh", "xyxy") for x in (a, b)]
        giou = torchvision.ops.generalized_box_iou(*corners)[0, 0]
        total[q, o] = float(4 * focal + 5 * (a - b).abs().sum() - 2 * giou)
    return total


@pytest.mark.parametrize("part", ["logits", "boxes", "masks"])
def test_a_prediction_that_is_not_finite_is_reported_with_its_name_set_and_image(part):
    targets = objects(2, 1)
    prediction = perfect(targets, 4, 5)
    prediction[part][1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match=f"predicted {part}, in set 3, image 1"):
        Criterion(TRAINING).match({"3": prediction}, targets)


def test_a_target_that_is_not_finite_is_reported():
    targets = objects(2, 1)
    prediction = perfect(targets, 4, 5)
    targets[0]["boxes"][1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="target's boxes, in set 0, image 0"):
        Criterion(TRAINING).match({"0": prediction}, targets)


# ---- Denoising queries -----------------------------------------------------------------------------------------------


@law
@given(st.lists(st.integers(0, 7), min_size=1, max_size=3), st.integers(0, 20))
def test_denoising_fills_as_many_groups_as_fit_and_leaves_other_slots_empty(counts, queries):
    targets = objects(*counts)
    denoising = denoising_queries(targets, 5, queries)
    groups = queries // max(counts) if max(counts) else 0
    assert denoising.groups == groups and denoising.labels.shape == (len(counts), groups * max(counts))
    assert (denoising.labels >= 0).sum(1).tolist() == [n * groups for n in counts]


def test_without_noise_denoising_queries_are_the_objects():
    targets = objects(2, 3)
    denoising = denoising_queries(targets, 5, queries=6, label_noise=0, box_noise=0)
    assert denoising.labels.tolist() == [[*targets[0]["labels"], -1] * 2, [*targets[1]["labels"]] * 2]
    close(denoising.boxes_logit[1, 3:].sigmoid(), targets[1]["boxes"], 1e-5)


def test_box_noise_moves_centres_by_up_to_a_fifth_and_sizes_by_up_to_two_fifths_of_the_size():
    targets = objects(1)
    boxes = denoising_queries(targets, 5, queries=2000).boxes_logit[0].sigmoid()
    moved = (boxes - targets[0]["boxes"]).abs() / targets[0]["boxes"][:, 2:].repeat(1, 2)
    assert moved.amax(0).tolist() == pytest.approx([0.2, 0.2, 0.4, 0.4], rel=0.02)  # 2,000 uniform draws come that near


@pytest.mark.parametrize("given, share, near", [({}, 0.2, 0.03), ({"label_noise": 0.5}, 0.5, 0.04)])
def test_a_fifth_of_the_labels_is_redrawn_or_as_many_as_asked_for(given, share, near):
    targets = objects(1)
    labels = denoising_queries(targets, 1000, queries=4000, **given).labels
    assert (labels != targets[0]["labels"][0]).float().mean().item() == pytest.approx(share, abs=near)  # 5 sigma


@torch.no_grad()
def test_denoising_groups_see_neither_each_other_nor_are_they_seen():
    model, images = build(), pictures(1, 3, 64, 64)
    first = Denoising(torch.tensor([[1, 2, 3, 4]]), torch.zeros(1, 4, 4), groups=2)
    other = Denoising(torch.tensor([[1, 2, 0, 0]]), torch.tensor([[[0.0] * 4] * 2 + [[1.0] * 4] * 2]), groups=2)
    a, b, none = model(images, first), model(images, other), model(images)
    for name in ("logits", "boxes", "masks"):
        close(a["denoising"][-1][name][:, :2], b["denoising"][-1][name][:, :2])
        assert not torch.equal(a["denoising"][-1][name][:, 2:], b["denoising"][-1][name][:, 2:])
        close(a[name], none[name])


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [{}, {**RELEASED, "guiding_tokens": 3}], ids=["paper", "released"])
@torch.no_grad()
def test_bf16_autocast_stays_near_fp32(preset):
    # Untrained weights rank tokens almost at random, so the comparison keeps all tokens: 340 of them at 128x128. In a
    # smaller image the coarsest level is one pixel, where GroupNorm turns two nearly equal channels into 1 and -1.
    model, images = build(selection=(340, 340), **preset), pictures(2, 3, 128, 128)
    exact = model(images, trace=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images, trace=True)
    order = [x["trace"]["index_2"].argsort() for x in (exact, rounded)]
    for name in ("logits", "boxes"):
        a, b = (x[name][torch.arange(2)[:, None], o] for x, o in zip((exact, rounded), order, strict=True))
        # bf16 keeps 8 bits: 0.4 % at each of some twenty roundings on the way, of values with unit deviation
        assert (a - b).abs().mean() < 0.02 * max(1, a.std().item()) and b.dtype == torch.float32


@torch.no_grad()
def test_the_model_exports_to_one_graph_for_any_batch_and_multiples_of_32_from_96_on():
    model, sizes = build(), {0: torch.export.Dim("batch", max=16)}
    sizes |= {place: 32 * torch.export.Dim(name, min=3, max=64) for place, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(model, (pictures(2, 3, 96, 128).float(),), dynamic_shapes=(sizes,)).module()
    for shape in ((1, 3, 128, 96), (3, 3, 96, 160)):
        images = pictures(*shape).float()
        for name in ("logits", "boxes", "masks"):
            close(program(images)[name], model(images)[name])


def test_the_model_compiles_to_one_graph_in_training():
    model, images, targets = build().train(), pictures(1, 3, 64, 96), objects(2, size=(64, 96))
    denoising = denoising_queries(targets, 5, 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # the graph alone: no compiler, so no minutes
    assert len(compiled(images, denoising)["denoising"]) == 1 + model.config.decoder_layers


# ---- From predictions to objects -------------------------------------------------------------------------------------


def hand_made_outputs():
    """Two queries on an image of 48x64 padded to 64x64: query 1 is a class-2 object at its left half, 0 is nothing."""
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, 1, 2] = 2.0
    masks = torch.full((1, 2, 16, 16), -8.0)
    masks[0, 1, :, :8] = 8.0
    return {"logits": logits, "boxes": torch.tensor([[[0.5, 0.5, 1, 1], [0.25, 0.375, 0.5, 0.75]]]), "masks": masks}


def test_postprocess_maps_boxes_and_masks_from_the_padded_input_to_the_output():
    (found,) = postprocess(hand_made_outputs(), [(48, 64)], [(96, 128)], top=1)
    assert found["labels"].tolist() == [2] and found["masks"].shape == (1, 96, 128)
    close(found["boxes"], torch.tensor([[0.0, 0.0, 64.0, 96.0]]))
    expected = torch.arange(128).expand(96, -1) < 64
    assert torch.equal(found["masks"][0], expected)
    assert 0.85 < found["scores"].item() < torch.tensor(2.0).sigmoid()  # class score times the mask's certainty


@law
@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 70), st.integers(1, 70))
def test_postprocess_gives_the_best_of_all_classes_best_first_at_any_output_size(queries, top, height, width):
    torch.manual_seed(0)
    logits, boxes, masks = torch.randn(1, queries, 7), torch.rand(1, queries, 4), torch.randn(1, queries, 8, 8)
    outputs = {"logits": logits, "boxes": boxes, "masks": masks}
    (found,) = postprocess(outputs, [(20, 30)], [(height, width)], top)
    assert len(found["scores"]) == min(top, queries * 7)
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
    assert found["masks"].shape == (len(found["scores"]), height, width) and found["masks"].dtype == torch.bool


def test_an_empty_mask_scores_zero():
    outputs = hand_made_outputs()
    outputs["masks"][:] = -8.0
    assert not postprocess(outputs, [(48, 64)], [(48, 64)])[0]["scores"].any()


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
