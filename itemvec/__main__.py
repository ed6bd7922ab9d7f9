"""`python -m itemvec` is the command `itemvec`."""

from itemvec.cli import main

if __name__ == "__main__":
    main()
