"""Any image file, or any PIL image, as upright RGB with 8 bits a channel.

read_image, upright_rgb     one image
find_images                 the image files among files and folders
"""

import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path) -> Image.Image:
    """The image of a file as upright RGB, whatever its mode and EXIF orientation. ValueError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except Exception as error:  # Pillow's readers raise a dozen types on damaged files, documented or not
        if os.path.isdir(path):
            reason = "it is a folder"
        elif not os.path.exists(path):
            reason = "there is no such file"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as an image: {reason}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB with 8 bits a channel, turned as its EXIF orientation says."""
    orientation = _orientation(image)
    if hasattr(image, "tag_v2"):  # a TIFF: Pillow would turn it at the end of loading, and parse all of its metadata
        image.load_end = lambda: None
    if image.mode == "F" or image.mode.startswith("I"):
        image = _8_bits(image)
    image = image.convert("RGB")
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _8_bits(image):
    """A grey image of 16 or 32 bits, or of floats, in 8. Files do not say which value is white: 65535 for 16 bits, else
    the least usual one that the brightest pixel does not pass (floats may overshoot a little)."""
    values = np.asarray(image)
    if image.mode == "I" and getattr(image, "tag_v2", {}).get(339, (1,))[0] == 1:
        values = values.view(np.uint32)  # Pillow has no such mode and wraps what is above 2^31
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0).clip(0)
    white = 65535
    if ";16" not in image.mode:
        brightest = values.max() / (1.5 if image.mode == "F" else 1)
        white = next((white for white in (1, 255, 65535, 2**31 - 1, 2**32 - 1) if brightest <= white), brightest)
    return Image.fromarray((values * (255 / white) + 1e-6).clip(0, 255).astype(np.uint8))


def _orientation(image):
    """How an image is to be turned, 1 to 8. Nothing else of the metadata is parsed: it may well be damaged."""
    if hasattr(image, "tag_v2"):
        return image.tag_v2.get(0x0112, 1)
    exif = image.info.get("exif") or b""
    if text := image.info.get("Raw profile type exif"):
        digits = "".join(text.split("\n")[3:])
        exif = exif or bytes.fromhex("".join(re.findall("[0-9a-fA-F]{2}", digits)))
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        (start,) = struct.unpack_from(order + "4xI", tiff) if order else (len(tiff),)
        (count,) = struct.unpack_from(f"{order}H", tiff, start) if order else (0,)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, place)
            if tag == 0x0112:
                return struct.unpack_from(order + {1: "B", 4: "I"}.get(kind, "H"), tiff, place + 8)[0]
    except struct.error:
        pass
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp.encode() if isinstance(xmp, str) else xmp)
    return int(found[1]) if found else 1


def find_images(paths: Iterable[Path], beside: Path) -> dict[str, Path]:
    """The files among `paths`, and the images in the folders among them and in theirs, under names that differ.

    A file is called by its name, one of a folder by its path in it. Where two would be called alike, all go by
    their paths from the folder that holds them all. The folder `beside`, where results are written, is left out of
    folders that it lies in. Raises ValueError for a folder that holds no image.
    """
    found = {}
    for path in paths:
        if path.is_dir():
            files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in SUFFIXES and f.is_file()]
            if path.resolve() in beside.resolve().parents:
                files = [f for f in files if beside.resolve() not in f.resolve().parents]
            if not files:
                raise ValueError(f"{path} holds no images ({', '.join(SUFFIXES)})")
            found.update({f.resolve(): (f.relative_to(path), f) for f in files if f.resolve() not in found})
        else:
            found.setdefault(path.resolve(), (Path(path.name), path))
    if len({str(name).lower() for name, _ in found.values()}) < len(found):
        root = os.path.commonpath([f.parent for f in found])
        found = {f: (f.relative_to(root), path) for f, (_, path) in found.items()}
    return {name.as_posix(): path for name, path in found.values()}
