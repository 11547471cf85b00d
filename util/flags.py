"""Flags that train.py and evaluate.py share, and types for argparse."""

import argparse
import os
import re
from pathlib import Path

from datasets import Source

AMP_HELP = "autocast (bf16 where there are instructions for it, but not for the tiny backbone on a CPU; else off)"


def at_least(least, kind=int):
    """A type for argparse: numbers from `least` up to 64 bits, neither infinite nor NaN."""

    def number(text):
        value = kind(text)
        if value >= 2**64:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if not value >= least:  # NaN as well
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return value

    return number


def user_path(text):
    """A type for argparse: a path, with ~ expanded where the shell does not (--out=~/x)."""
    return Path(text).expanduser()


def device_name(text):
    """A type for argparse: cpu, cuda or one of several GPUs."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is none of cpu, cuda, cuda:0, cuda:1, ...")
    return text


def add_data_flags(add, **data_flag):
    """Adds the flags of both programs that choose the data set."""
    add("--data", type=os.path.expanduser, **data_flag)
    add("--data-root", default="data", type=user_path, help="where the data sets lie (%(default)s)")
    add("--image-folder", type=user_path, metavar="DIR", help="where the json's file names are found (usual places)")
    add("--val-json", type=user_path, metavar="FILE", help="COCO json of the validation images, in place of --data")


def add_device_flags(add):
    """Adds the flags of both programs that choose device, autocast and workers."""
    add("--amp", choices=["bf16", "fp16", "off"], help=AMP_HELP)
    add("--compile", action="store_true", help="torch.compile the model: minutes at the start, faster after that")
    add("--device", type=device_name, metavar="cpu|cuda|cuda:N", help="(a GPU where there is one)")
    workers = "processes that load images, for each process that computes (4 for a GPU, 0 for a CPU)"
    add("--workers", type=at_least(0), help=workers)


def source_of(args):
    """The Source that a command line names."""
    given = {name: getattr(args, name, None) for name in ("train_json", "val_json", "image_folder")}
    files = {name: str(path) for name, path in given.items() if path}
    return Source(args.data or files.get("val_json"), str(args.data_root), **files)
