"""Reads images as upright RGB with 8 bits a channel, and finds image files.

read_image, upright_rgb     one image; ValueError with one line that names the file if it cannot be read
find_images                 the image files among files and folders
FileNames                   the file of a folder that a json means by a name
"""

import difflib
import functools
import os
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, ImageOps

Image.MAX_IMAGE_PIXELS = 500_000_000  # Pillow refuses twice as many, 4 GB in memory
DATA_FORMATS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # that Pillow recognises but does not read


def read_image(path: str | Path) -> Image.Image:
    """The image of a file as upright RGB, whatever its mode and EXIF orientation. ValueError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{path} cannot be read as an image: there is no such file") from None
    except Exception as error:  # Pillow's readers raise a dozen types on damaged files, documented or not
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as an image: {reason}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB with 8 bits a channel, turned as its EXIF orientation says. ValueError for more than 16 bits."""
    image.load()  # Pillow turns a TIFF here
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata that are damaged beyond reading
        orientation = None
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("no rule says which value of 32 bits is white: save it with 8 or 16 bits a channel")
        image = Image.fromarray((values // 257).astype(np.uint8))
    upright = image.convert("RGB")
    upright.info = {}  # exif_transpose fails where other metadata than the orientation are damaged
    upright.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(upright, in_place=True)
    return upright


def find_images(paths: Iterable[Path], beside: Path) -> dict[str, Path]:
    """The image files of `paths`, files and folders (searched recursively, links followed), by unique names: their
    paths from the common parent.

    In folders, files that are no images, by suffix and by content, or that a system or a notebook left there, are
    skipped and listed on stderr. The folder `beside`, where results are written, is not searched. Raises ValueError for
    a folder without images.
    """
    paths = [Path(os.path.abspath(path)) for path in paths]
    root = os.path.commonpath([path if path.is_dir() else path.parent for path in paths])
    found = {}
    for path in paths:
        images = [path]
        if path.is_dir():
            files = _files_in(path, beside)
            images = [file for file in files if _is_image(file, path)]
            if others := sorted(str(file.relative_to(path)) for file in set(files) - set(images)):
                print(f"{path}: passed over {len(others):,}, which are no images: {shortened(others)}", file=sys.stderr)
            if not images:
                raise ValueError(f"{path} holds no images")
        found.update({file.relative_to(root).as_posix(): file for file in images})
    return found


def _files_in(folder, beside):
    """All files in a folder, sorted: recursively and through links, no folder twice, and not in `beside`."""
    files = []
    seen = {os.path.realpath(beside)} - {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:
            folders.clear()
        else:
            files += [Path(root, name) for name in names]
        seen.add(place)
    return sorted(files)


def _is_image(path, folder):
    """Whether Pillow reads a file, by its suffix or content, and no system or notebook has left it there."""
    parts = path.relative_to(folder).parts
    if not path.is_file() or any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in parts):
        return False
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        with Image.open(path) as image:
            return image.format not in DATA_FORMATS
    except Exception:  # see read_image
        return kind in Image.OPEN and kind not in DATA_FORMATS


def shortened(things: list[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join(things[:5]) + (f" and {len(things) - 5:,} more" if len(things) > 5 else "")


class FileNames:
    """The files of a folder by the names that a json gives them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.listing = functools.cache(_listing)

    def find(self, name: str) -> str | None:
        """The path in the folder of the file of that name, or of the only one whose name looks the same (composed or
        decomposed letters, capitals, %20, \\ for /). None if there is none, or if the name leads out of the folder."""
        path = Path(name)
        if (self.folder / path).is_file() and not path.is_absolute() and ".." not in path.parts:
            return path.as_posix()
        path = Path(name.replace("\\", "/"))
        for root in (self.folder.absolute(), self.folder.resolve()):
            path = path.relative_to(root) if path.is_relative_to(root) else path
        if path.is_absolute() or ".." in path.parts:
            return None
        found = self.folder
        for part in path.parts:
            alike = [part] if (found / part).exists() else self.listing(found).get(_look(part), [])
            if len(alike) != 1:
                return None
            found = found / alike[0]
        return found.relative_to(self.folder).as_posix() if found.is_file() else None

    def nearest(self, name: str) -> str | None:
        """The most similar name in the folder that a name leads to."""
        listing = self.listing((self.folder / name).parent) or self.listing(self.folder)
        near = difflib.get_close_matches(_look(Path(name).name), listing, 1)
        return listing[near[0]][0] if near else None


def _listing(folder):
    """The names in a folder by their normalised form."""
    names = defaultdict(list)
    for path in folder.glob("*"):
        names[_look(path.name)].append(path.name)
    return names


def _look(name):
    return unicodedata.normalize("NFKC", unquote(name)).casefold().strip()
