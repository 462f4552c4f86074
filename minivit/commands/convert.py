"""Convert weights between minivit, the official .npz, timm and Hugging Face, and say what is in a file of weights."""

from pathlib import Path

from minivit import parameter_table
from minivit.base.errors import InputError
from minivit.base.params import count
from minivit.commands.cli import Parser
from minivit.commands.flags import add_reading, add_weights, reading_of
from minivit.data.imagefolder import TEST_ZOOM
from minivit.weights import checkpoint, layouts
from minivit.weights.preprocessing import own

EXAMPLES = """
examples:
  minivit convert --info ViT-B_16.npz                      what is in it: settings, parameters, assumptions
  minivit convert ViT-B_16.npz b16.npz --to minivit        for predict.py, evaluate.py, trace.py, ...
  minivit convert R26_S_32.npz r26.npz --to minivit        a hybrid: its ResNet is seen from the names
  minivit convert model.safetensors b16.npz --to minivit --heads 12 --class-names imagenet.txt
  minivit convert runs/cifar10/best.npz cifar10.npz --to official
  minivit convert runs/cifar10/best.npz out --to timm      timm.create_model("local-dir:out", pretrained=True)
  minivit convert runs/cifar10/best.npz out --to hf        ViTForImageClassification.from_pretrained("out")

IN is an .npz or .safetensors file, a folder with model.safetensors, or a checkpoint of minivit; which layout it has is
seen from its content, and a config.json beside it is read. Pickles (.bin, .pt) are never read.
"""


def read_names(path, classes):
    """The class names in a file, one on each line.

    Raises  InputError: there is no such file, or it has more or fewer names than there are classes.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise InputError(f"there is no file {path} with class names") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise InputError(f"{path} is no text with a class name on each line") from None
    names = [name for name in names if name]
    if len(names) != classes:
        raise InputError(f"{path} has {len(names)} class names, the model {classes} classes")
    return names


def show(config, notes, keys):
    """Print a model's settings and parameters; ``keys`` of a parameter's name are those that the file has for it."""
    for note in notes:
        print(f"note: {note}")
    print("\n" + "\n".join(f"{name:18} {value}" for name, value in vars(config).items()))
    rows = [(spec.name, str(spec.shape), ", ".join(keys(spec.name)) or "-") for spec in parameter_table(config)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{'parameter':{widths[0]}}  {'shape':{widths[1]}}  in the file")
    for name, shape, there in rows:
        print(f"{name:{widths[0]}}  {shape:{widths[1]}}  {there}")
    print(f"\n{count(parameter_table(config)):,} parameters")


def info(path, **options):
    """Print what is in a file."""
    if not layouts.is_readable(path):
        arrays, record = checkpoint.read(path)
        print(f"{path}: checkpoint of minivit, {', '.join(sorted({a.dtype.name for a in arrays.values()}))}")
        show(record.config, [], lambda name: [f"{p}/{name}" for p in ("params", "ema") if f"{p}/{name}" in arrays])
    else:
        contents = layouts.describe(path, need_head=False, **options)
        print(
            f"{path}: layout {contents.layout.name}, {', '.join(sorted({t.kind for t in contents.tensors.values()}))}"
        )
        show(
            contents.config,
            contents.notes,
            lambda name: [key for key in contents.keys(name) if key in contents.tensors],
        )


def parse(argv):
    """The command line as a namespace."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="convert")
    add = parser.add_argument
    add("input", metavar="IN", help="the file or folder to read")
    add("output", nargs="?", metavar="OUT", help="the file (minivit, official) or folder (timm, hf) to write")
    add("--to", choices=("minivit", *layouts.LAYOUTS), help="the layout to write")
    add("--info", action="store_true", help="say what is in IN, and write nothing")
    add(
        "--naming",
        choices=("published", "current"),
        default="published",
        help="of the official layout: the names of the published files, or those that Flax gives now [published]",
    )
    add("--class-names", metavar="FILE", help="a name on each line [those in config.json, or class 0, ...]")
    add_weights(parser)
    add_reading(parser)
    add("--overwrite", action="store_true", help="OUT may be there already")  # fmt: skip
    return parser.parse_args(argv)


def preprocessing_of(record):
    """How the images of a model are cut, as a `Preprocessing`; None where nothing differs from minivit's own way."""
    if record.preprocessing or record.data.get("data") != "imagefolder":
        return record.preprocessing
    return own(record.config.image_size, share=TEST_ZOOM)


def tell_timm(model, paths):
    """Print how timm makes the same model."""
    if model.config.stem:
        print(f"note: {layouts.EPS_NOTE}")
        if not layouts.timm_architecture(model.config):
            print(
                "note: timm has no name for a model with this stem, so that create_model cannot make it: make it "
                f"as below, then model.load_state_dict(safetensors.torch.load_file({str(paths[-1])!r}))"
            )
    print(layouts.timm_call(model.config))


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    options = reading_of(arguments)
    path = Path(arguments.input)
    if arguments.info:
        info(path, **options)
        return 0
    if arguments.output is None or arguments.to is None:
        raise InputError("say where to write and in which layout: convert.py IN OUT --to minivit, official, timm or hf")
    model, record, notes = layouts.load_any(path, weights=arguments.weights, anyway=True, **options)
    if "stem_groups" in options["changes"] and not model.config.stem:
        raise InputError(f"{path} is no hybrid: leave --stem-groups out")
    names = record.class_names
    if arguments.class_names:
        names = read_names(arguments.class_names, model.config.num_classes)
    how = {"naming": arguments.naming, "overwrite": arguments.overwrite, "preprocessing": preprocessing_of(record)}
    paths = layouts.write(arguments.output, model, arguments.to, class_names=names, **how)
    for note in notes:
        print(f"note: {note}")
    print(f"{model.flat.size:,} parameters in {' and '.join(map(str, paths))}")
    if arguments.to == "official" and record.preprocessing:
        print("note: this layout does not say how images are resized and cut; here it was as another program does it")
    if arguments.to == "timm":
        tell_timm(model, paths)
    return 0
