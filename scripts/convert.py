from minivit.commands import convert
from minivit.commands.cli import run

run(convert.main)
