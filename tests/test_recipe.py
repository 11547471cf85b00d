"""What train.Recipe promises: the paper's settings of training (4.1, appendix B), by value."""

import dataclasses

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from dimaskdino import Backbone, Config
from small_runs import exit_code
from train import Recipe, choose_config, choose_recipe, make_optimizer, parse_training

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


def test_every_default_is_the_papers():
    assert dataclasses.asdict(Recipe()) == {field: value for field, value, _ in PAPER}


@pytest.mark.parametrize(
    "recipe, steps, drops", [(Recipe(), 368_750, (331_875, 350_312)), (Recipe.bdd100k(), 59_500, (43_750,))]
)
def test_the_rate_falls_to_a_tenth_at_each_drop_and_nowhere_else(recipe, steps, drops):
    for i, drop in enumerate(drops):
        before, after = recipe.rate(drop - 1, steps), recipe.rate(drop, steps)
        assert (before, after) == pytest.approx((0.1**i, 0.1 ** (i + 1)))
    assert recipe.rate(0, steps) == 1 and recipe.rate(steps - 1, steps) == pytest.approx(0.1 ** len(drops))


def test_the_warm_up_rises_by_equal_steps_to_the_full_rate():
    recipe = Recipe(warmup=4)
    assert [recipe.rate(step, 1000) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_a_cosine_falls_from_the_full_rate_by_half_of_it_to_nothing():
    rates = [Recipe(schedule="cosine").rate(step, 100) for step in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


def test_the_size_of_test_images_goes_with_that_of_training_images():
    assert Recipe().replace(image_size=512) == dataclasses.replace(Recipe(), image_size=512, test_size=(400, 666))
    assert Recipe().replace(epochs=12) == dataclasses.replace(Recipe(), epochs=12)


def test_norms_and_embeddings_do_not_decay_and_the_frozen_does_not_train():
    layers = {
        "linear": nn.Linear(2, 2),
        "conv": nn.Conv2d(2, 2, 1),
        "layer": nn.LayerNorm(2),
        "group": nn.GroupNorm(1, 2),
        "batch": nn.BatchNorm2d(2),
        "embed": nn.Embedding(2, 2),
        "frozen": nn.Linear(2, 2).requires_grad_(False),
    }
    swin, head = ShiftedWindowAttention(4, [2, 2], [0, 0], 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"backbone": nn.ModuleDict(layers | {"swin": swin}), "head": head})
    groups = make_optimizer(model, Recipe()).param_groups
    of = {id(p): (g["weight_decay"], g["base_lr"]) for g in groups for p in g["params"]}
    assert len(of) == sum(len(g["params"]) for g in groups)  # each once
    decayed, plain = (0.05, pytest.approx(1e-5)), (0.0, pytest.approx(1e-5))
    expected = {"linear": decayed, "conv": decayed, "frozen": None}
    assert {name: of.get(id(layer.weight)) for name, layer in layers.items()} == dict.fromkeys(layers, plain) | expected
    assert of[id(swin.relative_position_bias_table)] == plain and of[id(swin.qkv.weight)] == decayed
    assert of[id(head.weight)] == of[id(head.bias)] == (0.05, 1e-4)


def test_a_backbone_rate_of_0_freezes_the_backbone():
    model = nn.ModuleDict({"backbone": Backbone("tiny"), "head": nn.Linear(2, 2)})
    (group,) = make_optimizer(model, Recipe(backbone_lr=0)).param_groups
    assert [*map(id, group["params"])] == [*map(id, model["head"].parameters())]
    before = {name: x.clone() for name, x in model["backbone"].state_dict().items()}
    model.train()["backbone"](torch.randn(2, 3, 64, 64))
    assert not any(parameter.requires_grad for parameter in model["backbone"].parameters())
    assert all(torch.equal(x, before[name]) for name, x in model["backbone"].state_dict().items())


@pytest.mark.parametrize("field", ["epochs", "batch_size", "lr", "clip", "mask_points", "image_size"])
def test_what_cannot_be_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"^{field}=0 is not above 0$"):
        Recipe(**{field: 0})


def test_an_unknown_schedule_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="^schedule='linear' is not one of steps, cosine$"):
        Recipe(schedule="linear")


# ---- Flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, value",
    [
        ("selection=(300,)", (300,)),
        ("selection=400,300", (400, 300)),
        ("bato=False", False),
        ("detection_loss=0.1", 0.1),
        ("detection_loss=2", 2),
        ("guidance=T_s1", "T_s1"),
        ("decoder_layers=9", 9),
        ("guiding_tokens=40", 40),
        ("guiding_tokens=None", None),
    ],
)
def test_set_changes_one_field_of_the_model_or_of_its_training(override, value):
    args = parse_training(["--preset", "released", "--set", override])
    name = override.split("=")[0]
    plain = [dataclasses.replace(Config.released(), num_classes=3), Recipe()]
    expected = [dataclasses.replace(x, **{name: value}) if hasattr(x, name) else x for x in plain]
    assert [choose_config(args, 3), choose_recipe(args)] == expected != plain


@pytest.mark.parametrize(
    "text, kind",
    [
        ("test_size=(800,)", "tuple[int, int]"),
        ("betas=(0.9,0.9,0.9)", "tuple[float, float]"),
        ("selection=(300,1.5)", "tuple[int, ...]"),
        ("selection=wide", "tuple[int, ...]"),
        ("guiding_tokens=many", "int | None"),
        ("bato=1", "bool"),
        ("dim=True", "int"),
        ("clip=small", "float"),
    ],
)
def test_a_setting_of_another_type_is_refused_with_the_type_it_needs(text, kind, capsys):
    assert exit_code(parse_training, ["--set", text]) == 2
    assert f"{text}: that is no {kind}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, preset",
    [("", "tiny"), ("--data coco", "paper"), ("--data photos", "paper"), ("--preset released", "released")],
)
def test_shapes_go_with_the_tiny_model_and_other_data_with_the_papers(flags, preset):
    assert parse_training(flags.split()).preset == preset


@pytest.mark.parametrize("flag", ["data", "data-root", "val-json", "out", "init", "backbone-weights"])
def test_a_tilde_is_the_home_folder_also_behind_an_equals_sign(flag, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(getattr(parse_training([f"--{flag}=~/x"]), flag.replace("-", "_"))) == "/home/me/x"


def test_one_of_several_gpus_can_be_named(capsys):
    assert parse_training(["--device", "cuda:1"]).device == "cuda:1"
    assert exit_code(parse_training, ["--device", "gpu1"]) == 2
    assert "gpu1 is none of cpu, cuda, cuda:0" in capsys.readouterr().err
