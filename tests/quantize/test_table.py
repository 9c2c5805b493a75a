import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tvmq.errors import CalibrationError, OutputError
from tvmq.quantize import packed
from tvmq.quantize.mean_errors import MeanErrors
from tvmq.quantize.numerics import QParams
from tvmq.quantize.smoothed import Smoothed
from tvmq.quantize.table import SCHEMA, CalibrationTable, Entry
from tvmq.recipe_values import Precision

TABLE = CalibrationTable(
    "net",
    "min_max",
    12,
    {
        "x": Entry(-1.5, 2.25, QParams(0.014705882407724857, -26)),
        "conv": Entry(0.0, 6.0, QParams(0.023529412224888802, -128), keep_float=True),
    },
)


def _document(**changes: object) -> dict:
    return {**json.loads(TABLE.to_json()), **changes}


def _with_entry(**changes: object) -> str:
    document = _document()
    document["tensors"]["x"].update(changes)
    return json.dumps(document)


def _one_line(text: str, *parts: str) -> None:
    with pytest.raises(CalibrationError) as info:
        CalibrationTable.from_json(text, "t.json")
    message = str(info.value)
    assert "\n" not in message and len(message) < 300
    for part in ("t.json", *parts):
        assert part in message


def test_round_trip(tmp_path: Path):
    path = tmp_path / "t.json"
    TABLE.save(path)
    assert CalibrationTable.load(path) == TABLE
    assert CalibrationTable.load(path).sha256() == TABLE.sha256()
    assert list(json.loads(path.read_text())["tensors"]) == ["x", "conv"]  # in the model's order


def test_extreme_scales_round_trip():
    for scale in (2.0**-99, 2.6e36):
        table = dataclasses.replace(TABLE, tensors={"x": Entry(-1.0, 1.0, QParams(scale, 0))})
        assert CalibrationTable.from_json(table.to_json()).tensors["x"].qparams.scale == pytest.approx(scale, rel=1e-6)


def test_the_hash_is_of_what_it_says():
    assert TABLE.sha256() != dataclasses.replace(TABLE, samples=13).sha256()


def test_a_scale_that_was_typed_by_hand_becomes_a_float32():
    entry = CalibrationTable.from_json(_with_entry(scale=0.1)).tensors["x"]
    assert entry.qparams.scale == 0.10000000149011612
    assert CalibrationTable.from_json(_with_entry(scale=2)).tensors["x"].qparams == QParams(2.0, -26)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"scale": 0}, ["'x'", "scale", "saw 0"]),
        ({"scale": -0.5}, ["'x'", "scale", "-0.5"]),
        ({"scale": float("nan")}, ["'x'", "scale", "finite", "nan"]),
        ({"scale": float("inf")}, ["'x'", "scale", "finite"]),
        ({"scale": 10**400}, ["'x'", "scale", "finite"]),
        ({"scale": 1e-31}, ["'x'", "scale", "between"]),
        ({"scale": 1e38}, ["'x'", "scale", "between"]),
        ({"scale": "0.1"}, ["'x'", "scale", "'0.1'"]),
        ({"scale": None}, ["'x'", "scale", "None"]),
        ({"scale": True}, ["'x'", "scale", "True"]),
        ({"zero_point": 300}, ["'x'", "zero_point", "-128 to 127", "300"]),
        ({"zero_point": 1.5}, ["'x'", "zero_point", "1.5"]),
        ({"zero_point": False}, ["'x'", "zero_point", "False"]),
        ({"min": "low"}, ["'x'", "min", "'low'"]),
        ({"max": float("-inf")}, ["'x'", "max", "finite"]),
        ({"keep_float": "yes"}, ["'x'", "keep_float", "true or false", "'yes'"]),
        ({"zeropoint": 3}, ["'x'", "'zeropoint'", "did you mean 'zero_point'?"]),
    ],
    ids=str,
)
def test_each_malformed_entry_is_one_line(changes, parts):
    _one_line(_with_entry(**changes), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["JSON"]),
        ("{", ["JSON"]),
        ("[" * 100_000, ["JSON"]),
        ("[]", ["a calibration table", "another document"]),
        ('{"tensors": {}}', ["another document"]),
        (json.dumps(_document(schema=SCHEMA + 1)), ["schema 1", "saw 2"]),
        (json.dumps(_document(tensors=[])), ["another document"]),
        (json.dumps(_document(tensors={"x": 3})), ["'x'", "an object", "int"]),
        (json.dumps(_document(tensors={"x": {}})), ["'x'", "scale"]),
        (json.dumps(_document(samples="many")), ["samples", "'many'"]),
        (json.dumps(_document(tensor={})), ["'tensor'", "did you mean 'tensors'?"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_malformed_document_is_one_line(text, parts):
    _one_line(text, *parts)


def test_files_that_cannot_be_read(tmp_path: Path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(CalibrationError, match=path.name):
            CalibrationTable.load(path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="UTF-8"):
        CalibrationTable.load(tmp_path / "b.json")


def test_saving_into_a_missing_folder(tmp_path: Path):
    with pytest.raises(OutputError):
        TABLE.save(tmp_path / "absent" / "t.json")


def test_a_failed_save_keeps_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "t.json"
    TABLE.save(path)

    def full(*_args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError):
        dataclasses.replace(TABLE, samples=1).save(path)
    monkeypatch.undo()
    assert CalibrationTable.load(path) == TABLE
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize("keep", [False, True])
def test_hand_edits_take_effect_and_are_named(model_of, without, keep: bool):
    case = model_of("conv_bn_relu")
    edited = CalibrationTable.from_json(without(case.table(), "relu", keep=keep).to_json())
    decision = case.decisions(table=edited)["relu_2"]
    assert decision.precision is Precision.FP32
    expected = "the calibration table keeps 'relu' float" if keep else "'relu' is not in the calibration table"
    assert decision.reason == expected
    assert case.decisions(table=edited)["relu"].precision is Precision.INT8  # it reads the input, and yields float


def test_an_edited_scale_is_used(model_of):
    case = model_of("conv_bn_relu")
    document = json.loads(case.table().to_json())
    document["tensors"]["relu"].update(scale=0.5, zero_point=-128)
    table = CalibrationTable.from_json(json.dumps(document))
    assert QParams(0.5, -128) in case.plan(table=table).qparams.values()


def test_numbers_of_channels_round_trip():
    errors = MeanErrors("0123456789abcdef", packed.pack(np.array([0.25, -1e-3, 3e5])))
    table = dataclasses.replace(
        TABLE, mean_errors={"conv": errors}, smoothed={"norm": Smoothed(packed.pack(np.ones(3)), (2,))}
    )
    assert CalibrationTable.from_json(table.to_json()) == table
    np.testing.assert_array_equal(errors.values(), np.float32([0.25, -1e-3, 3e5]))
    assert not {"mean_errors", "smoothed"} & set(json.loads(TABLE.to_json()))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ([], ["mean_errors", "an object", "list"]),
        ({"conv": 1.0}, ["'conv'", "of and float32", "1.0"]),
        ({"conv": {"of": "a"}}, ["'conv'", "of and float32"]),
        ({"conv": {"of": "a", "float32": 1.0}}, ["'conv'", "base64", "calibrate anew"]),
        ({"conv": {"of": "a", "float32": "?"}}, ["'conv'", "base64"]),
        ({"conv": {"of": "a", "float32": "AAAA"}}, ["'conv'", "base64"]),  # three bytes
        ({"conv": {"of": "a", "float32": "AADAfw=="}}, ["'conv'", "finite"]),  # NaN
    ],
)
def test_mean_errors_that_are_none(changes: object, parts: list):
    _one_line(json.dumps(_document(mean_errors=changes)), *parts)


def test_channels_that_are_none():
    _one_line(json.dumps(_document(smoothed=[])), "smoothed", "an object")
    _one_line(json.dumps(_document(smoothed={"norm": "?"})), "'norm'", "float32 and copies")
    _one_line(json.dumps(_document(smoothed={"norm": {"float32": "?", "copies": []}})), "'norm'", "base64")
    _one_line(
        json.dumps(_document(smoothed={"norm": {"float32": "", "copies": [1.5]}})), "copies", "a list of integers"
    )
