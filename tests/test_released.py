"""Config.released() and Config.maskdino() compute the numbers of the authors' code, given the same weights.

The arrays were recorded from the authors' code with made-up weights: see goldens/README.md. Arrays of tokens count from
the coarsest level there, from the finest here; selections are compared as sets, and what follows them query by query,
aligned by token. Tolerances are absolute, several times what the authors' code differs from itself between thread
counts; the root mean square has to stay within three times that difference (goldens/noise.json), or 1e-6.
"""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert

import dimaskdino
from deform_attn_cuda import deform_attn, deform_attn_pytorch
from dimaskdino import Config, DIMaskDINO, mask_logits, postprocess
from goldens import HERE, Recorded, numbers
from losses import Criterion, denoising_queries
from small_models import factors_of
from train import Recipe
from util.weights import COCO, coarse_to_fine, config_of, load_model, load_weights, translate

SEEDS = {"dimaskdino_r50": 26, "maskdino3s_r50": 29}
NOISE = json.loads((HERE / "noise.json").read_text())


@functools.cache
def released_weights(model):
    return numbers.weights(model, SEEDS[model])


@functools.cache
def released_model(model):
    weights = released_weights(model)
    filled = DIMaskDINO(config_of({"model": weights})).eval()
    load_weights(filled, weights)
    return filled


IMAGE = torch.from_numpy(numbers.image(256, 320, 200))


def their_tokens(golden):
    """Our token -> theirs."""
    start, shapes = golden["T_i_level_start"], golden["T_i_level_hw"]
    levels = [np.arange(s, s + h * w) for s, (h, w) in zip(start, shapes, strict=True)]
    return np.concatenate(levels[::-1])


class Run:
    """The recorded image through the model with the recorded run's weights."""

    def __init__(self, name, model, batch=1):
        self.golden, self.noise, self.model = Recorded(name), NOISE[name], released_model(model).eval()
        assert self.golden["weight_seed"] == SEEDS[model]
        self.seen, hooks = {}, []
        for part, module in self.model.named_modules():
            keep = lambda _, inputs, output, part=part: self.seen.setdefault(part, []).append(output)  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
        with torch.no_grad():
            # In a batch of two, the second image is another one: the first upside down.
            self.outputs = self.model(torch.stack((IMAGE, IMAGE.flip(1))[:batch]), trace=True)
        for hook in hooks:
            hook.remove()
        self.trace = self.outputs["trace"]
        self.theirs = their_tokens(self.golden)
        self.tokens = np.argsort(self.theirs)  # their token -> ours

    def align(self, ours, theirs):
        """Our rank of each of their selected tokens."""
        rank = {token: rank for rank, token in enumerate(self.theirs[ours[0].numpy()])}
        assert set(rank) == set(theirs[0].tolist()), "another set of tokens is selected"
        return [rank[token] for token in theirs[0]]

    def check(self, stages):
        """Compare stage after stage, so that the first one to part is the one that is named."""
        for name, tolerance, ours in stages:
            ours, theirs = self.golden.cut(name, ours), self.golden[name]
            difference = np.abs(ours - theirs)
            assert ours.shape == theirs.shape, f"{name} is the first to part: {ours.shape}, not {theirs.shape}"
            assert difference.max() <= tolerance, f"{name} is the first to part: by {difference.max():.2g}"
            if name in self.noise:
                limit = max(3 * self.noise[name], 1e-6)
                rms = np.sqrt((difference**2).mean())
                assert rms <= limit, f"{name} is the first to part: by {rms:.2g} in the mean, more than {limit:.2g}"


def features(run):
    backbone = run.seen["backbone"][0]
    for i, x in enumerate(backbone):
        yield f"backbone_res{i + 2}_meanstd", 1e-4, [x[:1].mean(), x[:1].std()]
        if f"backbone_res{i + 2}_slice" in run.golden:
            yield f"backbone_res{i + 2}_slice", 1e-4, x[:1, :: x.shape[1] // 16, ::4, ::4]


def stages_of_dimaskdino(run):
    g, t, seen, out, tokens = run.golden, run.trace, run.seen, run.outputs, run.tokens
    yield from features(run)
    for i in range(4):
        yield f"encoder_input_{i}_slice", 1e-4, seen[f"encoder.projections.{i}"][0][:1, ::16, ::2, ::2]
    yield "T_i", 3e-4, t["T_i"][:1, tokens]
    position = dimaskdino.sine_of_grid([tuple(x) for x in g["encoder_input_level_hw"].tolist()], 256, "cpu")
    yield "T_i_pos_slice", 1e-5, position[None, tokens, ::16]
    yield "mask_features_s2", 1e-4, seen["seg_head.embed"][0][:1, :, ::2, ::2]
    yield "T_i_transformed_slice", 3e-4, seen["transform"][0][:1, tokens, ::8]
    yield "sel1_scores_all", 4e-4, run.model.det_head.scores(seen["transform"][0])[:1, tokens].detach()

    first = run.align(t["index_1"], g["sel1_idx"])
    yield "sel1_scores", 4e-4, t["scores_1"][:1, first]
    yield "T_s1", 3e-4, t["T_s1"][:1, first]
    yield "interm_logits_q100", 1e-3, out["selection"]["logits"][:1, first]
    yield "interm_boxes", 5e-5, out["selection"]["boxes"][:1, first]
    yield "interm_masks_q20", 1e-3, mask_logits(out["selection"])[:1, first]
    yield "sel1_ref", 1e-6, t["box_s1"][:1, first]  # from whole pixels, so exact but for the division
    interaction, boxes = run.model.interactions[0], t["box_s1"]
    for i in range(2):
        yield f"ti{i}_query_pos_slice", 1e-4, seen["interactions.0.position"][i][:1, first, ::8]
        tokens_sa = seen[f"interactions.0.layers.{i}"][0]
        yield f"ti{i}_out", 3e-4, tokens_sa[:1, first]
        boxes = dimaskdino.refine(interaction.box_mlp(tokens_sa), boxes).detach()
        yield f"ti{i}_ref", 5e-5, boxes[:1, first]
        yield f"ti{i}_logits_q100", 1e-3, out["interaction"][i]["logits"][:1, first]
        yield f"ti{i}_boxes", 1e-4, out["interaction"][i]["boxes"][:1, first]
    yield "sel2_scores_all", 4e-4, run.model.det_head.scores(seen["interactions.0.norm"][1])[:1, first].detach()

    second = run.align(t["index_2"], g["T_s2_token_idx"])
    yield "sel2_scores", 4e-4, t["scores_2"][:1, second]
    yield "T_s2", 3e-4, t["T_s2"][:1, second]
    yield "sel2_ref", 5e-5, t["box_s2"][:1, second]
    yield "Q_bal", 4e-4, t["Q_bal"][:1, second]
    yield "ref0", 5e-5, t["box_s2"][:1, second]
    yield "ref1", 1e-4, t["box_bal"][:1, second]
    yield "guide_scores_all", 4e-4, run.model.det_head.scores(t["Q_bal"])[:1, second].detach()
    by_score = np.asarray(run.model.det_head.scores(t["Q_bal"])[0].detach()).argsort()[::-1]
    guides = run.align(t["index_2"][:, by_score[:50].copy()], g["guide_token_idx"])
    for name in ("T_g_mask", "T_g_box", "T_g"):
        yield name, 3e-4, t[name][:1, guides]
    yield "T_bal", 3e-4, t["T_bal"][:1, tokens]
    yield "mask_features_updated_s2", 1e-4, seen["seg_head.update"][0].relu()[:1, :, ::2, ::2]
    layer_tolerance = [4e-4, 4e-4, 1e-3, 1e-3, 3e-3, 3e-3]
    for i in range(5):
        # The position MLP runs at layer 0, in the guiding tokens, then at layers 1 to 5.
        yield f"dec{i + 1}_query_pos_slice", 4e-4, seen["position"][i + 2][:1, second, ::8]
        name = f"dec{i + 1}_out" + ("" if i == 4 else "_q100")
        yield name, layer_tolerance[i + 1], seen[f"decoder.{i}"][0][:1, second]
    yield from predictions(run, second)


def predictions(run, rank):
    last = len(run.outputs["layers"]) - 1
    for i, layer in enumerate(run.outputs["layers"]):
        late = i > last / 3
        yield f"pred{i}_logits", 1e-2 if late else 1e-3, layer["logits"][:1, rank]
        yield f"pred{i}_boxes", 4e-4 if late else 1e-4, layer["boxes"][:1, rank]
        for name in (f"pred{i}_masks_q40", f"pred{i}_masks_q20"):
            if name in run.golden:
                yield name, 1e-2 if late else 1e-3, mask_logits(layer)[:1, rank]


def check_final(run, index, chosen):
    """The 100 objects: scores, labels, boxes and masks, aligned by (token, class)."""
    g = run.golden
    first = {name: run.outputs[name][:1] for name in ("logits", "boxes", "mask_embedding", "pixels")}
    size = tuple(g["final0_masks_hw"].tolist())
    (ours,) = postprocess(first, [(256, 320)], [size])
    rank = run.align(index, chosen)
    scores = first["logits"].sigmoid()[0, rank].flatten()[g["final0_flat_idx"]]
    order = dict.fromkeys(range(100))  # ours are sorted by the final score: match them by label and box
    theirs = np.unpackbits(g["final0_masks_packed"], axis=1)[:, : size[0] * size[1]].reshape(-1, *size)
    assert np.abs(scores.numpy() - g["final0_class_scores"]).max() <= 2e-3
    for i in range(100):
        same = [
            j for j in order
            if ours["labels"][j] == g["final0_labels"][i]
            and np.abs(ours["boxes"][j] - g["final0_boxes"][i]).max() < 0.2
            and abs(ours["scores"][j] - g["final0_scores"][i]) < 2e-3
        ]  # fmt: skip
        assert same, f"object {i} of the 100 is not among ours"
        best = min(same, key=lambda j: (ours["masks"][j].numpy() != theirs[i]).sum())
        assert (ours["masks"][best].numpy() != theirs[i]).mean() <= 1e-4
        del order[best]


@pytest.mark.parametrize("batch, operator", [(1, deform_attn_pytorch), (2, deform_attn)])
def test_released_every_array_agrees_from_backbone_to_the_100_objects(batch, operator, monkeypatch):
    monkeypatch.setattr(dimaskdino, "deform_attn", operator)
    run = Run("r50_a", "dimaskdino_r50", batch)
    assert run.model.config == Config.released()
    run.check(stages_of_dimaskdino(run))
    check_final(run, run.trace["index_2"], run.golden["T_s2_token_idx"])


def stages_of_maskdino(run):
    g, t, seen, out, tokens = run.golden, run.trace, run.seen, run.outputs, run.tokens
    yield from features(run)
    yield "T_i_c8", 3e-4, t["T_i"][:1, tokens, ::8]
    yield "mask_features_s2_c4", 1e-4, seen["seg_head.embed"][0][:1, ::4, ::2, ::2]
    yield "sel1_scores_all", 4e-4, run.model.det_head.scores(seen["transform"][0])[:1, tokens].detach()
    rank = run.align(t["index_1"], g["sel1_idx"])
    yield "sel1_scores", 4e-4, t["scores_1"][:1, rank]
    yield "T_s", 3e-4, t["T_s2"][:1, rank]
    yield "ref_logit", 2e-5, t["box_s2"][:1, rank].logit()  # 1e-5 where the clamp at 1e-5 is reached
    yield "interm_boxes", 5e-5, out["selection"]["boxes"][:1, rank]
    yield "interm_masks_q10", 1e-3, mask_logits(out["selection"])[:1, rank]
    yield "dec0_out", 4e-4, seen["residual"][0][:1, rank]
    yield "dec8_out", 3e-3, seen["decoder.7"][0][:1, rank]
    yield from predictions(run, rank)


def test_maskdino_every_recorded_array_agrees():
    run = Run("maskdino3s_r50", "maskdino3s_r50")
    assert run.model.config == Config.maskdino()
    run.check(stages_of_maskdino(run))
    check_final(run, run.trace["index_1"], run.golden["sel1_idx"])


# ---- Losses ----------------------------------------------------------------------------------------------------------

SETS = {"": "2", "_0": "0", "_1": "1", "_interm": "selection"}
SETS |= {f"_dn{stage}": f"denoising_{SETS[stage]}" for stage in ("", "_0", "_1")}
TERMS = {"loss_ce": "class", "loss_bbox": "box", "loss_giou": "giou", "loss_mask": "mask", "loss_dice": "dice"}
NAMES = {term + stage: f"{TERMS[term]}_{SETS[stage]}" for term in TERMS for stage in SETS}
NAMES |= {f"oldm_{term}_{i}": f"{TERMS[term]}_interaction_{i}" for term in TERMS for i in (0, 1)}


def recorded_outputs(g, denoising):
    def prediction(name):
        parts = [part for part in ("logits", "boxes", "masks") if f"in_{name}_pred_{part}" in g]
        tensors = {part: torch.from_numpy(g[f"in_{name}_pred_{part}"]).requires_grad_() for part in parts}
        return tensors | (factors_of(tensors.pop("masks")) if "masks" in tensors else {})

    layers = [prediction(name) for name in ("aux0", "aux1", "main")]
    noised = [prediction(name) for name in ("dn_aux0", "dn_aux1", "dn")] if denoising else []
    outputs = {"selection": prediction("interm"), "interaction": [prediction("oldm0"), prediction("oldm1")]}
    return {**layers[-1], **outputs, "layers": layers, "denoising": noised}


def recorded_denoising(outputs, targets):
    """The slots of the recorded denoising queries: as many groups of them as were predicted."""
    queries = outputs["denoising"][0]["logits"].shape[1] if outputs["denoising"] else 0
    return denoising_queries(targets, 80, queries)


def recorded_targets(g, prefix):
    types = {"labels": torch.int64, "boxes": torch.float32, "masks": torch.bool}
    targets = []
    for b in (0, 1):
        names = {part: f"{prefix}{b}_{part}" for part in types}
        targets.append({part: torch.from_numpy(g[x]).to(types[part]) for part, x in names.items() if x in g})
    return targets


@pytest.fixture(scope="module")
def recorded_randomness():
    """Points and noise are those with which the arrays were recorded: random numbers of a shape are always the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("losses.MOST_CANDIDATES", 2**40)  # the points of a set of predictions are drawn at once
        patch.setattr("losses.random_points", lambda number, points, _: numbers.rand(number, points, 2) * 2 - 1)
        for name in ("rand_like", "randint_like"):
            patch.setattr(torch, name, getattr(numbers, name))
        yield


CASES = [("full", "dn"), ("full", "nodn"), ("half", "dn"), ("half", "nodn"), ("none", "nodn")]


@pytest.mark.parametrize("case, denoising", CASES)
def test_released_every_loss_and_their_total_agree(recorded_randomness, case, denoising):
    g = Recorded("losses")
    outputs = recorded_outputs(g, denoising == "dn")
    targets = recorded_targets(g, f"tgt_{case}")
    terms = Criterion(Recipe(mask_points=112))(outputs, targets, denoising=recorded_denoising(outputs, targets))
    prefix = f"loss_{case}_{denoising}_"
    for name, value, weight in zip(*(g[prefix + part] for part in ("names", "values", "weights")), strict=True):
        ours = terms.get(NAMES[str(name)], torch.zeros(()))  # without denoising, ours has no such terms: zero there
        assert ours.item() == pytest.approx(value * weight, rel=2e-5, abs=1e-6), name
    assert sum(terms.values()).item() == pytest.approx(g[prefix + "total"][0], rel=2e-5)


@pytest.mark.parametrize("case", ["full", "half"])
@pytest.mark.parametrize("name", ["main", "oldm0"])
def test_released_costs_of_matching_agree(recorded_randomness, case, name):
    g = Recorded("losses")
    targets = recorded_targets(g, f"tgt_{case}")
    outputs = recorded_outputs(g, False)
    prediction = outputs["layers"][-1] if name == "main" else outputs["interaction"][0]
    costs = Criterion(Recipe(mask_points=112)).costs({name: prediction}, targets)
    for b, target in enumerate(targets):
        theirs = g[f"match_{case}_{name}_cost{b}"]
        assert np.abs(costs[b, :, : len(target["labels"])].detach().numpy() - theirs).max(initial=0) <= 1e-4


def test_released_gradients_of_the_total_agree(recorded_randomness):
    g = Recorded("losses")
    outputs = recorded_outputs(g, True)
    targets = recorded_targets(g, "tgt_full")
    denoising = recorded_denoising(outputs, targets)
    sum(Criterion(Recipe(mask_points=112))(outputs, targets, denoising=denoising).values()).backward()
    main, dn = outputs["layers"][-1], outputs["denoising"][-1]
    recorded = {
        "main_pred_logits": main["logits"], "main_pred_boxes": main["boxes"], "dn_pred_logits": dn["logits"],
        "dn_pred_boxes": dn["boxes"], "interm_pred_boxes": outputs["selection"]["boxes"],
        "oldm1_pred_logits": outputs["interaction"][1]["logits"],
        "oldm1_pred_boxes": outputs["interaction"][1]["boxes"],
    }  # fmt: skip
    for name, x in recorded.items():
        assert np.allclose(x.grad, g[f"grad_{name}"], rtol=1e-4, atol=1e-5), name
    name, masks = "grad_main_pred_masks_img0", main["pixels"].grad
    assert np.allclose(g.cut(name, masks[0]), g[name], atol=1e-3, rtol=1e-3)  # recorded in float16
    assert masks.norm().item() == pytest.approx(g["gradnorm_main_pred_masks"][0], rel=1e-4)


@pytest.mark.parametrize("case", "abcde")
def test_released_denoising_queries_agree(recorded_randomness, case):
    g = Recorded("losses")
    denoising = denoising_queries(recorded_targets(g, f"dnq_{case}_tgt"), 80)
    assert bool(denoising.groups) == bool(g[f"dnq_{case}_active"][0])
    if denoising.groups:
        assert denoising.groups == g[f"dnq_{case}_groups"][0]
        assert np.array_equal(denoising.labels, g[f"dnq_{case}_slot_labels"])
        assert np.allclose(denoising.boxes_logit, g[f"dnq_{case}_slot_box_logits"], atol=1e-5)
        blocked = np.unpackbits(g[f"dnq_{case}_attn_mask_packed"], axis=1)[:, : denoising.labels.shape[1] + 300]
        assert np.array_equal(denoising.attention_mask(300), blocked.astype(bool))


# ---- A whole step of training ----------------------------------------------------------------------------------------

LAST = 6  # decoder layers: their prediction without a number is our last one
STAGES = {"": LAST, "_interm": "selection"} | {f"_{i}": i for i in range(LAST)}
STAGES |= {f"_dn{stage}": f"denoising_{i}" for stage, i in STAGES.items() if i != "selection"}


def recorded_objects(g, image):
    boxes, masks = g[f"tgt{image}_boxes_xyxy_px"], np.unpackbits(g[f"tgt{image}_masks_packed"], axis=1)
    boxes = box_convert(torch.from_numpy(boxes), "xyxy", "cxcywh") / torch.tensor([320, 256, 320, 256])
    masks = torch.from_numpy(masks).view(-1, 256, 320).bool()
    return {"labels": torch.from_numpy(g[f"tgt{image}_labels"]), "boxes": boxes, "masks": masks}


@pytest.fixture(scope="module")
def step(recorded_randomness):
    """One step on two images: what was recorded, the losses, and the model with its gradients."""
    g, model = Recorded("train_r50"), released_model("dimaskdino_r50").train()
    images = torch.stack([torch.from_numpy(numbers.image(256, 320, seed)) for seed in (200, 201)])
    targets = [recorded_objects(g, image) for image in (0, 1)]
    denoising = denoising_queries(targets, 80, Recipe().denoising, Recipe().label_noise)
    losses = Criterion(Recipe())(model(images, denoising), targets, denoising=denoising)
    sum(losses.values()).backward()
    return g, losses, model


def test_released_a_training_step_has_the_81_recorded_losses(step):
    g, losses, _ = step
    ours = {}
    for name, value, weight in zip(g["loss_names"], g["loss_values_unweighted"], g["loss_weights"], strict=True):
        term, stage = re.fullmatch(r"(?:oldm_)?(loss_[a-z]+?)((?:_dn|_interm|_\d)*)", name).groups()
        ours[name] = f"{TERMS[term]}_{f'interaction{stage}' if 'oldm' in name else STAGES[stage]}"
        assert losses[ours[name]].item() == pytest.approx(value * weight, rel=1e-3), name
    assert len(ours) == 81 and losses.keys() == set(ours.values())
    assert sum(losses.values()).item() == pytest.approx(g["total"], rel=1e-5)


def test_released_a_training_step_gives_every_parameter_its_gradient(step):
    g, _, model = step
    order = {name: torch.tensor(i) for i, name in enumerate(g["grad_names"])}
    theirs = {name: int(i) for name, i in translate(order)[0].items()}
    ours = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, i in theirs.items():
        norm, total = g["grad_norm"][i], g["grad_sum"][i]
        assert ours[name].norm().item() == pytest.approx(norm, rel=1e-2), name
        # the numbers part by 1 % of the norm at most: so does their sum, times the root of how many they are
        assert ours[name].sum().item() == pytest.approx(total, abs=1e-2 * norm * ours[name].numel() ** 0.5), name
    total = torch.stack([x.norm() for x in ours.values()]).norm().item()
    assert total == pytest.approx(g["grad_total_norm"], rel=1e-3)
    for their_name in (name for name in g.arrays if name.startswith("grad_slice:")):
        name = next(iter(translate({their_name.split(":")[1]: torch.zeros(1)})[0]))
        x = ours[name].flatten(1) if ours[name].ndim > 1 else ours[name][:, None].T
        x = coarse_to_fine(x, model.config) if "offsets" in name else x  # the same turn, back
        x = x[:: max(1, x.shape[0] // 16), :: max(1, x.shape[1] // 16)]
        assert np.abs(x - g[their_name]).max() <= 1e-2 * np.abs(g[their_name]).max(), name


# ---- Swin-L ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_released_swin_l_agrees_from_backbone_to_the_100_objects(monkeypatch):
    for initializer in ("trunc_normal_", "kaiming_uniform_"):  # seconds, for numbers that are replaced
        monkeypatch.setattr(torch.nn.init, initializer, lambda x, **_: x)
    g = Recorded("swinl")
    weights = numbers.weights("dimaskdino_swinl", g["weight_seed"].item())
    model = DIMaskDINO(config_of({"model": weights})).eval()
    assert model.config == dataclasses.replace(Config.released(), backbone="swin_l")
    load_weights(model, weights)
    del weights
    features = []
    model.backbone.register_forward_hook(lambda _, inputs, output: features.extend(output))
    with torch.no_grad():
        outputs = model(torch.from_numpy(numbers.image(512, 640, 77))[None])
    for i, x in enumerate(features):
        assert [x.mean().item(), x.std().item()] == pytest.approx(g[f"backbone_res{i + 2}_meanstd"], abs=1e-4)
        name = f"backbone_res{i + 2}_slice"
        assert np.abs(g.cut(name, x[:, :: x.shape[1] // 16, ::4, ::4]) - g[name]).max() <= 1e-4, name
    (ours,) = postprocess(outputs, [(512, 640)], [(480, 600)])
    assert ours["labels"].tolist() == g["final0_labels"].tolist()
    assert np.abs(ours["scores"] - g["final0_scores"]).max() <= 2e-3
    assert np.abs(ours["boxes"] - g["final0_boxes"]).max() <= 0.2
    pixels = 480 * 600
    assert np.abs(ours["masks"].sum((1, 2)) - g["final0_mask_area"]).max() <= 1e-4 * pixels
    theirs = np.unpackbits(g["final0_masks10_packed"], axis=1)[:, :pixels].reshape(10, 480, 600)
    assert (ours["masks"][:10].numpy() != theirs).mean((1, 2)).max() <= 1e-4


# ---- The authors' file, as a user has it -----------------------------------------------------------------------------


def test_the_authors_file_is_their_model_of_cocos_classes(tmp_path):
    torch.save({"model": released_weights("dimaskdino_r50"), "iteration": 88499}, tmp_path / "dimaskdino_r50.pth")
    trained = load_model(tmp_path / "dimaskdino_r50.pth")
    assert trained.model.config == Config.released() and trained.test_size == (800, 1333)
    assert trained.classes == [*COCO.values()] and trained.category_ids == [*COCO]
