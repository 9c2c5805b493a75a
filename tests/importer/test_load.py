"""import_model: what may be a source, what comes out, and one clear line for everything else."""

import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import mutations
import numpy as np
import pytest
import torch
from torch import nn

from tvmq import ir
from tvmq.errors import ImportMismatchError, InputError, ModelError, SignatureError, UnsupportedOpError
from tvmq.importer import source as import_source
from tvmq.importer.load import import_model
from tvmq.model import TensorSpec
from tvmq.oracle import interpret


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.bn(self.conv(image))).mean((2, 3)))


class Two(nn.Module):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"kept": ids * mask, "flags": mask.any(1)}


def _image() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pt2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "small.pt2"
    torch.export.save(torch.export.export(Net().eval(), (_image(),)), path)
    return path


def _repack(path: Path, change) -> None:
    """Rewrite a zip archive; `change(name, data)` gives each member's new data, or None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            new = change(name, data)
            if new is not None:
                archive.writestr(name, new)


class TestModule:
    def test_model_has_signature_example_and_reference(self) -> None:
        model = import_model(Net(), _image())
        assert model.name == "Net"
        assert model.signature.inputs == (TensorSpec("image", (2, 3, 6, 6), "float32"),)
        assert model.signature.outputs == (TensorSpec("linear", (2, 5), "float32"),)
        np.testing.assert_array_equal(model.example[0], _image().numpy())
        np.testing.assert_allclose(interpret.run(model.module, model.example)[0], model.reference[0], atol=1e-5)

    def test_batch_norm_and_constants_are_folded_and_layers_named(self) -> None:
        model = import_model(Net(), _image())
        assert [ir.op_name(call) for _, call in ir.calls(model.module)] == [
            "nn.conv2d", "add", "nn.relu", "mean", "matmul", "add"
        ]  # fmt: skip
        assert model.paths["conv"] == "conv" and model.paths["bn"] == "bn"
        assert set(model.paths) <= {str(var.name) for var, _ in ir.bindings(model.module)}

    def test_modes_of_the_module_stay(self) -> None:
        net = Net().train()
        net.bn.eval()
        import_model(net, _image())
        assert net.training and net.conv.training and not net.bn.training

    def test_training_on_does_not_change_the_model(self) -> None:
        net = nn.Sequential(nn.Linear(3, 2))
        model = import_model(net, torch.ones(1, 3))
        with torch.no_grad():
            net[0].weight.zero_()
            net[0].bias.zero_()
        np.testing.assert_allclose(interpret.run(model.module, model.example)[0], model.reference[0], atol=1e-6)
        assert np.abs(model.reference[0]).max() > 0

    def test_arrays_tuples_and_names_are_examples(self) -> None:
        ids, mask = np.arange(6).reshape(2, 3), np.ones((2, 3), bool)
        for example in ((ids, mask), [ids, mask], {"mask": mask, "ids": ids}, (torch.from_numpy(ids), mask)):
            model = import_model(Two(), example)
            assert {str(spec) for spec in model.signature.inputs} == {"ids: int64[2, 3]", "mask: bool[2, 3]"}
            assert [spec.name for spec in model.signature.outputs] == ["kept", "flags"]
            np.testing.assert_array_equal(model.reference[0], ids)

    def test_outputs_get_unique_names(self) -> None:
        class Twice(nn.Module):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                y = torch.relu(x)
                return y, x, y

        model = import_model(Twice(), torch.randn(3))
        assert [spec.name for spec in model.signature.outputs] == ["relu", "x_2", "relu_2"]

    def test_nested_outputs_are_flat(self) -> None:
        class Nested(nn.Module):
            def forward(self, x: torch.Tensor) -> dict[str, object]:
                return {"a": x + 1, "b": (x + 2, [x + 3])}

        model = import_model(Nested(), torch.zeros(1))
        assert [spec.name for spec in model.signature.outputs] == ["a", "b_0", "b_1_0"]
        assert [float(value[0]) for value in model.reference] == [1, 2, 3]

    def test_nested_inputs_are_flat(self) -> None:
        class Recurrent(nn.Module):
            def forward(
                self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor], more: dict[str, list[torch.Tensor]]
            ) -> tuple[torch.Tensor, torch.Tensor]:
                return x * state[0] + state[1], more["a"][0] - more["a"][1]

        parts = [np.full(2, n, np.float32) for n in range(1, 6)]
        nested = (parts[0], (parts[1], parts[2]), {"a": [parts[3], parts[4]]})
        model = import_model(Recurrent(), nested)
        assert [spec.name for spec in model.signature.inputs] == ["x", "state_0", "state_1", "more_a_0", "more_a_1"]
        assert [value.tolist() for value in model.reference] == [[5, 5], [-1, -1]]
        program = torch.export.export(Recurrent(), import_source._arguments(nested)[0])
        assert [x[0] for x in import_model(program, nested).example] == [1, 2, 3, 4, 5]

    def test_constants_are_bound(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(3, 3)

            def forward(
                self, x: torch.Tensor, mode: str, y: torch.Tensor | None = None, **more: float | torch.Tensor
            ) -> torch.Tensor:
                z = self.fc(x) * (2 if mode == "twice" else 1) * more.get("scale", 1.0)
                return z if y is None else z + y

        module, x, y = Scaled(), torch.randn(2, 3), torch.randn(3)
        for args, kwargs, names in (
            ((x, "twice"), {}, ["x"]),
            ((x, "once", y), {}, ["x", "y"]),
            ((), {"x": x, "mode": "twice", "y": None, "scale": 3.0}, ["x"]),
        ):
            model = import_model(module, kwargs or args)
            assert [spec.name for spec in model.signature.inputs] == names
            assert model.paths["fc"] == "fc"
            with torch.no_grad():
                np.testing.assert_array_equal(model.reference[0], module(*args, **kwargs))
        assert "forward" not in vars(module)

    def test_constants_beside_arguments_without_names(self) -> None:
        class Sum(nn.Module):
            def forward(self, by: float, *parts: torch.Tensor) -> torch.Tensor:
                return torch.stack(parts).sum(0) * by

        with pytest.raises(ModelError, match=r"expected arguments with names beside constants, saw \*parts"):
            import_model(Sum(), (2.0, torch.ones(2)))

    def test_buffers_and_tied_weights(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
                self.head.weight = self.embed.weight
                self.register_buffer("kept", torch.arange(4.0))
                self.register_buffer("not_kept", torch.tensor(2.0), persistent=False)
                self.plain = torch.tensor([1.0, 0.0, 1.0, 0.0])
                self.register_buffer("twice", self.kept)

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.head(self.embed(ids) * self.not_kept + self.kept * self.plain + self.twice)

        module, ids = Tied(), torch.tensor([[0, 4, 2]])
        with torch.no_grad():
            expected = module(ids)
        np.testing.assert_array_equal(import_model(module, ids).reference[0], expected)

    def test_module_that_computes_nothing(self) -> None:
        model = import_model(nn.Identity(), torch.ones(2))
        np.testing.assert_array_equal(interpret.run(model.module, model.example)[0], np.ones(2, np.float32))

    def test_dropout_is_gone(self) -> None:
        assert list(ir.calls(import_model(nn.Dropout(), torch.ones(3)).module)) == []

    @pytest.mark.parametrize(
        ("example", "says"),
        [
            (None, "example inputs"),
            (3, "saw int"),
            ((torch.ones(1), "x"), r"expected what forward\(\) takes, saw too many positional arguments"),
            ((torch.ones(1), (torch.ones(1), None)), "saw NoneType"),
            (torch.ones(2, 7), "cannot trace Linear"),
            (np.ones((2, 3)), "PyTorch cannot run .* same dtype"),
        ],
    )
    def test_unusable_examples(self, example: object, says: str) -> None:
        with pytest.raises(ModelError, match=says):
            import_model(nn.Linear(3, 2), example)

    def test_unusable_source(self) -> None:
        with pytest.raises(ModelError, match=r"expected a torch.nn.Module.*saw int"):
            import_model(3)

    def test_data_dependent_control_flow(self) -> None:
        class Branch(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x if x.sum() > 0 else -x

        with pytest.raises(ModelError, match=r"cannot trace Branch.*control flow"):
            import_model(Branch(), torch.ones(2))

    def test_torch_cond_has_no_converter(self) -> None:
        class Cond(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

        with pytest.raises(UnsupportedOpError, match="no converter for cond"):
            import_model(Cond(), torch.ones(2))

    def test_constant_input(self) -> None:
        class Flag(nn.Module):
            def forward(self, x: torch.Tensor, flag: bool) -> torch.Tensor:
                return x + flag

        program = torch.export.export(Flag(), (torch.ones(2), True))
        with pytest.raises(ModelError, match=r"input 'flag' of model: expected a tensor, saw a constant"):
            import_model(program)

    def test_constant_output(self) -> None:
        class Nothing(nn.Module):
            def forward(self, x: torch.Tensor) -> tuple[object, ...]:
                return x + 1, None

        with pytest.raises(ModelError, match="output 1 of Nothing: expected a tensor"):
            import_model(Nothing(), torch.ones(2))

    def test_state_is_refused(self) -> None:
        class Counter(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("count", torch.zeros(1))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.count.add_(1)
                return x + self.count

        with pytest.raises(ModelError, match=r"writes to 'count'.*without state"):
            import_model(Counter(), torch.ones(2))

    def test_check_can_be_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import tvmq.importer.check as check

        for name in ("compare", "compare_outputs"):
            monkeypatch.setattr(check, name, lambda *_args: pytest.fail("checked"))
        assert import_model(nn.ReLU(), torch.ones(2), check=False).reference[0].tolist() == [1, 1]

    def test_folding_is_checked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import tvmq.importer.load as load

        wrong = import_model(nn.Sigmoid(), torch.ones(2)).module
        monkeypatch.setattr(load, "canonicalize", lambda _module: wrong)
        with pytest.raises(ImportMismatchError, match="output 'relu' is not PyTorch's"):
            import_model(nn.ReLU(), torch.ones(2))


class TestProgram:
    def test_brings_its_own_example(self) -> None:
        program = torch.export.export(nn.ReLU(), (torch.ones(2),))
        assert import_model(program, name="mine").name == "mine"

    def test_given_example_by_name(self) -> None:
        program = torch.export.export(nn.ReLU(), (torch.ones(2),))
        assert import_model(program, {"input": np.full(2, -1, np.float32)}).reference[0].tolist() == [0, 0]
        with pytest.raises(ModelError, match=r"expected \['input'\], saw \['x'\]"):
            import_model(program, {"x": np.ones(2, np.float32)})

    def test_example_that_does_not_fit(self) -> None:
        program = torch.export.export(nn.ReLU(), (torch.ones(2),))
        with pytest.raises(SignatureError, match=r"expected shape \[2\], saw \[3\]"):
            import_model(program, torch.ones(3))

    def test_dynamic_shapes(self) -> None:
        program = torch.export.export(nn.ReLU(), (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("n")},))
        with pytest.raises(ModelError, match=r"model has dynamic shapes: expected static shapes.*torch.export.export"):
            import_model(program)

    @pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm1d(3)])
    def test_training_mode(self, layer: nn.Module) -> None:
        program = torch.export.export(layer.train(), (torch.ones(2, 3),))
        with pytest.raises(ModelError, match=r"training mode.*module.eval\(\)"):
            import_model(program)

    def test_keyword_arguments(self) -> None:
        program = torch.export.export(Two(), (), {"ids": torch.ones(1, 2, dtype=torch.long), "mask": torch.ones(1, 2)})
        assert [spec.name for spec in import_model(program).signature.inputs] == ["ids", "mask"]


class TestPt2:
    def test_file_is_named_after_its_stem(self, pt2: Path) -> None:
        for named in (pt2, str(pt2)):
            model = import_model(named)
            assert model.name == "small"
            np.testing.assert_array_equal(model.example[0], _image().numpy())

    def test_example_may_be_given(self, pt2: Path) -> None:
        assert not import_model(pt2, torch.zeros(2, 3, 6, 6)).example[0].any()

    def test_no_examples_inside(self, tmp_path: Path) -> None:
        program = torch.export.export(nn.ReLU(), (torch.ones(2),))
        program.example_inputs = None
        torch.export.save(program, tmp_path / "bare.pt2")
        with pytest.raises(
            ModelError, match=r"bare carries no example inputs; pass import_model\(..., example_inputs\)"
        ):
            import_model(tmp_path / "bare.pt2")
        assert import_model(tmp_path / "bare.pt2", torch.ones(2)).name == "bare"

    def test_missing_folder_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="saw nothing there"):
            import_model(tmp_path / "none.pt2")
        (tmp_path / "folder.pt2").mkdir()
        with pytest.raises(ModelError, match="saw a folder"):
            import_model(tmp_path / "folder.pt2")
        with pytest.raises(ModelError, match=r"expected a .pt2 or .onnx file, a folder .*saw .h5"):
            import_model("weights.h5")
        with pytest.raises(ModelError, match="saw no suffix"):
            import_model(tmp_path / "model")

    def test_unreadable(self, pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def deny(*_args: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", deny)
        with pytest.raises(ModelError, match="readable file, saw Permission denied"):
            import_model(pt2)

    def test_pickle_is_never_loaded(self, tmp_path: Path) -> None:
        path = tmp_path / "bare.pt2"
        path.write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
        with pytest.raises(ModelError, match=r"no zip archive.*torch.export.save"):
            import_model(path)
        torch.save(_Bomb(tmp_path / "boom"), path)  # a zip archive, but of torch.save
        with pytest.raises(ModelError, match="that something else wrote"):
            import_model(path)
        assert not (tmp_path / "boom").exists()

    @pytest.mark.parametrize(
        ("member", "says"),
        [
            ("data/sample_inputs/model.pt", "more than tensors"),
            ("data/weights/weight_0", "more than tensors"),
            ("data/constants/tensor_0", "more than tensors"),
            ("data/constants/custom_obj_0", "no tensor"),
            ("data/constants/opaque_obj_0", "no tensor"),
        ],
    )
    def test_pickles_inside_are_never_loaded(self, pt2: Path, tmp_path: Path, member: str, says: str) -> None:
        buffer = io.BytesIO()
        torch.save((_Bomb(tmp_path / "boom"),), buffer)
        folder, name = member.rsplit("/", 1)
        entry = b'"x": {"path_name": "%s", "is_param": false, "use_pickle": true, "tensor_meta": null}' % name.encode()

        def plant(path: str, data: bytes) -> bytes | None:
            if path.endswith("_config.json") and path.split("/", 1)[1].startswith(folder):
                inner = data.split(b"{", 2)[2]
                return b'{"config": {' + entry + (b"" if inner.startswith(b"}") else b", ") + inner
            return buffer.getvalue() if path.endswith(member) else data

        _repack(pt2, plant)
        if "constants" in member:
            with zipfile.ZipFile(pt2, "a") as archive:
                archive.writestr(f"small/{member}", buffer.getvalue())
        with pytest.raises(ModelError, match=says):
            import_model(pt2)
        assert not (tmp_path / "boom").exists()

    def test_text_of_symbols_is_never_evaluated(self, pt2: Path) -> None:
        def plant(path: str, data: bytes) -> bytes:
            return data.replace(b'{"as_int": 4}', b'{"as_expr": {"expr_str": "exit()"}}') if "models/" in path else data

        _repack(pt2, plant)
        with pytest.raises(ModelError, match="a size that is no arithmetic .* which was not evaluated"):
            import_model(pt2)

    def test_dynamic_file(self, tmp_path: Path) -> None:
        shapes = ({0: torch.export.Dim("n")},)
        torch.export.save(
            torch.export.export(nn.ReLU(), (torch.ones(2, 3),), dynamic_shapes=shapes), tmp_path / "d.pt2"
        )
        with pytest.raises(ModelError, match="has dynamic shapes"):
            import_model(tmp_path / "d.pt2")

    def test_compiled_package(self, pt2: Path) -> None:
        with zipfile.ZipFile(pt2, "a") as archive:
            archive.writestr("small/data/aotinductor/model/model.so", b"\x7fELF")
        with pytest.raises(ModelError, match="machine code"):
            import_model(pt2)

    @pytest.mark.parametrize(
        ("left_out", "says"),
        [("models/model.json", "no model"), ("weights_config.json", "old PyTorch"), ("weight_0", "damaged")],
    )
    def test_members_missing(self, pt2: Path, left_out: str, says: str) -> None:
        _repack(pt2, lambda path, data: None if path.endswith(left_out) else data)
        with pytest.raises(ModelError, match=says):
            import_model(pt2)

    @pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff"])
    def test_garbled_graph(self, pt2: Path, content: bytes) -> None:
        _repack(pt2, lambda path, data: content if path.endswith("models/model.json") else data)
        with pytest.raises(ModelError, match="damaged"):
            import_model(pt2)

    @pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
    def test_truncated(self, pt2: Path, part: float) -> None:
        data = pt2.read_bytes()
        pt2.write_bytes(data[: int(part * len(data))])
        with pytest.raises(ModelError, match=r"truncated|empty"):
            import_model(pt2)


def _read_mutated(path: Path, seeds: range, whole: bool) -> None:
    """Read damaged copies of a file, and import those that can be read where `whole`."""
    data = path.read_bytes()
    for seed in seeds:
        path.write_bytes(data)
        mutations.mutated_archive(path, seed)
        try:
            if whole:
                import_model(path)
            else:
                import_source.read(path)
        except InputError as error:
            assert "\n" not in str(error)


def test_mutated_files_do_not_crash(pt2: Path) -> None:
    _read_mutated(pt2, range(50), whole=False)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_many_mutated_files_do_not_crash(pt2: Path, start: int) -> None:
    _read_mutated(pt2, range(start, start + 100), whole=True)


def test_a_newer_pytorch_s(pt2: Path) -> None:
    def later(path: str, data: bytes) -> bytes:
        if not path.endswith("models/model.json"):
            return data
        graph = json.loads(data)
        graph["schema_version"]["major"] += 1
        return json.dumps(graph).encode()

    _repack(pt2, later)
    with pytest.raises(ModelError, match="of another PyTorch version"):
        import_model(pt2)


def test_an_operator_of_a_newer_pytorch(pt2: Path) -> None:
    _repack(pt2, lambda path, data: data.replace(b"aten.relu.default", b"aten.relu99.default"))
    with pytest.raises(ModelError, match="relu99"):
        import_model(pt2)


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class TestReference:
    @pytest.fixture(autouse=True)
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        package = tmp_path / "shop_models"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "nets.py").write_text(
            "import torch\n"
            "def relu(): return torch.nn.ReLU(), torch.ones(2)\n"
            "def program(): return torch.export.export(*relu()[:1], (torch.ones(2),))\n"
            "def three(): return 1, 2, 3\n"
            "def nothing(): return None\n"
            "network = torch.nn.ReLU()\n"
            "size = 3\n"
        )
        (package / "broken.py").write_text("import not_installed_anywhere\n")
        (package / "typo.py").write_text("def f(:\n")
        (package / "renamed.py").write_text("from shop_models.nets import gone\n")
        monkeypatch.chdir(tmp_path)
        yield package
        for name in [name for name in sys.modules if name.startswith("shop_models")]:
            del sys.modules[name]

    def test_function_returns_module_and_examples(self) -> None:
        path = list(sys.path)
        model = import_model("shop_models.nets:relu")
        assert model.name == "relu" and model.reference[0].tolist() == [1, 1]
        assert sys.path == path

    def test_function_may_return_a_program(self) -> None:
        assert import_model("shop_models.nets:program", name="mine").name == "mine"

    def test_given_examples_come_first(self) -> None:
        assert import_model("shop_models.nets:relu", torch.zeros(3)).signature.inputs[0].shape == (3,)

    @pytest.mark.parametrize(
        ("reference", "says"),
        [
            ("shop_models.nets:rleu", "no function 'rleu' in shop_models.nets; did you mean 'relu'"),
            ("shop_models.nests:relu", "no module 'shop_models.nests'; did you mean 'shop_models.nets'"),
            ("shop_model:relu", "no module 'shop_model'; did you mean 'shop_models'"),
            ("shop_models.nets:three", r"saw one that returns \(int, int, int\)"),
            ("shop_models.nets:nothing", "saw one that returns NoneType"),
            ("shop_models.nets:network", "expected a function that returns .* saw ReLU"),
            ("shop_models.nets:size", "saw int"),
            (
                "shop_models.broken:f",
                "importing shop_models.broken fails: saw No module named 'not_installed_anywhere'",
            ),
            ("shop_models.typo:f", "importing shop_models.typo fails: saw SyntaxError"),
            ("shop_models.renamed:f", "importing shop_models.renamed fails: saw ImportError"),
            ("no such:thing", "is no module name"),
            (":f", "is no module name"),
        ],
    )
    def test_mistakes_are_one_line(self, reference: str, says: str) -> None:
        with pytest.raises(ModelError, match=says) as caught:
            import_model(reference)
        assert "\n" not in str(caught.value)
