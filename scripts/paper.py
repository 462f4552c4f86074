from minivit.commands import paper
from minivit.commands.cli import run

run(paper.main)
