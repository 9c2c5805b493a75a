"""Each operator that we convert ourselves: ours is PyTorch's, and TVM's own still fails (else ours may go)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from torch.nn import functional
from tvm.relax.frontend.torch import from_exported_program

from tvmq import ir
from tvmq.errors import ModelError
from tvmq.importer import converters, decompositions
from tvmq.importer.check import deviation
from tvmq.importer.load import import_model
from tvmq.oracle import interpret

Function = Callable[..., torch.Tensor]


class Call(nn.Module):
    """A module of one function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def _seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IMAGE = _seeded(2, 6, 9, 10)
ROWS = _seeded(2, 5, 7)
TIES = torch.tensor([[2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 2.0]])
EYE = torch.eye(7) + 0.5
INTEGERS = torch.tensor([[1, -3, 5]])
GRID = torch.linspace(-1.2, 1.2, 2 * 4 * 5 * 2).reshape(2, 4, 5, 2)
NORM = nn.GroupNorm(3, 6)
nn.init.uniform_(NORM.bias)


def _written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 0] = 1.0
    y[:, :, 2:4] = x[:, :, :2]
    return y


VOLUMES = _seeded(2, 3, 3, 2, 3)


def _scattered(reduce: str, include_self: bool = True) -> Function:
    index = torch.tensor([[[0, 0, 4], [1, 2, 1]]])
    return lambda x: x[:1].scatter_reduce(1, index, x[:1, :4] * 3, reduce, include_self=include_self)


# Operators for which TVM's importer (0.27) raises, or gives another result: name -> function, inputs.
BROKEN: dict[str, tuple[Function, tuple[torch.Tensor, ...]]] = {
    "select from the end": (lambda x: x.select(1, -1), (IMAGE,)),
    "index from the end": (lambda x: x[:, -1], (ROWS,)),
    "index by negative constants": (lambda x: x[:, [-1, 0]], (ROWS,)),
    "index by negative inputs": (lambda x, i: x[:, i], (ROWS, torch.tensor([-2, 0, 3]))),
    "index by two lists": (lambda x: x[:, [0, 2, 1], [1, 3, 0]], (ROWS,)),
    "index over the last axes": (lambda x: x[:, :, torch.tensor([[0, -1]]), torch.tensor([[1], [2]])], (IMAGE,)),
    "nearest to a larger size": (lambda x: functional.interpolate(x, size=(13, 17)), (IMAGE,)),
    "nearest to a smaller size": (lambda x: functional.interpolate(x, size=(5, 4)), (IMAGE,)),
    "nearest by a fraction": (lambda x: functional.interpolate(x, scale_factor=1.7), (IMAGE,)),
    "bilinear by a fraction": (lambda x: functional.interpolate(x, scale_factor=1.7, mode="bilinear"), (IMAGE,)),
    "bilinear to a half": (lambda x: functional.interpolate(x, scale_factor=0.5, mode="bilinear"), (IMAGE,)),
    "bilinear, corners of one column": (
        lambda x: functional.interpolate(x, size=(5, 1), mode="bilinear", align_corners=True),
        (IMAGE,),
    ),
    "linear by a whole number": (lambda x: functional.interpolate(x, scale_factor=2, mode="linear"), (ROWS,)),
    "linear by a fraction": (lambda x: functional.interpolate(x, scale_factor=1.7, mode="linear"), (ROWS,)),
    "linear, corners": (lambda x: functional.interpolate(x, size=9, mode="linear", align_corners=True), (ROWS,)),
    "trilinear": (lambda x: functional.interpolate(x, size=(4, 1, 5), mode="trilinear"), (IMAGE[None],)),
    "trilinear, corners": (
        lambda x: functional.interpolate(x, size=(4, 1, 5), mode="trilinear", align_corners=True),
        (IMAGE[None],),
    ),
    "trilinear by a fraction": (
        lambda x: functional.interpolate(x, scale_factor=(1.7, 0.5, 1.3), mode="trilinear"),
        (IMAGE[None],),
    ),
    "nearest of volumes": (lambda x: functional.interpolate(x, scale_factor=(1, 2, 3)), (IMAGE[None],)),
    "nearest of volumes by a fraction": (lambda x: functional.interpolate(x, scale_factor=1.5), (IMAGE[None],)),
    "bilinear with antialias": (
        lambda x: functional.interpolate(x, size=(4, 5), mode="bilinear", antialias=True),
        (IMAGE,),
    ),
    "selu": (functional.selu, (IMAGE,)),
    "integers divided by fractions, rounded": (
        lambda x: x + torch.div(torch.arange(x.shape[-1]), torch.tensor(2.5), rounding_mode="floor"),
        (IMAGE,),
    ),
    "fractions divided by integers, rounded": (
        lambda x: x + torch.div(torch.arange(x.shape[-1]).float(), 2, rounding_mode="floor"),
        (IMAGE,),
    ),
    "remainders of infinities": (
        torch.remainder,
        (torch.tensor([-3.0, 3.0, -1.0, 5.5, -5.5]), torch.tensor([np.inf, np.inf, -np.inf, -2.0, 2.0])),
    ),
    "average with a divisor": (lambda x: functional.avg_pool2d(x, 3, divisor_override=2), (IMAGE,)),
    "padded average with a divisor": (
        lambda x: functional.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True, divisor_override=5),
        (IMAGE,),
    ),
    "max pool, ceil": (lambda x: functional.max_pool2d(x, 2, ceil_mode=True), (IMAGE,)),
    "max pool of one image, ceil": (lambda x: functional.max_pool2d(x, 2, ceil_mode=True), (ROWS,)),
    "adaptive max, equal windows": (lambda x: functional.adaptive_max_pool2d(x, (3, 5)), (IMAGE,)),
    "adaptive max, unequal windows": (lambda x: functional.adaptive_max_pool2d(x, (4, 3)), (IMAGE,)),
    "group norm without weights": (lambda x: functional.group_norm(x, 3), (IMAGE,)),
    "any of all": (lambda x: (x > 1).any(), (IMAGE,)),
    "any of numbers": (lambda x: x.round().any(1), (IMAGE,)),
    "any over dimensions of numbers": (lambda x: torch.any(x.round(), dim=(1, 2), keepdim=True), (IMAGE,)),
    "amax": (lambda x: x.amax(1), (IMAGE,)),
    "amax of all": (lambda x: x.amax(), (IMAGE,)),
    "amin over dimensions": (lambda x: x.amin((1, -1), keepdim=True), (IMAGE,)),
    "values of min": (lambda x: x.min(1)[0], (IMAGE,)),
    "indices of min": (lambda x: x.min(1, keepdim=True)[1], (IMAGE,)),
    "prod over a dimension": (lambda x: x.prod(1), (IMAGE,)),
    "exp2": (torch.exp2, (IMAGE,)),
    "exp2 of integers": (torch.exp2, (INTEGERS,)),
    "image to columns": (lambda x: functional.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=2), (IMAGE,)),
    "windows of a dimension": (lambda x: x.unfold(2, 3, 2), (IMAGE,)),
    "stable sort": (lambda x: torch.sort(x, dim=1, stable=True)[0], (TIES,)),
    "indices of a stable sort": (lambda x: torch.sort(x, dim=1, stable=True)[1], (TIES,)),
    "indices of a descending sort": (lambda x: torch.sort(x, descending=True, stable=True)[1], (TIES,)),
    "add with alpha": (lambda x: torch.add(x, x * x, alpha=3), (ROWS,)),
    "sub with alpha": (lambda x: torch.sub(x, x * x, alpha=3), (ROWS,)),
    "matrices of integers": (lambda x: x @ x.T, (INTEGERS,)),
    "matrices of halves": (lambda x: x.half() @ x.half().transpose(1, 2), (ROWS,)),
    "addmm of halves": (lambda x: torch.addmm(x[0].half(), x[0].half(), EYE.half(), beta=2), (ROWS,)),
    "linear of halves": (lambda x: functional.linear(x.half(), EYE.half(), EYE[0].half()), (ROWS,)),
    "integers by integers": (lambda x: x / 2, (INTEGERS,)),
    "integers times a fraction": (lambda x: x * 0.5, (INTEGERS,)),
    "integers plus a fraction": (lambda x: x + 0.5, (INTEGERS,)),
    "integers against a fraction": (lambda x: x < 4.5, (torch.tensor([3, 4, 5]),)),
    "places of maxima": (lambda x: functional.max_pool2d(x, 3, 2, 1, return_indices=True)[1], (IMAGE,)),
    "places of maxima of negative numbers": (
        lambda x: functional.max_pool2d(x.abs() * 0 - 1, 2, 2, 1, ceil_mode=True, return_indices=True)[1],
        (IMAGE,),
    ),
    "places of adaptive maxima": (
        lambda x: functional.adaptive_max_pool2d(x, (4, 3), return_indices=True)[1],
        (IMAGE,),
    ),
    "averages of volumes with a divisor": (lambda x: functional.avg_pool3d(x, 2, divisor_override=3), (IMAGE,)),
    "transposed convolution of volumes": (
        lambda x: functional.conv_transpose3d(x, VOLUMES, stride=2, padding=1, output_padding=1, groups=2),
        (IMAGE,),
    ),
    "scatter with repeats, amax": (_scattered("amax"), (ROWS,)),
    "scatter with repeats, mean": (_scattered("mean"), (ROWS,)),
    "scatter with repeats, prod alone": (_scattered("prod", include_self=False), (ROWS,)),
    "scatter into a part": (lambda x: x.scatter(1, torch.tensor([[[0, 4, 1]], [[2, 2, 3]]]), x * 2), (ROWS,)),
    "index put": (lambda x: x.index_put((torch.tensor([1, -1]), torch.tensor([0, 3])), x[:, 0] * 2), (ROWS,)),
    "index put by a mask": (lambda x: x.index_put((x > 0,), torch.tensor(7.0)), (ROWS,)),
    "index add": (lambda x: x.index_add(1, torch.tensor([1, 1, 0]), x[:, :3], alpha=2), (ROWS,)),
    "index copy": (lambda x: x.index_copy(2, torch.tensor([6, 0]), x[:, :, :2] * 2), (ROWS,)),
    "take": (lambda x: torch.take(x, torch.tensor([[3, -1], [0, 69]])), (ROWS,)),
    "masked scatter": (lambda x: x.masked_scatter(x > 0, x * 10), (ROWS,)),
    "limits of integers": (lambda x: x.clamp(min=0), (INTEGERS,)),
    "searchsorted": (lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x, right=True), (ROWS,)),
    "conjunction as a product": (lambda x: (x > 0) * (x < 1), (ROWS,)),
    "running sum of short integers": (lambda x: x.int().cumsum(1), (INTEGERS,)),
    "sum of a scalar": (lambda x: x.sum().sum(0), (ROWS,)),
    "complement of erf": (torch.erfc, (ROWS,)),
    "logaddexp": (lambda x: torch.logaddexp(x * 50, x.flip(0) * 50), (ROWS,)),
    "fmax": (lambda x: torch.fmax(x.sqrt(), x), (ROWS,)),
    "sign of zero": (lambda x: torch.signbit(x * 0), (ROWS,)),
    "grid sample": (lambda x: functional.grid_sample(x, GRID, align_corners=False), (IMAGE,)),
}
# What our converters must keep right where TVM's are right too.
SOUND: dict[str, tuple[Function, tuple[torch.Tensor, ...]]] = {
    "maxima of volumes": (lambda x: functional.max_pool3d(x, 2, 2, 1, 2, ceil_mode=True), (IMAGE,)),
    "averages of volumes, ceil": (lambda x: functional.avg_pool3d(x, 2, 2, 1, ceil_mode=True), (IMAGE,)),
    "averages of volumes without padding": (
        lambda x: functional.avg_pool3d(x, (3, 2, 2), 2, 1, ceil_mode=True, count_include_pad=False),
        (IMAGE,),
    ),
    "instance norm": (lambda x: functional.instance_norm(x, weight=x[0, :, 0, 0]), (IMAGE,)),
    "limits that broadcast": (lambda x: torch.clamp(x[0], x[0, :, :1], x[0, :, 1:2]), (ROWS,)),
    "number of nonzeros": (lambda x: torch.linalg.vector_norm(x.round(), 0, 1), (ROWS,)),
    "variance of one": (lambda x: x[:1, :1, :1].var(1), (ROWS,)),
    "extremum of a scalar": (lambda x: x.sum().max(0)[1], (ROWS,)),
    "a fraction's range": (lambda x: x[0, 0, 0] * torch.arange(0, 1, 0.15), (ROWS,)),
    "addmm": (lambda x: torch.addmm(x[0], x[0], EYE, beta=0.5, alpha=2), (ROWS,)),
    "select from the front": (lambda x: x.select(-1, 2), (IMAGE,)),
    "remainder by a number": (lambda x: x % 0.7, (ROWS,)),
    "remainder of integers": (lambda x: x % 3, (INTEGERS,)),
    "elu": (lambda x: functional.elu(x, 0.5), (IMAGE,)),
    "celu": (lambda x: functional.celu(x, 0.6) + functional.celu(x, -0.6), (IMAGE,)),
    "prelu": (lambda x: functional.prelu(x, torch.arange(-1.0, IMAGE.shape[1] - 1)), (IMAGE,)),
    "prelu of one slope": (lambda x: functional.prelu(x, torch.tensor([0.3])), (IMAGE,)),
    "prelu of a row": (lambda x: functional.prelu(x.flatten(), torch.tensor([-0.3])), (IMAGE,)),
    "average": (lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (IMAGE,)),
    "average, ceil": (lambda x: functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (IMAGE,)),
    "max pool": (lambda x: functional.max_pool2d(x, 3, 2, 1), (IMAGE,)),
    "group norm": (NORM, (IMAGE,)),
    "any over a dimension": (lambda x: (x > 1).any(1), (IMAGE,)),
    "nearest by a whole number": (lambda x: functional.interpolate(x, scale_factor=3), (IMAGE,)),
    "bilinear by a whole number": (lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear"), (IMAGE,)),
    "bilinear, corners": (
        lambda x: functional.interpolate(x, size=(13, 17), mode="bilinear", align_corners=True),
        (IMAGE,),
    ),
    "bicubic by a whole number": (lambda x: functional.interpolate(x, scale_factor=2, mode="bicubic"), (IMAGE,)),
    "bicubic by a fraction": (lambda x: functional.interpolate(x, scale_factor=1.7, mode="bicubic"), (IMAGE,)),
    "bicubic, corners": (
        lambda x: functional.interpolate(x, size=(1, 4), mode="bicubic", align_corners=True),
        (IMAGE,),
    ),
    "reflected": (lambda x: functional.pad(x, (1, 2), mode="reflect"), (ROWS,)),
    "replicated": (lambda x: functional.pad(x, (1, 2), mode="replicate"), (ROWS,)),
    "constants only": (lambda x: x + torch.maximum(torch.arange(7), torch.arange(7, 0, -1)), (ROWS,)),
    "index by one list": (lambda x: x[:, [0, 2]], (ROWS,)),
    "index by a grid": (lambda x: x[:, torch.tensor([[0], [2]]), torch.tensor([1, 3])], (ROWS,)),
    "index by all": (lambda x: x[[0, 1], [1, 2], [3, 0]], (ROWS,)),
    "attention with a scale": (lambda x: functional.scaled_dot_product_attention(x, x, x, scale=2.0), (IMAGE,)),
    "attention of 3-D": (lambda x: functional.scaled_dot_product_attention(x, x, x), (ROWS,)),
    "attention with a mask": (
        lambda x: functional.scaled_dot_product_attention(x, x, x, torch.ones(9, 9).tril().bool()),
        (IMAGE,),
    ),
    "attention of groups": (
        lambda x: functional.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True),
        (IMAGE,),
    ),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x, x), (IMAGE,)),
    "causal attention": (lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True), (IMAGE,)),
    "linear": (lambda x: functional.linear(x, EYE, x[0, 0]), (ROWS,)),
    "linear without bias": (lambda x: functional.linear(x, EYE), (ROWS,)),
    "writing to a slice": (_written, (ROWS,)),
    "circular padding": (lambda x: functional.pad(x, (1, 2, 1, 0), mode="circular"), (IMAGE,)),
    "fractions": (lambda x: (x / 2 + x * 0.5 - 1) > 0.25, (ROWS,)),
}


def _is_right_in_tvm(function: Function, inputs: tuple[torch.Tensor, ...]) -> bool:
    expected = function(*inputs).detach().numpy()
    try:
        module = from_exported_program(torch.export.export(Call(function), inputs))
        (value,) = interpret.run(module, [x.numpy() for x in inputs])
    except (ModelError, AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return False
    return deviation(value, expected) <= 1e-4


class Several(nn.Module):
    """Some of the functions, each on its own inputs, as layers that are named after them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        cases = BROKEN | SOUND
        self.counts = [len(cases[name][1]) for name in names]
        self.layers = nn.ModuleDict({name.replace(" ", "_"): Call(cases[name][0]) for name in names})

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = list(inputs)
        groups = [[rest.pop(0) for _ in range(count)] for count in self.counts]
        return tuple(layer(*group) for layer, group in zip(self.layers.values(), groups, strict=True))


# An import spends most of its time in what PyTorch does once a program: some cases share one.
NAMES = [*BROKEN, *SOUND]
GROUPS = [tuple(NAMES[start : start + 28]) for start in range(0, len(NAMES), 28)]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]} to {names[-1]}")
def test_ours_is_pytorchs(names: tuple[str, ...]) -> None:
    cases = [(BROKEN | SOUND)[name] for name in names]
    model = import_model(Several(names), [x for _, inputs in cases for x in inputs], tolerance=1e-5)
    for reference, (function, inputs) in zip(model.reference, cases, strict=True):
        np.testing.assert_array_equal(reference, function(*inputs).detach())


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_tvms_is_still_wrong(name: str) -> None:
    assert not _is_right_in_tvm(*BROKEN[name]), f"TVM has mended {name!r}: our converter may go"


def test_nearest_by_whole_factors_is_one_resize() -> None:
    def resized(*images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(functional.interpolate(x, scale_factor=factor) for x in images for factor in (2, 3, 5, 7))

    images = [torch.arange(n * n, dtype=torch.float32).reshape(1, 1, n, n) for n in (3, 7, 31, 33)]
    model = import_model(Call(resized), images)
    assert [ir.op_name(call) for _, call in ir.calls(model.module)] == ["image.resize2d"] * 16


def test_antialias_with_corners_is_refused() -> None:
    def resize(x: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(x, size=(4, 5), mode="bilinear", antialias=True, align_corners=True)

    with pytest.raises(ModelError, match="antialias with align_corners"):
        import_model(Call(resize), IMAGE)


def test_natural_constants_index_as_they_are() -> None:
    model = import_model(Call(lambda x: x[:, [0, 2]]), ROWS)
    assert [ir.op_name(call) for _, call in ir.calls(model.module)] == ["take"]


def test_undefined_memory_is_zero() -> None:
    model = import_model(Call(lambda x: torch.where(x == x, x, torch.empty(7))), ROWS)
    np.testing.assert_array_equal(model.reference[0], ROWS)


def test_converters_are_of_operators_that_exist() -> None:
    import torch.ao.quantization.fx._decomposed

    for name in set(converters.table()) - {"getitem"}:
        operator, overload = name.split(".")
        spaces = (torch.ops.aten, torch.ops.quantized_decomposed, torch.ops.torchao)
        found = [getattr(space, operator, None) for space in spaces]
        overloads = [getattr(packet, overload) for packet in found if hasattr(packet, overload)]
        assert overloads and isinstance(overloads[0], torch._ops.OpOverload), name


def test_everything_we_do_is_documented() -> None:
    for function in [*converters.table().values(), *decompositions.OURS.values()]:
        outer = function.__qualname__.split(".")[0]
        module = __import__(function.__module__, fromlist=[outer])
        assert getattr(module, outer).__doc__


def test_a_users_converter_comes_first() -> None:
    def double(node: torch.fx.Node, importer: object) -> object:
        x = importer.env[node.args[0]]
        return importer.block_builder.emit(tvm.relax.op.add(x, x))

    model = import_model(nn.ReLU(), torch.ones(2), converters={"relu.default": double}, check=False)
    np.testing.assert_array_equal(interpret.run(model.module, model.example)[0], [2, 2])
    assert model.converters == {"relu.default": "yours"}
