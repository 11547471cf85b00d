"""What tools/explain.py and the page that it makes promise."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image

from dimaskdino import Config, DIMaskDINO
from small_runs import exit_code
from tools import explain
from util.weights import Trained

SIZES = {"dim": 32, "heads": 2, "ffn": 48, "decoder_layers": 3, "selection": (12, 6)}
SCRIPT = "</script><script>document.title = 'run'</script>"  # a class's name
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

MARKS = ("cell", "gone", "ray", "boxed", "near", "frame", "fill", "edge")

# Two pages of different widths, which keys step through: what each shows, as JSON.
BROWSER = """<iframe width=1280 height=800 src=page.html></iframe><iframe width=390 height=844 src=page.html></iframe>
<script>onload = () => document.documentElement.textContent = JSON.stringify([frames[0], frames[1]].map(page => {
  const all = selector => [...page.document.querySelectorAll(selector)], errors = [];
  page.onerror = page.console.error = message => errors.push(`${message}`);
  return { errors, steps: [...Array(11).keys()].map(() => {
    const shown = {
      chosen: all("[aria-pressed=true]")[0].textContent, wide: page.document.body.scrollWidth,
      step: all("#steps button").findIndex(button => button.ariaCurrent),
      tops: all("section p, #stage, #dial, #objects, #panel, nav").map(x => Math.round(x.getBoundingClientRect().top)),
      marks: MARKS.map(name => all(`#marks .${name}`).length),
    };
    for (const key of ["2", "ArrowRight"]) page.dispatchEvent(new page.KeyboardEvent("keydown", { key }));
    return shown;
  }) };
}));</script>""".replace("MARKS", json.dumps(MARKS))


def trained(**changes):
    torch.manual_seed(0)
    config = dataclasses.replace(Config.tiny(), **{**SIZES, **changes})
    return Trained(DIMaskDINO(config).eval(), [SCRIPT] * config.num_classes, [*range(8)], (64, 96), None, True)


def picture(width=64, height=56):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def shown():
    """A model, what the page shows of it, and where that comes from: with objects, as every score is enough."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(explain, "SCORE", 0)
        patch.setattr(explain, "SAME", 0.95)
        model = trained()
        return model.model, explain.page_data(model, picture()), explain.Story(model, picture(), (64, 96))


def test_tokens_and_their_scores_are_those_of_the_trace(shown):
    _, data, story = shown
    for name, i in (("first", 1), ("second", 2)):
        assert data[name]["index"] == story.trace[f"index_{i}"][0].tolist()
        assert np.allclose(data[name]["scores"], story.trace[f"scores_{i}"][0].sigmoid(), atol=1e-3)


def test_objects_have_the_boxes_and_masks_of_every_layer(shown):
    _, data, story = shown
    assert len(data["objects"]) > 1
    for one in data["objects"]:
        for layer, prediction in zip(one["layers"], story.outputs["layers"], strict=True):
            mask = Image.open(io.BytesIO(base64.b64decode(layer["mask"].split(",")[1])))
            assert np.array_equal(np.asarray(mask) > 0, story.masks_of(prediction, [one["query"]])[0].numpy())
            assert np.allclose(layer["box"], story.boxes_of(prediction, [one["query"]])[0], atol=0.06)


def test_attention_is_what_the_model_computed(shown):
    model, data, story = shown
    _, query, key, _ = story.inputs["bato.attention"]
    mha, heads = model.bato.attention.mha, SIZES["heads"]
    w, b = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
    q, k = ((x[0] @ w[i].T + b[i]).unflatten(-1, (heads, -1)) for i, x in enumerate((query, key)))
    weights = (torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5).softmax(-1).mean(0).detach().numpy()
    assert np.allclose(story.attention("bato.attention"), weights, atol=1e-5)
    for i, one in enumerate(data["objects"]):
        share, top = np.frombuffer(base64.b64decode(one["attend"]["bytes"]), np.uint8), one["attend"]["top"]
        owned = np.array(data["guides"]["object"]) == i
        assert np.allclose(share / 255 * top, weights[:, owned].sum(1), atol=top / 500)


def test_eq4_is_shown_where_it_reads(shown):
    """The samples of a query, read from T_i by bilinear interpolation, give the cross-attention's output."""
    model, data, story = shown
    query, samples = data["objects"][0]["query"], torch.tensor(data["objects"][0]["samples"])
    x, y, level, weight = samples.unflatten(0, (SIZES["heads"], model.config.levels, -1)).unbind(-1)  # [h L P]
    weight = weight * SIZES["heads"]
    attention, (token, position, reference, memory, shapes) = (
        model.residual.cross_attention,
        story.inputs[explain.RESIDUAL],
    )
    grid = 2 * torch.stack([x, y], -1) / torch.tensor(data["padded"]) - 1  # [h L P 2]
    with torch.inference_mode():
        values = attention.value(memory)[0].T.unflatten(0, (SIZES["heads"], -1)).split([h * w for h, w in shapes], 2)
        read = sum(
            nnf.grid_sample(value.unflatten(2, shape), grid[:, i, None], align_corners=False)[:, :, 0]
            @ weight[:, i, :, None]
            for i, (value, shape) in enumerate(zip(values, shapes, strict=True))
        )
        output = attention(token, position, reference, memory, shapes)[0, query]
        assert torch.allclose(attention.norm(token[0, query] + attention.output(read.flatten())), output, atol=0.01)


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


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
def test_a_browser_shows_eleven_steps_by_keyboard_without_a_jump(shown, tmp_path, monkeypatch):
    _, data, _ = shown
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
        n, own = len(data["objects"]), data["guides"]["object"].count(1)
        points = len(data["objects"][1]["samples"])
        assert [step["marks"] for step in steps] == [  # of each step, how many of MARKS
            [0, 0, 0, 0, 0, 4, 0, 0],  # T_i: the patches of one place
            [12, 0, 0, 0, 0, 0, 0, n],
            [0, 0, 10, 0, 10, 0, 0, n],
            [6, 6, 0, 0, 0, 0, 0, n],
            [0, 0, 0, 1, points, 0, 0, 1],
            [0, 0, 0, own, 0, 0, 1, 1],
            [0, 0, 0, 0, 0, own, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 2, 0, 0, 1, 1],
            [0, 0, 0, n, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 1],
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
