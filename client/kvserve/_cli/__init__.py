"""``kvctl``: talk to a server from the command line. Private: what counts is the command."""

from kvserve._cli.main import main

__all__ = ["main"]
