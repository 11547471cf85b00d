"""Makes docs/explain.html, the page of docs/shapes.pt, and its screenshot at Eq. 8: python docs/explain.py

The image is chosen by a rule: the first held-out image of `shapes` in which three objects or more are found, and Eq. 2
and Eq. 8 tell each of them from the rest: tokens on the object give its tokens, and its guiding tokens, more attention
than by chance, and at least 1.5 times what tokens elsewhere give them.
"""

import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets.images import read_image
from datasets.shapes import make_shapes
from tools.explain import page, page_data
from util.weights import load_model

HERE = Path(__file__).parent


def tells_objects_apart(trained, path):
    data = page_data(trained, read_image(path))
    attention = data["listens"] + data["attends"]
    return len(data["queries"]) >= 3 and all(one["on"] >= max(1.5 * one["off"], one["chance"]) for one in attention)


def main():
    torch.set_num_threads(1)  # adds numbers up in one order, so that the page is the same to the byte
    trained = load_model(HERE / "shapes.pt")
    data = HERE.parent / "data/shapes"
    make_shapes(data, "val")
    paths = sorted((data / "val").glob("*.jpg"))
    chosen = next(path for path in paths if tells_objects_apart(trained, path))
    out = HERE / "explain.html"
    out.write_text(page(trained, read_image(chosen)))
    size = "--window-size=1280,760"
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1.5", size]
    command = ["chromium", *flags, f"--screenshot={HERE / 'explain.png'}", f"{out.as_uri()}#8"]
    subprocess.run(command, check=True, capture_output=True)
    print(f"{out} explains {chosen}")


if __name__ == "__main__":
    main()
