"""Folders in the transformers layout: what comes in, the example inputs, and one clear line for the rest."""

# ruff: noqa: E402

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from tvmq.cli import main
from tvmq.errors import ModelError
from tvmq.importer import hf, source
from tvmq.importer.load import import_model

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZE, vocab_size=50, max_position_embeddings=12, num_labels=3)
    folder = tmp_path_factory.mktemp("hf") / "tiny-bert"
    transformers.BertForSequenceClassification(config).half().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_text(made: Path) -> None:
    model = import_model(made)
    assert model.name == "tiny-bert"
    assert [str(spec) for spec in model.signature.inputs] == ["input_ids: int64[1, 11]", "attention_mask: int64[1, 11]"]
    assert [str(spec) for spec in model.signature.outputs] == ["logits: float32[1, 3]"]
    reloaded = transformers.BertForSequenceClassification.from_pretrained(made).float().eval()
    with torch.no_grad():
        expected = reloaded(*map(torch.from_numpy, model.example)).logits
    np.testing.assert_allclose(model.reference[0], expected, atol=1e-6)


def test_example_inputs_may_be_given(made: Path) -> None:
    found = source.read(str(made), {"input_ids": np.ones((2, 5), np.int64)}, "mine")
    assert found.name == "mine" and [x.shape for x in found.example] == [(2, 5)]


def test_a_command_takes_a_folder(made: Path, tmp_path: Path) -> None:
    assert main(["sparse", "inspect", str(made), "--json"]) == 0


MODELS: dict[str, tuple[Callable[[], object], dict[str, tuple[int, ...]]]] = {
    "image": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**SIZE, image_size=(16, 32), patch_size=8)),
        {"pixel_values": (1, 3, 16, 32)},
    ),
    "spectrogram": (
        lambda: transformers.ASTModel(transformers.ASTConfig(**SIZE, max_length=32, num_mel_bins=16)),
        {"input_values": (1, 32, 16)},
    ),
    "positions after padding": (
        lambda: transformers.RobertaModel(
            transformers.RobertaConfig(**SIZE, vocab_size=9, max_position_embeddings=12, pad_token_id=1)
        ),
        {"input_ids": (1, 10), "attention_mask": (1, 10)},
    ),
    "encoder and decoder": (
        lambda: transformers.T5Model(transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        {"input_ids": (1, 127), "attention_mask": (1, 127), "decoder_input_ids": (1, 127)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_example_inputs_fit(name: str) -> None:
    make, shapes = MODELS[name]
    model = hf.prepared(make())
    example = hf.example_inputs(model)
    assert {key: tuple(value.shape) for key, value in example.items()} == shapes
    with torch.no_grad():
        assert all(isinstance(value, torch.Tensor) for value in model(**example).values())


@pytest.mark.parametrize(
    ("preprocessor", "size"),
    [
        ({"size": 20}, (20, 20)),
        ({"size": {"height": 8, "width": 16}}, (8, 16)),
        ({"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}, (24, 24)),
        ({"size": {"shortest_edge": 30}, "crop_size": 24, "do_center_crop": False}, (30, 30)),
        ({}, (224, 224)),
    ],
)
def test_size_of_images(preprocessor: dict, size: tuple[int, int]) -> None:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    example = hf.example_inputs(transformers.ResNetModel(config), preprocessor)
    assert example["pixel_values"].shape == (1, 3, *size)


def test_models_of_other_inputs() -> None:
    config = transformers.TimesformerConfig(**SIZE, image_size=16, patch_size=8, num_frames=2)
    model = transformers.TimesformerModel(config)
    model.main_input_name = "video"
    with pytest.raises(ModelError, match=r"inputs of TimesformerModel: expected .*, saw video; pass import_model"):
        hf.example_inputs(model)


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    _without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _incomplete(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["classifier.weight"]
    save_file(weights, path, {"format": "pt"})


SPOILED: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), r"saw no config.json; save_pretrained"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: expected a JSON object"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected a JSON object, saw list"),
    (lambda folder: _edit(folder, model_type="no-such-type"), "config.json: expected a model type of transformers"),
    (lambda folder: _edit(folder, architectures=["Mine"]), "expected an architecture of transformers, saw Mine"),
    (lambda folder: _edit(folder, quantization_config={"bits": 4}), "expected a float model, saw quantization_config"),
    (lambda folder: _edit(folder, hidden_size="wide"), "wide"),
    (_without_weights, "expected model.safetensors, saw none"),
    (_pickled, "saw pickled weights, which are never loaded"),
    (_truncated, "expected a model that transformers can load"),
    (_incomplete, "expected weights of BertForSequenceClassification, saw none for classifier.weight"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILED, ids=[says for _, says in SPOILED])
def test_folders_that_are_not_sound(folder: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=says) as caught:
        import_model(folder)
    assert "\n" not in str(caught.value)


def test_without_transformers(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "tvmq.importer.hf")
    monkeypatch.delattr("tvmq.importer.hf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'tvmq\[hf\]'"):
        import_model(made)
