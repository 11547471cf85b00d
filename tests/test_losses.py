"""What losses.py promises: matching, every term of the loss, denoising queries (appendix B: as in MaskDINO)."""

import itertools
import math

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
from losses import Criterion, Denoising, denoising_queries, giou, mask_costs
from small_models import TRAINING, build, close, factors_of, law, objects, pictures, step
from train import Recipe

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


def test_the_losses_have_the_weights_of_maskdino():
    assert Criterion(Recipe()).weights == {"class": 4, "box": 5, "giou": 2, "mask": 5, "dice": 5}


def losses_of(prediction, targets, num_objects=None, denoising=None, **others):
    outputs = {**prediction, "layers": [prediction], "selection": prediction, "interaction": [], "denoising": []}
    terms = Criterion(TRAINING)(outputs | others, targets, num_objects, denoising)
    return {name: value.item() for name, value in terms.items()}


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


@pytest.fixture
def inside(monkeypatch):
    """Masks are compared at ten points that are not near the border, beyond which there is nothing."""
    monkeypatch.setattr(Criterion, "uncertain_points", lambda _, masks: torch.rand(len(masks), 10, 2) / 2 + 0.25)


def test_dice_of_an_object_that_fills_the_image_is_as_by_hand(inside):
    prediction, targets = one_pair()
    targets[0]["masks"][:] = True  # and predicted half everywhere
    assert losses_of(prediction, targets)["dice_0"] == pytest.approx(5 * (1 - (2 * 5 + 1) / (5 + 10 + 1)))


def test_masks_are_multiplied_in_their_own_type_under_autocast(inside):
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
    targets = whole_cells(objects(2, 1))
    best = perfect(targets, 4, 5)
    wrong = best | {"logits": -1e4 * best["logits"], "boxes": 1 - best["boxes"], "pixels": -1e4 * best["pixels"]}
    assert Criterion(TRAINING).costs({"0": wrong}, targets).isfinite().all()
    assert all(math.isfinite(value) for value in losses_of(wrong, targets).values())


@pytest.mark.parametrize("logit, present, absent", [(2.0, 1 / 4, 3 / 4), (-1.0, 1 / 4, 3 / 4)])
def test_the_class_loss_is_focal_with_alpha_a_quarter_and_gamma_2(logit, present, absent):
    prediction, targets = one_pair()
    prediction["logits"] = torch.tensor([[[logit, logit]]])
    p = 1 / (1 + math.exp(-logit))
    focal = present * (1 - p) ** 2 * -math.log(p) + absent * p**2 * -math.log(1 - p)
    assert losses_of(prediction, targets)["class_0"] == pytest.approx(4 * focal, rel=1e-5)


def test_denoising_losses_are_divided_by_objects_and_groups():
    prediction, targets = one_pair()
    for groups in (1, 3):
        noised = {name: x if name == "pixels" else x.repeat(1, groups, 1) for name, x in prediction.items()}
        denoising = denoising_queries(targets, 2, groups)
        outputs = {**prediction, "layers": [prediction], "selection": prediction, "interaction": []}
        terms = Criterion(TRAINING)({**outputs, "denoising": [noised]}, targets, denoising=denoising)
        for term in ("class", "box", "giou", "mask", "dice"):
            close(terms[f"{term}_denoising_0"], terms[f"{term}_0"], 1e-5)


def test_mask_points_are_drawn_where_the_mask_is_least_certain():
    ramp = torch.linspace(-1, 1, 256).expand(1, 64, 256)  # logits rise from left to right
    x, y = Criterion(Recipe(mask_points=8000)).uncertain_points(ramp)[0].unbind(-1)
    # Of 24,000 candidates the 6,000 nearest to the middle, within a quarter of it (a mask fades at the upper and the
    # lower border, where a few more are), and 2,000 anywhere.
    assert (x[:6000].abs() < 0.27).float().mean() > 0.98 and x[:6000].abs().mean() == pytest.approx(0.125, abs=0.01)
    assert x[6000:].abs().mean() == pytest.approx(0.5, abs=0.03) and y.abs().mean() == pytest.approx(0.5, abs=0.03)
    assert len(x) == 8000 and x[6000:].min() < -0.98 and x[6000:].max() > 0.98


def test_matching_compares_masks_too():
    targets = whole_cells(objects(2))
    prediction = perfect(targets, 2, 5)
    prediction["logits"][:], prediction["boxes"][:] = 0.0, 0.5  # only masks tell the queries apart
    prediction["pixels"] = prediction["pixels"].flip(1)
    ((queries, found),) = Criterion(TRAINING).match({"0": prediction}, targets)["0"]
    assert queries.tolist() == [0, 1] and found.tolist() == [1, 0]


def test_every_stage_is_trained_by_every_loss_it_has():
    terms = step(build(), pictures(1, 3, 64, 64), objects(2))
    sets = ["selection", "interaction_0", "interaction_1", *"0123", *(f"denoising_{i}" for i in range(4))]
    terms_of = ["class", "box", "giou", "mask", "dice"]
    no_masks = {f"{loss}_interaction_{i}" for loss in ("mask", "dice") for i in (0, 1)}
    assert terms.keys() == {f"{loss}_{s}" for s in sets for loss in terms_of} - no_masks


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


@torch.no_grad()
def test_losses_and_costs_do_not_depend_on_the_portions_of_masks(monkeypatch):
    model, targets = build(), objects(2, 3)
    outputs = model(pictures(2, 3, 64, 64))

    def computed():
        torch.manual_seed(0)
        costs = Criterion(TRAINING).costs(dict(enumerate(outputs["layers"])), targets)
        return torch.stack([*Criterion(TRAINING)(outputs, targets).values(), *costs.flatten()])

    together = computed()
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


def whole_cells(targets):
    """The same targets with masks that are whole cells of 4x4 pixels."""
    for t in targets:
        t["masks"] = torch.kron(nn.functional.max_pool2d(t["masks"].float(), 4), torch.ones(4, 4)).bool()
    return targets


def test_perfect_predictions_are_matched_and_cost_almost_nothing():
    torch.manual_seed(0)
    targets, criterion = whole_cells(objects(2, 3)), Criterion(TRAINING)
    best = perfect(targets, 6, 5)
    for (queries, found), n in zip(criterion.match({"0": best}, targets)["0"], (2, 3)):
        assert queries.tolist() == found.tolist() == list(range(n))

    def cost(prediction):
        return criterion(
            {**best, "layers": [prediction], "selection": best, "interaction": [], "denoising": []}, targets
        )

    right, inverted = cost(best), cost({**best, "pixels": -best["pixels"]})
    assert max(right["class_0"], right["box_0"], right["giou_0"]) < 1e-4
    # Masks cost a little where a point falls between two cells; three in four points are chosen there.
    assert right["mask_0"] < 1 < 50 < inverted["mask_0"] and right["dice_0"] < 1 < 4 < inverted["dice_0"]


@law
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_hungarian_matching_has_the_least_class_box_and_giou_cost(number, queries, seed):
    torch.manual_seed(seed)
    target, criterion = objects(number, seed=seed)[0], Criterion(TRAINING)
    prediction = {"logits": torch.randn(1, queries, 5), "boxes": torch.rand(1, queries, 4) * 0.5 + 0.2}
    ((found_queries, found_objects),) = criterion.match({"0": prediction}, [target])["0"]
    terms, costs = costs_by_definition(prediction, target), criterion.costs({"0": prediction}, [target])[0]
    assert all(costs[pair].item() == pytest.approx(cost, abs=1e-4) for pair, cost in terms.items())
    best = min(
        sum(terms[q, o] for q, o in zip(qs, os_, strict=True))
        for qs in itertools.permutations(range(queries), min(queries, number))
        for os_ in itertools.combinations(range(number), min(queries, number))
    )
    assert sum(terms[q, o] for q, o in zip(found_queries, found_objects, strict=True)) == pytest.approx(best, abs=1e-4)


def costs_by_definition(prediction, target):
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


@torch.no_grad()
def test_masks_in_half_precision_are_matched_at_nearly_the_same_cost():
    targets, output, costs = objects(2, 3), build()(pictures(2, 3, 64, 64)), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        factors = {name: output[name].to(dtype) for name in ("mask_embedding", "pixels")}
        costs.append(Criterion(TRAINING).costs({"0": output | factors}, targets))
    assert (costs[0] - costs[1]).abs().mean() < 0.004 * costs[0].abs().mean()  # bf16 keeps 8 bits


def test_the_mask_cost_of_a_pair_is_its_cross_entropy_and_its_dice():
    logits, inside = torch.randn(1, 3, 20), torch.rand(1, 2, 20)
    costs = mask_costs(logits, inside)[0]
    for q, o in itertools.product(range(3), range(2)):
        p, t = logits[0, q].sigmoid(), inside[0, o]
        entropy = nn.functional.binary_cross_entropy(p, t)
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)  # smoothed by 1
        close(costs[q, o], 5 * entropy + 5 * dice, 1e-5)


@pytest.mark.parametrize("part", ["logits", "boxes", "masks"])
def test_a_prediction_that_is_not_finite_is_named_with_set_and_image(part):
    targets = objects(2, 1)
    prediction = perfect(targets, 4, 5)
    prediction["mask_embedding" if part == "masks" else part][1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match=f"predicted {part}, in set 3, image 1"):
        Criterion(TRAINING).match({"3": prediction}, targets)


@pytest.mark.parametrize(
    "wrong, source",
    [
        ({"logits": torch.nan}, "predicted logits"),
        ({"boxes": -torch.inf}, "predicted boxes"),
        ({"boxes": torch.nan, "logits": torch.inf}, "predicted logits and predicted boxes"),
        ({"boxes": 1e30}, "the cost itself"),  # whose square is not finite
    ],
)
def test_so_is_one_without_masks_of_an_image_without_an_id(wrong, source):
    targets = [{name: x for name, x in target.items() if name != "image_id"} for target in objects(2, 1)]
    prediction = {name: perfect(targets, 4, 5)[name] for name in ("logits", "boxes")}
    for part, value in wrong.items():
        prediction[part][1, 2] = value
    with pytest.raises(FloatingPointError) as error:
        Criterion(TRAINING).match({"7": prediction}, targets)
    assert str(error.value) == f"matching met a number that is not finite: {source}, in set 7, image 1"


def test_an_image_is_reported_by_its_id():
    targets = objects(2, 1)
    targets[1]["image_id"] = 4711
    prediction = perfect(targets, 4, 5)
    prediction["boxes"][1] = torch.nan
    with pytest.raises(FloatingPointError, match="image 4711$"):
        Criterion(TRAINING).match({"0": prediction}, targets)


def test_a_target_that_is_not_finite_is_reported():
    targets = objects(2, 1)
    prediction = perfect(targets, 4, 5)
    targets[0]["boxes"][1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="target's boxes, in set 0, image 0"):
        Criterion(TRAINING).match({"0": prediction}, targets)


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
    assert {x.device.type for x in made} == {"cuda"}


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
        size = max(len(t["labels"]) for t in targets)
        pairs = []
        for target in targets:  # slot j of every group is object j
            objects = np.tile(np.arange(len(target["labels"])), denoising.groups)
            groups = np.repeat(np.arange(denoising.groups), len(target["labels"]))
            pairs.append((groups * size + objects, objects))
        divisor = number * max(denoising.groups, 1)
        terms |= losses_of_set(criterion, f"denoising_{i}", prediction, targets, pairs, divisor)
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
            sums["mask"] += (
                nn.functional.binary_cross_entropy_with_logits(logits, inside, reduction="none").mean(1).sum()
            )
            p = logits.sigmoid()
            sums["dice"] += (1 - (2 * (p * inside).sum(1) + 1) / (p.sum(1) + inside.sum(1) + 1)).sum()
    return {f"{term}_{name}": criterion.weights[term] * value / divisor for term, value in sums.items()}


@pytest.mark.parametrize("counts", [(2, 3), (0, 3), (0, 0), (1, 1), (10, 2), (14, 0)], ids=str)
@pytest.mark.parametrize("pixel_tokens", ["T_i", "T_bal"])
def test_the_criterion_equals_the_plain_loop_over_the_sets(counts, pixel_tokens, monkeypatch):
    def points(*size, device=None):  # the same for every mask, so that the order of drawing does not matter
        return torch.linspace(0.1, 0.9, size[-2] * 2).view(-1, 2).expand(size).clone()

    model = build(pixel_tokens=pixel_tokens).train()
    targets = objects(*counts)
    denoising = denoising_queries(targets, 5, 9)
    outputs = model(pictures(2, 3, 64, 64), denoising)
    monkeypatch.setattr(torch, "rand", points)
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
    denoising = denoising_queries(targets, 5, queries)
    groups = queries // max(counts) if max(counts) else 0
    assert denoising.groups == groups and denoising.labels.shape == (len(counts), groups * max(counts))
    assert (denoising.labels >= 0).sum(1).tolist() == [n * groups for n in counts]


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
def test_a_fifth_of_the_labels_is_redrawn_or_as_many_as_asked_for(given, share, near):
    targets = objects(1)
    labels = denoising_queries(targets, 1000, queries=4000, **given).labels
    assert (labels != targets[0]["labels"][0]).float().mean().item() == pytest.approx(share, abs=near)  # 5 sigma


def test_redrawn_labels_are_of_any_class():
    labels = denoising_queries(objects(1), 5, queries=500, label_noise=1).labels
    assert set(labels[0].tolist()) == {0, 1, 2, 3, 4}


def test_noised_boxes_stay_in_the_image():
    targets = objects(1)
    targets[0]["boxes"] = torch.tensor([[0.05, 0.9, 0.9, 0.9]])
    logits = denoising_queries(targets, 5, queries=1000).boxes_logit
    assert logits.isfinite().all() and logits.sigmoid().min() < 1e-4 and logits.sigmoid().max() > 1 - 1e-4  # clamped


def test_denoising_queries_move_to_a_device_together():
    denoising = denoising_queries(objects(2, 3), 5, 9)
    labels, boxes, groups, pairs = denoising.to("meta")
    assert labels.device == boxes.device == torch.device("meta")
    assert groups == denoising.groups and pairs is denoising.pairs
    assert (labels.shape, boxes.shape) == (denoising.labels.shape, denoising.boxes_logit.shape)


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
def test_denoising_queries_see_the_queries_that_are_matched():
    model, T_s2, box = build(), torch.rand(1, 6, 32), torch.rand(1, 6, 4)
    denoising = Denoising(torch.tensor([[1, 2]]), torch.zeros(1, 2, 4), groups=1, pairs=[])
    Q, _, attn_mask, D = model.with_denoising(denoising, T_s2, box)
    other, *_ = model.with_denoising(denoising, T_s2 + torch.rand(32), box)
    a, b = (model.residual.self_attention(x, x, x, x, attn_mask)[:, :D] for x in (Q, other))
    assert D == 2 and (a != b).any(-1).all()


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
    other = Denoising(
        torch.tensor([[1, 2, 0, 0]]), torch.tensor([[[0.0] * 4] * 2 + [[1.0] * 4] * 2]), groups=2, pairs=[]
    )
    a, b, none = model(images, first), model(images, other), model(images)
    for name in ("logits", "boxes", "mask_embedding"):
        close(a["denoising"][-1][name][:, :2], b["denoising"][-1][name][:, :2])
        assert not torch.equal(a["denoising"][-1][name][:, 2:], b["denoising"][-1][name][:, 2:])
        close(a[name], none[name])
