"""Compile the operator for the active PyTorch: `python -m deform_attn_cuda.build`.

It is compiled in a temporary folder. Only a library that is whole is moved into build/, and then stamp.json, which
says its name and what it was built for and from. Builds that run at the same time wait for one another. CXX names the
compiler, CXXFLAGS come before our own flags, and TORCH_CUDA_ARCH_LIST names the GPUs, else those present count.
"""

import concurrent.futures
import fcntl
import hashlib
import json
import os
import platform
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
SITE = Path(torch.__file__).parents[1]  # where pip installed PyTorch, and the packages of CUDA beside it
TOOLKIT = Path("/usr/local/cuda")
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}


def find_compiler():
    """The C++ compiler as a list of words, which may begin with a launcher such as ccache, or None."""
    words = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), ""))
    return words if words and shutil.which(words[0]) else None


def version(*compiler):
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


def cuda_packages():
    """The packages that hold nvcc and what it includes, of the release of PyTorch's CUDA. Before 13 there were none."""
    names = "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl"
    return [f"{name}=={torch.version.cuda}.*" for name in names] if float(torch.version.cuda) >= 13 else []


def find_nvcc():
    """(nvcc, "") for an nvcc of the major version of PyTorch's CUDA, else (None, why there is none)."""
    if torch.version.cuda is None:
        return None, f"PyTorch {torch.__version__} is built without CUDA"
    major = torch.version.cuda.split(".")[0]
    own = os.environ.get("CUDA_HOME", "") + "/bin"
    found = "no nvcc found"
    for path in (own, os.environ.get("PATH"), f"{TOOLKIT}/bin", f"{SITE}/nvidia/cu{major}/bin"):
        nvcc = shutil.which("nvcc", path=path)
        if nvcc and f"release {major}." in version(nvcc):
            return nvcc, ""
        if nvcc:
            found = f"{nvcc} is not of CUDA {major}, PyTorch is"
    remedy = f"pip install {' '.join(cuda_packages())}" if cuda_packages() else f"install CUDA {torch.version.cuda}"
    return None, f"no CUDA kernel, {found}: {remedy}, or set CUDA_HOME"


def architectures():
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, else the GPUs present, else A100, H100 and, by PTX, newer ones."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not names:
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        names = [f"{major}.{minor}" for major, minor in sorted(present)] or ["8.0", "9.0+PTX"]
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"sm_{number},compute_{number}" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code=[{code}]")
    return flags


def commands(compiler, nvcc):
    """The commands that compile the objects, by their names, and how they are linked, all without their output."""
    root = Path(torch.__file__).parent
    include = ["-isystem", str(root / "include"), "-isystem", str(root / "include/torch/csrc/api/include")]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    base = [*compiler, *shlex.split(os.environ.get("CXXFLAGS", "")), "-fPIC", "-std=c++20", *openmp]
    fast = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    plan = {"operator": [*base, "-O2", *include, "-c", str(HERE / "operator.cpp")]}
    for name, options in INSTRUCTION_SETS.items():
        plan[f"cpu_{name}"] = [*base, *fast, *options, f"-DCAPABILITY={name}", "-c", str(HERE / "cpu_kernel.cpp")]
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    if nvcc:
        host = next(word for word in reversed(compiler) if not word.startswith("-"))
        both = [nvcc, "-ccbin", host, "-Xcompiler=-fPIC", "-std=c++20"]
        plan["cuda_kernel"] = [*both, "-O3", *architectures(), "-c", str(HERE / "cuda_kernel.cu")]
        plan["operator_cuda"] = [*both, "-O2", *include, "-c", str(HERE / "operator_cuda.cpp")]
        libraries.append("-lc10_cuda")  # libcudart, which it depends on, comes with it
    return plan, [*base, "-shared"], libraries


def run(command, *last):
    """Run a command. RuntimeError if it fails, with one line of what it said."""
    done = subprocess.run([*command, *map(str, last)], capture_output=True, text=True)
    if done.returncode:
        error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise RuntimeError(f"{shlex.join(command)}: {error}")


def compile_and_link(compiler, nvcc, no_cuda):
    """Build the library unless it is there. Returns the line that says what there is now."""
    plan, link, libraries = commands(compiler, nvcc)
    made_from = json.dumps([plan, libraries, version(*compiler), nvcc and version(nvcc), sources_digest()])
    library = BUILD / f"deform_attn-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    stamp = {"library": library.name, "torch": torch.__version__, "sources": sources_digest(), "cuda": no_cuda}
    what = f"{'CPU and CUDA kernels' if nvcc else 'CPU kernel'} for PyTorch {torch.__version__}"
    note = f" ({no_cuda})" if no_cuda else ""
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if library.exists() and read_stamp() == stamp:
            return f"up to date: {what}{note}"
        start = time.time()
        print(f"deform_attn: compiling the {what} with {shlex.join(filter(None, [*compiler, nvcc]))}", flush=True)
        folder = Path(temporary)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: run(plan[name], "-o", folder / f"{name}.o"), plan))
        run(link, *folder.glob("*.o"), "-o", folder / library.name, *libraries)
        (folder / "stamp.json").write_text(json.dumps(stamp))
        (folder / library.name).replace(library)
        (folder / "stamp.json").replace(STAMP)
    return f"built the {what} in {time.time() - start:.0f} s{note}"


def build():
    """Build what this machine allows. Returns the line that says what there is now."""
    compiler = find_compiler()
    if compiler is None:
        remedy = "install one (apt install g++) or name it in CXX"
        return f"not built, no C++ compiler found: {remedy}; until then the PyTorch fallback runs"
    nvcc, no_cuda = find_nvcc()
    try:
        if nvcc is None and torch.cuda.is_available() and cuda_packages():
            print(f"deform_attn: {no_cuda.split(':')[0]}: installing {' '.join(cuda_packages())}", flush=True)
            run([sys.executable, "-m", "pip", "install", "--quiet", *cuda_packages()])
            nvcc, no_cuda = find_nvcc()
        return compile_and_link(compiler, nvcc, no_cuda)
    except RuntimeError as error:  # the CPU kernel alone, unless that is what fails
        return compile_and_link(compiler, None, no_cuda or f"no CUDA kernel: {error}")


def main():
    try:
        print("deform_attn:", build())
    except (RuntimeError, OSError) as error:
        sys.exit(f"deform_attn: not built, the PyTorch fallback runs: {error}")


if __name__ == "__main__":
    main()
