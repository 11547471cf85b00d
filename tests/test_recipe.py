"""What util/recipe.py promises: the paper's settings of training (4.1, appendix B), by value."""

import dataclasses

import pytest
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from util.recipe import Recipe, parameter_groups

PAPER = [  # field, value, where the paper says so; what it leaves open is the released code's
    ("epochs", 50, "4.1"),
    ("batch_size", 16, "4.1"),
    ("lr", 1e-4, "4.1"),
    ("backbone_lr", 0.1, "released"),
    ("betas", (0.9, 0.999), "released"),
    ("weight_decay", 0.05, "released"),
    ("clip", 0.01, "released"),
    ("detection_loss", 1.0, "table 3"),
    ("mask_points", 12544, "released"),
    ("denoising", 100, "released"),
    ("label_noise", 0.2, "released"),
    ("warmup", 0, "released"),
    ("schedule", "steps", "4.1"),
    ("drops", (0.9, 0.95), "4.1"),
    ("augmentation", "jitter", "released"),
    ("image_size", 1024, "released"),
    ("test_size", (800, 1333), "released"),
]
TINY = dict(
    epochs=12, batch_size=8, lr=2e-3, backbone_lr=1.0, betas=(0.9, 0.98), clip=0.1, mask_points=256, denoising=16,
    label_noise=0.5, warmup=100, schedule="cosine", augmentation="flips", image_size=128, test_size=(128, 128),
)  # fmt: skip


def test_every_default_is_the_papers():
    assert dataclasses.asdict(Recipe()) == {field: value for field, value, _ in PAPER}


@pytest.mark.parametrize(
    "recipe, changes",
    [("bdd100k", dict(epochs=68, batch_size=8, drops=(50 / 68,))), ("tiny", TINY)],
)
def test_a_recipe_differs_from_the_papers_for_coco_in_these_fields_and_no_other(recipe, changes):
    assert getattr(Recipe, recipe)() == dataclasses.replace(Recipe(), **changes)


@pytest.mark.parametrize(
    "recipe, steps, drops", [(Recipe(), 368_750, (331_875, 350_312)), (Recipe.bdd100k(), 59_500, (43_750,))]
)
def test_the_rate_falls_to_a_tenth_at_each_drop_and_nowhere_else(recipe, steps, drops):
    for i, drop in enumerate(drops):
        before, after = recipe.rate(drop - 1, steps), recipe.rate(drop, steps)
        assert (before, after) == pytest.approx((0.1**i, 0.1 ** (i + 1)))
    assert recipe.rate(0, steps) == 1 and recipe.rate(steps - 1, steps) == pytest.approx(0.1 ** len(drops))


def test_the_warm_up_rises_by_equal_steps_and_reaches_the_full_rate_after_it():
    recipe = Recipe(warmup=4)
    assert [recipe.rate(step, 1000) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_a_cosine_is_at_its_full_rate_half_of_it_and_nothing():
    recipe = Recipe(schedule="cosine")
    assert [recipe.rate(step, 100) for step in (0, 25, 50, 75, 100)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447, 0], abs=1e-6
    )


def test_the_size_of_test_images_goes_with_that_of_training_images_and_other_fields_as_told():
    assert Recipe().replace(image_size=512) == dataclasses.replace(Recipe(), image_size=512, test_size=(400, 666))
    assert Recipe().replace(epochs=12) == dataclasses.replace(Recipe(), epochs=12)


def test_weights_decay_but_for_norms_and_embeddings_and_what_is_frozen_does_not_train():
    layers = {
        "linear": nn.Linear(2, 2),
        "conv": nn.Conv2d(2, 2, 1),
        "layer": nn.LayerNorm(2),
        "group": nn.GroupNorm(1, 2),
    }
    layers |= {"batch": nn.BatchNorm2d(2), "embed": nn.Embedding(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)}
    swin, head = ShiftedWindowAttention(4, [2, 2], [0, 0], 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"backbone": nn.ModuleDict(layers | {"swin": swin}), "head": head})
    groups = parameter_groups(model, Recipe())
    of = {id(p): (g["weight_decay"], g["base_lr"]) for g in groups for p in g["params"]}
    assert len(of) == sum(len(g["params"]) for g in groups)  # each once
    found = {name: of.get(id(layer.weight)) for name, layer in layers.items()}
    decayed, plain = (0.05, pytest.approx(1e-5)), (0.0, pytest.approx(1e-5))
    assert found == {
        **{"linear": decayed, "conv": decayed, "layer": plain, "group": plain, "batch": plain, "embed": plain},
        "frozen": None,
    }
    assert of[id(swin.relative_position_bias_table)] == plain and of[id(swin.qkv.weight)] == decayed
    assert of[id(head.weight)] == of[id(head.bias)] == (0.05, 1e-4)


@pytest.mark.parametrize("field", ["epochs", "batch_size", "lr", "clip", "mask_points", "image_size"])
def test_what_cannot_be_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"^{field}=0 is not above 0$"):
        Recipe(**{field: 0})


def test_a_schedule_that_nobody_knows_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="^schedule='linear' is not one of steps, cosine$"):
        Recipe(schedule="linear")
