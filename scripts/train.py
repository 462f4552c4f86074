from minivit.commands import train
from minivit.commands.cli import run

run(train.main)
