"""The zoo: every mistake is caught, by what it should be caught by, and leaves nothing behind."""

import fnmatch
import inspect
import sys
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import minivit
from minivit import InputError, ViT, ViTConfig
from minivit.laboratory import gradcheck
from minivit.laboratory.cases import LAYERS, MODEL_BATCH, MODELS
from minivit.laboratory.facts import FACTS, TOLERANCE
from minivit.laboratory.hunt import hidden_at, level_of
from minivit.laboratory.mistakes import BY_NAME, MISTAKES, find, planted, source_of
from minivit.layers.attention import attention_backward

# What exposes each mistake. "case: gradients" means that in this case of `minivit.laboratory.cases` exactly these
# gradients are wrong and all others are right; "fact: name", that this fact does not hold.
EXPOSED_BY = {
    "linear: db": "linear-bias-mean linear-bias-axis linear-bias-first-row",
    "linear: dW": "linear-weight-batch-mean linear-weight-last-token",
    "linear: dx": "linear-input-abs-weight",
    "layernorm: dx": """
        layernorm-dropped-mean layernorm-dropped-variance layernorm-variance-sum layernorm-rstd-squared
        layernorm-no-weight layernorm-stale-mean layernorm-batch-axis""",
    "layernorm: dw": "layernorm-weight-order",
    "layer_scale: dgamma": "layer-scale-batch-mean layer-scale-of-the-scaled",
    "layer_scale: dx": "layer-scale-not-undone",
    "gelu: dx": "gelu-other-form gelu-cubic-factor gelu-sech gelu-no-product-rule",
    "gated_mlp: dhidden": "gated-mlp-sigmoid-constant",
    "gelu-erf: dx": "gelu-erf-density gelu-erf-no-density",
    "softmax: dx": "softmax-no-jacobian softmax-sum-axis softmax-dy-sum softmax-square",
    "dropout: dx": "dropout-no-scale dropout-no-mask",
    "dropout-off: dx": "dropout-evaluation",
    "attention: dq dk": "attention-scale-forgotten attention-scale-twice attention-no-softmax",
    "attention: dq": "attention-dq-dk-swapped",
    "attention: dk": "attention-dk-transpose",
    "attention: dv": "attention-dv-transpose",
    "attention-dropout: dq dk": "attention-dropout-skipped",
    "flash_attention: dq dk": "flash-no-row-sum",
    "flash_attention: dk": "flash-keys-not-scaled",
    "attention-dropout: dv": "attention-dropout-not-redone",
    "relative_attention: dq": "relative-offsets-reversed relative-queries-forget-offsets",
    "relative_attention: dr": "relative-table-first-image relative-table-without-heads",
    "msa: dx dWqkv dbqkv": "msa-heads-not-transposed msa-value-gradient-first-head",
    "msa: dx dWqkv": "msa-key-gradient-dropped",  # the keys' bias has none
    "msa-qk_norm: dx dWqkv dbqkv": "msa-key-norm-skipped",
    "msa-qk_norm: dx dWqkv dbqkv dwk": "msa-query-norm-of-keys",
    "mlp: dx dW1 db1": "mlp-gelu-skipped",
    "mlp-dropout: dx dW1 db1": "mlp-dropout-skipped",
    "mlp: dW2": "mlp-weights-tied",
    "block: dz": "block-residual-twice block-attention-residual-dropped",
    "block: dz dnorm1.* dattn.*": "block-residual-dropped",
    "block: dz dnorm1.* dattn.* dnorm2.weight": "block-norms-swapped",
    "drop_path: dx": "block-path-skipped",
    "patch_embed: dcls_token": "patch-class-token-dropped patch-class-token-mean",
    "patch_embed: dpos_embed": "patch-position-first-image patch-position-reversed",
    "patch_embed: dimages dW db": "patch-class-token-kept",
    "patch_embed: dimages": "patch-not-transposed",
    "registers: dreg_token": "registers-first-rows registers-mean",
    "registers: dz": "registers-last-rows",
    "position-registers: dpos_embed": "position-last-rows position-mean",
    "position2d: dX": "position2d-rows-for-columns",
    "position2d: dY": "position2d-one-column",
    "axial-columns: dz": "axial-columns-not-transposed",
    "vit-every: dblocks.?.pos_embed": "model-positions-of-blocks-not-trained",
    "vit-axial: dimages dpos_embed dpatch_embed.* dblocks.0.[an]* dblocks.0.mlp.fc1.* dblocks.0.mlp.fc2.weight": (
        "model-axial-columns-go-back-as-rows"  # a sum over all tokens does not mind their order
    ),
    "vit-registers: dreg_token": "model-registers-not-trained",
    "corrupt: de": "corrupt-not-undone",
    "corrupt: dmask_token": "corrupt-mask-first-image corrupt-mask-mean",
    "gather: dz": "gather-first-rows",
    "squared_error: dy": "squared-error-half",
    "masked-mae: dmask_token": "masked-one-place",
    "masked-mpp: dpos_embed": "masked-position-mean",
    "sequence_pool: dx": "sequence-pool-weights-constant sequence-pool-mean",
    "sequence_pool: dx dW db": "sequence-pool-no-softmax",
    "head: dz": "head-class-token-everywhere",
    "head-mean: dz dnorm.*": "head-mean-factor",
    "head-cls+mean: dz dnorm.*": "head-beside-mean-factor",
    "head-pre_logits: dz dnorm.* dpre_logits.*": "head-tanh-derivative head-tanh-skipped",
    "conv2d: dx": "conv-windows-overwrite conv-kernel-flipped",
    "weight_standardization: dw": "standardization-dropped-mean standardization-deviation-constant",
    "groupnorm: dx": "groupnorm-channels-alone groupnorm-no-weight",
    "relu: dx": "relu-of-the-gradient",
    "max_pool: dx": "max-pool-windows-overwrite max-pool-shared-out",
    "bottleneck: dconv?.weight": "conv-kernel-not-standardised",
    "bottleneck: dz": "bottleneck-shortcut-dropped bottleneck-shortcut-past-relu",
    "bottleneck: dz dconv1.* dnorm1.*": "bottleneck-relu-skipped",
    "vit-stem: dpatch_embed.backbone.*": "model-stem-not-trained",
    "fact: convolution_and_pooling_are_their_definitions": "conv-padding-before max-pool-zero-border",
    "fact: of_equal_numbers_the_first_is_pooled": "max-pool-last-tie",
    "fact: groupnorm_is_layernorm_of_each_group_of_neighbours": "groupnorm-strided-groups",
    "fact: kernels_are_standardised": "standardization-eps-in-variance",
    "loss: dlogits": "loss-mean-twice loss-sum-not-mean loss-upstream-ignored loss-sign",
    "vit: dpos_embed": "model-position-not-trained",
    "vit: dimages dcls_token dpos_embed dpatch_embed.* dblocks.0.*": "model-first-block-skipped",
    "vit-dropout: dimages dcls_token dpatch_embed.*": "model-embedding-dropout-skipped",
    "fact: softmax_is_normalised_exponentials": "softmax-shift-axis",
    "fact: layernorm_rows_have_mean_0_and_variance_1": "layernorm-unbiased",
    "fact: attention_is_equations_6_and_7": "attention-scale-forward",
    "fact: flash_attention_is_attention": "flash-mixture-not-shrunk",
    "fact: relative_attention_is_its_definition": "relative-not-scaled",
    "fact: large_logits_are_no_trouble": "loss-no-shift",
    "fact: targets_are_probabilities": "loss-smoothing-wrong-share",
    "fact: sgd_by_scalars": "sgd-momentum-forgets sgd-decays-everything",
    "fact: adam_by_scalars": "adam-frozen-step adam-second-moment-beta adam-eps-inside adam-no-square",
    "fact: adamw_by_scalars": "adam-decay-with-gradient",
    "fact: clipping_limits_the_norm_and_nothing_else": "clip-always clip-squared-norm",
    "fact: the_schedule_peaks_after_the_warm_up": "schedule-no-warmup-offset",
    "fact: the_average_by_its_formula": "ema-swapped",
    "fact: micro_batches_add_up_to_the_batch": """
        block-gradient-overwritten engine-workers-not-summed engine-gradient-not-cleared engine-micro-batch-mean""",
}
TWINS_EXPOSED_BY = {
    "attention-first: dq": "first-queries-last",
    "block-first: dz": "first-tokens-residual-last",
    "linear-twin: db": "twin-linear-bias-first-row",
    "layernorm-twin: dx": "twin-layernorm-dropped-mean twin-layernorm-dropped-variance",
    "gelu-twin: dx": "twin-gelu-gate-constant twin-gelu-cubic-factor",
    "softmax-twin: dx": "twin-softmax-no-row-sum",
    "attention-twin: dq dk": "twin-attention-scale-forgotten",
    "msa-first-twin: dx dWqkv dbqkv": "twin-msa-unread-queries",
    "block-twin: dz dnorm1.* dattn.*": "twin-block-residual-dropped",
    "patch_embed-bytes-twin: dcls_token": "twin-patch-class-token-of-a-patch",
}
EXPOSED_BY |= TWINS_EXPOSED_BY
EXPOSED = [(name, by) for by, names in EXPOSED_BY.items() for name in names.split()]


def layer(case):
    return LAYERS[case](np.random.default_rng(0))


def checked(case):
    """The results of a case: a layer's, or a model's."""
    if case in LAYERS:
        forward, backward, args, names = layer(case)
        return gradcheck.check(forward, backward, args, names=names, method="complex")
    config = ViTConfig(**MODELS[case])
    rng = np.random.default_rng(0)
    flat = ViT(config, dtype=np.float64).flat
    flat += 0.3 * rng.standard_normal(flat.shape)
    images = rng.standard_normal((MODEL_BATCH, config.image_size, config.image_size, config.channels))
    labels = rng.integers(0, config.num_classes, MODEL_BATCH)
    return gradcheck.check_model(lambda flat: ViT(config, flat=flat), images, labels, flat, method="complex")


def test_there_are_enough_over_every_room():
    """Every file of the book and of the options that has a backward has mistakes, and so have the twins."""
    assert len(MISTAKES) == len(BY_NAME) >= 60
    rooms = {m.module.rpartition(".")[2] for m in MISTAKES}
    package = Path(minivit.__file__).parent
    files = [*(package / "layers").glob("*.py"), *(package / "options").rglob("*.py")]
    rooms_with_backward = {path.stem for path in files if "_backward(" in path.read_text(encoding="utf-8")}
    rooms_with_backward -= {"dropping"}  # which composes those of the layers
    assert not rooms_with_backward - rooms
    assert rooms > {"cpu", "pairs", "model", "corrupt", "gather", "sgd", "adam", "clipping", "schedules", "averages"}
    assert sum(bool(m.seen) for m in MISTAKES) >= 15
    assert all(m.about and m.hint for m in MISTAKES)
    assert sorted(name for name, _ in EXPOSED) == sorted(BY_NAME)  # each once


@pytest.mark.parametrize(("name", "by"), EXPOSED)
def test_it_is_exposed_by(name, by):
    case, _, what = by.partition(": ")
    with planted(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case == "fact":
            assert not FACTS[what]() <= TOLERANCE
            return
        results = checked(case)
        gradients = [f"d{result.argument}" for result in results]
        expected = [fnmatch.filter(gradients, pattern) for pattern in what.split()]
        assert all(expected)
        assert {f"d{r.argument}" for r in results if not r.passed} == set(chain.from_iterable(expected))


@pytest.mark.parametrize("name", BY_NAME)
def test_nothing_is_left_behind(name):
    mistake = find(name)
    right, wrong = source_of(mistake)  # imports its module
    assert right != wrong
    holder = sys.modules[mistake.module]
    *outer, last = mistake.function.split(".")
    for part in outer:
        holder = getattr(holder, part)
    body = inspect.unwrap(getattr(holder, last))
    before = body.__code__
    with planted(name):
        assert body.__code__ is not before and body.__code__.co_filename == f"<{name}>"
        assert inspect.unwrap(getattr(holder, last)) is body  # whoever holds it has the mistake
    assert body.__code__ is before
    with pytest.raises(RuntimeError), planted(name):
        raise RuntimeError
    assert body.__code__ is before


@pytest.mark.parametrize(("name", "by"), EXPOSED)
def test_level_3_is_what_no_gradient_check_sees(name, by):
    assert (level_of(find(name)) == 3) == by.startswith("fact: ")


def edited(monkeypatch, function, change):
    """The source of a function as if it had been edited."""
    source = change(inspect.getsource(function))
    real = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda each: source if each is function else real(each))


def test_a_mistake_survives_comments_line_breaks_and_blanks(monkeypatch):
    body = inspect.unwrap(attention_backward)
    line, broken = "dq = dscores @ k * q.shape[-1] ** -0.5", "dq = (  # mine\n    dscores @ k\n    *q.shape[-1]**-0.5)"
    edited(monkeypatch, body, lambda source: source.replace(line, broken).replace("    # scores = q @ k^T", "\n    # "))
    right, wrong = source_of(find("attention-dq-dk-swapped"))
    assert "# mine" in right and right != wrong
    compile(wrong, "edited", "exec")


def test_a_function_that_was_changed_too_much_hides_nothing(monkeypatch):
    body = inspect.unwrap(attention_backward)
    edited(monkeypatch, body, lambda source: source.replace("dscores", "dlogits"))
    with pytest.raises(InputError, match=r"attention-scale-twice cannot be planted: .* 0 times in .*has been edited"):
        source_of(find("attention-scale-twice"))
    names = [m.name for m in hidden_at(1)]
    assert "attention-scale-twice" not in names and "attention-dv-transpose" in names
