"""The node tests of the `onnx` package, imported without the import check: right, refused, or silently wrong?

    python tests/importer/onnx_sweep.py [--torch] [--details] [--out docs/onnx_sweep.md] [name ...]

Prints the counts by group (the operator under test). `--torch` stops at the PyTorch program that an ONNX graph becomes,
which takes a tenth of the time; otherwise it is imported, and computed with TVM. `--out` writes a page.
`reason_to_leave_out` says what is left out. Where an operator needs a value at import (axes, shapes), all inputs but the first are made weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.backend.test.case.node import collect_testcases

from tvmq.errors import InputError
from tvmq.importer import onnx_model
from tvmq.importer.check import deviation
from tvmq.importer.load import import_model
from tvmq.importer.onnx_file import OLDEST_OPSET
from tvmq.importer.onnx_inputs import DTYPES, NARROW_NUMBERS, stored_as
from tvmq.oracle import interpret

PASSES, REFUSED, WRONG, CRASHED = "passes", "refused", "wrong", "crashed"
TOLERANCE = 1e-3
RANDOM = ("Bernoulli", "RandomUniformLike", "RandomNormalLike", "Multinomial")


def cases() -> Iterator[Any]:
    """The tests that are tried."""
    return (case for case in _all() if reason_to_leave_out(case) is None)


def _all() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(collect_testcases(None))


def reason_to_leave_out(case: Any) -> str | None:
    """Why a test is not tried; None for one that is. Raises the operator set of its model where that is no change."""
    if "_expanded" in case.name:
        return "repeats another with its operator written out"
    if "training" in case.name or group(case) in RANDOM:
        return "trains, or draws random numbers"
    versions = {item.domain: item.version for item in case.model.opset_import}
    if any(domain not in ("", "ai.onnx") for domain in versions):
        return "is of another domain (ai.onnx.ml, training)"
    if not _raised(case.model):
        return f"is of an operator set before {OLDEST_OPSET} that has changed since"
    values = [*case.model.graph.input, *case.model.graph.output]
    if not all(value.type.HasField("tensor_type") for value in values):
        return "takes or returns sequences or optionals"
    dtypes = {value.type.tensor_type.elem_type for value in values}
    if any(isinstance(x, list) or _array(x).dtype.kind not in "biuf" for xs in case.data_sets[0] for x in xs):
        return "has strings, or numbers that NumPy lacks"
    if not dtypes <= {*DTYPES, *NARROW_NUMBERS} - {onnx.TensorProto.BFLOAT16}:
        return "has bfloat16, complex numbers, or floats of 8 bits or fewer"
    return None


def _array(value: Any) -> Any:
    """An input or a result of a case; integers that NumPy lacks in what holds them."""
    return stored_as(onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value))


def _raised(model: onnx.ModelProto) -> bool:
    """Whether a model is of a known operator set, raising it where its operators have not changed until then."""
    for item in model.opset_import:
        if item.version < OLDEST_OPSET:
            changed = [
                onnx.defs.get_schema(n.op_type, OLDEST_OPSET).since_version > item.version for n in model.graph.node
            ]
            if any(changed):
                return False
            item.version = OLDEST_OPSET
    return True


def group(case: Any) -> str:
    """The operator that a case tests."""
    return str(case.model.graph.node[-1].op_type)


def judge(case: Any, torch_only: bool = False) -> tuple[str, str]:
    """(verdict, detail) of a case."""
    inputs, outputs = case.data_sets[0]
    example = {
        item.name: torch.from_numpy(_array(x).copy()) for item, x in zip(case.model.graph.input, inputs, strict=False)
    }
    compute = _by_torch if torch_only else _by_tvm
    try:
        try:
            found = compute(case.model, example)
        except InputError as error:
            if "depends on the model's inputs" not in str(error):
                raise
            found = compute(*_with_constants(case.model, example))
    except InputError as error:
        return REFUSED, str(error)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        return CRASHED, f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:300]}"
    for value, expected in zip(found, outputs, strict=False):
        reference = _array(expected)
        if (value.shape, value.dtype) != (reference.shape, reference.dtype):
            return WRONG, f"{value.dtype}{value.shape}, not {reference.dtype}{reference.shape}"
        if not deviation(value, reference) <= _allowed(case, reference):
            return WRONG, f"deviates by {deviation(value, reference):.3g}"
    return PASSES, ""


def _with_constants(model: onnx.ModelProto, example: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """All inputs but the first as weights: shapes, axes and the like, which tests pass in and models know."""
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    first, *others = list(example) if len(example) > 1 else [None, *example]
    bound.graph.initializer.extend(onnx.numpy_helper.from_array(example[name].numpy(), name) for name in others)
    return bound, {first: example[first]} if first else {}


def _allowed(case: Any, reference: Any) -> float:
    """A step for what is quantized; float16 has three digits."""
    if "quant" in case.name or "qlinear" in case.name:
        return 1.0 if reference.dtype.kind in "iu" else TOLERANCE
    return 5e-3 if reference.dtype == np.float16 else TOLERANCE


def _by_torch(model: onnx.ModelProto, example: dict[str, torch.Tensor]) -> list[Any]:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    module = onnx_model.build(copied, example)
    with torch.no_grad():
        return [value.numpy() for value in module(**example).values()]


def _by_tvm(model: onnx.ModelProto, example: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path))
        imported = import_model(path, example, check=False)
    return interpret.run(imported.module, imported.example)


def page(verdicts: dict[str, tuple[str, str, str]], left_out: Counter[str], command: str) -> str:
    """A document of verdicts, test -> (group, verdict, detail), and of how many tests were left out for each reason."""
    total = Counter(verdict for _, verdict, _ in verdicts.values())
    results = (PASSES, REFUSED, WRONG, CRASHED)
    lines = [
        "# The node tests of the onnx package\n",
        f"{len(verdicts)} tests of onnx {metadata.version('onnx')}, imported with the import check off, computed with TVM and",
        f"compared with their expected outputs: {_counted(total)}. Quantized integers may differ by one step. Written by\n",
        f"    {command}\n",
        "## What does not pass\n",
        "| test | what | why |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {verdict} | {_cell(detail)} |"
        for name, (_, verdict, detail) in sorted(verdicts.items())
        if verdict != PASSES
    ]
    lines += ["\n## By operator\n", f"| operator | {' | '.join(results)} |", "|---|---|---|---|---|"]
    counts = _by_group(verdicts)
    lines += [
        f"| {name} | {' | '.join(str(found[one]) for one in results)} |" for name, found in sorted(counts.items())
    ]
    lines += ["\n## Left out\n", "| reason | tests |", "|---|---|"]
    lines += [f"| {reason} | {count} |" for reason, count in left_out.most_common()]
    return "\n".join(lines) + "\n"


def _by_group(verdicts: dict[str, tuple[str, str, str]]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for operator, verdict, _ in verdicts.values():
        counts.setdefault(operator, Counter())[verdict] += 1
    return counts


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[result]} {result}" for result in (PASSES, REFUSED, WRONG, CRASHED))


def _cell(text: str) -> str:
    """A detail in a table: its first sentence."""
    return text.split("; ", maxsplit=1)[0].split("\n", maxsplit=1)[0].replace("|", "\\|")[:200]


def main() -> int:
    """Print the counts by group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of tests; default: all")
    parser.add_argument("--torch", action="store_true", help="stop at the PyTorch program")
    parser.add_argument("--details", action="store_true", help="a line for each test that does not pass")
    parser.add_argument("--out", metavar="FILE.md", help="write a page of the verdicts")
    options = parser.parse_args()
    verdicts: dict[str, tuple[str, str, str]] = {}
    for case in cases():
        if options.names and not any(name in case.name for name in options.names):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, detail = judge(case, options.torch)
        verdicts[case.name] = (group(case), result, detail)
        if options.details and result != PASSES:
            print(f"{result:8} {case.name}: {detail}", flush=True)
    for operator, found in sorted(_by_group(verdicts).items()):
        print(f"{operator:28} {_counted(found)}")
    total = Counter(verdict for _, verdict, _ in verdicts.values())
    print(f"{len(verdicts)} tests: {_counted(total)}")
    if options.out:
        command = f"python tests/importer/onnx_sweep.py --out {options.out}"
        left_out = Counter(reason for case in _all() if (reason := reason_to_leave_out(case)) is not None)
        Path(options.out).write_text(page(verdicts, left_out, command))
    return int(bool(total[WRONG] or total[CRASHED]))


if __name__ == "__main__":
    sys.exit(main())
