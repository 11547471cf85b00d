"""What `python -m deform_attn_cuda.build` promises."""

import concurrent.futures
import json

import pytest
import torch

import deform_attn_cuda
from deform_attn_cuda import build


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to build in, by a compiler and an nvcc that only take their time and name their output."""
    for name in ("c++", "nvcc"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(
            f"#!/bin/sh\ncase $1 in --version) echo {name} release {torch.version.cuda}; exit;; esac\n"
            'case "$*" in *--no-such-flag*) echo error: no-such-flag >&2; exit 1;; esac\n'
            f'while [ "$1" != -o ]; do shift; done; sleep 0.1; echo {name} > "$2"\n'
        )
        tool.chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "bin/c++"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    for module in (build, deform_attn_cuda):
        monkeypatch.setattr(module, "STAMP", tmp_path / "build/stamp.json")
    return tmp_path / "build"


needs_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA")


@needs_cuda
def test_builds_at_once_in_one_folder_wait_and_leave_one_library(folder, capsys):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: build.main(), range(2)))
    said = capsys.readouterr().out
    assert said.count("built the CPU and CUDA kernels") == said.count("up to date") == 1
    stamp = json.loads((folder / "stamp.json").read_text())
    assert stamp["cuda"] == "" and {path.name for path in folder.iterdir()} == {"lock", "stamp.json", stamp["library"]}


def test_a_build_that_fails_leaves_what_was_there(folder, monkeypatch):
    build.main()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.*")}
    monkeypatch.setenv("CXXFLAGS", "--no-such-flag")
    with pytest.raises(SystemExit, match="not built, .*no-such-flag") as ended:
        build.main()
    assert ended.value.code.count("\n") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.*")} == before


@needs_cuda
def test_cuda_kernels_that_do_not_compile_leave_the_cpu_kernel(folder, capsys, monkeypatch):
    monkeypatch.setattr(build, "architectures", lambda: ["--no-such-flag"])
    build.main()
    assert "no CUDA kernel: " in capsys.readouterr().out and "no-such-flag" in build.read_stamp()["cuda"]


def test_without_a_compiler_one_line_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.main()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "apt install g++" in out and not folder.exists()


@pytest.mark.parametrize("cxx", ["g++ -m64", "ccache g++ -m64", "/usr/bin/ccache /usr/bin/g++ -m64"])
def test_cxx_may_hold_a_launcher_and_options(cxx):
    plan, link, _ = build.commands(cxx.split(), "nvcc")
    assert " ".join(link).startswith(cxx) and plan["operator_cuda"][1:3] == ["-ccbin", cxx.split()[-2]]


def test_flags_of_distributions_keep_standard_and_speed(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-std=c++17 -march=nocona -O2")
    for name, command in build.commands(["g++"], None)[0].items():
        assert command.index("-std=c++17") < command.index("-std=c++20")
        if name.startswith("cpu"):
            assert command.index("-O2") < command.index("-O3")
            assert [flag for flag in command if flag.startswith("-march")][1:] == build.INSTRUCTION_SETS[name[4:]][:1]


@pytest.mark.parametrize("release, says", [("12.9", "is not of CUDA 99"), (None, "no nvcc found")])
def test_an_nvcc_that_does_not_fit_is_named(folder, release, says, tmp_path, monkeypatch):
    (tmp_path / "bin/nvcc").write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.86\n")
    if release is None:
        (tmp_path / "bin/nvcc").unlink()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "TOOLKIT", tmp_path)
    path, reason = build.find_nvcc()
    assert path is None and says in reason
    assert all(f"{name}==99.0.*" in reason for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt"))


def test_architectures_are_those_asked_for(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    assert build.architectures() == [
        "-gencode=arch=compute_86,code=[sm_86]",
        "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]",
    ]


@pytest.mark.slow
@needs_cuda
def test_with_a_gpu_and_no_toolkit_the_build_installs_one(tmp_path, monkeypatch):
    """Into another folder than PyTorch's, to compile the source with all that it includes, but no kernel of it."""
    if not build.cuda_packages():
        pytest.skip("there is no nvcc on PyPI for this CUDA")
    names = {"PIP_TARGET": str(tmp_path), "PATH": "/usr/bin:/bin", "TORCH_CUDA_ARCH_LIST": "9.0"}
    for name, text in names.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "TOOLKIT", tmp_path / "none")
    monkeypatch.setattr(build, "SITE", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = []
    monkeypatch.setattr(build, "compile_and_link", lambda *which: found.append(which))
    build.build()
    compiler, nvcc, reason = found[0]
    if nvcc is None:
        pytest.skip(f"pip cannot install it here: {reason}")
    build.run(build.commands(compiler, nvcc)[0]["cuda_kernel"], "-DLAUNCH(...)=", "-o", tmp_path / "kernel.o")
