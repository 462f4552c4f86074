"""Compare minivit with Flax, timm and transformers on the same random weights: logits, attention maps, all gradients.

Each library makes a model, fills it with random numbers, and writes it as its own file; minivit reads that file. Both
then take the same images and the same random gradient of the logits.
"""

import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import make_reference
import numpy as np
import outside_models

from minivit import ViTConfig
from minivit.base.errors import InputError
from minivit.base.files import write_atomically
from minivit.commands.cli import Parser, output_file, run
from minivit.model import intermediates
from minivit.weights import layouts as pretrained
from minivit.weights.tensor_files import of_arrays, write_npz

EXAMPLES = """
examples:
  python tools/parity.py                                       three libraries, Ti/16, S/16, B/32, both precisions,
                                                                 and the hybrid R26+S/32 where a library has it
  python tools/parity.py --only timm --models Ti/16            one of them
  python tools/parity.py --out docs/parity.md                  the table as a page
  python tools/parity.py sweep --out docs/outside-models.md    every ViT of timm, transformers and torchvision, from
                                                                 image files: right, or refused with the reason

needs: pip install -e ".[parity]"
"""
MODELS = ("Ti/16", "S/16", "B/32")
LIMITS = {"float32": 1e-5, "float64": 1e-10}
IMAGES = 2
# A hybrid has ReLUs: where rounding gives the argument of one the other sign, gradients differ by percents. That is
# chance, a mistake is not: of so many images, one after the other, one must pass.
HYBRID, HYBRID_SIDE, HAVE_HYBRIDS = "R26+S/32", 64, ("flax", "timm")
DRAWS, HYBRID_GRADIENTS = 10, 1e-4


class Library(NamedTuple):
    """A library's model: where it wrote its weights, and what it makes of images and a gradient of the logits."""

    file: Path
    run: Any  # (images, dlogits) -> logits, attention maps, {key: gradient}


class Difference(NamedTuple):
    """Largest differences from a library, each relative to the largest number of the array that differs."""

    program: str
    model: str
    dtype: str
    logits: float
    attention: float
    gradients: float
    worst: str  # the parameter whose gradient differs most


def draw(key, shape, rng, dtype):
    """Random numbers for a parameter of any library, such that activations keep their size and no gradient is zero."""
    noise = rng.standard_normal(shape, np.float32).astype(dtype)
    if key.endswith("scale") or ("norm" in key and key.endswith("weight")):
        return 1 + noise / 10
    if len(shape) < 2 or (len(shape) == 3 and shape[0] == 1):  # biases, tokens, positions
        return noise / 10
    if key.endswith("kernel"):
        inputs = shape[0] if key.split("/")[-2] in ("query", "key", "value") else np.prod(shape[:-1])
    elif key.endswith("/bias"):
        return noise / 10
    else:
        inputs = np.prod(shape[1:])
    return noise / np.sqrt(inputs).astype(dtype)


def flax(config, rng, dtype, folder):
    """The official model."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    from flax.traverse_util import flatten_dict, unflatten_dict

    model = make_reference.make_flax_model(vars(config), dtype)
    side = config.image_size
    image = jax.ShapeDtypeStruct((1, side, side, config.channels), dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    weights = {k: draw(k, s.shape, rng, dtype) for k, s in flatten_dict(shapes, sep="/").items()}
    write_npz(folder / "official.npz", weights)

    def steps(images, dlogits):
        def loss(tree):
            (logits, _), state = model.apply({"params": tree}, images, mutable=["intermediates"])
            return (logits * dlogits).sum(), (logits, state["intermediates"]["Transformer"])

        tree = unflatten_dict(weights, sep="/")
        (_, (logits, inside)), grads = jax.value_and_grad(loss, has_aux=True)(tree)
        maps = [
            np.asarray(inside[f"encoderblock_{i}"]["MultiHeadDotProductAttention_0"]["attention_weights"][0])
            for i in range(config.depth)
        ]
        return np.asarray(logits), maps, {k: np.asarray(g) for k, g in flatten_dict(grads, sep="/").items()}

    return Library(folder / "official.npz", steps)


def _fill(model, rng, dtype):
    import torch

    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(draw(key, tuple(tensor.shape), rng, dtype)))
    return model.eval()


def _grads(model):
    return {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}


def timm(config, rng, dtype, folder):
    """timm.models.VisionTransformer; a hybrid's stem with the official code's eps."""
    import torch
    from safetensors.torch import save_file
    from timm.models import VisionTransformer

    model = VisionTransformer(**pretrained.timm_arguments(config), **make_reference.timm_stem(vars(config)))
    model = model.to(getattr(torch, dtype))
    _fill(model, rng, dtype)
    save_file(model.state_dict(), folder / "model.safetensors")
    maps = []
    for block in model.blocks:
        block.attn.fused_attn = False  # the written-out attention, whose maps a hook can see
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, out: maps.append(out.detach().numpy()))

    def steps(images, dlogits):
        model.zero_grad()
        maps.clear()
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        (logits * torch.from_numpy(dlogits)).sum().backward()
        return logits.detach().numpy(), maps, _grads(model)

    return Library(folder / "model.safetensors", steps)


def hf(config, rng, dtype, folder):
    """transformers.ViTForImageClassification."""
    import torch
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification

    names = [f"LABEL_{k}" for k in range(config.num_classes)]
    model = ViTForImageClassification(TheirConfig(**pretrained.hf_config(config, names))).to(getattr(torch, dtype))
    _fill(model, rng, dtype)
    model.save_pretrained(folder)

    def steps(images, dlogits):
        model.zero_grad()
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        logits = model(pixels).logits
        (logits * torch.from_numpy(dlogits)).sum().backward()
        grads = _grads(model)
        model.set_attn_implementation("eager")  # shows its maps, which it makes in float32
        with torch.no_grad():
            maps = [each.numpy() for each in model(pixels, output_attentions=True).attentions]
        return logits.detach().numpy(), maps, grads

    return Library(folder / "model.safetensors", steps)


LIBRARIES = {"flax": flax, "timm": timm, "hf": hf}
PACKAGES = {"flax": ("flax", "jax"), "timm": ("timm", "torch"), "hf": ("transformers", "torch")}


def relative(ours, theirs):
    """The largest difference of two arrays, relative to the largest number of the second."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare(library, preset, dtype, *, seed=0, images=IMAGES, draws=1, **changes):
    """A `Difference`: minivit, on the file that a library wrote, from that library.

    Images are drawn until some pass, at most ``draws`` times; the last ones count.
    """
    gelu = "tanh" if library == "flax" else "erf"
    config = ViTConfig.preset(preset, **({"gelu": gelu} | changes))
    pretrained.check_held(config, "official" if library == "flax" else library)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs = LIBRARIES[library](config, rng, dtype, Path(folder))
        model, _ = pretrained.read(theirs.file, dtype=np.dtype(dtype), heads=config.num_heads)
    if model.config != config:
        raise InputError(f"{theirs.file} was read as {model.config}, and is {config}")
    side = config.image_size
    for _ in range(draws):
        images = rng.uniform(-1, 1, (images, side, side, config.channels)).astype(dtype)
        dlogits = rng.standard_normal((images, config.num_classes)).astype(dtype)
        difference = Difference(library, preset, dtype, *differences(model, theirs, images, dlogits))
        if passes(difference):
            break
    return difference


def differences(model, theirs, images, dlogits):
    """What a `Difference` says of logits, attention maps and gradients, and of which parameter."""
    logits, maps, grads = theirs.run(images, dlogits)
    ours, cache = model.forward(images)
    _, our_grads = model.gradient_buffer()
    model.backward(dlogits, cache, our_grads)
    inside = intermediates(model, images)
    # their gradients have the names and shapes of their weights, and are read as such
    about = pretrained.describe_tensors(of_arrays(grads), {}, "the gradients", heads=model.config.num_heads)
    expected = pretrained.build(about, dtype=logits.dtype).params
    errors = {name: relative(our_grads[name], g) for name, g in expected.items()}
    worst = max(errors, key=errors.get)
    attention = max(relative(a, b) for a, b in zip(inside.attention, maps, strict=True))
    return relative(ours, logits), attention, errors[worst], worst


def compare_hybrid(library, dtype, *, seed=0):
    """`compare` for the hybrid, at its size."""
    return compare(library, HYBRID, dtype, seed=seed, images=1, draws=DRAWS, image_size=HYBRID_SIDE)


def passes(d):
    """Is a `Difference` below its limit?"""
    limit = HYBRID_GRADIENTS if d.model == HYBRID and d.dtype == "float32" else LIMITS[d.dtype]
    return d.logits <= LIMITS[d.dtype] and d.gradients <= limit


def table(compared):
    """The differences as a table in Markdown."""
    rows = ["| library | model | precision | logits | attention maps | gradients | the largest is that of |"]
    rows.append("|---|---|---|---|---|---|---|")
    for d in compared:
        packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES[d.program])
        numbers = " | ".join(f"{x:.1e}" for x in (d.logits, d.attention, d.gradients))
        rows.append(f"| {packages} | {d.model} | {d.dtype} | {numbers} | `{d.worst}` |")
    return "\n".join(rows)


def page(compared, command):
    """The table with what it means."""
    return f"""# Parity with Flax, timm and transformers

The largest differences between minivit and three libraries on the same random weights, each relative to the largest
number of the array in question (of all parameters, that whose gradient differs most). Every library wrote its weights
in its own format, and `minivit.weights.layouts` read that file; {IMAGES} images, a random gradient of the logits.
Flax runs the official model (tanh GELU), timm and transformers theirs (erf GELU; LayerNorm's eps as in `config.json`).
The attention maps that transformers shows are those of its "eager" attention, whose softmax is always in float32.

{HYBRID} is a hybrid, a ResNet-26 before S, at {HYBRID_SIDE} pixels. timm's has the official code's eps in GroupNorm and
in the standardisation of kernels, not its own; transformers' ViT has no hybrids. Where the argument of a ReLU is nearer
to zero than rounding, float32 decides by chance whether a gradient passes, and changes those before it by percents. So
a hybrid is given one image after the other, at most {DRAWS}, until all its gradients agree (in float32 to
{HYBRID_GRADIENTS:g}).

{table(compared)}

Made by `{command}`.
"""


def main(argv=None):
    """Entry point; returns the exit status: 1 if a difference is above the limit."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="parity.py")
    parser.add_argument("--only", choices=LIBRARIES, help="one library [all]")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="presets [Ti/16 S/16 B/32 R26+S/32]")
    parser.add_argument("--dtypes", nargs="+", choices=LIMITS, default=tuple(LIMITS), help="precisions [both]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and images [0]")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write the table as a page in Markdown")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["sweep"]:
        return outside_models.main(argv[1:])
    arguments = parser.parse_args(argv)
    compared = []
    for library in [arguments.only] if arguments.only else LIBRARIES:
        for preset in arguments.models or (*MODELS, HYBRID):
            if preset == HYBRID and library not in HAVE_HYBRIDS:
                continue
            for dtype in arguments.dtypes:
                started = time.perf_counter()
                if preset == HYBRID:
                    d = compare_hybrid(library, dtype, seed=arguments.seed)
                else:
                    d = compare(library, preset, dtype, seed=arguments.seed)
                compared.append(d)
                print(f"{library:5} {preset:6} {dtype}  logits {d.logits:.1e}  attention {d.attention:.1e}  gradients "
                      f"{d.gradients:.1e} ({d.worst})  {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    print("\n" + table(compared))
    if arguments.out:
        text = page(compared, " ".join(["python tools/parity.py", *map(str, argv)]))
        write_atomically(arguments.out, lambda file: file.write(text.encode()))
    return int(not all(passes(d) for d in compared))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
