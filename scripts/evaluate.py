from minivit.commands import evaluate
from minivit.commands.cli import run

run(evaluate.main)
