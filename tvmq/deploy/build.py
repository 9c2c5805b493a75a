"""From a scheduled module to a bundle: compile, link for the target, run once where this machine can, write."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq import ir
from tvmq._version import __version__
from tvmq.cpuinfo import host_features
from tvmq.deploy import bundle
from tvmq.deploy.bundle import Bundle
from tvmq.deploy.crosslink import linker
from tvmq.deploy.exact import is_exact_graph, rounds_inexact
from tvmq.deploy.executor import Executor
from tvmq.deploy.parameters import shared
from tvmq.deploy.session import LocalSession
from tvmq.deploy.steps import Step, extract, with_entry_points
from tvmq.dynamic import Dynamic
from tvmq.errors import CheckFailed
from tvmq.files import scratch_folder
from tvmq.kernels import memory
from tvmq.kernels.lowering import Lowered
from tvmq.kernels.prepare import PREPARE
from tvmq.kernels.schedule import build
from tvmq.model import Model
from tvmq.quantize import numerics, wide
from tvmq.quantize.decisions import Decision
from tvmq.quantize.partition import Conversions
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.target import Target, describe

Array = npt.NDArray[Any]
# A float graph on another instruction set sums in another order: errors relative to the largest output.
FLOAT_TOLERANCE = 1e-3
# Of operators on float16, whose sums of 16 products may be float16: 8e-4 was measured at 4608 positive inputs.
HALF_SUMS_TOLERANCE = 4e-3
# Sums in another order round to the next bfloat16 here and there, and later layers see it. Measured on the zoo, whose
# random weights damp nothing: 0.3 % (ResNet-18) to 1.5 % (MobileNetV2), a third of what bfloat16 itself costs there.
# So do sums that are quantized to 8 bits: a step here and there. Operator by operator, `verify` is as strict as ever.
ROUNDED_TOLERANCE = 0.1


@dataclass(frozen=True)
class Product:
    """Everything that a bundle is made of, before it is compiled. `lowered.module` is scheduled.

    conversions: between floats and int8 inputs and outputs; None for a bundle that takes and gives what the model does.
    objects: a folder that receives the object files of the library, None for none.
    """

    model: Model
    target: Target
    recipe: Recipe
    table: CalibrationTable | None
    decisions: tuple[Decision, ...]
    realized: tvm.IRModule
    lowered: Lowered
    conversions: Conversions | None = None
    objects: Path | None = None

    @functools.cached_property
    def steps(self) -> list[Step]:
        """The kernel calls of an inference."""
        return extract(self.lowered.module, self.lowered.kernels)

    @functools.cached_property
    def exact(self) -> bool:
        """Whether every result is promised bit for bit."""
        return is_exact_graph(self.realized)

    @functools.cached_property
    def tolerance(self) -> float:
        """How far outputs that are not exact may be from the oracle's, relative to the largest."""
        return ROUNDED_TOLERANCE if rounds_inexact(self.realized) else FLOAT_TOLERANCE

    @functools.cached_property
    def parameters(self) -> tuple[bytes, list[dict[str, Any]]]:
        """The parameters as one block, and where each is: the check and the bundle read the same."""
        return bundle.pack_parameters(self.lowered.parameters)


def compile_library(product: Product) -> bytes:
    """The shared library of the target. Raises OutputError or DeviceError where linking fails."""
    executable = build(with_entry_points(product.lowered.module), product.target)
    with scratch_folder() as folder:
        path = folder / bundle.LIBRARY
        executable.export_library(str(path), fcompile=linker(product.target.zig_triple, product.objects))
        return path.read_bytes()


def check(product: Product, library: bytes, expected: tuple[Array, ...]) -> None:
    """Run the library here on the example, where this machine has the instructions, and compare with the oracle.

    Raises CheckFailed: the bundle is not written.
    """
    if not runs_here(product.target):
        return
    executor = Executor(Bundle(_manifest(product), _members(product, library, expected)), LocalSession())
    for index, (want, got) in enumerate(zip(expected, executor(*product.model.example), strict=True)):
        if not agrees(want, got, product.exact, product.tolerance):
            worst = float(np.abs(want.astype(np.float64) - got.astype(np.float64)).max(initial=0.0))
            raise CheckFailed(
                f"the compiled {product.model.name} disagrees with the oracle in output {index}",
                expected="equal bits" if product.exact else f"a relative error below {product.tolerance:g}",
                seen=f"a difference of {worst:.3g}",
                hint="this is a bug in tvmq: please report the model",
            )


def agrees(want: Array, got: Array, exact: bool, tolerance: float = FLOAT_TOLERANCE) -> bool:
    """Equal bits where `exact`; else floats within `tolerance`, relative to the largest expected magnitude.

    The last place of 16 bits (2**-7 or 2**-10 of its value at most) may differ besides: a sum decides its rounding.
    Inexact integers came from floats that differ a little: of 8 bits they differ by one step at most, of int16 by that
    and by what floats may; choices (an index, a comparison) may turn out otherwise.
    """
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    if exact:
        return bool(np.array_equal(want, got, equal_nan=want.dtype.kind in "fV"))
    if str(want.dtype) in numerics.INTEGERS:
        steps, reach = want.astype(np.int32) - got, 0.0
        if want.dtype == wide.DTYPE:
            reach = tolerance * float(np.abs(want.astype(np.int32)).max(initial=0))
        return bool((np.abs(steps) <= 1 + reach).all())
    if want.dtype.kind in "iub":
        return True
    place = {numerics.BF16: 2.0**-7, numerics.FP16: 2.0**-10}.get(want.dtype, 0.0)
    want, got = numerics.widened(want), numerics.widened(got)
    scale = float(np.abs(want[np.isfinite(want)]).max(initial=0.0))
    return bool(np.allclose(want, got, rtol=place, atol=tolerance * scale + 1e-12, equal_nan=True))


def runs_here(target: Target) -> bool:
    """Whether this machine has the architecture and the instructions of `target`."""
    return target.triple.split("-", maxsplit=1)[0] == platform.machine() and not target.missing_features(
        host_features()
    )


@dataclass(frozen=True)
class Built:
    """A product, its library, and what the oracle gives for the example."""

    product: Product
    library: bytes
    expected: tuple[Array, ...]


def write_bundle(
    built: Sequence[Built], out: str | Path, dynamic: Dynamic | None = None
) -> tuple[Path, int, list[dict[str, Any]]]:
    """Write the bundle of one program, or of one a size, ascending; returns its path, its size in bytes and the
    operator rows of the first. Raises OutputError.
    """
    parameters, indices = shared([one.product.parameters for one in built])
    manifests = [{**_manifest(one.product), "parameters": index} for one, index in zip(built, indices, strict=True)]
    members = {**_members(built[0].product, built[0].library, built[0].expected), bundle.PARAMETERS: parameters}
    manifest, *others = manifests
    if dynamic is not None:
        programs = [{key: value for key, value in other.items() if value != manifest[key]} for other in others]
        manifest = {**manifest, "dynamic": {**dynamic.to_dict(), "programs": programs}}
        for size, one in zip(dynamic.sizes[1:], built[1:], strict=True):
            own = _members(one.product, one.library, one.expected)
            members.update({f"{size}/{name}": own[name] for name in bundle.OF_A_SIZE})
    size = bundle.write(out, manifest, members)
    return Path(out), size, manifest["operators"]


def _manifest(product: Product) -> dict[str, Any]:
    _, index = product.parameters
    model = product.model
    return {
        "name": model.name,
        "target": describe(product.target),
        "isa": {"required_features": list(product.target.isa.required_features)},
        "signature": {
            "inputs": [dataclasses.asdict(spec) for spec in model.signature.inputs],
            "outputs": [dataclasses.asdict(spec) for spec in model.signature.outputs],
        },
        "conversions": product.conversions.to_dict() if product.conversions is not None else None,
        "recipe": product.recipe.to_dict(),
        "calibration_sha256": product.table.sha256() if product.table else None,
        "versions": {name: _version(name) for name in ("tvmq", "apache-tvm", "apache-tvm-ffi", "torch", "numpy")},
        "exact": product.exact,
        "tolerance": product.tolerance,
        "activation_bytes": memory.activation_bytes(product.lowered.module),
        "operators": operators(product),
        "converters": dict(product.model.converters),
        "parameters": index,
        "prepared": _prepared(product),
        "packed": {
            name: [{"parameter": parameter, **dataclasses.asdict(packing)} for parameter, packing in constants]
            for name, constants in product.lowered.packed.items()
        },
        "steps": [dataclasses.asdict(step) for step in product.steps],
    }


def _prepared(product: Product) -> dict[str, Any]:
    """What `prepared` reads: see deploy/prepared.py."""
    lowered = product.lowered
    count = len(lowered.module[PREPARE].params) if lowered.prepared else 0
    weights = [
        {"name": name, "kernel": lowered.kernels[name], "reads": list(reads)}
        for name, reads in lowered.prepared.items()
    ]
    return {"parameters": count, "weights": weights}


def _members(product: Product, library: bytes, expected: tuple[Array, ...]) -> dict[str, bytes]:
    parameters, _ = product.parameters
    members = {
        bundle.LIBRARY: library,
        bundle.PARAMETERS: parameters,
        bundle.GOLDEN: bundle.pack_golden(product.model.example, expected),
        bundle.ORACLE: oracle(product).encode(),
    }
    if product.table is not None:
        members[bundle.CALIBRATION] = product.table.to_json().encode()
    return members


def oracle(product: Product) -> str:
    """The realized graph as JSON; weights that were packed are parameters, to be unpacked from the bundle's own."""
    packed = product.lowered.packed

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        if name not in packed:
            return None
        args = list(value.args)
        # What is packed are the first constants: after an input, or from the start of what dequantizes a weight.
        first = next(i for i, arg in enumerate(args) if ir.is_constant(arg))
        for i, (parameter, _) in enumerate(packed[name], first):
            args[i] = state.parameter(parameter, ir.to_numpy(args[i]))
        return tvm.relax.Call(value.op, args, value.attrs)

    return str(tvm.ir.save_json(ir.rewrite(product.realized, visit)))


def operators(product: Product) -> list[dict[str, Any]]:
    """One row an operator of the realized graph: name, path, kind, precision, kernel, step, reason, note, tuning.

    `step`: the kernel call that computes it, "" where a neighbour's does. `tuning`: where the kernel's parameters are
    from ("tuned", "near match", "default"), "" where it has none.
    """
    steps = {step.out: step for step in product.steps}
    rows = []
    for decision in product.decisions:
        step = _computing(steps, decision.name)
        choice = product.lowered.choices.get(step.out) if step else None
        rows.append(
            {
                "name": decision.name,
                "path": product.model.paths.get(decision.name, decision.name),
                "kind": decision.kind,
                "precision": decision.precision.value,
                "kernel": step.kernel if step else "fused with a neighbour",
                "step": step.out if step else "",
                "reason": decision.reason,
                "note": product.lowered.notes.get(step.out, "") if step else "",
                "tuning": choice.source if choice else "",
            }
        )
    return rows


def _computing(steps: Mapping[str, Step], name: str) -> Step | None:
    """The call that computes the tensor `name`: of one that only reshapes another's result, that other."""
    step = steps.get(name)
    while step is not None and not step.symbol and step.args[0] in steps:
        step = steps[step.args[0]]
    return step


def _version(package: str) -> str:
    return __version__ if package == "tvmq" else metadata.version(package)
