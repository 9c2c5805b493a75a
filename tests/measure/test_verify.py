"""Verification: silent on a sound bundle, and naming the first operator that differs on another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tvmq.deploy.bundle import Bundle, pack_parameters, read
from tvmq.errors import OutputError, SignatureError
from tvmq.measure.verify import _save, verify

NAMES = (
    "residual",
    "depthwise_separable",
    "concat",
    "pools",
    "split",
    "transformer",
    "activations",
    "broadcasts",
    "dead_channels",
)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_a_sound_bundle_agrees(bundle_of: Callable[..., Path], name: str, precision: str) -> None:
    result = verify(bundle_of(name, precision))
    assert result.ok, str(result)
    assert result.first_difference is None
    assert all(op.differing == 0 for op in result.ops if op.precision == "int8")
    checked = {op.name for op in result.ops}
    kernels = [step for step in read(bundle_of(name, precision)).manifest["steps"] if "conv2d" in step["kernel"]]
    assert {step["results"][0]["name"] for step in kernels} <= checked, "every convolution is compared"


def test_the_result_is_plain_data(bundle_of: Callable[..., Path]) -> None:
    result = verify(bundle_of("residual"))
    document = json.loads(json.dumps(result.to_dict()))
    assert document["ok"] is True
    assert document["device"] == "host"
    assert "bit for bit" in str(result)


def test_other_inputs_than_the_golden_ones(bundle_of: Callable[..., Path]) -> None:
    x = np.random.default_rng(9).standard_normal((1, 3, 9, 9)).astype(np.float32)
    assert verify(bundle_of("residual"), inputs=x).ok
    assert verify(bundle_of("residual"), inputs={"x": 1e6 * x}).ok, "beyond the calibrated range too"
    with pytest.raises(SignatureError, match="expected shape"):
        verify(bundle_of("residual"), inputs=x[:, :2])


# --- a bundle that is wrong -----------------------------------------------------------------------------------------


def with_negated(bundle: Bundle, name: str) -> Bundle:
    """The bundle with the sign of a parameter turned."""
    parameters = bundle.parameters()
    block, entries = pack_parameters({**parameters, name: -parameters[name]})
    return Bundle({**bundle.manifest, "parameters": entries}, {**bundle.members, "params.bin": block})


def test_the_first_operator_that_differs_is_named(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    """A scale of the epilogue, which the oracle has from elsewhere."""
    bundle = read(bundle_of("residual"))
    victim = list(bundle.manifest["packed"])[2]
    scale = next(
        entry["name"]
        for entry in bundle.manifest["parameters"]
        if entry["name"].startswith(f"{victim}_") and entry["dtype"] == "float32"
    )
    result = verify(with_negated(bundle, scale), save=tmp_path / "saved")
    assert not result.ok
    assert not result.outputs_agree
    assert result.first_difference is not None
    assert result.first_difference.name == victim
    assert [op.name for op in result.ops if not op.agrees] == [victim], "each operator is judged alone"
    assert result.first_difference.differing > 0
    assert result.first_difference.max_difference >= 1
    (path,) = (tmp_path / "saved").iterdir()
    assert result.saved == str(path)
    assert str(result) == f"differs from the oracle on host: {victim}; inputs and results are in {path}"
    with np.load(path) as saved:
        assert {"expected", "got", "arg0", "arg1"} <= set(saved)
        assert (saved["expected"] != saved["got"]).sum() == result.first_difference.differing


@pytest.mark.parametrize("target", ["x86-64-avx2", "host"])
def test_weights_that_both_sides_read_show_in_the_golden_output(bundle_of: Callable[..., Path], target: str) -> None:
    bundle = read(bundle_of("residual", target=target))
    result = verify(with_negated(bundle, bundle.manifest["packed"]["relu"][0]["parameter"]))
    assert not result.ok
    assert not result.outputs_agree


def test_outputs_that_alone_differ_are_saved(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    """AVX2 has no sums of weights beside them that would tell."""
    bundle = read(bundle_of("residual", target="x86-64-avx2"))
    result = verify(with_negated(bundle, bundle.manifest["packed"]["relu"][0]["parameter"]), save=tmp_path)
    assert result.first_difference is None
    assert "the outputs, though each operator agrees on the bundle's own weights" in str(result)
    assert result.saved == str(tmp_path / "outputs.npz")
    with np.load(tmp_path / "outputs.npz") as saved:
        np.testing.assert_array_equal(saved["expected0"], bundle.golden()[1][0])
        assert (saved["expected0"] != saved["got0"]).any()


def test_an_operator_s_name_stays_in_the_folder(tmp_path: Path) -> None:
    path = _save(tmp_path / "deep", "../../up", {"got": np.zeros(1, np.float32)})
    assert path.parent == tmp_path / "deep"
    assert [found.name for found in tmp_path.rglob("*.npz")] == [path.name]


def test_a_folder_that_cannot_be_written_is_one_line(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    bundle = read(bundle_of("residual"))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*(outputs|relu).npz: saw "):
        verify(with_negated(bundle, bundle.manifest["packed"]["relu"][0]["parameter"]), save=tmp_path / "file")


def test_nothing_is_saved_of_a_sound_bundle(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    assert verify(bundle_of("residual"), save=tmp_path / "saved").ok
    assert not (tmp_path / "saved").exists()
