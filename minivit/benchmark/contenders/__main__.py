"""``python -m minivit.benchmark.contenders``: one contender, on a pipe to `minivit.benchmark.contest`."""

from minivit.benchmark.contenders import serve

serve()
