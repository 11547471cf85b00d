"""Every table of the paper, and figures 1 and 3, are one command.

    python -m tools.paper_tables 4 --seeds 3                      table 4 with the tiny model on synthetic shapes
    python -m tools.paper_tables 4 --data bdd100k --gpus 4        as in the paper; any flag of train.py goes along
    python -m tools.paper_tables 1 --data coco --set backbone=swin_l --batch-size 4 --backbone-weights F  Swin-L's
    python -m tools.paper_tables figure1 CKPT [CKPT ...]          AP_box and AP_mask at every layer, as bars
    python -m tools.paper_tables figure3 CKPT CKPT                the same images under both, and the truth

Each row and seed is trained in a folder named after what it changes of its preset, so tables share rows. What is
trained stays trained, and what was stopped, in whatever way, goes on from its last checkpoint. AP is that of the last
epoch. The table is printed, and after every run written as Markdown, beside the paper's figures.

The rows carry the paper's sizes. A model of other sizes keeps its own: its k1 and k2 stand for the paper's 600 and 300
(what lies between, for 450), its number of decoder layers for 6, so 3 and 9 are half and one and a half of it, rounded
up, at least 2. With tiny, (600, 450, 300) is (60, 45, 30), and 3, 6, 9 layers are 2, 3, 5. The head of a table says so.

Tables 1 and 2 train the rows of the model's backbone (any but Swin-L stands for ResNet50), and of these the rows of as
many epochs as the run has; if there are none, the longest. Without --epochs, `--data coco` trains table 1's rows of 12,
24 and 50 epochs, and the rows of tables 3 to 9 for 12, as the paper does.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torchvision.ops import masks_to_boxes, nms

import evaluate
import train
from datasets import coco as data
from datasets.geometry import identity
from datasets.shapes import SHAPES
from tools.explain import BOX, MASK, draw_objects, figure_file, name_of, write_figure
from util.flags import at_least, choose_config, choose_recipe, files_of, parse_training, setting, user_path
from util.weights import config_of, load_model, read_checkpoint

MASKDINO = "selection=(300,) bato=False"  # neither De-Imbalance nor BATO
THREE, LESS, RANDOM = " bato=False decoder_layers=3", " detection_loss=0.1", " position_token=random"  # table 3
AREAS = [kind + area for kind in ("AP_box", "AP_mask") for area in ("", "_S", "_M", "_L")]


class Row(NamedTuple):
    """A model and what the paper says of it. The first row of a group is the one that the others are compared with."""

    name: str
    settings: str | None  # what --set changes, in the paper's sizes; None: another method, which is not trained here
    bdd100k: tuple = ()  # AP_box and AP_mask in the paper
    coco: tuple = ()
    group: tuple = ()  # tables 1 and 2: (backbone, epochs)
    figures: str = ""  # tables 1 and 2: AP_box, S, M, L, AP_mask, S, M, L, FPS in the paper


def methods(text):
    """The rows of tables 1 and 2 from lines of `backbone epochs figures method`."""
    ours = {"MaskDINO": MASKDINO + " decoder_layers=9", "DI-MaskDINO": "bato=True"}
    for backbone, epochs, *figures, method in (line.split(maxsplit=11) for line in text.strip().splitlines()):
        yield Row(method, ours.get(method), group=(backbone, int(epochs)), figures=" ".join(figures))


TABLES = {
    1: [*methods("""
        ResNet50 36  41.0 24.9 43.9 53.3  37.2 18.6 39.5 53.3  21.0  Mask RCNN
        ResNet50 36  44.9  -    -    -    39.7 22.6 42.2 50.6   5.5  HTC
        ResNet50 50  48.5 30.1 51.6 64.8  40.1 20.9 43.7 59.4   7.0  SOLQ
        ResNet50 36  50.9 34.6 54.1 64.6   -    -    -    -     6.8  DINO
        ResNet50 50   -    -    -    -    43.7 23.4 47.2 64.8   5.3  Mask2Former
        ResNet50 12  45.7  -    -    -    41.4 21.1 44.2 61.4   8.0  MaskDINO
        ResNet50 12  46.9 28.8 49.5 62.9  42.3 22.0 44.8 62.8   7.7  DI-MaskDINO
        ResNet50 24  48.4  -    -    -    44.2 23.9 47.0 64.0   8.0  MaskDINO
        ResNet50 24  49.6 31.7 52.6 65.3  44.8 24.3 47.8 65.0   7.7  DI-MaskDINO
        ResNet50 50  51.7 34.2 54.7 67.3  46.3 26.1 49.3 66.1   8.0  MaskDINO
        ResNet50 50  51.9 36.3 54.7 66.7  46.7 27.5 49.8 66.2   7.7  DI-MaskDINO
        Swin-L   12  52.2 34.8 55.6 69.9  47.2 26.3 50.3 69.1   3.4  MaskDINO
        Swin-L   12  53.3 36.7 56.7 70.4  47.9 27.7 51.1 69.3   3.0  DI-MaskDINO
        Swin-L   50  56.8 40.2 60.2 72.3  51.0 31.3 54.1 71.2   3.4  MaskDINO
        Swin-L   50  57.8 41.5 61.2 73.9  51.8 31.8 55.1 72.2   3.0  DI-MaskDINO
    """)],
    2: [*methods("""
        ResNet50 50  25.5 15.7 32.8 56.1  20.7 15.7 26.6 49.1  20.1  Mask RCNN
        ResNet50 50  26.9 15.7 35.4 55.3  21.1 11.0 26.7 46.4   4.8  HTC
        ResNet50 50  27.0 16.5 35.3 45.6  19.6 10.1 25.8 37.4   6.3  SOLQ
        ResNet50 36  28.9 18.0 37.0 48.1   -    -    -    -     6.1  DINO
        ResNet50 50   -    -    -    -    19.6  8.4 25.9 41.0   4.7  Mask2Former
        ResNet50 68  28.1 17.4 36.1 47.9  25.3 14.2 31.8 48.1   6.7  MaskDINO
        ResNet50 68  29.5 18.0 37.4 50.4  25.7 14.5 32.1 48.1   6.4  DI-MaskDINO
        Swin-L   68  30.2 19.0 37.5 48.6  27.0 15.4 32.6 50.5   3.2  MaskDINO
        Swin-L   68  31.4 19.4 40.4 48.7  27.9 16.6 34.1 51.2   2.8  DI-MaskDINO
    """)],
    3: [  # imbalance tolerance: 3 decoder layers, no BATO
        Row("MaskDINO", MASKDINO + THREE, (27.5, 23.7), (), ("MaskDINO",)),
        Row("MaskDINO, detection loss x 0.1", MASKDINO + THREE + LESS, (24.7, 23.0), (), ("MaskDINO",)),
        Row("MaskDINO, random boxes", MASKDINO + THREE + RANDOM, (21.5, 21.9), (), ("MaskDINO",)),
        Row("DI-MaskDINO", THREE, (27.9, 24.9)),
        Row("DI-MaskDINO, detection loss x 0.1", THREE + LESS, (27.1, 25.2)),
        Row("DI-MaskDINO, random boxes", THREE + RANDOM, (23.8, 23.7)),
    ],
    4: [
        Row("#1 neither", "selection=(300,) bato=False", (27.8, 24.4), (45.6, 41.2)),
        Row("#2 DI", "selection=(600,300) bato=False", (28.8, 25.2), (46.4, 42.1)),
        Row("#3 BATO", "selection=(300,) bato=True", (28.3, 24.9), (46.2, 41.8)),
        Row("#4 DI and BATO", "selection=(600,300) bato=True", (29.5, 25.7), (46.9, 42.3)),
    ],
    5: [
        Row("guidance T_i (DI off)", "selection=(300,)", (28.3, 24.9), (46.2, 41.8)),
        Row("guidance T_s1", "guidance=T_s1", (28.5, 24.9), (46.6, 42.0)),
        Row("guidance T_s2", "guidance=T_s2", (28.9, 25.6), (46.7, 42.2)),
        Row("guidance Q_bal", "guidance=Q_bal", (29.5, 25.7), (46.9, 42.3)),
    ],
    6: [
        Row("without GTG", "gtg=False", (28.6, 25.4), (46.5, 42.2)),
        Row("with GTG", "gtg=True", (29.5, 25.7), (46.9, 42.3)),
    ],
    7: [
        Row("single selection, 300 (DI off)", "selection=(300,)", (28.3, 24.9), (46.2, 41.8)),
        Row("double, 600 and 300", "selection=(600,300)", (29.5, 25.7), (46.9, 42.3)),
        Row("triple, 600, 450 and 300", "selection=(600,450,300)", (29.3, 25.5), (46.6, 42.2)),
    ],
    8: [
        Row("k1 = 300, k2 = 300", "selection=(300,300)", (29.1, 25.5), (46.6, 42.3)),
        Row("k1 = 600, k2 = 300", "selection=(600,300)", (29.5, 25.7), (46.9, 42.3)),
        Row("k1 = 600, k2 = 600", "selection=(600,600)", (29.3, 25.3), (46.8, 42.4)),
    ],
    9: [
        Row("3 decoder layers", "decoder_layers=3", (28.7, 25.3), (45.8, 41.3)),
        Row("6 decoder layers", "decoder_layers=6", (29.5, 25.7), (46.9, 42.3)),
        Row("9 decoder layers", "decoder_layers=9", (28.9, 25.6), (46.9, 42.5)),
    ],
}  # fmt: skip


# ---- A row, a run ----------------------------------------------------------------------------------------------------


def own_size(name, value, base):
    """The value of a setting of the paper in the sizes of the model that the flags choose, `base`: see the top."""
    if name == "selection":
        k1, k2 = base.selection[0], base.selection[-1]
        return tuple(round(k2 + (k1 - k2) * (k - 300) / 300) for k in value)
    return max(2, math.ceil(value * base.decoder_layers / 6)) if name == "decoder_layers" else value


def flags_of(row, number, flags, seed):
    """The flags with which train.py trains a row, without --out; None if it is not to be trained."""
    args = parse_training(flags, "")
    base, as_paper = choose_config(args, 80), args.data == "coco" and args.epochs is None
    if row.settings is None:
        return None
    own = ["--epochs", "12"] if as_paper else []
    if number <= 2:
        backbone, epochs = row.group
        own = ["--epochs", str(epochs)] if as_paper and number == 1 else []
        lengths = {row.group[1] for row in TABLES[number] if row.settings is not None}
        if not own and epochs != (args.epochs if args.epochs in lengths else max(lengths)):
            return None
        if (backbone == "Swin-L") != (base.backbone == "swin_l"):
            return None
    for name, value in map(setting, row.settings.split()):
        own += ["--set", f"{name}={own_size(name, value, base)}"]
    return [*flags, *own, "--seed", str(seed)]


def digest(**paths):
    """Eight characters that tell files or folders of the same name apart. paths: by what they are."""
    whole = "\n".join(f"{name} {Path(path).resolve()}" for name, path in paths.items())
    return hashlib.sha256(whole.encode()).hexdigest()[:8]


def name_of_data(args):
    """The name of the data; with a digest of where it lies, unless it is one that everybody has in the usual place."""
    if args.data in (*SHAPES, "coco", "bdd100k"):
        places = {} if args.data_root == Path("data") else {"data_root": args.data_root}
    else:
        places = {"data": args.data}
    places |= files_of(args)
    return Path(args.data).name + f"-{digest(**places)}" * bool(places)


def name_of_run(args):
    """What a run is called: after its data, its preset, and all that it changes of that preset."""
    plain = parse_training(["--data", args.data, "--preset", args.preset], "")
    names = [name_of_data(args), args.preset]
    for choose in (lambda args: choose_config(args, 80), choose_recipe):
        before, now = dataclasses.asdict(choose(plain)), dataclasses.asdict(choose(args))
        names += [f"{name}={now[name]}" for name in now if now[name] != before[name]]
    names += [f"amp={args.amp}"] * bool(args.amp)
    names += [f"init={args.init.stem}-{digest(path=args.init)}"] if args.init else []
    if weights := args.backbone_weights:
        names += [f"backbone_weights={Path(weights).stem}" + f"-{digest(path=weights)}" * (weights != "none")]
    return "-".join(names).replace(" ", "").replace("(", "").replace(",)", "").replace(")", "")


def folder_of(args, root):
    """Where a run lies: named after all that it is, and its seed."""
    return root / f"{name_of_run(args)}-seed={args.seed}"


def measured(args, folder, speed):
    """The AP of a finished run, after its last epoch, and its speed if wanted. None while there is more to do."""
    log, metrics, epochs = folder / "log.jsonl", folder / "speed.json", choose_recipe(args).epochs
    found = None
    for line in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            found = record if "AP_box" in record and record["epoch"] == epochs else found
    if found and speed:
        return {**json.loads(metrics.read_text()), **found} if metrics.exists() else None
    return found


def where(args):
    """The flags that evaluate.py needs too. Which data it was trained on, the checkpoint knows."""
    flags = {"--data-root": args.data_root, "--device": args.device}
    return [word for name, value in flags.items() if value for word in (name, str(value))]


def finish(flags, root, speed):
    """Train and measure what is not yet, and return the metrics. Another process on the same run is waited for."""
    args = parse_training(flags, "")
    folder = folder_of(args, root)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process gone
        if not measured(args, folder, speed=False):
            print(f"\n{folder}", flush=True)
            with contextlib.suppress(*[SystemExit] * (args.gpus > 1)):  # so ends the launcher, well or not
                train.main([*flags, "--out", str(folder), "--resume"])
            for number in (signal.SIGINT, signal.SIGTERM):  # train.py finishes its step; here they end the program
                signal.signal(number, signal.SIG_DFL)
        if not measured(args, folder, speed=False):
            sys.exit(f"{folder} was not finished: the same command goes on from here")
        if not measured(args, folder, speed):
            part = folder / "speed.json.part"
            evaluate.main(["--ckpt", str(folder / "last.pt"), "--speed", "--json", str(part), *where(args)])
            os.replace(part, folder / "speed.json")
        return measured(args, folder, speed)


# ---- A table ---------------------------------------------------------------------------------------------------------


def spread(values, sign=""):
    """Mean and deviation (n - 1) of what is known of some values."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{deviation}"


def gains(row, first, results, name):
    """The difference of a metric between two rows, seed by seed."""
    seeds = results[row].keys() & results[first].keys()
    pairs = [(results[row][seed][name], results[first][seed][name]) for seed in sorted(seeds)]
    return "" if row is first else spread([a - b for a, b in pairs if None not in (a, b)], "+")


def lines_of(number, results):
    """The lines of a table, its head first. results: {row: {seed: metrics}}"""
    first = {}
    for row in TABLES[number]:
        if row.settings is not None:
            first.setdefault(row.group, row)
    if number <= 2:
        areas = [name if name in ("AP_box", "AP_mask") else name[-1] for name in AREAS]
        yield ["", "epochs", *areas, "FPS", "GFLOP", "M parameters", "box, gain", "mask, gain"]
        for row in TABLES[number]:
            backbone, epochs = row.group
            yield [f"{row.name}, {backbone}", str(epochs), *row.figures.split(), *[""] * 4]
            if runs := results[row].values():
                measures = [spread([run.get(name) for run in runs]) for name in (*AREAS, "FPS", "GFLOP")]
                millions = spread([run["parameters"] / 1e6 for run in runs])
                more = [gains(row, first[row.group], results, name) for name in ("AP_box", "AP_mask")]
                yield [f"- here, {len(runs)} seed(s)", f"{[*runs][0]['epoch']:g}", *measures, millions, *more]
        return
    yield ["", "AP_box", "AP_mask", "box, gain", "mask, gain", "BDD100K, paper", "gain", "COCO, paper", "gain"]
    for row in TABLES[number]:
        line, start = [row.name], first[row.group]
        line += [spread([run[name] for run in results[row].values()]) for name in ("AP_box", "AP_mask")]
        line += [gains(row, start, results, name) for name in ("AP_box", "AP_mask")]
        for ours, theirs in ((row.bdd100k, start.bdd100k), (row.coco, start.coco)):
            gain = [f"{a - b:+.1f}" for a, b in zip(ours, theirs, strict=True)] if row is not start else ()
            line += [" / ".join(map(str, ours)), " / ".join(gain)]
        yield line


def aligned(lines, markdown=False):
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["-" * width for width in widths], *rows[1:]])


def head_of(number, flags, seeds):
    """What a reader has to know of the figures that were measured here."""
    args = parse_training(flags, "")
    base = choose_config(args, 80)
    epochs = ""
    if number > 2:
        recipe = choose_recipe(parse_training(flags_of(TABLES[number][0], number, flags, seeds[0]), ""))
        epochs = f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}, "
    trained = f"Table {number} on {args.data}, preset {args.preset}, {epochs}seeds {seeds[0]} to {seeds[-1]}. "
    k1, k2 = base.selection[0], base.selection[-1]
    layers = ", ".join(str(own_size("decoder_layers", n, base)) for n in (3, 6, 9))
    sizes = f"k1, k2 = {k1}, {k2} stand for the paper's 600, 300; {layers} decoder layers for its 3, 6, 9. "
    sizes = "" if (base.selection, base.decoder_layers) == ((600, 300), 6) else sizes
    return trained + sizes + "AP after the last epoch, ± its deviation over seeds; gains are taken seed by seed."


def table(number, flags, seeds, root):
    """Train and measure every row of a table for every seed, print the table, and write it after every run."""
    args = parse_training(flags, "")
    try:  # a wrong flag is found here, before any training
        base = choose_config(args, 80)
        if len(base.selection) < 2 or not base.bato:
            raise ValueError("the rows switch DI and BATO off themselves: give a preset and settings with both")
        runs = [(row, seed, flags_of(row, number, flags, seed)) for seed in seeds for row in TABLES[number]]
        runs = [(row, seed, row_flags) for row, seed, row_flags in runs if row_flags]
        for _, _, row_flags in runs:
            folder_of(parse_training(row_flags, ""), root)
        file, head = root / f"table{number}-{name_of_run(args)}.md", head_of(number, flags, seeds)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    results = {row: {} for row in TABLES[number]}
    for row, seed, row_flags in runs:
        results[row][seed] = finish(row_flags, root, speed=number <= 2)
        file.write_text(f"{head}\n\n{aligned([*lines_of(number, results)], markdown=True)}\n")
    print(f"\n{head}\n\n{aligned([*lines_of(number, results)])}\n\nas Markdown: {file}")


# ---- Figures ---------------------------------------------------------------------------------------------------------


def layers_of(checkpoint, flags):
    """The metrics of every layer, the initial prediction first."""
    with tempfile.TemporaryDirectory() as folder:
        out = ["--out", folder, "--json", f"{folder}/metrics.json"]
        evaluate.main(["--ckpt", str(checkpoint), "--layers", *out, *flags])
        return json.loads(Path(folder, "metrics.json").read_text())["layers"]


def figure1(args):
    """Bars of AP_box and AP_mask at every layer: a panel for each model, the mean over its checkpoints."""
    models, flags = {}, [*where(args), *(["--data", args.data] if args.data else [])]
    for checkpoint in args.ckpt:
        config = config_of(read_checkpoint(checkpoint))
        models.setdefault(config, []).append(layers_of(checkpoint, flags))
    most = max(len(runs[0]) for runs in models.values())
    figure = Figure((1 + 1.1 * most * len(models), 4.4), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (config, runs) in zip(panels, models.items(), strict=True):
        name = f"{name_of(config)}{f', {len(runs)} checkpoints' * (len(runs) > 1)}"
        ap = np.array([[[layer[kind] for kind in ("AP_box", "AP_mask")] for layer in run] for run in runs], float)
        layers, gaps, mean = np.arange(ap.shape[1]), ap[..., 0] - ap[..., 1], ap.mean(0)
        error = ap.std(0, ddof=1) if len(runs) > 1 else 0 * mean
        lines = [["layer", "AP_box", "AP_mask", "gap"]]
        for layer in layers:
            (box, mask), gap = ap[:, layer].T, spread(gaps[:, layer], "+")
            lines.append([str(layer), spread(box), spread(mask), gap])
            place = layer, (mean + error)[layer].max()
            axes.annotate(gap.replace(" ", "\n", 1), place, (0, 6), textcoords="offset points", ha="center")
        for kind, left, colour, label in ((0, -0.2, BOX, "AP_box"), (1, 0.2, MASK, "AP_mask")):
            whiskers = error[:, kind] if len(runs) > 1 else None
            axes.bar(layers + left, mean[:, kind], 0.4, yerr=whiskers, color=colour, label=label)
        axes.set(title=name, xlabel="layer (0: the initial prediction)", xticks=layers)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
        print(f"\n{name}\n{aligned(lines)}")
    panels[0].set(ylabel="AP, %")
    panels[0].legend(loc="upper left", frameon=False)
    figure.suptitle("AP of boxes and masks at every layer; above the bars the gap, AP_box - AP_mask")
    return figure


def figure3(args):
    """What each checkpoint finds in the same validation images, its best guess of each object, beside the truth."""
    models = [load_model(checkpoint, args.device or "cpu") for checkpoint in args.ckpt]
    names = [f"{number}: {name_of(model.config)}" for number, model in enumerate(models, 1)]
    print("\n".join(f"{name}, {checkpoint}" for name, checkpoint in zip(names, args.ckpt, strict=True)))
    name, files = (args.data, {}) if args.data else (models[0].trained_on, models[0].trained_files)
    if not name:
        raise ValueError(f"{args.ckpt[0]} does not say which data it was trained on: add --data")
    dataset = data.open_dataset(name, args.data_root, "val", identity, training=False, files=files)
    places = data.evenly_spaced(args.images, len(dataset))
    figure = Figure((4 * len(models) + 4, 4 * len(places)), layout="constrained")
    for row, place in zip(figure.subplots(len(places), len(models) + 1, squeeze=False), places, strict=True):
        image, target = dataset[place]
        for axes, name, model in zip(row, names, models, strict=False):
            objects = evaluate.predict(model, image, args.score)
            best = nms(objects["boxes"], objects["scores"], 0.7).tolist()  # the same query may have several classes
            draw_objects(axes, image.permute(1, 2, 0), {key: [x[i] for i in best] for key, x in objects.items()})
            axes.set_title(name)
        boxes = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])  # to the far side of the last pixel
        classes = [dataset.classes[label] for label in target["labels"]]
        draw_objects(row[-1], image.permute(1, 2, 0), {"boxes": boxes, "masks": target["masks"], "names": classes})
        row[-1].set_title("truth")
    return figure


# ---- The command line ------------------------------------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_subparsers(dest="which", required=True, metavar="1 to 9, figure1, figure3")
    for number in TABLES:
        add = which.add_parser(str(number), allow_abbrev=False, description="... and any flag of train.py").add_argument
        add("--seeds", type=int, default=1, help="how many, from --seed on (%(default)s)")
        add("--out", type=user_path, default=Path("runs/tables"), help="the folder of all runs (%(default)s)")
    for figure in ("figure1", "figure3"):
        add = which.add_parser(figure).add_argument
        checkpoints = "checkpoints; figure 1 takes the mean of those of one configuration"
        add("ckpt", nargs="+", type=user_path, metavar="CKPT", help=checkpoints)
        add("--out", type=user_path, help=f"a .png, .svg or .pdf ({figure}.png, or a name that is free)")
        add("--data", type=os.path.expanduser, help="as in evaluate.py (that of the training)")
        add("--data-root", default="data", type=user_path, help="where the data sets lie (%(default)s)")
        add("--device", choices=["cpu", "cuda"], help="(a GPU where there is one; figure 3: the CPU)")
        if figure == "figure3":
            add("--images", type=at_least(1), default=4, help="how many (%(default)s)")
            add("--score", type=float, default=0.3, help="least score of what is drawn (%(default)s)")
    args, flags = parser.parse_known_args(arguments)
    if args.which.isdigit():
        seeds = range(first := parse_training(flags, "").seed, first + max(1, args.seeds))
        return table(int(args.which), flags, seeds, args.out)
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        out = figure_file(args.out, f"{args.which}.png")
        write_figure({"figure1": figure1, "figure3": figure3}[args.which](args), out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
