"""``python -m minivit.contenders``: one contender, on a pipe to `minivit.benchmark`."""

from minivit.contenders import serve

serve()
