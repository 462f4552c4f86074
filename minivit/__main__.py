"""``python -m minivit`` is ``minivit``."""

from minivit.commands.main import main

if __name__ == "__main__":
    main()
