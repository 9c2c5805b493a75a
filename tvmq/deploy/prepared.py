"""What main takes of a bundle's parameters: they themselves, and what `prepare` of its library makes of the last ones.

The manifest has as `prepared` how many parameters these are, and in order what is made of them: `weights` with a name,
the kernel that makes it, and the parameters that it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvmq.deploy.bundle import Bundle
from tvmq.deploy.session import Session
from tvmq.errors import BundleError
from tvmq.kernels.prepare import PREPARE


def on_device(bundle: Bundle, session: Session, machine: Any, shared: dict[Any, Any]) -> dict[str, Any]:
    """Tensors on the device by name, in the order in which main takes them after its inputs.

    shared: those that other programs of the bundle have brought there, or made, by where they are from; it learns of
    more. Raises BundleError for a manifest that does not fit its parameters.
    """
    places = {entry["name"]: (entry["offset"], entry["dtype"], tuple(entry["shape"])) for entry in _entries(bundle)}
    for name, array in bundle.parameters().items():
        if places[name] not in shared:
            shared[places[name]] = session.tensor(array)
    stored = {name: shared[place] for name, place in places.items()}
    count, makers = _prepared(bundle, places)
    if not makers:
        return stored
    names = list(stored)[: len(stored) - count]
    reads = list(stored.values())[len(names) :]
    made = session.call(lambda: prepare(machine, reads))
    if len(made) != len(makers):
        raise BundleError(
            f"{bundle.where}: prepared", expected=f"{len(made)} weights, as its library makes", seen=len(makers)
        )
    # Of what another program has made by the same kernel of the same parameters, one is kept.
    weights = {name: shared.setdefault(maker, each) for (name, maker), each in zip(makers.items(), made, strict=True)}
    return {**{name: stored[name] for name in names}, **weights}


def _entries(bundle: Bundle) -> Sequence[Mapping[str, Any]]:
    entries: Sequence[Mapping[str, Any]] = bundle.manifest["parameters"]
    return entries


def _prepared(bundle: Bundle, places: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many parameters `prepare` takes; name -> the kernel and the places of what it reads, of each it makes."""
    found = bundle.manifest.get("prepared")
    if found is None:  # of a tvmq that had none
        return 0, {}
    try:
        weights = found["weights"]
        makers = {str(each["name"]): (each["kernel"], *(places[name] for name in each["reads"])) for each in weights}
        read = {name for each in weights for name in each["reads"]}
        if found["parameters"] != len(read):
            raise ValueError(f"{found['parameters']} parameters for {len(read)}")
        return len(read), makers
    except (KeyError, TypeError, ValueError) as error:
        expected = "weights that are made of parameters"
        raise BundleError(f"{bundle.where}: prepared", expected=expected, seen=repr(error)) from error


def prepare(machine: Any, reads: Sequence[Any]) -> list[Any]:
    """What a library's `prepare` makes of parameters."""
    machine.set_input(PREPARE, *reads)
    machine.invoke_stateful(PREPARE)
    return results_of(machine, PREPARE)


def results_of(machine: Any, name: str) -> list[Any]:
    """The tensors that a function gave when it was invoked."""
    result = machine.get_outputs(name)
    # One tensor over RPC comes by itself; a tuple has no `numpy`.
    return [result] if hasattr(result, "numpy") else list(result)
