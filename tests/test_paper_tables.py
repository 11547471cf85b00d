"""What tools/paper_tables.py promises."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
from dimaskdino import Config
from small_runs import SMALL, exit_code, log_of, train_in
from tools import paper_tables
from tools.paper_tables import TABLES
from util.flags import choose_config, choose_recipe, parse_training
from util.recipe import Recipe

# ---- The rows --------------------------------------------------------------------------------------------------------

DI_OFF, MASKDINO = {"selection": (300,)}, {"selection": (300,), "bato": False}
THREE = {"bato": False, "decoder_layers": 3}
ROWS = {  # of each table what the paper's rows change of the paper's model and recipe
    3: [
        *[MASKDINO | THREE | more for more in ({}, {"detection_loss": 0.1}, {"position_token": "random"})],
        *[THREE | more for more in ({}, {"detection_loss": 0.1}, {"position_token": "random"})],
    ],
    4: [MASKDINO, {"bato": False}, DI_OFF, {}],
    5: [DI_OFF, {"guidance": "T_s1"}, {"guidance": "T_s2"}, {}],
    6: [{"gtg": False}, {}],
    7: [DI_OFF, {}, {"selection": (600, 450, 300)}],
    8: [{"selection": (300, 300)}, {}, {"selection": (600, 600)}],
    9: [{"decoder_layers": 3}, {}, {"decoder_layers": 9}],
}


def trained_as(row, number, *flags):
    """The Config and the Recipe that train.py makes of a row's flags; None if the row is not trained."""
    row_flags = paper_tables.flags_of(row, number, list(flags), seed=0)
    if row_flags is not None:
        args = parse_training(row_flags, "")
        return choose_config(args, 80), choose_recipe(args)


@pytest.mark.parametrize("number", ROWS)
def test_every_row_of_tables_3_to_9_changes_what_the_paper_says_and_nothing_else(number):
    for row, changes in zip(TABLES[number], ROWS[number], strict=True):
        config, recipe = trained_as(row, number, "--data", "bdd100k")
        of_recipe = {name: value for name, value in changes.items() if name == "detection_loss"}
        of_config = {name: value for name, value in changes.items() if name != "detection_loss"}
        assert config == dataclasses.replace(Config.paper(), **of_config), row.name
        assert recipe == dataclasses.replace(Recipe.bdd100k(), **of_recipe), row.name


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_the_rows_of_tables_1_and_2_are_maskdino_and_di_maskdino(preset):
    for row in TABLES[2]:
        made = trained_as(row, 2, "--data", "bdd100k", "--preset", preset)
        if row.name == "MaskDINO" and row.group == ("ResNet50", 68):
            own = {} if preset == "paper" else {"box_guide": "box", "guiding_tokens": 50}
            own |= {} if preset == "paper" else {"guide_value": "T_g_mask", "pixel_tokens": "T_bal"}  # not used
            assert made == (dataclasses.replace(Config.maskdino(), **own), Recipe.bdd100k())
        elif row.name == "DI-MaskDINO" and row.group == ("ResNet50", 68):
            assert made == (getattr(Config, preset)(), Recipe.bdd100k())
        else:
            assert made is None


def epochs_trained(number, *flags):
    """(backbone, epochs of the row, epochs of its training) of the DI-MaskDINO rows that are trained."""
    rows = [row for row in TABLES[number] if row.name == "DI-MaskDINO"]
    made = [(row, trained_as(row, number, *flags)) for row in rows]
    return [(*row.group, run[1].epochs) for row, run in made if run]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--data coco", [("ResNet50", 12, 12), ("ResNet50", 24, 24), ("ResNet50", 50, 50)]),
        ("--data coco --epochs 24", [("ResNet50", 24, 24)]),
        ("--data coco --set backbone=swin_l", [("Swin-L", 12, 12), ("Swin-L", 50, 50)]),
        ("--data shapes", [("ResNet50", 50, 12)]),
        ("--data shapes --epochs 1", [("ResNet50", 50, 1)]),
    ],
)
def test_table_1_trains_the_rows_of_the_runs_backbone_and_epochs(flags, expected):
    assert epochs_trained(1, *flags.split()) == expected


def test_tables_4_to_9_take_12_epochs_on_coco_and_68_on_bdd100k_unless_told_otherwise():
    row = TABLES[4][0]
    for flags, epochs in (("coco", 12), ("bdd100k", 68), ("shapes", 12), ("coco --epochs 3", 3)):
        assert trained_as(row, 4, "--data", *flags.split())[1].epochs == epochs


def test_tiny_and_other_sizes_keep_their_own_in_place_of_the_papers():
    def of(number, *flags):
        made = [trained_as(row, number, "--data", "shapes", *flags)[0] for row in TABLES[number]]
        return [(config.selection, config.decoder_layers) for config in made]

    assert of(7) == [((30,), 3), ((60, 30), 3), ((60, 45, 30), 3)]
    assert of(8) == [((30, 30), 3), ((60, 30), 3), ((60, 60), 3)]
    assert of(9) == [((60, 30), 2), ((60, 30), 3), ((60, 30), 5)]
    assert of(3)[0] == ((30,), 2)
    assert of(7, "--set", "selection=(40,20)")[2] == ((40, 30, 20), 3)
    head = paper_tables.head_of(9, ["--data", "shapes"], range(3))
    assert "k1, k2 = 60, 30 stand for the paper's 600, 300; 2, 3, 5 decoder layers for its 3, 6, 9" in head
    assert "stand for" not in paper_tables.head_of(9, ["--data", "coco"], range(3))


def test_rows_of_other_tables_with_the_same_settings_share_a_folder_and_all_others_have_their_own(tmp_path):
    folders = {}
    for number in ROWS:
        for row in TABLES[number]:
            flags = paper_tables.flags_of(row, number, ["--data", "bdd100k"], 0)
            made = trained_as(row, number, "--data", "bdd100k")
            folders.setdefault(paper_tables.folder_of(parse_training(flags, ""), tmp_path), set()).add(str(made))
    assert all(len(made) == 1 for made in folders.values())
    distinct = {str(sorted(changes.items())) for table in ROWS.values() for changes in table}
    assert len(folders) == len(distinct)
    for other in (["--seed", "1"], ["--epochs", "3"], ["--init", "a.pt"], ["--lr", "1e-3"], ["--data", "coco"]):
        plain, changed = (parse_training(["--data", "bdd100k", *more], "") for more in ([], other))
        assert paper_tables.folder_of(plain, tmp_path) != paper_tables.folder_of(changed, tmp_path)


def test_other_data_and_weights_of_the_same_name_have_folders_and_tables_of_their_own(tmp_path):
    runs = ["--data coco", "--data /a/coco", "--data /b/coco", "--data coco --data-root /c", "--data coco --amp fp16"]
    runs += [f"--data coco --{flag} /a/x" for flag in ("image-folder", "val-json", "train-json")]
    runs += ["--train-json /b/x", "--train-json /a/x --val-json /a/y"]
    runs += [f"--data coco --{flag} {path}" for flag in ("init", "backbone-weights") for path in ("/a/x.pt", "/b/x.pt")]
    parsed = [parse_training(flags.split(), "") for flags in runs]
    assert len({paper_tables.folder_of(args, tmp_path) for args in parsed}) == len(runs)
    assert len({paper_tables.name_of_run(args) for args in parsed}) == len(runs)


@pytest.mark.parametrize("flags", ["coco --data-root /a", "/a/own", "coco --train-json /a/x", "coco --init /a/x.pt"])
def test_the_folder_of_a_run_does_not_depend_on_where_the_command_is_given(tmp_path, monkeypatch, flags):
    args, folders = parse_training(["--data", *flags.split()], ""), set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        folders.add(paper_tables.folder_of(args, tmp_path))
    assert len(folders) == 1


def test_the_papers_figures_are_as_many_as_its_columns_and_the_same_model_has_the_same_everywhere():
    for number in (1, 2):
        assert all(len(row.figures.split()) == 9 for row in TABLES[number])
    paper = {}
    for number in (4, 5, 6, 7, 8, 9):
        for row, changes in zip(TABLES[number], ROWS[number], strict=True):
            paper.setdefault(str(sorted(changes.items())), set()).add((row.bdd100k, row.coco))
    assert all(len(figures) == 1 for figures in paper.values())
    assert paper["[]"] == {((29.5, 25.7), (46.9, 42.3))}


# ---- A table ---------------------------------------------------------------------------------------------------------


def test_a_table_has_mean_and_deviation_over_seeds_and_the_gain_seed_by_seed():
    rows = TABLES[6]
    ap = {rows[0]: [(10.0, 20.0), (14.0, 20.0)], rows[1]: [(11.0, 23.0), (17.0, 25.0)]}
    results = {row: {seed: dict(zip(("AP_box", "AP_mask"), x, strict=True)) for seed, x in enumerate(xs)}
               for row, xs in ap.items()}  # fmt: skip
    _, without, with_gtg = paper_tables.lines_of(6, results)
    assert without == ["without GTG", "12.0 ± 2.8", "20.0 ± 0.0", "", "", "28.6 / 25.4", "", "46.5 / 42.2", ""]
    assert with_gtg[1:5] == ["14.0 ± 4.2", "24.0 ± 1.4", "+2.0 ± 1.4", "+4.0 ± 1.4"]
    assert with_gtg[5:] == ["29.5 / 25.7", "+0.9 / +0.3", "46.9 / 42.3", "+0.4 / +0.1"]
    only_one = paper_tables.lines_of(6, {rows[0]: {0: results[rows[0]][0]}, rows[1]: {}})
    assert [line[1] for line in only_one] == ["AP_box", "10.0", "-"]


def run_of(folder, out):
    return [*SMALL, "--data", str(folder), "--out", str(out), "--seeds", "1"]


def finished(out):
    """When the runs that are finished were last written to, by their folders' names."""
    return {
        run.name: (run / "last.pt").stat().st_mtime_ns
        for run in out.iterdir()
        if run.is_dir() and (run / "log.jsonl").exists() and any("AP_box" in record for record in log_of(run))
    }


def test_a_table_that_was_killed_goes_on_without_repeating_what_was_finished_and_the_next_one_shares_it(
    folder, tmp_path, capsys
):
    out = tmp_path / "tables"
    program = subprocess.Popen(
        [sys.executable, "-m", "tools.paper_tables", "4", *run_of(folder, out)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    begun = 0
    for line in program.stdout:  # a folder is named when its training begins
        begun += line.startswith(str(out))
        if begun == 3:
            break
    program.send_signal(signal.SIGKILL)
    program.wait()
    program.stdout.close()
    before = finished(out)
    assert len(before) == 2
    time.sleep(0.01)

    paper_tables.main(["4", *run_of(folder, out)])
    after = finished(out)
    assert len(after) == 4 and all(after[name] == moment for name, moment in before.items())
    (file,) = out.glob("table4-*.md")
    text, markdown = capsys.readouterr().out, file.read_text()
    for row in TABLES[4]:
        assert f"\n{row.name} " in text and f"| {row.name} " in markdown
    assert "27.8 / 24.4" in text and "27.8 / 24.4" in markdown and "1 epoch, seeds 0 to 0" in text

    paper_tables.main(["5", *run_of(folder, out)])  # two of its four rows are in table 4
    both = finished(out)
    assert len(both) == 6 and all(both[name] == moment for name, moment in after.items())


def test_table_2_shows_other_methods_the_papers_figures_and_speed_and_size_of_both_models(folder, tmp_path, capsys):
    jsons = [folder / "annotations" / f"instances_{split}.json" for split in ("train", "val")]
    files = ["--train-json", str(jsons[0]), "--val-json", str(jsons[1]), "--out", str(tmp_path)]
    paper_tables.main(["2", *SMALL, *files])
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["SOLQ, ResNet50"][-9:] == ["27.0", "16.5", "35.3", "45.6", "19.6", "10.1", "25.8", "37.4", "6.3"]
    measured = [json.loads(path.read_text()) for path in tmp_path.glob("*/speed.json")]
    assert len(measured) == 2 and all(m["FPS"] > 0 and m["parameters"] > 1e5 for m in measured)
    logged = [log_of(path.parent)[-1] for path in tmp_path.glob("*/speed.json")]
    assert [m["AP_box"] for m in measured] == pytest.approx([record["AP_box"] for record in logged], rel=1e-5)


@pytest.mark.parametrize("flags", ["--image-size 100", "--set backbone=vgg", "--batch-size 7 --accumulate 2"])
def test_a_wrong_flag_of_a_table_ends_in_a_line(tmp_path, capsys, flags):
    assert exit_code(paper_tables.main, ["4", "--out", str(tmp_path), *flags.split()]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_flags_that_train_does_not_know_and_presets_without_di_and_bato_are_refused(tmp_path, capsys):
    assert exit_code(paper_tables.main, ["4", "--out", str(tmp_path), "--learning-rate", "1"]) == 2
    assert exit_code(paper_tables.main, ["4", "--out", str(tmp_path), "--preset", "maskdino"]) == 2
    assert "with both" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- Figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maskdino(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("maskdino")
    assert train_in(folder, out, "--set", "selection=(6,)", "--set", "bato=False") == 0
    return out


def test_the_last_layer_of_figure_1_is_plain_evaluation_to_the_digit(folder, trained, tmp_path):
    flags = ["--data", str(folder), "--device", "cpu"]
    layers = paper_tables.layers_of(trained / "last.pt", flags)
    plain = tmp_path / "plain.json"
    evaluate.main(["--ckpt", str(trained / "last.pt"), "--out", str(tmp_path), "--json", str(plain), *flags])
    whole = json.loads(plain.read_text())
    assert layers[-1] == {name: whole[name] for name in layers[-1]} and len(layers) == 3 and "AP_box" in layers[-1]


def test_figure_1_prints_and_draws_each_model_and_means_over_checkpoints_of_one(
    folder, trained, maskdino, tmp_path, capsys
):
    checkpoints = [str(run / "last.pt") for run in (maskdino, trained, trained)]
    before = (trained / "predictions.json").stat().st_mtime_ns
    for name in ("figure.png", "figure.svg"):
        paper_tables.main(["figure1", *checkpoints, "--data", str(folder), "--out", str(tmp_path / name)])
        assert (tmp_path / name).stat().st_size > 1000
    text = capsys.readouterr().out
    assert "\nMaskDINO\n" in text and "\nDI-MaskDINO, 2 checkpoints\n" in text and "± 0.0" in text
    assert (trained / "predictions.json").stat().st_mtime_ns == before  # nothing of the user's is written over


def test_figure_3_draws_each_image_under_every_checkpoint_and_the_truth(folder, trained, maskdino, tmp_path):
    checkpoints = [str(run / "last.pt") for run in (maskdino, trained)]
    flags = ["--data", str(folder), "--images", "2", "--score", "0.01", "--out", str(tmp_path / "figure.png")]
    paper_tables.main(["figure3", *checkpoints, *flags])
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_figure_3_finds_the_files_that_the_first_model_was_trained_with(folder, trained, tmp_path):
    files = {f"{split}_json": str(folder / f"annotations/instances_{split}.json") for split in ("train", "val")}
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    torch.save(checkpoint | {"data": "gone", "files": files}, tmp_path / "last.pt")
    paper_tables.main(["figure3", str(tmp_path / "last.pt"), "--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_figure_needs_data_and_a_place_to_be_written_to(trained, tmp_path, capsys, monkeypatch):
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    unknown = {name: x for name, x in checkpoint.items() if name not in ("data", "files", "classes")}
    torch.save(unknown, tmp_path / "a.pt")
    assert exit_code(paper_tables.main, ["figure3", str(tmp_path / "a.pt"), "--out", str(tmp_path / "f.png")]) == 2
    assert "a.pt does not say which data" in capsys.readouterr().err
    monkeypatch.setattr(paper_tables, "read_checkpoint", None)
    for out in ("f.txt", "a.pt/f.png"):
        assert exit_code(paper_tables.main, ["figure1", str(tmp_path / "a.pt"), "--out", str(tmp_path / out)]) == 2
        assert out in capsys.readouterr().err


def test_a_figure_of_a_file_that_is_no_checkpoint_ends_with_its_name(tmp_path, capsys):
    (tmp_path / "a.pt").write_text("nothing")
    for figure in ("figure1", "figure3"):
        assert exit_code(paper_tables.main, [figure, str(tmp_path / "a.pt")]) == 2
        assert "a.pt" in capsys.readouterr().err
