"""Run settings side by side over seeds, and compare them in a table and a figure."""

from pathlib import Path

from minivit.base.backend import find_device
from minivit.base.errors import InputError, drawing
from minivit.base.words import counted
from minivit.commands.cli import Parser
from minivit.commands.training import HELP
from minivit.training.recipes import find_config
from minivit.training.sweep import carry_out, known_results, read_sweep, results_of, runs_of, write_table

EXAMPLES = """
examples:
  minivit sweep digits                      three rows on the digits: a minute
  minivit sweep cifar10-10min               the same command goes on where it stopped
  minivit sweep cifar10-10min --table       only write the table of what there is
  minivit sweep digits --seeds 0 1 2 3 4 --rows AdamW Muon
  minivit sweep my.toml --out my-sweep      a sweep of your own

The folder holds a run for each row and seed, and table.md, table.json, sweep.png of all rows, written anew after each
run. What a table.json there holds is not run again, even where the run's own folder is gone. The settings of a sweep
are TOML, see python -m pydoc minivit.training.sweep. A run that diverged is noted in the table and not made again
until its folder is deleted. The exit status is 0, 1 if a run diverged, 130 if it was interrupted.
"""


def draw_sweep(path, table):
    """The figure of a sweep's table."""
    with drawing():
        from minivit import figures  # matplotlib is slow to import

        figures.save_sweep(path, table)


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="sweep")
    parser.add_argument(
        "sweep", metavar="SWEEP", help="what to run: a file, or the name of one that comes with minivit"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the runs and the table [runs/sweep-NAME]")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="other seeds than the file's")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="some of the rows alone")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ..., or auto [where the settings say]")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    if arguments.table and arguments.device:
        raise InputError(f"--device {arguments.device} has no effect with --table, which runs nothing: leave it out")
    device = find_device(arguments.device) if arguments.device else None
    sweep = whole = read_sweep(find_config(arguments.sweep, "sweeps", "sweep"))
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
    how = {"device": device, "progress": not arguments.quiet, **HELP}
    if not arguments.table and not carry_out(left, lambda: write_table(whole, out, draw_sweep), **how):
        return 130
    if not out.is_dir():
        raise InputError(f"there is no {out}: nothing has been run")
    print("\n" + write_table(whole, out, draw_sweep))
    print(f"table and figure in {out}")
    diverged = sum("diverged" in result for result in results_of(sweep, out).values())
    if diverged:
        print(f"{counted(diverged, 'run')} diverged")
    return int(diverged > 0)
