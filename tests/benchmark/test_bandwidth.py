"""Kernels against copies: what each moves, on the emulator and the stand-in for CuPy. No time is asserted."""

import json

import numpy as np
import pytest
import strict_cupy
from emulator import Emulator

from minivit.base.backend import use_device
from minivit.benchmark import bandwidth
from minivit.benchmark.bandwidth import IN_PLACE, Recorder, kernels_report, recorded_launches, signatures
from minivit.benchmark.contenders import Job
from minivit.benchmark.contenders.ours import OursOnGpu
from minivit.kernels import cuda
from minivit.model import ViTConfig
from minivit.training.step import Batch

TINY = ViTConfig(image_size=8, patch_size=4, width=12, depth=2, num_heads=3, mlp_dim=20)
SIGNATURES = signatures(cuda.SOURCE.read_text())


@pytest.fixture
def emulated(monkeypatch):
    """A GPU that is not there, whose graphs hold two calls."""
    monkeypatch.setattr(bandwidth, "GRAPH_SECONDS", 0.0)
    monkeypatch.setattr(bandwidth, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(bandwidth, "GRAPH_CALLS", 2)
    with strict_cupy.installed(), cuda.using(Emulator()) as machine:
        use_device("cuda:0")
        yield machine


def test_what_kernels_read_and_write_is_in_their_declarations():
    assert len(SIGNATURES) == cuda.SOURCE.read_text().count("__global__ void") - 2  # attention has two forms
    assert [len(parameters) for parameters in SIGNATURES["attention_backward"]] == [6, 8]
    (adam,) = SIGNATURES["adam"]
    assert [p.name for p in adam if p.read] == ["theta", "grad", "m", "v", "mask", "norm", "hyper"]
    assert [p.name for p in adam if p.written] == ["theta", "m", "v"]
    assert adam[0].type == "float*" and adam[-1] == ("size", "size_t", False, False)
    (softmax,) = SIGNATURES["softmax_forward"]
    assert [(p.name, p.type) for p in softmax if p.written] == [("p", "real*")]
    for name, pointers in IN_PLACE.items():
        assert set(pointers) <= {p.name for p in SIGNATURES[name][0] if p.written}


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"image_size": 40, "pos_embed": "none"}], ids=["short", "long"])
def test_only_those_read_what_they_write_over(emulated, precision, changes):
    """Each kernel writes the same whatever was there before, but for the pointers of IN_PLACE."""
    emulated.precision = precision
    recorder = Recorder(emulated)
    contender = OursOnGpu(Job("step", ViTConfig(**vars(TINY) | changes), 3, 0, {}, "cuda", precision))
    with cuda.using(recorder):
        contender.whole_step([Batch(0, contender.images, contender.labels)], 3, 1e-3)
    seen = set()
    for _, call, settings in recorder._kinds.values():
        name, _, _, arguments = call
        parameters = next(p for p in SIGNATURES[name] if len(p) == len(arguments))
        arrays = [a.view(np.ndarray) if isinstance(a, np.ndarray) else None for a in arguments]
        kept = [None if a is None else a.copy() for a in arrays]
        for i, (p, out) in enumerate(zip(parameters, arrays, strict=True)):
            others = [a for j, a in enumerate(arrays) if j != i and a is not None]
            if not p.written or out is None or any(np.shares_memory(out, other) for other in others):
                continue
            results, fills = [], (0x3F80, 0x4000) if out.dtype == np.uint16 else (1, 2)  # the numbers 1 and 2
            for fill in fills:
                for array, before in zip(arrays, kept, strict=True):
                    if array is not None:
                        array[...] = before
                out[...] = fill
                emulated.launch(*call, **settings)
                results.append(out.copy())
            reached = (results[0] != fills[0]) | (results[1] != fills[1])
            assert reached.any(), (name, p.name)
            assert (results[0] != results[1])[reached].any() == (p.name in IN_PLACE.get(name, ())), (name, p.name)
            seen.add((name, p.name))
    assert {("adam", "v"), ("add_partials", "out0"), ("embed", "z"), ("layernorm_backward", "dz")} <= seen


def test_every_launch_of_a_step_is_recorded_with_its_bytes(emulated):
    contender = OursOnGpu(Job("step", TINY, 3, 0, {}, "cuda", "float32"))
    emulated.launches.clear()
    launches = recorded_launches(contender)
    counted = dict(emulated.launches)
    found = {}
    for each in launches:
        found[each.name] = found.get(each.name, 0) + each.times
    assert found == {name: count for name, count in counted.items() if name != "matmul"}
    n, numbers = contender.model.flat.size, {each.name: each.bytes for each in launches}
    assert numbers["adam"] == 4 * (8 * n + 1 + 4)  # theta, m and v twice, gradient, mask; the norm; four figures
    assert numbers["sum_squares"] == 4 * (n + min(-(-n // 2048), 1024))
    B, N, D, M = 3, 5, 12, 20
    rows = B * N
    gelu = {each.bytes for each in launches if each.name == "bias_gelu_forward"}
    assert gelu == {4 * (2 * rows * M + M), 4 * (2 * B * M + M)}  # the last block's is of the class tokens alone
    embed = next(each for each in launches if each.name == "embed")
    assert embed.bytes == 4 * (2 * rows * D + 2 * D + N * D)
    before = emulated.launches["adam"]
    next(each for each in launches if each.name == "adam").run()
    assert emulated.launches["adam"] == before + 1


def test_the_report(emulated):
    report = kernels_report(TINY, batch=3, pairs=2, precision="bf16", progress=False)
    assert report["settings"]["precision"] == "bf16" and report["copy_rate"]["median"] > 0
    rows = report["layers"]
    assert [r["times"] * r["bytes"] for r in rows] == sorted((r["times"] * r["bytes"] for r in rows), reverse=True)
    assert sum(r["share_of_step"] for r in rows) + report["rest_of_step"] == pytest.approx(1.0)
    assert all(r["bytes_per_second"] == pytest.approx(r["bytes"] / r["seconds"]["median"]) for r in rows)
    assert {r["layer"]: r["direction"] for r in rows}["layernorm_backward"] == "backward"
    assert strict_cupy.launches["memcpy"] and strict_cupy.launches["graph"]


def test_a_copy_moves_half_of_the_bytes_each_way(emulated):
    strict_cupy.clear()
    run = bandwidth.copy_of(100)
    run()
    assert strict_cupy.launches["memcpy"] == 1
    cells = dict(zip(run.__code__.co_freevars, (cell.cell_contents for cell in run.__closure__), strict=True))
    assert cells["source"].nbytes == cells["target"].nbytes == cells["half"] == 50


def test_the_command(emulated, tmp_path, call):
    flags = ["--image-size", 8, "--width", 12, "--depth", 2, "--heads", 3, "--mlp-dim", 20, "--batch", 3]
    files = ["--json", tmp_path / "k.json", "--png", tmp_path / "k.png"]
    ended = call("benchmark", "kernels", *flags, "--pairs", 2, "--precision", "tf32", "--quiet", *files)
    assert ended.status == 0 and ended.err == "", ended.err
    assert max(map(len, ended.out.splitlines())) <= 140
    assert "layernorm_backward" in ended.out and "on stand-in" in ended.out and "the card copies 256 MiB" in ended.out
    report = json.loads((tmp_path / "k.json").read_text(), parse_constant=pytest.fail)
    assert report["task"] == "kernels" and report["machine"]["device"] == "stand-in" and report["batch"] == 3
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("flags", "message"), [
    (["--device", "cpu"], "the kernels are a GPU's: --device cuda"),
    (["--device", "cuda:1"], "device cuda:1: there are 1 GPUs, counted from cuda:0"),
    (["--stem", "root", "--patch-size", 2], "benchmarks are of models without a stem, not of stem 'root'"),
    (["--pairs", 0], "--pairs must be at least 1, got 0"),
    (["--workers", 2], "unrecognized arguments: --workers"),
])  # fmt: skip
def test_bad_input_is_one_line(emulated, call, flags, message):
    ended = call("benchmark", "kernels", *flags)
    assert ended.status == 2 and ended.err.startswith(f"error: {message}"), ended.err
    assert ended.err.count("\n") == 1
