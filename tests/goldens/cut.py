"""Cuts the arrays beside this file out of the whole ones: python -m goldens.cut FOLDER

The name of an array that was cut ends in what was kept of it, "T_bal[:1:1,:1700:31,:256:5]": every 31st token and fifth
channel. The steps are odd, so that sines and cosines, all heads and all columns of a map occur.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from goldens import HERE
from goldens.numbers import image

NUMBERS = 3000  # of one array, at most
ENTIRE = ("in_", "tgt", "dnq_", "final0_masks", "grad_n")  # what the checks start from, or small as it is
SEEDS = {"r50_a": [200], "maskdino3s_r50": [200], "train_r50": [200, 201], "swinl": [77], "losses": []}  # of the images
UNREAD = ("mask_features_meanstd", "mask_features_updated_meanstd", "sel1_mask_boxes", "sel1_ref_logit", "valid_ratios")
UNREAD += ("min_gaps", "gaps_", "mask_box_eps", "final0_gap", "out_hw", "noised_labels", "known_ind", "map_known")


def steps(shape):
    """The steps along each axis that leave at most NUMBERS numbers, made larger where most are left."""
    steps = [1] * len(shape)
    while math.prod(left := [-(-n // step) for n, step in zip(shape, steps, strict=True)]) > NUMBERS:
        steps[left.index(max(left))] += 2
    return steps


def main(folder):
    for run, seeds in SEEDS.items():
        with np.load(Path(folder) / f"golden_{run}.npz") as whole:
            arrays = {name: whole[name] for name in whole.files if not any(part in name for part in UNREAD)}
        images = [arrays.pop(f"image{i}") for i in range(len(seeds))]
        assert all(np.array_equal(x, image(*x.shape[1:], seed)) for x, seed in zip(images, seeds, strict=True))
        cut = {}
        for name, array in arrays.items():
            shape, kept = array.shape, steps(array.shape)
            if max(kept, default=1) > 1 and not name.startswith(ENTIRE):
                array = array[tuple(slice(None, None, step) for step in kept)]
                text = [f":{n}:{step}" for n, step in zip(shape, kept, strict=True)]
                name = f"{name}[{','.join(text)}]"
            cut[name] = array
        np.savez_compressed(HERE / f"{run}.npz", **cut)
        print(f"{run}: {len(cut)} arrays, {(HERE / f'{run}.npz').stat().st_size / 2**10:.0f} KiB")
    floor = json.loads((Path(folder) / "noise_floor.json").read_text())
    noise = {run: {name: differs["rms"] for name, differs in floor[f"golden_{run}"].items()} for run in list(SEEDS)[:2]}
    (HERE / "noise.json").write_text(json.dumps(noise, indent=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
