from minivit.commands import report
from minivit.commands.cli import run

run(report.main)
