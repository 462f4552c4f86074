"""The files that say how a model's images are made: transformers' preprocessor_config.json and timm's pretrained_cfg.

Every key is followed, or refused with its name, or known to have no effect on what is computed here; those of the last
kind that do stand there are named in a note.
"""

from __future__ import annotations

import math

from minivit.base.errors import InputError
from minivit.weights.preprocessing import CLIP, FILTERS, HALF, IMAGENET, Preprocessing

# ---- transformers ----------------------------------------------------------------------------------------------------

# What each image processor does where its file is silent; "square": a size of one number is height and width.
PROCESSORS = {
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2, "pixels": HALF, "square": True},
    "DeiT": {
        "size": {"height": 256, "width": 256}, "resample": 3, "pixels": HALF, "square": True,
        "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
    },
    "CLIP": {
        "size": {"shortest_edge": 224}, "resample": 3, "pixels": CLIP, "square": False,
        "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
    },
    "Siglip": {"size": {"height": 224, "width": 224}, "resample": 3, "pixels": HALF, "square": True},
}  # fmt: skip
PROCESSORS["Bit"] = PROCESSORS["CLIP"]
PROCESSOR_FOLLOWED = {
    "image_processor_type", "feature_extractor_type", "size", "resample", "do_resize", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb", "do_pad", "crop_pct",
}  # fmt: skip
PROCESSOR_IDLE = {
    "processor_class", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping",
    "default_to_square", "pad_size", "_processor_class", "_valid_processor_keys",
    "offset_norm", "transformers_version",
}  # fmt: skip
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def of_transformers(content, where):
    """The `Preprocessing` that a preprocessor_config.json means, and its keys of no effect.

    Raises  InputError: it asks for what is not done here; the message names the key.
    """
    kind = content.get("image_processor_type", content.get("feature_extractor_type", "ViTImageProcessor"))
    name = str(kind).removesuffix("Fast").removesuffix("Pil")
    name = name.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if name not in PROCESSORS:
        known = ", ".join(f"{each}ImageProcessor" for each in PROCESSORS)
        raise InputError(f"{where}: image_processor_type is {kind!r}; known here: {known}")
    idle = _keys(content, PROCESSOR_FOLLOWED, PROCESSOR_IDLE, where)
    defaults = PROCESSORS[name] | {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }
    said = defaults | {key: value for key, value in content.items() if value is not None or key == "resample"}
    for key in ("do_pad", "crop_pct"):
        if content.get(key):
            raise InputError(f"{where}: {key} is {content[key]!r}, which is not done here")
    do = {key: _switch(said.get(key, False), key, where) for key in
          ("do_resize", "do_center_crop", "do_rescale", "do_normalize")}  # fmt: skip
    resize, size = _hf_size(said["size"], said["square"], "size", where) if do["do_resize"] else ("none", ())
    crop = None
    if do["do_center_crop"]:
        if "crop_size" not in said:
            raise InputError(f"{where}: do_center_crop is true, and there is no crop_size")
        squash, crop = _hf_size(said["crop_size"], True, "crop_size", where)
        if squash != "squash":
            raise InputError(f"{where}: crop_size is {said['crop_size']!r}; only a height and a width can be cut")
    number = said["resample"]
    known = type(number) is int and FILTERS.get(number) in ("nearest", "lanczos", "bilinear", "bicubic")
    if do["do_resize"] and not known:
        raise InputError(f"{where}: resample is {number!r}; known here: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic")
    mean, std = said["pixels"]
    if do["do_normalize"]:
        mean, std = (_numbers(said.get(key, default), key, where) for key, default in
                     (("image_mean", mean), ("image_std", std)))  # fmt: skip
    else:
        mean, std = (0.0,), (1.0,)
    rescale = _numbers(said["rescale_factor"], "rescale_factor", where)[0] if do["do_rescale"] else 1.0
    found = Preprocessing(
        "torchvision", resize, size, FILTERS[number] if known else "bilinear", crop, (0, 0, 0), rescale, mean, std
    )
    return found, idle


def _hf_size(size, square, key, where):
    """How transformers understands a size: (resize, (height, width))."""
    if type(size) is int:
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(size, list) and len(size) == 2 and key == "size":  # old files: width, height
        size = {"height": size[1], "width": size[0]}
    if isinstance(size, dict):
        present = {name: value for name, value in size.items() if value is not None}
        right = all(type(value) is int and 0 < value < 2**14 for value in present.values())
        if right and present.keys() == {"height", "width"}:
            return "squash", (present["height"], present["width"])
        if right and present.keys() == {"shortest_edge"}:
            return "short", (present["shortest_edge"],) * 2
    raise InputError(f"{where}: {key} is {size!r}; known here: a number, height and width, or shortest_edge")


# ---- timm ------------------------------------------------------------------------------------------------------------

CONFIG_FOLLOWED = {
    "input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "label_names", "architecture",
    "global_pool",
}  # fmt: skip
CONFIG_IDLE = {
    "url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "custom_load", "test_input_size", "min_input_size",
    "fixed_input_size", "test_crop_pct", "pool_size", "test_pool_size", "first_conv", "classifier", "license",
    "description", "origin_url", "paper_name", "paper_ids", "notes", "label_descriptions", "state_dict",
}  # fmt: skip


def of_timm(content, where):
    """The `Preprocessing` of a timm model's ``pretrained_cfg``, and its keys of no effect.

    What is not said has timm's defaults: 224 pixels, bicubic, a centre crop of 0.875, ImageNet's mean and std.
    Raises  InputError: see `of_transformers`.
    """
    idle = _keys(content, CONFIG_FOLLOWED, CONFIG_IDLE, f"{where}: pretrained_cfg")
    if content.get("label_offset"):
        raise InputError(f"{where}: label_offset is {content['label_offset']!r}, which is not done here")
    said = {key: value for key, value in content.items() if value is not None and value != ""}
    input_size = said.get("input_size", [3, 224, 224])
    if not (isinstance(input_size, list) and len(input_size) == 3
            and all(type(side) is int and 0 < side < 2**14 for side in input_size)):  # fmt: skip
        raise InputError(f"{where}: input_size is {input_size!r}; it must be channels, height and width")
    share = _numbers(said.get("crop_pct") or 0.875, "crop_pct", where)[0]
    mode, resample = said.get("crop_mode") or "center", said.get("interpolation") or "bicubic"
    if not 0.01 < share <= 100 or mode not in ("center", "squash", "border"):
        raise InputError(f"{where}: crop_pct is {share}, crop_mode {mode!r}; known here: center, squash and border")
    if resample not in INTERPOLATIONS:
        raise InputError(f"{where}: interpolation is {resample!r}; known here: {', '.join(INTERPOLATIONS)}")
    mean = _numbers(said.get("mean", IMAGENET[0]), "mean", where)
    std = _numbers(said.get("std", IMAGENET[1]), "std", where)
    crop = tuple(input_size[1:])
    size = tuple(max(1, math.floor(side / share)) for side in crop)
    resize = {"squash": "squash", "border": "inside"}.get(mode) or ("short" if size[0] == size[1] else "cover")
    grey = tuple(min(255, max(0, round(255 * value))) for value in (mean * 3)[:3]) if mode == "border" else (0, 0, 0)
    return Preprocessing("pillow", resize, size, resample, crop, grey, 1 / 255, mean, std), idle


# ---- both ------------------------------------------------------------------------------------------------------------


def _keys(content, followed, idle, where):
    """The keys of no effect; refuses unknown ones by name."""
    unknown = sorted(
        key for key, value in content.items() if key not in followed | idle | {"label_offset"} and value is not None
    )
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; take it out if it changes nothing of what is computed")
    return sorted(idle & content.keys())


def _switch(value, key, where):
    if not isinstance(value, bool):
        raise InputError(f"{where}: {key} is {value!r}; it must be true or false")
    return value


def _numbers(value, key, where):
    """A number, or one for each channel, as a tuple; those of a standard deviation are above 0."""
    values = value if isinstance(value, list | tuple) else [value]
    right = values and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if not right or (key.endswith(("std", "factor", "pct")) and min(values) <= 0):
        raise InputError(f"{where}: {key} is {value!r}, which cannot be")
    return tuple(float(v) for v in values)
