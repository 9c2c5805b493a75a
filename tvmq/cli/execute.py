"""`tvmq run`: one inference of a bundle, on this machine or on a board."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tvmq.cli import render
from tvmq.cli.command import Command, add_device, check_folder
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser
from tvmq.cli.progress import progress
from tvmq.errors import SignatureError
from tvmq.files import atomic_path

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Run(Command):
    """Run one inference, on the inputs given or on the bundle's own example."""

    name: ClassVar[str] = "run"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq run model.tvmq --input x.npy -o outputs.npz",
        "tvmq run model.tvmq --input tokens=ids.npy --input mask=mask.npy",
        "tvmq run model.tvmq --input inputs.npz --device rpc://192.168.1.20:9090",
    )

    bundle: str
    device: str = "host"
    threads: int = 0
    input: tuple[str, ...] = ()
    out: str | None = None

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument("bundle", metavar="BUNDLE", help="a .tvmq file")
        add_device(parser)
        parser.add_argument(
            "--input", action="append", default=[], metavar="FILE", help="x.npy, name=x.npy (one each), or inputs.npz"
        )
        parser.add_argument("-o", "--out", metavar="OUTPUTS.npz", help="write the outputs, by name")

    def run(self, out: Output) -> int:
        """Load, run, summarize, write."""
        inputs = read_inputs(list(self.input))
        if self.out is not None:
            check_folder(self.out)
        with progress(out.errors, "run") as report:
            report("loading TVM", 0)
            import tvmq

            with tvmq.load(self.bundle, self.device, threads=self.threads) as executor:
                values = inputs if inputs is not None else executor.bundle.golden()[0]
                report("inference", 0)
                outputs = executor(values) if isinstance(values, Mapping) else executor(*values)
        named = dict(zip([spec.name for spec in executor.signature.outputs], outputs, strict=True))
        if self.out is not None:
            _save(self.out, named)
        rows = [_summary(name, array) for name, array in named.items()]
        source = "example" if inputs is None else "given"
        document = {"bundle": self.bundle, "device": self.device, "inputs": source, "outputs": rows, "saved": self.out}
        note = ["on the bundle's own example inputs"] if inputs is None else []
        out.result(document, *note, render.tensors(rows))
        return 0


def read_inputs(texts: list[str]) -> Mapping[str, Array] | list[Array] | None:
    """Inputs by name, or in order; None where there are none. Raises SignatureError."""
    import numpy as np

    if not texts:
        return None
    if len(texts) == 1 and texts[0].endswith(".npz") and "=" not in texts[0]:
        archive = _load(texts[0], np)
        return {name: archive[name] for name in archive.files}
    pairs = [text.partition("=") for text in texts]
    if all(separator for _, separator, _ in pairs):
        return {name: _load_array(path, np) for name, _, path in pairs}
    if any(separator for _, separator, _ in pairs):
        raise SignatureError("--input", expected="name=FILE for all of them, or for none", seen=", ".join(texts))
    return [_load_array(path, np) for path, _, _ in pairs]


def _load_array(path: str, numpy: Any) -> Array:
    array = _load(path, numpy)
    if not isinstance(array, numpy.ndarray):
        raise SignatureError(f"input file {path}", expected="one .npy array", seen="a .npz archive")
    return array  # type: ignore[no-any-return]


def _load(path: str, numpy: Any) -> Any:
    try:
        return numpy.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise SignatureError(f"input file {path}", seen="no such file") from error
    except (OSError, ValueError, EOFError) as error:
        seen = str(error).split("\n")[0]
        raise SignatureError(f"input file {path}", expected="a .npy or .npz file", seen=seen) from error


def _save(path: str, arrays: Mapping[str, Array]) -> None:
    import numpy as np

    with atomic_path(path) as temporary, Path(temporary).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _summary(name: str, array: Array) -> dict[str, Any]:
    import numpy as np

    where = np.unravel_index(int(array.argmax()), array.shape) if array.size else ()
    return {
        "name": name,
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "min": float(array.min(initial=np.inf)) if array.size else None,
        "max": float(array.max(initial=-np.inf)) if array.size else None,
        "largest_at": [int(index) for index in where],
    }
