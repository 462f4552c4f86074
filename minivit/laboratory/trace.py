"""What happens in one batch of a model: every call, forward and backward, sums, and the first that is not finite.

`minivit.laboratory.recorder` records the calls; the sums of what it counts in matrix products are those of the closed
forms of `minivit.model.costs`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minivit.laboratory.recorder import Record, recording
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import ViT, ViTConfig
from minivit.model.costs import ExpectedFLOPs, expected_flops


class Totals(NamedTuple):
    """Sums over a trace. FLOPs are per batch."""

    forward_matmul_flops: int
    backward_matmul_flops: int
    forward_flops: int
    backward_flops: int
    parameters: int
    cached: int  # bytes
    forward_seconds: float
    backward_seconds: float


class Trace(NamedTuple):
    """One recorded batch."""

    config: ViTConfig
    batch: int
    dtype: str
    records: list[Record]
    totals: Totals
    expected: ExpectedFLOPs  # the closed forms of the matrix products that the plain bodies make
    logits: Any  # (B, K)
    loss: Any  # ()
    gradient: Any  # flat, or None without a backward pass


def trace_batch(config, images, labels, *, flat=None, seed=0, dtype=np.float32, rng=None, label_smoothing=0.0,
                backward=True):  # fmt: skip
    """One batch, forward and backward through model and loss, recorded.

    Shapes  images (B, H, W, C), labels (B,) or (B, K)  ->  Trace
    The parameters are ``flat``, or new ones from ``seed`` in ``dtype``. Dropout acts if a Generator is given.
    Raises  InputError: images that do not fit the configuration;  ValueError: labels that do not.
    """
    model = ViT(config, seed=seed, dtype=dtype, flat=flat)
    images = np.array(images)  # its own buffer, so that its bytes are those of this batch
    gradient, grads = model.gradient_buffer() if backward else (None, None)
    with recording(model=model) as recorder:
        logits, cache = model.forward(images, rng=rng)
        loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=label_smoothing)
        recorder.name(loss_cache, "loss")
        if backward:
            model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    records = recorder.records

    def total(field, direction):
        return sum(getattr(r, field) for r in records if r.depth == 0 and r.direction == direction)

    totals = Totals(
        total("matmul_flops", "forward"), total("matmul_flops", "backward"), total("flops", "forward"),
        total("flops", "backward"), int(model.flat.size), total("cached", "forward"), total("seconds", "forward"),
        total("seconds", "backward"),
    )  # fmt: skip
    # the plain patch embedding always makes the gradient of what it reads; a stem does not for bytes
    image_gradient = not config.stem or images.dtype != np.uint8
    expected = expected_flops(config, len(images), image_gradient=image_gradient)
    return Trace(config, len(images), str(model.flat.dtype), records, totals, expected, logits, loss, gradient)


class NonFinite(NamedTuple):
    """The first tensor that is not finite, and where it came from."""

    tensor: str
    direction: str
    made_by: str  # path and function; "" if it came from outside
    inputs_finite: bool  # was all that this operation read finite?
    message: str


def events(records):
    """Yield ("in" or "out", record, the record around it or None) in the order in which calls began and ended."""
    open_calls = []
    for record in [*records, None]:
        while open_calls and (record is None or record.depth <= open_calls[-1].depth):
            ended = open_calls.pop()
            yield "out", ended, open_calls[-1] if open_calls else None
        if record is not None:
            yield "in", record, open_calls[-1] if open_calls else None
            open_calls.append(record)


def first_non_finite(trace):
    """The first tensor of a trace, forward or backward, that holds a NaN or an infinity.

    ``trace`` is a `Trace` or a `Recorder`. A tensor is seen where a recorded call reads it or returns it: one that a
    call is the first to read was made between calls, by the function around it. A temporary that overflowed inside a
    call is known from NumPy's warning; what the call returns may well be finite (LayerNorm of huge numbers is 0).
    Returns  NonFinite, or None if every tensor is finite
    """
    for event, r, around in events(trace.records):
        where = f"{r.path} ({r.function})"
        if event == "in" and r.bad_input:
            if around is None:
                return NonFinite(
                    r.bad_input, r.direction, "", False,
                    f"{r.bad_input}, which {where} reads in the {r.direction} pass, is not finite: it is a parameter "
                    "or an argument, no tensor before it is at fault",
                )  # fmt: skip
            maker = f"{around.path} ({around.function})"
            return NonFinite(
                r.bad_input, r.direction, maker, True,
                f"what {where} reads as {r.bad_input}, made by {maker} in its own lines, is the first tensor of the "
                f"{r.direction} pass that is not finite; all that {around.function} read was finite",
            )  # fmt: skip
        if event == "out" and r.nonfinite:
            return NonFinite(
                r.output, r.direction, where, True,
                f"{r.output}, made by {where}, is the first tensor of the {r.direction} pass that is not finite "
                f"({r.nonfinite:,} entries); all that {r.function} read was finite",
            )  # fmt: skip
        if event == "out" and r.alarms:
            return NonFinite(
                "a temporary", r.direction, where, True,
                f"a temporary of {where} is the first tensor of the {r.direction} pass that is not finite "
                f"({r.alarms}), though what {r.function} returned, {r.output}, is finite again",
            )  # fmt: skip
    return None
