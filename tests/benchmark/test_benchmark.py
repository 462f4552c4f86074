"""Timing in turn: the figures, the checks before them, the processes, the command line. No time is asserted."""

import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import strict_cupy
from conftest import ROOT, load_script

from minivit import ViTConfig
from minivit.base import params
from minivit.base.backend import plain
from minivit.base.errors import InputError
from minivit.benchmark import agreement, contenders, contest, machine, scaling, tables, turns
from minivit.benchmark.agreement import Disagreement, agree, disagreement
from minivit.benchmark.child import Child
from minivit.benchmark.contenders import Job, problem
from minivit.benchmark.contenders.ours import Floor, Ours, OursOnGpu, Pipeline, model_products
from minivit.benchmark.contest import summarise
from minivit.benchmark.layers import captured_layers
from minivit.benchmark.turns import paired_ratio, take_turns
from minivit.figures import contest as contest_figures
from minivit.figures import save_contest
from minivit.laboratory.trace import trace_batch
from minivit.model import ViT
from minivit.model.costs import attention_flops, expected_flops
from minivit.training.engines.cpu import Engine
from minivit.training.engines.cut import available_cores

TINY = {"image_size": 8, "patch_size": 4, "width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 20}
FLAGS = [
    "--image-size", 8, "--patch-size", 4, "--width", 12, "--depth", 2, "--heads", 3, "--mlp-dim", 20, "--batch", 5,
    "--pairs", 2, "--quiet",
]  # fmt: skip
MORE = [  # what the models elsewhere must follow
    {}, {"pooling": "mean", "pos_embed": "sincos2d"}, {"pre_logits": 7, "pos_embed": "none"}, {"gelu": "erf"},
    {"layer_scale": 0.1, "qk_norm": True}, {"pooling": "seq", "registers": 2}, {"registers": 3},
    {"pooling": "avg", "registers": 1},
]  # fmt: skip


def job(task="step", batch=5, engine=None, **changes):
    return Job(task, ViTConfig(**TINY | changes), batch, 0, engine or {})


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """A turn is one step, and nobody rests."""
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0.0)


# ---- the floor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"pooling": "mean"}, {"pre_logits": 7}, {"mlp_dim": 9}, {"pooling": "seq", "registers": 2}, {"mlp": "swiglu"}],
)
def test_the_floor_is_every_product_of_a_step(changes):
    """Its FLOPs are those of the closed form, and of the products that a step really makes."""
    config = ViTConfig(**TINY | changes)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8), rng.integers(0, 10, 5)
    expected, recorded = expected_flops(config, 5), trace_batch(config, images, labels).totals
    forward = sum(p.flops for p in model_products(config, 5, backward=False))
    assert forward == expected.forward == recorded.forward_matmul_flops
    both = sum(p.flops for p in model_products(config, 5))
    unneeded = (
        expected_flops(config, 5, image_gradient=True).backward - expected.backward
    )  # the plain functions make it
    assert both == sum(expected) == recorded.forward_matmul_flops + recorded.backward_matmul_flops - unneeded


def test_the_floors_products_fit():
    for product in model_products(ViTConfig(**TINY), 3):
        product.run()
        assert np.allclose(product.out, product.a @ product.b, atol=1e-5)


@pytest.mark.parametrize("blas_threads", [True, False])
@pytest.mark.parametrize("task", ["step", "infer"])
def test_the_floor_covers_the_batch(task, blas_threads):
    """Micro-batches of at most 2 in 2 workers, as many for each, cover 5 images exactly: 1 + 1 + 1 + 2."""
    wanted = expected_flops(ViTConfig(**TINY), 5)
    floor = Floor(job(task, engine={"workers": 2, "micro_batch": 2}), blas_threads=blas_threads)
    with floor.pool:
        assert round(1e9 * floor.settings["gflop"]) == (sum(wanted) if task == "step" else wanted.forward)
        assert [len(parts) for parts in floor.work] == ([1] if blas_threads else [2, 2])
        floor.step()
    floor.limits.restore_original_limits()


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_disagreement_is_relative_to_each_array():
    ours = (2.0, {"a": np.array([3.0, 4.0]), "b": np.array([1e-9])})
    off = (2.0, {"a": np.array([3.0, 4.005]), "b": np.array([2e-9])})
    loss, worst, where = disagreement(ours, off)
    assert loss == 0.0 and where == "a" and math.isclose(worst, 1e-3, rel_tol=1e-9)  # "b" is rounding beside "a"
    assert disagreement(ours, (2.002, ours[1]))[0] == pytest.approx(1e-3)
    for wrong in ({"a": ours[1]["a"]}, ours[1] | {"c": np.zeros(1)}, ours[1] | {"a": np.zeros(3)},
                  ours[1] | {"a": np.array([3.0, np.nan])}):  # fmt: skip
        assert disagreement(ours, (2.0, wrong))[1] == math.inf
    assert disagreement(ours, (math.nan, ours[1]))[0] == math.inf
    assert disagreement((None, ours[1]), (None, ours[1]))[:2] == (0.0, 0.0)


def test_a_contender_that_computes_something_else_is_refused():
    ours = (2.0, {"w": np.ones(4)})
    assert agree("x", ours, (2.0 + 1e-5, {"w": np.full(4, 1 + 5e-5)})) == (pytest.approx(5e-6), pytest.approx(5e-5))
    with pytest.raises(Disagreement, match="x disagrees: its loss is off by 1.0e-03, allowed 1e-05"):
        agree("x", ours, (2.002, ours[1]))
    with pytest.raises(Disagreement, match="x disagrees: the gradient of w is off by 1.0e-03, allowed 1e-04"):
        agree("x", ours, (2.0, {"w": np.full(4, 1.001)}))
    with pytest.raises(Disagreement, match="x disagrees: logits is off"):
        agree("x", (None, {"logits": np.ones(4)}), (None, {"logits": np.zeros(4)}))


def test_the_tolerance_tells_rounding_from_another_function():
    """float64 against float32 passes; the other form of GELU, and twice the LayerNorm epsilon, do not."""
    sizes = {"width": 48, "num_heads": 3, "mlp_dim": 192, "image_size": 16}

    def check(**changes):
        ours = Ours(job(batch=16, **sizes | changes))
        loss, gradients = ours.check()
        ours.engine.__exit__(None, None, None)
        return loss, {name: g.copy() for name, g in gradients.items()}

    mine = check()
    flat, images, labels = problem(job(batch=16, **sizes))
    model = ViT(ViTConfig(**TINY | sizes), flat=flat.astype(np.float64))
    with Engine(model) as engine:
        loss = float(engine.gradient(images, labels).loss)
        exact = loss, params.views(engine.grad, model.table)
    assert disagreement(exact, mine)[1] < agreement.GRADIENT_TOLERANCE / 10
    for changes in ({"gelu": "erf"}, {"layernorm_eps": 2e-6}):
        with pytest.raises(Disagreement):
            agree("another", mine, check(**changes))


def test_no_parameter_is_at_a_special_value():
    flat, images, labels = problem(job())
    assert flat.dtype == np.float32 and (flat != 0).all() and (flat != 1).all()
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8 and labels.shape == (5,)
    again, other = problem(job()), problem(job()._replace(seed=1))
    assert (again.flat == flat).all() and (again.images == images).all() and (again.labels == labels).all()
    assert (other.flat != flat).any() and (other.images != images).any()


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round():
    """A machine that gets slower and slower does not change them."""
    slow = np.array([1.0, 2.0, 5.0, 9.0])
    assert paired_ratio(0.5 * slow, slow) == {"median": 0.5, "q1": 0.5, "q3": 0.5}
    assert paired_ratio([1, 2, 9], [2, 2, 3]) == {"median": 1.0, "q1": 0.75, "q3": 2.0}


def test_the_summary():
    found = {
        "minivit": ([2.0, 4.0], 30),
        "torch-compile": ([4.0, 8.0], 120),
        "floor-threads": ([1.0, 3.0], 9),
        "floor-workers": ([1.5, 3.0], 9),
    }
    report = summarise({name: {"seconds": s, "peak_memory": m} for name, (s, m) in found.items()}, batch=6)
    assert report["ratio_to_torch_compile"] == 0.5 and report["memory_ratio_to_torch_compile"] == 0.25
    assert report["floor"] == "floor-threads" and report["floor_fraction"] == (1 / 2 + 3 / 4) / 2
    assert report["images_per_second"] == 2.0 and report["contenders"]["torch-compile"]["images_per_second"] == 1.0
    assert report["contenders"]["torch-compile"]["floor_fraction"] == (1 / 4 + 3 / 8) / 2
    assert report["ratio_to_torch"] is report["ratio_to_jax"] is report["memory_ratio_to_torch"] is None  # not measured
    assert report["contenders"]["minivit"]["median"] == 3.0


# ---- turns -----------------------------------------------------------------------------------------------------------


class StandIn:
    """A child that keeps a common diary."""

    def __init__(self, name, diary, seconds=0.001, host=None):
        self.name, self.diary, self.seconds, self.host = name, diary, seconds, host
        self.process = type("Process", (), {"pid": -1})

    def ask(self, request, repeats):
        self.diary.append((self.name, repeats))
        return self.seconds, None, self.host


def test_the_contenders_step_in_turn(monkeypatch):
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.01)
    diary = []
    rounds = take_turns([StandIn("a", diary), StandIn("b", diary, 1.0, 0.5)], 3, progress=False)
    assert diary[:4] == [("a", 2), ("a", 1), ("b", 2), ("b", 1)]  # warm-up
    assert diary[4:] == [("a", 10), ("b", 1)] * 3  # short steps are made several times in a turn
    assert rounds.seconds == {"a": [0.001] * 3, "b": [1.0] * 3} and len(rounds.others) == 3
    assert rounds.host == {"a": [None] * 3, "b": [0.5] * 3}


class Device:
    """A GPU whose step takes 3 s and is given to it in no time; a diary of what it is asked."""

    def __init__(self):
        self.diary, self.now = [], 0.0

    def step(self):
        self.diary.append("step")
        self.now += 3.0
        return np.float32(0.5)

    def synchronize(self):
        self.diary.append("synchronize")

    def event(self):
        self.diary.append("event")
        return self.now

    def between(self, before, after):
        self.diary.append("between")
        return after - before


def test_a_gpu_is_timed_by_its_events_and_the_host_beside(monkeypatch):
    gpu, clock = Device(), iter([10.0, 10.5])
    monkeypatch.setattr(contenders, "perf_counter", lambda: next(clock))
    assert contenders.turn(gpu.step, 2, gpu) == (3.0, 0.5, 0.25)
    assert gpu.diary == ["synchronize", "event", "step", "step", "event", "between"]


def test_our_events_are_cupys(monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(strict_cupy, "time", clock)
    monkeypatch.setattr(contenders, "perf_counter", clock.perf_counter)
    with strict_cupy.installed() as cupy, plain():
        ours = OursOnGpu(job()._replace(device="cuda"))
        strict_cupy.clear()
        before, after = ours.event(), ours.event()
        assert type(before) is cupy.cuda.Event and not strict_cupy.waits
        assert ours.between(before, after) == after.time - before.time > 0.0
        assert strict_cupy.waits["synchronize"] == 1
        found = contenders.turn(ours.step, 1, ours)
    assert found.seconds > 0.0 < found.host and type(found.result) is float


@pytest.mark.torch
def test_torchs_events_tell_the_time(monkeypatch):
    with_torch = pytest.importorskip("minivit.benchmark.contenders.with_torch")
    diary = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            diary.append("record")

        def synchronize(self):
            diary.append("synchronize")

        def elapsed_time(self, other):
            return 5.0

    monkeypatch.setattr(with_torch.torch.cuda, "Event", Event)
    before, after = with_torch.recorded_event(), with_torch.recorded_event()
    assert with_torch.between(before, after) == 0.005 and diary == ["record", "record", "synchronize"]


def test_disturbed_rounds_are_made_again(monkeypatch):
    shares = iter([0.0, 0.9, 0.01, 0.8, 0.02, 0.5])
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: 5.0, process_time=lambda: 1.0, sleep=id))
    monkeypatch.setattr(turns, "share_of_others", lambda before, after: next(shares))
    child, count = StandIn("a", []), iter(range(99))
    child.ask = lambda request, repeats: (float(next(count)), None, None)  # each turn has its number
    rounds = take_turns([child], 3, patience=60, progress=False)
    assert rounds.others == [0.0, 0.01, 0.02] and rounds.seconds["a"] == [2.0, 4.0, 6.0]  # two were warm-up
    shares = iter([0.0, 0.9, 0.01, 0.8])
    assert take_turns([child], 3, progress=False).others == [0.0, 0.9, 0.01]  # no patience


def test_other_programs_are_seen(tmp_path, monkeypatch):
    """What this process and the contenders do is ours, what else our cores do is not: by a /proc that is made up."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, process_time=lambda: clock.own, now=100.0, own=7.0)
    monkeypatch.setattr(turns, "time", clock)
    monkeypatch.setattr(turns, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(turns, "available_cores", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    child = SimpleNamespace(process=SimpleNamespace(pid=42))
    assert turns.glance([child]) == (100.0, None, 7.0)  # a system that does not tell
    assert turns.share_of_others((0.0, None, 0.0), (1.0, None, 0.0)) is None

    def glance(ours, others, childs):
        """After so many hundredths of a second of each of our two cores, of the third, and of the contender."""
        (tmp_path / "proc" / "42").mkdir(parents=True, exist_ok=True)
        core = "cpu{} {} 20 30 900 5 1 2 3 0 0\n"  # user, nice, system, idle, waiting, interrupts of two kinds, stolen
        cores = [core.format("", 1), *(core.format(n, others if n == 1 else ours) for n in range(3)), "intr 5 6\n"]
        (tmp_path / "proc" / "stat").write_text("".join(cores))
        (tmp_path / "proc" / "42" / "stat").write_text(f"42 (a ) b) S {'1 ' * 10}{childs} 30 0 0\n")
        return turns.glance([child])

    before = glance(0, 0, 0)
    assert before == (100.0, 2 * 0.56, 7.0 + 0.3)
    clock.now, clock.own = 102.0, 8.0
    after = glance(150, 200, 100)  # 3 s of our cores, of which this process took one and the contender another
    assert turns.share_of_others(before, after) == pytest.approx(0.25)
    clock.own = 12.0
    assert turns.share_of_others(before, glance(150, 0, 100)) == 0.0  # clocks tick differently


# ---- processes -------------------------------------------------------------------------------------------------------


def test_a_contest_of_processes():
    engine = {"workers": 2, "micro_batch": 2}
    report = contest.contest(ViTConfig(**TINY), batch=5, against=["plain"], engine=engine, pairs=2,
                     progress=False)  # fmt: skip
    mine, plain = report["contenders"]["minivit"], report["contenders"]["plain"]
    assert list(report["contenders"]) == ["minivit", "plain", "floor-threads", "floor-workers"]
    assert plain["settings"]["kernels"] == "plain" != mine["settings"]["kernels"]
    assert (mine["settings"]["workers"], mine["settings"]["micro_batch"]) == (2, 2)
    for loss in ("loss", "updated_loss"):  # of the book and of the twins: the same but for rounding
        assert plain[loss] == pytest.approx(mine[loss], rel=1e-5)
    assert abs(mine["loss"] - mine["updated_loss"]) > 1e-3 * mine["loss"]
    assert plain["largest_error"] < 1e-5
    assert len(mine["seconds"]) == len(plain["seconds"]) == len(report["others"]) == 2
    assert report["ratio_to_plain"] > 0 and 0 < report["floor_fraction"] and report["floor"] in contest.FLOORS
    assert mine["peak_memory"] >= mine["start_memory"] > 2**20


ON_GPU = """
import itertools
from minivit.benchmark import contenders
from minivit.benchmark.contenders.ours import Ours

clock = itertools.count()
contenders.perf_counter = lambda: 0.03 * next(clock)  # of the host: whoever looks again finds it so much later

class OnGpu(Ours):
    steps = 0

    def step(self):
        self.steps += 1
        return super().step()

    def synchronize(self):
        pass

    def event(self):
        return self.steps

    def between(self, before, after):
        return 0.1 * (after - before)
"""


def test_a_contest_on_a_gpu_shows_the_hosts_time(tmp_path, monkeypatch, call):
    (tmp_path / "on_gpu.py").write_text(ON_GPU)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(contest, "NEEDS", {})
    for name in ("minivit", "torch"):
        monkeypatch.setitem(contenders.CONTENDERS, name, ("on_gpu", "OnGpu", {}, {}))
    with strict_cupy.installed():
        ended = call(
            "benchmark", "step", *FLAGS, "--device", "cuda", "--against", "torch", "--json", tmp_path / "g.json"
        )
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "g.json").read_text())
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 140 and any("IQR   host ms    images/s" in line for line in lines)
    for name in ("minivit", "torch"):
        found = report["contenders"][name]
        assert found["median"] == pytest.approx(0.1) and len(found["host_seconds"]) == len(found["seconds"])
        assert found["host"]["median"] == pytest.approx(0.03)
        assert any(line.startswith(f"{name} ") and " 30.00 " in line for line in lines)


def test_peak_memory_is_that_of_the_own_process():
    """A child's peak is not that of the parent that started it."""
    ballast = np.ones(100 * 2**20 // 8)  # 100 MiB
    with Child("pipeline", job()) as child:
        assert child.start_memory < contenders.peak_memory() - ballast.nbytes / 2


CROOKED = """
from minivit.benchmark.contenders.ours import Ours
import os

class Crooked(Ours):
    def __init__(self, job, **settings):
        print("libraries like to talk")
        if settings.get("how") == "raise":
            raise RuntimeError("no such thing")
        if settings.get("how") == "die":
            import sys
            sys.exit("out of luck")
        super().__init__(job)
        self.how = settings["how"]
        if self.how == "lazy":
            self.optimizer.step = lambda *arguments: None

    def check(self):
        loss, gradients = super().check()
        if self.how != "lazy":
            gradients["head.bias"][0] *= 1.01
        return loss, gradients
"""


@pytest.fixture
def crooked(tmp_path, monkeypatch):
    """A contender named torch that is wrong, in a module that its process finds."""
    (tmp_path / "crooked.py").write_text(CROOKED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(contest, "NEEDS", {})

    def install(how=""):
        monkeypatch.setitem(contenders.CONTENDERS, "torch", ("crooked", "Crooked", {"how": how}, {}))

    install()
    return install


@pytest.mark.parametrize(("how", "message"), [
    ("", "the gradient of head.bias is off by"), ("lazy", "its loss after an update is off by"),
])  # fmt: skip
def test_nothing_is_timed_before_all_agree(crooked, call, how, message):
    crooked(how)
    ended = call("benchmark", "step", *FLAGS, "--against", "torch")
    assert ended.status == 1 and f"torch disagrees: {message}" in ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and "images/s" not in ended.out


@pytest.mark.parametrize(("how", "message"), [
    ("raise", "torch failed: RuntimeError: no such thing"), ("die", "the process of torch ended: out of luck"),
])  # fmt: skip
def test_a_contender_that_cannot_is_one_line(crooked, call, how, message):
    crooked(how)
    ended = call("benchmark", "step", *FLAGS, "--against", "torch")
    assert ended.status == 2 and ended.err == f"error: {message}\n"


def test_only_so_many_cores():
    before = available_cores()
    if hasattr(os, "sched_setaffinity"):
        with machine.only_cores(1), Child("minivit", job()) as child:
            assert available_cores() == child.settings["workers"] == 1
    assert available_cores() == before
    with pytest.raises(InputError, match=f"--threads must be 1 to {before}"), machine.only_cores(before + 1):
        pass


def test_importing_the_benchmark_imports_no_other_library():
    code = (
        "import sys, minivit.benchmark.contest, minivit.benchmark.contenders.ours;"
        "print({'torch', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_pipeline_goes_on_for_ever():
    pipeline = Pipeline(job())
    seen = [next(pipeline.stream) for _ in range(20)]  # the data set is eight batches long
    assert all(images.shape == (5, 8, 8, 3) and labels.shape == (5,) for images, labels in seen)
    assert any((images != seen[0][0]).any() for images, _ in seen[1:])


# ---- layers, scaling -------------------------------------------------------------------------------------------------


LAYERS_OF_A_BLOCK = ("norm1", "msa.qkv", "msa.attention", "msa.proj", "norm2", "mlp.fc1", "mlp.activation", "mlp.fc2")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_layer_has_its_floor(pooling):
    config = ViTConfig(**TINY | {"depth": 3, "pooling": pooling})
    _, images, labels = problem(job())
    model = ViT(config)
    layers = {(r.path, r.direction): r for r in captured_layers(model, images, labels, 2)}
    # the rows of the last block are fewer, and its attention stands in one of the first queries
    inside = {"msa.attention": "msa.attention.attention"}
    last = [f"last {inside.get(name, name)}" for name in LAYERS_OF_A_BLOCK] if pooling == "cls" else []
    for path in ("embedding.proj", *LAYERS_OF_A_BLOCK, *last, "head.norm", "head.head", "loss"):
        for direction in ("forward", "backward"):
            layer = layers.pop((path, direction))
            products = path.endswith(("proj", "qkv", "attention", "fc1", "fc2", "head.head"))
            assert layer.kind == ("products" if products else "traffic") and not layer.part
            assert layer.times == ((2 if last else 3) if path in LAYERS_OF_A_BLOCK else 1)
            assert len(layer.calls) == len(layer.floors) == 2
            for call in layer.calls + layer.floors:
                call()
    assert {layer.path.rpartition(".")[2] for layer in layers.values()} == {"softmax"}
    assert all(layer.part for layer in layers.values())  # inside attention, and not counted twice


def test_long_attention_has_its_floor(monkeypatch):
    monkeypatch.setattr("minivit.options.flash_attention.LONG", 3)
    _, images, labels = problem(job())
    layers = captured_layers(ViT(ViTConfig(**TINY)), images, labels, 1)
    kinds = {(layer.path, layer.direction): layer.kind for layer in layers}
    assert kinds["msa.attention", "forward"] == kinds["msa.attention", "backward"] == "products"


def test_scaling_varies_one_thing_at_a_time():
    points = scaling.scaling_points(ViTConfig(), 32)
    assert [p.x for p in points["batch"]] == [p.batch for p in points["batch"]] == [16, 32, 64, 128]
    assert [p.x for p in points["depth"]] == [p.config.depth for p in points["depth"]] == [1, 2, 3, 6, 12]
    tokens = [17, 65, 257, 1025, 2305]
    assert [p.x for p in points["tokens"]] == [p.config.num_tokens for p in points["tokens"]] == tokens
    assert {p.config.patch_size for p in points["tokens"]} == {4} and points["workers"][0].engine == {"workers": 1}
    assert {p.batch for p in points["workers"]} == {128}
    assert {p.batch for p in points["tokens"]} == {4} and {p.batch for p in points["depth"]} == {32}
    assert all(p.config == ViTConfig() for panel in ("batch", "workers") for p in points[panel])


def test_line_through_times():
    line = scaling.line_through([1, 2, 4], [3.0, 5.0, 9.0])
    assert line == pytest.approx({"start": 1.0, "each": 2.0, "off": 0.0}, abs=1e-12)
    bent = scaling.line_through([1, 2, 3, 4], [1.0, 2.0, 3.0, 40.0])
    assert bent["off"] > 0.3


def test_attention_flops_are_those_that_grow_with_the_square():
    """FLOPs / N is linear in N; its slope is what the N^2 products take."""
    for changes in ({"pooling": "mean"}, {}, {"depth": 1}):
        sizes = [ViTConfig(**TINY | {"image_size": side, "depth": 3} | changes) for side in (16, 32, 64)]
        N = np.array([c.num_tokens for c in sizes], float)
        whole = np.array([sum(expected_flops(c, 5)) for c in sizes])
        square, rest, constant = np.linalg.solve(np.stack([N**2, N, N**0], axis=1), whole)
        attention = [attention_flops(c, 5) for c in sizes]
        asking = 3 if changes else 2  # of class token's model, the last block is linear in N
        if changes.get("depth") == 1:
            asking = 0
        assert square == pytest.approx(12 * 5 * asking * 12, abs=1e-6 * rest)
        last = changes.get("pooling") != "mean"
        assert attention == pytest.approx(5 * 12 * 12 * (asking * N**2 + last * N))


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["step", "infer", "layers", "data"])
def test_tables_and_files(tmp_path, call, task):
    against = [] if task in ("layers", "data") else ["--against", "plain"]
    ended = call("benchmark", task, *FLAGS, *against, "--json", tmp_path / "b.json", "--png", tmp_path / "b.png")
    assert ended.status == 0 and ended.err == "", ended.err
    assert max(map(len, ended.out.splitlines())) <= 140
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "b.json").read_text(), parse_constant=pytest.fail)
    assert report["task"] == task and report["config"]["num_heads"] == 3 and report["batch"] == 5
    assert report["pairs"] == 2 and {"processor", "cores", "blas", "numpy", "python"} <= set(report["machine"])
    if task in ("step", "infer"):
        assert set(contest.KEYS) <= set(report) and report["ratio_to_torch"] is None
        assert report["ratio_to_plain"] > 0 and report["images_per_second"] > 0 and report["floor_fraction"] > 0
        assert "plain agrees with us" in ended.out and "floor-workers" in ended.out
    if task == "infer":
        assert report["latency"]["batch"] == 1 and report["latency"]["ratio_to_plain"] > 0
    if task == "layers":
        assert {"adamw", "msa.attention", "norm1"} <= {row["layer"] for row in report["layers"]}
        whole = sum(row["share_of_step"] for row in report["layers"] if not row["inside_another"])
        assert whole + report["rest_of_step"] == pytest.approx(1.0)
    if task == "data":
        assert report["share_of_step"]["median"] > 0 and len(report["contenders"]["minivit-fed"]["seconds"]) == 2


def test_scaling(tmp_path, monkeypatch, call):
    points, diary = scaling.scaling_points, []
    monkeypatch.setattr(scaling, "scaling_points", lambda *a: {k: v[:3] for k, v in points(*a).items()})
    monkeypatch.setattr(contest, "Child", Pretender)
    monkeypatch.setattr(scaling, "take_turns", lambda children, *a, **k: diary.append(children) or take_turns(
        children, *a, **k
    ))  # fmt: skip
    monkeypatch.setattr(scaling, "available_cores", lambda: 3)
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0.0)
    ended = call("benchmark", "scaling", *FLAGS, "--against", "plain", "--json", tmp_path / "b.json",
                 "--png", tmp_path / "b.png")  # fmt: skip
    assert ended.status == 0 and "tokens" in ended.out, ended.err
    report = json.loads((tmp_path / "b.json").read_text(), parse_constant=pytest.fail)
    panels = report["panels"]
    assert list(panels) == ["batch", "depth", "tokens", "workers"]
    assert [[child.name for child in children] for children in diary] == [  # everybody of a panel takes turns
        *[["minivit at 0", "plain at 0", "minivit at 1", "plain at 1", "minivit at 2", "plain at 2"]] * 3,
        ["minivit at 0", "minivit at 1", "minivit at 2"],
    ]  # fmt: skip
    for panel, B in ("batch", None), ("depth", 5), ("tokens", 1), ("workers", 20):
        for point in panels[panel]["points"]:
            assert point["batch"] == (B or point["x"]) and point["contenders"]["minivit"]["peak_memory"] == 2**20
    point, config = panels["batch"]["points"][0], ViTConfig(**TINY)
    assert point["flops"] == sum(expected_flops(config, point["batch"]))
    assert point["attention_share"] == attention_flops(config, point["batch"]) / point["flops"]
    assert panels["batch"]["line"] == pytest.approx({"start": 0.5, "each": 0.1, "off": 0.0}, abs=1e-9)
    assert panels["depth"]["line"]["each"] == pytest.approx(0.5)
    assert panels["tokens"]["power"] == pytest.approx([2.0, 2.0])
    assert [s["median"] for s in panels["workers"]["speedup"]] == pytest.approx([1.0, 2.0, 3.0])
    assert "0.50 ms" not in ended.out and "ours is 500.00 ms + 100.00 ms x batch, to 0.0%" in ended.out
    assert "power 2.00, 2.00" in ended.out and "by 1.00 (1.00 to 1.00), 2.00 (2.00 to 2.00)" in ended.out
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


class Pretender(Child):
    """Its steps take what a law says: 0.5 s + 0.1 s per image, 0.5 s per block, N^2, 1 / workers."""

    def __init__(self, contender, job, at=""):
        c, workers = job.config, job.engine.get("workers")
        self.name, self.settings, self.start_memory = contender + at, {}, 2**19
        self.process = type("Process", (), {"pid": -1})
        if workers:
            self.seconds = 6.0 / workers
        elif c.image_size != TINY["image_size"] or job.batch == 1:
            self.seconds = 1e-3 * c.num_tokens**2
        else:
            self.seconds = (0.5 + 0.1 * job.batch) * c.depth / 2

    def ask(self, what, *_):
        return {"check": (1.0, {"a": np.ones(1)}), "turn": (self.seconds, 1.0), "memory": 2**20}[what]

    def close(self):
        pass


def test_the_pipeline_of_a_recipe(tmp_path, call):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\npatch_size = 8\nwidth = 12\ndepth = 1\nmlp_dim = 20\n'
                      '[train]\nbatch_size = 6\npolicy = "auto"\ncutmix = 1.0\n')  # fmt: skip
    flags = ["data", "--config", recipe, "--pairs", 1, "--quiet", "--json", tmp_path / "b.json"]
    ended = call("benchmark", *flags)
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["batch"] == 6 and report["config"]["patch_size"] == 8 and report["config"]["width"] == 12
    assert report["loading"]["policy"] == report["contenders"]["pipeline"]["settings"]["policy"] == "auto"
    assert report["loading"]["mixing"]["cutmix_alpha"] == 1.0
    ended = call("benchmark", *flags, "--width", 24)
    assert ended.status == 2 and "--config brings its own model" in ended.err
    ended = call("benchmark", "data", "--config", "imagefolder", *flags[3:])
    assert ended.status == 2 and "imagefolder has crop_area, parts that are cut out as files are read" in ended.err


def test_presets_and_flags_make_the_model():
    script = load_script("benchmark")

    def config(*flags):
        return script.config_of(script.parse(["step", *map(str, flags)]))

    assert config() == ViTConfig.preset("Mini/4") == config("--width", 192, "--depth", 6, "--heads", 3)
    assert config("--preset", "Ti/16", "--num-classes", 10) == ViTConfig.preset("Ti/16", num_classes=10)
    assert config("--preset", "Micro/4", "--width", 64).mlp_dim == 128  # the preset's ratio
    assert config("--width", 96, "--mlp-dim", 100).mlp_dim == 100


@pytest.mark.parametrize(("flags", "message"), [
    (["step", "--against", "tensorflow"], "no contender 'tensorflow'; the contenders are torch, torch-compile, jax"),
    (["step", "--against", "floor-workers"], "no contender 'floor-workers'"),
    (["step", "--preset", "Ti/17"], "no preset 'Ti/17'"),
    (["step", "--width", "10", "--heads", "3"], "width 10 is not a multiple of num_heads 3"),
    (["step", "--image-size", "30"], "image_size 30 is not a multiple of patch_size 4"),
    (["step", "--pos-embed", "learned2d"], 'no pos_embed "learned2d" at "input" with attention "full"; it compares'),
    (["infer", "--pos-at", "shared"], 'no pos_embed "learned" at "shared"'),
    (["layers", "--attention", "axial", "--pooling", "mean"], 'with attention "axial"; it compares'),
    (["step", "--batch", "0"], "--batch must be at least 1, got 0"),
    (["step", "--pairs", "0"], "--pairs must be at least 1, got 0"),
    (["step", "--workers", "-1"], "--workers must be at least 0"),
    (["step", "--micro-batch", "-1"], "--micro-batch must be at least 0"),
    (["step", "--threads", "4096"], "--threads must be 1 to"),
    (["step", "--patience", "-1"], "--patience must be a number of seconds"),
    (["step", "--json", "missing/b.json"], "there is no folder missing to write b.json to"),
    (["step", "--png", "missing/b.png"], "there is no folder missing"),
    (["step", "--png", "b.foo"], "b.foo must end in .png, .pdf or .svg"),
    (["step", "--workers", "99999"], "workers must be at least 0 and at most 1024, got 99999"),
    (["step", "--dropout", "0.1"], "unrecognized arguments: --dropout"),
    (["layers", "--against", "torch"], "unrecognized arguments: --against"),
    (["race"], "invalid choice: 'race'"),
    ([], "TASK"),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path, monkeypatch, call, flags, message):
    monkeypatch.chdir(tmp_path)
    ended = call("benchmark", *flags)
    assert ended.status == 2 and message in ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["torch", "torch-compile", "jax"])
def test_a_library_that_is_missing(monkeypatch, call, name):
    monkeypatch.setattr(contest.importlib.util, "find_spec", lambda name: None)
    ended = call("benchmark", "step", *FLAGS, "--against", name)
    library = name.partition("-")[0]
    assert ended.status == 2
    assert ended.err == f'error: --against {name} needs {library}: pip install "minivit[bench]"\n'


def test_others_are_mentioned(capsys):
    tables.warn_of_others([0.0, None, 0.5, 0.4])
    assert "in 2 of 3 rounds other programs took more than 5% of the cores (median 40%)" in capsys.readouterr().out
    tables.warn_of_others([0.0, None, 0.05])
    assert capsys.readouterr().out == ""


def test_the_figures_show_what_was_measured(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(contest_figures, "save", lambda figure, path: figures.append(figure))
    names = ("minivit", "torch", "floor-workers")
    report = summarise({name: {"seconds": [0.1 * k, 0.2 * k], "peak_memory": k * 2**20, "start_memory": 2**19}
                        for k, name in enumerate(names, 1)}, batch=8)  # fmt: skip
    save_contest(tmp_path / "x.png", report | {"latency": report | {"batch": 1}}, title="a $1 machine")
    texts = [t.get_text() for axes in figures[0].axes for t in [*axes.texts, axes.title, *axes.get_yticklabels()]]
    assert len(figures[0].axes) == 3 and "150 ms  (floor 300% of it)" in texts and "300 ms  (ours is 0.50×)" in texts
    assert any("one image" in axes.get_title(loc="left") for axes in figures[0].axes)


# ---- with PyTorch and JAX --------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("task", ["step", "infer"])
@pytest.mark.parametrize("changes", MORE)
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_the_same_model_elsewhere(name, changes, task):
    pytest.importorskip(name)
    mine = Ours(job(task, **changes))
    with Child(name, job(task, **changes)) as child:
        loss_error, worst = agree(name, mine.check(), child.ask("check"))
        assert loss_error < 1e-6 and worst < 1e-5
        for _ in range(3):  # the optimisers agree too
            loss, theirs = mine.step(), child.ask("turn", 1)[1]
            assert loss == theirs or loss == pytest.approx(theirs, rel=1e-5)
    mine.engine.__exit__(None, None, None)


@pytest.mark.parametrize("task", ["step", "infer", "layers", "scaling", "data"])
def test_a_model_with_a_stem_is_refused(call, task):
    ended = call("benchmark", task, "--stem", "root", "--patch-size", 2)
    assert ended.status == 2 and ended.err.startswith(
        "error: benchmarks are of models without a stem, not of stem 'root'"
    )
