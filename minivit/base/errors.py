"""The exception for input of the user that cannot be used."""


class InputError(ValueError):
    """The user's input cannot be used. Its text is one line: what is wrong, where, and what to do."""

    def __str__(self):
        # File names and the messages of other libraries may hold line breaks.
        return " ".join(super().__str__().splitlines())
