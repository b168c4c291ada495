"""`python -m tune.cli`, the same as the `macdrop` command."""

from tune.cli.main import main

if __name__ == "__main__":
    main()
