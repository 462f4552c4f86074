"""Settings that have no effect beside others: the momentum of an optimiser without, the cooldown of a cosine."""

from __future__ import annotations

from typing import NamedTuple

from minivit.base.errors import InputError
from minivit.base.words import note


class Need(NamedTuple):
    """What some settings need to have an effect."""

    names: tuple[str, ...]
    setting: str  # another setting ...
    values: tuple  # ... that must have one of these values, or none of them with ``others``
    others: bool = False
    told: bool = False  # in a note: their help says what takes their place; others are refused


NEEDS = (
    Need(("rand_count", "rand_magnitude"), "policy", ("rand",)),
    Need(("crop_mode",), "crop_padding", (0,), others=True),
    Need(("momentum",), "optimizer", ("sgd", "muon")),
    Need(("beta1", "beta2"), "optimizer", ("sgd",), others=True),
    Need(("adam_eps",), "optimizer", ("adamw", "adam", "muon")),
    Need(("cooldown",), "schedule", ("trapezoid",)),
    Need(("final_lr",), "schedule", ("constant",), others=True),
    Need(("warmup_epochs",), "warmup_steps", (0,), told=True),
    Need(("epochs",), "steps", (0,), told=True),
    Need(("gpu_micro_batch", "precision", "graph"), "device", ("cpu",), others=True, told=True),
    Need(("stem_width", "stem_groups"), "stem", ("",), others=True),
    Need(("mask_share", "random_share"), "method", ("mpp",)),
    Need(("decoder_width", "decoder_depth", "decoder_heads"), "method", ("mae",)),
)
MIXING = "mix_probability"  # needs one of two


def idle(settings, *, told=False):
    """The settings that have no effect, {name: what is missing, in words}, of a dict of all settings together.

    With ``told`` those that are told in a note, otherwise those that are refused.
    """
    found = {}
    for need in NEEDS:
        if need.told == told and need.setting in settings and (settings[need.setting] in need.values) == need.others:
            value = settings[need.setting]
            why = f"with {need.setting} {value}" if value not in (0, "") else f"without {need.setting}"
            found |= dict.fromkeys(need.names, why)
    if not told and not settings.get("mixup") and not settings.get("cutmix"):
        found[MIXING] = "without mixup or cutmix"
    return found


def refuse_idle(given, settings):
    """Refuse the ``given`` names of settings that have no effect beside all of the settings, a dict.

    Raises  InputError: one has none. Those whose help says what takes their place are told in a note.
    """
    refused, told = idle(settings), idle(settings, told=True)
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        if name in refused:
            raise InputError(f"{flag} has no effect {refused[name]}: leave it out")
        if name in told:
            note(f"{flag} has no effect {told[name]}")
