"""Small PyTorch models, imported once a session, and their way through quantization."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from hypothesis import HealthCheck, settings
from samples import calibration_of
from torch import nn
from torch.nn import functional
from tvm import relax

from tvmq import ir
from tvmq.deploy.emulate import EmulatedBoard, prepare
from tvmq.graph.batches import keep_batches
from tvmq.graph.layout import to_nhwc
from tvmq.graph.transposes import drop_transposes
from tvmq.importer import torch_export
from tvmq.importer.canonical import canonicalize
from tvmq.importer.load import import_model
from tvmq.model import Model, Signature, TensorSpec
from tvmq.oracle import interpret
from tvmq.pipeline import compile_model
from tvmq.quantize.annotate import annotate
from tvmq.quantize.calibrate import calibrate
from tvmq.quantize.decisions import Decision
from tvmq.quantize.plan import Plan, make_plan
from tvmq.quantize.realize import realize
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe, wants_integers
from tvmq.tune import logs, records

# How long an example takes says something of the machine only.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

INT8 = Recipe(precision="int8")


@dataclass(frozen=True)
class Case:
    """A model in PyTorch and in channels-last Relax; `batches[0]` is what tests run it on."""

    torch_module: nn.Module
    module: tvm.IRModule
    signature: Signature
    paths: dict[str, str]
    batches: tuple[tuple[np.ndarray, ...], ...]
    known: dict[tuple, object] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        return self.batches[0]

    def reference(self) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            outputs = self.torch_module(*(torch.from_numpy(x) for x in self.inputs))
        return tuple(y.numpy() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

    def table(self, recipe: Recipe = INT8) -> CalibrationTable:
        return self._once(("table", recipe), lambda: calibrate(self.module, self.signature, self.batches, recipe))

    def plan(self, recipe: Recipe = INT8, table: CalibrationTable | None = None) -> Plan:
        if table is None and wants_integers(recipe):
            table = self.table(recipe)
        return make_plan(self.module, table, recipe, self.paths)

    def decisions(self, recipe: Recipe = INT8, table: CalibrationTable | None = None) -> dict[str, Decision]:
        return {decision.name: decision for decision in self.plan(recipe, table).decisions}

    def qdq(self, recipe: Recipe = INT8, table: CalibrationTable | None = None) -> tvm.IRModule:
        def make() -> tvm.IRModule:
            return annotate(self.module, self.plan(recipe, table), recipe)

        return self._once(("qdq", recipe), make) if table is None else make()

    def realized(
        self, recipe: Recipe = INT8, table: CalibrationTable | None = None, storage: str = "int8"
    ) -> tvm.IRModule:
        def make() -> tvm.IRModule:
            return realize(self.qdq(recipe, table), storage)

        return self._once(("realized", recipe, storage), make) if table is None else make()

    def _once(self, key: tuple, make: Callable[[], object]) -> object:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def run(self, module: tvm.IRModule) -> tuple[np.ndarray, ...]:
        return interpret.run(module, self.inputs)


def make_case(torch_module: nn.Module, *shapes: tuple[int, ...], batches: int = 4, scale: float = 1.0) -> Case:
    """Import `torch_module`, with seeded normal inputs of `shapes`."""
    torch_module.eval()
    rng = np.random.default_rng(0)
    data = tuple(tuple((scale * rng.standard_normal(s)).astype(np.float32) for s in shapes) for _ in range(batches))
    program = torch_export.export(torch_module, tuple(torch.from_numpy(x) for x in data[0]))
    translation = torch_export.translate(program)
    module = drop_transposes(to_nhwc(keep_batches(canonicalize(translation.module))))

    def spec(expr: object, name: str) -> TensorSpec:
        return TensorSpec(name, ir.shape_of(expr), ir.dtype_of(expr))

    inputs = tuple(spec(param, str(param.name)) for param in ir.main(module).params)
    outputs = tuple(spec(output, f"output{i}") for i, output in enumerate(ir.outputs(module)))
    return Case(torch_module, module, Signature(inputs, outputs), dict(translation.paths), data)


@pytest.fixture(scope="session", autouse=True)
def _no_tuning_logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are the analytic ones, whatever is shipped, and whatever the developer has tuned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        none = tmp_path_factory.mktemp("shipped")
        for user in (records, logs):
            patch.setattr(user, "data_folder", lambda name: none / name)
        yield


@pytest.fixture(scope="session")
def make_a_case() -> Callable[..., Case]:
    """`make_case`, for models that one module tests."""
    return make_case


@pytest.fixture(scope="session")
def imported() -> Callable[[str], Model]:
    """The model in `MODELS` of a name, imported and checked as a user would, once."""

    @functools.cache
    def get(name: str) -> Model:
        torch.manual_seed(0)
        factory, *shapes = MODELS[name]
        rng = np.random.default_rng(0)
        inputs = tuple(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
        return import_model(_with_statistics(factory()).eval(), inputs, name=name)

    return get


@pytest.fixture(scope="session")
def bundle_of(imported: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`bundle_of(name, precision="int8", target="host")`: the compiled bundle of a model in `MODELS`, made once."""
    folder = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def get(name: str, precision: str = "int8", target: str = "host") -> Path:
        model, path = imported(name), folder / f"{name}-{precision}-{target}.tvmq"
        batches = None if precision == "fp32" else calibration_of(model)
        compile_model(model, target, Recipe(precision=precision), batches, path)
        return path

    return get


BOARD_NEEDS = ("qemu-aarch64", "apt-get", "dpkg-deb")


@pytest.fixture(scope="session")
def board_root() -> Path:
    """The emulated board's files, prepared once in the user's cache."""
    missing = [tool for tool in BOARD_NEEDS if shutil.which(tool) is None]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"no {', '.join(missing)} on this machine")
    # On CI a missing tool fails here, in the words that a user would read.
    return prepare()


@pytest.fixture
def board(board_root: Path) -> Iterator[EmulatedBoard]:
    # Not shared: the traceback of a failed test holds its session open, and the server serves one at a time.
    with EmulatedBoard(board_root).start() as running:
        yield running


@pytest.fixture(scope="session")
def build() -> Callable[..., Case]:
    """`make_case`, for a model that one test needs."""
    return make_case


def make_graph(body: Callable[..., object], *shapes: tuple[int, ...]) -> tvm.IRModule:
    """A module of float inputs of `shapes`, written by `body(emit, *inputs)`, which returns the outputs."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            outputs = body(lambda value, name: builder.emit(value, name_hint=name), *params)
            out = builder.emit_output(relax.Tuple(list(outputs) if isinstance(outputs, tuple) else [outputs]))
        builder.emit_func_output(out)
    return ir.rewrite(builder.get(), lambda *_: None)


@pytest.fixture(scope="session")
def graph() -> Callable[..., tvm.IRModule]:
    """`make_graph`, for tests that write Relax by hand."""
    return make_graph


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Case]:
    """The case of a model in `MODELS` by name, imported at its first use."""
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in cases:
            torch.manual_seed(0)
            factory, *shapes = MODELS[name]
            cases[name] = make_case(_with_statistics(factory()), *shapes)
        return cases[name]

    return get


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `any_case` runs on every model."""
    if "any_case" in metafunc.fixturenames:
        metafunc.parametrize("any_case", list(MODELS), indirect=True)


@pytest.fixture
def any_case(request: pytest.FixtureRequest, model_of: Callable[[str], Case]) -> Case:
    return model_of(request.param)


def _with_statistics(module: nn.Module) -> nn.Module:
    """Batch norms as after training: statistics and factors that are not the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in ((layer.running_mean, -0.5, 0.5), (layer.running_var, 0.5, 2.0)):
                nn.init.uniform_(tensor, low, high)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return module


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ConvBnRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _conv_bn(3, 8), _conv_bn(8, 16, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.second(functional.relu(self.first(x))))


class Residual(nn.Module):
    """A basic block with a 1x1 shortcut, then one with an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 8)
        self.a1, self.a2, self.down = _conv_bn(8, 16, stride=2), _conv_bn(16, 16), _conv_bn(8, 16, 1, 2)
        self.b1, self.b2 = _conv_bn(16, 16), _conv_bn(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(self.a2(functional.relu(self.a1(x))) + self.down(x))
        return functional.relu(self.b2(functional.relu(self.b1(x))) + x)


class DepthwiseSeparable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = _conv_bn(8, 24, 1), _conv_bn(24, 24, groups=24), _conv_bn(24, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu6(self.depthwise(functional.relu6(self.expand(x))))
        return functional.relu6(self.project(y)) + x


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = _conv_bn(3, 8), _conv_bn(3, 4, 1), _conv_bn(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([functional.relu(self.left(x)), self.right(x)], 1))


class Pools(nn.Module):
    """Max and average pools (padding counted and not), a global mean, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = _conv_bn(3, 8), _conv_bn(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.first(x)), 3, 2, 1)
        x = functional.avg_pool2d(self.second(x), 3, 1, 1, count_include_pad=True)
        x = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.fc(x.mean((2, 3)))


class FlattenLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = _conv_bn(3, 4), nn.Linear(4 * 4 * 4, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.conv(x)), 2)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


class PadShortcut(nn.Module):
    """The shortcut of CIFAR ResNets: every second pixel, and channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = _conv_bn(3, 4), _conv_bn(4, 8, stride=2), _conv_bn(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return functional.relu(self.b(functional.relu(self.a(x))) + shortcut)


class Transformer(nn.Module):
    """One pre-norm block with attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).reshape(1, 7, 2, 8).transpose(1, 2) for f in (self.query, self.key, self.value))
        attention = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, -1) @ v
        x = x + self.out(attention.transpose(1, 2).reshape(1, 7, 16))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ReturnedAndConsumed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _conv_bn(3, 8), _conv_bn(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = functional.relu(self.first(x))
        return y, self.second(y)


class Forks(nn.Module):
    """An input with three readers, a tensor added to itself, a residual read twice, an input added as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _conv_bn(8, 8), _conv_bn(8, 8, 1), _conv_bn(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        doubled = a + a
        return self.c(functional.relu(doubled + b)) + b + x


class Broadcasts(nn.Module):
    """Adds whose operands differ in shape, and a product of two activations (squeeze and excitation)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze, self.b = _conv_bn(3, 8), nn.Conv2d(8, 8, 1), _conv_bn(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = functional.relu(self.a(x))
        gate = torch.sigmoid(self.squeeze(a.mean((2, 3), keepdim=True)))
        return self.b(a * gate + a.mean((2, 3), keepdim=True)) + 0.25


class Clips(nn.Module):
    """Limits open on either side, two in a row, and one before a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = _conv_bn(3, 8), _conv_bn(8, 8), _conv_bn(8, 8), _conv_bn(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x).clamp(min=-0.3)
        b = self.b(a).clamp(max=0.9)
        c = functional.relu6(self.c(b)) + a
        return functional.relu(self.d(c).clamp(max=1.5)).clamp(min=0.1, max=1.2)


class Activations(nn.Module):
    """Activation functions in epilogues, before a residual add too, and one on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _conv_bn(3, 8), _conv_bn(8, 8), _conv_bn(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = functional.silu(self.a(x))
        b = torch.tanh(self.b(a)) + a
        return torch.sigmoid(functional.gelu(self.c(b)) + b)


class SharedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.relu(self.conv(x)))


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _conv_bn(3, 8), _conv_bn(4, 4), _conv_bn(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.a(x).chunk(2, 1)
        return self.c(torch.cat([self.b(left), right], 1))


class DeadChannels(nn.Module):
    """Channels whose batch norm learned a factor of (almost) zero: their weights vanish, their bias does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.conv.weight[0], self.conv.weight[1] = 0.0, 1e-12
            self.conv.bias[0], self.conv.bias[1] = 0.7, 1.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(functional.relu(self.conv(x)))


_IMAGE = (1, 3, 9, 9)
MODELS: dict[str, tuple] = {
    "conv_bn_relu": (ConvBnRelu, (2, 3, 9, 9)),
    "residual": (Residual, _IMAGE),
    "depthwise_separable": (DepthwiseSeparable, (1, 8, 7, 7)),
    "concat": (Concat, _IMAGE),
    "pools": (Pools, (2, 3, 9, 9)),
    "flatten_linear": (FlattenLinear, (2, 3, 8, 8)),
    "pad_shortcut": (PadShortcut, (1, 3, 8, 8)),
    "transformer": (Transformer, (1, 7, 16)),
    "returned_and_consumed": (ReturnedAndConsumed, _IMAGE),
    "forks": (Forks, (1, 8, 7, 7)),
    "broadcasts": (Broadcasts, _IMAGE),
    "clips": (Clips, _IMAGE),
    "activations": (Activations, _IMAGE),
    "shared_weights": (SharedWeights, (1, 8, 7, 7)),
    "split": (Split, _IMAGE),
    "dead_channels": (DeadChannels, (1, 4, 7, 7)),
}


@pytest.fixture
def without() -> Callable[..., CalibrationTable]:
    """`without(table, name)`: the table with an entry deleted, or marked keep_float."""

    def edit(table: CalibrationTable, name: str, *, keep: bool = False) -> CalibrationTable:
        tensors = dict(table.tensors)
        entry = tensors.pop(name)
        if keep:
            tensors[name] = dataclasses.replace(entry, keep_float=True)
        return dataclasses.replace(table, tensors=tensors)

    return edit
