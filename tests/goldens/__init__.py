"""What the authors' code computed, in small: read by tests/test_released.py, explained in README.md."""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


class Recorded:
    """The arrays of one run by name, many of them cut: `index` tells what was kept."""

    def __init__(self, run):
        with np.load(HERE / f"{run}.npz") as cut:
            keys = {key.split("[")[0]: key for key in cut.files}
            self.arrays = {name: cut[key] for name, key in keys.items()}
        self.index = {}
        for name, key in keys.items():
            if "[" in key:
                parts = key[:-1].split("[")[1].split(",")
                self.index[name] = tuple(slice(None, *map(int, part[1:].split(":"))) for part in parts)

    def __getitem__(self, name):
        return self.arrays[name]

    def __contains__(self, name):
        return name in self.arrays

    def cut(self, name, ours):
        """Of our array, the numbers that `self[name]` has; of some arrays the first queries only were recorded."""
        ours = np.asarray(ours, dtype=np.float64)
        return ours[self.index[name] if name in self.index else tuple(slice(n) for n in self[name].shape)]
