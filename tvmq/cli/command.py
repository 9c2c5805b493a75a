"""What every command of the command line has: the options it takes, typed, and one method that runs it."""

from __future__ import annotations

import argparse
import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tvmq.cli.output import Output
from tvmq.cli.parser import Parser
from tvmq.errors import OutputError
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """One command. Its fields are its options, named as argparse stores them; its docstring is its help.

    `json`: one JSON document on stdout instead of text.
    """

    name: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]

    json: bool = False

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options, `--json` aside."""

    @abstractmethod
    def run(self, out: Output) -> int:
        """Do it, and return the exit code: 0 done, 1 a check said no. Raises TvmqError."""

    @classmethod
    def from_namespace(cls, values: argparse.Namespace) -> Command:
        """The command that the parsed options describe."""
        return cls(**{field.name: getattr(values, field.name) for field in dataclasses.fields(cls)})


DEVICE_HELP = (
    "host (default), rpc://HOST:PORT, tracker://HOST:PORT/KEY (?secret=FILE where the board asks), ssh://USER@HOST"
)


# ---- Options that several commands share ----


def add_model(parser: Parser) -> None:
    """MODEL."""
    parser.add_argument(
        "model", metavar="MODEL", help="a .pt2 or .onnx file, a folder of transformers, or package.module:function"
    )


def add_converters(parser: Parser) -> None:
    """--converters."""
    parser.add_argument(
        "--converters",
        metavar="PACKAGE.MODULE",
        help="your own converters of operators: what its table() returns (docs/operators.md)",
    )


def add_device(parser: Parser) -> None:
    """--device and --threads."""
    parser.add_argument("--device", default="host", metavar="D", help=DEVICE_HELP)
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="0 (default): every core here, the target's on a board"
    )


def add_dynamic(parser: Parser) -> None:
    """--dynamic."""
    parser.add_argument(
        "--dynamic",
        metavar="INPUT:AXIS=N,N,...",
        help="a program for each size of an axis, as x:0=1,2,4,8: inputs between them are padded, outputs cut; "
        "ids:1,mask:1=64,128: axes that vary together; x:1==64,128: no other sizes; ';ids:0=1': one size",
    )


def add_target(parser: Parser) -> None:
    """--target."""
    parser.add_argument(
        "-t",
        "--target",
        default="host",
        metavar="TARGET",
        help="host (default), a name of `tvmq targets`, or a .toml file",
    )


def add_recipe(parser: Parser) -> None:
    """--precision, --recipe and --calibrate."""
    parser.add_argument("--precision", metavar="P", help=f"{', '.join(Precision)}; before the recipe's")
    parser.add_argument("--recipe", metavar="R.toml", help="precision, observer, and exceptions by layer")
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        help="a .npz, a folder of .npy, package.module:function, or a table.json of `tvmq calibrate`",
    )


def read_recipe(path: str | None, precision: str | None) -> Recipe:
    """The recipe of a file, or the default one, with the precision of the command line where it is given."""
    recipe = Recipe() if path is None else Recipe.from_toml(path)
    # Recipe checks the word, and offers the nearest.
    return recipe if precision is None else dataclasses.replace(recipe, precision=precision)  # type: ignore[arg-type]


def check_folder(path: str) -> None:
    """Raise OutputError where the folder of a result is missing: before the work, not after it."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}", expected="an existing folder", seen=f"no folder {folder}")
