"""``python cli.py <command>``: the package's command line, from a checkout."""

import sys

try:
    from phi3_lightning.cli import main
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error.name} is not installed for {sys.executable}; "
        "run `make setup`, then `source .venv/bin/activate` in each shell"
    )

if __name__ == "__main__":
    main()
