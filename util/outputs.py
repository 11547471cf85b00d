"""What the programs write: tried before any work, written whole, and by default into a folder that was not there."""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

FIGURES = (".png", ".svg", ".pdf")


def try_output(path: Path, folder: bool = True) -> None:
    """Raises OSError, which names the path, unless files can be written into a folder (or into one file), which is made
    for the trial. Nothing is left of that."""
    place = path if folder else path.parent
    made = [p for p in (place, *place.parents) if not p.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
        if not folder and path.exists():
            path.open("a").close()
    except OSError as error:
        reason = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise OSError(f"nothing can be written to {path}: {reason}") from None
    finally:
        for folder in made:
            if folder.is_dir():
                folder.rmdir()


def unused(path: Path) -> Path:
    """The path, or where that is a file or a folder that holds something, one with a number behind its name."""
    number, free = 1, path
    while free.exists() and not (free.is_dir() and not any(free.iterdir())):
        number += 1
        name = f"{path.stem}_{number}{path.suffix}" if path.suffix.lower() in FIGURES else f"{path.name}_{number}"
        free = path.with_name(name)
    return free


def figure_file(out: Path | None, default: str) -> Path:
    """Where a figure is to be written: `out`, or a file like `default` that is not there yet. Raises ValueError or
    OSError, before any work, if it is no .png, .svg or .pdf or cannot be written."""
    path = out or unused(Path(default))
    if path.suffix.lower() not in FIGURES:
        raise ValueError(f"{path} is no name for a figure: it ends in .png, .svg or .pdf")
    try_output(path, folder=False)
    return path


def write_figure(figure, path: Path) -> None:
    """Write a matplotlib figure to a file, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Write a file that others never see in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(value, indent=indent))
    os.replace(unfinished, path)


PAPER = [name + suffix for name in ("AP_box", "AP_mask") for suffix in ("", "_S", "_M", "_L")]


def table(rows: Iterable[tuple[str, dict]], columns: Sequence[str] = PAPER) -> str:
    """(name, metrics) rows in Markdown, with the columns of the paper's tables."""
    rows = list(rows)
    heads = [c if c in ("AP_box", "AP_mask") else c[-1] for c in columns]
    width = max(12, *(len(name) for name, _ in rows))
    lines = [f"| {'':<{width}} |" + "".join(f" {h:>7} |" for h in heads), "|---|" + "---|" * len(heads)]
    for name, metrics in rows:
        cells = ["-" if metrics[c] is None else f"{metrics[c]:.1f}" for c in columns]
        lines.append(f"| {name:<{width}} |" + "".join(f" {cell:>7} |" for cell in cells))
    return "\n".join(lines)
