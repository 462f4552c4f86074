"""The zoo: every mistake is caught, by what it should be caught by, and leaves nothing behind."""

import inspect
import sys
import warnings

import numpy as np
import pytest

from minivit import InputError, ViT, ViTConfig, gradcheck
from minivit.facts import FACTS, TOLERANCE
from minivit.gradcheck_cases import LAYERS, MODEL_BATCH, MODELS
from minivit.mistakes import BY_NAME, MISTAKES, find, planted, source_of

# What exposes the mistakes that no derivative shows, or not of a single layer.
BY_FACT = {
    "softmax-shift-axis": "softmax_is_normalised_exponentials",
    "layernorm-unbiased": "layernorm_rows_have_mean_0_and_variance_1",
    "attention-scale-forward": "attention_is_equations_6_and_7",
    "block-gradient-overwritten": "micro_batches_add_up_to_the_batch",
    "loss-no-shift": "large_logits_are_no_trouble",
    "loss-smoothing-wrong-share": "targets_are_probabilities",
    "sgd-momentum-forgets": "sgd_by_scalars",
    "sgd-decays-everything": "sgd_by_scalars",
    "adam-frozen-step": "adam_by_scalars",
    "adam-second-moment-beta": "adam_by_scalars",
    "adam-eps-inside": "adam_by_scalars",
    "adam-no-square": "adam_by_scalars",
    "adam-decay-with-gradient": "adamw_by_scalars",
    "clip-always": "clipping_limits_the_norm_and_nothing_else",
    "clip-squared-norm": "clipping_limits_the_norm_and_nothing_else",
    "schedule-no-warmup-offset": "the_schedule_peaks_after_the_warm_up",
    "ema-swapped": "the_average_by_its_formula",
    "engine-workers-not-summed": "micro_batches_add_up_to_the_batch",
    "engine-gradient-not-cleared": "micro_batches_add_up_to_the_batch",
    "engine-micro-batch-mean": "micro_batches_add_up_to_the_batch",
}


def layer_of(mistake):
    stem = mistake.module.rpartition(".")[2]
    return [case for case in LAYERS if case.partition("-")[0] == stem]


def wrong_gradients(cases):
    for case in cases:
        forward, backward, args, names = LAYERS[case](np.random.default_rng(0))
        for result in gradcheck.check(forward, backward, args, names=names, method="complex"):
            if not result.passed:
                yield f"{case} d{result.argument}"


def wrong_model_gradients():
    for name, settings in MODELS.items():
        config = ViTConfig(**settings)
        rng = np.random.default_rng(0)
        flat = ViT(config, dtype=np.float64).flat
        flat += 0.3 * rng.standard_normal(flat.shape)
        size, channels = config.image_size, config.channels
        images = rng.standard_normal((MODEL_BATCH, size, size, channels))
        labels = rng.integers(0, config.num_classes, MODEL_BATCH)
        results = gradcheck.check_model(lambda f, c=config: ViT(c, flat=f), images, labels, flat, method="complex")
        for result in results:
            if not result.passed:
                yield f"{name} {result.argument}"


def test_there_are_enough_over_every_room():
    assert len(MISTAKES) == len(BY_NAME) >= 60
    rooms = {m.module.rpartition(".")[2] for m in MISTAKES}
    layers = {case.partition("-")[0] for case in LAYERS} - {"drop_path", "loss"}  # drop_path is dropout's code
    assert rooms == layers | {"loss", "model", "optim", "engine"}
    assert sum(bool(m.seen) for m in MISTAKES) >= 15
    assert all(m.about and m.hint for m in MISTAKES)
    assert set(BY_FACT) <= set(BY_NAME)


@pytest.mark.parametrize("name", BY_NAME)
def test_it_is_caught(name):
    mistake = find(name)
    with planted(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in BY_FACT:
            assert not FACTS[BY_FACT[name]]() <= TOLERANCE
        elif mistake.module == "minivit.model":
            assert list(wrong_model_gradients())
        else:
            assert list(wrong_gradients(layer_of(mistake)))


def package():
    """{(module or class, name): object} of everything that minivit defines or imports."""
    modules = [m for n, m in sys.modules.items() if n.startswith("minivit")]
    classes = {
        c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__.startswith("minivit")
    }
    return {(holder.__name__, name): value for holder in [*modules, *classes] for name, value in vars(holder).items()}


def changed(before, after):
    return {place for place in before.keys() | after.keys() if before.get(place) is not after.get(place)}


@pytest.mark.parametrize("name", BY_NAME)
def test_nothing_is_left_behind(name):
    mistake = find(name)
    source_of(mistake)  # imports its module
    before = package()
    with planted(name):
        there = changed(before, package())
        assert there and {place.rpartition(".")[2] for _, place in there} == {mistake.function.rpartition(".")[2]}
    assert not changed(before, package())
    with pytest.raises(RuntimeError), planted(name):
        raise RuntimeError
    assert not changed(before, package())
    right, wrong = source_of(mistake)
    assert right != wrong


def test_it_reaches_every_importer():
    import minivit.gradcheck_cases
    import minivit.layers.block
    import minivit.layers.layernorm as home

    right = home.layernorm_backward
    with planted("layernorm-dropped-mean"):
        broken = home.layernorm_backward
        assert broken is not right
        assert minivit.layers.block.layernorm_backward is broken is minivit.gradcheck_cases.layernorm_backward
    assert minivit.layers.block.layernorm_backward is right
    assert inspect.getsource(right)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="layernorm-dropped-mean"):
        find("nonsense")
