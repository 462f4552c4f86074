from minivit.commands import transfer
from minivit.commands.cli import run

run(transfer.main)
