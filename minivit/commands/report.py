"""Write a run down as one HTML page: settings, curves, mistakes, calibration, speed, and how to make it again."""

import tomllib
from pathlib import Path

from minivit.base.backend import find_device
from minivit.base.errors import InputError
from minivit.commands.cli import Parser, output_file
from minivit.evaluation.inference import check_finite, load_with_data, predict_all
from minivit.training.recipes import CONFIGS, FINETUNE
from minivit.training.trainer import LAST, check_workers, config_from, fingerprint, origin_of
from minivit.weights.checkpoint import write_atomically

EXAMPLES = """
examples:
  minivit report runs/digits                              runs/digits/report.html
  minivit report runs/cifar10 --out cifar10.html --mistakes 24
  minivit report runs/pets --data-dir ~/pets --weights params

The page needs no other file and no network, and may be mailed or published as it is: it holds the pictures of the
mistakes that it shows. A run that is still under way is reported as it stands: metrics.jsonl to its last line, test
pictures by its last checkpoint.
"""


def own_settings(name):
    """The tables of minivit/configs/NAME.toml, which training on this data set reads by itself; {} if there is none."""
    try:
        content = tomllib.loads((CONFIGS / f"{name}.toml").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return {section: values for section, values in content.items() if isinstance(values, dict)}


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="report")
    parser.add_argument("run", metavar="RUN", help="the folder of a run, such as runs/digits")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="the page to write [report.html in RUN]")
    parser.add_argument("--mistakes", type=int, default=12, metavar="N", help="most mistakes to show [12]")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data lie [where they lay in training]")
    parser.add_argument("--weights", choices=("auto", "params", "ema"), default="auto",
                        help="the parameters, their moving average, or the average if there is one [auto]")  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads; 0 for one per core [0]")
    parser.add_argument("--device", default="cpu", metavar="NAME",
                        help="where to compute: cpu, cuda, cuda:1, ... or auto [cpu]")  # fmt: skip
    arguments = parser.parse_args(argv)
    workers, device = check_workers(arguments.workers), find_device(arguments.device)
    folder = Path(arguments.run)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}; name the folder of a run, such as runs/digits")
    if arguments.mistakes < 0:
        raise InputError(f"--mistakes must be at least 0, got {arguments.mistakes}")
    out = Path(arguments.out or folder / "report.html")
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file with --out")
    path = folder / LAST
    if not path.exists():
        raise InputError(
            f"there is no checkpoint at {path}; a report is of a run of minivit train; minivit evaluate "
            "tests a model alone"
        )
    model, meta, dataset = load_with_data(path, weights=arguments.weights, data_dir=arguments.data_dir)
    train = config_from(meta, path)
    logits = predict_all(model, dataset.test_images, workers=workers, device=device, flip=train.test_flip)
    check_finite(logits, path)

    from minivit.evaluation import report  # matplotlib is slow to import, and bad input needs none

    described = meta["data"] | ({"data_dir": arguments.data_dir} if arguments.data_dir else {})
    page = report.page(
        report.Run(
            folder,
            model,
            {**meta, "data": described},
            train,
            dataset,
            described.get("fingerprint") == fingerprint(dataset),
            logits,
            report.records_of(folder),
            report.summary_of(folder),
            own_settings(FINETUNE if origin_of(meta) else described.get("data")),
        ),
        mistakes=arguments.mistakes,
    ).encode("utf-8", errors="backslashreplace")  # names of files need not be valid text
    write_atomically(out, lambda file: file.write(page))
    print(f"{out}: {len(page) / 1024:,.0f} KiB")
    return 0
