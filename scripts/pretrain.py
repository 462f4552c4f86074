from minivit.commands import pretrain
from minivit.commands.cli import run

run(pretrain.main)
