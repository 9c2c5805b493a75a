"""From the fields of `relay.quantize.qconfig` (TVM 0.8 to 0.19) to a recipe: all 17, and what each becomes.

relay's integers were symmetric with one scale a tensor, `threshold / 2**(bits - 1)`, limited to
[-(2**(bits - 1) - 1), 2**(bits - 1) - 1]. Here thresholds of data are divided by `2**(bits - 1) - 1`, which uses the
same integers without cutting the threshold itself off. Inputs of 16 bits are those of the precision int16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvmq.errors import RecipeError, nearest

# The defaults of the Python class in TVM 0.18, `python/tvm/relay/quantize/quantize.py`.
DEFAULTS: Mapping[str, Any] = {
    "nbit_input": 8,
    "nbit_weight": 8,
    "nbit_activation": 32,
    "dtype_input": "int8",
    "dtype_weight": "int8",
    "dtype_activation": "int32",
    "calibrate_mode": "global_scale",
    "global_scale": 8.0,
    "weight_scale": "power2",
    "skip_dense_layer": True,
    "skip_conv_layers": [0],
    "do_simulation": False,
    "round_for_shift": True,
    "debug_enabled_ops": None,
    "rounding": "UPWARD",
    "calibrate_chunk_by": -1,
    "partition_conversions": "disabled",
}
_OBSERVERS: Mapping[str, Mapping[str, Any]] = {
    "global_scale": {"observer": "fixed"},
    "kl_divergence": {"observer": "entropy"},
    "percentile": {"observer": "percentile", "percentile": 99.999},
}
# The other number of bits that inputs may have.
_WIDE = 16
# relay's operators and the kinds that they are here; its others move integers, and follow their inputs.
_KINDS = {
    "nn.conv2d": ("conv2d",),
    "nn.dense": ("matmul",),
    "add": ("add",),
    "nn.relu": ("unary",),
    "clip": ("unary",),
    "nn.avg_pool2d": ("avg_pool2d",),
    "nn.global_avg_pool2d": ("avg_pool2d",),
    "nn.max_pool2d": ("max_pool2d",),
    "concatenate": ("concat",),
}


def recipe_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `Recipe` for the fields of a qconfig; those not given have relay's defaults.

    Raises RecipeError for an unknown field, and for values that have no meaning here.
    """
    return {key: value for name, given in _complete(fields).items() for key, value in _part(name, given, fields)[0]}


def meanings(fields: Mapping[str, Any]) -> dict[str, str]:
    """What each of the 17 fields, with the values in `fields` or relay's defaults, becomes here: a sentence each."""
    return {name: _part(name, given, fields)[1] for name, given in _complete(fields).items()}


def _complete(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name in fields:
        if name not in DEFAULTS:
            expected = f"one of {', '.join(DEFAULTS)}"
            raise RecipeError(f"qconfig: unknown field {name!r}", expected=expected, hint=nearest(name, DEFAULTS))
    return {**DEFAULTS, **fields}


_Part = tuple[list[tuple[str, Any]], str]


def _part(name: str, value: Any, fields: Mapping[str, Any]) -> _Part:
    return _PARTS[name](name, value, fields)


def _weight_bits(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
    _require(name, _is_bits(value), "2 to 8 bits", value)
    return [("weight_bits", value)], f"weight_bits = {value}"


def _input_bits(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
    _require(name, _is_bits(value) or value == _WIDE, f"2 to 8 bits, or {_WIDE}", value)
    if value == _WIDE:
        said = "convolutions and linear layers read int16, other operators are float32"
        return [("precision", "int16")], f"precision = 'int16': {said}"
    return [("precision", "int8"), ("activation_bits", value)], f"precision = 'int8', activation_bits = {value}"


def _is_bits(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 8


def _input_dtype(name: str, value: Any, fields: Mapping[str, Any]) -> _Part:
    wide = _complete(fields)["nbit_input"] == _WIDE
    known = ("int8", "int16") if wide else ("int8",)
    _require(name, value in known, " or ".join(map(repr, known)), value)
    stored = "of 16 bits are stored in 16" if wide else "of 8 bits and fewer are stored in 8"
    return [], f"nothing: activations {stored}"


def _sums(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
    """relay's fields of what is between operators: sums of products and of residual branches."""
    known: tuple[Any, ...] = (32, 16) if name == "nbit_activation" else ("int32", "int16")
    _require(name, value in known, " or ".join(map(repr, known)), value)
    return [], "nothing: sums are int32 (of int16 inputs float32 by blocks), which hold those of 16 and 32 bits"


def _only(*allowed: Any, why: str) -> Callable[[str, Any, Mapping[str, Any]], _Part]:
    def part(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
        _require(name, value in allowed, " or ".join(map(repr, allowed)), value)
        return [], why

    return part


def _mode(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
    _require(name, value in _OBSERVERS, f"one of {', '.join(_OBSERVERS)}", value)
    # relay did nothing else for accuracy.
    chosen = [("symmetric", True), ("narrow_range", True), ("algorithms", ()), *_OBSERVERS[value].items()]
    said = "".join(f"{key} = {given!r}, " for key, given in _OBSERVERS[value].items())
    return chosen, f"{said}symmetric = True, narrow_range = True, algorithms = []"


def _global_scale(name: str, value: Any, fields: Mapping[str, Any]) -> _Part:
    _require(name, isinstance(value, int | float) and value > 0, "a number above 0", value)
    top = 2 ** (_complete(fields)["nbit_input"] - 1)
    bound = float(value) * (top - 1) / top  # so that the scale is value / top, as relay's was
    used = _complete(fields)["calibrate_mode"] == "global_scale"
    return [("fixed_range", bound)], f"fixed_range = {bound:g}" + ("" if used else ", unused in this calibrate_mode")


def _weight_scale(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
    _require(name, value in ("power2", "max"), "power2 or max", value)
    power = "weights" if value == "power2" else "none"
    return [("per_channel", False), ("power_of_two", power)], f"per_channel = False, power_of_two = {power!r}"


def _rules(name: str, _value: Any, fields: Mapping[str, Any]) -> _Part:
    """Both fields that skip layers, as one list; `skip_conv_layers` carries it."""
    complete = _complete(fields)
    dense, convs = complete["skip_dense_layer"], complete["skip_conv_layers"] or []
    _require("skip_dense_layer", isinstance(dense, bool), "true or false", dense)
    _require("skip_conv_layers", all(isinstance(i, int) and i >= 0 for i in convs), "a list of indices", convs)
    if name == "skip_dense_layer":
        return [], "rule: 'matmul' is fp32" if dense else "no rule"
    patterns = [*(f"conv2d#{index}" for index in convs), *(["matmul"] if dense else [])]
    said = ", ".join(f"'conv2d#{index}' is fp32" for index in convs)
    rules = [{"match": pattern, "precision": "fp32"} for pattern in patterns]
    return [("rules", rules)], f"rules: {said}" if said else "no rule"


def _enabled(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
    if value is None:
        return [], "kinds: all"
    for op in value:
        _require(name, op in _KINDS, f"some of {', '.join(_KINDS)}", op)
    kinds = tuple(dict.fromkeys(kind for op in value for kind in _KINDS[op]))
    return [("kinds", kinds)], f"kinds = {', '.join(kinds)}"


def _simulation(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
    _require(name, isinstance(value, bool), "true or false", value)
    return [("simulate", value)], f"simulate = {value}: the bundle rounds to integers and back, and computes in float"


def _partition(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
    _require(name, value in ("disabled", "enabled", "fully_integral"), "disabled, enabled or fully_integral", value)
    return [("integer_io", value != "disabled")], f"integer_io = {value != 'disabled'}"


def _chunk(name: str, value: Any, _fields: Mapping[str, Any]) -> _Part:
    _require(name, isinstance(value, int), "an integer", value)
    return [], "nothing: ranges are updated sample by sample, in memory that does not grow with them"


def _require(name: str, holds: bool, expected: str, seen: object) -> None:
    if not holds:
        raise RecipeError(f"qconfig: {name}", expected=expected, seen=repr(seen))


_PARTS: Mapping[str, Callable[[str, Any, Mapping[str, Any]], _Part]] = {
    "nbit_input": _input_bits,
    "nbit_weight": _weight_bits,
    "nbit_activation": _sums,
    "dtype_input": _input_dtype,
    "dtype_weight": _only("int8", why="nothing: weights of 8 bits and fewer are stored in 8"),
    "dtype_activation": _sums,
    "calibrate_mode": _mode,
    "global_scale": _global_scale,
    "weight_scale": _weight_scale,
    "skip_dense_layer": _rules,
    "skip_conv_layers": _rules,
    "do_simulation": _simulation,
    "round_for_shift": _only(True, False, why="nothing: rescaling is a product in float32, rounded to nearest even"),
    "debug_enabled_ops": _enabled,
    "rounding": _only("UPWARD", "TONEAREST", why="nothing: rounding is to nearest, ties to even"),
    "calibrate_chunk_by": _chunk,
    "partition_conversions": _partition,
}
