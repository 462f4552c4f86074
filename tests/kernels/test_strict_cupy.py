"""A training step on a GPU, as far as that can be told without one: what it launches, and that nobody waits."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import strict_cupy
from conftest import ROOT, assert_same_guesses, close_calls
from emulator import Emulator
from strict_cupy import doubles, installed, launches, waits

from minivit.base import backend
from minivit.base import params as parameters
from minivit.base.backend import array_module, plain, to_host
from minivit.benchmark.contenders import Job
from minivit.benchmark.contenders.ours import OursOnGpu
from minivit.data import Dataset
from minivit.data.augment import augment
from minivit.data.loader import augment_rows, batches
from minivit.evaluation.inference import load_with_data, on_device
from minivit.kernels import cuda
from minivit.kernels.cublas import Cublas
from minivit.laboratory import checks as laboratory
from minivit.laboratory import curvature
from minivit.model import ViT, ViTConfig
from minivit.optim import EMA, make_optimizer
from minivit.options import flash_attention
from minivit.paper import analyses as analysis
from minivit.paper import entries, film, trainings
from minivit.paper.journey import journey_of
from minivit.training.config import TrainConfig
from minivit.training.engines.gpu import CudaEngine
from minivit.training.folder import METRICS, read_metrics
from minivit.training.recipes import find_config, read_recipe
from minivit.training.step import Batch
from minivit.training.step_gpu import CudaStep
from minivit.training.task import cross_entropy
from minivit.training.trainer import Trainer

NINE = ViTConfig(image_size=8, patch_size=4, width=8, depth=9, num_heads=1, mlp_dim=8, num_classes=10)


@pytest.fixture
def cupy():
    with installed() as module:
        yield module


@pytest.fixture
def plain_functions():
    with plain():
        yield


def step_of(cupy, config, *, average=False, muon=False, graph=False):
    """A training step on arrays of the stand-in, as the trainer makes them: call it with the step's number."""
    model = ViT(config, flat=cupy.asarray(ViT(config).flat))
    optimizer = make_optimizer(
        "muon" if muon else "adamw", model.flat, cupy.asarray(parameters.decay_mask(model.table)), table=model.table,
        weight_decay=0.05,
    )  # fmt: skip
    ema = EMA(model.flat, 0.99) if average else None
    engine = CudaEngine(model, partial(cross_entropy, label_smoothing=0.1))
    step = CudaStep(engine, optimizer, ema, clip_norm=1.0, graph=graph)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, config.image_size, config.image_size, 3), dtype=np.uint8)
    data = cupy.asarray(images), cupy.asarray(rng.integers(0, 10, 8))

    def run(number):
        run.model, run.optimizer, run.average, run.step = model, optimizer, ema, step
        stream = batches(*data, np.arange(8), 4, seed=0, epoch=number, prefetch=0, crop_padding=1, flip=True)
        return [step([Batch(number, *batch)], len(batch[0]), 1e-3)[:3] for _, *batch in stream][0]

    return run


def test_plain_functions_never_wait_and_never_compute_in_float64(cupy):
    with plain():
        step = step_of(cupy, NINE, average=True)
        strict_cupy.clear()
        results = step(1)
    assert not waits and not doubles
    assert launches.total() / 2 <= 1500  # of one of two batches
    assert all(isinstance(result, cupy.ndarray) for result in results)


@pytest.mark.parametrize("precision", cuda.PRECISIONS)
def test_kernels_never_wait_and_are_few(cupy, precision):
    with cuda.using(Emulator()) as machine:
        machine.precision = precision
        step = step_of(cupy, NINE)
        strict_cupy.clear()
        machine.launches.clear()
        step(1)
    assert not waits and not doubles
    per_step = (launches.total() + machine.launches.total()) / 2
    assert per_step <= 330, (launches, machine.launches)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("muon", [False, True])
def test_a_replayed_graph_gives_the_bits_of_single_kernels(cupy, muon, precision):
    """Nothing waits while it is recorded, and what the first step used is given back before."""
    replays_with_the_bits_of_single_kernels(cupy, replace(NINE, depth=2, dropout=0.1, drop_path=0.2), precision, muon)


def replays_with_the_bits_of_single_kernels(cupy, config, precision="float32", muon=False):
    found = {}
    for graph in (False, True):
        with cuda.using(Emulator()) as machine:
            machine.precision = precision
            step = step_of(cupy, config, muon=muon, average=True, graph=graph)
            losses = [float(step(number)[0]) for number in (1, 2)]  # four steps
            assert step.step.replays == 3 * graph and cupy.freed == graph
            if graph:
                strict_cupy.clear()
                step(3)
                assert launches["graph"] == 2 and not waits
            else:
                step(3)
        state = [step.model.flat, step.average.flat, *step.optimizer.state.values()]
        found[graph] = losses, [to_host(vector) for vector in state]
    assert found[True][0] == found[False][0] and len({*found[True][0]}) == 2
    for one, other in zip(found[True][1], found[False][1], strict=True):
        np.testing.assert_array_equal(one, other)


FOUR = replace(NINE, depth=2, num_heads=2)  # heads of four dimensions
RECORDED = {
    "digits": dict(read_recipe(find_config("digits")).model) | {"depth": 2, "width": 16},  # with dropout
    "layer_scale": {"layer_scale": 0.1, "drop_path": 0.5},
    "qk_norm": {"qk_norm": True},
    "relative": {"pos_embed": "relative", "pos_at": "every", "attention_dropout": 0.1},
    "learned2d": {"pos_embed": "learned2d", "pos_at": "every", "registers": 1},
    "seq": {"pooling": "seq", "pre_logits": 6},
    "axial": {"attention": "axial", "pooling": "mean", "dropout": 0.1},
    "stem": {"image_size": 16, "patch_size": 1, "stem": "2,1", "stem_width": 4, "stem_groups": 2},
    "odd": {"mlp_dim": 6, "num_classes": 11},
}


@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("name", RECORDED)
def test_what_runs_through_plain_layers_is_recorded_too(cupy, name, precision):
    """CuPy refuses its own products meanwhile: theirs are ours."""
    replays_with_the_bits_of_single_kernels(cupy, replace(FOUR, **RECORDED[name]), precision)


def test_long_sequences_through_plain_layers_are_recorded_too(cupy, monkeypatch):
    monkeypatch.setattr(flash_attention, "LONG", 3)
    replays_with_the_bits_of_single_kernels(cupy, replace(FOUR, qk_norm=True, dropout=0.1))


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 6},
        {"width": 1028, "mlp_dim": 4, "image_size": 4, "pooling": "mean"},
        {"num_heads": 4, "qk_norm": True},
    ],
    ids=str,
)
def test_a_layernorm_without_a_kernel_is_not_recorded(cupy, settings):
    """Its sums over rows are CuPy's own products; nothing is tried, and nobody is warned."""
    with cuda.using(Emulator()):
        step = step_of(cupy, replace(FOUR, depth=1, **settings), graph=True)
        step(1), step(2)
    assert step.step.fused and step.step.replays == 0 and not cupy.pools


def test_a_graph_is_of_the_shape_that_comes_twice_in_a_row(cupy):
    """A run may begin with an epoch's last batch, which is short."""
    with cuda.using(Emulator()):
        run = step_of(cupy, FOUR, graph=True)
        run(0)
        step, replays = run.step, []
        step.release()
        images, labels = cupy.asarray(np.zeros((4, 8, 8, 3), np.uint8)), cupy.asarray(np.arange(4))
        for number, size in enumerate((1, 4, 4, 4, 3, 4, 3, 3, 3)):
            before = step.replays
            step([Batch(number, images[:size], labels[:size])], size, 1e-3)
            replays.append(step.replays - before)
    assert replays == [0, 0, 1, 1, 0, 1, 0, 1, 1] and len(cupy.pools) == 1
    step.release()
    assert not cupy.pools


def test_a_step_that_cannot_be_recorded_goes_on_kernel_by_kernel(cupy, monkeypatch):
    forward = ViT.forward

    def waiting(self, images, **settings):
        strict_cupy.STREAM.synchronize()
        return forward(self, images, **settings)

    monkeypatch.setattr(ViT, "forward", waiting)
    with cuda.using(Emulator()):
        step = step_of(cupy, replace(NINE, depth=2), graph=True)
        with pytest.warns(UserWarning, match="steps run kernel by kernel: no CUDA graph could be made .*not permitted"):
            first = step(1)
        second = step(2)
    assert step.step.replays == 0 and launches["graph"] == 0 and float(second[0]) != float(first[0])
    assert not cupy.pools  # what was taken for the graph was given back


def test_a_graph_that_does_not_fit_is_recorded_of_smaller_micro_batches(cupy, monkeypatch):
    forward, tried = ViT.forward, []

    def first_recording_fails(self, images, **settings):
        if strict_cupy.STREAM.tape is not None:
            tried.append(len(images))
            if len(images) == 4:
                raise MemoryError("Out of memory")
        return forward(self, images, **settings)

    monkeypatch.setattr(ViT, "forward", first_recording_fails)
    with cuda.using(Emulator()):
        step = step_of(cupy, FOUR, graph=True)
        with pytest.warns(UserWarning, match="4 images at a time .* going on with 2, as --gpu-micro-batch 2 would"):
            step(1)
        step(2)
    assert tried == [4, 2, 2] and step.step.replays == 2 and step.optimizer.steps == 4 and len(cupy.pools) == 1


@pytest.mark.parametrize("fails", ["norm", "average"])
def test_an_update_that_does_not_fit_is_not_made_twice(cupy, monkeypatch, fails):
    def none(*arguments):
        raise MemoryError("Out of memory")

    with cuda.using(Emulator()):
        step = step_of(cupy, FOUR, average=True)
        if fails == "norm":
            monkeypatch.setattr(cuda, "gradient_norm", none)
        else:
            step(1)
            monkeypatch.setattr(type(step.average.flat), "__sub__", none, raising=False)
        made = []
        original = cuda.adam_step
        monkeypatch.setattr(cuda, "adam_step", lambda *a, **k: made.append(original(*a, **k)))
        with pytest.raises(MemoryError):
            step(2)
    assert len(made) == (fails == "average") and step.step.engine.micro_batch == 0


def fits_two_at_a_time(monkeypatch, name="forward", cls=ViT):
    original, sizes = getattr(cls, name), []

    def function(self, images, *others, **settings):
        sizes.append(len(images))
        if len(images) > 2:
            raise MemoryError("Out of memory")
        return original(self, images, *others, **settings)

    monkeypatch.setattr(cls, name, function)
    return sizes


@pytest.mark.usefixtures("plain_functions")
def test_gradients_that_do_not_fit_are_cut_also_where_they_add_up(cupy, monkeypatch):
    rng = np.random.default_rng(0)
    images, labels = cupy.asarray(rng.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)), cupy.asarray(np.arange(7))
    engines = [CudaEngine(ViT(FOUR, flat=cupy.asarray(ViT(FOUR).flat)), micro_batch=m) for m in (2, 0)]
    for engine in engines:
        engine.gradient(images[:2], labels[:2], denominator=7)
    expected = engines[0].gradient(images[2:], labels[2:], denominator=7, accumulate=True)
    backward = ViT.backward

    def too_late(self, dlogits, cache, grads):
        """The memory ends when the gradient was added already."""
        backward(self, dlogits, cache, grads)
        if len(dlogits) > 2:
            raise MemoryError("Out of memory")

    monkeypatch.setattr(ViT, "backward", too_late)
    with pytest.warns(UserWarning) as said:
        found = engines[1].gradient(images[2:], labels[2:], denominator=7, accumulate=True)
    assert [str(w.message).partition("going on with ")[2] for w in said] == [
        f"{n}, as --gpu-micro-batch {n} would" for n in (3, 2)
    ]
    np.testing.assert_array_equal(*(to_host(engine.grad) for engine in engines))
    assert float(found.loss) == float(expected.loss) and cupy.freed == 2


@pytest.mark.usefixtures("plain_functions")
def test_predictions_that_do_not_fit_are_cut(cupy, monkeypatch):
    images = cupy.asarray(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))
    engine = CudaEngine(ViT(FOUR, flat=cupy.asarray(ViT(FOUR).flat)))
    expected = to_host(engine.predict(images))
    sizes = fits_two_at_a_time(monkeypatch, "predict")
    with pytest.warns(UserWarning) as said:
        found = engine.predict(images)
    assert [str(w.message).partition("(")[0] for w in said] == [
        f"{n} images at a time do not fit into the device's memory " for n in (5, 3)
    ]
    assert sizes == [5, 3, 2, 2, 1] and engine.micro_batch == 0 and cupy.freed == 2
    np.testing.assert_allclose(to_host(found), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*images at a time")
@pytest.mark.parametrize("settings", [{"accumulate": 2}, {}], ids=str)
def test_a_run_that_does_not_fit_is_cut(cupy, settings, no_figures, tmp_path, monkeypatch):
    flats = []
    for cut in (False, True):
        with cuda.using(Emulator()), plain(), pytest.MonkeyPatch.context() as patch:
            if cut:
                fits_two_at_a_time(patch), fits_two_at_a_time(patch, "predict")
            config = TrainConfig(epochs=1, batch_size=6, device="cuda", gpu_micro_batch=0 if cut else 2, **settings)
            trainer = Trainer(random_data(), FOUR, config, tmp_path / str(cut), progress=False)
            trainer.run()
        flats.append(to_host(trainer.model.flat))
    np.testing.assert_array_equal(*flats)


def random_data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    names = tuple("abcdefghij")
    return Dataset("cifar10", images[:16], np.arange(16) % 10, images[16:], np.arange(4), names, "random numbers")


def test_the_graph_of_half_size_goes_when_whole_images_come(cupy, no_figures, tmp_path):
    config = TrainConfig(epochs=4, batch_size=5, half_size=0.5, device="cuda")
    pools = []

    def look(trainer):
        pools.append(len(cupy.pools))

    with cuda.using(Emulator()):
        model = replace(FOUR, pos_embed="sincos2d")
        trainer = Trainer(random_data(), model, config, tmp_path / "run", progress=False, on_epoch=look)
        trainer.run()
    assert pools == [1, 0, 1, 1]


PATHFINDERS = {  # what `cuda.pathfinder` is like: the path that it finds, or the error that it raises
    "not installed": None,
    "nothing found": RuntimeError('Failure finding "cublas":\n  No such file: libcublas.so*'),
    "cannot be loaded": "/nowhere/libcublas.so.13",
}


@pytest.mark.parametrize("name", PATHFINDERS)
def test_without_cublas_products_are_cupys_and_no_graph_is_made(cupy, name, monkeypatch):
    found = PATHFINDERS[name]

    def load_nvidia_dynamic_lib(library):
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(abs_path=found)

    here = found and SimpleNamespace(load_nvidia_dynamic_lib=load_nvidia_dynamic_lib)
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", here)
    with pytest.warns(UserWarning, match=r"^cuBLAS cannot be called \(.+\): products go through cupy.matmul") as warned:
        machine = cuda.Machine()
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    emulator, results = Emulator(), []
    for blas in (emulator.blas(), machine.blas()):
        emulator._blas = blas
        with cuda.using(emulator):
            step = step_of(cupy, replace(NINE, depth=2), average=True, graph=True)
            strict_cupy.clear()
            step(0)
            results.append([float(result) for result in step(1)])
            assert (step.step.replays > 0) == (launches["graph"] > 0) == (blas is not machine.blas())
            assert (launches["matmul"] > 0) == (blas is machine.blas()) and not doubles
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_cublas_is_taken_where_it_is_found(cupy, monkeypatch):
    path = Emulator().blas()._library._name
    here = SimpleNamespace(load_nvidia_dynamic_lib=lambda name: SimpleNamespace(abs_path=path))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", here)
    products = cuda.Machine().blas()
    assert type(products) is Cublas and products.recordable


def test_plain_functions_load_no_kernels_and_no_cublas(cupy, tmp_path, monkeypatch, no_figures):
    monkeypatch.setattr(cuda, "_machine_of", lambda device: pytest.fail("a machine was made"))
    images, labels = np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) % 10
    data = Dataset("cifar10", images, labels, images, labels, tuple("abcdefghij"), "zeros")
    config = TrainConfig(epochs=1, batch_size=4, device="cuda", workers=1)
    with plain():
        run = Trainer(data, replace(NINE, depth=1), config, tmp_path / "run", progress=False)
        assert run.run()["steps"] == 2
        ours = OursOnGpu(Job("step", replace(NINE, depth=1), 3, 0, {}, "cuda", "tf32"))
        ours.step()
    assert ours.settings["precision"] == "float32"


def test_muon_never_waits_and_takes_all_blocks_at_once(cupy):
    flats = []
    for arrays in (cupy, np):
        with cuda.using(Emulator()) as machine, pytest.MonkeyPatch.context() as patch:
            if arrays is np:
                patch.setattr(cupy, "asarray", np.asarray, raising=False)
                patch.setitem(backend.TWINS, "numpy", "minivit.kernels.cuda")
            step = step_of(cupy, NINE, muon=True)
            strict_cupy.clear()
            machine.launches.clear()
            step(1)
        if arrays is cupy:
            assert not waits and not doubles and len(step.optimizer.matrices) == 4
            assert machine.launches["adam"] / 2 == len(step.optimizer.others) == 1 + 4 * 9
            assert (launches.total() + machine.launches.total()) / 2 <= 600
        else:
            assert len(step.optimizer.matrices) == 4 * 9
        flats.append(to_host(step.optimizer.state["m"]))
    np.testing.assert_allclose(flats[0], flats[1], rtol=1e-4, atol=1e-7)


def test_dropout_never_waits_and_draws_nothing_on_the_host(cupy):
    with cuda.using(Emulator()) as machine:
        step = step_of(cupy, replace(NINE, dropout=0.1, attention_dropout=0.1, drop_path=0.1))
        strict_cupy.clear()
        machine.launches.clear()
        step(1)
    assert not waits and not doubles
    assert machine.launches["dropout"] == 2 * 2 * (1 + 4 * 9) + 2 * 9  # forward and backward; the map's once more


OPTIONS = {
    "learned2d": {"pos_embed": "learned2d", "pos_at": "every", "registers": 1},
    "shared": {"pos_at": "shared", "registers": 1},
    "relative": {"pos_embed": "relative", "pos_at": "every", "attention_dropout": 0.1},
    "axial": {"attention": "axial", "pooling": "mean", "drop_path": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_positions_and_axial_attention_never_wait_and_give_the_numbers_of_numpy(cupy, name):
    config = replace(NINE, depth=3, **OPTIONS[name])
    with cuda.using(Emulator()):
        step = step_of(cupy, config)
        strict_cupy.clear()
        step(1)
        assert not waits and not doubles
    with plain():
        results = [float(result) for result in step_of(cupy, config)(1)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cupy, "asarray", np.asarray, raising=False)
            expected = [float(result) for result in step_of(cupy, config)(1)]
    assert results == expected


STEM = replace(NINE, depth=2, image_size=16, patch_size=1, stem="2,1", stem_width=4, stem_groups=2)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_stem_never_waits_and_gives_the_numbers_of_numpy(cupy, kernels):
    flats = []
    for arrays in (cupy, np):
        with cuda.using(Emulator()) if kernels else plain(), pytest.MonkeyPatch.context() as patch:
            if arrays is np:
                patch.setattr(cupy, "asarray", np.asarray, raising=False)
                patch.setitem(backend.TWINS, "numpy", "minivit.kernels.cuda")
            step = step_of(cupy, STEM)
            strict_cupy.clear()
            step(1)
        if arrays is cupy:
            assert not waits and not doubles
        flats.append(to_host(step.optimizer.state["m"]))
    np.testing.assert_allclose(flats[0], flats[1], rtol=1e-4, atol=1e-7)
    with plain():  # and the kernels those of the plain functions
        step = step_of(cupy, STEM)
        step(1)
    largest = np.abs(flats[0]).max()
    np.testing.assert_allclose(to_host(step.optimizer.state["m"]), flats[0], atol=1e-5 * largest)


def test_it_gives_the_numbers_of_numpy(cupy):
    with plain():
        results = [float(result) for result in step_of(cupy, NINE)(1)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cupy, "asarray", np.asarray, raising=False)
            expected = [float(result) for result in step_of(cupy, NINE)(1)]
    assert results == expected


@pytest.mark.parametrize(
    "settings", [{"crop_padding": 3, "crop_mode": "reflect"}, {"erasing": 0.5}], ids=lambda s: [*s][-1]
)
def test_augmentation_never_waits_and_gives_the_numbers_of_numpy(cupy, settings):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 7, 3), dtype=np.uint8)
    on_device, rows = cupy.asarray(images), cupy.asarray(np.arange(6))
    strict_cupy.clear()
    for machine in (None, Emulator()):
        with plain() if machine is None else cuda.using(machine):
            found = augment_rows(on_device, rows, np.random.default_rng(4), flip=True, **settings)
        assert not waits and not doubles and isinstance(found, cupy.ndarray)
        np.testing.assert_array_equal(to_host(found), augment(images, np.random.default_rng(4), flip=True, **settings))
        strict_cupy.clear()


def test_the_stand_in_is_strict(cupy):
    x, host = cupy.asarray(np.ones((3, 4), np.float32)), np.ones((3, 4), np.float32)
    assert array_module(x) is cupy is sys.modules["cupy"]
    for wrong in (
        lambda: x + host, lambda: np.add(x, host), lambda: cupy.concatenate([x, host]), lambda: x * np.float64(2.0),
        lambda: x.__setitem__(0, host[0]), lambda: np.add(x, x, where=x > 0),
        lambda: cupy.sum(x, initial=1.0), lambda: x.set(host.astype(np.float64)),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            wrong()
    strict_cupy.STREAM.begin_capture()
    for product in (
        lambda: x @ x.T, lambda: cupy.matmul(x, x.T), lambda: x.dot(x.T), lambda: cupy.dot(x, x.T),
        lambda: cupy.tensordot(x, x.T, 1), lambda: cupy.einsum("ij,kj", x, x),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match="cuBLAS API during stream capture"):
            product()
    strict_cupy.STREAM.end_capture()
    for absent in ("nditer", "frompyfunc", "vecdot"):
        with pytest.raises(AttributeError):
            getattr(cupy, absent)
    strict_cupy.clear()
    x[x > 0], float(x.sum()), to_host(x), bool((x > 0).max())
    assert waits.total() == 4
    assert (x.astype(np.float64) * 2.0).dtype == np.float64 and doubles.total() == 2
    launches.clear()
    x.reshape(4, 3), x.T, x.swapaxes(0, 1), cupy.empty(3), x[1:]
    assert launches.total() == 0
    x.T.reshape(-1), x + 1.0, x @ x.T
    assert launches.total() == 3


@pytest.mark.parametrize("name", ["linear", "block", "head", "loss-soft", "patch_embed-mean", "resnet", "vit-dropout"])
def test_gradients_are_checked_on_a_device(cupy, name):
    """The layers get device arrays, which mix with no others, and the check gets what it gets on the host."""
    results, expected = (
        laboratory.results_of(name, "central", 0, elementwise=False, device=device) for device in ("cuda:0", "cpu")
    )
    assert launches.total() > 0
    for result, other in zip(results, expected, strict=True):
        assert result.passed and result.analytic == pytest.approx(other.analytic, rel=1e-12)


def test_devices_see_the_stand_in(cupy):
    assert backend.to_device(np.zeros(2), "cuda:0").__class__ is cupy.ndarray


@pytest.mark.parametrize("script", ["evaluate", "predict"])
def test_scripts_give_the_same_on_a_device(cupy, trained, tmp_path, call, script):
    arguments = [trained / "last.npz", "--out", tmp_path, "--json", tmp_path / "f.json"]
    arguments += ["--test", 3] if script == "predict" else []
    facts = {}
    with cuda.using(Emulator()):
        for device in ("cuda", "cpu"):
            launches.clear()
            ended = call(script, *arguments, "--device", device)
            assert ended.status == 0, ended.err
            assert (launches.total() > 0) == (device == "cuda")
            facts[device] = json.loads((tmp_path / "f.json").read_text())
    if script == "predict":
        assert_same_guesses(*(facts[device]["predictions"][0]["top"] for device in facts))
    else:
        assert facts["cuda"]["device"] == "stand-in"
        assert facts["cuda"]["loss"] == pytest.approx(facts["cpu"]["loss"], rel=1e-5)
        model, _, dataset = load_with_data(trained / "last.npz")
        undecided = close_calls(model.predict(dataset.test_images), 1e-5)  # a rounding may make the difference in them
        assert undecided < 5 and abs(facts["cuda"]["accuracy"] - facts["cpu"]["accuracy"]) <= undecided / 360


@pytest.mark.parametrize(
    ("recipe", "kernels"), [("cifar10-gpu-5min", False), ("cifar10-gpu-30min", False), ("cifar10-gpu-5min", True)]
)
def test_the_recipes_for_a_gpu_train_there_as_on_the_cpu(cupy, recipe, kernels, no_figures, tmp_path):
    """Two epochs of their settings: augmentation, mixing, initialisation, Muon, stochastic depth, the tests."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(30) % 10
    data = Dataset("cifar10", images[:20], labels[:20], images[20:], labels[20:], tuple("abcdefghij"), "random numbers")
    asked = read_recipe(find_config(recipe))
    model = ViTConfig(**asked.model | {"patch_size": 8, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12})
    small = {"epochs": 2, "batch_size": 10, "warmup_epochs": 1, "evaluate_every": 1, "log_every": 1, "workers": 1}
    found = {}
    for device in ("cuda", "cpu"):
        config = TrainConfig(**asked.train | small | {"device": device, "precision": "float32", "graph": False})
        with cuda.using(Emulator()), nullcontext() if kernels else plain():
            launches.clear()
            trainer = Trainer(data, model, config, tmp_path / device, progress=False)
            summary = trainer.run()
        assert (launches.total() > 0) == (device == "cuda") and summary["steps"] == 4
        losses = [r["loss"] for r in read_metrics(tmp_path / device / METRICS) if r["kind"] == "train"]
        found[device] = np.array([*losses, summary["test_loss"]])
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=1e-4)
    assert len(found["cpu"]) == 5 and len({*found["cpu"]}) == 5


def test_analyses_give_the_same_on_a_device(cupy, trained):
    model, _, dataset = load_with_data(trained / "last.npz")
    images = dataset.test_images[:5]
    found = []
    for device in ("cuda:0", "cpu"):
        launches.clear()
        here = on_device(model, device)
        seen, along = analysis.rollout_maps(here, images), journey_of(here, images[0], dataset.class_names)
        found.append([
            *seen, analysis.head_distances(here, images), analysis.position_embedding(here),
            along.tokens, along.gaze, along.maps, along.probabilities,
        ])  # fmt: skip
        assert (launches.total() > 0) == (device != "cpu")
    for one, other in zip(*found, strict=True):
        assert type(one) is np.ndarray
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_curvature_is_the_same_on_a_device(cupy):
    config = replace(NINE, depth=1)
    flat = ViT(config).flat.astype(np.float64)
    rng = np.random.default_rng(0)
    flat += 0.1 * rng.standard_normal(flat.size)
    batch = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8), rng.integers(0, 10, 4)
    found = []
    for device in ("cuda:0", "cpu"):
        launches.clear()
        how = {"label_smoothing": 0.1, "device": device}
        spectrum = curvature.sharpness(config, flat, *batch, count=2, steps=12, **how)
        _, losses = curvature.loss_slice(config, flat, *batch, spectrum.eigenvectors, 0.5, points=2, **how)
        found.append([*spectrum[:3], losses, *curvature.loss_gradient(config, flat, *batch, **how)])
        assert (launches.total() > 0) == (device != "cpu")
    for one, other in zip(*found, strict=True):
        assert type(one) is np.ndarray
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_images_of_a_run_are_drawn_on_a_device(cupy, trained, tmp_path, call, monkeypatch):
    monkeypatch.setattr(film, "save_film", lambda path, found, progress: path.write_bytes(b""))
    few = ["--images", 4, "--points", 2, "--epochs", 1, "--count", 1, "--steps", 2]
    for arguments in (["journey", trained / "last.npz"], ["curvature", trained / "last.npz", *few]):
        launches.clear()
        with cuda.using(Emulator()), plain():
            ended = call("visualize", *arguments, "--out", tmp_path, "--device", "cuda")
        assert ended.status == 0 and launches.total() > 0, ended.err
        ended = call("visualize", *arguments, "--out", tmp_path, "--device", "gpu")
        assert ended.status == 2 and ended.err.startswith("error: device must be cpu, cuda")


def test_a_sweep_may_move_to_a_device_and_back(cupy, tmp_path, call, no_figures):
    """Each run's device is where it was made; the table is of all."""
    file = tmp_path / "s.toml"
    file.write_text(f"""
        title = "tiny"
        config = "{ROOT}/tests/tiny.toml"
        seeds = [0, 1]
        [base.train]
        epochs = 1
        checkpoint_seconds = 1000.0
        device = "cpu"
        [[row]]
        name = "one"
    """)
    devices = ("cuda", "cpu")
    for seed, device in enumerate(devices):
        with cuda.using(Emulator()), plain():
            ended = call("sweep", file, "--out", tmp_path / "o", "--quiet", "--seeds", seed, "--device", device)
        assert ended.status == 0, ended.err
        summary = json.loads((tmp_path / "o" / f"one-seed{seed}" / "summary.json").read_text())
        assert summary["device"] == {"cuda": "stand-in", "cpu": "cpu"}[device]
    ended = call("sweep", file, "--out", tmp_path / "o", "--table")
    assert ended.status == 0 and "2 runs are finished" in ended.out
    ended = call("sweep", file, "--out", tmp_path / "p", "--device", "tpu")
    assert ended.status == 2 and ended.err.startswith("error: device must be") and not (tmp_path / "p").exists()


def test_the_papers_figures_are_made_on_a_device(cupy, tmp_path, call, no_figures, monkeypatch):
    """The model that is trained for them, a sweep, and what looks at the model."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "tiny.toml").write_text(
        f'config = "{ROOT}/tests/tiny.toml"\nbase.train.epochs = 1\n[[row]]\nname = "one"\n'
    )
    monkeypatch.setattr(trainings, "CONFIGS", tmp_path)
    monkeypatch.setattr(trainings, "time_of_epochs", lambda dataset, model, config, probe: times(config.device))
    within = lambda share, dataset, model, config, **keywords: (config, times(config.device)(1.0))  # noqa: E731
    monkeypatch.setattr(trainings, "within", within)
    two = entries.entry_of("distance"), entries.sweep_entry("tiny", "Table 0", "T", "")
    monkeypatch.setattr(entries, "ENTRIES", two)

    def times(device):
        asked.append(device)
        return lambda epochs: epochs

    asked, common = [], ["--config", ROOT / "tests" / "tiny.toml", "--out", tmp_path / "o", "--quiet"]
    with cuda.using(Emulator()), plain():
        ended = call("paper", "--all", *common, "--device", "cuda", "--budget", "3s")
    assert ended.status == 0, ended.err + ended.out
    assert asked == ["cuda:0"] * 2
    for folder in ("model", "tiny/one-seed0"):
        assert json.loads((tmp_path / "o" / folder / "summary.json").read_text())["device"] == "stand-in"
    launches.clear()
    ended = call("paper", "distance", *common, "--again", "--device", "cuda")
    assert ended.status == 0 and launches["matmul"] > 0
    ended = call("paper", "distance", *common, "--device", "tpu")
    assert ended.status == 2 and ended.err.startswith("error: device must be cpu, cuda")
