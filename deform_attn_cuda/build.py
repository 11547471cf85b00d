"""Compile the operator for the active PyTorch: `python -m deform_attn_cuda.build`.

Everything goes to the folder build/ beside this file. Objects are named after a digest of all that made them, so only
what changed is compiled again; the library and then stamp.json, which names it, are moved into place when complete.
CXX and CXXFLAGS are honoured.
"""
import concurrent.futures
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import HERE, STAMP, sources_digest

BUILD = STAMP.parent
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}


class BuildError(RuntimeError):
    """A command failed; the message is one line."""


def find_compiler():
    """The C++ compiler as a list of words, or None."""
    words = shlex.split(os.environ.get("CXX", "")) or next(([name] for name in ("g++", "c++", "clang++")
                                                            if shutil.which(name)), None)
    return words if words and shutil.which(words[0]) else None


def version(compiler):
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def commands(compiler):
    """Object stem -> the command that compiles it, without its output."""
    root = Path(torch.__file__).parent / "include"
    include = [f"-I{root}", f"-I{root / 'torch/csrc/api/include'}"]
    flags = ["-std=c++20", "-fPIC", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    plan = {"operator": [*compiler, "-O2", *openmp, *flags, *include, "-c", str(HERE / "operator.cpp")]}
    for name, options in INSTRUCTION_SETS.items():
        plan[f"cpu_{name}"] = [*compiler, "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *options,
                               f"-DCAPABILITY={name}", *flags, "-c", str(HERE / "cpu_kernel.cpp")]
    link = [*compiler, "-shared", *flags, *openmp, f"-L{root.parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    return plan, link


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def run(command, output):
    """Make `output` by `command`, whole or not at all."""
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise BuildError(f"{shlex.join(command)}: {error}")
    partial.replace(output)


def build():
    """Returns the line that says what there is now."""
    compiler = find_compiler()
    if compiler is None:
        return "not built, no C++ compiler found: install one (apt install g++) or name it in CXX; " \
               "until then the PyTorch fallback runs"
    plan, link = commands(compiler)
    inputs = [torch.__version__, version(compiler), (HERE / "cpu_kernel.h").read_text()]
    objects = {BUILD / f"{stem}-{digest(command, Path(command[-1]).read_text(), *inputs)}.o": command
               for stem, command in plan.items()}
    library = BUILD / f"deform_attn-{digest(link, *map(str, objects))}.so"
    what = f"CPU kernel for PyTorch {torch.__version__}"
    stamp = {"library": library.name, "torch": torch.__version__, "sources": sources_digest()}
    if library.exists() and STAMP.exists() and json.loads(STAMP.read_text()) == stamp:
        return f"{what} is up to date"

    start = time.time()
    print(f"deform_attn: compiling the {what} with {version(compiler)}", flush=True)
    BUILD.mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(run, command, output) for output, command in objects.items() if not output.exists()]
        for job in jobs:
            job.result()
    run([link[0], *map(str, objects), *link[1:]], library)
    partial = STAMP.with_name(f"stamp.{os.getpid()}")
    partial.write_text(json.dumps(stamp))
    partial.replace(STAMP)
    for path in BUILD.iterdir():
        if path not in (library, STAMP, *objects):
            path.unlink(missing_ok=True)
    return f"built the {what} in {time.time() - start:.0f} s"


def main():
    try:
        print("deform_attn:", build())
    except (BuildError, OSError) as error:
        print(f"deform_attn: not built, the PyTorch fallback runs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
