from minivit.commands import visualize
from minivit.commands.cli import run

run(visualize.main)
