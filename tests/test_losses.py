"""What losses.py promises: matching, every term of the loss, denoising queries (appendix B: as in MaskDINO)."""

import dataclasses
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import losses
from dimaskdino import mask_logits
from losses import Criterion, Denoising, denoising_queries, giou, random_points, smallest
from small_models import TRAINING, build, close, factors_of, law, objects, pictures, step
from train import Recipe

# ---- Losses ----------------------------------------------------------------------------------------------------------


COUNTS = [(2, 3), (0, 3), (0, 0), (1, 0), (1, 1), (10, 2), (14, 0)]  # more than denoising slots, more than queries


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_gradients_are_finite_and_reach_all_for_any_number_of_objects(counts):
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


def points_on_a_line(number, points, device):
    """The same points for every mask, whatever is drawn before it."""
    return torch.linspace(-0.8, 0.8, 2 * points).view(1, points, 2).repeat(number, 1, 1)


same_points = mock.patch.object(losses, "random_points", points_on_a_line)


def losses_of(prediction, targets):
    stages = {"layers": [prediction], "selection": prediction, "interaction": [], "denoising": []}
    return {name: value.item() for name, value in Criterion(TRAINING)(prediction | stages, targets).items()}


def test_the_losses_have_the_weights_of_maskdino():
    assert Criterion(Recipe()).weights == {"class": 4, "box": 5, "giou": 2, "mask": 5, "dice": 5}


def one_pair():
    """A query that knows nothing, beside an object without a pixel."""
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.7, 0.5, 0.2, 0.4]])}
    target["masks"] = torch.zeros(1, 32, 32, dtype=torch.bool)
    boxes = torch.tensor([[[0.3, 0.5, 0.2, 0.2]]])
    return {"logits": torch.zeros(1, 1, 2), "boxes": boxes} | factors_of(torch.zeros(1, 1, 8, 8)), [target]


def test_every_term_of_one_pair_is_as_by_hand():
    terms = losses_of(*one_pair())
    # Focal: alpha 1/4 of the class that is there, 3/4 of the other, each times (1/2)^2 ln 2.
    assert terms["class_0"] == pytest.approx(4 * (1 / 4 + 3 / 4) / 4 * math.log(2))
    assert terms["box_0"] == pytest.approx(5 * (0.4 + 0.2))
    # GIoU: boxes of 0.04 and 0.08 that do not meet, in a hull of 0.24.
    assert terms["giou_0"] == pytest.approx(2 * (1 + (0.24 - 0.12) / 0.24), rel=1e-4)
    assert terms["mask_0"] == pytest.approx(5 * math.log(2))
    assert terms["dice_0"] == pytest.approx(5 * (1 - 1 / (TRAINING.mask_points / 2 + 1)))  # smoothed by 1


def test_masks_are_multiplied_in_their_own_type_under_autocast(monkeypatch):
    def inner(_, masks):  # outside of a mask is nothing
        return torch.rand(len(masks), TRAINING.mask_points, 2) / 2 + 0.25

    monkeypatch.setattr(Criterion, "uncertain_points", inner)
    prediction, targets = one_pair()
    prediction["mask_embedding"] = torch.full((1, 1, 2), 0.5)
    prediction["pixels"] = torch.full((1, 2, 8, 8), 1.001)  # 1 in bf16
    with torch.autocast("cpu", torch.bfloat16):
        terms = losses_of(prediction, targets)
    assert terms["mask_0"] == pytest.approx(5 * math.log1p(math.exp(1.001)), rel=1e-5)


def test_giou_is_torchvisions_but_for_a_millionth_in_both_divisors():
    a, b = (torchvision.ops.box_convert(torch.rand(50, 4), "cxcywh", "xyxy") for _ in range(2))
    close(giou(a, b), torchvision.ops.generalized_box_iou(a, b).diagonal(), 1e-4)  # areas are hundredths: 1e-6 of them
    tiny, corner = torch.tensor([0, 0, 1e-3, 1e-3]), torch.tensor([1e-3, 1e-3, 1e-3, 1e-3])
    assert giou(tiny, tiny).item() == pytest.approx(1 / 2)
    assert giou(torch.zeros(4), corner).item() == pytest.approx(-1 / 2)


def test_certain_and_wrong_predictions_have_finite_costs_and_losses():
    targets = objects(2, 1)
    best = perfect(targets, 4, 5)
    wrong = best | {"logits": -1e4 * best["logits"], "boxes": 1 - best["boxes"], "pixels": -1e4 * best["pixels"]}
    assert Criterion(TRAINING).costs({"0": wrong}, targets).isfinite().all()
    assert all(math.isfinite(value) for value in losses_of(wrong, targets).values())


def test_mask_points_are_drawn_where_the_mask_is_least_certain():
    ramp = torch.linspace(-1, 1, 256).expand(1, 64, 256)  # logits rise from left to right
    x, y = Criterion(Recipe(mask_points=8000)).uncertain_points(ramp)[0].unbind(-1)
    # Of 24,000 candidates the 6,000 nearest to the middle, within a quarter of it (a mask fades at the upper and the
    # lower border, where a few more are), and 2,000 anywhere.
    assert (x[:6000].abs() < 0.27).float().mean() > 0.98 and x[:6000].abs().mean() == pytest.approx(0.125, abs=0.01)
    assert x[6000:].abs().mean() == pytest.approx(0.5, abs=0.03) and y.abs().mean() == pytest.approx(0.5, abs=0.03)
    assert len(x) == 8000 and x[6000:].min() < -0.98 and x[6000:].max() > 0.98


def test_random_points_are_uniform_and_independent():
    torch.manual_seed(0)
    points = random_points(2, 50_001, "cpu").double()  # an odd number: two points come from one random number
    assert points.shape == (2, 50_001, 2) and -1 <= points.min() < -0.9999 and 0.9999 < points.max() < 1
    series = torch.cat([*points.unbind(2), points[:, :, 0].roll(1, 1), points[:, :, 1].roll(2, 1)])
    assert series.mean(1).abs().max() < 0.01 and (series.var(1) - 1 / 3).abs().max() < 0.005
    assert (series.corrcoef() - torch.eye(len(series))).abs().max() < 0.02  # 4 sigma
    cells, _ = np.histogramdd(points.flatten(0, 1).numpy(), 16, [(-1, 1)] * 2)
    assert np.square(cells - cells.mean()).sum() / cells.mean() < 350  # chi squared: 255 +- 23


@law
@given(st.integers(1, 4), st.integers(2, 40), st.floats(0, 1), st.integers(0, 4))
def test_the_smallest_are_as_many_as_asked_for_with_ties(rows, width, share, values):
    values = torch.randint(0, values + 1, (rows, width)).float()
    number = int(share * (width - 1))
    index = smallest(values, number)
    assert index.shape == (rows, number) and all(len(set(row)) == number for row in index.tolist())
    assert torch.equal(values.gather(1, index).sort().values, values.sort().values[:, :number])


@same_points
@torch.no_grad()
def test_losses_are_divided_by_the_number_of_objects_that_is_given():
    targets = objects(2, 3)
    outputs = build()(pictures(2, 3, 64, 64))
    own = Criterion(TRAINING)(outputs, targets)
    for name, value in Criterion(TRAINING)(outputs, targets, num_objects=10).items():
        close(value * 2, own[name], 1e-6)


@same_points
@torch.no_grad()
def test_losses_and_costs_do_not_depend_on_what_is_computed_at_a_time(monkeypatch):
    targets = objects(2, 3)
    outputs = build()(pictures(2, 3, 64, 64))

    def computed():
        costs = Criterion(TRAINING).costs(dict(enumerate(outputs["layers"])), targets)
        return torch.stack([*Criterion(TRAINING)(outputs, targets).values(), *costs.flatten()])

    together = computed()
    monkeypatch.setattr(losses, "MOST_CANDIDATES", 2 * 3 * TRAINING.mask_points)  # those of two masks
    monkeypatch.setattr(losses, "MOST_LOGITS", 1)  # one query
    monkeypatch.setattr(losses, "MOST_PIXELS", 2 * 64 * 64)  # two objects
    close(computed(), together, 1e-5)


def perfect(targets, queries, classes):
    """Predictions that are the targets, the first objects first, and background."""
    size = [side // 4 for side in targets[0]["masks"].shape[1:]]
    logits, boxes = torch.full((len(targets), queries, classes), -20.0), torch.full((len(targets), queries, 4), 0.5)
    masks = torch.full((len(targets), queries, *size), -20.0)
    for b, target in enumerate(targets):
        n = len(target["labels"])
        logits[b, range(n), target["labels"]], boxes[b, :n] = 20.0, target["boxes"]
        masks[b, :n] = nn.functional.max_pool2d(target["masks"].float(), 4) * 40 - 20
    return {"logits": logits, "boxes": boxes} | factors_of(masks)


def test_perfect_predictions_cost_almost_nothing():
    torch.manual_seed(0)
    targets = objects(2, 3)
    for target in targets:  # whole cells of 4x4 pixels
        target["masks"] = torch.kron(nn.functional.max_pool2d(target["masks"].float(), 4), torch.ones(4, 4)).bool()
    best = perfect(targets, 6, 5)
    right, inverted = losses_of(best, targets), losses_of({**best, "pixels": -best["pixels"]}, targets)
    assert max(right["class_0"], right["box_0"], right["giou_0"]) < 1e-4
    # Masks cost a little where a point falls between two cells; three in four points are chosen there.
    assert right["mask_0"] < 1 < 50 < inverted["mask_0"] and right["dice_0"] < 1 < 4 < inverted["dice_0"]


@same_points
@law
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([16, 48, 51, 192]))
def test_hungarian_matching_has_the_least_cost(number, queries, seed, points):
    torch.manual_seed(seed)
    target = objects(number, seed=seed)[0]
    prediction = {"logits": torch.randn(1, queries, 5), "boxes": torch.rand(1, queries, 4) * 0.5 + 0.2}
    prediction |= factors_of(10 * torch.randn(1, queries, 16, 16))
    criterion = Criterion(dataclasses.replace(TRAINING, mask_points=points))
    criterion.uncertain_points = lambda masks: points_on_a_line(len(masks), points, None)
    terms = costs_by_definition(criterion, prediction, target)
    costs = criterion.costs({"0": prediction}, [target])[0]
    assert all(costs[pair].item() == pytest.approx(cost, abs=1e-4) for pair, cost in terms.items())
    best = min(
        sum(terms[pair] for pair in zip(qs, os_))
        for qs in itertools.permutations(range(queries), min(queries, number))
        for os_ in itertools.combinations(range(number), min(queries, number))
    )
    ((found_queries, found_objects),) = criterion.match({"0": prediction}, [target])["0"]
    assert sum(terms[pair] for pair in zip(found_queries, found_objects)) == pytest.approx(best, abs=1e-4)


def costs_by_definition(criterion, prediction, target):
    """Matching costs, one pair at a time: that of the class, and the other losses of the pair."""
    costs = {}
    for q, o in itertools.product(range(prediction["logits"].shape[1]), range(len(target["labels"]))):
        p = prediction["logits"][0, q].double().sigmoid()[target["labels"][o]]
        focal = 0.25 * (1 - p) ** 2 * -torch.log(p) - 0.75 * p**2 * -torch.log(1 - p)
        pair = losses_of_set(criterion, "0", prediction, [target], [([q], [o])], 1)
        others = pair["box_0"] + (pair["giou_0"] - 2) + pair["mask_0"] + pair["dice_0"]  # -GIoU instead of 1 - GIoU
        costs[q, o] = float(4 * focal + others)
    return costs


@torch.no_grad()
def test_masks_in_half_precision_are_matched_at_nearly_the_same_cost():
    targets, output, costs = objects(2, 3), build()(pictures(2, 3, 64, 64)), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        factors = {name: output[name].to(dtype) for name in ("mask_embedding", "pixels")}
        costs.append(Criterion(TRAINING).costs({"0": output | factors}, targets))
    assert (costs[0] - costs[1]).abs().mean() < 0.004 * costs[0].abs().mean()  # bf16 keeps 8 bits


@pytest.mark.parametrize(
    "wrong, source",
    [
        ({"logits": torch.nan}, "predicted logits"),
        ({"boxes": -torch.inf}, "predicted boxes"),
        ({"boxes": torch.nan, "logits": torch.inf}, "predicted logits and predicted boxes"),
        ({"boxes": 1e30}, "the cost itself"),  # whose square is not finite
        ({"mask_embedding": torch.nan}, "predicted masks"),
    ],
)
@pytest.mark.parametrize("masks", [True, False])
def test_what_is_not_finite_is_named_with_its_set_and_image(wrong, source, masks):
    targets = [{name: x for name, x in target.items() if name != "image_id"} for target in objects(2, 1)]
    prediction = perfect(targets, 4, 5)
    for part, value in wrong.items():
        prediction[part][1, 2] = value
    if not masks and "mask_embedding" not in wrong:
        del prediction["mask_embedding"], prediction["pixels"]
    with pytest.raises(FloatingPointError) as error:
        Criterion(TRAINING).match({"7": prediction}, targets)
    assert str(error.value) == f"matching met a number that is not finite: {source}, in set 7, image 1"


def test_a_target_that_is_not_finite_is_named_with_the_id_of_its_image():
    targets = objects(2, 1)
    targets[0]["boxes"][1, 0] = torch.nan
    targets[0]["image_id"] = 4711
    with pytest.raises(FloatingPointError, match="target's boxes, in set 0, image 4711$"):
        Criterion(TRAINING).match({"0": perfect(objects(2, 1), 4, 5)}, targets)


def test_losses_and_denoising_queries_are_made_on_the_device_of_the_model(monkeypatch):
    pairs = [(np.arange(n), np.arange(n)) for n in (2, 3)]
    monkeypatch.setattr(Criterion, "match", lambda self, sets, targets: dict.fromkeys(sets, pairs))
    # Tensors without numbers: a GPU is not needed, and what mixes devices is refused.
    with FakeTensorMode(shape_env=ShapeEnv()):
        with torch.device("cuda"):
            targets = [
                {"labels": torch.zeros(n, dtype=int), "boxes": torch.zeros(n, 4), "masks": torch.zeros(n, 64, 64) > 0}
                for n in (2, 3)
            ]
            parts = {"logits": (6, 5), "boxes": (6, 4), "mask_embedding": (6, 8), "pixels": (8, 16, 16)}
            prediction = {name: torch.zeros(2, *shape) for name, shape in parts.items()}
        stages = {"layers": [prediction], "selection": prediction, "interaction": [prediction], "denoising": []}
        terms = Criterion(TRAINING)({**prediction, **stages}, targets)
        costs = Criterion(TRAINING).costs({"0": prediction}, targets)
        denoising = denoising_queries(targets, 5, 9)
        made = [*terms.values(), costs, *denoising[:2], denoising.attention_mask(6)]
        moved = denoising.to("cpu")[:2]
    assert {x.device.type for x in made} == {"cuda"} and {x.device.type for x in moved} == {"cpu"}


# ---- The criterion as a plain loop, which is its specification -------------------------------------------------------


def criterion_by_sets(criterion, outputs, targets, denoising):
    """For each set of predictions, matching and the losses of its pairs, one after another."""
    number = max(sum(len(t["labels"]) for t in targets), 1)
    sets = {"selection": outputs["selection"]}
    sets |= {f"{i}": x for i, x in enumerate(outputs["layers"])}
    sets |= {f"interaction_{i}": x for i, x in enumerate(outputs["interaction"])}
    terms = {}
    for name, pairs in criterion.match(sets, targets).items():
        terms |= losses_of_set(criterion, name, sets[name], targets, pairs, number)
    for i, prediction in enumerate(outputs["denoising"]):
        divisor = number * max(denoising.groups, 1)
        terms |= losses_of_set(criterion, f"denoising_{i}", prediction, targets, denoising.pairs, divisor)
    return terms


def losses_of_set(criterion, name, prediction, targets, pairs, divisor):
    sums = dict.fromkeys(("class", "box", "giou") + (("mask", "dice") if "pixels" in prediction else ()), 0)
    for b, (target, (queries, found)) in enumerate(zip(targets, pairs)):
        classes = torch.zeros_like(prediction["logits"][b])
        classes[queries, target["labels"][found]] = 1
        sums["class"] += torchvision.ops.sigmoid_focal_loss(prediction["logits"][b], classes, reduction="sum")
        boxes = prediction["boxes"][b, queries]
        wanted = target["boxes"][found]
        sums["box"] += (boxes - wanted).abs().sum()
        corners = (torchvision.ops.box_convert(x, "cxcywh", "xyxy") for x in (boxes, wanted))
        sums["giou"] += (1 - giou(*corners)).sum()
        if "pixels" in prediction:
            masks = mask_logits(prediction, b, queries)
            points = criterion.uncertain_points(masks)
            logits = losses.sample(masks[:, None], points)[:, 0]
            inside = losses.sample(target["masks"][found][:, None].float(), points)[:, 0]
            bce = nn.functional.binary_cross_entropy_with_logits(logits, inside, reduction="none")
            sums["mask"] += bce.mean(1).sum()
            p = logits.sigmoid()
            sums["dice"] += (1 - (2 * (p * inside).sum(1) + 1) / (p.sum(1) + inside.sum(1) + 1)).sum()
    return {f"{term}_{name}": criterion.weights[term] * value / divisor for term, value in sums.items()}


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("pixel_tokens", ["T_i", "T_bal"])
@same_points
def test_the_criterion_equals_the_plain_loop_over_the_sets(counts, pixel_tokens):
    model = build(pixel_tokens=pixel_tokens).train()
    targets = objects(*counts)
    denoising = denoising_queries(targets, 5, 9)
    outputs = model(pictures(2, 3, 64, 64), denoising)
    ours = Criterion(TRAINING)(outputs, targets, denoising=denoising)
    plain = criterion_by_sets(Criterion(TRAINING), outputs, targets, denoising)
    assert ours.keys() == plain.keys()
    for name in ours:
        close(ours[name], torch.as_tensor(plain[name]), 1e-5)  # sums in another order
    sets = [outputs["selection"], *outputs["layers"], *outputs["interaction"], *outputs["denoising"]]
    predicted = [x for prediction in sets for x in prediction.values()]
    gradients = [
        torch.autograd.grad(sum(x.values()), predicted, retain_graph=True, allow_unused=True, materialize_grads=True)
        for x in (ours, plain)
    ]
    for a, b in zip(*gradients):  # 3e-7 here
        assert (a - b).norm() <= 2e-6 * b.norm()


# ---- Denoising queries -----------------------------------------------------------------------------------------------


@law
@given(st.lists(st.integers(0, 7), min_size=1, max_size=3), st.integers(0, 20))
def test_denoising_fills_as_many_groups_as_fit_and_leaves_the_rest_empty(counts, queries):
    targets = objects(*counts)
    denoising = denoising_queries(targets, 5, queries, label_noise=0)
    size = max(counts)
    groups = queries // size if size else 0
    assert denoising.groups == groups and denoising.labels.shape == (len(counts), groups * size)
    for n, target, labels, (slots, found) in zip(counts, targets, denoising.labels, denoising.pairs):
        # Slot j of every group is object j.
        assert sorted(zip(slots, found)) == [(group * size + j, j) for group in range(groups) for j in range(n)]
        assert labels[slots].tolist() == target["labels"][found].tolist()
        assert (labels >= 0).sum() == n * groups


def test_denoising_queries_are_a_hundred_unless_told_otherwise():
    assert denoising_queries(objects(1), 5).labels.shape == (1, 100)


def test_without_noise_denoising_queries_are_the_objects():
    targets = objects(2, 3)
    denoising = denoising_queries(targets, 5, queries=6, label_noise=0, box_noise=0)
    assert denoising.labels.tolist() == [[*targets[0]["labels"], -1] * 2, [*targets[1]["labels"]] * 2]
    close(denoising.boxes_logit[1, 3:].sigmoid(), targets[1]["boxes"], 1e-5)


def test_box_noise_moves_centres_by_a_fifth_and_sizes_by_two_fifths():
    targets = objects(1)
    boxes = denoising_queries(targets, 5, queries=2000).boxes_logit[0].sigmoid()
    moved = (boxes - targets[0]["boxes"]).abs() / targets[0]["boxes"][:, 2:].repeat(1, 2)
    assert moved.amax(0).tolist() == pytest.approx([0.2, 0.2, 0.4, 0.4], rel=0.02)  # 2,000 uniform draws come that near


@pytest.mark.parametrize("given, share, near", [({}, 0.2, 0.03), ({"label_noise": 0.5}, 0.5, 0.04)])
def test_a_fifth_of_the_labels_is_drawn_anew_or_as_many_as_asked_for(given, share, near):
    targets = objects(1)
    labels = denoising_queries(targets, 5, queries=4000, **given).labels
    other = (labels != targets[0]["labels"][0]).float().mean().item()
    assert other == pytest.approx(share * 4 / 5, abs=near)  # 5 sigma; a fifth gets its own label again
    assert set(labels[0].tolist()) == {0, 1, 2, 3, 4}


def test_noised_boxes_stay_in_the_image():
    targets = objects(1)
    targets[0]["boxes"] = torch.tensor([[0.05, 0.9, 0.9, 0.9]])
    logits = denoising_queries(targets, 5, queries=1000).boxes_logit
    assert logits.isfinite().all() and logits.sigmoid().min() < 1e-4 and logits.sigmoid().max() > 1 - 1e-4  # clamped


def test_the_attention_mask_hides_groups_from_each_other_and_from_queries():
    denoising = Denoising(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 4), groups=2, pairs=[])
    masked = [
        [0, 0, 1, 1, 0, 0],  # a group does not see the other group
        [0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],  # the queries that are matched see no group
        [1, 1, 1, 1, 0, 0],
    ]
    assert denoising.attention_mask(2).int().tolist() == masked


@torch.no_grad()
def test_an_empty_slot_holds_zeros_a_used_one_the_embedding_of_its_label():
    model = build()
    denoising = Denoising(torch.tensor([[0, -1]]), torch.tensor([[[0.0] * 4, [1.0] * 4]]), groups=1, pairs=[])
    Q, box, *_ = model.with_denoising(denoising, torch.rand(1, 6, 32), torch.rand(1, 6, 4))
    assert torch.equal(Q[0, :2], torch.stack((model.label_embed.weight[0], torch.zeros(32))))
    assert torch.equal(box[0, :2], denoising.boxes_logit[0].sigmoid())


@torch.no_grad()
def test_denoising_groups_see_neither_each_other_nor_are_they_seen():
    model, images = build(), pictures(1, 3, 64, 64)
    first = Denoising(torch.tensor([[1, 2, 3, 4]]), torch.zeros(1, 4, 4), groups=2, pairs=[])
    boxes_logit = torch.tensor([0.0, 0.0, 1.0, 1.0])[None, :, None].expand(1, 4, 4)
    other = Denoising(torch.tensor([[1, 2, 0, 0]]), boxes_logit, groups=2, pairs=[])
    a, b, none = model(images, first), model(images, other), model(images)
    for name in ("logits", "boxes", "mask_embedding"):
        close(a["denoising"][-1][name][:, :2], b["denoising"][-1][name][:, :2])
        assert not torch.equal(a["denoising"][-1][name][:, 2:], b["denoising"][-1][name][:, 2:])
        close(a[name], none[name])
