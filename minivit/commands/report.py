"""Write a run down as one HTML page: settings, curves, mistakes, calibration, speed, and how to make it again."""

from pathlib import Path

from minivit.base.backend import find_device
from minivit.base.errors import InputError
from minivit.base.files import write_atomically
from minivit.commands.cli import Parser, output_file
from minivit.commands.flags import add_place, add_weights
from minivit.evaluation.runs import read_run
from minivit.training.engines.cut import check_workers

EXAMPLES = """
examples:
  minivit report runs/digits                              runs/digits/report.html
  minivit report runs/cifar10 --out cifar10.html --mistakes 24
  minivit report runs/pets --data-dir ~/pets --weights params

The page needs no other file and no network, and may be mailed or published as it is: it holds the images of the
mistakes that it shows. A run that is still under way is reported as it stands: metrics.jsonl to its last line, test
images by its last checkpoint.
"""


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="report")
    parser.add_argument("run", metavar="RUN", help="the folder of a run, such as runs/digits")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="the page to write [report.html in RUN]")
    parser.add_argument("--mistakes", type=int, default=12, metavar="N", help="most mistakes to show [12]")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data lie [where they lay in training]")
    add_weights(parser)
    add_place(parser)
    arguments = parser.parse_args(argv)
    workers, device = check_workers(arguments.workers), find_device(arguments.device)
    if arguments.mistakes < 0:
        raise InputError(f"--mistakes must be at least 0, got {arguments.mistakes}")
    folder = Path(arguments.run)
    out = Path(arguments.out or folder / "report.html")
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file with --out")
    run = read_run(
        folder, weights=arguments.weights, data_dir=arguments.data_dir, workers=workers, device=device
    )  # fmt: skip

    from minivit.figures import report  # matplotlib is slow to import, and bad input needs none

    text = report.page(run, mistakes=arguments.mistakes)
    page = text.encode("utf-8", errors="backslashreplace")  # names of files need not be valid text
    write_atomically(out, lambda file: file.write(page))
    print(f"{out}: {len(page) / 1024:,.0f} KiB")
    return 0
