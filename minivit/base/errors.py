"""The one exception that means: the user's input cannot be used."""


class InputError(ValueError):
    """The user's input cannot be used; ``str(error)`` is one line: what, where, and what to do."""

    def __str__(self):
        # File names and the messages of other libraries may hold line breaks.
        return " ".join(super().__str__().splitlines())
