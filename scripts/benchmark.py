from minivit.commands import benchmark
from minivit.commands.cli import run

run(benchmark.main)
