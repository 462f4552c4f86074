"""timm.models.VisionTransformer's state_dict, a ``.safetensors``; our names are timm's.

With the names of DeiT-3, of DeiT's distilled models, of MAE's encoder and of facebookresearch's DINOv2 too, which are
timm's but for a few. Every key of config.json is followed, compared with the tensors, or refused with its name.
"""

from __future__ import annotations

from typing import ClassVar

from minivit.base.errors import InputError
from minivit.model import STEM
from minivit.options.stem.resnet import output_of
from minivit.weights.layouts.architectures import OURS, architecture_of
from minivit.weights.layouts.layout import POSITIONS, SIZES, Layout
from minivit.weights.layouts.processors import CONFIG_FOLLOWED, CONFIG_IDLE, of_timm

MODULES = (
    "cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.proj", "blocks.{i}.norm1", "blocks.{i}.attn.qkv",
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


# Keys of config.json, and arguments of a model in it.
ROOT_FOLLOWED = {
    "architecture", "num_classes", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg",
    "stem_groups",
}  # fmt: skip
ROOT_IDLE = {"label_descriptions", "license", "description", "tags", "notes"}
GELUS = {"gelu": "erf", "gelu_tanh": "tanh"}
EXPECTED = {"patch_size": "patch_size", "in_chans": "channels", "embed_dim": "width", "depth": "depth"}
ARGUMENTS = {
    *EXPECTED, "img_size", "num_classes", "num_heads", "mlp_ratio", "global_pool", "qkv_bias", "qk_norm",
    "init_values", "class_token", "no_embed_class", "reg_tokens", "fc_norm", "act_layer", "norm_layer",
}  # fmt: skip
ARGUMENTS_IDLE = {
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "dtype", "device",
}  # fmt: skip
ARGUMENTS_ONE = {  # what ours has, of arguments that may say otherwise
    "scale_attn_norm": False, "scale_mlp_norm": False, "proj_bias": True, "pre_norm": False, "final_norm": True,
    "pool_include_prefix": False, "norm_layer": "layernorm", "pos_embed": "learn",
}  # fmt: skip


def _check_arguments(arguments, where):
    """The arguments of no effect; refuses those that ours has not, by name."""
    for key, value in arguments.items():
        if key in ARGUMENTS_ONE and value in (None, ARGUMENTS_ONE[key]):
            continue
        if key == "pos_embed" and value in ("", "none"):
            continue  # no table of positions: the tensors show it
        if key in ARGUMENTS_ONE or key not in ARGUMENTS | ARGUMENTS_IDLE:
            raise InputError(f"{where}: model_args has {key} = {value!r}, which ours does not have")
    act = arguments.get("act_layer")
    if act is not None and act not in GELUS:
        raise InputError(f"{where}: its activation, act_layer, is {act!r}; known here: {', '.join(GELUS)}")
    return sorted(ARGUMENTS_IDLE & arguments.keys())


def _expected(extra, arguments, images, tensors):
    """What config.json says of the sizes that the tensors have."""
    found = {ours: arguments[key] for key, ours in EXPECTED.items() if arguments.get(key) is not None}
    sizes = images.get("input_size")
    if sizes and "channels" not in found:
        found["channels"] = sizes[0]
    if "width" not in found and isinstance(extra.get("num_features"), int):
        found["width"] = extra["num_features"]
    if "qk_norm" in arguments:
        found["qk_norm"] = bool(arguments["qk_norm"])
    if "head.weight" in tensors:
        found["num_classes"] = arguments.get("num_classes", extra.get("num_classes", images.get("num_classes")))
    width, ratio = found.get("width"), arguments.get("mlp_ratio")
    if isinstance(width, int) and isinstance(ratio, int | float):
        found["mlp_dim"] = int(width * ratio)
    return found


class Timm(Layout):
    """timm's files."""

    name = "timm"
    names = {module: module for module in MODULES}
    aliases = (
        (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT-3
        (r"^pre_logits\.fc\.", "pre_logits."),  # timm before 0.6
        (r"^register_tokens$", "reg_token"),  # DINOv2
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's blocks in chunks
    )
    mark = r"patch_embed\.proj\.weight"
    left_out = r"(decoder_|decoder\.|mask_token)"  # MAE, DINOv2
    distilled: ClassVar[tuple] = ("head", "head_dist")
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
        return super().modules() | {"fc_norm", "head_dist"}

    def facts(self, extra, source):
        where, tensors = source.where, source.tensors
        if not extra:
            return self._of_names(source.seen)
        unknown = sorted(extra.keys() - ROOT_FOLLOWED - ROOT_IDLE - CONFIG_FOLLOWED - CONFIG_IDLE - {"label_offset"})
        if unknown:
            raise InputError(
                f"{where}: config.json has the unknown key {unknown[0]!r}; take it out if it changes nothing"
            )
        images, arguments = extra.get("pretrained_cfg"), extra.get("model_args") or {}
        if images is None and any(key in extra for key in ("input_size", "mean", "std", "interpolation")):
            images = {key: extra[key] for key in (CONFIG_FOLLOWED | CONFIG_IDLE) & extra.keys()}  # of 2022
        if not isinstance(arguments, dict) or not isinstance(images or {}, dict):
            raise InputError(f"{where}: model_args and pretrained_cfg of config.json must be objects")
        name = extra.get("architecture") or (images or {}).get("architecture")
        facts = architecture_of(name, where)
        idle = sorted(ROOT_IDLE & extra.keys())
        read = None
        if images is not None:
            read, more = of_timm(images, where)
            idle += more
        idle += _check_arguments(arguments, where)
        pooling = arguments.get("global_pool", extra.get("global_pool") or (facts and facts.pooling))
        no_embed = arguments.get("no_embed_class", facts and facts.no_embed_class)
        act = arguments.get("act_layer")
        size = arguments.get("img_size")
        if size is None and images and images.get("fixed_input_size"):
            size = images.get("input_size", [0, 0, 0])[1:]
        if (said := arguments.get("qkv_bias")) is not None and said != ("blocks.0.attn.qkv.bias" in tensors):
            raise InputError(f"{where}: model_args says qkv_bias {said}, its tensors do not")
        return {
            "heads": arguments.get("num_heads") or (facts.heads if facts else 0),
            "head_size": 64 if facts and not facts.heads else 0,
            "gelu": GELUS[act] if act else facts and facts.gelu,
            "layernorm_eps": 1e-6 if arguments.get("norm_layer") else facts and facts.layernorm_eps,
            "image_size": size,
            "class_names": extra.get("label_names") or (images or {}).get("label_names"),
            "preprocessing": read,
            "pooling": pooling,
            "prefix_positions": None if no_embed is None else "none" if no_embed else "all",
            "layer_scale": arguments.get("init_values"),
            "stem_groups": extra.get("stem_groups"),
            "expected": _expected(extra, arguments, images or {}, tensors),
            "notes": [f"config.json: of no effect on what is computed: {', '.join(idle)}"] if idle else [],
        }

    def _of_names(self, seen):
        """What the names of the tensors alone tell: whose program's pixels they take."""
        facebook = {"decoder_embed.weight", "mask_token", "register_tokens", "dist_token"} & seen
        return {
            "pixels": "imagenet" if facebook else None,
            "prefix_positions": "first" if "register_tokens" in seen else None,
        }

    def texts(self, config, class_names, preprocessing):
        return {"config.json": timm_config(config, class_names, preprocessing)}


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


def timm_images(p):
    """A `Preprocessing` as timm says it, in ``pretrained_cfg``.

    Raises  InputError: timm cannot do it.
    """
    mode = {"squash": "squash", "inside": "border"}.get(p.resize, "center")
    side = min((p.crop or p.size)[:1], default=0)
    share = side / min(p.size) if p.size and side else 1.0
    same = p.size and int(side / share) == min(p.size) and (p.crop or p.size)[0] == (p.crop or p.size)[-1]
    if p.resize == "none" or not same or (mode == "border" and set(p.fill) not in ({127}, {128})):
        raise InputError(f"timm cannot resize and cut images as this model's: {p.resize}, {p.size}, {p.crop}")
    return {"interpolation": p.resample, "crop_pct": share, "crop_mode": mode}


def timm_config(config, class_names, preprocessing):
    """The config.json of a timm model, for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    arguments = timm_arguments(config)
    root = f"{STEM}{'stem.' if config.stem_units else ''}conv"
    return {
        "architecture": timm_architecture(config) or OURS,  # so that timm says what it lacks
        "num_classes": config.num_classes,
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        "label_names": class_names,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.channels, config.image_size, config.image_size],
            "fixed_input_size": True,
            **timm_images(preprocessing),
            "mean": [0.5] * config.channels,
            "std": [0.5] * config.channels,
            "num_classes": config.num_classes,
            "first_conv": root if config.stem else "patch_embed.proj",
            "classifier": "head",
        },
    } | ({"stem_groups": config.stem_groups} if config.stem else {})
