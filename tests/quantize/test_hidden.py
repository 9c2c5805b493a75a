"""Hidden units that reach far beyond others are divided and copied; what a model computes stays the same."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tvmq import ir, ops, pipeline
from tvmq.errors import CalibrationError
from tvmq.importer.load import import_model
from tvmq.oracle import interpret
from tvmq.quantize import hidden, numerics, refine
from tvmq.quantize.calibration import calibrate
from tvmq.quantize.least_noise import CHANNELS, Division
from tvmq.quantize.smooth import divided
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule

INT8 = Recipe(precision="int8")
WIDTH, OUTLIER, AT = 256, 7, 3


class Massive(nn.Module):
    """A hidden unit that reaches far beyond the others in some rows, read by one result with a weight as large."""

    def __init__(
        self, activation: Callable[[torch.Tensor], torch.Tensor] = functional.gelu, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.down = nn.Linear(16, WIDTH, bias=bias), nn.Linear(WIDTH, 12)
        with torch.no_grad():
            self.up.weight[OUTLIER] *= 30
            self.down.weight[AT, OUTLIER] = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


class Other(Massive):
    """The same, where something else reads the hidden units, or makes them: `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "pruned":
            with torch.no_grad():
                self.down.weight[:, WIDTH // 2 :] = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        if self.how == "sum":
            up = up + up[:, :1]
        y = functional.gelu(up)
        result = self.down(y)
        read = {"read": y, "returned": y, "made": up}.get(self.how)
        return result if read is None else result + read[:, :12] if self.how != "returned" else (result, y)


def _case(make_a_case, module: nn.Module):
    torch.manual_seed(0)
    return make_a_case(module, (9, 16))


def _reshaped(case, recipe: Recipe = INT8):
    return refine.reshaped(case.module, recipe, lambda: case.batches)


@pytest.fixture(scope="module")
def massive(make_a_case):
    return _case(make_a_case, Massive())


def _units(module) -> int:
    return max(ir.shape_of(call.args[1])[1] for _, call in ir.calls(module) if ir.is_call(call, "matmul"))


@pytest.mark.parametrize(
    ("activation", "bias"), [(functional.gelu, True), (functional.silu, True), (functional.gelu, False)]
)
def test_units_are_divided_and_copied_by_default(make_a_case, activation: Callable, bias: bool) -> None:
    case = _case(make_a_case, Massive(activation, bias=bias))
    module, smoothed = _reshaped(case)
    assert len(smoothed) == 1 and _units(module) == WIDTH + WIDTH // CHANNELS
    for got, want in zip(interpret.run(module, case.inputs), case.run(case.module), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5 * np.abs(want).max())
    others = np.arange(12) != AT
    reference, after = case.reference()[0][:, others], dataclasses.replace(case, module=module, known={})
    before, now = (numerics.sqnr_db(reference, c.run(c.realized())[0][:, others]) for c in (case, after))
    assert now > before + 6


def test_names_stay_so_that_rules_and_tables_find_layers(massive) -> None:
    before, after = ([str(var.name) for var, _ in ir.bindings(m)] for m in (massive.module, _reshaped(massive)[0]))
    assert [name for name in after if not name.endswith("_smoothed")] == before


def test_the_factors_are_in_the_step_that_rounds(massive) -> None:
    case = dataclasses.replace(massive, module=_reshaped(massive)[0], known={})
    call = next(call for _, call in ir.calls(case.realized()) if ops.Activate("gelu") in ops.epilogue_of(call))
    kinds = [type(step) for step in ops.epilogue_of(call)]
    assert kinds == [ops.Bias, ops.Scale, ops.Activate, ops.Scale, ops.Quantize]
    assert numerics.sqnr_db(case.run(case.qdq())[0], case.run(case.realized())[0]) > 40


def test_factors_before_other_steps_are_a_step_of_their_own(make_a_case) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 9), nn.Linear(9, 16)
            self.register_buffer("factors", torch.linspace(0.1, 2, 9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(functional.relu(functional.hardtanh(self.a(x)) * self.factors + 0.1))

    case = _case(make_a_case, Scaled())
    call = next(call for _, call in ir.calls(case.realized()) if ir.is_call(call, "tvmq.matmul"))
    kinds = [type(step) for step in ops.epilogue_of(call)]
    assert kinds == [ops.Bias, ops.Scale, ops.Clip, ops.Scale, ops.Bias, ops.Quantize]
    assert numerics.sqnr_db(case.run(case.qdq())[0], case.run(case.realized())[0]) > 40


@pytest.mark.parametrize("how", ["read", "returned"])
def test_units_that_others_read_are_left_alone(make_a_case, how: str) -> None:
    assert _reshaped(case := _case(make_a_case, Other(how))) == (case.module, {})


@pytest.mark.parametrize("how", ["sum", "made", "pruned"])
def test_units_that_no_layer_makes_alone_and_pruned_ones_get_no_copies(make_a_case, how: str) -> None:
    case = _case(make_a_case, Other(how))
    assert len(hidden.hidden_units(case.module)) == 1 and not hidden.makers(case.module)
    module, _ = _reshaped(case)
    assert _units(module) == WIDTH
    for got, want in zip(interpret.run(module, case.inputs), case.run(case.module), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5 * np.abs(want).max())


def test_weights_of_groups_keep_the_inputs_that_they_have(massive) -> None:
    rules = [Rule("matmul#1", "int4-weight")]
    assert _units(_reshaped(massive, Recipe(precision="int8", rules=rules))[0]) == WIDTH


def test_even_units_are_left_alone(make_a_case) -> None:
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(functional.gelu(self.up(x)))

    assert _reshaped(case := _case(make_a_case, Even())) == (case.module, {})


def test_copies_share_the_weights_of_a_unit_and_its_rounding() -> None:
    read = np.random.default_rng(0).uniform(-1, 1, (400, 20)).astype(np.float32)
    read[1] *= 3.0
    units = np.array([*range(400), 1, 1, 7])
    parts = hidden.split(read, units, 127)
    np.testing.assert_array_equal(np.delete(parts, [1, 7, 400, 401, 402], axis=0), np.delete(read, [1, 7], axis=0))
    steps = np.abs(parts).max(axis=0) / 127
    for unit, copies in ((1, [1, 400, 401]), (7, [7, 402])):
        np.testing.assert_allclose(parts[copies].sum(axis=0), read[unit], atol=1e-6)
        np.testing.assert_allclose(np.diff(parts[copies], axis=0) * len(copies) / steps, 1.0, rtol=2e-2)
        lost = (np.rint(parts[copies] / steps) * steps).sum(axis=0) - read[unit]
        # One step's noise; that of shares alike would be as many times that as there are copies.
        assert np.sqrt(np.mean(np.square(lost / steps))) < 1.3 / np.sqrt(12)


@pytest.mark.parametrize("channel", [WIDTH, -1])
def test_copies_of_no_unit_are_refused(massive, channel: int) -> None:
    (name,) = (str(var.name) for var in hidden.makers(massive.module))
    with pytest.raises(CalibrationError, match=f"expected copies of {WIDTH} channels, saw one of channel {channel};"):
        divided(massive.module, {name: Division(np.ones(WIDTH), (0, channel))}, INT8)


def test_a_table_gives_the_units_that_its_data_gave() -> None:
    torch.manual_seed(0)
    model = import_model(Massive().eval(), (torch.zeros(9, 16),))
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((9, 16)).astype(np.float32) for _ in range(6)]
    table = CalibrationTable.from_json(calibrate(model, INT8, iter(batches)).to_json())
    by_table, by_data = (pipeline.quantize(model, INT8, given) for given in (table, batches))
    assert table.smoothed and by_data.table == by_table.table == table
    np.testing.assert_array_equal(by_table.simulate(batches[0])[0], by_data.simulate(batches[0])[0])


def test_dynamic_layers_get_them_where_there_are_data(make_a_case) -> None:
    case = _case(make_a_case, Massive())
    recipe = Recipe(precision="int8-dynamic")
    module, smoothed = _reshaped(case, recipe)
    assert len(smoothed) == 1 and _units(module) > WIDTH
    assert refine.reshaped(case.module, recipe, tuple) == (case.module, {})
    reference, after = case.reference()[0], dataclasses.replace(case, module=module, known={})
    before, now = (numerics.sqnr_db(reference, c.run(c.realized(recipe))[0]) for c in (case, after))
    assert now > before + 2
