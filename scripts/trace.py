from minivit.commands import trace
from minivit.commands.cli import run

run(trace.main)
