"""Compile the operator for the active PyTorch: `python -m deform_attn_cuda.build`.

Everything goes to the folder build/ beside this file. Objects are named after a digest of all that made them, so only
what changed is compiled again; the library and then stamp.json, which names it, are moved into place when complete.
Builds that run at the same time wait for one another, and what a build of the last day made is left alone. CXX and
CXXFLAGS are honoured, but the sources set the language standard and how the kernels are optimised.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import HERE, STAMP, read_stamp, sources_digest

BUILD = STAMP.parent
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
LAUNCHERS = ("ccache", "sccache", "distcc")  # words of CXX before the compiler itself


class BuildError(RuntimeError):
    """A command failed; the message is one line."""


def find_compiler():
    """The C++ compiler as a list of words, or None."""
    words = shlex.split(os.environ.get("CXX", "")) or next(
        ([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), None
    )
    return words if words and shutil.which(words[0]) else None


def version(*compiler):
    """The line of `--version` with a number in it."""
    lines = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line for line in lines if re.search(r"\d\.\d", line)), "an unknown version")


def find_nvcc():
    """(nvcc, "") for an nvcc of the major version of PyTorch's CUDA, else (None, why there is none)."""
    if torch.version.cuda is None:
        return None, f"PyTorch {torch.__version__} is built without CUDA"
    major = torch.version.cuda.split(".")[0]
    home, in_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    places = [
        home and Path(home) / "bin/nvcc",
        in_path and Path(in_path),
        Path("/usr/local/cuda/bin/nvcc"),
        Path(torch.__file__).parents[1] / f"nvidia/cu{major}/bin/nvcc",
    ]
    others = []
    for nvcc in (place for place in places if place and place.is_file()):
        release = re.search(r"release (\d+)\.\d+", version(nvcc))
        if release and release[1] == major:
            return str(nvcc), ""
        others.append(f"{nvcc} is of CUDA {release[1] if release else 'unknown'}")
    wanted = (f"{name}=={torch.version.cuda}.*" for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt"))
    found = f"{others[0]}, PyTorch of CUDA {torch.version.cuda}" if others else "no nvcc found"
    return None, f"no CUDA kernel, {found}: pip install {' '.join(wanted)}, or set CUDA_HOME"


def architectures(nvcc):
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, else the GPUs present, as far as it knows them, else A100 and H100; PTX
    serves newer ones."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not names:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        present = {(major, minor) for major, minor in present if f"compute_{major}{minor}" in known}
        names = [f"{major}.{minor}" for major, minor in sorted(present or {(8, 0), (9, 0)})]
        names[-1] += "+PTX"
    flags = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST names {name}, which is not like 8.0 or 9.0+PTX")
        number = match[1] + match[2]
        code = f"sm_{number},compute_{number}" if match[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code=[{code}]")
    return flags


def commands(compiler, nvcc):
    """Object stem -> the command that compiles it, without its output; how they are linked; and with what."""
    root = Path(torch.__file__).parent / "include"
    include = ["-isystem", str(root), "-isystem", str(root / "torch/csrc/api/include")]
    extra = [flag for flag in shlex.split(os.environ.get("CXXFLAGS", "")) if not flag.startswith("-std=")]
    compile_, standard = [*compiler, *extra, "-fPIC"], "-std=c++20"  # what follows wins over CXXFLAGS, as -march
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    link = [*compile_, "-shared", *openmp]
    libraries = [f"-L{root.parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    plan = {"operator": [*compile_, "-O2", standard, *openmp, *include, "-c", str(HERE / "operator.cpp")]}
    for name, options in INSTRUCTION_SETS.items():
        plan[f"cpu_{name}"] = [
            *compile_,
            "-O3",
            standard,
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wno-psabi",
            *options,
            f"-DCAPABILITY={name}",
            "-c",
            str(HERE / "cpu_kernel.cpp"),
        ]
    if nvcc:
        host = next(i for i, word in enumerate(compiler) if Path(word).name not in LAUNCHERS)
        to_host = [flag.replace(",", "\\,") for flag in (*compiler[host + 1 :], *extra, "-fPIC")]
        both = [nvcc, "-ccbin", compiler[host], *(f"-Xcompiler={flag}" for flag in to_host)]
        plan["cuda_kernel"] = [*both, "-O3", "-std=c++17", *architectures(nvcc), "-c", str(HERE / "cuda_kernel.cu")]
        plan["operator_cuda"] = [*both, "-O2", standard, *include, "-c", str(HERE / "operator_cuda.cpp")]
        libraries.append("-lc10_cuda")  # libcudart, which it depends on, comes with it
    return plan, link, libraries


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def whole(output):
    """A path to write what `output` is to be, which it becomes when all went well."""
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        partial = Path(folder) / output.name
        yield partial
        partial.replace(output)


def run(command, output):
    with whole(output) as partial:
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
            raise BuildError(f"{shlex.join(command)}: {error}")


@contextlib.contextmanager
def locked(folder):
    """Alone among the builds of this folder."""
    import fcntl  # not on Windows, where neither is a compiler that CXX could name

    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build():
    """Returns the line that says what there is now."""
    compiler = find_compiler()
    if compiler is None:
        return (
            "not built, no C++ compiler found: install one (apt install g++) or name it in CXX; "
            "until then the PyTorch fallback runs"
        )
    nvcc, no_cuda = find_nvcc()
    with locked(BUILD):
        try:
            return build_with(compiler, nvcc, no_cuda)
        except BuildError as error:
            if not nvcc:
                raise
            return build_with(compiler, None, f"no CUDA kernel: {error}")


def build_with(compiler, nvcc, no_cuda):
    plan, link, libraries = commands(compiler, nvcc)
    inputs = [
        torch.__version__,
        version(*compiler),
        nvcc and version(nvcc),
        *((HERE / name).read_text() for name in ("cpu_kernel.h", "cuda_kernel.h", "operator.h")),
    ]
    objects = {
        BUILD / f"{stem}-{digest(command, Path(command[-1]).read_text(), *inputs)}.o": command
        for stem, command in plan.items()
    }
    library = BUILD / f"deform_attn-{digest(link, libraries, *map(str, objects))}.so"
    what = f"{'CPU and CUDA kernels' if nvcc else 'CPU kernel'} for PyTorch {torch.__version__}"
    note = f" ({no_cuda})" if no_cuda else ""
    stamp = {"library": library.name, "torch": torch.__version__, "sources": sources_digest(), "cuda": no_cuda}
    if library.exists() and read_stamp() == stamp:
        return f"up to date: {what}{note}"

    start = time.time()
    with_nvcc = f" and {version(nvcc)}" if nvcc else ""
    print(f"deform_attn: compiling the {what} with {version(*compiler)}{with_nvcc}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(run, command, output) for output, command in objects.items() if not output.exists()]
    for job in jobs:
        job.result()
    run([*link, *map(str, objects), *libraries], library)
    with whole(STAMP) as partial:
        partial.write_text(json.dumps(stamp))
    for path in BUILD.iterdir():  # what another build of today made stays
        if path not in (library, STAMP, *objects) and path.stat().st_mtime < start - 24 * 3600:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"built the {what} in {time.time() - start:.0f} s{note}"


def main():
    try:
        print("deform_attn:", build())
    except (BuildError, OSError) as error:
        print(f"deform_attn: not built, the PyTorch fallback runs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
