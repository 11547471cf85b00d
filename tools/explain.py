"""One page that explains the model with your own image, in the order of the paper.

    python -m tools.explain --ckpt runs/demo/best.pt image.jpg                     explained.png
    python -m tools.explain --ckpt runs/demo/best.pt image.jpg --out page.pdf      or .svg, from the same drawing

Every panel is drawn from `model(image, trace=True)` and from what hooks see going into four of the model's modules. The
numbers in its sentence are measured on this image. From Python: `page(model, picture).savefig(...)`.
"""

import argparse
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from datasets import coco as data
from tools.story import Story
from util.flags import user_path
from util.log import FIGURES, try_output, unused
from util.weights import load_model

BOX, MASK, CHOSEN, DARK = "#1f6fd6", "#f07f13", "#d4145a", "#222222"  # one meaning for each colour, on the whole page
HEAT = LinearSegmentedColormap.from_list("heat", ["#5b6b7c", "#ffffff", CHOSEN])  # less than usual, as usual, more


def figure_file(out: Path | None, default: str) -> Path:
    """Where a figure is to be written: `out`, or a file like `default` that is not there yet. Raises ValueError or
    OSError, before any work, if it is no .png, .svg or .pdf or cannot be written."""
    path = out or unused(Path(default))
    if path.suffix.lower() not in FIGURES:
        raise ValueError(f"{path} is no name for a figure: it ends in .png, .svg or .pdf")
    try_output(path, is_folder=False)
    return path


def write_figure(figure, path: Path) -> None:
    """Write a matplotlib figure to a file, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def outline(axes, mask, fill=0.0):
    """The outline of a mask [H W], closed at the image's border."""
    framed = np.pad(np.asarray(mask.cpu()), 1).astype(float)
    x, y = (np.arange(-0.5, side - 1) for side in framed.shape[::-1])
    if mask.any():
        axes.contourf(x, y, framed, levels=[0.5, 1.5], colors=[MASK], alpha=fill)
        axes.contour(x, y, framed, levels=[0.5], colors=[MASK], linewidths=1.6)


def draw_objects(axes, image, objects):
    """An image [H W 3] with objects: boxes [n 4] (x0, y0, x1, y1), masks [n H W], and names and scores where given."""
    height, width = np.shape(image)[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    for i, (box, mask) in enumerate(zip(objects["boxes"], objects["masks"], strict=True)):
        x0, y0, x1, y1 = box.tolist()
        outline(axes, mask, fill=0.3)
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=BOX, linewidth=1.8))
        if "names" in objects:
            text = objects["names"][i] + (f" {objects['scores'][i]:.2f}" if "scores" in objects else "")
            low = y0 < 0.08 * height  # then the label goes inside
            style = {"facecolor": BOX, "edgecolor": "none", "pad": 1.2}
            place = min(max(x0, 0), 0.8 * width), max(y0, 0)
            axes.text(*place, text, color="white", fontsize=8, va="top" if low else "bottom", bbox=style, clip_on=True)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def name_of(config):
    """What the paper calls a model."""
    parts = " and ".join(name for name, on in (("DI", len(config.selection) > 1), ("BATO", config.bato)) if on)
    return {"DI and BATO": "DI-MaskDINO", "": "MaskDINO"}.get(parts, f"MaskDINO with {parts}")


def pale(story):
    """The image as a background: grey, and nearly white."""
    return 0.35 * np.asarray(story.picture.convert("L"))[..., None].repeat(3, -1) / 255 + 0.65


def background(axes, story, image=None):
    axes.imshow(pale(story) if image is None else image, extent=(0, story.width, story.height, 0))
    axes.set(xlim=(0, story.width), ylim=(story.height, 0), xticks=[], yticks=[])


def patches(axes, story, tokens, scores=None, **style):
    """Tokens as the squares of the image that they stand for, coloured by score."""
    order = np.argsort(-story.sides[tokens], kind="stable")  # large ones at the back
    tokens, inner = tokens[order], 0.84
    squares = [
        Rectangle(c - s * inner / 2, s * inner, s * inner)
        for c, s in zip(story.centers[tokens], story.sides[tokens], strict=True)
    ]
    if scores is not None:
        style = {"array": scores[order], "cmap": "viridis", "norm": Normalize(0, scores.max()), "alpha": 0.75, **style}
    axes.add_collection(PatchCollection(squares, **style))


def star(axes, place):
    axes.plot(*place, marker="*", markersize=15, color=CHOSEN, markeredgecolor="white", zorder=5)


# ---- The panels, in the paper's order: each draws itself, and returns its title and what to look for -----------------


def tokens_panel(axes, story):
    background(axes, story, story.picture)
    corner = 0.03 * min(story.width, story.height)
    for height, _ in story.level_shapes:
        side = story.padded[1] / height
        for color, width in (("black", 3), ("white", 1.5)):
            axes.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor=color, linewidth=width))
    return f"The image: {len(story.centers):,} tokens", (
        "3.2.1, T_i. Backbone and encoder turn the image into tokens, one for every patch, at four scales: a white "
        "square is a patch of each. A token knows its surroundings."
    )


def first_selection(axes, story):
    index, scores = story.index(1), story.scores(1)
    background(axes, story)
    patches(axes, story, index, scores)
    on = np.any([story.on_object(i)[index] for i in range(len(story.objects))], 0).mean()
    return f"First selection: {len(index)} of {len(story.centers):,}", (
        "Eq. 1, T_s1 = S(T_i, k1). The tokens that look most like an object: violet to yellow, the surest "
        f"({scores.max():.2f}). Most background should be gone: {on:.0%} lie on an object that is found below."
    )


def interaction(axes, story):
    if not story.model.interactions:
        return without(axes, story, "De-Imbalance", "Eq. 2: no token interaction")
    tokens = story.index(1)
    chosen = int(np.flatnonzero(tokens == story.index(2)[story.objects[0]])[0])
    weights = story.attention("interactions.0.layers.0.attention")[chosen]
    here, places, strength = story.centers[tokens[chosen]], story.centers[tokens], weights / weights.max()
    background(axes, story)
    strongest = strength.argsort()[-40:]
    lines = [(here, place) for place in places[strongest]]
    axes.add_collection(LineCollection(lines, colors=CHOSEN, linewidths=2.5 * strength[strongest], alpha=0.6))
    axes.scatter(*places.T, s=(4 + 40 * strength) * min(1, 60 / len(tokens)), color=CHOSEN, alpha=0.8, linewidths=0)
    star(axes, here)
    own = story.on_object(0)[tokens]
    return "The selected talk to each other", (
        f"Eq. 2, T_s1^sa = MHSA(T_s1). The star, a token of the {story.kinds[0]}, listens along thick lines most: "
        f"{weights[own].sum():.0%} to tokens on its object, which are {own.mean():.0%} of all. Such tokens tell it how "
        "far the object reaches, and that is what a box needs."
    )


def second_selection(axes, story):
    if not story.model.interactions:
        return without(axes, story, "De-Imbalance", "Eq. 3: no second selection")
    dropped = np.setdiff1d(story.index(1), story.index(2))
    background(axes, story)
    patches(axes, story, dropped, facecolor="none", edgecolor=DARK, linewidth=0.9, linestyle=":")
    patches(axes, story, story.index(2), story.scores(2))
    return f"Second selection: {len(story.index(2))} of {len(story.index(1))}", (
        "Eq. 3, T_s2 = S(T_s1^sa, k2). Now that they have talked, the best are chosen again, and "
        f"{len(dropped)} (dotted) are dropped. Each that stays is a query: it may become an object."
    )


def initial(axes, story):
    objects, fit = story.at(0)
    draw_objects(axes, pale(story), objects)
    return "What they would answer now", (
        "The initial prediction, of T_s2. Masks learn from every pixel, boxes from four numbers; so in MaskDINO boxes "
        f"lag behind here: the imbalance. Do the boxes fit the masks? {fit:.2f} (1: to the pixel)."
    )


def residual(axes, story):
    points, weights = story.samples(story.objects[0])
    x0, y0, x1, y1 = story.at(0)[0]["boxes"][0].tolist()
    background(axes, story)
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=BOX, linewidth=1.8, linestyle="--"))
    axes.scatter(*points.T, s=2 + 60 * weights / weights.max(), color=CHOSEN, alpha=0.65, linewidths=0)
    star(axes, story.centers[story.index(2)[story.objects[0]]])
    return "They look at the image again", (
        "Eq. 4, Q_bal = MHCA(T_s2, T_i). From its box (dashed) the star reads all tokens at the dots, large ones most, "
        "also where tokens were dropped: a residual that pays for what two selections lose."
    )


def balanced(axes, story):
    objects, fit = story.at(1)
    draw_objects(axes, pale(story), objects)
    return "Balance-aware queries", (
        "What Q_bal answers for the same objects, after the first decoder layer. Compare with two panels before: do "
        f"boxes and masks fit each other, and the objects? Box against mask: {fit:.2f}."
    )


def fits(axes, story):
    values = [story.at(layer)[1] for layer in range(len(story.outputs["layers"]))]
    axes.set_axis_off()
    axes = axes.inset_axes((0.1, 0.12, 0.88, 0.86))
    axes.plot(values, "o-", color=DARK, linewidth=2)
    for layer, value in enumerate(values):
        axes.annotate(
            f"{value:.2f}",
            (layer, value),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set(ylim=(0, 1.15), xlim=(-0.4, len(values) - 0.6), xticks=range(len(values)), yticks=[0, 0.5, 1])
    axes.set_xticklabels(["T_s2", "Q_bal", *map(str, range(2, len(values)))])
    axes.spines[["top", "right"]].set_visible(False)
    return "Box against mask, by layer", (
        "How well each box fits its own mask: the IoU with the box around the mask, mean over these objects. A line "
        "that is high from the left on says that both tasks are in balance from the start."
    )


def guiding(axes, story, i):
    if not story.model.config.bato:
        return without(axes, story, "Balance-Aware Tokens\nOptimization", "Eq. 5 to 7: no guiding tokens")
    background(axes, story)
    if i >= len(story.objects):
        return "No second object", "Nothing else was found here."
    own, weights = story.guiding(i), story.attention("bato.attention")
    share = story.finest(weights[:, own].sum(1))
    usual = share.mean()
    reach = max(abs(share - usual).max(), 0.1 * usual, 1e-6)
    extent = (0, story.padded[0], story.padded[1], 0)
    axes.imshow(share, cmap=HEAT, vmin=usual - reach, vmax=usual + reach, extent=extent)
    axes.set(xlim=(0, story.width), ylim=(story.height, 0), xticks=[], yticks=[])
    outline(axes, story.masks[i])
    inside = story.finest(story.on_object(i))
    on, off = (f"{share[where].mean():.1%}" if where.any() else "none" for where in (inside, ~inside))
    measured = (
        f"Tokens on it give {on} of their attention to its guiding tokens ({own.sum()} of {len(own)}), tokens "
        f"elsewhere {off}."
    )
    if i == 0:
        return f"Who listens to the {story.kinds[i]}?", (
            "Eq. 5 to 7, T_g = N_mask(Q_bal) + N_box(Q_bal): each query makes a guiding token of where its mask and "
            f"box are. {measured}"
        )
    return f"And who to the {'other ' * (story.kinds[0] == story.kinds[i])}{story.kinds[i]}?", (
        f"Pink: more than usual, grey: less. {measured} Pink should lie on the object alone; numbers that are alike: "
        "this model has not learned to tell objects apart."
    )


def clusters(axes, story):
    if not story.model.config.bato:
        return without(axes, story, "Balance-Aware Tokens\nOptimization", "Eq. 8: T_bal is T_i")
    axes.set_axis_off()
    maps = [story.finest(story.trace[name][0].float().cpu().numpy()) for name in ("T_i", "T_bal")]
    centred = [x.reshape(-1, x.shape[-1]) - x.mean((0, 1)) for x in maps]
    *_, directions = np.linalg.svd(np.concatenate(centred), full_matrices=False)
    inside = story.finest(story.on_object(0)).flatten()
    bars = axes.inset_axes((0.3, 0.04, 0.66, 0.32))
    for left, flat, name, shade in zip((0, 0.51), centred, ("T_i", "T_bal"), ("#a9b4bf", DARK), strict=True):
        colors = flat @ directions[:3].T  # the three main directions as red, green and blue
        low, high = np.percentile(colors, (2, 98), 0)
        image = ((colors - low) / (high - low + 1e-9)).clip(0, 1).reshape(*maps[0].shape[:2], 3)
        inset = axes.inset_axes((left, 0.51, 0.49, 0.49))
        inset.imshow(image, extent=(0, story.padded[0], story.padded[1], 0))
        inset.set(xlim=(0, story.width), ylim=(story.height, 0), xticks=[], yticks=[])
        inset.set_xlabel(name, fontsize=10, labelpad=2)
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        alike = unit[inside] @ unit.T
        values = [alike[:, where].mean() if inside.any() and where.any() else 0 for where in (inside, ~inside)]
        places = np.array([0, 1]) + (0.2 if name == "T_bal" else -0.2)
        drawn = bars.barh(places, values, 0.36, color=shade)
        bars.bar_label(drawn, fmt="%.2f", fontsize=9, padding=2)
    bars.set(yticks=[0, 1], xticks=[], ylim=(1.5, -0.5))
    bars.set_yticklabels(["own object", "elsewhere"])
    bars.tick_params(length=0)
    bars.margins(x=0.25)
    bars.axvline(0, color=DARK, linewidth=0.8)
    bars.spines[:].set_visible(False)
    return "Tokens before and after", (
        "Eq. 8, T_bal = MHCA(T_i, T_g): each token moves towards its guiding tokens. Like colours: like tokens. Bars: "
        f"how like (cosine) a token of the {story.kinds[0]} is to others, in T_i (grey), T_bal (black)."
    )


def result(axes, story):
    objects, fit = story.at(-1)
    draw_objects(axes, story.picture, {**objects, "names": story.names})
    return "The answer", (
        "Eq. 9 to 11. The decoder refines the queries on T_bal (Q_ref); heads read class, score and box from each, and "
        f"the mask as a product with every pixel. Box against mask: {fit:.2f}."
    )


def without(axes, story, module, title):
    background(axes, story)
    axes.text(
        0.5, 0.5, f"This model has no\n{module}.", transform=axes.transAxes, ha="center", va="center", fontsize=12
    )
    return title, "It was trained without this module. A checkpoint of all of DI-MaskDINO shows here what it does."


ROWS = [
    ("De-Imbalance (section 3.2.2): choose tokens, let them talk, choose again",
     [tokens_panel, first_selection, interaction, second_selection]),
    ("The imbalance of boxes and masks, and the residual of De-Imbalance", [initial, residual, balanced, fits]),
    ("Balance-Aware Tokens Optimization (3.2.3): queries guide all tokens. Then the decoder answers (3.2.4)",
     [partial(guiding, i=0), partial(guiding, i=1), clusters, result]),
]  # fmt: skip

INTRODUCTION = (
    "Finding objects as boxes and as masks, step by step. De-Imbalance prepares the queries, each of which may become "
    "an object, so that boxes start as good as masks. Balance-Aware Tokens Optimization lets the queries tell every "
    "part of the image which object it belongs to. Blue is a box, orange a mask; pink is one query, the star, and what "
    "it reads. Numbers are of this image."
)


def page(model, picture, score=0.3):
    """The page as a matplotlib Figure. picture: a PIL image, RGB."""
    story = Story(model, picture, score)
    width, gap, head, text, above = 3.3, 0.25, 0.72, 1.32, 1.4  # inches
    tall = width * min(max(story.height / story.width, 0.5), 1.4)
    row_height = head + tall + text
    size = 4 * width + 5 * gap, above + 3 * row_height + 0.1
    figure = Figure(size, facecolor="white")

    def write(x, y, words, **style):  # inches from the left and from the top
        return figure.text(x / size[0], 1 - y / size[1], words, va="top", color=DARK, **style)

    title = f"How {name_of(model.config)} sees an image"
    write(gap, 0.2, title, fontsize=22, weight="bold")
    doubt = "" if story.sure else f" No object reaches a score of {score}: what follows is a guess."
    write(gap, 0.65, textwrap.fill(INTRODUCTION + doubt, 148), fontsize=11.5, linespacing=1.3)
    for row, (heading, panels) in enumerate(ROWS):
        top = above + row * row_height
        line = 1 - (top + 0.02) / size[1]
        figure.add_artist(Line2D((gap / size[0], 1 - gap / size[0]), (line, line), color="#b5bcc4", linewidth=1))
        write(gap, top + 0.1, heading, fontsize=14, weight="bold")
        for column, panel in enumerate(panels):
            left = gap + column * (width + gap)
            place = left / size[0], 1 - (top + head + tall) / size[1], width / size[0], tall / size[1]
            name, sentence = panel(figure.add_axes(place, anchor="N"), story)
            write(left, top + head - 0.25, name, fontsize=12, weight="bold")
            write(left, top + head + tall + 0.08, textwrap.fill(sentence, 44), fontsize=10, linespacing=1.25)
    return figure


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("image", type=user_path, help="any image file")
    add("--ckpt", required=True, type=user_path, metavar="CKPT", help="a checkpoint of train.py, or the authors'")
    add("--out", type=user_path, help="a .png, .svg or .pdf (explained.png, or a name that is free)")
    add("--score", type=float, default=0.3, help="least score of the objects that the page follows (%(default)s)")
    add("--test-size", type=int, nargs=2, metavar=("SHORT", "LONG"), help="of the image in the model (as trained)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    try:
        out = figure_file(args.out, "explained.png")
        model = load_model(args.ckpt, args.device)
        model.test_size = args.test_size or model.test_size
        write_figure(page(model, data.read_image(args.image), args.score), out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{out} explains what {args.ckpt} does with {args.image}")


if __name__ == "__main__":
    main()
