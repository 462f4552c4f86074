from minivit.commands import data
from minivit.commands.cli import run

run(data.main)
