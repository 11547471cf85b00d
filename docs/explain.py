"""Makes docs/explain.html, the page of docs/shapes.pt, and its screenshot at Eq. 8: python docs/explain.py

The image is chosen by a rule: the first held-out image of `shapes` in which three objects or more are found, and Eq. 8
tells each of them from the rest: tokens on the object pay its guiding tokens at least 1.5 times the attention that
tokens elsewhere pay them.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets.images import read_image
from tools.explain import page, page_data
from util.weights import load_model

HERE = Path(__file__).parent


def shows_eq8(trained, path):
    attention = [one["attend"] for one in page_data(trained, read_image(path))["objects"]]
    return len(attention) >= 3 and all(one["on"] and one["on"] >= 1.5 * one["off"] for one in attention)


def main():
    trained = load_model(HERE / "shapes.pt")
    paths = sorted((HERE.parent / "data/shapes/val").glob("*.jpg"))
    chosen = next(path for path in paths if shows_eq8(trained, path))
    out = HERE / "explain.html"
    out.write_text(page(trained, read_image(chosen)))
    picture = f"--screenshot={HERE / 'explain.png'}"
    flags = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--force-device-scale-factor=1.5",
        "--window-size=1280,720",
    ]
    subprocess.run(["chromium", *flags, picture, f"{out.as_uri()}#8"], check=True, capture_output=True)
    print(f"{out} explains {chosen}")


if __name__ == "__main__":
    main()
