"""What tools/explain.py promises."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image

from datasets import coco as data
from dimaskdino import Config, DIMaskDINO
from small_runs import exit_code
from tools import explain
from tools.story import SAME, Story, around, overlap
from util.weights import load_model

TINY = dataclasses.replace(Config.tiny(), dim=32, heads=2, ffn=48, decoder_layers=2, selection=(12, 6))


def words(figure):
    """Everything that is written on the page outside of its panels, without line breaks."""
    return " ".join(" ".join(text.get_text().split()) for text in figure.texts)


@pytest.fixture(scope="module")
def model(trained):
    return load_model(trained / "last.pt")


@pytest.fixture(scope="module")
def story(folder, model):
    return Story(model, data.read_image(folder / "val" / "1.png"))


def with_settings(**changes):
    """A fresh tiny model with some fields changed, which carries what load_model adds."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **changes)
    model = DIMaskDINO(config).eval()
    model.classes, model.test_size = [f"class {i}" for i in range(config.num_classes)], (64, 96)
    return model


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_one_command_makes_the_page_in_the_format_of_its_suffix(folder, trained, tmp_path, suffix):
    page = tmp_path / f"page.{suffix}"
    flags = ["--ckpt", trained / "last.pt", folder / "val" / "1.png", "--out", page]
    assert exit_code(explain.main, [*map(str, flags)]) == 0
    assert page.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_a_default_writes_over_nothing_and_a_figure_is_refused_before_any_work(folder, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--ckpt", str(trained / "last.pt"), str(folder / "val" / "1.png")]
    for name in ("explained.png", "explained_2.png"):
        assert exit_code(explain.main, command) == 0 and (tmp_path / name).exists()
    monkeypatch.setattr(explain, "page", None)
    for wrong in ("page.txt", "explained.png/page.png"):
        assert exit_code(explain.main, [*command, "--out", wrong]) == 2


def test_a_file_that_is_no_image_or_no_checkpoint_ends_with_its_name(folder, trained, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    assert exit_code(explain.main, ["--ckpt", str(trained / "last.pt"), str(broken)]) == 2
    assert "broken.jpg" in capsys.readouterr().err
    assert exit_code(explain.main, ["--ckpt", str(broken), str(folder / "val" / "1.png")]) == 2
    assert "broken.jpg" in capsys.readouterr().err


def test_the_page_names_every_equation_in_the_papers_order(folder, model):
    text = words(explain.page(model, data.read_image(folder / "val" / "1.png")))
    equations = ["3.2.1", "Eq. 1,", "Eq. 2,", "Eq. 3,", "Eq. 4,", "Eq. 5 to 7,", "Eq. 8,", "Eq. 9 to 11"]
    places = [text.index(equation) for equation in equations]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": (6,), "bato": False},
        {"selection": (12, 9, 6)},
        {"guidance": "T_s1"},
        {"guidance": "T_s2", "gtg": False},
        {"box_guide": "box", "guiding_tokens": 4, "guide_value": "T_g_mask", "pixel_tokens": "T_bal"},
        {"position_token": "random"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(90, 40), (30, 90)])
def test_every_variant_of_the_model_and_every_shape_of_image_has_its_page(changes, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    figure = explain.page(with_settings(**changes), picture)
    figure.draw_without_rendering()
    assert ("no token interaction" in words(figure)) == (changes.get("selection") == (6,))


def test_nothing_that_is_written_on_the_page_overlaps(folder, model):
    figure = explain.page(model, data.read_image(folder / "val" / "1.png"))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts]
    width, height = figure.get_size_inches() * figure.dpi
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, figure.texts[i].get_text()
        assert not any(box.overlaps(other) for other in boxes[:i]), figure.texts[i].get_text()


def test_attention_is_what_the_model_computed(story, model):
    """The weights that the page shows, applied to the values, give the module's own output."""
    x, query, key, value = story.calls["bato.attention"][0]
    output = story.calls["bato.attention"][1]
    with torch.inference_mode():
        made, weights = model.bato.attention.mha(query, key, value, need_weights=True)
        assert torch.allclose(model.bato.attention.norm(x + made), output, atol=1e-5)
    assert np.allclose(weights[0], story.attention("bato.attention"), atol=1e-6)
    assert np.allclose(story.attention("bato.attention").sum(1), 1, atol=1e-5)


def test_eq4_is_shown_where_it_reads(story, model):
    """The samples of a query, read from T_i by bilinear interpolation, give the cross-attention's output."""
    points, weights = story.samples(2)
    heads, levels, count = model.residual.cross_attention.split.values()
    assert points.shape == (heads * levels * count, 2)
    assert np.allclose(weights.reshape(heads, -1).sum(1), 1, atol=1e-5)
    (x, _, _, memory, shapes), output = story.calls["residual.cross_attention"]
    attention = model.residual.cross_attention
    grid = torch.tensor(2 * points / story.padded - 1, dtype=torch.float).view(heads, levels, count, 2)
    weights = torch.tensor(weights).view(heads, levels, 1, count)
    with torch.inference_mode():
        maps = attention.value(memory)[0].T.unflatten(0, (heads, -1)).split([h * w for h, w in shapes], 2)  # [h c HW]
        read = 0
        for i, (level, shape) in enumerate(zip(maps, shapes, strict=True)):
            sampled = nnf.grid_sample(level.unflatten(2, shape), grid[:, i, None], align_corners=False)  # [h c 1 P]
            read += (sampled[:, :, 0] * weights[:, i]).sum(-1)
        assert torch.allclose(attention.norm(x[0, 2] + attention.output(read.flatten())), output[0, 2], atol=1e-4)


def test_objects_are_different_ones_and_best_first(story):
    scores = [float(name.split()[-1]) for name in story.names]
    assert scores == sorted(scores, reverse=True) and len(set(story.objects)) == len(story.objects)
    alike = overlap(story.masks, story.masks)
    assert (alike - torch.eye(len(alike)) < SAME).all()


def test_a_box_fits_its_mask_to_1_where_it_is_drawn_around_its_largest_piece():
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:9, 11:17] = True
    mask[19, 29] = True  # a stray pixel
    assert around(mask).tolist() == [[11, 5, 17, 9]]
    assert around(torch.zeros(4, 4, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]


def test_the_model_is_left_as_it_was(folder, model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    explain.page(model, data.read_image(folder / "val" / "1.png"))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
