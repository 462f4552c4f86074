"""Every ViT-like model of timm, transformers and torchvision: right from an image file on, or refused with a reason.

Each architecture is made with few blocks and random weights, and saved as its own program saves it. Its program and
minivit then classify the same image files, of several shapes.
"""

import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.base.files import write_atomically
from minivit.commands.cli import Parser, output_file, run
from minivit.data import read_image
from minivit.weights.layouts import EPS_NOTE, load_any
from minivit.weights.layouts.architectures import architecture_of

LIMIT, NOTED = 1e-5, 1e-4  # the second of hybrids, whose other eps are told in a note
SHAPES = ((300, 401), (97, 61), (520, 520))  # height and width of the images
CLASSES = 7
LARGEST = 1_000_000_000  # parameters; what is larger is made only if its name alone does not refuse it
TIMM_MODULES = (
    "vision_transformer", "deit", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam",
    "beit", "cait", "convit", "crossvit", "deepseek_vit", "eva", "gemma4_vit", "naflexvit", "qwen3_vit", "tnt", "volo",
    "xcit",
)  # fmt: skip
FEW = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_rpn_224", "test_vit2", "test_vit3",
       "vit_base_patch16_clip_quickgelu_224", "vit_tiny_r_s16_p8_224", "test_beit")  # fmt: skip


class Found(NamedTuple):
    """What became of one model."""

    program: str
    name: str
    difference: float | None  # the largest of the logits, relative to the largest logit; None if it is refused
    reason: str = ""  # of the refusal
    limit: float = LIMIT


class Outside(NamedTuple):
    """A model of another program: its folder or file, and its logits of image files."""

    path: Path
    logits: Any  # (list of paths) -> (n, K)
    reading: dict = {}  # what has to be said of it, see `load_any`


def images(folder):
    """Image files of several shapes: smooth, so that filters matter, with some noise."""
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    for k, (height, width) in enumerate(SHAPES):
        rows, columns = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
        waves = 90 * np.sin(rows / 11 + k) + 70 * np.sin(columns * np.array([0.05, 0.08, 0.11]))
        pixels = np.clip(128 + waves + rng.integers(-20, 20, (height, width, 3)), 0, 255).astype(np.uint8)
        paths.append(folder / f"{k}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def shaken(model):
    """A model with random numbers added to every parameter, so that none stays where it began; to evaluate."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


# ---- programs --------------------------------------------------------------------------------------------------------


def timm_names():
    """Every architecture of timm's modules of ViTs."""
    import timm

    modules = {name: timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()}
    return [name for name, module in modules.items() if module in TIMM_MODULES]


def timm_model(name, folder):
    """An architecture of timm, two blocks deep where it can be, saved as timm saves it."""
    import timm
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_data_config
    from timm.models import save_for_hf

    arguments = {"num_classes": CLASSES}
    with torch.device("meta"):
        try:
            model = timm.create_model(name, depth=2, **arguments)
            arguments["depth"] = 2
        except Exception:  # an architecture whose depth is no number, or that only some depths fit
            model = timm.create_model(name, **arguments)
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        architecture_of(name, "the file")  # which refuses it, or it is made after all
    model = shaken(timm.create_model(name, **arguments))
    save_for_hf(
        model, folder, model_config={"num_classes": model.num_classes}, model_args=arguments, safe_serialization=True
    )
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)

    def logits(paths):
        with torch.no_grad():
            return model(torch.stack([transform(Image.open(path)) for path in paths])).numpy()

    return Outside(folder, logits)


TINY = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip
BIT = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
DEIT = {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}}
SQUASH = {"size": {"height": 32, "width": 32}}
BEIT = {"use_relative_position_bias": True, "use_absolute_position_embeddings": False}
TRANSFORMERS = {  # name: class, changes of its configuration, image processor, changes of that
    "ViT": ("ViTForImageClassification", {}, "ViT", SQUASH),
    "ViT, tanh GELU": ("ViTForImageClassification", {"hidden_act": "gelu_new"}, "ViT", SQUASH | {"resample": 3}),
    "ViT, gelu_fast": ("ViTForImageClassification", {"hidden_act": "gelu_fast"}, "ViT", SQUASH | {"resample": 1}),
    "ViT, quick_gelu": ("ViTForImageClassification", {"hidden_act": "quick_gelu"}, "ViT", SQUASH),
    "ViT, relu": ("ViTForImageClassification", {"hidden_act": "relu"}, "ViT", SQUASH),
    "ViT, eps 0.01": ("ViTForImageClassification", {"layer_norm_eps": 1e-2}, "ViT", SQUASH),
    "ViT, no biases of q, k, v": ("ViTForImageClassification", {"qkv_bias": False}, "ViT", SQUASH),
    "ViT, several classes": (
        "ViTForImageClassification", {"problem_type": "multi_label_classification"}, "ViT", SQUASH,
    ),
    "ViT, patches 8 x 4": ("ViTForImageClassification", {"patch_size": (8, 4)}, "ViT", SQUASH),
    "ViT, images 32 x 64": (
        "ViTForImageClassification", {"image_size": (32, 64)}, "ViT", {"size": {"height": 32, "width": 64}},
    ),
    "ViT, not normalised": ("ViTForImageClassification", {}, "ViT", SQUASH | {"do_normalize": False}),
    "ViT, not rescaled": (
        "ViTForImageClassification", {}, "ViT",
        SQUASH | {"do_rescale": False, "image_mean": [120.0, 125.0, 130.0], "image_std": [60.0, 70.0, 80.0]},
    ),
    "ViT, another factor": (
        "ViTForImageClassification", {}, "ViT", SQUASH | {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3},
    ),
    "ViT, not resized but cut": ("ViTForImageClassification", {}, "DeiT", DEIT | {"do_resize": False}),
    "ViT, of CLIP's processor": ("ViTForImageClassification", {}, "CLIP", BIT),
    "ViT, of SigLIP's processor": ("ViTForImageClassification", {}, "Siglip", SQUASH),
    "DeiT": ("DeiTForImageClassification", {}, "DeiT", DEIT),
    "DeiT, distilled": ("DeiTForImageClassificationWithTeacher", {}, "DeiT", DEIT),
    "ViT-MSN": ("ViTMSNForImageClassification", {}, "ViT", SQUASH),
    "I-JEPA": ("IJepaForImageClassification", {}, "ViT", SQUASH),
    "DINOv2": ("Dinov2ForImageClassification", {"mlp_ratio": 2}, "Bit", BIT),
    "DINOv2, gated": ("Dinov2ForImageClassification", {"use_swiglu_ffn": True}, "Bit", BIT),
    "DINOv2 with registers": ("Dinov2WithRegistersForImageClassification", {"mlp_ratio": 2}, "Bit", BIT),
    "DINOv3": ("DINOv3ViTModel", {}, "ViT", SQUASH),
    "BEiT": ("BeitForImageClassification", BEIT, "ViT", SQUASH),
    "data2vec": ("Data2VecVisionForImageClassification", BEIT, "ViT", SQUASH),
    "SigLIP": ("SiglipForImageClassification", {}, "Siglip", SQUASH),
    "SigLIP 2": ("Siglip2ForImageClassification", {}, "ViT", SQUASH),
    "CLIP": ("CLIPForImageClassification", {}, "CLIP", BIT),
    "CLIP, its images": ("CLIPVisionModel", {}, "CLIP", BIT),
    "Pixio": ("PixioModel", {}, "ViT", SQUASH),
    "ViTDet": ("VitDetModel", {}, "ViT", SQUASH),
    "YOLOS": ("YolosForObjectDetection", {"image_size": [32, 32]}, "ViT", SQUASH),
    "Swin": ("SwinForImageClassification", {}, "ViT", SQUASH),
    "Swin 2": ("Swinv2ForImageClassification", {}, "ViT", SQUASH),
    "PVT": ("PvtForImageClassification", {}, "ViT", SQUASH),
    "CvT": ("CvtForImageClassification", {}, "ViT", SQUASH),
    "LeViT": ("LevitForImageClassification", {}, "ViT", SQUASH),
    "Hiera": ("HieraForImageClassification", {}, "Bit", BIT),
    "MobileViT": ("MobileViTForImageClassification", {}, "ViT", SQUASH),
    "SwiftFormer": ("SwiftFormerForImageClassification", {}, "ViT", SQUASH),
    "ViViT": ("VivitForVideoClassification", {}, "ViT", SQUASH),
    "VideoMAE": ("VideoMAEForVideoClassification", {}, "ViT", SQUASH),
    "DPT": ("DPTForSemanticSegmentation", {}, "ViT", SQUASH),
    "timm's, in transformers": ("TimmWrapperForImageClassification", {}, "ViT", SQUASH),
    "ViT's features": ("ViTModel", {}, "ViT", SQUASH),
    "ViT for masked images": ("ViTForMaskedImageModeling", {"encoder_stride": 8}, "ViT", SQUASH),
    "MAE": ("ViTMAEForPreTraining", {"mask_ratio": 0.0}, "ViT", SQUASH),
}  # fmt: skip
HIERARCHIES = ("Swin", "Swin 2", "PVT", "CvT", "LeViT", "Hiera", "MobileViT", "SwiftFormer")
HEADLESS = ("ViTForMaskedImageModeling", "ViTMAEForPreTraining", "ViTModel")  # whose features are compared


def transformers_model(name, folder):
    """A class of transformers with a small configuration, saved as transformers saves it."""
    import torch
    import transformers
    from PIL import Image

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    class_name, changes, processor, settings = TRANSFORMERS[name]
    kind = getattr(transformers, class_name)
    if name.startswith("timm's"):
        config = kind.config_class(architecture="test_vit", num_labels=CLASSES)
    elif kind.config_class.model_type in ("siglip", "siglip2", "clip"):
        config = kind.config_class(vision_config=TINY | changes, num_labels=CLASSES)
    else:
        known = kind.config_class.__dataclass_fields__ if hasattr(kind.config_class, "__dataclass_fields__") else TINY
        sizes = {} if name in HIERARCHIES else {k: v for k, v in TINY.items() if k in known}
        config = kind.config_class(**sizes | {"num_labels": CLASSES} | changes)
    model = shaken(kind(config))
    model.save_pretrained(folder)
    processor = getattr(transformers, f"{processor}ImageProcessor")(**settings)
    processor.save_pretrained(folder)

    def logits(paths):
        with torch.no_grad():
            pixels = [processor(Image.open(path), return_tensors="pt")["pixel_values"] for path in paths]
            return model(torch.cat(pixels)).logits.numpy()

    def features(paths):
        body = getattr(model, "vit", model)
        with torch.no_grad():
            pixels = [processor(Image.open(path), return_tensors="pt")["pixel_values"] for path in paths]
            result = body(torch.cat(pixels))
            if class_name == "ViTModel":
                return result.pooler_output.numpy()
            return result.last_hidden_state[:, 0].numpy()

    return Outside(folder, features if class_name in HEADLESS else logits)


TORCHVISION = {
    "vit_b_16": (16, 12),
    "vit_l_16": (16, 16),
    "vit_h_14": (14, 16),
    "with a layer before its head": (16, 4),
}


def torchvision_model(name, folder):
    """torchvision's VisionTransformer, a bare state_dict; its pixels are known, its heads are said."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from torchvision.models import VisionTransformer
    from torchvision.transforms import functional

    patch, heads = TORCHVISION[name]
    more = {"representation_size": 20} if name.startswith("with") else {}
    model = VisionTransformer(4 * patch, patch, 2, heads, 16 * heads, 96, num_classes=CLASSES, **more)
    model = shaken(model)
    save_file(model.state_dict(), folder / "model.safetensors")

    def logits(paths):
        side = 4 * patch
        arrays = [read_image(path, side) for path in paths]
        pixels = [functional.to_tensor(Image.fromarray(array)) for array in arrays]
        pixels = [functional.normalize(each, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) for each in pixels]
        with torch.no_grad():
            return model(torch.stack(pixels)).numpy()

    return Outside(folder, logits, {"heads": heads})


PROGRAMS = {
    "timm": (timm_names, timm_model),
    "transformers": (lambda: list(TRANSFORMERS), transformers_model),
    "torchvision": (lambda: list(TORCHVISION), torchvision_model),
}


# ---- comparison ------------------------------------------------------------------------------------------------------


def our_logits(outside, paths):
    """What minivit makes of the same files: logits, or features of a model without a head; and the limit for them."""
    model, record, notes = load_any(outside.path, need_head=False, **outside.reading)
    arrays = [read_image(path, model.config.image_size, record.preprocessing) for path in paths]
    headless = any("the file has no head" in note for note in notes)
    return (model.features if headless else model.predict)(np.stack(arrays)), NOTED if EPS_NOTE in notes else LIMIT


def compare(program, name):
    """`Found` of one model; an error of its own program is told as such."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        try:
            outside = PROGRAMS[program][1](name, folder)
        except InputError as error:
            return Found(program, name, None, str(error))
        except Exception as error:  # a library raises nearly anything
            return Found(program, name, None, f"not made: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
        paths = images(folder)
        try:
            ours, limit = our_logits(outside, paths)
        except InputError as error:
            reason = str(error).replace(str(folder), "").removeprefix("/model.safetensors").lstrip(": ")
            return Found(program, name, None, reason.replace("/model.safetensors", "the file"))
        theirs = outside.logits(paths)
        if ours.shape != theirs.shape:
            return Found(program, name, float("inf"), f"{ours.shape} instead of {theirs.shape}")
        return Found(program, name, float(np.abs(ours - theirs).max() / np.abs(theirs).max()), "", limit)


def is_wrong(found):
    """Has a model been read, and read wrong?"""
    return found.difference is not None and not found.difference <= found.limit


def page(found, command):
    """The table as a page."""
    right = [f for f in found if f.difference is not None]
    lines = [
        "# Models of other programs",
        "",
        "Every ViT-like architecture of timm and class of transformers, and torchvision's ViT, made with two blocks",
        "(or as many as its constructor insists on) and random weights, saved as its program saves it, with its",
        f"configuration beside it. Program and minivit classify the same {len(SHAPES)} image files of different",
        "shapes, so that resizing, cutting and normalising are compared too. The number is the largest difference of",
        "the logits (of a model without a head: of its features), relative to the largest of them; the limit is",
        f"{LIMIT:g}, and {NOTED:g} for timm's hybrids, whose eps in GroupNorm and in standardising kernels are",
        "not the official ones: a note says so whenever one is read.",
        "",
        f"Of {len(found)} models {len(right)} are read, {sum(map(is_wrong, found))} of them wrong, and "
        f"{len(found) - len(right)} are refused in one line.",
        "",
        "transformers' image processors resize with torchvision where it is installed, as here, and otherwise with",
        "Pillow, which rounds a pixel in some hundred to the next number. timm does not turn images as their camera",
        "says (EXIF); minivit and transformers do.",
        "",
    ]
    for program in dict.fromkeys(f.program for f in found):
        packages = ("torchvision", "torch") if program == "torchvision" else (program, "torch")
        lines += [
            f"## {', '.join(f'{p} {version(p)}' for p in packages)}",
            "",
            "| model | difference, or why not |",
            "|---|---|",
        ]
        for f in (each for each in found if each.program == program):
            said = f"{f.difference:.1e}" if f.difference is not None else f"refused: {f.reason}"
            lines.append(f"| {f.name} | {'**wrong** ' if is_wrong(f) else ''}{said.replace('|', ' ')} |")
        lines.append("")
    return "\n".join([*lines, f"Made by `{command}`.", ""])


def sweep(programs, names=None, *, report=print):
    """`Found` of every model of the programs, or of those that are named."""
    results = []
    for program in programs:
        for name in PROGRAMS[program][0]():
            if names and name not in names:
                continue
            started = time.perf_counter()
            found = compare(program, name)
            results.append(found)
            said = f"{found.difference:.1e}" if found.difference is not None else f"refused: {found.reason}"
            report(f"{program:12} {name:40} {'WRONG ' if is_wrong(found) else ''}{said}  "
                   f"{time.perf_counter() - started:.1f} s")  # fmt: skip
    return results


EXAMPLES = """
examples:
  python tools/outside_models.py --out docs/outside-models.md           all of them; the same as tools/parity.py sweep
  python tools/outside_models.py --only timm --models vit_tiny_patch16_224 test_vit

needs: pip install -e ".[parity]" torchvision
"""


def main(argv=None):
    """Entry point, of ``parity.py sweep`` too; returns the exit status: 1 if a model is read wrong."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="outside_models.py")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="programs [all]")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="names of single models [all]")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the table as a page in Markdown")
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    found = sweep(arguments.only, arguments.models, report=partial(print, flush=True))
    if not found:
        raise InputError(f"there is no model of these names: {arguments.models}")
    wrong = sum(map(is_wrong, found))
    print(f"{len(found)} models, {sum(f.difference is not None for f in found)} read, {wrong} of them wrong")
    if arguments.out:
        text = page(found, " ".join(["python tools/parity.py sweep", *argv]))
        write_atomically(arguments.out, lambda file: file.write(text.encode()))
    return int(wrong > 0)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
