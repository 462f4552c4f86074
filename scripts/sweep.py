"""Run settings side by side over seeds, and compare them in a table and a figure."""

import sys
import time
from pathlib import Path

from minivit.checkpoint import write_atomically
from minivit.cli import Parser, run
from minivit.errors import InputError
from minivit.recipes import trainer_of
from minivit.sweep import TABLE, known_results, markdown, read_sweep, recipe_of, results_of, runs_of, table_of
from minivit.train import LAST, write_json

EXAMPLES = """
examples:
  python scripts/sweep.py configs/sweeps/digits.toml                      three rows on the digits: a minute
  python scripts/sweep.py configs/sweeps/cifar10-10min.toml               the same command goes on where it stopped
  python scripts/sweep.py configs/sweeps/cifar10-10min.toml --table       only write the table of what there is
  python scripts/sweep.py configs/sweeps/digits.toml --seeds 0 1 2 3 4 --rows AdamW Muon

The folder holds a run for each row and seed, and table.md, table.json, sweep.png of all rows, written anew after each
run. What a table.json there holds is not run again, even where the run's own folder is gone. The settings of a sweep
are TOML, see python -m pydoc minivit.sweep. The exit status is 0, 130 if it was interrupted.
"""


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="sweep.py")
    parser.add_argument("sweep", metavar="FILE.toml", help="what to run")
    parser.add_argument("--out", metavar="DIR", help="folder for the runs and the table [runs/sweep-NAME]")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="other seeds than the file's")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="some of the rows alone")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    sweep = whole = read_sweep(arguments.sweep)
    out = Path(arguments.out or Path("runs") / f"sweep-{Path(arguments.sweep).stem}")
    if arguments.seeds:
        if min(arguments.seeds) < 0:
            raise InputError("--seeds must be at least 0")
        sweep = sweep._replace(seeds=tuple(dict.fromkeys(arguments.seeds)))
    if arguments.rows:
        known = {row.name: row for row in sweep.rows}
        for name in arguments.rows:
            if name not in known:
                raise InputError(f"no row {name!r}; the rows are {', '.join(known)}")
        sweep = sweep._replace(rows=tuple(known[name] for name in dict.fromkeys(arguments.rows)))
    # the table is of all rows, and of all seeds that were ever run
    seeds = {*whole.seeds, *sweep.seeds, *(seed for _, _, seed in known_results(out))}
    whole = whole._replace(seeds=tuple(sorted(seeds)))
    runs, finished = runs_of(sweep, out), results_of(whole, out)
    left = [each for each in runs if (each.row.name, each.seed) not in finished]
    print(f"{sweep.title}: {len(sweep.rows)} rows, {len(sweep.seeds)} seeds; {len(runs) - len(left)} runs are finished")
    if not arguments.table:
        for each in {each.row.name: each for each in left}.values():  # what is impossible is found before a run begins
            trainer_of(recipe_of(each), each.folder, progress=False)
        for number, each in enumerate(left, start=1):
            print(f"\n{number} of {len(left)}: {each.row.name}, seed {each.seed}", flush=True)
            trainer = trainer_of(recipe_of(each), each.folder, progress=not arguments.quiet)
            if (each.folder / LAST).exists():
                trainer.restore()
            started_at = time.monotonic()
            summary = trainer.run()
            if summary is None:
                return 130
            print(f"{each.row.name}, seed {each.seed}: {summary['test_accuracy']:.2%} "
                  f"in {time.monotonic() - started_at:.0f} s", flush=True)  # fmt: skip
            write_results(whole, out)
    if not out.is_dir():
        raise InputError(f"there is no {out}: nothing has been run")
    print("\n" + write_results(whole, out))
    print(f"table and figure in {out}")
    return 0


def write_results(sweep, out):
    """Write table.md, table.json and sweep.png; returns the Markdown."""
    from minivit import plots  # matplotlib is slow to import

    table = table_of(sweep, out)
    text = markdown(table)
    write_json(out / TABLE, table)
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))
    plots.save_sweep(out / "sweep.png", table)
    return text


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
