"""A folder in the transformers layout (config.json and safetensors) as a module with example inputs, without network.

Code that a folder brings is never run, and pickled weights (pytorch_model.bin) are never loaded.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from tvmq.errors import ModelError

# The lengths of examples of models that take any: tokens, pixels of a side, and samples of sound (a second at 16 kHz).
TOKENS, PIXELS, SAMPLES = 128, 224, 16000
_SEED = 0
_Config = transformers.PretrainedConfig
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# What transformers raises for a configuration that it cannot use, or for weights that do not fit it.
_UNUSABLE = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    safetensors.SafetensorError,
    StrictDataclassError,
)


def read(folder: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """(the model in float32, its example inputs by name). Raises ModelError."""
    config = _config(folder)
    kind = _class(config, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = kind.from_pretrained(
                str(folder),
                config=config,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except _UNUSABLE as error:
        raise _refused(folder, "a model that transformers can load", error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{folder}", expected=f"weights of {kind.__name__}", seen=f"none for {', '.join(missing[:3])}")
    return prepared(model), example_inputs(model, _preprocessor(folder))


def prepared(model: Any) -> torch.nn.Module:
    """`model`, which from now on returns its outputs by name, and no cache of keys and values."""
    model.eval()
    owned = (part.config for part in model.modules() if isinstance(getattr(part, "config", None), _Config))
    for config in (*owned, *_parts(model.config)):
        config.return_dict = True
        if hasattr(config, "use_cache"):
            config.use_cache = False
    found: torch.nn.Module = model
    return found


def _config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        hint = "save_pretrained(folder, safe_serialization=True) of transformers writes it"
        raise ModelError(f"{folder}", expected="config.json and model.safetensors", seen="no config.json", hint=hint)
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(path, "a JSON object", error) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}", expected="a JSON object", seen=type(found).__name__)
    if found.get("quantization_config"):
        hint = "save the float model, and quantize it with tvmq"
        raise ModelError(f"{path}", expected="a float model", seen="quantization_config", hint=hint)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        seen = "pickled weights, which are never loaded" if list(folder.glob("*.bin")) else "none"
        hint = "load it in transformers and write it with save_pretrained(folder)"
        raise ModelError(f"weights in {folder}", expected=_WEIGHTS[0], seen=seen, hint=hint)
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except _UNUSABLE as error:
        raise _refused(path, "a model type of transformers", error) from error


def _class(config: Any, folder: Path) -> Any:
    """The class that the configuration names, which must be one of transformers' own."""
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise ModelError(f"{folder}", expected="an architecture of transformers", seen=names[0])
    return kind


def _refused(what: Path, expected: str, error: Exception) -> ModelError:
    text = " ".join(str(error).split()) or type(error).__name__
    return ModelError(f"{what}", expected=expected, seen=text[:200])


def _preprocessor(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- Example inputs ----


def example_inputs(model: Any, preprocessor: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Seeded inputs that fit the model's configuration, of one sample, in the order of its `forward`.

    Tokens are drawn from the vocabulary and all attended to; images are of the preprocessor's or the configuration's
    size; sound is a second of it, or the frames that the configuration asks for. Raises ModelError for a model of
    other inputs.
    """
    accepted = [name for name in inspect.signature(model.forward).parameters if name in _MAKERS]
    main = model.main_input_name
    wanted = {main, *_WITH.get(main, ())}
    if "pixel_values" in accepted and "input_ids" in accepted:
        wanted |= {"input_ids", "pixel_values", *_WITH["input_ids"]}
    if getattr(model.config, "is_encoder_decoder", False):
        wanted |= {"decoder_input_ids"}
    if main not in accepted:
        hint = "pass import_model(module, example_inputs)"
        raise ModelError(f"inputs of {type(model).__name__}", expected=sorted(_MAKERS), seen=main, hint=hint)
    configs = [model.config, *_parts(model.config)]
    draw = torch.Generator().manual_seed(_SEED)
    return {name: _MAKERS[name](configs, preprocessor or {}, draw) for name in accepted if name in wanted}


def _parts(config: Any) -> list[Any]:
    """The configurations inside one: of the text and of the image part, of a backbone."""
    inner = [value for value in vars(config).values() if isinstance(value, _Config)]
    return [*inner, *(part for value in inner for part in _parts(value))]


def _first(configs: list[Any], *names: str, default: Any) -> Any:
    """The first attribute of these names that a configuration has."""
    found = (getattr(config, name, None) for name in names for config in configs)
    return next((value for value in found if value is not None), default)


def _tokens(configs: list[Any], _preprocessor: Mapping[str, Any], draw: torch.Generator) -> torch.Tensor:
    vocabulary = _first(configs, "vocab_size", default=1)
    return torch.randint(0, vocabulary, (1, _length(configs)), generator=draw)


def _length(configs: list[Any]) -> int:
    # Some tables of positions begin after the padding token's.
    reserved = 1 + (_first(configs, "pad_token_id", default=0) or 0)
    most = _first(configs, "max_position_embeddings", "n_positions", "max_target_positions", default=TOKENS)
    return max(1, min(TOKENS, int(most) - (reserved if int(most) < TOKENS + reserved else 0)))


def _attended(configs: list[Any], _preprocessor: Mapping[str, Any], _draw: torch.Generator) -> torch.Tensor:
    return torch.ones(1, _length(configs), dtype=torch.int64)


def _image(configs: list[Any], preprocessor: Mapping[str, Any], draw: torch.Generator) -> torch.Tensor:
    channels = _first(configs, "num_channels", "in_channels", default=3)
    return torch.randn(1, channels, *_size(configs, preprocessor), generator=draw)


def _size(configs: list[Any], preprocessor: Mapping[str, Any]) -> tuple[int, int]:
    given = preprocessor.get("crop_size") if preprocessor.get("do_center_crop", True) else None
    given = given or preprocessor.get("size") or _first(configs, "image_size", default=PIXELS)
    if isinstance(given, Mapping):
        side = next((given[key] for key in ("shortest_edge", "longest_edge") if key in given), PIXELS)
        given = given.get("height", side), given.get("width", side)
    height, width = given if isinstance(given, list | tuple) else (given, given)
    return int(height), int(width)


def _frames(configs: list[Any], _preprocessor: Mapping[str, Any], draw: torch.Generator) -> torch.Tensor:
    """Mel spectrograms, channels first (Whisper: two frames a position of the encoder)."""
    bins = _first(configs, "num_mel_bins", default=80)
    return torch.randn(1, bins, 2 * _first(configs, "max_source_positions", default=50), generator=draw)


def _sound(configs: list[Any], _preprocessor: Mapping[str, Any], draw: torch.Generator) -> torch.Tensor:
    """Samples of a wave, or a spectrogram of (max_length, num_mel_bins) where the configuration has one."""
    bins, length = _first(configs, "num_mel_bins", default=None), _first(configs, "max_length", default=None)
    shape = (1, SAMPLES) if bins is None or length is None else (1, int(length), int(bins))
    return torch.randn(*shape, generator=draw)


_MAKERS = {
    "input_ids": _tokens,
    "attention_mask": _attended,
    "decoder_input_ids": _tokens,
    "pixel_values": _image,
    "input_features": _frames,
    "input_values": _sound,
}
# What goes with a main input; a mask over sound changes shapes by its values, and is left out.
_WITH = {"input_ids": ("attention_mask",)}
