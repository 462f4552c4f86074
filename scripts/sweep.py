from minivit.commands import sweep
from minivit.commands.cli import run

run(sweep.main)
