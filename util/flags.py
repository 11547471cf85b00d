"""What flags of the command line mean: numbers, paths, the data set, and the settings of a model and its training."""

import argparse
import ast
import contextlib
import dataclasses
import os
import typing
from pathlib import Path

from datasets import Source
from datasets.coco import STRIDE
from datasets.geometry import AUGMENTATIONS
from dimaskdino import Config
from util.distributed import rank_and_world
from util.recipe import Recipe

# ---- Of both programs ------------------------------------------------------------------------------------------------

AMP_HELP = "autocast (bf16 where there are instructions for it, but not for the tiny backbone on a CPU; else off)"


def at_least(least, kind=int):
    """A type for argparse: numbers from `least` on, none above 64 bits, infinite or NaN."""

    def number(text):
        value = kind(text)
        if not least <= value < 2**64:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}" + " or too large" * (value >= 2**64))
        return value

    return number


def user_path(text):
    """A type for argparse: a path, with ~ for the home folder wherever the shell left it there (--out=~/x)."""
    return Path(text).expanduser()


def add_data_flags(add, **data_flag):
    """The flags of both programs that say which data set."""
    add("--data", type=os.path.expanduser, **data_flag)
    add("--data-root", default="data", type=user_path, help="where the data sets lie (%(default)s)")
    add("--image-folder", type=user_path, metavar="DIR", help="where the json's file names are found (usual places)")
    add("--val-json", type=user_path, metavar="FILE", help="COCO json of the validation images, in place of --data")


def files_of(args):
    """{flag: path} of the files that a command line names outright."""
    flags = ("train_json", "val_json", "image_folder")
    return {flag: str(path) for flag in flags if (path := getattr(args, flag, None))}


def source_of(args):
    """The Source that a command line names."""
    files = files_of(args)
    return Source(args.data or files.get("val_json"), str(args.data_root), **files)


# ---- Of training -----------------------------------------------------------------------------------------------------

# What --set may change: every field of Config and Recipe that has no flag of its own.
FLAGS = ("epochs", "batch_size", "lr", "augmentation", "image_size")
SETTABLE = typing.get_type_hints(Config) | typing.get_type_hints(Recipe)
SETTABLE = {name: kind for name, kind in SETTABLE.items() if name not in ("num_classes", *FLAGS)}


def setting(text):
    """(field, value) of FIELD=VALUE, as --set takes it."""
    name, _, value = text.partition("=")
    if name not in SETTABLE:
        raise argparse.ArgumentTypeError(f"{name}: the fields are {', '.join(SETTABLE)}")
    kind = SETTABLE[name]
    if kind is not str:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if not fits(value, kind):
        raise argparse.ArgumentTypeError(f"{text}: that is no {kind if typing.get_args(kind) else kind.__name__}")
    return name, value


def fits(value, kind):
    """Whether a value is of a field's type. A whole number is a float as well; True is no number."""
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if typing.get_args(kind):  # int | None
        return any(fits(value, part) for part in typing.get_args(kind))
    return isinstance(value, (float, int) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def with_settings(settings, args):
    """The Config or Recipe with the values of --set for its fields."""
    return dataclasses.replace(settings, **{name: value for name, value in args.set if hasattr(settings, name)})


def choose_recipe(args):
    recipe = Recipe.tiny() if args.preset == "tiny" else Recipe.bdd100k() if args.data == "bdd100k" else Recipe()
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    recipe = with_settings(recipe.replace(**given), args)
    shares = rank_and_world()[1] * args.accumulate
    if recipe.batch_size % shares:
        raise ValueError(f"--batch-size {recipe.batch_size} must be a multiple of processes x --accumulate, {shares}")
    if recipe.image_size % STRIDE:
        raise ValueError(f"--image-size {recipe.image_size} must be a multiple of {STRIDE}")
    return recipe


def choose_config(args, num_classes):
    return with_settings(dataclasses.replace(getattr(Config, args.preset)(), num_classes=num_classes), args)


def parse_training(arguments, description):
    """The flags of train.py, with what follows from the data where a flag is not given."""
    positive = at_least(1)
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    named = (
        "shapes, shapes-full, coco, bdd100k, or a folder as COCO, Roboflow, CVAT or Label Studio lay it out (shapes)"
    )
    add_data_flags(add, help=named)
    outright = (
        "COCO json of the training images, in place of --data; every tenth is held out where there is no --val-json"
    )
    add("--train-json", type=user_path, metavar="FILE", help=outright)
    presets = ["paper", "released", "maskdino", "tiny"]
    add("--preset", choices=presets, help="model and recipe (tiny for shapes, paper for all other data)")
    fields = f"change a field of the model or of its training: {', '.join(SETTABLE)}"
    add("--set", action="append", type=setting, default=[], metavar="FIELD=VALUE", help=fields)
    add("--epochs", type=positive, help="(paper: 50; tiny: 12)")
    add("--gpus", type=positive, default=1, help="processes to start on this machine (%(default)s)")
    add("--batch-size", type=positive, help="of all processes together (paper: 16, Swin-L 4; tiny: 8)")
    add("--accumulate", type=positive, default=1, help="parts to do each batch in, to save memory (%(default)s)")
    add("--checkpoint-activations", action="store_true", help="recompute activations, to save memory")
    add("--lr", type=at_least(1e-12, float), help="learning rate (paper: 1e-4; tiny: 2e-3)")
    add(
        "--image-size",
        type=positive,
        help="side of training images in px; test images change alike (paper: 1024; tiny: 128)",
    )
    add("--augmentation", choices=[*AUGMENTATIONS], help="(paper: jitter; tiny: flips)")
    add("--amp", choices=["bf16", "fp16", "off"], help=AMP_HELP)
    add("--device", choices=["cpu", "cuda"], help="(a GPU where there is one)")
    add(
        "--workers",
        type=at_least(0),
        help="processes that load images, for each training process (4 for a GPU, 0 for a CPU)",
    )
    add("--seed", type=at_least(0), default=0, help="(%(default)s)")
    add("--out", type=user_path, help="the run's folder (runs/DATA)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add(
        "--init",
        type=user_path,
        metavar="CKPT",
        help="start from those weights of a checkpoint, ours or the authors', that fit",
    )
    add(
        "--backbone-weights",
        type=os.path.expanduser,
        metavar="PATH",
        help="also in place of --init's (torchvision's, of ImageNet-1k, unless --init fills it); none: from scratch",
    )
    add("--check", action="store_true", help="only check the data: decode every image, measure the loading")
    args = parser.parse_args(arguments)
    args.data = args.data or str(args.train_json or args.val_json or "shapes")
    args.preset = args.preset or ("tiny" if args.data == "shapes" else "paper")
    args.out = args.out or Path("runs") / (Path(args.data).stem if args.train_json else Path(args.data).resolve().name)
    return args
