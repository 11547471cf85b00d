"""The Makefile's choice of Python, with made-up Pythons on the PATH."""

import shutil
import subprocess
from pathlib import Path

import pytest

MAKE = shutil.which("make")
MAKEFILE = Path(__file__).parents[1] / "Makefile"
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

USABLE = "exit 0"
TOO_OLD = 'case "$1" in -c) exit 1;; esac'
WITHOUT_PIP = 'case "$2" in pip) exit 1;; esac'
EXTERNALLY_MANAGED = 'case "$*" in *"pip install"*) exit 1;; esac'
MAKES_ENVIRONMENTS = """
case "$*" in
*"pip install"*) exit 1;;
"-m venv .venv") mkdir -p .venv/bin; echo "#!/bin/sh" | tee .venv/bin/python .venv/bin/pip; chmod +x .venv/bin/*;;
esac"""
GETS_PIP = 'case "$2" in ensurepip) : > here;; pip) [ -e here ];; esac'
WITHOUT_VENV = 'case "$*" in *"pip install"* | *venv*) exit 1;; esac'


def make(folder, *arguments, pythons, **variables):
    """Runs make in a folder that holds the Makefile alone; the PATH has nothing but the scripts of `pythons`."""
    path = folder / "path"
    path.mkdir()
    for name in ("mkdir", "tee", "chmod"):
        (path / name).symlink_to(shutil.which(name))
    for name, script in pythons.items():
        (path / name).write_text(f"#!/bin/sh\n{script}\n")
        (path / name).chmod(0o755)
    command = [MAKE, "-f", MAKEFILE, *arguments]
    return subprocess.run(command, cwd=folder, env={"PATH": str(path)} | variables, capture_output=True, text=True)


CHOICES = [
    ({"python": USABLE, "python3": USABLE}, {}, "python"),
    ({"python3": USABLE}, {}, "python3"),
    ({"python": TOO_OLD, "python3": USABLE}, {}, "python3"),
    ({"python": WITHOUT_PIP, "python3": WITHOUT_PIP}, {}, ".venv/bin/python"),
    ({"python3": EXTERNALLY_MANAGED}, {}, ".venv/bin/python"),
    ({}, {}, ".venv/bin/python"),
    ({"python": EXTERNALLY_MANAGED}, {"VIRTUAL_ENV": "/here"}, "python"),
    ({"python": EXTERNALLY_MANAGED}, {"CONDA_PREFIX": "/here"}, "python"),
    ({"python": USABLE}, {"PYTHON": "python3.13"}, "python3.13"),
    ({"python": USABLE}, {"PYTHON": "python3.13", "VIRTUAL_ENV": "/here"}, "python3.13"),
]


@pytest.mark.parametrize(("pythons", "variables", "choice"), CHOICES)
def test_make_takes_the_python_that_pip_may_install_into(tmp_path, pythons, variables, choice):
    lines = make(tmp_path, "--dry-run", "build", pythons=pythons, **variables).stdout.splitlines()
    assert f"{choice} -m deform_attn_cuda.build" in lines
    assert ("python3 -m venv .venv" in "\n".join(lines)) == (choice == ".venv/bin/python")


@pytest.mark.parametrize("target", ["build", "demo", "test"])
def test_make_makes_an_environment_and_says_how_to_activate_it(tmp_path, target):
    run = make(tmp_path, target, pythons={"python3": MAKES_ENVIRONMENTS})
    assert run.returncode == 0, run.stderr
    assert "source .venv/bin/activate" in run.stdout.splitlines()[-1]


def test_make_brings_pip_into_an_active_environment_that_has_none(tmp_path):
    run = make(tmp_path, "build", pythons={"python": GETS_PIP}, VIRTUAL_ENV="/here")
    assert run.returncode == 0, run.stderr


def test_make_names_the_package_that_is_missing_for_an_environment(tmp_path):
    run = make(tmp_path, "build", pythons={"python3": WITHOUT_VENV})
    assert run.returncode and "apt install python3-venv" in run.stderr


def test_make_says_that_python_is_too_old(tmp_path):
    run = make(tmp_path, "build", pythons={"python3": TOO_OLD})
    assert run.returncode and "Python 3.11 or newer is needed" in run.stderr
