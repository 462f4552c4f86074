"""Draw what a trained model has inside and does to an image, what training shows to it, and which rates it bears."""

import dataclasses
from pathlib import Path

import numpy as np

from minivit.base.backend import find_device, use_device
from minivit.base.errors import InputError
from minivit.base.files import write_json
from minivit.base.finite import quiet_overflow
from minivit.commands.cli import Parser, output_file
from minivit.commands.flags import add_data, add_reading, add_weights, reading_of
from minivit.commands.training import add_recipe, recipe_of_flags, refuse_idle_flags
from minivit.data import (
    DATASETS,
    FOLDERS,
    augment,
    auto_augment,
    cutmix,
    load,
    mixup,
    operate,
    rand_augment,
    resize_images,
    trivial_augment,
)
from minivit.data.operations import OPERATIONS, wide_space
from minivit.data.source import dataset_of, refuse_idle_data
from minivit.evaluation.inference import check_finite, load_with_data, on_device
from minivit.laboratory import curvature
from minivit.laboratory.sharpness import along_training, spectrum_facts
from minivit.layers.loss import one_hot
from minivit.masked.pretrain import load_masked
from minivit.training import lr_finder
from minivit.training.config import train_config_of
from minivit.training.folder import RECONSTRUCTIONS
from minivit.training.recipes import prepare
from minivit.weights.checkpoint import versions
from minivit.weights.layouts import load_any

EXAMPLES = """
examples:
  minivit visualize curvature runs/digits/last.npz
  minivit visualize curvature runs/digits/last.npz --every 10 --images 128 --count 3
  minivit visualize curvature runs/digits/last.npz --optimizer sgd --lr 0.05 --epochs 40 --out sgd
  minivit visualize masked runs/mae-cifar10/last.npz
  minivit visualize journey runs/cifar10/last.npz --image 409
  minivit visualize augment
  minivit visualize augment --data cifar10 --columns 16 --seed 1 --out figures
  minivit visualize augment --data imagefolder --data-dir images --image-size 96
  minivit visualize lr --data cifar10
  minivit visualize lr --config my.toml --optimizer muon --lr-min 1e-5 --lr-max 10 --steps 400

curvature: the training of the checkpoint is made again, in memory, with its own settings (or those given here), and
every few epochs the largest eigenvalues of the loss's Hessian are computed, exactly, on a fixed set of training
images. Gradient descent on a loss of curvature c is stable while c < 2 / lr (more with momentum; for Adam the
curvature counts that its scaling leaves). Training often climbs to this edge and stays there. The last panel is the
loss around the end of this training in the plane of the two sharpest directions. An eigenvalue that --steps products
do not find to a thousandth of the largest is drawn hollow, with a bar as long as its residual: more --steps find it.

masked: what a model of minivit pretrain sees of test images, patches masked or exchanged, and what it guesses.
Colours are drawn in the middle of their class. Pixels that were normalised get the mean and the standard deviation that
their patch really has: the model does not say them.

journey: how one test image becomes a class, as a moving image (journey.gif, 800 pixels wide) and a still one
(journey.png): patches, tokens, what they are made of after each block (attention rollout), probabilities.

augment: a sheet of training images, a row for each augmentation. The rows of single operations go from the weakest
strength on the left to the strongest on the right, as TrivialAugment draws them.

lr: the first steps of a training, with the settings files and flags of minivit train, while the learning rate rises
exponentially; on whole images, whatever half_size is. The loss falls where the rate is good and leaps where it is too
high. Two peak rates are suggested: that where the smoothed loss falls most steeply, and a tenth of that where it is
least. No run's folder is touched.
"""


def measured_images(dataset, count, seed):
    """A fixed random set of training images: (images, labels).

    Raises  InputError: there are none.
    """
    if not len(dataset.train_images):
        raise InputError(f"{dataset.source} has no training images; put some in its folder train")
    rows = np.random.default_rng(seed).permutation(len(dataset.train_images))[:count]
    return dataset.train_images[rows], dataset.train_labels[rows]


def settings_of_run(arguments, record):
    """The settings of the run to be made again, with those of the command line.

    Raises  InputError: it began with another model, or an option is impossible.
    """
    settings = dataclasses.replace(train_config_of(record), device=find_device(arguments.device))
    changes = {key: value for key in ("optimizer", "lr", "epochs") if (value := getattr(arguments, key)) is not None}
    settings = dataclasses.replace(settings, **changes, **({"steps": 0} if "epochs" in changes else {}))
    if record.start:
        raise InputError(
            f"{record.path} began with {record.start.get('checkpoint')}; this trains a run again from the beginning, "
            "and can do so for runs that began with nothing"
        )
    check_least(arguments, every=1, count=1, steps=1, images=1, points=1)
    if arguments.points < 2:
        raise InputError("--points must be at least 2: a surface has an extent")
    return settings


def check_least(arguments, **least):
    """Raises InputError if a flag is below its least value; one that was not given is not."""
    for name, low in least.items():
        if (value := getattr(arguments, name)) is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")


def draw_curvature(arguments):
    """The subcommand ``curvature``; returns the exit status."""
    path = Path(arguments.checkpoint)
    model, record, _ = load_any(path, weights="params", named=False)
    settings = settings_of_run(arguments, record)
    dataset = dataset_of(record, data_dir=arguments.data_dir)
    images, labels = measured_images(dataset, arguments.images, settings.seed)
    out = Path(arguments.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"{model.flat.size:,} parameters; Hessian of the mean loss of {len(images)} training images of {dataset.name}"
    )
    measurement = {"every": arguments.every, "count": arguments.count, "steps": arguments.steps}
    run = along_training(dataset, model.config, settings, images, labels, **measurement)
    if run is None:
        return 130
    records, flat = run
    if (fewest := min(len(record["eigenvalues"]) for record in records)) < arguments.count:
        print(
            f"of the {arguments.count} eigenvalues asked for only {fewest} were found: "
            f"--steps {arguments.steps} products give no more, or there are no more distinct ones"
        )
    how = {"label_smoothing": settings.label_smoothing, "device": settings.device}
    use_device(settings.device)
    spectrum = curvature.sharpness(model.config, flat, images, labels, count=2, steps=2 * arguments.steps, **how)
    # far enough along the sharpest direction to raise the loss by about one
    radius = float(np.sqrt(2.0 / max(spectrum.eigenvalues[0], 1e-6)))
    surface = curvature.loss_slice(
        model.config, flat, images, labels, spectrum.eigenvectors, radius, points=arguments.points, **how
    )  # fmt: skip
    figure, same = out / "curvature.png", np.array_equal(flat, model.flat)
    save_curvature(figure, records, surface, settings, dataset)
    report = {
        "checkpoint": str(path),
        "settings": dataclasses.asdict(settings),
        "images": len(images),
        "records": records,
        "ends_at_checkpoint": same,
        "at_end": spectrum_facts(spectrum) | {"products": spectrum.products},
    }
    write_json(arguments.json or out / "curvature.json", report)
    eigenvalues = ", ".join(f"{value:.4g}" for value in spectrum.eigenvalues)
    where = "at the end, which is the checkpoint" if same else "at the end of this training, not at the checkpoint"
    print(f"{where}: largest eigenvalues {eigenvalues}; drawn in {figure}")
    return 0


def save_curvature(path, records, surface, settings, dataset):
    """Draw the measurements of a run."""
    from minivit import figures  # matplotlib is slow to import

    momentum = f"momentum {settings.momentum:g}" if settings.optimizer == "sgd" else settings.optimizer
    title = f"{dataset.name}: {settings.epochs} epochs of {settings.optimizer}, lr {settings.lr:g}"
    figures.save_curvature(path, records, edge=f"edge of stability ({momentum})", slice_=surface, title=title)


def draw_masked(arguments):
    """The subcommand ``masked``; returns the exit status."""
    check_least(arguments, count=1, seed=0)
    path = Path(arguments.checkpoint)
    model, record = load_masked(path)
    dataset = dataset_of(record, data_dir=arguments.data_dir)
    out = Path(arguments.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    figure = out / RECONSTRUCTIONS
    title = f"{dataset.name}, {model.masked.method}"
    from minivit.figures.runs import draw_reconstructions  # matplotlib is slow to import

    draw_reconstructions(figure, model, dataset, count=arguments.count, seed=arguments.seed, title=title)
    print(f"drawn in {figure}")
    return 0


def sheet_of(images, seed):
    """A name and the augmented images (n, H, W, C) for each augmentation, as a dict."""
    n, H, W, _ = images.shape
    rows = {"as they are": images}

    def add(name, function, *arguments, **settings):
        rows[name] = function(images, *arguments, np.random.default_rng([seed, len(rows)]), **settings)

    add("crop", augment, crop_padding=max(1, H // 8))
    add("crop, reflected", augment, crop_padding=max(1, H // 8), crop_mode="reflect")
    add("flip", augment, flip=True)
    add("affine", augment, rotate=15.0, zoom=0.15, shear=0.15, shift=H / 16)
    add("erasing", augment, erasing=1.0)
    strengths = wide_space(H, W)[:, np.linspace(0, 30, n).round().astype(int)]
    for code, name in enumerate(OPERATIONS[1:], start=1):
        rows[name] = operate(images, np.full(n, code), strengths[code])
    add("policy: trivial", trivial_augment)
    add("policy: rand", rand_augment)
    add("policy: auto", auto_augment)
    for name, function in (("mixup", mixup), ("cutmix", cutmix)):
        targets, rng = one_hot(np.arange(n), n), np.random.default_rng([seed, len(rows)])
        mixed, targets = function(images, targets, rng, 1.0)
        rows[f"{name}, {targets.diagonal().min():.0%} kept"] = mixed
    return rows


def draw_augment(arguments):
    """The subcommand ``augment``; returns the exit status."""
    from minivit import figures  # matplotlib is slow to import

    size = arguments.image_size
    check_least(arguments, columns=2, seed=0, image_size=2)
    refuse_idle_data(arguments.data, {"data_dir": arguments.data_dir})
    dataset = load(
        arguments.data, arguments.data_dir or "data", image_size=size if arguments.data in FOLDERS else None
    )  # fmt: skip
    images, _ = measured_images(dataset, arguments.columns, arguments.seed)
    if size is not None:
        images = resize_images(images, size)  # no others than these
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    figure = out / f"augment-{arguments.data}.png"
    figures.save_contact_sheet(figure, sheet_of(images, arguments.seed), title=f"{dataset.name}: augmentations")
    print(f"drawn in {figure}")
    return 0


def draw_journey(arguments):
    """The subcommand ``journey``; returns the exit status."""
    from minivit.paper import film, journey  # matplotlib is slow to import

    path, device = Path(arguments.checkpoint), find_device(arguments.device)
    model, _, dataset = load_with_data(
        path, weights=arguments.weights, name=arguments.data, data_dir=arguments.data_dir, reading=reading_of(arguments)
    )  # fmt: skip
    count, number = len(dataset.test_images), arguments.image
    if not 0 <= number < count:
        raise InputError(f"there is no test image {number}; {dataset.name} has 0 to {count - 1}")
    image, truth = dataset.test_images[number], int(dataset.test_labels[number])
    with quiet_overflow():
        way = journey.journey_of(on_device(model, device), image, dataset.class_names, truth=truth)
    check_finite(way.probabilities, path)
    out = Path(arguments.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    journey.save_still(out / "journey.png", way)
    film.save_film(out / "journey.gif", way, progress=True)
    k = int(way.probabilities.argmax())
    print(
        f"test image {number} of {dataset.name}: {dataset.class_names[k]} {way.probabilities[k]:.1%}, "
        f"truly {dataset.class_names[truth]}; drawn in {out / 'journey.gif'} "
        f"({(out / 'journey.gif').stat().st_size / 2**20:.1f} MiB) and journey.png"
    )
    return 0


def draw_lr(arguments):
    """The subcommand ``lr``; returns the exit status."""
    from minivit import figures  # matplotlib is slow to import

    rates = {"low": arguments.lr_min, "high": arguments.lr_max, "steps": arguments.ramp_steps}
    lr_finder.rising_rates(**rates)  # bad ones are refused before the data are read
    dataset, model_config, config, begins = prepare(recipe_of_flags(arguments))
    refuse_idle_flags(arguments, model_config, config)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    ramp = lr_finder.find(
        dataset, model_config, config, **rates, start=begins["start"], progress=not arguments.quiet
    )  # fmt: skip
    least, lowest = ramp.rates[ramp.least], ramp.smoothed[ramp.least]
    figure = out / "lr.png"
    title = f"{dataset.name}: {config.optimizer}, batches of {config.batch_size * config.accumulate}"
    figures.save_lr_curve(figure, ramp, chosen=config.lr, title=title)
    report = {
        "settings": {
            "model": dataclasses.asdict(model_config),
            "train": dataclasses.asdict(config),
            "data": begins["describe"],
        },
        "lr_min": arguments.lr_min,
        "lr_max": arguments.lr_max,
        "steps": arguments.ramp_steps,
        "smoothing": lr_finder.SMOOTHING,
        "ended": ramp.ended,
        "least": {"lr": float(least), "smoothed": float(lowest)},
        "suggestions": ramp.suggestions,
        **{name: getattr(ramp, name).tolist() for name in ("rates", "losses", "smoothed")},
        "versions": versions(),
    }
    write_json(out / "lr.json", report)
    print(
        f"{len(ramp.rates)} steps of {config.optimizer} from a rate of {ramp.rates[0]:.2g} to {ramp.rates[-1]:.2g}: "
        f"{ramp.ended}; the smoothed loss went from {ramp.smoothed[0]:.3f} to {lowest:.3f}, at {least:.2g}"
    )
    if ramp.suggestions:
        steepest, tenth = ramp.suggestions.values()
        print(f"  --lr {steepest:.2g}   where the smoothed loss falls most steeply")
        print(f"  --lr {tenth:.2g}   a tenth of the rate where it is least")
        print(f"for the peak learning rate, which is {config.lr:.2g} in these settings; drawn in {figure}")
    else:
        print(f"the loss does not fall between these rates: try other --lr-min and --lr-max; drawn in {figure}")
    return 0


def add_curvature(commands):
    """Add the flags of ``curvature``."""
    about = "largest Hessian eigenvalues along training, loss surface"
    parts = commands.add_parser("curvature", help=about, description=about, epilog=EXAMPLES)
    parts.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, such as runs/digits/last.npz")
    parts.add_argument("--every", type=int, default=5, metavar="N", help="epochs between two measurements [5]")
    parts.add_argument(
        "--images", "--pictures", type=int, default=64, metavar="N", help="training images measured on [64]"
    )
    parts.add_argument("--count", type=int, default=2, metavar="N", help="eigenvalues to follow [2]")
    parts.add_argument("--steps", type=int, default=20, metavar="N", help="most Hessian-vector products each [20]")
    parts.add_argument("--points", type=int, default=21, metavar="N", help="points along a side of the surface [21]")
    parts.add_argument("--optimizer", metavar="NAME", help="train with this one [the run's]")
    parts.add_argument("--lr", type=float, metavar="X", help="train with this peak learning rate [the run's]")
    parts.add_argument("--epochs", type=int, metavar="N", help="train for so long [the run's]")
    parts.add_argument("--data-dir", metavar="DIR", help="where the data lie [where they lay in training]")
    parts.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ..., or auto [cpu]")
    parts.add_argument("--out", metavar="DIR", help="folder for curvature.png and .json [the checkpoint's]")
    parts.add_argument("--json", type=output_file, metavar="FILE", help="the measurements [curvature.json in --out]")
    parts.set_defaults(draw=draw_curvature)


def add_masked(commands):
    """Add the flags of ``masked``."""
    about = "test images, what a pre-trained model sees of them, and what it guesses"
    parts = commands.add_parser("masked", help=about, description=about, epilog=EXAMPLES)
    parts.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of minivit pretrain")
    parts.add_argument("--count", type=int, default=12, metavar="N", help="how many images [12]")
    parts.add_argument("--seed", type=int, default=0, metavar="N", help="draws the masks; 0 is that of the tests [0]")
    parts.add_argument("--data-dir", metavar="DIR", help="where the data lie [where they lay in training]")
    parts.add_argument("--out", metavar="DIR", help="folder for reconstructions.png [the checkpoint's]")
    parts.set_defaults(draw=draw_masked)


def add_journey(commands):
    """Add the flags of ``journey``."""
    about = "how one image becomes a class: patches, tokens, attention, probabilities; moving and still"
    parts = commands.add_parser("journey", help=about, description=about, epilog=EXAMPLES)
    parts.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, such as runs/digits/last.npz")
    parts.add_argument("--image", "--picture", type=int, default=0, metavar="N", help="number of the test image [0]")
    add_data(parts, "data set, of the same classes [that of its training]")
    add_weights(parts)
    add_reading(parts)
    parts.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ..., or auto [cpu]")
    parts.add_argument("--out", metavar="DIR", help="folder for journey.gif and journey.png [the checkpoint's]")
    parts.set_defaults(draw=draw_journey)


def add_augment(commands):
    """Add the flags of ``augment``."""
    about = "a sheet of training images, a row for each augmentation"
    parts = commands.add_parser("augment", help=about, description=about, epilog=EXAMPLES)
    parts.add_argument("--data", choices=DATASETS, default="digits", help="data set [digits]")
    parts.add_argument("--data-dir", metavar="DIR", help="where the data lie [data]")
    parts.add_argument("--image-size", type=int, metavar="N", help="height and width of the images, pixels; those of "
                       "a data set are scaled to it [their own; of a folder 32, of an imagefolder 224]")  # fmt: skip
    parts.add_argument("--columns", type=int, default=12, metavar="N", help="images in a row [12]")
    parts.add_argument("--seed", type=int, default=0, metavar="N", help="draws images and augmentations [0]")
    parts.add_argument("--out", default="runs", metavar="DIR", help="folder for augment-DATA.png [runs]")
    parts.set_defaults(draw=draw_augment)


def add_lr(commands):
    """Add the flags of ``lr``."""
    about = "the loss while the learning rate rises, and the rates that it suggests"
    parts = commands.add_parser("lr", help=about, description=about, epilog=EXAMPLES)
    where = add_recipe(parts, skip=("steps",))
    where.add_argument("--out", default="runs", metavar="DIR", help="folder for lr.png and lr.json [runs]")
    where.add_argument("--quiet", action="store_true", help="no progress bar")
    rates = parts.add_argument_group("learning rates")
    rates.add_argument("--lr-min", type=float, default=1e-6, metavar="X", help="the first one [1e-06]")
    rates.add_argument("--lr-max", type=float, default=1.0, metavar="X", help="the last one [1.0]")
    rates.add_argument(
        "--steps", type=int, default=200, dest="ramp_steps", metavar="N", help="how many training steps [200]"
    )
    parts.set_defaults(draw=draw_lr)


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="visualize")
    commands = parser.add_subparsers(required=True, metavar="WHAT", parser_class=Parser)
    for add in (add_curvature, add_masked, add_journey, add_augment, add_lr):
        add(commands)
    arguments = parser.parse_args(argv)
    return arguments.draw(arguments)
