"""The stages in a row: what they report and dump, tables and rules, and no file where one of them fails."""

from __future__ import annotations

import dataclasses
import errno
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from samples import calibration_of

from tvmq import pipeline
from tvmq.deploy import build
from tvmq.deploy.bundle import read
from tvmq.deploy.executor import load
from tvmq.errors import CalibrationError, CheckFailed, OutputError, TargetError
from tvmq.model import Model
from tvmq.pipeline import STAGES, compile_model
from tvmq.quantize.calibration import calibrate
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe, wants_integers
from tvmq.recipe_values import Precision

INT8 = Recipe(precision="int8")


@pytest.fixture
def model(imported: Callable[[str], Model]) -> Model:
    return imported("residual")


# --- what is reported -----------------------------------------------------------------------------------------------


def test_progress_names_the_stages_in_order_and_counts_inferences(model: Model, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    compiled = compile_model(
        model, "host", INT8, calibration_of(model), tmp_path / "m.tvmq", progress=lambda *args: seen.append(args)
    )
    assert [stage for stage, n in seen if n == 0] == list(STAGES)
    assert [n for stage, n in seen if stage == "calibrate"] == [0, 1, 2, 3, 4]
    assert compiled.path == tmp_path / "m.tvmq"
    assert compiled.size == compiled.path.stat().st_size
    assert compiled.operators == read(compiled.path).manifest["operators"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.tvmq"]


def test_every_stage_with_relax_is_dumped_in_order(model: Model, tmp_path: Path) -> None:
    compile_model(model, "host", INT8, calibration_of(model), tmp_path / "m.tvmq", dump=tmp_path / "new" / "stages")
    names = sorted(path.name for path in (tmp_path / "new" / "stages").iterdir())
    assert [name.split("_")[1] for name in names] == [
        "layout.py",
        "annotate.py",
        "realize.py",
        "lower.py",
        "schedule.py",
    ]
    assert "tvmq.conv2d" in (tmp_path / "new" / "stages" / names[2]).read_text()


def test_a_float_model_needs_no_data(model: Model, tmp_path: Path) -> None:
    seen: list[str] = []
    compile_model(model, out=tmp_path / "m.tvmq", progress=lambda stage, _n: seen.append(stage))
    assert "calibrate" not in seen
    bundle = read(tmp_path / "m.tvmq")
    assert "calibration.json" not in bundle.members
    assert {row["precision"] for row in bundle.manifest["operators"]} == {"fp32"}
    assert {row["reason"] for row in bundle.manifest["operators"]} == {"the recipe asks for float"}
    for want, got in zip(model.reference, load(tmp_path / "m.tvmq")(*model.example), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_finished_table_stands_for_the_data(model: Model, tmp_path: Path) -> None:
    table = calibrate(model, INT8, calibration_of(model))
    table.save(tmp_path / "t.json")
    compile_model(model, "host", INT8, CalibrationTable.load(tmp_path / "t.json"), tmp_path / "table.tvmq")
    compile_model(model, "host", INT8, calibration_of(model), tmp_path / "data.tvmq")
    assert (tmp_path / "table.tvmq").read_bytes() == (tmp_path / "data.tvmq").read_bytes()
    assert read(tmp_path / "table.tvmq").manifest["calibration_sha256"] == table.sha256()


def test_a_table_of_another_model_is_refused(model: Model, imported: Callable[[str], Model], tmp_path: Path) -> None:
    other = calibrate(imported("transformer"), INT8, calibration_of(imported("transformer")))
    with pytest.raises(
        CalibrationError,
        match="calibration table: tensor .*: expected a tensor of residual; it belongs to another model",
    ):
        compile_model(model, "host", INT8, other, tmp_path / "m.tvmq")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_the_table_keeps_float(model: Model, without: Callable, tmp_path: Path) -> None:
    table = calibrate(model, INT8, calibration_of(model))
    name = next(
        row["name"]
        for row in compile_model(model, "host", INT8, table, tmp_path / "a.tvmq").operators
        if row["kind"] == "conv2d"
    )
    compiled = compile_model(model, "host", INT8, without(table, name, keep=True), tmp_path / "b.tvmq")
    reasons = {row["reason"] for row in compiled.operators}
    assert any("keeps" in reason and name in reason for reason in reasons), reasons


# --- recipes --------------------------------------------------------------------------------------------------------


def test_a_rule_keeps_a_layer_float(model: Model, tmp_path: Path) -> None:
    recipe = Recipe(precision="int8", rules=[{"match": "*a2*", "precision": "fp32"}])
    rows = compile_model(model, "host", recipe, calibration_of(model), tmp_path / "m.tvmq").operators
    kept = [row for row in rows if row["reason"] == "rule '*a2*'"]
    assert len(kept) == 1
    assert kept[0]["precision"] == "fp32"
    assert sum(row["precision"] == "int8" and row["kind"] == "conv2d" for row in rows) == 5
    (got,) = load(tmp_path / "m.tvmq")(*model.example)
    assert np.abs(got - model.reference[0]).max() < 0.05 * np.abs(model.reference[0]).max()


def test_a_rule_makes_one_layer_integer(model: Model, tmp_path: Path) -> None:
    recipe = Recipe(rules=[{"match": "conv2d", "precision": "int8"}])
    rows = compile_model(model, "host", recipe, calibration_of(model), tmp_path / "m.tvmq").operators
    assert {row["kind"] for row in rows if row["precision"] == "int8"} == {"conv2d"}


@pytest.mark.parametrize(
    "changes", [{"symmetric": True}, {"per_channel": False}, {"observer": "percentile"}, {"observer": "moving_average"}]
)
def test_each_way_of_quantizing_is_exact(model: Model, tmp_path: Path, changes: dict) -> None:
    compile_model(model, "host", Recipe(precision="int8", **changes), calibration_of(model), tmp_path / "m.tvmq")
    (got,) = load(tmp_path / "m.tvmq")(*model.example)
    assert np.abs(got - model.reference[0]).max() < 0.1 * np.abs(model.reference[0]).max()


def test_integers_need_data(model: Model, tmp_path: Path) -> None:
    assert not wants_integers(Recipe())
    assert wants_integers(Recipe(rules=[{"match": "x", "precision": "int8"}]))
    for data, said in [
        (None, "saw none; pass calibration=batches"),
        ([], "at least one batch"),
        ([np.full((1, 3, 9, 9), np.nan, np.float32)], "NaN"),
    ]:
        with pytest.raises(CalibrationError, match=said):
            compile_model(model, "host", INT8, data, tmp_path / "m.tvmq")
    assert not list(tmp_path.iterdir())


def test_simulation_is_close_to_what_is_compiled(model: Model, bundle_of: Callable[..., Path]) -> None:
    quantized = pipeline.quantize(model, INT8, calibration_of(model))
    (simulated,) = quantized.simulate(*model.example)
    (got,) = load(bundle_of("residual"))(*model.example)
    assert np.abs(got - simulated).max() < 0.02 * np.abs(simulated).max()


# --- failures -------------------------------------------------------------------------------------------------------


class Interrupted:
    """Raises in a stage."""

    def __init__(self, stage: str, error: BaseException) -> None:
        self.stage, self.error = stage, error

    def __call__(self, stage: str, n: int) -> None:
        if stage == self.stage and (n > 0 or stage != "calibrate"):
            raise self.error


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_any_stage_leaves_no_file(model: Model, tmp_path: Path, stage: str) -> None:
    (tmp_path / "m.tvmq").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        compile_model(
            model,
            "host",
            INT8,
            calibration_of(model),
            tmp_path / "m.tvmq",
            progress=Interrupted(stage, KeyboardInterrupt()),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m.tvmq"]
    assert (tmp_path / "m.tvmq").read_bytes() == b"old"


@pytest.mark.parametrize("function", ["compile_library", "check"])
def test_ctrl_c_inside_a_stage_leaves_no_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        compile_model(model, out=tmp_path / "m.tvmq")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_file(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OutputError, match="cannot write .*m.tvmq: saw No space left on device"):
        compile_model(model, out=tmp_path / "m.tvmq")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_linking_is_said(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    with pytest.raises(OutputError, match="cannot write temporary files: saw No space left on device; set TMPDIR"):
        compile_model(model, out=tmp_path / "m.tvmq")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_said_before_the_work(model: Model, tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(OutputError, match="expected an existing folder"):
        compile_model(model, out=tmp_path / "no" / "m.tvmq", progress=lambda stage, _n: seen.append(stage))
    assert not seen


def test_a_result_that_disagrees_is_not_written(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "agrees", lambda *_args: False)
    with pytest.raises(CheckFailed, match="disagrees with the oracle"):
        compile_model(model, out=tmp_path / "m.tvmq")
    assert not list(tmp_path.iterdir())


def test_an_unknown_target_is_said_before_the_work(model: Model, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="unknown target"):
        compile_model(model, "no-such-board", out=tmp_path / "m.tvmq")


# --- other machines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["x86-64-avx2", "x86-64-avx512-vnni"])
def test_levels_of_one_machine_give_equal_bits(bundle_of: Callable[..., Path], level: str) -> None:
    from tvmq.target import load_target

    if not build.runs_here(load_target(level)):
        pytest.skip(f"this machine is below {level}")
    for name in ("residual", "depthwise_separable", "activations"):
        here, there = load(bundle_of(name)), load(bundle_of(name, target=level))
        x = np.random.default_rng(3).standard_normal(here.signature.inputs[0].shape).astype(np.float32)
        np.testing.assert_array_equal(there(x)[0], here(x)[0])


def test_a_target_may_be_an_object_or_a_file(model: Model, tmp_path: Path) -> None:
    from tvmq.target import load_target

    target = dataclasses.replace(load_target("x86-64-avx2"), name="mine", cores=1)
    (tmp_path / "mine.toml").write_text(target.to_toml())
    for given in (target, tmp_path / "mine.toml", str(tmp_path / "mine.toml")):
        compile_model(model, given, out=tmp_path / "m.tvmq")
        assert read(tmp_path / "m.tvmq").manifest["target"]["name"] == "mine"
    assert Precision("fp32") is Precision.FP32
