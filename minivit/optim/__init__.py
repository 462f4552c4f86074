"""Optimisers, learning-rate schedules, gradient clipping, and the average of the weights.

One optimiser a file: `sgd`, `adam` (Adam and AdamW), `lion`, `muon`; what they share stands in `optimizer`. Then there
are `schedules`, `clipping` and `averages`. Each file begins with its equations; `make_optimizer` chooses by name.
"""

from minivit.base.errors import InputError
from minivit.optim.adam import Adam, AdamW
from minivit.optim.averages import EMA
from minivit.optim.clipping import clip_by_global_norm
from minivit.optim.lion import Lion
from minivit.optim.muon import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, Matrices, Muon, one_by_one, orthogonalise
from minivit.optim.optimizer import PIECE, Optimizer, pieces
from minivit.optim.schedules import SCHEDULES, check_schedule, learning_rate
from minivit.optim.sgd import SGD

OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "muon")

__all__ = [
    "Adam",
    "AdamW",
    "EMA",
    "Lion",
    "Matrices",
    "Muon",
    "NEWTON_SCHULZ",
    "NEWTON_SCHULZ_STEPS",
    "OPTIMIZERS",
    "Optimizer",
    "PIECE",
    "SCHEDULES",
    "SGD",
    "check_schedule",
    "clip_by_global_norm",
    "learning_rate",
    "make_optimizer",
    "one_by_one",
    "orthogonalise",
    "pieces",
]


def make_optimizer(
    name, flat, decay_mask, *, table=(), momentum=0.9, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, scale=None
):
    """An optimiser by its name in ``OPTIMIZERS``; each takes the settings that concern it.

    Raises  InputError: unknown name.
    """
    shared, adam = {"weight_decay": weight_decay, "scale": scale}, {"betas": (beta1, beta2), "eps": eps}
    if name == "sgd":
        return SGD(flat, decay_mask, momentum=momentum, **shared)
    if name == "lion":
        return Lion(flat, decay_mask, betas=(beta1, beta2), **shared)
    if name == "muon":
        return Muon(flat, decay_mask, table=table, momentum=momentum, **adam, **shared)
    if name in ("adam", "adamw"):
        return (Adam if name == "adam" else AdamW)(flat, decay_mask, **adam, **shared)
    raise InputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}")
