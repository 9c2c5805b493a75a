"""Bundles of several sizes: right between them, here and on a board, whole or refused, and small: weights are shared."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import NativeServing
from torch import nn

from tvmq.deploy import bundle as bundles
from tvmq.deploy.bundle import read
from tvmq.deploy.executor import DynamicExecutor, load
from tvmq.errors import BundleError, RecipeError, SignatureError
from tvmq.importer.load import import_model
from tvmq.measure import bundle_bench
from tvmq.measure.verify import verify
from tvmq.model import Model
from tvmq.pipeline import compile_model
from tvmq.recipe import Recipe

Native = Callable[..., subprocess.CompletedProcess[str]]
X = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    """A batch of images; a result a row, and one of none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 16, 128)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.fc(x.flatten(1)), self.fc.bias * 2


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def model(module: nn.Module) -> Model:
    return import_model(module, X[:1], dynamic="x:0=1,2,4")


@pytest.fixture(scope="module")
def paths(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dynamic")
    made = {precision: folder / f"{precision}.tvmq" for precision in ("fp32", "int8")}
    for precision, path in made.items():
        compile_model(model, "host", Recipe(precision=precision), [X] if precision == "int8" else None, path)
    return made


def test_every_size_is_the_modules(module: nn.Module, paths: dict[str, Path]) -> None:
    executor = load(paths["fp32"])
    for n in (1, 2, 3, 4):
        got, constant = executor(X[:n])
        with torch.no_grad():
            wanted, other = module(torch.from_numpy(X[:n]))
        assert got.shape == (n, 128)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        np.testing.assert_allclose(constant, other, atol=1e-6)


def test_a_row_has_the_same_bits_in_each_size(paths: dict[str, Path]) -> None:
    executor = load(paths["int8"])
    alone = np.concatenate([executor(X[i : i + 1])[0] for i in range(4)])
    for n in (2, 3, 4):
        np.testing.assert_array_equal(executor(X[:n])[0], alone[:n])


def test_it_has_the_habits_of_an_executor(paths: dict[str, Path]) -> None:
    with load(paths["int8"]) as executor:
        assert isinstance(executor, DynamicExecutor)
        with pytest.raises(SignatureError, match="expected every input set, saw nothing for x"):
            executor.run()
        assert executor.benchmark(repeat=1, min_repeat_ms=1).min_ms > 0
        executor.set_input("x", X[:3])
        with pytest.raises(SignatureError, match="expected a run before it"):
            executor.get_output()
        executor.run()
        assert executor.get_output().shape == (3, 128)
        assert executor.benchmark(repeat=1, min_repeat_ms=1).min_ms > 0
        executor.runner()()
        assert [op.kernel for op in executor.profile(X[:3], repeat=1)] == [
            op.kernel for op in executor.profile(repeat=1)
        ]
        for inputs, said in (
            (X[:5], r"input 'x': expected 1 to 4 along axis 0, saw 5; compile with the sizes that you need: --dynamic"),
            (X[:0], "saw 0"),
            (X[:2, :2], r"expected shape \[2, 3, 8, 8\], saw \[2, 2, 8, 8\]"),
            (X[:2].astype(np.float64), "expected dtype float32"),
        ):
            with pytest.raises(SignatureError, match=said):
                executor(inputs)


def test_on_a_board(paths: dict[str, Path], native_runner: Path) -> None:
    here = load(paths["int8"])
    with NativeServing(native_runner) as serving:
        with load(paths["int8"], f"{serving.url}?secret=none") as there:
            for n in (1, 3, 4):
                np.testing.assert_array_equal(there(X[:n])[0], here(X[:n])[0])
        assert verify(paths["int8"], f"{serving.url}?secret=none").ok
        found = bundle_bench.run([paths["fp32"]], f"{serving.url}?secret=none", repeat=1, min_repeat_ms=1)
        assert len(found.bundles) == 3 and all(one.min_ms > 0 for one in found.latencies)


def test_each_size_is_verified(paths: dict[str, Path]) -> None:
    result = verify(paths["int8"])
    assert result.ok, str(result)
    assert {op.name.rpartition(" at ")[2] for op in result.ops} == {"1", "2", "4"}
    given = verify(paths["int8"], inputs=X[:3])
    assert given.ok and {op.name.rpartition(" at ")[2] for op in given.ops} == {"4"}


def test_each_size_is_measured(paths: dict[str, Path]) -> None:
    found = bundle_bench.run([paths["fp32"]], repeat=1, min_repeat_ms=1)
    assert found.bundles == tuple(f"{paths['fp32']} (x:0={n})" for n in (1, 2, 4))


def test_weights_are_shared(paths: dict[str, Path]) -> None:
    bundle = read(paths["int8"])
    assert bundle.dynamic is not None
    sizes = [sum(array.nbytes for array in one.parameters().values()) for one in bundle.programs()]
    assert len(bundle.members[bundles.PARAMETERS]) < 2 * max(sizes)
    assert len({one.manifest["calibration_sha256"] for one in bundle.programs()}) == 1


def test_a_table_is_made_by_the_size_that_fits(model: Model, tmp_path: Path, paths: dict[str, Path]) -> None:
    done = compile_model(model, "host", Recipe(precision="int8"), iter([X[:2], X[2:4]]), tmp_path / "m.tvmq")
    assert json.loads(read(done.path).members["calibration.json"])["samples"] == 4
    with pytest.raises(RecipeError, match="algorithm bias_correction for several sizes; it would give each size"):
        compile_model(model, "host", Recipe(precision="int8", algorithms=["bias_correction"]), [X], tmp_path / "n.tvmq")
    with pytest.raises(RecipeError, match="integer_io for several sizes"):
        compile_model(model, "host", Recipe(precision="int8", integer_io=True), [X], tmp_path / "n.tvmq")
    assert not (tmp_path / "n.tvmq").exists()


def _rewritten(source: Path, target: Path, change: Callable[[dict], None]) -> Path:
    from test_bundle import rewritten

    def edit(name: str, data: bytes) -> bytes:
        if name != bundles.MANIFEST:
            return data
        manifest = json.loads(data)
        change(manifest)
        return json.dumps(manifest).encode()

    return rewritten(source, target, edit)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("dynamic"), "expected a folder for each but the smallest, saw \\[2, 4\\]"),
        (lambda m: m["dynamic"].update(sizes=[1, 2]), "expected a folder for each"),
        (lambda m: m["dynamic"].update(sizes="many"), "expected axes, sizes and cuts"),
        (lambda m: m["dynamic"].update(programs=[{}]), "expected 2 other programs"),
        (lambda m: m["dynamic"].update(axes=[["y", 0]]), "expected axes of inputs"),
        (lambda m: m["dynamic"].update(axes=[["x", 4]]), "expected axes of inputs"),
        (lambda m: m["dynamic"].update(cuts=[]), "a cut an output"),
        (lambda m: m["dynamic"]["programs"][0].update(steps=3), "'steps' of type list"),
    ],
    ids=range(8),
)
def test_a_manifest_that_is_not_of_its_members(
    paths: dict[str, Path], tmp_path: Path, change: Callable[[dict], None], said: str
) -> None:
    with pytest.raises(BundleError, match=said):
        read(_rewritten(paths["int8"], tmp_path / "m.tvmq", change))


# --- the native runner's own commands -------------------------------------------------------------------------------


@pytest.fixture
def native(native_runner: Path) -> Native:
    return lambda *words: subprocess.run(
        [str(native_runner), *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )


def _given(folder: Path, **arrays: np.ndarray) -> list[str]:
    """The words that pass inputs."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [word for name in arrays for word in ("--input", f"{name}={folder / name}.npy")]


def test_the_native_runner_takes_every_size(paths: dict[str, Path], native: Native, tmp_path: Path) -> None:
    here = load(paths["int8"])
    for n in (1, 3, 4):
        done = native("run", paths["int8"], *_given(tmp_path, x=X[:n]), "--output", tmp_path / "out")
        assert (done.returncode, done.stderr) == (0, "")
        for spec, want in zip(here.signature.outputs, here(X[:n]), strict=True):
            found = np.load(tmp_path / "out" / f"{spec.name}.npy")
            assert found.dtype == want.dtype
            np.testing.assert_array_equal(found, want)
    assert native("run", paths["int8"]).stdout.count(" as expected\n") == 2


def test_the_native_runner_measures_each_size(paths: dict[str, Path], native: Native, tmp_path: Path) -> None:
    words = ("bench", paths["fp32"], "--repeat", 2)
    assert re.findall(r"^size (\d): [\d.]+ ms median", native(*words).stdout, re.MULTILINE) == ["1", "2", "4"]
    done = native(*words, *_given(tmp_path, x=X[:3]))
    assert re.findall(r"^size (\d): ", done.stdout, re.MULTILINE) == ["4"]


def test_sizes_that_the_native_runner_refuses(paths: dict[str, Path], native: Native, tmp_path: Path) -> None:
    for array, said in (
        (X[:5], "input x: expected 1 to 4 along axis 0, saw 5; compile with the sizes that you need: --dynamic"),
        (X[:0], "expected 1 to 4 along axis 0, saw 0"),
        (X[:3, :2], "expected 'shape': (3, 3, 8, 8), saw"),
        (np.array(1.0, np.float32), "expected an axis 0"),
    ):
        done = native("run", paths["int8"], *_given(tmp_path, x=array))
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_the_native_runner_pads_inner_axes(native: Native, tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.relu(x) + y, torch.cat([x, y], -1).sum(0)

    example = {"x": torch.ones(2, 4, 3), "y": torch.ones(2, 4, 3)}
    path = tmp_path / "m.tvmq"
    compile_model(import_model(Sum(), example, dynamic="x:1,y:1=4,8"), out=path)
    x = np.random.default_rng(1).standard_normal((2, 5, 3)).astype(np.float32)
    done = native("run", path, *_given(tmp_path, x=x, y=x + 1), "--output", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    here = load(path)
    for spec, want in zip(here.signature.outputs, here(x, x + 1), strict=True):
        assert want.shape[-2] == 5
        np.testing.assert_array_equal(np.load(tmp_path / f"{spec.name}.npy"), want)
    for words, said in (
        (_given(tmp_path, x=x), "--input: expected y too: its size varies with that of the others"),
        (_given(tmp_path, x=x, y=x[:, :4]), "input y: expected 5 along axis 1, as others have, saw 4"),
    ):
        done = native("run", path, *words)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("dynamic"),
        lambda m: m["dynamic"].update(sizes=[1, 2]),
        lambda m: m["dynamic"].update(sizes=[1, 4, 2]),
        lambda m: m["dynamic"].update(sizes="many"),
        lambda m: m["dynamic"].update(programs=[{}]),
        lambda m: m["dynamic"].update(axes=[["y", 0]]),
        lambda m: m["dynamic"].update(axes=[["x", 4]]),
        lambda m: m["dynamic"].update(cuts=[]),
        lambda m: m["dynamic"].update(cuts=[{"axis": 0, "each": 9}, None]),
    ],
    ids=range(9),
)
def test_manifests_that_the_native_runner_refuses(
    paths: dict[str, Path], native: Native, tmp_path: Path, change: Callable[[dict], None]
) -> None:
    done = native("run", _rewritten(paths["int8"], tmp_path / "m.tvmq", change))
    assert done.returncode == 2
    assert done.stderr.startswith("tvmq-runner: ") and done.stderr.count("\n") == 1
