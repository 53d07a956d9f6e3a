"""``python -m veneer.cli``."""

from veneer.cli.main import run

if __name__ == "__main__":
    run()
