"""The argument parser: argparse, whose mistakes are one sentence with the nearest right word."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from tvmq.errors import InputError, nearest


class UsageError(InputError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, usage dumps and exits. `known`: every option string that it takes."""

    def __init__(self, **settings: Any) -> None:
        self.known: list[str] = []
        settings = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **settings}
        super().__init__(**settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's; the option's names are remembered for hints."""
        action = super().add_argument(*names, **settings)
        self.known.extend(action.option_strings)
        return action

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage and exiting."""
        raise UsageError(f"{self.prog}: {message}", hint=f"see {self.prog} --help")

    def check_options(self, words: Sequence[str]) -> None:
        """Raise UsageError for the first long option among `words` that this parser does not know."""
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if word.startswith("--") and name not in self.known:
                hint = nearest(name, self.known) or f"see {self.prog} --help"
                raise UsageError(f"{self.prog}: unknown option {name!r}", hint=hint)
