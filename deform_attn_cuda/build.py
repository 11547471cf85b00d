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
import re
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


def version(*compiler):
    """The line of `--version` with a number in it."""
    lines = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line for line in lines if re.search(r"\d\.\d", line)), "an unknown version")


def find_nvcc():
    """(nvcc, "") for an nvcc of the major version of PyTorch's CUDA, else (None, why there is none)."""
    if torch.version.cuda is None:
        return None, f"PyTorch {torch.__version__} is built without CUDA"
    major = torch.version.cuda.split(".")[0]
    places = [Path(os.environ.get("CUDA_HOME", "")) / "bin/nvcc", Path(shutil.which("nvcc") or ""),
              Path("/usr/local/cuda/bin/nvcc"), Path(torch.__file__).parents[1] / f"nvidia/cu{major}/bin/nvcc"]
    others = []
    for nvcc in filter(Path.is_file, places):
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
    """Object stem -> the command that compiles it, without its output; and the command that links them."""
    root = Path(torch.__file__).parent / "include"
    include = ["-isystem", str(root), "-isystem", str(root / "torch/csrc/api/include")]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    flags = ["-std=c++20", "-fPIC", *extra]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    link = [*compiler, "-shared", *flags, *openmp, f"-L{root.parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    plan = {"operator": [*compiler, "-O2", *openmp, *flags, *include, "-c", str(HERE / "operator.cpp")]}
    for name, options in INSTRUCTION_SETS.items():
        plan[f"cpu_{name}"] = [*compiler, "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *options,
                               f"-DCAPABILITY={name}", *flags, "-c", str(HERE / "cpu_kernel.cpp")]
    if nvcc:
        both = [nvcc, "-ccbin", compiler[0], *(f"-Xcompiler={flag}" for flag in ("-fPIC", *extra))]
        plan["cuda_kernel"] = [*both, "-O3", "-std=c++17", *architectures(nvcc), "-c", str(HERE / "cuda_kernel.cu")]
        plan["operator_cuda"] = [*both, "-O2", "-std=c++20", *include, "-c", str(HERE / "operator_cuda.cpp")]
        link.append("-lc10_cuda")  # libcudart, which it depends on, comes with it
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
    nvcc, no_cuda = find_nvcc()
    try:
        return build_with(compiler, nvcc, no_cuda)
    except BuildError as error:
        if not nvcc:
            raise
        return build_with(compiler, None, f"no CUDA kernel: {error}")


def build_with(compiler, nvcc, no_cuda):
    plan, link = commands(compiler, nvcc)
    inputs = [torch.__version__, version(*compiler), nvcc and version(nvcc),
              *((HERE / name).read_text() for name in ("cpu_kernel.h", "cuda_kernel.h", "operator.h"))]
    objects = {BUILD / f"{stem}-{digest(command, Path(command[-1]).read_text(), *inputs)}.o": command
               for stem, command in plan.items()}
    library = BUILD / f"deform_attn-{digest(link, *map(str, objects))}.so"
    what = f"{'CPU and CUDA kernels' if nvcc else 'CPU kernel'} for PyTorch {torch.__version__}"
    note = f" ({no_cuda})" if no_cuda else ""
    stamp = {"library": library.name, "torch": torch.__version__, "sources": sources_digest(), "cuda": no_cuda}
    if library.exists() and STAMP.exists() and json.loads(STAMP.read_text()) == stamp:
        return f"up to date: {what}{note}"

    start = time.time()
    with_nvcc = f" and {version(nvcc)}" if nvcc else ""
    print(f"deform_attn: compiling the {what} with {version(*compiler)}{with_nvcc}", flush=True)
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
