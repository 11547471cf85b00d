"""Reads images as upright RGB with 8 bits a channel, and finds the image files of folders.

    read_image, upright_rgb     one image
    find_images                 the image files among files and folders
    FileNames                   the file of a folder that a json means by a name

Images that cannot be read raise ValueError with one line that names the file.
"""

import difflib
import os
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # Pillow refuses more than 178 million; read_image has a limit of its own
LIMIT = "MAX_IMAGE_PIXELS"  # an environment variable, for worker processes too
MOST_PIXELS = 1e9  # 4 GB in memory
ORIENTATION = 0x0112
TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---- One image -------------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Image.Image:
    """The image of a file as upright RGB, whatever its mode and EXIF orientation. ValueError if it cannot be read."""
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
            most = float(os.environ.get(LIMIT, MOST_PIXELS))
            if pixels > most:
                raise ValueError(f"{pixels:,} pixels; set {LIMIT} in the environment to read more than {most:,.0f}")
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
    """The image in RGB with 8 bits a channel, turned as its EXIF orientation says. ValueError for more than 16 bits."""
    image.load()  # Pillow turns a TIFF here
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # metadata that are damaged beyond reading
        turn = None
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("no rule says which value of 32 bits is white: save it with 8 or 16 bits a channel")
        image = Image.fromarray((values // 257).astype(np.uint8))
    image = image.convert("RGB")
    return image.transpose(turn) if turn else image


# ---- Images among files ----------------------------------------------------------------------------------------------

DATA_FORMATS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # that Pillow recognises but does not read


def find_images(paths: Iterable[Path], beside: Path) -> dict[str, Path]:
    """The image files of `paths`, files and folders (searched recursively), by unique names.

    The name of a file given outright is its own, that of one in a folder its path in the folder. Where two names would
    be equal, all are paths from the common parent. In folders, files that are no images, by suffix and by content, or
    that a system or a notebook left there, are skipped and listed on stderr. The folder `beside`, where results are
    written, is not searched. Raises ValueError for a folder without images.
    """
    found = {}
    for path in paths:
        if not path.is_dir():
            found.setdefault(path.resolve(), (Path(path.name), path))
            continue
        files = _files_in(path)
        if path.resolve() in beside.resolve().parents:
            files = [file for file in files if beside.resolve() not in file.resolve().parents]
        images = [file for file in files if _is_image(file, path)]
        others = sorted(str(file.relative_to(path)) for file in set(files) - set(images))
        said = f"passed over {len(others):,}, which are no images: {shortened(others)}"
        if not images:
            raise ValueError(f"{path} holds no images" + (f" ({said})" if others else ""))
        if others:
            print(f"{path}: {said}", file=sys.stderr)
        for file in images:
            found.setdefault(file.resolve(), (file.relative_to(path), file))
    if len({str(name).lower() for name, _ in found.values()}) < len(found):
        root = os.path.commonpath([file.parent for file in found])
        found = {file: (file.relative_to(root), path) for file, (_, path) in found.items()}
    return {name.as_posix(): path for name, path in found.values()}


def _is_image(path, folder):
    """Whether Pillow reads a file, by its suffix or content, and no system or notebook has left it there."""
    parts = path.relative_to(folder).parts
    if not path.is_file() or any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in parts):
        return False
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind in Image.OPEN and kind not in DATA_FORMATS:
        return True
    try:
        with Image.open(path) as image:
            return image.format not in DATA_FORMATS
    except Exception:  # see read_image
        return False


def _files_in(folder):
    """All files in a folder, recursively and through links, sorted."""
    files = []
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:  # a link to a folder above
            folders.clear()
        else:
            files += [Path(root, name) for name in names]
        seen.add(os.path.realpath(root))
    return sorted(files)


def shortened(things: list[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join(things[:5]) + (f" and {len(things) - 5:,} more" if len(things) > 5 else "")


# ---- Names in a json -------------------------------------------------------------------------------------------------


class FileNames:
    """The files of a folder by the names that a json gives them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.listings = {}

    def __call__(self, name: str) -> str | None:
        """The path in the folder of the file of that name, or of the only one whose name looks the same (composed or
        decomposed letters, capitals, %20). None if there is none."""
        name = self.inside(name)
        if (self.folder / name).is_file():
            return name
        found = self.folder
        for part in Path(name).parts:
            alike = [part] if (found / part).exists() else self._listing(found).get(_look(part), [])
            if len(alike) != 1:
                return None
            found = found / alike[0]
        return found.relative_to(self.folder).as_posix() if found.is_file() else None

    def inside(self, name: str) -> str:
        """A name without the folder's own path, and with / for \\ where no file has it as it is."""
        if "\\" in name and not (self.folder / name).is_file():
            name = name.replace("\\", "/")
        if os.path.isabs(name):
            for root in (self.folder.absolute(), self.folder.resolve()):
                if Path(name).is_relative_to(root):
                    return Path(name).relative_to(root).as_posix()
        return name

    def nearest(self, name: str) -> str | None:
        """The most similar name in the folder that a name leads to."""
        parent = (self.folder / name).parent
        listing = self._listing(parent if parent.is_dir() else self.folder)
        near = difflib.get_close_matches(_look(Path(name).name), listing, 1)
        return listing[near[0]][0] if near else None

    def _listing(self, folder):
        """The names in a folder by their normalised form."""
        if folder not in self.listings:
            self.listings[folder] = {}
            for name in os.listdir(folder) if folder.is_dir() else ():
                self.listings[folder].setdefault(_look(name), []).append(name)
        return self.listings[folder]


def _look(name):
    return unicodedata.normalize("NFKC", unquote(name)).casefold().strip()
