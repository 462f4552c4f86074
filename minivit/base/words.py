"""Numbers in words, for messages."""


def counted(count, noun):
    """How many of something, in words: 1 epoch, 1,200 epochs."""
    return f"{count:,} {noun}" + "s" * (count != 1)
