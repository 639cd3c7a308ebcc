"""``python -m macft NAME``: the same as ``macft NAME``."""

from macft.cli.main import main

if __name__ == "__main__":
    main()
