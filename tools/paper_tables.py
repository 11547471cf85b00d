"""Every table of the paper, and figures 1 and 3, are one command.

    python -m tools.paper_tables 4 --seeds 3                      table 4 with the tiny model on synthetic shapes
    python -m tools.paper_tables 4 --data bdd100k --gpus 4        as in the paper; any flag of train.py goes along
    python -m tools.paper_tables 1 --data coco --set backbone=swin_l --batch-size 4 --backbone-weights F  Swin-L's
    python -m tools.paper_tables figure1 CKPT [CKPT ...]          AP_box and AP_mask at every layer, as bars
    python -m tools.paper_tables figure3 CKPT CKPT                the same images under both, and the truth

Each row and seed is a run of train.py. Its folder is named after the flags and after what the row changes, so tables
share rows. A finished run is skipped, one that was stopped goes on. AP is that of evaluate.py on the last checkpoint.
Rows carry the paper's sizes. In a model of other sizes, k1 and k2 stand for 600 and 300 (what lies between, for 450),
and the number of decoder layers for 6, so 3 and 9 are half and one and a half of it, rounded up, at least 2. Tables 1
and 2 have the rows of the model's backbone (any but Swin-L stands for ResNet50) and of as many epochs as the run has;
if there are none, the longest. Without --epochs, COCO takes those of the row: 12 in tables 3 to 9.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from datasets import Source, open_dataset
from datasets.coco import evenly_spaced, read_record
from datasets.geometry import identity
from evaluate import coco_results, encode, find, load_model
from train import choose_config, choose_recipe, parse_training, setting
from util.flags import at_least, user_path
from util.log import try_output, unused
from util.pictures import SCORE, draw, sheet

NINE = "selection=(300,) bato=False decoder_layers=9"  # MaskDINO: neither DI nor BATO
THREE = "bato=False decoder_layers=3"  # table 3
LESS = " detection_loss=0.1"
RANDOM = " position_token=random"
METRICS = ("AP_box", "AP_mask")
COLUMNS = ["", "AP_box", "AP_mask", "box, gain", "mask, gain", "BDD100K, paper", "gain", "COCO, paper", "gain"]


class Row(NamedTuple):
    """A model and the paper's figures of it. The first row of a group is the one that the others are compared with."""

    table: int
    name: str
    settings: str  # of --set, in the paper's sizes
    bdd100k: tuple = ()  # AP_box and AP_mask
    coco: tuple = ()
    group: str = ""
    epochs: int = 12  # on COCO


ROWS = [
    Row(1, "MaskDINO, ResNet50, 12 epochs", NINE, (), (45.7, 41.4), "ResNet50, 12", 12),
    Row(1, "DI-MaskDINO, ResNet50, 12 epochs", "bato=True", (), (46.9, 42.3), "ResNet50, 12", 12),
    Row(1, "MaskDINO, ResNet50, 24 epochs", NINE, (), (48.4, 44.2), "ResNet50, 24", 24),
    Row(1, "DI-MaskDINO, ResNet50, 24 epochs", "bato=True", (), (49.6, 44.8), "ResNet50, 24", 24),
    Row(1, "MaskDINO, ResNet50, 50 epochs", NINE, (), (51.7, 46.3), "ResNet50, 50", 50),
    Row(1, "DI-MaskDINO, ResNet50, 50 epochs", "bato=True", (), (51.9, 46.7), "ResNet50, 50", 50),
    Row(1, "MaskDINO, Swin-L, 12 epochs", NINE, (), (52.2, 47.2), "Swin-L, 12", 12),
    Row(1, "DI-MaskDINO, Swin-L, 12 epochs", "bato=True", (), (53.3, 47.9), "Swin-L, 12", 12),
    Row(1, "MaskDINO, Swin-L, 50 epochs", NINE, (), (56.8, 51.0), "Swin-L, 50", 50),
    Row(1, "DI-MaskDINO, Swin-L, 50 epochs", "bato=True", (), (57.8, 51.8), "Swin-L, 50", 50),
    Row(2, "MaskDINO, ResNet50, 68 epochs", NINE, (28.1, 25.3), (), "ResNet50, 68", 68),
    Row(2, "DI-MaskDINO, ResNet50, 68 epochs", "bato=True", (29.5, 25.7), (), "ResNet50, 68", 68),
    Row(2, "MaskDINO, Swin-L, 68 epochs", NINE, (30.2, 27.0), (), "Swin-L, 68", 68),
    Row(2, "DI-MaskDINO, Swin-L, 68 epochs", "bato=True", (31.4, 27.9), (), "Swin-L, 68", 68),
    Row(3, "MaskDINO", "selection=(300,) " + THREE, (27.5, 23.7), (), "MaskDINO"),
    Row(3, "MaskDINO, detection loss x 0.1", "selection=(300,) " + THREE + LESS, (24.7, 23.0), (), "MaskDINO"),
    Row(3, "MaskDINO, random boxes", "selection=(300,) " + THREE + RANDOM, (21.5, 21.9), (), "MaskDINO"),
    Row(3, "DI-MaskDINO", THREE, (27.9, 24.9)),
    Row(3, "DI-MaskDINO, detection loss x 0.1", THREE + LESS, (27.1, 25.2)),
    Row(3, "DI-MaskDINO, random boxes", THREE + RANDOM, (23.8, 23.7)),
    Row(4, "#1 neither", "selection=(300,) bato=False", (27.8, 24.4), (45.6, 41.2)),
    Row(4, "#2 DI", "bato=False", (28.8, 25.2), (46.4, 42.1)),
    Row(4, "#3 BATO", "selection=(300,)", (28.3, 24.9), (46.2, 41.8)),
    Row(4, "#4 DI and BATO", "bato=True", (29.5, 25.7), (46.9, 42.3)),
    Row(5, "guidance T_i (DI off)", "selection=(300,)", (28.3, 24.9), (46.2, 41.8)),
    Row(5, "guidance T_s1", "guidance=T_s1", (28.5, 24.9), (46.6, 42.0)),
    Row(5, "guidance T_s2", "guidance=T_s2", (28.9, 25.6), (46.7, 42.2)),
    Row(5, "guidance Q_bal", "guidance=Q_bal", (29.5, 25.7), (46.9, 42.3)),
    Row(6, "without GTG", "gtg=False", (28.6, 25.4), (46.5, 42.2)),
    Row(6, "with GTG", "gtg=True", (29.5, 25.7), (46.9, 42.3)),
    Row(7, "single selection, 300 (DI off)", "selection=(300,)", (28.3, 24.9), (46.2, 41.8)),
    Row(7, "double, 600 and 300", "selection=(600,300)", (29.5, 25.7), (46.9, 42.3)),
    Row(7, "triple, 600, 450 and 300", "selection=(600,450,300)", (29.3, 25.5), (46.6, 42.2)),
    Row(8, "k1 = 300, k2 = 300", "selection=(300,300)", (29.1, 25.5), (46.6, 42.3)),
    Row(8, "k1 = 600, k2 = 300", "selection=(600,300)", (29.5, 25.7), (46.9, 42.3)),
    Row(8, "k1 = 600, k2 = 600", "selection=(600,600)", (29.3, 25.3), (46.8, 42.4)),
    Row(9, "3 decoder layers", "decoder_layers=3", (28.7, 25.3), (45.8, 41.3)),
    Row(9, "6 decoder layers", "decoder_layers=6", (29.5, 25.7), (46.9, 42.3)),
    Row(9, "9 decoder layers", "decoder_layers=9", (28.9, 25.6), (46.9, 42.5)),
]


def rows_of(number, args):
    """The rows of a table that these flags of train.py train."""
    rows = [row for row in ROWS if row.table == number]
    if number > 2:
        return rows
    backbone = "Swin-L" if choose_config(args, 80).backbone == "swin_l" else "ResNet50"
    rows = [row for row in rows if row.group.startswith(backbone)]
    if args.data == "coco" and args.epochs is None:
        return rows
    return [row for row in rows if row.epochs == args.epochs] or rows[-2:]


def own_size(name, value, base):
    """The value of a setting of the paper in the sizes of the model that the flags choose, `base`: see the top."""
    if name == "selection":
        k1 = base.selection[0]
        k2 = base.selection[-1]
        return tuple(round(k2 + (k1 - k2) * (k - 300) / 300) for k in value)
    if name == "decoder_layers":
        return max(2, math.ceil(value * base.decoder_layers / 6))
    return value


def run_of(row, flags, seed):
    """The flags with which train.py trains a row, without --out, and the name of its folder."""
    args = parse_training(flags)
    base = choose_config(args, 80)
    usual = dataclasses.asdict(base) | dataclasses.asdict(choose_recipe(args))
    own = ["--seed", str(seed)]
    names = []
    if args.data == "coco" and args.epochs is None:
        own += ["--epochs", str(row.epochs)]
        names.append(f"epochs={row.epochs}")
    for name, value in map(setting, row.settings.split()):
        value = own_size(name, value, base)
        own += ["--set", f"{name}={value}"]
        if value != usual[name]:
            names.append(f"{name}={value}")
    return [*flags, *own], plain([*sorted(names), f"seed={seed}"])


def plain(words):
    """Words as the name of a file, without the flags that say where a run takes place."""
    words = re.sub(r"--(gpus|workers|device)[-=][^-]+-?|[( ]|,?\)", "", "-".join(words))
    return re.sub(r"[^\w.,=]+", "-", words).strip("-")


def run(program, *flags):
    """Run train.py or evaluate.py; where it fails, this program ends with its exit code."""
    child = subprocess.Popen([sys.executable, Path(__file__).parents[1] / program, *map(str, flags)])
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the program as well, which then ends
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def finish(flags, folder):
    """Train and evaluate a run as far as that is not done yet, and return its metrics."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        print(f"\n{folder}", flush=True)
        run("train.py", *flags, "--out", folder, "--resume")
        args = parse_training(flags)
        device = ["--device", args.device] if args.device else []
        run("evaluate.py", "--ckpt", folder / "last.pt", "--json", metrics, *device)
    return json.loads(metrics.read_text())


def spread(values, sign=""):
    """Mean and deviation (n - 1) of what is known of some values."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{deviation}"


def lines_of(results):
    """The lines of a table. results: {row: {seed: metrics}}. Gains are taken seed by seed."""
    first = {}
    for row, runs in results.items():
        start = first.setdefault(row.group, row)
        pairs = [(runs[seed], results[start][seed]) for seed in runs if seed in results[start]]
        line = [row.name]
        line += [spread([run[name] for run in runs.values()]) for name in METRICS]
        for name in METRICS:
            gain = spread([a[name] - b[name] for a, b in pairs if None not in (a[name], b[name])], "+")
            line.append("" if row is start else gain)
        for ours, theirs in ((row.bdd100k, start.bdd100k), (row.coco, start.coco)):
            gain = [] if row is start else [f"{a - b:+.1f}" for a, b in zip(ours, theirs)]
            line += [" / ".join(map(str, ours)), " / ".join(gain)]
        yield line


def in_markdown(columns, lines):
    """A table with columns of one width each."""
    lines = [columns, *lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def table(number, flags, seeds, root):
    """Train and evaluate every row of a table for every seed, and write the table after every run."""
    args = parse_training(flags)
    base = choose_config(args, 80)
    if len(base.selection) < 2 or not base.bato:
        raise ValueError("the rows switch DI and BATO off themselves: give a preset and settings with both")
    results = {row: {} for row in rows_of(number, args)}
    runs = [(row, seed, *run_of(row, flags, seed)) for seed in range(seeds) for row in results]
    folder = root / (plain(flags) or "shapes")
    file = folder / f"table{number}.md"
    for row, seed, row_flags, name in runs:
        results[row][seed] = finish(row_flags, folder / name)
        lines = in_markdown(COLUMNS, lines_of(results))
        file.write_text(
            f"Table {number}, {shlex.join(['train.py', *flags])}, {seeds} seed(s). k1, k2 = "
            f"{base.selection[0]}, {base.selection[-1]} and {base.decoder_layers} decoder layers stand for the paper's "
            f"600, 300 and 6; ± is the deviation over seeds; gains are taken seed by seed.\n\n{lines}\n"
        )
    print(f"\n{file}\n\n{file.read_text()}")


def name_of(config):
    """The paper's name of a model, or what distinguishes it in table 4."""
    di = len(config.selection) > 1
    if di and config.bato:
        return "DI-MaskDINO"
    if di or config.bato:
        return "DI alone" if di else "BATO alone"
    return "MaskDINO" if config.decoder_layers == 9 else "neither DI nor BATO"


def figure1(args, flags):
    """Bars of AP_box and AP_mask at every layer: a panel for each model, the mean over its checkpoints."""
    models = {}
    for checkpoint in args.ckpt:
        config = load_model(checkpoint).model.config
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "metrics.json")
            run("evaluate.py", "--ckpt", checkpoint, "--layers", "--out", folder, "--json", file, *flags)
            layers = json.loads(file.read_text())["layers"]
        models.setdefault(config, []).append([[layer[name] for name in METRICS] for layer in layers])
    figure = Figure((1 + 7.7 * len(models), 4.4), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (config, runs) in zip(panels, models.items()):
        ap = np.array(runs, float)  # [runs layers 2]
        mean = ap.mean(0)
        layers = np.arange(ap.shape[1])
        error = ap.std(0, ddof=1) if len(runs) > 1 else 0 * mean
        lines = []
        for layer in layers:
            box, mask = ap[:, layer].T
            gap = spread(box - mask, "+")
            lines.append([str(layer), spread(box), spread(mask), gap])
            top = layer, (mean + error)[layer].max()
            axes.annotate(gap.replace(" ", "\n", 1), top, (0, 6), textcoords="offset points", ha="center")
        axes.bar(layers - 0.2, mean[:, 0], 0.4, yerr=error[:, 0], color="#1f6fd6", label="AP_box")
        axes.bar(layers + 0.2, mean[:, 1], 0.4, yerr=error[:, 1], color="#f07f13", label="AP_mask")
        axes.set(title=name_of(config), xlabel="layer (0: the initial prediction)", ylabel="AP, %", xticks=layers)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
        print(f"\n{name_of(config)}, {len(runs)} checkpoint(s)\n{in_markdown(['layer', *METRICS, 'gap'], lines)}")
    panels[0].legend(loc="upper left", frameon=False)
    figure.suptitle("AP of boxes and masks at every layer; above the bars the gap, AP_box - AP_mask")
    figure.savefig(args.out, format="png", dpi=150)


def figure3(args):
    """The same validation images under every checkpoint, and the truth beside them."""
    models = [load_model(checkpoint) for checkpoint in args.ckpt]
    source = Source(args.data) if args.data else models[0].source
    if source is None:
        raise ValueError(f"{args.ckpt[0]} does not say which data it was trained on: add --data")
    dataset = open_dataset(source, "val", identity, training=False)
    names = dict(zip(dataset.category_ids, dataset.classes))
    pictures = []
    for index in evenly_spaced(4, len(dataset)):
        image_id = dataset.image_ids[index]
        image = read_record(dataset.folder, dataset.images[image_id])
        for trained in models:
            found = find(trained, image, SCORE, None, encode)
            pictures.append(draw(image, coco_results(found, image_id, dataset.category_ids), names))
        pictures.append(draw(image, dataset.annotations[image_id], names))
    titles = [f"{number}: {name_of(trained.model.config)}" for number, trained in enumerate(models, 1)]
    sheet(pictures, [*titles, "truth"]).save(args.out, format="PNG")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_subparsers(dest="which", required=True, metavar="1 to 9, figure1, figure3")
    for number in map(str, range(1, 10)):
        add = which.add_parser(number, allow_abbrev=False, description="... and any flag of train.py").add_argument
        add("--seeds", type=at_least(1), default=1, help="how many, from 0 on (%(default)s)")
        add("--out", type=user_path, default=Path("runs/tables"), help="the folder of all runs (%(default)s)")
    for figure, more in (("figure1", "... and flags of evaluate.py, such as --data"), ("figure3", None)):
        add = which.add_parser(figure, allow_abbrev=False, description=more).add_argument
        add("ckpt", nargs="+", type=user_path, metavar="CKPT", help="checkpoints")
        add("--out", type=user_path, help=f"a PNG file ({figure}.png, or a name that is free)")
    add("--data", type=os.path.expanduser, help="data set (that of the training)")
    args, flags = parser.parse_known_args(arguments)
    if flags and args.which == "figure3":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        if args.which.isdigit():
            return table(int(args.which), flags, args.seeds, args.out)
        args.out = args.out or unused(Path(f"{args.which}.png"))
        try_output(args.out, is_folder=False)
        if args.which == "figure1":
            figure1(args, flags)
        else:
            figure3(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
