"""``python cli.py <command>``: the package's command line, from a checkout."""

from phi3_lightning.cli import main

if __name__ == "__main__":
    main()
