from minivit.commands import gradcheck
from minivit.commands.cli import run

run(gradcheck.main)
