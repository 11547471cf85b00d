"""What flags of the command line mean: numbers, paths, the data set, and the settings of a model and its training."""

import argparse
import ast
import contextlib
import dataclasses
import typing
from pathlib import Path

from data import STRIDE
from dimaskdino import Config
from processes import rank_and_world
from recipe import Recipe

# ---- Of both programs ------------------------------------------------------------------------------------------------


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
    add("--data", **data_flag)
    add("--data-root", default="data", type=user_path, help="where the data sets lie (%(default)s)")
    add("--image-folder", type=user_path, metavar="DIR", help="where the json's file names are found (usual places)")
    add("--val-json", type=user_path, metavar="FILE", help="COCO json of the validation images, in place of --data")


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
    allowed = tuple if typing.get_origin(kind) is tuple else float | int if kind is float else kind
    if not isinstance(value, allowed):
        raise argparse.ArgumentTypeError(f"{text}: that is no {getattr(kind, '__name__', kind)}")
    return name, value


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
