from minivit.commands import predict
from minivit.commands.cli import run

run(predict.main)
