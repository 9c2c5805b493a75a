"""`python -m tvmq` is the command `tvmq`."""

from tvmq.cli import entry

if __name__ == "__main__":
    entry()
