"""`python -m coala` is the `coala` command."""

from coala.cli import main

if __name__ == "__main__":
    main()
