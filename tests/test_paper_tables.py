"""What tools/paper_tables.py promises."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import train
from dimaskdino import Config
from small_runs import SMALL, exit_code, same, weights
from tools import paper_tables
from tools.paper_tables import ROWS
from train import Recipe, choose_config, choose_recipe, parse_training

DI_OFF, MASKDINO = {"selection": (300,)}, {"selection": (300,), "bato": False}
THREE = {"bato": False, "decoder_layers": 3}
PAPER = {  # of each table what the paper's rows change of its model and recipe
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


def rows_of(number, flags):
    return paper_tables.rows_of(number, parse_training(flags.split()))


def trained_as(row, flags):
    """The Config and the Recipe that train.py makes of a row's flags."""
    row_flags, _ = paper_tables.run_of(row, flags.split(), seed=0)
    args = parse_training(row_flags)
    return choose_config(args, 80), choose_recipe(args)


# ---- The rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", PAPER)
def test_rows_change_what_the_paper_says_and_nothing_else(number):
    for row, changes in zip(rows_of(number, ""), PAPER[number], strict=True):
        config, recipe = trained_as(row, "--data bdd100k")
        weaker = {name: value for name, value in changes.items() if name == "detection_loss"}
        changes = {name: value for name, value in changes.items() if name != "detection_loss"}
        assert config == dataclasses.replace(Config.paper(), **changes), row.name
        assert recipe == dataclasses.replace(Recipe.bdd100k(), **weaker), row.name


def test_tables_1_and_2_compare_maskdino_with_di_maskdino():
    maskdino, di_maskdino = rows_of(2, "--data bdd100k")
    assert trained_as(maskdino, "--data bdd100k") == (Config.maskdino(), Recipe.bdd100k())
    assert trained_as(di_maskdino, "--data bdd100k") == (Config.paper(), Recipe.bdd100k())


@pytest.mark.parametrize(
    "flags, backbone, expected",
    [
        ("--data coco", "ResNet50", [(12, 12), (24, 24), (50, 50)]),
        ("--data coco --epochs 24", "ResNet50", [(24, 24)]),
        ("--data coco --epochs 7", "ResNet50", [(50, 7)]),
        ("--data coco --set backbone=swin_l", "Swin-L", [(12, 12), (50, 50)]),
        ("--data shapes --epochs 1", "ResNet50", [(50, 1)]),
    ],
)
def test_table_1_has_the_rows_of_the_runs_backbone_and_epochs(flags, backbone, expected):
    rows = rows_of(1, flags)[1::2]  # those of DI-MaskDINO
    assert all(backbone in row.name for row in rows)
    assert [(row.epochs, trained_as(row, flags)[1].epochs) for row in rows] == expected


def test_tables_4_to_9_take_12_epochs_on_coco_and_68_on_bdd100k():
    row = rows_of(4, "")[0]
    for flags, epochs in (("coco", 12), ("bdd100k", 68), ("coco --epochs 3", 3)):
        assert trained_as(row, f"--data {flags}")[1].epochs == epochs


def test_other_sizes_keep_their_own_in_place_of_the_papers():
    def sizes(number, flags="--data shapes --preset tiny"):
        configs = [trained_as(row, flags)[0] for row in rows_of(number, flags)]
        return [(config.selection, config.decoder_layers) for config in configs]

    assert sizes(7) == [((30,), 3), ((60, 30), 3), ((60, 45, 30), 3)]
    assert sizes(8) == [((30, 30), 3), ((60, 30), 3), ((60, 60), 3)]
    assert sizes(9) == [((60, 30), 2), ((60, 30), 3), ((60, 30), 5)]
    assert sizes(7, "--set selection=(40,20) --data shapes")[2] == ((40, 30, 20), 3)


def test_the_same_model_has_the_same_figures_in_all_of_the_papers_tables():
    figures = {}
    for number in (4, 5, 6, 7, 8, 9):
        for row, changes in zip(rows_of(number, ""), PAPER[number], strict=True):
            figures.setdefault(str(sorted(changes.items())), set()).add((row.bdd100k, row.coco))
    assert all(len(found) == 1 for found in figures.values())
    assert figures["[]"] == {((29.5, 25.7), (46.9, 42.3))}


def test_tables_share_the_folders_of_equal_runs_and_no_others():
    of_folder, folders = {}, {}
    for row in ROWS:
        run, (_, name) = trained_as(row, "--data coco"), paper_tables.run_of(row, ["--data", "coco"], 0)
        of_folder.setdefault(name, set()).add(run)
        folders.setdefault(run, set()).add(name)
    assert all(len(runs) == 1 for runs in of_folder.values())
    assert sum(len(names) == 1 for names in folders.values()) == len(folders)
    assert paper_tables.run_of(row, [], 0)[1] != paper_tables.run_of(row, [], 1)[1]


def test_other_flags_have_another_folder_but_for_those_of_the_machine():
    def plain(flags):
        return paper_tables.plain(flags.split())

    names = ["--data coco", "--data /a/own", "--data /b/own", "--data coco --lr 1e-3", "--set selection=(40,20)"]
    assert len({plain(name) for name in names}) == len(names)
    assert plain("--data coco --gpus 4 --lr 1e-3 --device cuda:1") == plain("--data coco --lr 1e-3")


# ---- A table ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(monkeypatch):
    """In place of train.py and evaluate.py, and a list of calls. train.py dies in its call number `killed`."""
    called = []

    def run(program, *flags):
        called.append(program)
        value = dict(zip(flags[::2], flags[1::2]))
        if program == "evaluate.py":
            assert Path(value["--ckpt"]).name == "last.pt"
            value["--json"].write_text(json.dumps({"AP_box": 10.0 * len(called), "AP_mask": 30.0}))
            return
        parse_training([*map(str, flags)])
        Path(flags[flags.index("--out") + 1]).mkdir(parents=True, exist_ok=True)
        if called.count("train.py") == run.killed:
            raise KeyboardInterrupt

    run.called, run.killed = called, None
    monkeypatch.setattr(paper_tables, "run", run)
    return run


FLAGS = ["--data", "shapes", "--epochs", "2"]


def test_a_table_that_was_killed_goes_on_and_the_next_one_shares_it(programs, tmp_path, capsys):
    programs.killed = 3
    with pytest.raises(KeyboardInterrupt):
        paper_tables.main(["4", *FLAGS, "--out", str(tmp_path)])
    assert programs.called == ["train.py", "evaluate.py"] * 2 + ["train.py"]
    paper_tables.main(["4", *FLAGS, "--out", str(tmp_path)])
    assert programs.called[5:] == ["train.py", "evaluate.py"] * 2
    (file,) = tmp_path.glob("*/table4.md")
    text, markdown = capsys.readouterr().out, file.read_text()
    assert markdown in text and all(f"| {row.name} " in markdown for row in rows_of(4, ""))
    assert "27.8 / 24.4" in markdown and "| -20.0 " not in markdown
    paper_tables.main(["5", *FLAGS, "--out", str(tmp_path)])  # two of its four rows are in table 4
    assert programs.called[9:] == ["train.py", "evaluate.py"] * 2


def test_a_table_has_the_spread_over_seeds_and_the_gain_seed_by_seed():
    without, with_gtg = rows_of(6, "")
    ap = {without: [(10.0, 20.0), (14.0, 20.0)], with_gtg: [(11.0, 23.0), (17.0, 25.0)]}
    results = {row: {seed: {"AP_box": b, "AP_mask": m} for seed, (b, m) in enumerate(x)} for row, x in ap.items()}
    first, second = paper_tables.lines_of(results)
    assert first == ["without GTG", "12.0 ± 2.8", "20.0 ± 0.0", "", "", "28.6 / 25.4", "", "46.5 / 42.2", ""]
    assert second[1:5] == ["14.0 ± 4.2", "24.0 ± 1.4", "+2.0 ± 1.4", "+4.0 ± 1.4"]
    assert second[5:] == ["29.5 / 25.7", "+0.9 / +0.3", "46.9 / 42.3", "+0.4 / +0.1"]
    one = {without: {0: {"AP_box": 10.0, "AP_mask": None}}, with_gtg: {}}
    assert [line[1:5] for line in paper_tables.lines_of(one)] == [["10.0", "-", "", ""], ["-", "-", "-", "-"]]


def test_a_finished_run_is_evaluated_once_by_the_program_itself(folder, trained, tmp_path, monkeypatch):
    def start(program, *flags):
        if program == "evaluate.py":
            return program_itself(program, *flags)
        assert exit_code(train.main, [*map(str, flags)]) == 0  # which has nothing left to do

    program_itself = paper_tables.run
    monkeypatch.setattr(paper_tables, "run", start)
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    flags = [*SMALL, "--data", str(folder), "--epochs", "2"]
    metrics = paper_tables.finish(flags, out)
    assert metrics["images"] == 5 and "AP_mask" in metrics
    monkeypatch.setattr(paper_tables, "run", None)
    assert paper_tables.finish(flags, out) == metrics and same(weights(out), weights(trained))


def test_a_program_that_fails_ends_the_table_with_its_exit_code(monkeypatch):
    for code, expected in ((2, 2), (-9, 137)):
        child = SimpleNamespace(wait=lambda code=code: code)
        monkeypatch.setattr(subprocess, "Popen", lambda *_, child=child: child)
        assert exit_code(paper_tables.run, "train.py") == expected


@pytest.mark.parametrize(
    "flags", ["--image-size 100", "--set backbone=vgg", "--batch-size 7 --accumulate 2", "--preset maskdino"]
)
def test_a_wrong_flag_of_a_table_ends_in_a_line(tmp_path, capsys, flags):
    assert exit_code(paper_tables.main, ["4", "--out", str(tmp_path), *flags.split()]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_figure_1_has_a_panel_for_each_model_with_means_over_its_runs(trained, tmp_path, capsys, monkeypatch):
    def run(program, *flags):
        assert program == "evaluate.py" and "--layers" in flags and flags[-2:] == ("--data", "x")
        layers = [{"AP_box": 10.0, "AP_mask": 20.0}, {"AP_box": 30.0 + len(ran), "AP_mask": 25.0}]
        flags[flags.index("--json") + 1].write_text(json.dumps({"layers": layers}))
        ran.append(flags)

    ran = []
    monkeypatch.setattr(paper_tables, "run", run)
    checkpoint, out = str(trained / "last.pt"), tmp_path / "new/figure.png"
    paper_tables.main(["figure1", checkpoint, checkpoint, "--out", str(out), "--data", "x"])
    text = capsys.readouterr().out
    assert "DI-MaskDINO, 2 checkpoint(s)" in text and "| 30.5 ± 0.7 | 25.0 ± 0.0 | +5.5 ± 0.7" in text
    assert Image.open(out).width > 1000


def test_models_are_called_as_the_paper_calls_them():
    config, off = Config.paper(), {"selection": (300,), "bato": False}
    named = {"": {}, "DI alone": {"bato": False}, "BATO alone": {"selection": (300,)}}
    for name, changes in (named | {"neither DI nor BATO": off, "MaskDINO": off | {"decoder_layers": 9}}).items():
        assert paper_tables.name_of(dataclasses.replace(config, **changes)) == (name or "DI-MaskDINO")


def test_figure_3_draws_images_under_every_checkpoint_and_the_truth(folder, trained, tmp_path):
    out = tmp_path / "figure.png"
    paper_tables.main(["figure3", *[str(trained / "last.pt")] * 2, "--out", str(out)])
    picture = Image.open(out)
    assert picture.width > 3 * 600 and picture.height > 4 * 450  # three columns, four images of 64 x 48, enlarged


@pytest.mark.parametrize("figure", ["figure1", "figure3"])
def test_figures_end_in_a_line_where_files_are_wrong(figure, trained, tmp_path, capfd):
    (tmp_path / "a.pt").write_text("nothing")
    assert exit_code(paper_tables.main, [figure, str(tmp_path / "a.pt"), "--out", str(tmp_path / "f.png")]) == 2
    assert "a.pt" in capfd.readouterr().err
    beneath_a_file = tmp_path / "a.pt/f.png"
    assert exit_code(paper_tables.main, [figure, str(trained / "last.pt"), "--out", str(beneath_a_file)]) == 2
    assert "a file is in the way" in capfd.readouterr().err
