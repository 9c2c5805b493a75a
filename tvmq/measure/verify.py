"""Compares a bundle, operator by operator, with the NumPy oracle: equal bits for integers, a tolerance for floats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq import ir, ops
from tvmq.deploy import bundle as bundles
from tvmq.deploy.build import FLOAT_TOLERANCE, HALF_SUMS_TOLERANCE, agrees
from tvmq.deploy.bundle import Bundle
from tvmq.deploy.exact import is_exact
from tvmq.deploy.executor import Executor
from tvmq.deploy.session import Session, connect
from tvmq.deploy.steps import Step, StepRunner
from tvmq.dynamic import Dynamic
from tvmq.errors import OutputError
from tvmq.kernels.lowering import packing_of
from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.recipe_values import CALIBRATED, Precision

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class OpCheck:
    """One operator's comparison: how many of its elements differ, and by how much at most."""

    name: str
    kernel: str
    precision: str
    agrees: bool
    elements: int
    differing: int
    max_difference: float


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. `unchecked`: results that fusion hides. `saved`: the first difference's file, or None."""

    bundle: str
    device: str
    ops: list[OpCheck]
    unchecked: list[str]
    outputs_agree: bool
    saved: str | None

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return self.outputs_agree and all(op.agrees for op in self.ops)

    @property
    def first_difference(self) -> OpCheck | None:
        """The first operator that differs."""
        return next((op for op in self.ops if not op.agrees), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        exact = sum(op.precision in CALIBRATED for op in self.ops)
        if self.ok:
            return f"{len(self.ops)} operators agree with the oracle on {self.device}, {exact} of them bit for bit"
        bad = self.first_difference
        what = bad.name if bad else "the outputs, though each operator agrees on the bundle's own weights"
        saved = f"; inputs and results are in {self.saved}" if self.saved else ""
        return f"differs from the oracle on {self.device}: {what}{saved}"


def verify(
    path: str | Path | Bundle, device: str = "host", inputs: object = None, *, save: str | Path | None = None
) -> Verification:
    """Run a bundle on `device`, each operator on the oracle's own inputs to it, and compare.

    `inputs`: None means the golden ones. `save`: a folder that receives the first difference as OPERATOR.npz, with the
    operands arg0, arg1, ... (weights packed) and the result as `expected` and `got`; outputs.npz where the outputs
    alone differ. Of a bundle of several sizes each program is verified, operators named `NAME at SIZE`; with `inputs`
    the one that runs them. Raises BundleError, IsaError, DeviceError, SignatureError, OutputError.
    """
    bundle = path if isinstance(path, Bundle) else bundles.read(path)
    session = connect(device)
    try:
        if bundle.dynamic is None:
            return _verified(Executor(bundle, session), bundle, device, inputs, save)
        return _of_sizes(bundle, bundle.dynamic, session, inputs, save, device)
    finally:
        session.close()


def _of_sizes(
    bundle: Bundle, dynamic: Dynamic, session: Session, inputs: object, save: str | Path | None, device: str
) -> Verification:
    programs = dict(zip(dynamic.sizes, bundle.programs(), strict=True))
    if inputs is not None:
        arrays = dynamic.arrays(bundle.signature, inputs)
        named = {spec.name: array for spec, array in zip(bundle.signature.inputs, arrays, strict=True)}
        size = dynamic.program_for(dynamic.size_of(named))
        programs = {size: programs[size]}
        inputs = {name: dynamic.padded(name, array, size) for name, array in named.items()}
    found: list[Verification] = []
    for size, one in programs.items():
        wanted = save if all(other.saved is None for other in found) else None
        result = _verified(Executor(one, session), one, device, inputs, wanted)
        ops = [replace(op, name=f"{op.name} at {size}") for op in result.ops]
        found.append(replace(result, ops=ops, unchecked=[f"{name} at {size}" for name in result.unchecked]))
    return Verification(
        found[0].bundle,
        device,
        [op for one in found for op in one.ops],
        [name for one in found for name in one.unchecked],
        all(one.outputs_agree for one in found),
        next((one.saved for one in found if one.saved), None),
    )


def _verified(executor: Executor, bundle: Bundle, device: str, inputs: object, save: str | Path | None) -> Verification:
    arrays = bundle.golden()[0] if inputs is None else bundle.signature.arrays(inputs)
    oracle = _oracle(bundle, arrays)
    checks: list[OpCheck] = []
    unchecked: list[str] = []
    saved: Path | None = None
    runner = StepRunner(bundle, executor.session, executor.library)
    tensors = executor.tensors()
    tensors.update(
        {spec.name: executor.session.tensor(a) for spec, a in zip(bundle.signature.inputs, arrays, strict=True)}
    )
    for step, args, results in runner.run(tensors):
        for made, result in zip(step.results, results, strict=True):
            if made.name not in oracle.tensors:
                unchecked.append(made.name)
                continue
            # The device holds the bits of bfloat16.
            want = oracle.tensors[made.name]
            got = executor.session.fetch(result)
            got = got.view(want.dtype) if want.dtype == numerics.BF16 else got
            check = _compare(made.name, step, want, got, oracle.is_exact(made.name, step))
            if not check.agrees and save is not None and saved is None:
                operands = [executor.session.fetch(arg) for arg in args]
                saved = _save(Path(save), made.name, {**_numbered("arg", operands), "expected": want, "got": got})
            checks.append(check)
            # The next operators read what the oracle says, so that each is judged alone.
            tensors[made.name] = executor.session.tensor(want.view(made.dtype))
    exact, tolerance = bool(bundle.manifest["exact"]), float(bundle.manifest["tolerance"])
    # The oracle reads the bundle's own weights: what these should give is in the golden pair.
    wanted = oracle.outputs if inputs is not None else bundle.golden()[1]
    outputs = executor(*arrays)
    agree = all(agrees(want, got, exact, tolerance) for want, got in zip(wanted, outputs, strict=True))
    if not agree and save is not None and saved is None:
        whole = {**_numbered("arg", arrays), **_numbered("expected", wanted), **_numbered("got", outputs)}
        saved = _save(Path(save), "outputs", whole)
    name = str(bundle.path or bundle.manifest["name"])
    return Verification(name, device, checks, unchecked, agree, str(saved) if saved else None)


@dataclass(frozen=True)
class _Oracle:
    """Every tensor of the realized graph by name, its outputs, and the names of the tensors that are exact."""

    tensors: Mapping[str, Array]
    outputs: tuple[Array, ...]
    exact: frozenset[str]

    def is_exact(self, name: str, step: Step) -> bool:
        """Whether a step's result is exact; what TVM fused may hold operators that are not."""
        fused = step.kernel.startswith("tvm-fused")
        return name in self.exact and (not fused or len(self.exact) == len(self.tensors))


def realized_module(bundle: Bundle) -> tvm.IRModule:
    """The realized graph that a bundle was lowered from, with its weights as constants."""
    module, weights = _graph(bundle)
    params = ir.main(module).params
    count = len(params) - len(weights)
    constants = dict(zip(params[count:], map(ir.constant, weights), strict=True))
    function = ir.main(module)
    whole = tvm.relax.Function(params[:count], function.body, function.ret_ty, True, function.attrs)
    substituted = ir.rewrite(
        tvm.IRModule({"main": whole}), lambda _state, _name, value: ir.substitute(value, constants)
    )
    return substituted


def _graph(bundle: Bundle) -> tuple[tvm.IRModule, list[Array]]:
    """The realized graph, and its weights, which are its last parameters."""
    ops.register()
    module = tvm.ir.load_json(bundle.members[bundles.ORACLE].decode())
    weights = _weights(bundle)
    params = ir.main(module).params[-len(weights) :] if weights else []
    tables = {call.args[1] for _, call in ir.calls(module) if ir.is_call(call, "tvmq.embedding")}
    return module, [
        _stored_as(weight, ir.dtype_of(param), matrix=len(ir.shape_of(param)) == 2 and param not in tables)
        for weight, param in zip(weights, params, strict=True)
    ]


def _oracle(bundle: Bundle, inputs: tuple[Array, ...]) -> _Oracle:
    module, weights = _graph(bundle)
    tensors: dict[str, Array] = {}
    outputs = interpret.run(module, [*inputs, *weights], lambda name, array: tensors.update({name: array}))
    inexact = {str(var.name) for var, call in ir.calls(module) if not is_exact(call)}
    return _Oracle(tensors, outputs, frozenset(tensors) - inexact)


def _stored_as(weight: Array, dtype: str, *, matrix: bool) -> Array:
    """An unpacked weight as the oracle has it, a matrix [K, N].

    Packed ones hold the bits of bfloat16, Winograd's its float32 values.
    """
    if matrix:
        weight = weight.reshape(weight.shape[0], -1).T
    return weight.astype(dtype) if weight.dtype.kind == "f" else weight.view(dtype)


def _weights(bundle: Bundle) -> list[Array]:
    """The oracle's weights, unpacked from the bundle's parameters, in the order of its own."""
    parameters = bundle.parameters()
    packed = [entry for entries in bundle.manifest["packed"].values() for entry in entries]
    return [packing_of(entry).unpack(parameters[entry["parameter"]]) for entry in packed]


def _compare(name: str, step: Step, want: Array, got: Array, exact: bool) -> OpCheck:
    tolerance = HALF_SUMS_TOLERANCE if step.precision == Precision.FP16.value else FLOAT_TOLERANCE
    agree = agrees(want, got, exact, tolerance)
    want, got = numerics.widened(want), numerics.widened(got)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        difference = np.nan_to_num(np.abs(want.astype(np.float64) - got.astype(np.float64)))
    differing = int(((want != got) & ~(_is_nan(want) & _is_nan(got))).sum())
    largest = float(difference.max(initial=0.0))
    return OpCheck(name, step.kernel, step.precision, agree, want.size, differing, largest)


def _is_nan(array: Array) -> Array:
    return np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)


def _numbered(label: str, arrays: Sequence[Array]) -> dict[str, Array]:
    return {f"{label}{i}": array for i, array in enumerate(arrays)}


def _save(folder: Path, name: str, arrays: Mapping[str, Array]) -> Path:
    """Write NAME.npz; bfloat16, which NumPy's format lacks, as float32. Raises OutputError."""
    # The name is the bundle's to choose: it must not lead out of the folder.
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **{label: numerics.widened(array) for label, array in arrays.items()})  # type: ignore[arg-type]
    except OSError as error:
        raise OutputError(f"cannot write {path}", seen=error.strerror or str(error)) from error
    return path
