"""What tools/explain.py and the page that it makes promise."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from matplotlib.path import Path as Polygon
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from dimaskdino import full_size_boxes, full_size_masks, mask_logits
from small_models import SMALL, build
from small_runs import exit_code
from tools import explain
from util.weights import Trained

SCRIPT = "<script>1</script>"  # a class's name
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MARKS = ("cell", "gone", "ray", "boxed", "near", "frame", "guide", "under", "mask")

# Two pages of different widths, which keys step through: what each shows, as JSON.
BROWSER = """<iframe width=1280 height=800 src=page.html></iframe><iframe width=390 height=844 src=page.html></iframe>
<script>onload = () => document.documentElement.textContent = JSON.stringify([frames[0], frames[1]].map(page => {
  const all = selector => [...page.document.querySelectorAll(selector)], errors = [];
  const count = name => all(`#stage .${name}`).reduce((n, x) => n + x.getAttribute("d").split("M").length - 1, 0);
  page.onerror = page.console.error = message => errors.push(`${message}`);
  return { errors, steps: [...Array(11).keys()].map(() => {
    const shown = {
      chosen: all("[aria-pressed=true]")[0].textContent, wide: page.document.body.scrollWidth,
      step: all("nav button").findIndex(button => button.ariaCurrent),
      tops: all("#bar, #stage, #dial, #objects, #read, nav").map(x => Math.round(x.getBoundingClientRect().top)),
      marks: MARKS.map(count),
    };
    all("#stage")[0].dispatchEvent(new page.PointerEvent("pointermove", { clientX: 900, clientY: 200 }));
    for (const key of ["2", "ArrowRight"]) page.dispatchEvent(new page.KeyboardEvent("keydown", { key }));
    return shown;
  }) };
}));</script>""".replace("MARKS", json.dumps(MARKS))


def trained(**changes):
    return Trained(build(**changes), [SCRIPT] * 5, [*range(5)], (64, 96), None, True)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def shown():
    """A model, what the page shows of it, its outputs, and what goes into its modules. Every query is an object."""
    model = trained()
    seen = {}
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(explain, "SCORE", 0)
        patch.setattr(explain, "SAME", 2)
        data = explain.page_data(model, picture(80, 64))
        for name, module in model.model.named_modules():
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs}))
        outputs = model.model(pil_to_tensor(picture(80, 64))[None], trace=True)
    return model.model, data, outputs, seen


def filled(path, height, width):
    """The mask of the pixels whose centres are in an SVG path of closed lines, by the even-odd rule."""
    y, x = np.mgrid[:height, :width] + 0.5
    mask = np.zeros(height * width, bool)
    for line in path.split("M")[1:]:
        points = [point.split() for point in line.rstrip("z").split("L")]
        mask ^= Polygon(np.array(points, float)).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    return mask.reshape(height, width)


def test_tokens_objects_boxes_and_masks_are_those_of_the_trace(shown):
    _, data, outputs, _ = shown
    for name, i in (("first", 1), ("second", 2)):
        assert data[name]["index"] == outputs["trace"][f"index_{i}"][0].tolist()
        assert np.allclose(data[name]["scores"], outputs["trace"][f"scores_{i}"][0].sigmoid(), atol=1e-5)
    size = data["size"][::-1]
    for query, layers in zip(data["queries"], data["layers"], strict=True):
        for layer, prediction in zip(layers, outputs["layers"], strict=True):
            mask = full_size_masks(mask_logits(prediction, 0, [query]), size, size)[0][0]
            assert np.array_equal(filled(layer["mask"], *size), mask)
            assert np.allclose(layer["box"], full_size_boxes(prediction, 0, [query], size, size)[0], atol=1e-3)


@torch.inference_mode()
def test_attention_is_what_the_model_computed(shown):
    model, data, _, seen = shown
    talk, move = (
        model.get_submodule(name)(*seen[name][:3], need_weights=True)[1][0]
        for name in ("interactions.0.layers.0.attention.mha", "bato.attention.mha")
    )
    assert np.allclose(data["weights"], talk.gather(1, torch.tensor(data["to"])), atol=1e-5)
    assert np.allclose(data["weights"], talk.topk(explain.LISTENED).values, atol=1e-5)
    assert any(i >= 0 for i in data["guides"])  # an object has the guide that shows it best, however badly
    for i, one in enumerate(data["attends"]):
        assert np.allclose(one["of"], move[:, np.array(data["guides"]) == i].sum(1), atol=1e-5)


def test_attention_is_averaged_over_an_object_and_over_the_rest():
    weights, first = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([True, False])
    assert explain.shares(weights, first, first) == {"of": [0.5, 1.0], "on": 0.5, "off": 1.0, "chance": 0.5}


def test_eq4_is_shown_where_it_reads(shown):
    """The samples of a query, read from T_i by bilinear interpolation, give the cross-attention's output."""
    model, data, _, seen = shown
    query, samples = data["queries"][0], torch.tensor(data["samples"][0])
    x, y, level, weight = samples.unflatten(0, (SMALL.heads, model.config.levels, -1)).unbind(-1)  # [h L P]
    attention = model.residual.cross_attention
    token, position, reference, memory, shapes = seen["residual.cross_attention"]
    grid = 2 * torch.stack([x, y], -1) / torch.tensor(data["padded"]) - 1  # [h L P 2]
    with torch.inference_mode():
        values = attention.value(memory)[0].T.unflatten(0, (SMALL.heads, -1)).split([h * w for h, w in shapes], 2)
        read = sum(
            nnf.grid_sample(value.unflatten(2, shape), grid[:, i, None], align_corners=False)[:, :, 0]
            @ (SMALL.heads * weight[:, i, :, None])
            for i, (value, shape) in enumerate(zip(values, shapes, strict=True))
        )
        output = attention(token, position, reference, memory, shapes)[0, query]
        assert torch.allclose(attention.norm(token[0, query] + attention.output(read.flatten())), output, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": (6,), "bato": False},
        {"selection": (12, 9, 6), "guidance": "T_s1"},
        {"guidance": "T_s2", "gtg": False, "position_token": "random"},
        {"box_guide": "box", "guiding_tokens": 4, "guide_value": "T_g_mask", "pixel_tokens": "T_bal"},
    ],
    ids=str,
)
def test_every_model_and_every_image_has_its_page_the_same_each_time(changes):
    page = explain.page(trained(**changes), picture(30, 90), against=trained())
    assert page == explain.page(trained(**changes), picture(30, 90), against=trained()) and len(page) < 3e6
    assert SCRIPT not in page


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
def test_a_browser_shows_eleven_steps_by_keyboard_without_a_jump(shown, tmp_path, monkeypatch):
    _, data, _, _ = shown
    monkeypatch.setattr(explain, "page_data", lambda *_: data)
    (tmp_path / "page.html").write_text(explain.page(None, None))
    (tmp_path / "both.html").write_text(BROWSER)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    command = [CHROMIUM, *flags, "--dump-dom", f"--user-data-dir={tmp_path}", (tmp_path / "both.html").as_uri()]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    for page, width in zip(json.loads(html.unescape(re.sub("<.*?>", "", output))), (1280, 390), strict=True):
        steps = page["steps"]
        assert page["errors"] == [] and [step["step"] for step in steps] == list(range(11))
        assert {(*step["tops"], step["wide"]) for step in steps} == {(*steps[0]["tops"], width)}
        assert steps[0]["chosen"].startswith("1 ") and all(step["chosen"] == f"2 {SCRIPT}" for step in steps[1:])
        guides, own, samples = len(data["guides"]), data["guides"].count(1), len(data["samples"][1])
        pieces = [layers[-1]["mask"].count("M") for layers in data["layers"]]
        n, one, after = sum(pieces), pieces[1], data["layers"][1][1]["mask"].count("M")
        assert [step["marks"] for step in steps] == [  # of each step, how many of MARKS
            [0, 0, 0, 0, 0, 4, 0, 0, 0],  # T_i: the patches of one place
            [12, 0, 0, 0, 0, 0, 0, n, 0],
            [0, 0, 10, 0, 20, 1, 0, n, 0],
            [6, 6, 0, 0, 0, 0, 0, n, 0],
            [0, 0, 0, 1, samples, 1, 0, one, 0],
            [0, 0, 0, own, 0, 0, 0, 0, after],
            [0, 0, 0, 0, 0, own, guides, n, 0],
            [0, 0, 0, 0, 0, 1, 0, n, 0],
            [0, 0, 0, 2, 0, 0, 0, 0, one],
            [0, 0, 0, 6, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, one, 0],
        ]


def test_a_default_writes_over_nothing_and_wrong_files_are_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explain, "load_model", lambda path: trained())
    image = str(folder / "val" / "1.png")
    for name in ("explained.html", "explained_2.html"):
        assert exit_code(explain.main, ["--ckpt", "any.pt", image]) == 0 and (tmp_path / name).exists()
    (tmp_path / "broken.jpg").write_text("no image")
    for wrong in (["broken.jpg"], [image, "--out", "explained.html/page.html"]):
        assert exit_code(explain.main, ["--ckpt", "any.pt", *wrong]) == 2
        assert wrong[-1].split("/")[0] in capsys.readouterr().err
