"""What the authors' code computed, in small: read by tests/test_released.py, explained in README.md."""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WHOLE = HERE.parents[2] / "shared/released"  # the arrays before they were cut, where somebody has them


class Recorded:
    """The arrays of one run by name. Where the whole ones are at hand they stand for their cuts."""

    def __init__(self, run):
        with np.load(HERE / f"{run}.npz") as cut:
            keys = {key.split("[")[0]: key for key in cut.files}
            self.arrays, self.index = {name: cut[key] for name, key in keys.items()}, {}
        for name, key in keys.items():
            if "[" in key:
                parts = key[:-1].split("[")[1].split(",")
                self.index[name] = tuple(slice(None, *map(int, part[1:].split(":"))) for part in parts)
        if (whole := WHOLE / f"golden_{run}.npz").exists():
            with np.load(whole) as arrays:
                for name in self.arrays:
                    array, index = arrays[name], self.index.pop(name, ...)
                    assert np.array_equal(array[index], self.arrays[name]), f"{name} is no cut of {whole}"
                    self.arrays[name] = array

    def __getitem__(self, name):
        return self.arrays[name]

    def __contains__(self, name):
        return name in self.arrays

    def cut(self, name, ours):
        """Of our array, the numbers that `self[name]` has; of some arrays the first queries only were recorded."""
        ours = np.asarray(ours, dtype=np.float64)
        return ours[self.index[name] if name in self.index else tuple(slice(n) for n in self[name].shape)]
