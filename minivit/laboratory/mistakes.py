"""A zoo of mistakes: named bugs, each a few characters, that can be switched on to see what exposes them.

    with planted("layernorm-dropped-mean"):
        ...                                         # the whole package now has this bug

Each is a replacement of text in one function, shown as it stands in the source. Many were made for real: those with
``seen`` were found in published NumPy implementations of Vision Transformers (named there by what they got wrong, not
to blame anybody: they passed their authors' tests). The tests assert that each one is caught, and by which check.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from contextlib import contextmanager
from typing import NamedTuple

from minivit.base.backend import plain
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
_model_positions = _in("model.vit", "ViT._position_backward")
_masked = _in("masked.model", "MaskedViT.backward")
_sgd = _in("optim.sgd", "SGD.update")
_adam = _in("optim.adam", "Adam.update")
_clip = _in("optim.clipping", "clip_by_global_norm")
_schedule = _in("optim.schedules", "learning_rate")
_ema = _in("optim.averages", "EMA.update")
_engine = _in("training.engines.cpu", "Engine.gradient")

MISTAKES = (
    _linear(
        "linear-bias-mean", "column_sum(dy_rows)", "dy_rows.mean(axis=0)",
        "the bias gradient is a mean over rows instead of a sum", "how many rows share the bias?",
    ),
    _linear(
        "linear-bias-axis", "db = column_sum(dy_rows)", "db = 0 * dy_rows[0] + dy_rows.sum(axis=1)[0]",
        "the bias gradient is summed over the wrong axis", "along which axis was b broadcast?",
    ),
    _linear(
        "linear-bias-first-row", "column_sum(dy_rows)", "dy_rows[0].copy()",
        "the bias gradient is that of the first row alone", "how many rows share the bias?",
    ),
    _linear(
        "linear-weight-batch-mean", ".T, dy_rows)", ".T, dy_rows) / len(dy)",
        "the weight gradient is divided by the batch size a second time: the loss is a mean already",
        "who divides by B?", "gradients B times too small behind Adam, which hides constant factors",
    ),
    _linear(
        "linear-weight-last-token", "x.reshape(-1, x.shape[-1]).T, dy_rows",
        "x.reshape(-1, x.shape[-1])[-1:].T, dy_rows[-1:]",
        "the weight gradient counts only the last row", "which rows does the weight serve?",
    ),
    _linear(
        "linear-input-abs-weight", "matmul_rows(dy, W.T)", "matmul_rows(dy, abs(W).T)",
        "the input gradient goes back through |W|", "what does dx = dy W^T say of signs?",
    ),
    _layernorm(
        "layernorm-dropped-mean", "dx -= row_mean(dxhat)", "pass",
        "the mean term, from x - mean(x), is missing in dx", "what does subtracting the mean do on the way back?",
        "one of the commonest LayerNorm backward mistakes",
    ),
    _layernorm(
        "layernorm-dropped-variance", "dx -= xhat * row_mean(product)", "pass",
        "the variance is treated as a constant: its term in dx is missing", "does rstd depend on x?",
    ),
    _layernorm(
        "layernorm-variance-sum", "xhat * row_mean(product)", "xhat * D * row_mean(product)",
        "the variance term is a sum over D instead of a mean", "where does 1/D come from?",
    ),
    _layernorm(
        "layernorm-rstd-squared", "dx *= rstd", "dx *= rstd * rstd",
        "dx is scaled by rstd twice", "how often is x divided by its standard deviation?",
    ),
    _layernorm(
        "layernorm-no-weight", "dxhat = dy * w", "dxhat = dy * 1.0",
        "dy is not multiplied by w on its way to xhat", "y = xhat w + b: what is dxhat?",
    ),
    _layernorm(
        "layernorm-weight-order", "ones @ product.reshape(-1, D)", "ones @ (product * w).reshape(-1, D)",
        "dw is taken after the product was multiplied by w", "does w belong in its own gradient?",
    ),
    _layernorm(
        "layernorm-stale-mean", "dx -= row_mean(dxhat)", "dx -= row_mean(dy)",
        "the mean taken off is that of dy, not of dxhat", "which quantity was centred?",
    ),
    _layernorm(
        "layernorm-batch-axis", "row_mean(product)", "product.mean(axis=0, keepdims=True)",
        "the variance term is averaged over the batch instead of the features", "which axis was normalised?",
        "wrong for inputs of rank three and more, right for none: tests at rank two passed",
    ),
    _forward_of_layernorm(
        "layernorm-unbiased", "var = row_mean(xc * xc)",
        "var = row_mean(xc * xc) * (x.shape[-1] / (x.shape[-1] - 1))",
        "the forward divides the variance by D - 1, the backward differentiates 1/D",
        "do forward and backward agree on the variance?",
    ),
    _layer_scale(
        "layer-scale-batch-mean", "column_sum(product)", "column_sum(product) / len(dy)",
        "gamma's gradient is divided by the batch size", "how many rows share gamma?",
    ),
    _layer_scale(
        "layer-scale-of-the-scaled", "(dy * x).reshape", "(dy * gamma * x).reshape",
        "gamma's gradient is made of the scaled branch", "y = gamma x: what multiplies gamma?",
    ),
    _layer_scale(
        "layer-scale-not-undone", "return dy * gamma, dgamma", "return dy * 1.0, dgamma",
        "the gradient passes by gamma on its way to the branch", "who is multiplied by gamma?",
    ),
    _gelu(
        "gelu-other-form", '    if kind == "erf":',
        '    if kind == "tanh":\n        gate, kind = 0.5 * (gate + 1.0), "erf"\n    if kind == "erf":',
        "the tanh form's gate is combined with the exact form's density: the derivative of neither",
        "which form is differentiated?",
        "off by some 1e-4 in a well-documented NumPy library, under the tolerance of its tests",
    ),
    _gelu(
        "gelu-cubic-factor", "3.0 * SQRT_2_OVER_PI * CUBIC", "SQRT_2_OVER_PI * CUBIC",
        "the factor 3 of d(x^3)/dx is missing", "differentiate x^3",
    ),
    _gelu(
        "gelu-sech", "dtanh -= 1.0", "dtanh -= 0.999",
        "1 - t^2 is rounded to 0.999 - t^2: a constant typed from memory", "differentiate tanh",
        "rounded magic decimals copied from code to code",
    ),
    _gelu(
        "gelu-no-product-rule", "dx *= x\n    dx -= gate", "dx -= gate",
        "the factor x of the second term is missing", "the product rule has two terms, each with a factor",
    ),
    _gelu(
        "gelu-erf-density", "dx *= -0.5\n        xp.exp", "dx *= -1.0\n        xp.exp",
        "the density is exp(-x^2) instead of exp(-x^2/2)",
        "what is the density of the standard normal?",
    ),
    _gelu(
        "gelu-erf-no-density", "dx *= x\n        dx += gate", "dx *= 0.0\n        dx += gate",
        "the term x phi(x) is missing: Phi is treated as a constant", "does Phi(x) depend on x?",
    ),
    _softmax(
        "softmax-no-jacobian", "xp.subtract(dy, row_sum(dy * y), out=out)",
        "xp.subtract(dy, 0.0, out=out)",
        "only the diagonal of the Jacobian is there: the sum over the row is missing", "does y_i depend on x_k?",
        "a softmax whose backward expects the caller to pass p - y",
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
        "softmax-square", "dx *= y", "dx *= y * (1 - y)",
        "the derivative of the logistic function stands in for that of softmax", "is the Jacobian diagonal?",
    ),
    _forward_of_softmax(
        "softmax-shift-axis", "x.real.max(axis=-1, keepdims=True)", "x.real.max(axis=-2, keepdims=True)",
        "the shift varies along the softmax axis, so the result is not a softmax of x",
        "softmax ignores a shift only if it is the same along the row",
        "two published NumPy ViTs share this line; their test inputs were too small to notice",
    ),
    _dropout(
        "dropout-no-scale", "dx *= scale", "pass", "the backward forgets 1 / (1 - rate)", "is the map still linear?",
    ),
    _dropout(
        "dropout-no-mask", "dx = dy * mask", "dx = dy * 1.0", "the backward lets dropped entries through",
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
        "attention-scale-forgotten", "dscores *= q.shape[-1] ** -0.5", "pass",
        "dq and dk lack the factor 1 / sqrt(Dh)", "scores are scaled: what of their gradient?",
    ),
    _attention(
        "attention-scale-twice", "dscores *= q.shape[-1] ** -0.5", "dscores *= q.shape[-1] ** -1.0",
        "dq and dk have the factor 1 / sqrt(Dh) twice", "scores are scaled once",
    ),
    _attention(
        "attention-dk-transpose", "dscores.swapaxes(-1, -2), q", "dscores, q",
        "dk = dscores q: the transpose is missing", "which index of dscores counts keys?",
    ),
    _attention(
        "attention-dv-transpose", "dropped.swapaxes(-1, -2), dy", "dropped, dy",
        "dv = attn dy: the transpose is missing", "which index of attn counts keys?",
    ),
    _attention(
        "attention-dq-dk-swapped", "dq = matmul(dscores, k, out=out_dq)", "dq = matmul(dscores, q, out=out_dq)",
        "dq is built from q instead of k", "scores = q k^T: what multiplies dscores?",
    ),
    _attention(
        "attention-no-softmax", "softmax_backward(dattn, softmax_cache, out=dattn)", "dattn * softmax_cache.y",
        "softmax's backward is replaced by its diagonal", "does attn_ij depend on scores_ik?",
    ),
    _attention(
        "attention-dropout-skipped", "dattn = dropout_backward(ddropped, dropout_cache)", "dattn = ddropped.copy()",
        "the gradient passes by attention dropout", "which entries of attn were dropped?",
    ),
    _attention(
        "attention-dropout-not-redone", "dropout_backward(softmax_cache.y, dropout_cache)", "softmax_cache.y",
        "dv is built from the map before dropout", "which map multiplied v?",
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
        "relative-table-first-picture", "dP.reshape(-1, N + Q - 1).T, q.reshape",
        "dP[:1].reshape(-1, N + Q - 1).T, q[:1].reshape",
        "the table's gradient is that of the first picture alone", "who shares the table?",
    ),
    _relative(
        "relative-table-without-heads", "dP.reshape(-1, N + Q - 1).T, q.reshape",
        "dP[:, 0].reshape(-1, N + Q - 1).T, q[:, 0].reshape",
        "the table's gradient is that of the first head alone", "who shares the table?",
    ),
    _msa(
        "msa-heads-not-transposed", ".transpose(0, 2, 1, 3)", ".reshape(B, num_heads, N, -1)",
        "heads and tokens are told apart by a reshape where a transpose is needed", "in which order do the axes lie?",
    ),
    _msa(
        "msa-key-gradient-dropped", "    # qkv = x Wqkv + bqkv\n", "    dqkv[..., D : 2 * D] = 0.0\n",
        "the gradient of the keys is dropped", "q, k and v all have gradients",
    ),
    _msa(
        "msa-value-gradient-first-head", "    # qkv = x Wqkv + bqkv\n",
        "    dqkv[..., 2 * D + D // num_heads :] = 0.0\n",
        "only the first head's values are trained", "how many heads are there?",
    ),
    _msa(
        "msa-key-norm-skipped", "dk[...], dwk, dbk = layernorm_backward(dk, cache.k_norm)",
        "_, dwk, dbk = layernorm_backward(dk, cache.k_norm)",
        "with QK-norm, the keys' gradient passes by the LayerNorm", "which keys did the query meet?",
    ),
    _msa(
        "msa-query-norm-of-keys", "layernorm_backward(dk, cache.k_norm)", "layernorm_backward(dk, cache.q_norm)",
        "with QK-norm, the keys' gradient goes back through the LayerNorm of the queries",
        "who was normalised by what?",
    ),
    _mlp(
        "mlp-gelu-skipped", "du = gelu_backward(du, cache.gelu)", "du = du * 1.0",
        "the gradient passes by the GELU", "count the steps of the forward",
    ),
    _mlp(
        "mlp-dropout-skipped", "du = dropout_backward(du, cache.dropout)", "du = du * 1.0",
        "the gradient passes by the dropout between the layers", "count the steps of the forward",
    ),
    _mlp(
        "mlp-weights-tied", "return dx, dW1, db1, dW2, db2", "return dx, dW1, db1, dW1.T, db2",
        "the second layer gets the first one's gradient, transposed: the shapes fit", "follow each gradient's name",
    ),
    _block(
        "block-residual-dropped", "    dz = dz + du\n    # z' =", "    dz = du\n    # z' =",
        "the residual path of the MLP half is cut on the way back", "z'' = z' + MLP(...): who else gets dz''?",
    ),
    _block(
        "block-residual-twice", "+= dz\n    return du", "+= dz + dz\n    return du",
        "the residual path of the attention half is counted twice", "how often does z enter z'?",
    ),
    _block(
        "block-attention-residual-dropped", "    du[:, : dz.shape[1]] += dz\n    return du", "    return du",
        "the residual path of the attention half is cut on the way back", "z' = z + MSA(...): who else gets dz'?",
    ),
    _block(
        "block-gradient-overwritten", "grads[name] += gradient", "grads[name][...] = gradient",
        "gradients are written instead of added: of several micro-batches the last one wins",
        "run two micro-batches", "weights updated inside the backward pass cannot accumulate either",
    ),
    _block(
        "block-norms-swapped", "layernorm_backward(du, cache.norm2)", "layernorm_backward(du, cache.norm1)",
        "the second LayerNorm uses the first one's cache", "read the cache fields in reverse",
    ),
    _block(
        "block-layer-scales-swapped", "layer_scale_backward(du, cache.ls1)", "layer_scale_backward(du, cache.ls2)",
        "the attention branch's LayerScale uses the cache of the MLP branch's", "read the cache fields in reverse",
    ),
    _block(
        "block-path-skipped", "du = drop_path_backward(dz, cache.path1)", "du = dz * 1.0",
        "stochastic depth is not undone on the attention branch", "which pictures skipped the branch?",
    ),
    _patch(
        "patch-class-token-dropped", "dz[:, :1].sum(axis=0, keepdims=True)", "0.0 * dz[:1, :1]",
        "the class token gets no gradient", "is every parameter trained?",
        "a published ViT sliced it away: its 'learnable' class token never learned",
    ),
    _patch(
        "patch-class-token-mean", "dz[:, :1].sum(axis=0, keepdims=True)", "dz[:, :1].mean(axis=0, keepdims=True)",
        "the class token's gradient is averaged over the batch instead of summed", "how many pictures share it?",
    ),
    _patch(
        "patch-position-first-picture", "dpos_embed = dz.sum(axis=0, keepdims=True)", "dpos_embed = dz[:1].copy()",
        "the position embedding's gradient is that of the first picture: the sum over the batch is missing",
        "along which axis was E_pos broadcast?", "a table per batch slot after the first step",
    ),
    _patch(
        "patch-position-reversed", "dpos_embed = dz.sum(axis=0, keepdims=True)",
        "dpos_embed = dz[:, ::-1].sum(axis=0, keepdims=True)",
        "the position embedding's gradient runs through the tokens backwards", "does row 0 belong to the class token?",
    ),
    _patch(
        "patch-class-token-kept", "dz = dz[:, 1:]", "dz = dz[:, :-1]",
        "the last token is cut off instead of the class token", "where was the class token put?",
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
        "the registers' gradient is averaged over the batch instead of summed", "how many pictures share them?",
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
        "the position's gradient is averaged over the batch instead of summed", "how many pictures share it?",
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
        "corrupt-mask-first-picture", "dshown[:, N:].sum(axis=0, keepdims=True)", "dshown[:1, N:]",
        "the mask gets the gradient of the first picture alone", "how many pictures share it?",
    ),
    _corrupt(
        "corrupt-mask-mean", "dshown[:, N:].sum(", "dshown[:, N:].mean(",
        "the mask's gradient is averaged over the batch instead of summed", "how many pictures share it?",
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
        "each token's share of the gradient is 1/N instead of its weight", "y = attn x: what is each token's weight?",
    ),
    _head(
        "head-mean-factor", "dy[:, None] / n", "dy[:, None]",
        "the factor 1/N of mean pooling is missing", "y = mean: what is each token's weight?",
    ),
    _head(
        "head-registers-counted", "dy[:, None] / n", "dy[:, None] / N",
        "mean pooling's gradient is divided by the number of all tokens, registers and all", "how many are averaged?",
    ),
    _head(
        "head-class-token-everywhere", "dz[:, cache.read] = dread", "dz[...] = dread[:, None]",
        "every token gets the class token's gradient", "which token was read?",
    ),
    _head(
        "head-tanh-derivative", "(1.0 - cache.tanh * cache.tanh)", "(1.0 - cache.tanh)",
        "the derivative of tanh is 1 - t instead of 1 - t^2", "differentiate tanh",
    ),
    _head(
        "head-tanh-skipped", "du = dy * (1.0 - cache.tanh * cache.tanh)", "du = dy * 1.0",
        "the gradient passes by the tanh", "count the steps of the forward",
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
        "groupnorm-no-weight", "dxhat = dy * w", "dxhat = dy * 1.0",
        "dy is not multiplied by w on its way to xhat", "y = xhat w + b: what is dxhat?",
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
        "loss-mean-twice", "dlogits *= dloss / denominator", "dlogits *= dloss / denominator / len(dlogits)",
        "the gradient is divided by the batch size twice", "who divides by B?",
    ),
    _loss(
        "loss-sum-not-mean", "dlogits *= dloss / denominator", "dlogits *= dloss",
        "the forward is a mean, the backward that of a sum", "what does the forward return?",
        "three published NumPy losses disagree with their own gradient in this way",
    ),
    _loss(
        "loss-upstream-ignored", "dlogits *= dloss / denominator", "dlogits *= 1.0 / denominator",
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
    _model(
        "model-embedding-dropout-skipped", "dz = dropout_backward(dz, cache.dropout)", "pass",
        "the gradient passes by the dropout of the embedding", "count the five dropout sites",
    ),
    _model(
        "model-position-not-trained", "len(self._position_names[0]) == 1", "len(self._position_names[0]) == 3",
        "the position embedding is in no update", "is every parameter trained?",
        "a published CuPy ViT leaves it out, with a note to figure this out later",
    ),
    _model(
        "model-registers-not-trained", 'grads["reg_token"] += dreg_token', "pass",
        "the registers are in no update", "is every parameter trained?",
    ),
    _model(
        "model-stem-not-trained", "self._of_stem(grads)", "self._of_stem(self.gradient_buffer()[1])",
        "the stem is in no update", "is every parameter trained?",
    ),
    _model(
        "model-positions-of-blocks-not-trained",
        "dz = self._position_backward(i, dz, cache.positions[i], grads)", "pass",
        "of the positions added before each block only the first is trained", "is every parameter trained?",
    ),
    _model_positions(
        "model-shared-position-one-block", "grads[name] += gradient", "grads[name][...] = gradient",
        "of the gradients of a position that all blocks share, one block's is left", "how often is it added?",
    ),
    _model(
        "model-axial-columns-go-back-as-rows", "dz = self._axis(i, from_axis, dz)", "dz = self._axis(0, from_axis, dz)",
        "the gradient of a block of columns is put back row by row", "which way did its input come?",
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
    _masked(
        "masked-position-mean", "dz.sum(axis=0, keepdims=True)", "dz.mean(axis=0, keepdims=True)",
        "the position embedding's gradient is averaged over the batch instead of summed", "how many pictures share it?",
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


def source_of(mistake):
    """The source of the mistake's function: (right, wrong), as texts.

    Raises  ValueError: the text to replace does not stand there exactly once; the code has moved on.
    """
    _, function, _ = _owner(mistake)
    source = textwrap.dedent(inspect.getsource(function))
    right = mistake.right if "." not in mistake.function else mistake.right.replace("\n    ", "\n")
    wrong = mistake.wrong if "." not in mistake.function else mistake.wrong.replace("\n    ", "\n")
    if source.count(right) != 1:
        raise ValueError(f"{mistake.name}: {right!r} stands {source.count(right)} times in {mistake.function}")
    return source, source.replace(right, wrong)


@contextmanager
def planted(name):
    """While active, the mistake is in the package: in its module and wherever else the function was imported to.

    It changes the package for every thread of the process; not for production. Plain bodies run (`backend.plain`): a
    twin would hide the mistake.
    Raises  InputError: unknown name.
    """
    mistake = find(name)
    holder, function, attribute = _owner(mistake)
    _, wrong = source_of(mistake)
    namespace = sys.modules[mistake.module].__dict__
    local = {}
    exec(compile(wrong, f"<{mistake.name}>", "exec"), namespace, local)
    broken = local[attribute]
    changed = [(holder, attribute)] + [
        (module, key)
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("minivit")
        for key, value in list(vars(module).items())
        if value is function and module is not holder
    ]
    for place, key in changed:
        setattr(place, key, broken)
    try:
        with plain():
            yield mistake
    finally:
        for place, key in changed:
            setattr(place, key, function)
