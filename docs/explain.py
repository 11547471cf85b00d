"""Makes docs/explain.html, the page of docs/shapes.pt, and its screenshot at Eq. 8: python docs/explain.py

The image is chosen by a rule: of the first 100 held-out images of `shapes`, one with three objects or more, in which
Eq. 8 tells the worst of its objects apart best, that is with the largest least ratio of the attention that tokens on an
object and tokens elsewhere pay to its guiding tokens.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets.images import read_image
from tools.explain import page, page_data
from util.weights import load_model

HERE = Path(__file__).parent


def least_ratio(trained, path):
    objects = page_data(trained, read_image(path))["objects"]
    ratios = [(one["attend"]["on"] or 0) / (one["attend"]["off"] or 1) for one in objects]
    return min(ratios) if len(ratios) >= 3 else 0


def main():
    trained = load_model(HERE / "shapes.pt")
    paths = sorted((HERE.parent / "data/shapes/val").glob("*.jpg"))[:100]
    best = max(paths, key=lambda path: least_ratio(trained, path))
    out = HERE / "explain.html"
    out.write_text(page(trained, read_image(best)))
    picture = f"--screenshot={HERE / 'explain.png'}"
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1.5", "--window-size=1280,720"]
    subprocess.run(["chromium", *flags, picture, f"{out.as_uri()}#8"], check=True, capture_output=True)
    print(f"{out} explains {best}")


if __name__ == "__main__":
    main()
