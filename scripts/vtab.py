from minivit.commands import vtab
from minivit.commands.cli import run

run(vtab.main)
