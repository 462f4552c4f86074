"""What timm's architectures are that no tensor shows: heads, activation, eps, pooling, where positions are added.

Each entry of `KNOWN` is of the architectures of `timm.models.vision_transformer`, ``deit`` and
``vision_transformer_hybrid`` that share these facts; ``heads`` 0 stands for heads of 64 numbers each. `REFUSED` are
those whose function ours does not have. ``python tools/parity.py sweep`` compares both with timm.
"""

from __future__ import annotations

from typing import NamedTuple

from minivit.base.errors import InputError


class Architecture(NamedTuple):
    """What a timm model is unless its arguments say otherwise."""

    heads: int
    gelu: str
    layernorm_eps: float
    pooling: str
    no_embed_class: bool


KNOWN = {
    Architecture(0, "erf", 1e-05, "avg", False): (
        "beit3_base_patch16_224 beit3_large_patch16_224"
    ),
    Architecture(16, "erf", 1e-05, "avg", False): (
        "beit3_giant_patch14_224 beit3_giant_patch14_336"
    ),
    Architecture(0, "erf", 1e-06, "avg", False): (
        "eva_large_patch14_196 eva_large_patch14_336 vit_base_patch16_siglip_gap_224 "
        "vit_base_patch16_siglip_gap_256 vit_base_patch16_siglip_gap_384 vit_base_patch16_siglip_gap_512 "
        "vit_betwixt_patch16_gap_256 vit_large_patch16_siglip_gap_256 vit_large_patch16_siglip_gap_384 "
        "vit_medium_patch16_gap_240 vit_medium_patch16_gap_256 vit_medium_patch16_gap_384 "
        "vit_so150m2_patch16_reg1_gap_256 vit_so150m2_patch16_reg1_gap_384 vit_so150m2_patch16_reg1_gap_448 "
        "vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_gap_384"
    ),
    Architecture(0, "erf", 1e-06, "token", True): (
        "flexivit_base flexivit_large flexivit_small vit_base_patch14_reg1_tipsv2 vit_base_patch14_reg4_dinov2 "
        "vit_base_patch16_radio_v3 vit_giant_patch16_radio_v3 vit_large_patch14_reg1_tipsv2 "
        "vit_large_patch14_reg4_dinov2 vit_large_patch16_radio_v3 vit_small_patch14_reg4_dinov2 "
        "deit3_base_patch16_224 deit3_base_patch16_384 deit3_large_patch16_224 deit3_large_patch16_384 "
        "deit3_medium_patch16_224 deit3_small_patch16_224 deit3_small_patch16_384 vit_base_mci_224"
    ),
    Architecture(2, "erf", 1e-06, "token", False): (
        "test_vit"
    ),
    Architecture(2, "erf", 1e-06, "avg", False): (
        "test_vit2"
    ),
    Architecture(3, "erf", 1e-06, "avg", False): (
        "test_vit4"
    ),
    Architecture(0, "erf", 1e-06, "token", False): (
        "vit_base_patch8_224 vit_base_patch14_dinov2 vit_base_patch16_224 vit_base_patch16_224_miil "
        "vit_base_patch16_384 vit_base_patch16_plus_240 vit_base_patch32_224 vit_base_patch32_384 "
        "vit_base_patch32_plus_256 vit_intern300m_patch14_448 vit_large_patch14_224 vit_large_patch14_dinov2 "
        "vit_large_patch16_224 vit_large_patch16_384 vit_large_patch32_224 vit_large_patch32_384 "
        "vit_small_patch8_224 vit_small_patch14_dinov2 vit_small_patch16_36x1_224 vit_small_patch16_224 "
        "vit_small_patch16_384 vit_small_patch32_224 vit_small_patch32_384 vit_tiny_patch16_224 "
        "vit_tiny_patch16_384 deit_base_distilled_patch16_224 deit_base_distilled_patch16_384 "
        "deit_base_patch16_224 deit_base_patch16_384 deit_small_distilled_patch16_224 deit_small_patch16_224 "
        "deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 vit_base_r26_s32_224 vit_base_r50_s16_224 "
        "vit_base_r50_s16_384 vit_base_resnet26d_224 vit_base_resnet50d_224 vit_large_r50_s32_224 "
        "vit_large_r50_s32_384 vit_small_r26_s32_224 vit_small_r26_s32_384 vit_tiny_r_s16_p8_224 "
        "vit_tiny_r_s16_p8_384"
    ),
    Architecture(0, "erf", 1e-05, "token", False): (
        "vit_base_patch16_clip_224 vit_base_patch16_clip_384 vit_base_patch16_plus_clip_240 "
        "vit_base_patch32_clip_224 vit_base_patch32_clip_256 vit_base_patch32_clip_384 vit_base_patch32_clip_448 "
        "vit_betwixt_patch32_clip_224 vit_large_patch14_clip_224 vit_large_patch14_clip_336 "
        "vit_medium_patch16_clip_224 vit_medium_patch32_clip_224 vit_xsmall_patch16_clip_224"
    ),
    Architecture(16, "erf", 1e-06, "avg", False): (
        "vit_base_patch16_gap_224 vit_giant_patch16_gap_224 vit_huge_patch14_gap_224 vit_huge_patch16_gap_448 "
        "vit_so400m_patch14_siglip_gap_224 vit_so400m_patch14_siglip_gap_378 vit_so400m_patch14_siglip_gap_384 "
        "vit_so400m_patch14_siglip_gap_448 vit_so400m_patch14_siglip_gap_896"
    ),
    Architecture(0, "erf", 1e-06, "avg", True): (
        "vit_base_patch16_reg4_gap_256 vit_betwixt_patch16_reg1_gap_256 vit_betwixt_patch16_reg4_gap_256 "
        "vit_betwixt_patch16_reg4_gap_384 vit_dlittle_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 "
        "vit_little_patch16_reg1_gap_256 vit_little_patch16_reg4_gap_256 vit_medium_patch16_reg1_gap_256 "
        "vit_medium_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_384 "
        "vit_wee_patch16_reg1_gap_256"
    ),
    Architecture(0, "tanh", 1e-06, "avg", False): (
        "vit_base_patch32_siglip_gap_256 vit_large_patch16_siglip_gap_512"
    ),
    Architecture(16, "erf", 1e-06, "token", False): (
        "vit_giant_patch14_224 vit_gigantic_patch14_224 vit_huge_patch14_224"
    ),
    Architecture(16, "erf", 1e-05, "token", False): (
        "vit_giant_patch14_clip_224 vit_gigantic_patch14_clip_224 vit_gigantic_patch14_clip_378 "
        "vit_huge_patch14_clip_224 vit_huge_patch14_clip_336 vit_huge_patch14_clip_378"
    ),
    Architecture(16, "tanh", 1e-06, "avg", False): (
        "vit_giantopt_patch16_siglip_gap_256 vit_giantopt_patch16_siglip_gap_384 vit_so400m_patch16_siglip_gap_256 "
        "vit_so400m_patch16_siglip_gap_384 vit_so400m_patch16_siglip_gap_512"
    ),
    Architecture(16, "erf", 1e-06, "token", True): (
        "vit_huge_patch16_radio_v3 vit_huge_patch16_radio_v4 vit_so400m_patch14_reg1_tipsv2 "
        "vit_so400m_patch16_radio_v4 deit3_huge_patch14_224"
    ),
    Architecture(8, "erf", 1e-06, "token", False): (
        "vit_small_resnet26d_224 vit_small_resnet50d_s16_224"
    ),
}  # fmt: skip
REFUSED = {
    "its MLP is gated, with SiLU": (
        "aimv2_1b_patch14_224 aimv2_1b_patch14_336 aimv2_1b_patch14_448 aimv2_3b_patch14_224 aimv2_3b_patch14_336 "
        "aimv2_3b_patch14_448 aimv2_huge_patch14_224 aimv2_huge_patch14_336 aimv2_huge_patch14_448 "
        "aimv2_large_patch14_224 aimv2_large_patch14_336 aimv2_large_patch14_448 vit_giant_patch14_dinov2 "
        "vit_giant_patch14_reg1_tipsv2 vit_giant_patch14_reg4_dinov2"
    ),
    "its tokens are pooled by attention": (
        "test_vit3 vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384 "
        "vit_base_patch16_siglip_512 vit_base_patch32_siglip_256 vit_giantopt_patch16_siglip_256 "
        "vit_giantopt_patch16_siglip_384 vit_large_patch16_siglip_256 vit_large_patch16_siglip_384 "
        "vit_large_patch16_siglip_512 vit_so150m_patch16_reg4_map_256 vit_so400m_patch14_siglip_224 "
        "vit_so400m_patch14_siglip_378 vit_so400m_patch14_siglip_384 vit_so400m_patch16_siglip_256 "
        "vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512"
    ),
    "its blocks have several branches side by side": (
        "vit_base_patch16_18x2_224 vit_small_patch16_18x2_224"
    ),
    "its activation is quick_gelu": (
        "vit_base_patch16_clip_quickgelu_224 vit_base_patch32_clip_quickgelu_224 "
        "vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_clip_quickgelu_224 "
        "vit_huge_patch14_clip_quickgelu_378 vit_large_patch14_clip_quickgelu_224 "
        "vit_large_patch14_clip_quickgelu_336"
    ),
    "its LayerNorms come after the branches": (
        "vit_base_patch16_rpn_224"
    ),
    "its branches are computed side by side": (
        "vit_base_patch16_xp_224 vit_dpwee_patch16_reg1_gap_256 vit_huge_patch14_xp_224 vit_large_patch14_xp_224 "
        "vit_pwee_patch16_reg1_gap_256"
    ),
}  # fmt: skip
OURS = "hybrid without a name in timm"  # what minivit writes where timm has no name
FACTS = {name: facts for facts, names in KNOWN.items() for name in names.split()}
REASONS = {name: reason for reason, names in REFUSED.items() for name in names.split()}


def architecture_of(name, where):
    """The `Architecture` of timm's name, with a tag or without; None for no name.

    Raises  InputError: it is unknown, or of a model that ours is not.
    """
    if name is None:
        return None
    if name == OURS:
        return Architecture(0, "erf", 1e-6, "token", False)
    plain = str(name).removeprefix("timm/").partition(".")[0]
    if plain in REASONS:
        raise InputError(f"{where}: architecture {name!r} is not supported: {REASONS[plain]}")
    if plain not in FACTS:
        raise InputError(f"{where}: architecture {name!r} is none of the plain ViTs that are known here")
    return FACTS[plain]
