"""`python -m mobizo_cli`: the same as `mobizo`."""

from mobizo_cli.main import run

if __name__ == "__main__":
    run()
