"""Classify images with a checkpoint, and show what it looks at."""

import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minivit import figures
from minivit.base.backend import find_device, to_device, to_host
from minivit.base.errors import InputError, drawing
from minivit.base.files import write_json
from minivit.base.finite import quiet_overflow
from minivit.commands.cli import Parser, output_file
from minivit.commands.flags import add_data, add_reading, add_weights, reading_of
from minivit.data import LazyImages, read_image
from minivit.data.source import dataset_of
from minivit.evaluation.inference import attention_map, check_finite, on_device
from minivit.layers.softmax import softmax_forward
from minivit.model import intermediates
from minivit.paper.analyses import attention_rollout
from minivit.weights.layouts import load_with_notes
from minivit.weights.tensor_files import read_npy

EXAMPLES = """
examples:
  minivit predict runs/digits/last.npz --test 0 1 2          images of its own test set, by number
  minivit predict runs/cifar10/last.npz cat.jpg dog.png      files: png, jpg, tif, webp, ...
  minivit predict runs/cifar10/last.npz cat.jpg --attention rollout       the attention of all blocks
  minivit predict runs/digits/last.npz digit.npy --out out   an array (H, W) or (H, W, C), of the model's size

An array holds uint8 pixels 0..255, or floats scaled to [-1, 1]. The digits are bright ink (255) on black (0); a file
that shows dark ink on white paper needs --invert.
"""
ATTENTION = {
    "last": "attention of the last block, mean of its heads",
    "rollout": "attention rollout through all blocks",
}  # what --attention shows, in words
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def array_image(path, size, channels):
    """An image from an ``.npy`` file, as the model takes it: (size, size, channels), uint8 or float32.

    Raises  InputError: it is no array of numbers, has another shape, or a pixel that is NaN, infinite or out of range.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"PK":
            raise InputError(f"{path} holds several arrays; save one as .npy")
        image = read_npy(data, "image")
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:  # NumPy raises nearly anything for a broken file
        raise InputError(f"{path} cannot be read as an array ({str(error).splitlines()[0]})") from None
    if image.ndim == 2:
        image = image[..., None]
    if image.shape != (size, size, channels):
        raise InputError(f"{path} has shape {image.shape}; this model takes ({size}, {size}, {channels})")
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise InputError(f"{path} holds {image.dtype}; save it as uint8 (0..255) or floats (-1..1)")
    if not np.isfinite(image).all():
        raise InputError(f"{path} has a pixel that is NaN or infinite")
    if np.abs(image).max() > 1:
        raise InputError(
            f"{path} has floats from {image.min():g} to {image.max():g}; scale them to -1..1, or save uint8 0..255"
        )
    return image.astype(np.float32)


def file_image(path, size, channels, dataset=None, preprocessing=None):
    """An image file as the model takes it: (size, size, channels) uint8; one channel is the luminance.

    It is cut as its ``preprocessing`` says, or as the test images are of the data set that the model has learned, by
    name.
    """
    if dataset == "imagefolder" and not preprocessing:
        image = LazyImages(path.parent, [path.name], [0], size)[0]  # (size, size, 3)
    else:
        image = read_image(path, size, preprocessing)
    if channels == 3:
        return image
    if channels == 1:
        return np.rint(image @ LUMINANCE).astype(np.uint8)[..., None]
    raise InputError(f"{path}: this model takes {channels} channels; give it an array (.npy) of that shape")


def for_display(image):
    """An image as uint8: floats in [-1, 1] become 0..255."""
    return image if image.dtype == np.uint8 else np.rint(np.asarray(image, np.float64) * 127.5 + 127.5).astype(np.uint8)


def free_name(stem, names):
    """``prediction-STEM.png``, with a number where two images have the same name; adds it to ``names``."""
    stem, number = re.sub(r"[^\w.-]+", "_", stem) or "image", 2
    name = f"prediction-{stem}.png"
    while name in names:
        name, number = f"prediction-{stem}-{number}.png", number + 1
    names.add(name)
    return name


def gather(arguments, model, record):
    """Every image that was named: a list of (name, image, true class or None)."""
    size, channels = model.config.image_size, model.config.channels
    images = []
    for path in map(Path, arguments.images):
        if not path.exists():
            raise InputError(f"there is no image {path}")
        if path.is_dir():
            raise InputError(f"{path} is a folder; name the images in it")
        if path.suffix.lower() == ".npy":
            image = array_image(path, size, channels)
        else:
            image = file_image(path, size, channels, record.data.get("data"), record.preprocessing)
        if arguments.invert:
            image = 255 - image if image.dtype == np.uint8 else -image
        images.append((path.stem, image, None))
    if arguments.test:
        dataset = dataset_of(record, name=arguments.data, data_dir=arguments.data_dir)
        count = len(dataset.test_images)
        for index in arguments.test:
            if not 0 <= index < count:
                raise InputError(f"there is no test image {index}; {dataset.name} has 0 to {count - 1}")
            images.append((f"test-{index}", dataset.test_images[index], int(dataset.test_labels[index])))
    return images


def parse(argv):
    """The command line as a namespace."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="predict")
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint, such as runs/digits/last.npz, or official, timm or Hugging Face weights",
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files or .npy arrays")
    parser.add_argument("--test", nargs="+", type=int, default=[], metavar="INDEX", help="images of the test set")
    add_data(parser, "data set of --test, of the same classes [that of its training]")
    parser.add_argument(
        "--invert", action="store_true", help="take the negative of the files (dark ink on white paper)"
    )
    add_weights(parser)
    add_reading(parser)
    parser.add_argument("--attention", choices=ATTENTION, default="last",
                        help="what the image shows: the last block's maps, or the rollout of all [last]")  # fmt: skip
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ..., or auto [cpu]")
    parser.add_argument("--out", metavar="DIR", help="folder for the figures [the checkpoint's]")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the predictions as JSON")
    arguments = parser.parse_args(argv)
    if not arguments.images and not arguments.test:
        raise InputError("no image is named; name files, or --test 0 for the first image of the test set")
    if not arguments.test:
        for flag, value in (("--data", arguments.data), ("--data-dir", arguments.data_dir)):
            if value:
                raise InputError(f"{flag} {value} has no effect without --test, which takes images of a data set")
    if arguments.invert and not arguments.images:
        raise InputError("--invert has no effect on images of --test: it is for files")
    return arguments


def answer(model, image, device, which):
    """Probabilities (K,) of an image, and its map (grid, grid) of ``--attention``."""
    with quiet_overflow():
        steps = intermediates(model, to_device(image[None], device))
        probabilities = softmax_forward(to_host(steps.logits))[0][0]
    maps = steps.attention[-1] if which == "last" else attention_rollout(steps.attention)[-1][:, None]
    return probabilities, attention_map(to_host(maps[0]), model.config.pooling, model.config.registers)


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    device = find_device(arguments.device)
    model, record = load_with_notes(arguments.checkpoint, weights=arguments.weights, **reading_of(arguments))
    names = record.class_names
    model = on_device(model, device)
    images = gather(arguments, model, record)
    out = Path(arguments.out or Path(arguments.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    results, files, what = [], set(), ATTENTION[arguments.attention]
    for name, image, truth in tqdm(images, "images", delay=1, disable=None):
        probabilities, attention = answer(model, image, device, arguments.attention)
        check_finite(probabilities, arguments.checkpoint)
        order = np.argsort(-probabilities, kind="stable")[:5]
        figure = out / free_name(name, files)
        title = name if truth is None else f"{name}: truly {names[truth]}"
        result = {"image": name, "figure": str(figure)} | ({} if truth is None else {"truth": names[truth]})
        result["top"] = [{"name": names[k], "probability": float(probabilities[k])} for k in order]
        results.append(result)
        top = "  ".join(f"{names[k]} {probabilities[k]:.1%}" for k in order)
        tqdm.write(f"{title}: {top}", file=sys.stdout)
        with drawing():
            figures.save_attention(
                figure, for_display(image), attention, probabilities, names, title=title, truth=truth, what=what
            )
    if arguments.json:
        write_json(
            arguments.json, {"checkpoint": arguments.checkpoint, "weights": record.weights, "predictions": results}
        )
    print(f"{len(results)} figure{'s' if len(results) > 1 else ''} in {out}")
    return 0
