"""timm.models.VisionTransformer's state_dict, a ``.safetensors``; with DeiT-3's names too. Our names are timm's."""

from __future__ import annotations

from minivit.model import STEM
from minivit.options.stem.resnet import output_of
from minivit.weights.layouts.layout import POSITIONS, SIZES, Layout

MODULES = (
    "cls_token", "reg_token", "pos_embed", "patch_embed.proj", "blocks.{i}.norm1", "blocks.{i}.attn.qkv",
    "blocks.{i}.attn.q_norm", "blocks.{i}.attn.k_norm", "blocks.{i}.attn.proj", "blocks.{i}.ls1.gamma",
    "blocks.{i}.norm2", "blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc2", "blocks.{i}.ls2.gamma", "norm", "pre_logits",
    "head",
)  # fmt: skip
# timm's model with each stem, any size of which can be changed, but for the stem's width of 64 and its 32 groups
STEMS = {
    "": "vit_base_patch16_224",
    "root": "vit_tiny_r_s16_p8_224",
    "2,2,2,2": "vit_small_r26_s32_224",
    "3,4,9": "vit_base_r50_s16_224",
    "3,4,6,3": "vit_large_r50_s32_224",
}
EPS_NOTE = (
    "timm's hybrids have other eps in GroupNorm and in the standardisation of kernels than the official code and "
    "minivit: its logits differ by about 1e-5 of the largest"
)


class Timm(Layout):
    """timm's files."""

    name = "timm"
    names = {module: module for module in MODULES}
    aliases = (
        (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT-3
        (r"^pre_logits\.fc\.", "pre_logits."),  # timm before 0.6
    )
    block = r"(?<=^blocks\.)\d+"
    holds = {**SIZES, **POSITIONS, "pooling": ("cls", "mean", "avg"), "gelu": None} | dict.fromkeys(
        ("registers", "qk_norm", "layer_scale", "stem", "stem_width", "stem_groups")
    )
    stem = STEM.replace(".", r"\."), 0, STEM + "stages.{}.blocks.{}."
    stem_note = EPS_NOTE

    def stem_key(self, name):
        return name

    def keys_in(self, tensors, name):
        """timm calls the last LayerNorm fc_norm where it comes after the pooling."""
        keys = self.keys(name)
        if name.startswith("norm.") and f"fc_{keys[0]}" in tensors:
            return (f"fc_{keys[0]}",)
        return keys

    def modules(self):
        return super().modules() | {"fc_norm"}

    def tensors_in(self, tensors):
        return (tensors, "") if "patch_embed.proj.weight" in tensors else None

    def facts(self, extra, where):
        arguments = extra.get("model_args") or {}
        images = extra.get("pretrained_cfg") or {}
        return {
            "heads": arguments.get("num_heads"),
            "gelu": arguments.get("act_layer", "gelu"),
            "layernorm_eps": 1e-6,
            "image_size": arguments.get("img_size"),
            "class_names": extra.get("label_names"),
            "normalisation": (images.get("mean"), images.get("std")),
            "pooling": arguments.get("global_pool", extra.get("global_pool")),
            "no_embed_class": arguments.get("no_embed_class"),
            "layer_scale": arguments.get("init_values"),
            "architecture": extra.get("architecture"),
            "stem_groups": extra.get("stem_groups"),
        }

    def texts(self, config, class_names):
        return {"config.json": timm_config(config, class_names)}


def timm_arguments(config):
    """The arguments with which ``timm.models.VisionTransformer`` makes the same model; without its stem."""
    c, cls = config, config.pooling == "cls"
    ratio = c.mlp_dim // c.width if c.mlp_dim % c.width == 0 else c.mlp_dim / c.width
    if int(c.width * ratio) != c.mlp_dim:
        ratio = (c.mlp_dim + 0.5) / c.width  # timm cuts the product off
    arguments = {
        "img_size": c.image_size, "patch_size": c.patch_size, "in_chans": c.channels, "num_classes": c.num_classes,
        "embed_dim": c.width, "depth": c.depth, "num_heads": c.num_heads, "mlp_ratio": ratio,
        "global_pool": "token" if cls else "avg", "class_token": cls, "fc_norm": c.pooling == "avg",
    }  # fmt: skip
    arguments |= {"reg_tokens": c.registers} if c.registers else {}
    arguments |= {"qk_norm": True} if c.qk_norm else {}
    arguments |= {"init_values": c.layer_scale} if c.layer_scale else {}
    return arguments | ({"act_layer": "gelu_tanh"} if c.gelu == "tanh" else {})


def timm_call(config):
    """The Python expression that makes the same model, after ``import functools, timm, timm.models.resnetv2``."""
    words = [f"{name}={value!r}" for name, value in timm_arguments(config).items()]
    if config.stem:
        words.append(f"embed_layer=functools.partial(timm.layers.HybridEmbed, backbone={_backbone_call(config)})")
    return f"timm.models.VisionTransformer({', '.join(words)})"


def _backbone_call(config):
    """The Python expression of a stem."""
    # timm's own models have GroupNorm's eps 1e-5; its kernels' eps, added to the variance, cannot be the official
    parts = (
        f"in_chans={config.channels}, preact=False, stem_type='same', "
        "conv_layer=functools.partial(timm.layers.StdConv2dSame, eps=1e-8), "
        f"norm_layer=functools.partial(timm.layers.GroupNormAct, num_groups={config.stem_groups}, eps=1e-6)"
    )
    if units := config.stem_units:
        channels = [output_of(config.stem_width, units[: s + 1])[1] for s in range(len(units))]
        backbone = f"ResNetV2(layers={units}, channels={channels}, stem_chs={config.stem_width}, num_classes=0, "
        backbone += f"global_pool='', {parts})"
    else:
        backbone = f"create_resnetv2_stem(out_chs={config.stem_width}, {parts})".replace("in_chans", "in_chs")
    return f"timm.models.resnetv2.{backbone}"


def timm_architecture(config):
    """timm's name of a model with this stem, every other size of which `timm_arguments` change; "" if it has none."""
    own = (config.stem_width, config.stem_groups) == (64, 32) or not config.stem
    return STEMS.get(config.stem, "") if own else ""


def timm_config(config, class_names):
    """The config.json of a timm model, for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    arguments = timm_arguments(config)
    root = f"{STEM}{'stem.' if config.stem_units else ''}conv"
    return {
        "architecture": timm_architecture(config) or "hybrid without a name in timm",  # so that timm says what it lacks
        "num_classes": config.num_classes,
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        "label_names": class_names,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.channels, config.image_size, config.image_size],
            "fixed_input_size": True,
            "mean": [0.5] * config.channels,
            "std": [0.5] * config.channels,
            "num_classes": config.num_classes,
            "first_conv": root if config.stem else "patch_embed.proj",
            "classifier": "head",
        },
    } | ({"stem_groups": config.stem_groups} if config.stem else {})
