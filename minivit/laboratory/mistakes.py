"""A zoo of mistakes: named bugs, each a few characters, that can be switched on to see what exposes them.

    with planted("layernorm-dropped-mean"):
        ...                                         # the whole package now has this bug

Each is a replacement of words and signs in one function, whatever its layout and comments are. Many were made for
real: those with ``seen`` were found in published NumPy implementations of Vision Transformers (named there by what they
got wrong, not to blame anybody: they passed their authors' tests). The tests assert that each one is caught, and by
which check.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from minivit.base.backend import TWINS, plain
from minivit.base.errors import InputError


class Mistake(NamedTuple):
    """One bug: in ``function`` of ``module``, the text ``right`` is replaced by ``wrong``."""

    name: str
    module: str
    function: str
    right: str
    wrong: str
    about: str  # what is wrong, as the answer to the hunt
    hint: str  # where to look, without saying what
    seen: str = ""  # where such a mistake was published


def _in(module, function):
    """A constructor for the mistakes of one function."""

    def mistake(name, right, wrong, about, hint, seen=""):
        return Mistake(name, f"minivit.{module}", function, right, wrong, about, hint, seen)

    return mistake


_linear = _in("layers.linear", "linear_backward")
_layernorm = _in("layers.layernorm", "layernorm_backward")
_forward_of_layernorm = _in("layers.layernorm", "layernorm_forward")
_layer_scale = _in("options.layer_scale", "layer_scale_backward")
_gelu = _in("layers.gelu", "gelu_backward")
_forward_of_softmax = _in("layers.softmax", "softmax_forward")
_softmax = _in("layers.softmax", "softmax_backward")
_dropout = _in("layers.dropout", "dropout_backward")
_forward_of_attention = _in("layers.attention", "attention_forward")
_attention = _in("layers.attention", "attention_backward")
_forward_of_flash = _in("options.flash_attention", "flash_attention_forward")
_flash = _in("options.flash_attention", "flash_attention_backward")
_forward_of_relative = _in("options.relative_attention", "relative_attention_forward")
_relative = _in("options.relative_attention", "relative_attention_backward")
_msa = _in("layers.msa", "msa_backward")
_mlp = _in("layers.mlp", "mlp_backward")
_block = _in("layers.block", "block_backward")
_patch = _in("layers.patch_embed", "patch_embed_backward")
_unpatchify = _in("layers.patch_embed", "unpatchify")
_registers = _in("options.registers", "registers_backward")
_position = _in("options.position", "position_backward")
_position2d = _in("options.position2d", "position2d_backward")
_axial = _in("options.axial", "from_axis")
_corrupt = _in("masked.corrupt", "corrupt_backward")
_gather = _in("masked.gather", "gather_backward")
_sequence_pool = _in("options.sequence_pool", "sequence_pool_backward")
_head = _in("layers.head", "head_backward")
_padding = _in("options.stem.conv2d", "same_padding")
_conv = _in("options.stem.conv2d", "conv2d_backward")
_standardization = _in("options.stem.weight_standardization", "weight_standardization_backward")
_forward_of_standardization = _in("options.stem.weight_standardization", "weight_standardization_forward")
_group_mean = _in("options.stem.groupnorm", "_group_mean")
_groupnorm = _in("options.stem.groupnorm", "groupnorm_backward")
_relu = _in("options.stem.relu", "relu_backward")
_forward_of_pool = _in("options.stem.max_pool", "max_pool_forward")
_pool = _in("options.stem.max_pool", "max_pool_backward")
_conv_norm = _in("options.stem.resnet", "conv_norm_backward")
_bottleneck = _in("options.stem.resnet", "bottleneck_backward")
_forward_of_loss = _in("layers.loss", "softmax_cross_entropy_forward")
_loss = _in("layers.loss", "softmax_cross_entropy_backward")
_targets = _in("layers.loss", "soft_targets")
_squared_error = _in("layers.loss", "squared_error_backward")
_model = _in("model.vit", "ViT.backward")
_exact_gelu = _in("options.exact_gelu", "exact_gelu_backward")
_dropped_attention = _in("options.attention_dropout", "dropped_attention_backward")
_qk_norm = _in("options.qk_norm", "normed_attention_backward")
_chain = _in("base.pairs", "chain")
_chain_parts = _in("base.pairs", "chain_parts")
_add_gradients = _in("base.pairs", "add_gradients")
_drop_path = _in("layers.drop_path", "drop_path_backward")
_mean = _in("options.pooling", "mean_backward")
_beside = _in("options.pooling", "beside_mean_backward")
_tanh = _in("options.pooling", "tanh_backward")
_stem = _in("options.stem.option", "stem_part")
_axial_block = _in("options.axial", "block")
_gated_mlp = _in("options.gated_mlp", "swiglu_backward")
_first_queries = _in("options.first_tokens", "first_queries_backward")
_first_tokens = _in("options.first_tokens", "first_tokens_backward")


def _twin(function):
    return _in("kernels.cpu", function)


_masked = _in("masked.model", "MaskedViT.backward")
_masked_embed = _in("masked.model", "MaskedViT._embed_backward")
_sgd = _in("optim.sgd", "SGD.update")
_adam = _in("optim.adam", "Adam.update")
_clip = _in("optim.clipping", "clip_by_global_norm")
_schedule = _in("optim.schedules", "learning_rate")
_ema = _in("optim.averages", "EMA.update")
_engine = _in("training.engines.cpu", "Engine.gradient")

MISTAKES = (
    _linear(
        'linear-bias-mean',
        'rows(dy).sum(axis=0)',
        'rows(dy).mean(axis=0)',
        'the bias gradient is a mean over rows instead of a sum',
        'how many rows share the bias?',
    ),
    _linear(
        'linear-bias-axis',
        'db = rows(dy).sum(axis=0)',
        'db = 0 * rows(dy)[0] + rows(dy).sum(axis=1)[0]',
        'the bias gradient is summed over the wrong axis',
        'along which axis was b broadcast?',
    ),
    _linear(
        'linear-bias-first-row',
        'rows(dy).sum(axis=0)',
        'rows(dy)[0].copy()',
        'the bias gradient is that of the first row alone',
        'how many rows share the bias?',
    ),
    _linear(
        'linear-weight-batch-mean',
        'rows(x).T @ rows(dy)',
        'rows(x).T @ rows(dy) / len(dy)',
        'the weight gradient is divided by the batch size a second time: the loss is a mean already',
        'who divides by B?',
        'gradients B times too small behind Adam, which hides constant factors',
    ),
    _linear(
        'linear-weight-last-token',
        'rows(x).T @ rows(dy)',
        'rows(x)[-1:].T @ rows(dy)[-1:]',
        'the weight gradient counts only the last row',
        'which rows does the weight serve?',
    ),
    _linear(
        'linear-input-abs-weight',
        'dy @ W.T',
        'dy @ abs(W).T',
        'the input gradient goes back through |W|',
        'what does dx = dy @ W^T say of signs?',
    ),
    _layernorm(
        'layernorm-dropped-mean',
        '(dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))  #',
        '(dxhat - xhat * mean(dxhat * xhat))  #',
        'the mean term, from x - mean(x), is missing in dx',
        'what does subtracting the mean do on the way back?',
        'one of the commonest LayerNorm backward mistakes',
    ),
    _layernorm(
        'layernorm-dropped-variance',
        '(dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))  #',
        '(dxhat - mean(dxhat))  #',
        'the variance is treated as a constant: its term in dx is missing',
        'does rstd depend on x?',
    ),
    _layernorm(
        'layernorm-variance-sum',
        '(dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))  #',
        '(dxhat - mean(dxhat) - xhat * dy.shape[-1] * mean(dxhat * xhat))  #',
        'the variance term is a sum over D instead of a mean',
        'where does 1/D come from?',
    ),
    _layernorm(
        'layernorm-rstd-squared',
        'rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))  #',
        'rstd * rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))  #',
        'dx is scaled by rstd twice',
        'how often is x divided by its standard deviation?',
    ),
    _layernorm(
        'layernorm-no-weight',
        'dxhat = dy * w  #',
        'dxhat = dy * 1.0  #',
        'dy is not multiplied by w on its way to xhat',
        'y = xhat * w + b: what is dxhat?',
    ),
    _layernorm(
        'layernorm-weight-order',
        'rows(dy * xhat).sum(axis=0)',
        'rows(dy * w * xhat).sum(axis=0)',
        'dw is taken after the product was multiplied by w',
        'does w belong in its own gradient?',
    ),
    _layernorm(
        'layernorm-stale-mean',
        '(dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))  #',
        '(dxhat - mean(dy) - xhat * mean(dxhat * xhat))  #',
        'the mean taken off is that of dy, not of dxhat',
        'which quantity was centred?',
    ),
    _layernorm(
        'layernorm-batch-axis',
        '(dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))  #',
        '(dxhat - mean(dxhat) - xhat * (dxhat * xhat).mean(axis=0, keepdims=True))  #',
        'the variance term is averaged over the batch instead of the features',
        'which axis was normalised?',
        'wrong for inputs of rank three and more, right for none: tests at rank two passed',
    ),
    _forward_of_layernorm(
        'layernorm-unbiased',
        'var = mean(xc * xc)',
        'var = mean(xc * xc) * (x.shape[-1] / (x.shape[-1] - 1))',
        'the forward divides the variance by D - 1, the backward differentiates 1/D',
        'do forward and backward agree on the variance?',
    ),
    _layer_scale(
        "layer-scale-batch-mean", "column_sum(product)", "column_sum(product) / len(dy)",
        "gamma's gradient is divided by the batch size", "how many rows share gamma?",
    ),
    _layer_scale(
        "layer-scale-of-the-scaled", "(dy * x).reshape", "(dy * gamma * x).reshape",
        "gamma's gradient is made of the scaled branch", "y = x * gamma: what multiplies gamma?",
    ),
    _layer_scale(
        "layer-scale-not-undone", "return dy * gamma, dgamma", "return dy * 1.0, dgamma",
        "the gradient passes by gamma on its way to the branch", "who is multiplied by gamma?",
    ),
    _gelu(
        'gelu-other-form',
        'du * C * (1.0 + 3.0 * A * x * x)',
        'dy * x * array_module(x).exp(-0.5 * x * x) / (2.0 * math.pi) ** 0.5',
        "the tanh form's gate is combined with the exact form's density: the derivative of neither",
        'which form is differentiated?',
        'off by some 1e-4 in a well-documented NumPy library, under the tolerance of its tests',
    ),
    _gelu(
        'gelu-cubic-factor',
        '3.0 * A * x * x)\n    return dx',
        'A * x * x)\n    return dx',
        'the factor 3 of d(x^3)/dx is missing',
        'differentiate x^3',
    ),
    _gelu(
        'gelu-sech',
        '(1.0 - t * t)',
        '(0.999 - t * t)',
        '1 - t^2 is rounded to 0.999 - t^2: a constant typed from memory',
        'differentiate tanh',
        'rounded magic decimals copied from code to code',
    ),
    _gelu(
        'gelu-no-product-rule',
        'dt = dy * x / 2.0',
        'dt = dy / 2.0',
        'the factor x of the second term is missing',
        'the product rule has two terms, each with a factor',
    ),
    _exact_gelu(
        'gelu-erf-density',
        'exp(-0.5 * x * x)',
        'exp(-x * x)',
        'the density is exp(-x^2) instead of exp(-x^2/2)',
        'what is the density of the standard normal?',
    ),
    _exact_gelu(
        'gelu-erf-no-density',
        '(phi + x * density)',
        '(phi + 0.0 * density)',
        'the term x * density(x) is missing: Phi is treated as a constant',
        'does Phi(x) depend on x?',
    ),
    _softmax(
        'softmax-no-jacobian',
        'y * (dy - row_sum(dy * y))',
        'y * dy',
        'only the diagonal of the Jacobian is there: the sum over the row is missing',
        'does y_i depend on x_k?',
        'a softmax whose backward expects the caller to pass p - y',
    ),
    _softmax(
        "softmax-sum-axis", "row_sum(dy * y)", "(dy * y).sum(axis=0, keepdims=True)",
        "the row-wise sum runs over the first axis", "over which axis does softmax normalise?",
    ),
    _softmax(
        "softmax-dy-sum", "row_sum(dy * y)", "row_sum(dy)",
        "the sum is not weighted by the probabilities", "derive dx_k with the delta written out",
    ),
    _softmax(
        'softmax-square',
        'y * (dy - row_sum',
        'y * (1 - y) * (dy - row_sum',
        'the derivative of the logistic function stands in for that of softmax',
        'is the Jacobian diagonal?',
    ),
    _forward_of_softmax(
        "softmax-shift-axis", "x.real.max(axis=-1, keepdims=True)", "x.real.max(axis=-2, keepdims=True)",
        "the shift varies along the softmax axis, so the result is not a softmax of x",
        "softmax ignores a shift only if it is the same along the row",
        "two published NumPy ViTs share this line; their test inputs were too small to notice",
    ),
    _dropout(
        "dropout-no-scale", "return dy * mask * scale", "return dy * mask",
        "the backward forgets 1 / (1 - rate)", "is the map still linear?",
    ),
    _dropout(
        "dropout-no-mask", "return dy * mask * scale", "return dy * scale", "the backward lets dropped entries through",
        "which entries reached y?",
    ),
    _dropout(
        "dropout-evaluation", "return dy\n", "return dy * 0.5\n",
        "without a mask, in evaluation, the gradient is scaled anyway", "what is the backward of the identity?",
        "a dropout whose backward masks in evaluation, for want of a return",
    ),
    _forward_of_attention(
        "attention-scale-forward", "q.shape[-1] ** -0.5", "(q.shape[-1] * q.shape[-3]) ** -0.5",
        "scores are divided by sqrt(D) instead of sqrt(Dh)", "per head, how long are q and k?",
        "a published CIFAR ViT",
    ),
    _attention(
        'attention-scale-forgotten',
        'k * q.shape[-1] ** -0.5  # (..., Q, Dh)\n    dk = transpose(dscores) @ q * q.shape[-1] ** -0.5',
        'k\n    dk = transpose(dscores) @ q',
        'dq and dk lack the factor 1 / sqrt(Dh)',
        'scores are scaled: what of their gradient?',
    ),
    _attention(
        'attention-scale-twice',
        'k * q.shape[-1] ** -0.5  # (..., Q, Dh)\n    dk = transpose(dscores) @ q * q.shape[-1] ** -0.5',
        'k / q.shape[-1]\n    dk = transpose(dscores) @ q / q.shape[-1]',
        'dq and dk have the factor 1 / sqrt(Dh) twice',
        'scores are scaled once',
    ),
    _attention(
        'attention-dk-transpose',
        'transpose(dscores) @ q',
        'dscores @ q',
        'dk = dscores @ q: the transpose is missing',
        'which index of dscores counts keys?',
    ),
    _attention(
        'attention-dv-transpose',
        'transpose(attn) @ dy',
        'attn @ dy',
        'dv = attn @ dy: the transpose is missing',
        'which index of attn counts keys?',
    ),
    _attention(
        'attention-dq-dk-swapped',
        'dscores @ k * q',
        'dscores @ q * q',
        'dq is built from q instead of k',
        'scores = q @ k^T: what multiplies dscores?',
    ),
    _attention(
        'attention-no-softmax',
        'softmax_backward(dattn, softmax_cache)',
        'dattn * attn',
        "softmax's backward is replaced by its diagonal",
        'does attn_ij depend on scores_ik?',
    ),
    _dropped_attention(
        'attention-dropout-skipped',
        'dattn = dropout_backward(ddropped, dropout_cache)',
        'dattn = ddropped.copy()',
        'the gradient passes by attention dropout',
        'which entries of attn were dropped?',
    ),
    _dropped_attention(
        'attention-dropout-not-redone',
        'dropout_backward(softmax_cache.y, dropout_cache)',
        'softmax_cache.y',
        'dv is built from the map before dropout',
        'which map multiplied v?',
    ),
    _forward_of_flash(
        "flash-mixture-not-shrunk", "y *= shrink", "pass",
        "where a block raises the maximum, the mixture so far keeps its old shift", "which shift does y have?",
    ),
    _flash(
        "flash-no-row-sum", "dscores -= along", "pass",
        "the row sum of softmax's derivative is missing", "what does one block not know of the others?",
    ),
    _flash(
        "flash-keys-not-scaled", "dscores.swapaxes(-1, -2), q_scaled", "dscores.swapaxes(-1, -2), q",
        "dk is made from q, not from q / sqrt(Dh)", "which factor made the scores?",
    ),
    _forward_of_relative(
        "relative-not-scaled", "scores += by_key(", "scores += q.shape[-1] ** 0.5 * by_key(",
        "the logits of the offsets are not divided by sqrt(Dh)", "they are those of an attention too",
    ),
    _relative(
        "relative-offsets-reversed", "matmul(dP, r[0, N - Q :])", "matmul(dP, r[0, N - Q :][::-1])",
        "the table is read from its other end: the offset p_k - p_q", "which row belongs to the offset 0, which to 1?",
    ),
    _relative(
        "relative-queries-forget-offsets", "dq += matmul(dP, r[0, N - Q :])", "pass",
        "the queries get no gradient through the offsets", "where does q enter?",
    ),
    _relative(
        "relative-table-first-image", "dP.reshape(-1, N + Q - 1).T, q.reshape",
        "dP[:1].reshape(-1, N + Q - 1).T, q[:1].reshape",
        "the table's gradient is that of the first image alone", "who shares the table?",
    ),
    _relative(
        "relative-table-without-heads", "dP.reshape(-1, N + Q - 1).T, q.reshape",
        "dP[:, 0].reshape(-1, N + Q - 1).T, q[:, 0].reshape",
        "the table's gradient is that of the first head alone", "who shares the table?",
    ),
    _msa(
        'msa-heads-not-transposed',
        '(dheads,) = split_heads(dmerged, cache.num_heads, parts=1)',
        'dheads = dmerged.reshape(len(dy), cache.num_heads, dy.shape[1], -1)',
        'heads and tokens are told apart by a reshape where a transpose is needed',
        'in which order do the axes lie?',
    ),
    _msa(
        'msa-key-gradient-dropped',
        'merge_heads(dq, dk, dv)',
        'merge_heads(dq, 0.0 * dk, dv)',
        'the gradient of the keys is dropped',
        'q, k and v all have gradients',
    ),
    _msa(
        'msa-value-gradient-first-head',
        'merge_heads(dq, dk, dv)',
        'merge_heads(dq, dk, dv * (array_module(dv).arange(cache.num_heads) == 0)[:, None, None])',
        "only the first head's values are trained",
        'how many heads are there?',
    ),
    _qk_norm(
        'msa-key-norm-skipped',
        'dk, dwk, dbk = layernorm_backward(dkn, cache.k_norm)',
        'dk, dwk, dbk = dkn, *layernorm_backward(dkn, cache.k_norm)[1:]',
        "with QK-norm, the keys' gradient passes by the LayerNorm",
        'which keys did the query meet?',
    ),
    _qk_norm(
        'msa-query-norm-of-keys',
        'layernorm_backward(dkn, cache.k_norm)',
        'layernorm_backward(dkn, cache.q_norm)',
        "with QK-norm, the keys' gradient goes back through the LayerNorm of the queries",
        'who was normalised by what?',
    ),
    _mlp(
        'mlp-gelu-skipped',
        'dhidden = activation.backward(dactive, cache.activation)',
        'dhidden = dactive * 1.0',
        'the gradient passes by the GELU',
        'count the steps of the forward',
    ),
    _chain(
        'mlp-dropout-skipped',
        'du, *dsecond = gradients(second.backward(dy, cache.second))',
        'du, *dsecond = dy, *gradients(second.backward(dy, cache.second))[1:]',
        'the gradient passes by the dropout between the layers',
        'count the steps of the forward',
    ),
    _mlp(
        "mlp-weights-tied", "return dx, dW1, db1, dW2, db2", "return dx, dW1, db1, dW1.T, db2",
        "the second layer gets the first one's gradient, transposed: the shapes fit", "follow each gradient's name",
    ),
    _block(
        'block-residual-dropped',
        'dz1 = dbranch + dz2',
        'dz1 = dbranch + 0.0 * dz2',
        'the residual path of the MLP half is cut on the way back',
        "z2 = MLP(...) + z1: who else gets dz2?",
    ),
    _block(
        'block-residual-twice',
        'dz = dbranch + dz1',
        'dz = dbranch + dz1 + dz1',
        'the residual path of the attention half is counted twice',
        "how often does z enter z1?",
    ),
    _block(
        'block-attention-residual-dropped',
        'dz = dbranch + dz1',
        'dz = dbranch + 0.0 * dz1',
        'the residual path of the attention half is cut on the way back',
        "z1 = MSA(...) + z: who else gets dz1?",
    ),
    _add_gradients(
        'block-gradient-overwritten',
        'grads[name] += gradient',
        'grads[name][...] = gradient',
        'gradients are written instead of added: of several micro-batches the last one wins',
        'run two micro-batches',
        'weights updated inside the backward pass cannot accumulate either',
    ),
    _block(
        'block-norms-swapped',
        'layernorm_backward(dy1, cache.norm2)',
        'layernorm_backward(dy1, cache.norm1)',
        "the second LayerNorm uses the first one's cache",
        'read the cache fields in reverse',
    ),
    _drop_path(
        'block-path-skipped',
        'return dropout_backward(dy, cache)',
        'return dy * 1.0',
        'stochastic depth is not undone on the attention branch',
        'which images skipped the branch?',
    ),
    _patch(
        'patch-class-token-dropped',
        'dfirst.sum(axis=0, keepdims=True)',
        '0.0 * dfirst[:1]',
        'the class token gets no gradient',
        'is every parameter trained?',
        "a published ViT sliced it away: its 'learnable' class token never learned",
    ),
    _patch(
        'patch-class-token-mean',
        'dfirst.sum(axis=0, keepdims=True)',
        'dfirst.mean(axis=0, keepdims=True)',
        "the class token's gradient is averaged over the batch instead of summed",
        'how many images share it?',
    ),
    _patch(
        "patch-position-first-image", "dpos_embed = dz.sum(axis=0, keepdims=True)", "dpos_embed = dz[:1].copy()",
        "the position embedding's gradient is that of the first image: the sum over the batch is missing",
        "along which axis was E_pos broadcast?", "a table per batch slot after the first step",
    ),
    _patch(
        "patch-position-reversed", "dpos_embed = dz.sum(axis=0, keepdims=True)",
        "dpos_embed = dz[:, ::-1].sum(axis=0, keepdims=True)",
        "the position embedding's gradient runs through the tokens backwards", "does row 0 belong to the class token?",
    ),
    _patch(
        'patch-class-token-kept',
        'dz[:, cache.prefix :]',
        'dz[:, : dz.shape[1] - cache.prefix]',
        'the last token is cut off instead of the class token',
        'where was the class token put?',
    ),
    _unpatchify(
        "patch-not-transposed", ".transpose(0, 1, 3, 2, 4, 5)", "",
        "patches are laid out by a reshape alone: rows and columns are mixed up", "draw four pixels and two patches",
    ),
    _registers(
        "registers-first-rows", "dz[:, at:end].sum(", "dz[:, : cache.count].sum(",
        "the registers get the gradient of the first rows, the class token's among them", "where were they put?",
    ),
    _registers(
        "registers-mean", ".sum(axis=0, keepdims=True)", ".mean(axis=0, keepdims=True)",
        "the registers' gradient is averaged over the batch instead of summed", "how many images share them?",
    ),
    _registers(
        "registers-last-rows", "[dz[:, :at], dz[:, end:]]", "[dz[:, : dz.shape[1] - cache.count]]",
        "the last tokens are cut off instead of the registers", "which rows came from z?",
    ),
    _position(
        "position-last-rows", "[dpos_embed[:, :at], dpos_embed[:, end:]]",
        "[dpos_embed[:, : dpos_embed.shape[1] - cache.registers]]",
        "the last rows are cut off instead of the registers'", "who has no position?",
    ),
    _position(
        "position-mean", "dz.sum(axis=0, keepdims=True)", "dz.mean(axis=0, keepdims=True)",
        "the position's gradient is averaged over the batch instead of summed", "how many images share it?",
    ),
    _position2d(
        "position2d-rows-for-columns", ": D // 2].sum(axis=1)", ": D // 2].sum(axis=2)",
        "the X-embedding's gradient is summed over columns: it is that of rows", "which patches have one x in common?",
    ),
    _position2d(
        "position2d-one-column", "D // 2 :].sum(axis=2)", "D // 2 :][:, :, 0]",
        "the Y-embedding gets the gradient of the first column alone", "which patches have one y in common?",
    ),
    _axial(
        "axial-columns-not-transposed", "grid = grid.swapaxes(1, 2)", "pass",
        "columns go back as if they were rows", "how did they become sequences?",
    ),
    _corrupt(
        "corrupt-not-undone", "return dshown[:, :N]", "return dy",
        "every patch gets the gradient of its own place, whatever was shown there", "where was an embedding shown?",
    ),
    _corrupt(
        "corrupt-mask-first-image", "dshown[:, N:].sum(axis=0, keepdims=True)", "dshown[:1, N:]",
        "the mask gets the gradient of the first image alone", "how many images share it?",
    ),
    _corrupt(
        "corrupt-mask-mean", "dshown[:, N:].sum(", "dshown[:, N:].mean(",
        "the mask's gradient is averaged over the batch instead of summed", "how many images share it?",
    ),
    _gather(
        "gather-first-rows", "dz[xp.arange(B)[:, None], cache.index] = dy", "dz[:, : dy.shape[1]] = dy",
        "the gradients go to the first rows instead of where the tokens came from", "which rows were taken?",
    ),
    _sequence_pool(
        "sequence-pool-weights-constant", "dx += dx_of_scores", "pass",
        "the tokens get no gradient through their weights", "where does x enter?",
    ),
    _sequence_pool(
        "sequence-pool-no-softmax", "softmax_backward(dattn, cache.softmax)", "(attn * dattn)",
        "softmax's backward is replaced by its diagonal", "does a token's weight depend on the others' scores?",
    ),
    _sequence_pool(
        "sequence-pool-mean", "attn.swapaxes(1, 2), dy", "(0 * attn + 1 / attn.shape[2]).swapaxes(1, 2), dy",
        "each token's share of the gradient is 1/N instead of its weight", "y = attn @ x: what is each token's weight?",
    ),
    _mean(
        'head-mean-factor',
        'dy[:, None] / cache.shape[1]',
        'dy[:, None]',
        'the factor 1/N of mean pooling is missing',
        "y = mean: what is each token's weight?",
    ),
    _beside(
        'head-beside-mean-factor',
        ' / dx[:, cache.rows].shape[1]',
        '',
        'the factor 1/n of the mean beside the class token is missing',
        "y = [x_0; mean x]: what is each token's weight?",
    ),
    _head(
        'head-class-token-everywhere',
        'dz[:, 0] = dfirst',
        'dz[...] = dfirst[:, None]',
        "every token gets the class token's gradient",
        'which token was read?',
    ),
    _tanh(
        'head-tanh-derivative',
        '(1.0 - cache.y * cache.y)',
        '(1.0 - cache.y)',
        'the derivative of tanh is 1 - t instead of 1 - t^2',
        'differentiate tanh',
    ),
    _tanh(
        'head-tanh-skipped',
        'dy * (1.0 - cache.y * cache.y)',
        'dy * 1.0',
        'the gradient passes by the tanh',
        'count the steps of the forward',
    ),
    _padding(
        "conv-padding-before", "return total // 2, total - total // 2", "return total - total // 2, total // 2",
        "an odd row of zeros is put before the map instead of after it", "which pixels does the first window see?",
    ),
    _conv(
        "conv-windows-overwrite", "met += ", "met[...] = ",
        "a pixel keeps the gradient of the last window that sees it", "how many windows see a pixel?",
    ),
    _conv(
        "conv-kernel-flipped", "dcolumns[:, :, :, i, j]", "dcolumns[:, :, :, -1 - i, -1 - j]",
        "the gradient goes back through the kernel turned by 180 degrees", "which weight met which pixel?",
    ),
    _standardization(
        "standardization-dropped-mean", "(dwhat - _mean(dwhat)) / (std + eps)", "dwhat / (std + eps)",
        "the mean term, from w - mean(w), is missing in dw", "what does subtracting the mean do on the way back?",
    ),
    _standardization(
        "standardization-deviation-constant", "dw -= what * (_mean(dwhat * what) / (std + (std == 0)))", "pass",
        "the standard deviation is treated as a constant", "does std depend on w?",
    ),
    _forward_of_standardization(
        "standardization-eps-in-variance", "std = _mean(wc * wc) ** 0.5", "std = (_mean(wc * wc) + eps) ** 0.5 - eps",
        "eps is added to the variance instead of the standard deviation", "what becomes of tiny kernels?",
    ),
    _group_mean(
        "groupnorm-strided-groups",
        "means.reshape(B, groups, C // groups).mean(axis=2, keepdims=True)  # (B, G, 1)\n"
        "    return xp.broadcast_to(means, (B, groups, C // groups))",
        "means.reshape(B, C // groups, groups).mean(axis=1, keepdims=True)\n"
        "    return xp.broadcast_to(means, (B, C // groups, groups))",
        "every third channel, say, is a group, instead of neighbours", "which channels belong together?",
    ),
    _groupnorm(
        "groupnorm-channels-alone", "_group_mean(product, groups)", "_group_mean(product, C)",
        "the variance term is averaged over each channel alone", "over what was the variance taken?",
    ),
    _groupnorm(
        "groupnorm-no-weight", "dxhat = dy * w  #", "dxhat = dy * 1.0  #",
        "dy is not multiplied by w on its way to xhat", "y = xhat * w + b: what is dxhat?",
    ),
    _relu(
        "relu-of-the-gradient", "(cache.y.real > 0)", "(dy.real > 0)",
        "the gradient is cut off where it is negative, not where the input was", "whose sign tells the slope?",
    ),
    _forward_of_pool(
        "max-pool-zero-border", 'float("-inf")', "0.0",
        "the border is of zeros, which are larger than a window of negative numbers", "pool a map of -1",
    ),
    _forward_of_pool(
        "max-pool-last-tie", "larger = met.real > y.real", "larger = met.real >= y.real",
        "of equal numbers the last one gets the gradient", "what does the official code do with a window of zeros?",
    ),
    _pool(
        "max-pool-windows-overwrite", "met += ", "met[...] = ",
        "a pixel that wins several windows keeps the gradient of the last", "may a pixel win twice?",
    ),
    _pool(
        "max-pool-shared-out", "dy * (cache.winner == t)", "dy / 9 + 0 * (cache.winner == t)",
        "the gradient is shared out over the window, as if the pooling were a mean", "who moves the maximum?",
    ),
    _conv_norm(
        "conv-kernel-not-standardised", "dkernel = weight_standardization_backward(dkernel, cache.standardization)",
        "pass", "the gradient is that of the standardised kernel", "which kernel is learned?",
    ),
    _bottleneck(
        "bottleneck-shortcut-dropped", "return dx + dshortcut", "return dx",
        "the gradient of the shortcut is lost", "a sum hands its gradient to both terms",
    ),
    _bottleneck(
        "bottleneck-shortcut-past-relu", "dshortcut = ds\n", "dshortcut = dy\n",
        "the shortcut's gradient passes by the last ReLU", "what comes after the sum?",
    ),
    _bottleneck(
        "bottleneck-relu-skipped", "dx = relu_backward(dx, cache.relu1)", "pass",
        "the gradient passes by the first ReLU", "count the three of them",
    ),
    _loss(
        "loss-mean-twice", "(dloss / denominator)", "(dloss / denominator / len(targets))",
        "the gradient is divided by the batch size twice", "who divides by B?",
    ),
    _loss(
        "loss-sum-not-mean", "(dloss / denominator)", "dloss",
        "the forward is a mean, the backward that of a sum", "what does the forward return?",
        "three published NumPy losses disagree with their own gradient in this way",
    ),
    _loss(
        "loss-upstream-ignored", "(dloss / denominator)", "(1.0 / denominator)",
        "dloss is ignored", "what if the loss is scaled?",
    ),
    _loss(
        "loss-sign", "weights * probabilities - targets", "targets - weights * probabilities",
        "the sign is reversed: training climbs", "which way is downhill?",
    ),
    _forward_of_loss(
        "loss-no-shift", "logits - logits.real.max(axis=1, keepdims=True)", "logits * 1.0",
        "the maximum is not subtracted: exp overflows for large logits", "try logits of 1000",
        "NaN at logit 1000 in a published loss",
    ),
    _targets(
        "loss-smoothing-wrong-share", "label_smoothing / num_classes", "label_smoothing / (num_classes - 1)",
        "the smoothed targets of a row do not sum to one", "add up a row of targets",
    ),
    _squared_error(
        "squared-error-half", "2.0 * dloss", "dloss",
        "the derivative of a square without its factor 2", "differentiate d^2",
    ),
    _chain_parts(
        'model-embedding-dropout-skipped',
        'du = second.backward(dy, cache.second, grads)',
        'second.backward(dy, cache.second, grads)\n        du = dy',
        'the gradient passes by the dropout of the embedding',
        'count the five dropout sites',
    ),
    _patch(
        'model-position-not-trained',
        'dcls_token, dpos_embed\n',
        'dcls_token, 0.0 * dpos_embed\n',
        'the position embedding is in no update',
        'is every parameter trained?',
        'a published CuPy ViT leaves it out, with a note to figure this out later',
    ),
    _registers(
        'model-registers-not-trained',
        'return dz, dreg_token',
        'return dz, 0.0 * dreg_token',
        'the registers are in no update',
        'is every parameter trained?',
    ),
    _stem(
        'model-stem-not-trained',
        'cache.resnet, _own(grads)',
        'cache.resnet, {name: 0.0 * g for name, g in _own(grads).items()}',
        'the stem is in no update',
        'is every parameter trained?',
    ),
    _position(
        'model-positions-of-blocks-not-trained',
        'return dz, dpos_embed',
        'return dz, 0.0 * dpos_embed',
        'the positions that are added before blocks are in no update',
        'is every parameter trained?',
    ),
    _axial_block(
        'model-axial-columns-go-back-as-rows',
        'return from_axis(dy, g, columns=columns)',
        'return from_axis(dy, g, columns=False)',
        'the gradient of a block of columns is put back row by row',
        'which way did its input come?',
    ),
    _model(
        "model-first-block-skipped", "for i in reversed(range(self.config.depth)):",
        "for i in reversed(range(1, self.config.depth)):",
        "the first block is left out of the backward pass", "count the blocks",
    ),
    _masked(
        "masked-one-place", "dmasks.sum(axis=1, keepdims=True)", "dmasks[:, :1]",
        "the decoder's mask token gets the gradient of the first masked patch alone", "how often is it there?",
    ),
    _masked_embed(
        "masked-position-mean", "dz.sum(axis=0, keepdims=True)", "dz.mean(axis=0, keepdims=True)",
        "the position embedding's gradient is averaged over the batch instead of summed", "how many images share it?",
    ),
    _sgd(
        "sgd-momentum-forgets", "m *= self.momentum", "m *= 0.0", "momentum keeps nothing of the past steps",
        "take two steps by hand",
    ),
    _sgd(
        "sgd-decays-everything", "self.decay_mask[piece] * theta", "theta",
        "weight decay falls on biases and norms too", "which entries does the mask spare?",
    ),
    _adam(
        "adam-frozen-step", "1.0 - beta1**self.steps", "1.0 - beta1**1",
        "the bias correction stays that of the first step", "what is t at the second step?",
        "a published optimiser whose step count never advances",
    ),
    _adam(
        "adam-second-moment-beta", "(1.0 - beta2) * (g * g)", "(1.0 - beta1) * (g * g)",
        "the second moment uses beta1", "read the two moments' formulas side by side",
        "a published NumPy transformer",
    ),
    _adam(
        "adam-eps-inside", "denominator /= correction2\n        denominator += self.eps",
        "denominator += self.eps\n        denominator /= correction2",
        "eps is added before the bias correction", "sqrt(v / c) + eps, or (sqrt(v) + eps) / sqrt(c)?",
    ),
    _adam(
        "adam-no-square", "(g * g)", "abs(g)", "the second moment averages |g| instead of g^2", "what is v's unit?",
    ),
    _adam(
        "adam-decay-with-gradient", "theta -= rate * self.weight_decay * decay", "g = g + self.weight_decay * decay",
        "AdamW adds the decay to the gradient: it is plain Adam with L2", "what does decoupled mean?",
    ),
    _clip(
        "clip-always", "xp.minimum(1.0, max_norm / (norm + 1e-12))", "(max_norm / (norm + 1e-12))",
        "short gradients are stretched to the limit too", "what if the gradient is short?",
    ),
    _clip(
        "clip-squared-norm", "xp.sqrt(grad @ grad)", "grad @ grad", "the square of the norm is compared with the limit",
        "what is the unit of max_norm?",
    ),
    _schedule(
        "schedule-no-warmup-offset", "(step - warmup_steps) / max(total_steps - warmup_steps, 1)",
        "step / max(total_steps, 1)", "the cosine starts at step 0 instead of the end of the warm-up",
        "what is the rate at the end of the warm-up?",
    ),
    _ema(
        "ema-swapped", "(1.0 - d) * (flat[piece] - average)", "d * (flat[piece] - average)",
        "old and new are weighted the wrong way round", "how fast does an average of decay 0.999 move?",
    ),
    _engine(
        "engine-workers-not-summed", "self.grad += flat", "pass",
        "the gradients of all workers but the first are lost", "compare one worker with two",
    ),
    _engine(
        "engine-gradient-not-cleared", "flat[...] = 0.0", "pass",
        "the gradient of the last step is still in the buffer", "run the same step twice",
    ),
    _engine(
        "engine-micro-batch-mean", "grads, denominator, self.generator", "grads, None, self.generator",
        "each micro-batch divides by its own size, and the parts are summed", "compare one micro-batch with two",
    ),
    _gated_mlp(
        "gated-mlp-sigmoid-constant", "(s + gate * s * (1.0 - s))", "s",
        "the sigmoid of the gate is treated as a constant", "how often does the gate stand in gate * s(gate)?",
    ),
    _first_queries(
        "first-queries-last", "dq[..., :Q, :] = dfirst", "dq[..., -Q:, :] = dfirst",
        "the gradients of the first queries are given to the last ones", "which tokens had a query?",
    ),
    _first_tokens(
        "first-tokens-residual-last", "dz[:, : dz1.shape[1]] += dz1", "dz[:, -dz1.shape[1] :] += dz1",
        "the residual path of a block that is read by its first tokens goes back to the last ones",
        "which tokens were added to the branch?",
    ),
    _twin("linear_backward")(
        "twin-linear-bias-first-row", "db = column_sum(dy_rows)", "db = dy_rows[0].copy()",
        "the twin's bias gradient is that of the first row alone", "how many rows share the bias?",
    ),
    _twin("layernorm_backward")(
        "twin-layernorm-dropped-mean", "dx -= mean_dxhat[:, None]", "pass",
        "the twin forgets the mean term in dx", "compare the twin with the last line of the derivation",
    ),
    _twin("layernorm_backward")(
        "twin-layernorm-dropped-variance", "dx -= product", "pass",
        "the twin treats the variance as a constant", "compare the twin with the last line of the derivation",
    ),
    _twin("gelu_backward")(
        "twin-gelu-gate-constant", "dx *= 1.0 - s", "dx *= 0.0",
        "the twin treats the gate as a constant", "x counts twice in x * s(x)",
    ),
    _twin("gelu_backward")(
        "twin-gelu-cubic-factor", "6.0 * C * A", "2.0 * C * A",
        "the factor 3 of the cube's derivative is missing in the twin", "differentiate x^3",
    ),
    _twin("softmax_backward")(
        "twin-softmax-no-row-sum", "dx = dy - row_sum(dy * y)", "dx = dy * 1.0",
        "the twin's softmax forgets the sum over the row", "each row of dx must sum to 0",
    ),
    _twin("attention_backward")(
        "twin-attention-scale-forgotten", "dscores *= q.shape[-1] ** -0.5", "pass",
        "the twin's dq and dk lack the factor 1 / sqrt(Dh)", "what was the product of q and k divided by?",
    ),
    _twin("msa_backward")(
        "twin-msa-unread-queries", "dq[:, :, Q:] = 0.0", "dq[:, :, Q:] = 1.0",
        "queries that were not asked get a gradient from memory that nobody wrote", "who reads these queries?",
    ),
    _twin("block_backward")(
        "twin-block-residual-dropped", "dz1 += dz2", "pass",
        "the twin's block cuts the residual path of its MLP half", "a sum hands its gradient to both terms",
    ),
    _twin("patch_embed_backward")(
        "twin-patch-class-token-of-a-patch", "dpos_embed[:, : cache.prefix]",
        "dpos_embed[:, cache.prefix : 2 * cache.prefix]",
        "the twin gives the class token the gradient of the first patch", "which row is the class token?",
    ),
)  # fmt: skip

BY_NAME = {mistake.name: mistake for mistake in MISTAKES}


def find(name):
    """The mistake of that name.

    Raises  InputError: there is none; the message lists them.
    """
    if name not in BY_NAME:
        raise InputError(f"no mistake is called {name!r}; known: {', '.join(BY_NAME)}")
    return BY_NAME[name]


def _owner(mistake):
    """(object that holds the function, the function, its name there): a module, or a class for a method."""
    holder = importlib.import_module(mistake.module)
    *classes, name = mistake.function.split(".")
    for part in classes:
        holder = getattr(holder, part)
    return holder, getattr(holder, name), name


def body_of(mistake):
    """The function that holds the mistake's code, without decorators."""
    return inspect.unwrap(_owner(mistake)[1])


TOKEN = re.compile(
    r'"{3}[\s\S]*?"{3}|#[^\n]*|"[^"\n]*"'
    r"|'[^'\n]*'|[A-Za-z_]\w*|\d[\w.]*|\*\*|//|\.\.\.|[-+*/@%<>=!]=|\n|\S"
)


def tokens(code):
    """The words and signs of Python code as (text, start, end): layout and comments are left out.

    The end of a statement is a "\\n"; a line break within brackets is layout.
    """
    found, depth = [], 0
    for match in TOKEN.finditer(code):
        text = match[0]
        depth += (text in "([{") - (text in ")]}")
        blank = not found or found[-1][0] == "\n"
        if text.startswith("#") or (text == "\n" and (depth > 0 or blank)):
            continue
        found.append((text, match.start(), match.end()))
    return found


def source_of(mistake):
    """The source of the mistake's function: (right, wrong), as texts.

    What is replaced is found by its words and signs: comments and layout may have changed.
    Raises  InputError: it does not stand there exactly once; the function has been edited.
    """
    source = textwrap.dedent(inspect.getsource(body_of(mistake)))
    there, wanted = tokens(source), [text for text, _, _ in tokens(mistake.right)]
    places = [k for k in range(len(there)) if [text for text, _, _ in there[k : k + len(wanted)]] == wanted]
    if len(places) != 1:
        raise InputError(
            f"{mistake.name} cannot be planted: {' '.join(mistake.right.split())!r} stands {len(places)} times in "
            f"{mistake.module}.{mistake.function}, which has been edited"
        )
    start, end = there[places[0]][1], there[places[0] + len(wanted) - 1][2]
    line = source[source.rfind("\n", 0, start) + 1 :]
    indent = line[: len(line) - len(line.lstrip())]
    wrong = re.sub(r"\n[ ]*(?=\S)", "\n" + indent, mistake.wrong)
    return source, source[:start] + wrong + source[end:]


@contextmanager
def planted(name):
    """While active, the mistake is in the package: the function's own code is exchanged, whoever holds the function.

    It changes the package for every thread of the process; not for production. Plain bodies run (`backend.plain`),
    since a twin would hide the mistake, unless it is a twin's.
    Raises  InputError: unknown name.
    """
    mistake = find(name)
    _, function, attribute = _owner(mistake)
    _, wrong = source_of(mistake)
    local = {}
    exec(compile(wrong, f"<{mistake.name}>", "exec"), sys.modules[mistake.module].__dict__, local)
    body, broken = inspect.unwrap(function), inspect.unwrap(local[attribute])
    right = body.__code__
    body.__code__ = broken.__code__
    try:
        with nullcontext() if mistake.module == TWINS["numpy"] else plain():
            yield mistake
    finally:
        body.__code__ = right
