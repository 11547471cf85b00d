"""What `deform_attn` promises, on every device and path of this machine."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

import deform_attn_cuda
from cuda_on_cpu import compile_path
from deform_attn_cuda import build, deform_attn, deform_attn_pytorch, locate, status
from small_attention import (
    ALIGNMENTS,
    DEVICES,
    LEVELS,
    TOLERANCES,
    assert_agrees,
    inputs,
    many_queries,
    outputs,
    problems,
    upstream_of,
)

SIZES = [size for shape in LEVELS for size in shape]
every_type = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
both_paths = pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
both_references = pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])


def needs_kernel(device, dtype=torch.float32):
    if "fallback" in status(device, dtype):
        pytest.skip(status(device, dtype))


@pytest.fixture(scope="session")
def nvcc():
    path, reason = build.find_nvcc()
    if path is None:
        pytest.skip(reason)
    return path


# ---- What is computed: the CPU kernel, the CUDA kernels on a GPU, and their source on a CPU


@pytest.fixture(scope="session")
def cuda_source(nvcc, tmp_path_factory):
    return compile_path(nvcc, tmp_path_factory.mktemp("cuda_on_cpu") / "library.so")


@pytest.fixture(scope="module", params=["fallback", "cpu", "cuda", "cuda source"])
def path_and_device(request):
    """Each way to compute it on this machine."""
    if request.param == "fallback":
        return deform_attn_pytorch, "cpu"
    if request.param == "cuda source":
        return request.getfixturevalue("cuda_source"), "cpu"
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    needs_kernel(request.param)
    return deform_attn, request.param


def test_an_offset_is_in_cells_of_its_level_from_a_point():
    centre, offsets = torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, -2.0], [1.0, -2.0]]).view(1, 1, 1, 2, 1, 2)
    locations = locate([(8, 10), (4, 5)], centre, offsets).view(2, 2)
    torch.testing.assert_close(locations, torch.tensor([[0.5 + 1 / 10, 0.25 - 2 / 8], [0.5 + 1 / 5, 0.25 - 2 / 4]]))


def test_an_offset_of_P_reaches_the_border_of_a_box():
    box, offsets = torch.tensor([[[0.5, 0.25, 0.4, 0.2]]]), torch.tensor([[3.0, -3.0]]).expand(1, 1, 1, 1, 3, 2)
    torch.testing.assert_close(locate([(8, 10)], box, offsets)[..., 0, :].flatten(), torch.tensor([0.7, 0.15]))


@every_type
@settings(deadline=None, max_examples=10)
@given(problem=problems)
def test_the_cuda_source_on_a_cpu_agrees_with_the_fallback(cuda_source, dtype, problem):
    assert_agrees(cuda_source, problem["level_shapes"], inputs(**problem, dtype=dtype))


@every_type
@pytest.mark.parametrize("c, shift", ALIGNMENTS, ids=str)
def test_many_queries_and_channels_and_any_alignment(path_and_device, dtype, c, shift):
    path, device = path_and_device
    if path is deform_attn:
        needs_kernel(device, dtype)
    assert_agrees(path, LEVELS, many_queries(c, shift, dtype, device))


@both_references
def test_infinity_is_outside_and_not_a_number_stays_visible(path_and_device, boxes):
    path, device = path_and_device
    tensors = inputs([(3, 4)], B=1, Q=4, h=1, c=8, P=1, boxes=boxes, dtype=torch.float32, device=device)
    value, reference, offsets, logits = (x.detach() for x in tensors)
    for query, offset in enumerate([float("inf"), float("-inf"), 1e30, float("nan")]):
        offsets[0, query, ..., 0] = offset
    output = path(value, [(3, 4)], reference, offsets, logits)
    assert (output[0, :3] == 0).all() and output[0, 3].isnan().all()


@pytest.mark.parametrize("what", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("broken", ["value", "reference", "offsets", "logits", "upstream"])
@both_references
def test_no_kernel_hides_what_is_not_finite(path_and_device, boxes, broken, what):
    path, device = path_and_device
    names = "value", "reference", "offsets", "logits"
    tensors = dict(zip(names, inputs(P=4, Q=40, c=8, boxes=boxes, dtype=torch.float32, device=device), strict=True))
    tensors["offsets"].data[:, ::3] += 1000  # all outside
    tensors["upstream"] = upstream_of(torch.empty(2, 40, 24, device=device)).clone()
    numbers = tensors[broken].data.view(-1)
    numbers[len(numbers) * 3 // 8] = what
    upstream = tensors.pop("upstream")
    expected = outputs(deform_attn_pytorch, LEVELS, tuple(tensors.values()), lambda _: upstream)
    actual = outputs(path, LEVELS, tuple(tensors.values()), lambda _: upstream)
    assert torch.equal(actual[0].isfinite(), expected[0].isfinite())
    assert all((a.isfinite() <= b.isfinite()).all() for a, b in zip(actual[1:], expected[1:], strict=True))
    assert what == torch.inf or not all(x.isfinite().all() for x in actual)


@pytest.mark.parametrize("empty", [{"B": 0}, {"Q": 0}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@both_paths
def test_batches_and_queries_may_be_none_at_all(path, device, empty):
    tensors = inputs(**empty, device=device)
    results = outputs(path, LEVELS, tensors)
    assert [t.shape for t in results[1:]] == [t.shape for t in tensors]
    assert all((t == 0).all() for t in results)


def test_the_same_bits_come_out_of_any_number_of_threads():
    needs_kernel("cpu")
    shapes = [(40, 60), (20, 30)]
    tensors = inputs(shapes, Q=2000, h=4, c=16, P=4, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, threads):
        torch.set_num_threads(count)
        results.append(outputs(deform_attn, shapes, tensors))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_older_processors_get_the_same_results(capability):
    """A process for each set of instructions, as PyTorch chooses once."""
    needs_kernel("cpu")
    if capability == torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip("all the other tests run so")
    root = deform_attn_cuda.HERE.parent
    paths = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-m", "small_attention"], check=True, env=os.environ | paths)


# ---- How it behaves in PyTorch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["boxes", "permuted points", "no queries"])
def test_the_operators_pass_opcheck(kind, device):
    needs_kernel(device)
    Q = 0 if kind == "no queries" else 7
    value, *others = inputs(Q=Q, boxes=kind == "boxes", dtype=torch.float32, device=device)
    if kind == "permuted points":
        value = value.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_()
        others = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in others]
    torch.library.opcheck(torch.ops.deform_attn.forward.default, (value, SIZES, *others))
    plain = [t.detach() for t in (torch.ones(2, Q, 15, device=device), value, *others)]
    arguments = *plain[:2], SIZES, *plain[2:], kind == "boxes"  # whether the reference requires a gradient
    torch.library.opcheck(torch.ops.deform_attn.backward.default, arguments)


def test_second_derivatives_are_an_error_and_not_zero():
    needs_kernel("cpu")
    value, *others = inputs(dtype=torch.float32)
    output = deform_attn(value, LEVELS, *others)
    (gradient,) = torch.autograd.grad(output.sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="deform_attn::backward is not implemented"):
        gradient.sum().backward()


class Pyramid(torch.nn.Module):
    """Two levels whose sizes are those of an image, every token a query."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, image):
        levels = [image, image[:, :, ::2, ::2]]
        value = torch.cat([level.flatten(2) for level in levels], -1).transpose(1, 2)[:, :, None]
        offsets = value[..., None, None, :2].expand(-1, -1, -1, 2, -1, -1)
        boxes = value[:, :, 0, :4].sigmoid()
        return self.path(value, [tuple(level.shape[-2:]) for level in levels], boxes, offsets, offsets[..., 0])


@pytest.mark.parametrize("path, backend", [(deform_attn, "inductor"), (deform_attn_pytorch, "eager")])
def test_one_compiled_graph_serves_images_of_all_sizes(path, backend):
    torch.compiler.reset()
    compiled = torch.compile(Pyramid(path), dynamic=True, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=1):
        for height, width in [(12, 10), (8, 14), (6, 20)]:
            image = torch.rand(2, 8, height, width, dtype=torch.float64, requires_grad=True)
            output, expected = compiled(image), Pyramid(path)(image)
            torch.testing.assert_close(output, expected)
            gradients = (torch.autograd.grad(result.sum(), image) for result in (output, expected))
            torch.testing.assert_close(*gradients)


@both_paths
def test_exported_programs_take_any_batch_and_images_of_any_size(path):
    sizes = {0: torch.export.Dim("B"), **{i: 2 * torch.export.Dim(f"size{i}", min=2, max=50) for i in (2, 3)}}
    program = torch.export.export(Pyramid(path), (torch.randn(2, 8, 12, 10),), dynamic_shapes=(sizes,)).module()
    for batch, height, width in [(1, 8, 14), (3, 30, 20)]:
        image = torch.randn(batch, 8, height, width)
        torch.testing.assert_close(program(image), Pyramid(path)(image))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_lowers_the_value_and_keeps_the_locations(device):
    value, reference, offsets, logits = inputs(dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        output = deform_attn(value, LEVELS, reference, offsets, logits.bfloat16())
    expected = deform_attn_pytorch(value.bfloat16(), LEVELS, reference, offsets, logits.bfloat16().float())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=2**-8)  # one rounding to bfloat16, to either side


def test_its_operations_are_counted():
    needs_kernel("cpu")
    value, *others = inputs(B=2, Q=7, h=3, c=5, P=2, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        deform_attn(value, LEVELS, *others).sum().backward()
    forward = 2 * 7 * 3 * 3 * 2 * 4 * 5 * 2  # B Q h L P, corners, channels, a product and a sum
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize(
    "change, named",
    [
        ({"value": torch.zeros(2, 70, 15)}, "value must be"),
        ({"value": torch.zeros(2, 71, 3, 5)}, "value must be"),
        ({"value": torch.zeros(2, 70, 3, 5, dtype=torch.int32)}, "value must be of a float type"),
        ({"level_shapes": [(70, 1)]}, "offsets must be"),
        ({"level_shapes": [(70, 1), (1, 1), (0, 1)]}, "value must be"),
        ({"offsets": torch.zeros(2, 7, 3, 3, 2)}, "offsets must be"),
        ({"offsets": torch.zeros(3, 7, 3, 3, 2, 2)}, "offsets must be"),
        ({"logits": torch.zeros(2, 7, 3, 3, 1)}, "logits must be"),
        ({"logits": torch.zeros(2, 7, 3, 3, 2, device="meta")}, "logits is on meta"),
        ({"reference": torch.zeros(2, 7, 2)}, "reference must be"),
        ({"reference": torch.zeros(7, 4)}, "reference must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(change, named):
    value, reference, offsets, logits = inputs(dtype=torch.float32)
    right = {"value": value, "level_shapes": LEVELS, "reference": reference, "offsets": offsets, "logits": logits}
    with pytest.raises(ValueError, match=f"deform_attn: {named}"):
        deform_attn(**right | change)


@pytest.mark.parametrize(
    "change",
    [
        *({"sizes": sizes} for sizes in ([6, 9, 3, 5], [6, 9, 3, 5, 1, 2], [6, 9, 3, 5, -1, -1])),
        *({"reference": torch.zeros(shape)} for shape in ((7, 4), (2, 7, 2), (2, 6, 4), (1, 7, 4))),
        {"reference": torch.zeros(7, 2, dtype=torch.float64)},
        {"offsets": torch.zeros(2, 7, 3, 3, 3, 2)},
        {"logits": torch.zeros(2, 6, 3, 3, 2)},
        {"grad_output": torch.zeros(2, 6, 15)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_operators_themselves_refuse_what_they_could_not_read(change):
    needs_kernel("cpu")
    value, reference, offsets, logits = (x.detach() for x in inputs(dtype=torch.float32))
    arguments = {"value": value, "sizes": SIZES, "reference": reference, "offsets": offsets, "logits": logits}
    arguments = {"grad_output": torch.zeros(2, 7, 15)} | arguments | change
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.deform_attn.backward(*arguments.values(), True)
    if "grad_output" not in change:
        with pytest.raises(ValueError, match="do not fit"):
            torch.ops.deform_attn.forward(*list(arguments.values())[1:])


# ---- The CUDA kernels, compiled


@pytest.mark.parametrize(
    "architecture", [90, *(pytest.param(x, marks=pytest.mark.architectures) for x in (75, 80, 86, 89, 100, 120))]
)
def test_the_cuda_kernels_compile_without_spills(nvcc, architecture, tmp_path):
    flags = ["-O3", "-std=c++20", f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v", "--keep", "--keep-dir", tmp_path]
    command = [nvcc, *flags, "-o", tmp_path / "kernels.cubin", deform_attn_cuda.HERE / "cuda_kernel.cu"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores", said)
    assert len(spilled) == 16 and set(spilled) == {"0"}  # 4 types, 2 widths, 2 directions
    ptx = (tmp_path / "cuda_kernel.ptx").read_text()
    # 16 bytes at once; for sm_100 and newer nvcc calls the stored words b32.
    for move in ("ld.global.nc.v4.f32", "ld.global.nc.v4.u32", "ld.global.nc.v2.f64", "st.global.v4.[ub]32"):
        assert re.search(move, ptx), move
    assert ("global.add.v4.f32" in ptx) == (architecture >= 90)


# ---- The CUDA kernels on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
def test_where_there_are_a_gpu_and_its_nvcc_the_kernel_runs(nvcc):
    """Others would skip, or pass with the fallback."""
    assert status("cuda") == "deform_attn: CUDA kernel"


@needs_gpu
def test_a_cuda_graph_replays_it_on_new_inputs():
    needs_kernel("cuda")
    tensors = inputs(dtype=torch.float32, device="cuda")
    static = [tensor.detach().clone() for tensor in tensors]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        deform_attn(static[0], LEVELS, *static[1:])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = deform_attn(static[0], LEVELS, *static[1:])
    static[0].mul_(-2)
    graph.replay()
    torch.testing.assert_close(output, -2 * deform_attn_pytorch(tensors[0], LEVELS, *tensors[1:]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_it_runs_on_the_device_of_its_tensors():
    needs_kernel("cuda")
    assert_agrees(deform_attn, LEVELS, inputs(dtype=torch.float32, device="cuda:1"))


@needs_gpu
def test_more_than_2_to_the_31_elements_are_addressed():
    needs_kernel("cuda", torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("less than 30 GB of GPU memory are free")
    B, shapes = 2100, [(64, 64)]  # 2100 * 4096 * 8 * 32 = 2.2e9 elements
    value = torch.zeros(B, 4096, 8, 32, dtype=torch.bfloat16, device="cuda").requires_grad_()
    centre, offsets = torch.full((1, 2), 63.5 / 64, device="cuda"), torch.zeros(B, 1, 8, 1, 1, 2, device="cuda")
    with torch.no_grad():
        value[-1, -1] = 1
    output = deform_attn(value, shapes, centre, offsets, offsets[..., 0])
    assert (output[-1] == 1).all() and (output[:-1] == 0).all()
    output.backward(torch.ones_like(output))
    assert (value.grad[:, -1] == 1).all() and value.grad.sum(dtype=torch.float64) == B * 8 * 32


@needs_gpu
def test_asking_for_deterministic_algorithms_is_an_error():
    needs_kernel("cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            outputs(deform_attn, LEVELS, inputs(dtype=torch.float32, device="cuda"))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- Which path runs


def test_the_first_use_says_once_which_path_runs(capsys, monkeypatch):
    monkeypatch.setattr(deform_attn_cuda, "_paths", {})
    monkeypatch.setattr(deform_attn_cuda, "SAID", set())
    value, *others = inputs(dtype=torch.float32)
    for _ in range(2):
        deform_attn(value, LEVELS, *others)
    assert capsys.readouterr().err == status("cpu") + "\n"
    assert "float16" in status("cpu", torch.float16)


THIS = {"torch": torch.__version__, "sources": deform_attn_cuda.sources_digest(), "library": "gone"}


@pytest.mark.parametrize(
    "stamp, reason",
    [
        ("", "not built: run make build"),
        (json.dumps(THIS | {"torch": "1.0"}), "built for PyTorch 1.0, this is"),
        (json.dumps(THIS | {"sources": "0"}), "its sources have changed: run make build"),
        (json.dumps(THIS), "cannot be loaded, run make build: "),
    ],
    ids=["no stamp", "another PyTorch", "other sources", "no library"],
)
def test_a_library_that_cannot_serve_is_named_and_the_fallback_runs(stamp, reason, tmp_path, monkeypatch):
    (tmp_path / "stamp.json").write_text(stamp)
    monkeypatch.setattr(deform_attn_cuda, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(deform_attn_cuda, "_missing", deform_attn_cuda._load())
    monkeypatch.setattr(deform_attn_cuda, "_paths", {})
    assert status("cpu").startswith(f"deform_attn: PyTorch fallback ({reason}")
    value, *others = inputs(dtype=torch.float32)
    assert torch.equal(deform_attn(value, LEVELS, *others), deform_attn_pytorch(value, LEVELS, *others))


def test_where_there_is_a_compiler_there_is_a_kernel():
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert status("cpu") == "deform_attn: CPU kernel"
