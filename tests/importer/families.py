"""Architectures of transformers, small and with random weights: imported, and compiled to int8.

    python tests/importer/families.py [--out docs/families.md] [--known FILE.json] [family ...]

For each family: the largest relative error of the imported model's outputs against PyTorch's (at most 1e-3), and the
cosine of the int8 bundle's outputs to PyTorch's (at least 0.97, calibrated on four random samples that the measured one is
not among, on this machine). With `--known` what the file holds is not measured again, and what is measured goes into it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import tvmq
from tvmq.errors import TvmqError
from tvmq.files import atomic_write_text
from tvmq.importer import hf
from tvmq.importer.check import deviation
from tvmq.oracle import interpret

MOST_ERROR, LEAST_COSINE = 1e-3, 0.97
SAMPLES = 4

_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {**_WIDTH, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16}
_VIT = {**_WIDTH, "image_size": 32, "patch_size": 8}
_STAGES = {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}
_SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 64}
_WAVE = {**_WIDTH, "conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8)}
_WAVE |= {"num_feat_extract_layers": 3}
_WAVE |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "vocab_size": 32, "conv_bias": False}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 64}
_BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32}
# Its default is the largest of the family: half of the depth of the smallest, and a quarter of its channels.
_EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
_NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
_RESNET = {"embedding_size": 8, "layer_type": "basic", **_STAGES, "out_features": ["stage4"]}

# Group -> family -> (class, fields of its configuration). The configuration's class is the model class's.
FAMILIES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "text": {
        "ALBERT": ("AlbertForSequenceClassification", {**_TEXT, "embedding_size": 16}),
        "BART": ("BartForConditionalGeneration", _BART),
        "BERT": ("BertForSequenceClassification", _TEXT),
        "BLOOM": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
        "CamemBERT": ("CamembertForTokenClassification", {**_TEXT, "pad_token_id": 1}),
        "DeBERTa v2": ("DebertaV2ForSequenceClassification", _TEXT),
        "DistilBERT": (
            "DistilBertForQuestionAnswering",
            {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "max_position_embeddings": 32},
        ),
        "ELECTRA": ("ElectraForTokenClassification", {**_TEXT, "embedding_size": 16}),
        "Falcon": ("FalconForCausalLM", _TEXT),
        "Gemma": ("GemmaForCausalLM", _DECODER),
        "GPT-2": ("GPT2LMHeadModel", _GPT),
        "GPT-NeoX": ("GPTNeoXForCausalLM", _TEXT),
        "Llama": ("LlamaForCausalLM", _DECODER),
        "Mistral": ("MistralForCausalLM", _DECODER),
        "MobileBERT": (
            "MobileBertForSequenceClassification",
            {**_TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        ),
        "ModernBERT": ("ModernBertForSequenceClassification", {**_TEXT, "pad_token_id": 0, "cls_token_id": 1}),
        "MPNet": ("MPNetForSequenceClassification", {**_TEXT, "pad_token_id": 1}),
        "OPT": ("OPTForCausalLM", {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        "Phi": ("PhiForCausalLM", _TEXT),
        "Qwen2": ("Qwen2ForCausalLM", _DECODER),
        "Qwen3": ("Qwen3ForCausalLM", _DECODER),
        "RoBERTa": ("RobertaForSequenceClassification", {**_TEXT, "pad_token_id": 1}),
        "SqueezeBERT": ("SqueezeBertForSequenceClassification", {**_TEXT, "embedding_size": 32}),
        "T5": (
            "T5ForConditionalGeneration",
            {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64},
        ),
        "XLM-RoBERTa": ("XLMRobertaForSequenceClassification", {**_TEXT, "pad_token_id": 1}),
    },
    "vision": {
        "BEiT": ("BeitForImageClassification", _VIT),
        "BiT": ("BitForImageClassification", {"embedding_size": 8, **_STAGES, "num_groups": 4, "_side": 64}),
        "ConvNeXt": ("ConvNextForImageClassification", {**_STAGES, "image_size": 64}),
        "ConvNeXt V2": ("ConvNextV2ForImageClassification", {**_STAGES, "image_size": 64}),
        "DeiT": ("DeiTForImageClassification", _VIT),
        "DINOv2": ("Dinov2ForImageClassification", {**_VIT, "mlp_ratio": 2}),
        "EfficientNet": (
            "EfficientNetForImageClassification",
            {"image_size": 64, **_EFFICIENT},
        ),
        "FocalNet": ("FocalNetForImageClassification", {"image_size": 64, "embed_dim": 16, "depths": [1, 1]}),
        "LeViT": (
            "LevitForImageClassification",
            {"image_size": 64, "hidden_sizes": [16, 32, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1]},
        ),
        "MobileNetV1": ("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, "image_size": 64}),
        "MobileNetV2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "image_size": 64}),
        "MobileViT": (
            "MobileViTForImageClassification",
            {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
        ),
        "PoolFormer": ("PoolFormerForImageClassification", {**_STAGES, "_side": 64}),
        "PVT": ("PvtForImageClassification", {**_STAGES, "image_size": 64, "num_attention_heads": [1, 2, 2, 4]}),
        "RegNet": ("RegNetForImageClassification", {"embedding_size": 8, "groups_width": 8, **_STAGES, "_side": 64}),
        "ResNet": ("ResNetForImageClassification", {**_RESNET, "_side": 64}),
        "Swin": ("SwinForImageClassification", _SWIN),
        "Swin V2": ("Swinv2ForImageClassification", _SWIN),
        "ViT": ("ViTForImageClassification", _VIT),
        "ViT MSN": ("ViTMSNForImageClassification", _VIT),
    },
    "segmentation and depth": {
        "DPT": (
            "DPTForDepthEstimation",
            {**_VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], **_NECK},
        ),
        "GLPN": ("GLPNForDepthEstimation", {**_STAGES, "num_attention_heads": [1, 2, 2, 4], "_side": 64}),
        "MobileNetV2 segmentation": (
            "MobileNetV2ForSemanticSegmentation",
            {"depth_multiplier": 0.25, "image_size": 64},
        ),
        "SegFormer": (
            "SegformerForSemanticSegmentation",
            {**_STAGES, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32, "_side": 64},
        ),
    },
    "detection": {
        "DETR": (
            "DetrForObjectDetection",
            {
                **_BART,
                "num_queries": 5,
                "use_timm_backbone": False,
                "backbone": None,
                "_backbone": "ResNet",
                "_side": 64,
            },
        ),
        "YOLOS": ("YolosForObjectDetection", {**_VIT, "image_size": [32, 32], "num_detection_tokens": 5}),
    },
    "audio": {
        "AST": ("ASTForAudioClassification", {**_WIDTH, "max_length": 64, "num_mel_bins": 32}),
        "HuBERT": ("HubertForCTC", _WAVE),
        "Wav2Vec2": ("Wav2Vec2ForCTC", _WAVE),
        "WavLM": ("WavLMForCTC", _WAVE),
        "Whisper encoder": ("WhisperForAudioClassification", {**_BART, "num_mel_bins": 16, "max_source_positions": 32}),
    },
    "text with images": {
        "CLIP": ("CLIPModel", {"text_config": _TEXT, "vision_config": _VIT, "projection_dim": 16}),
        "SigLIP": ("SiglipModel", {"text_config": _TEXT, "vision_config": _VIT}),
    },
}


@dataclass(frozen=True)
class Verdict:
    """What became of a family. error, cosine: None where it did not come so far; then `refusal` says why."""

    group: str
    family: str
    kind: str
    error: float | None = None
    cosine: float | None = None
    integers: int = 0
    operators: int = 0
    refusal: str = ""

    @property
    def passes(self) -> bool:
        within = self.error is not None and self.error <= MOST_ERROR
        return within and self.cosine is not None and self.cosine >= LEAST_COSINE


def make(family: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of a family with seeded random weights, and its example inputs."""
    kind, fields = next(families[family] for families in FAMILIES.values() if family in families)
    fields = dict(fields)
    if not kind.endswith("Answering"):
        fields.setdefault("num_labels", 16)
    side = fields.pop("_side", None)
    if fields.pop("_backbone", None):
        fields["backbone_config"] = transformers.ResNetConfig(**_RESNET)
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = hf.prepared(cls(cls.config_class(**fields)))
    _spread(model)
    example = hf.example_inputs(model, {"size": side} if side else None)
    _measure(model, example)
    return model, example


def _spread(model: torch.nn.Module) -> None:
    """Weights as of a trained model in size: at their initial 0.02 such small models hardly depend on their inputs."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(layer.weight)


def _measure(model: torch.nn.Module, example: dict[str, torch.Tensor]) -> None:
    """Factors of batch norms near 1, offsets of images' ones positive, and statistics from random inputs.

    At initial statistics the signals of deep networks die. Without offsets each batch norm and ReLU amplify any
    disturbance by 1.2 (Yang et al., 2019, "A mean field theory of batch normalization"), which training undoes: 27 layers
    of MobileNetV1, rounded to 8 bits by PyTorch alone, gave results of a cosine of 0.93.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    if norms:
        draw = torch.Generator().manual_seed(2)
        batch = {name: torch.randn(8, *value.shape[1:], generator=draw) for name, value in example.items()}
        for norm in norms:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            if isinstance(norm, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(norm.bias, 0.0, 1.5)
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            model(**batch)
        model.eval()


def judge(group: str, family: str, folder: Path) -> Verdict:
    """Import a family, compile it to int8, run it."""
    kind = next(families[family] for families in FAMILIES.values() if family in families)[0]
    error = None
    try:
        module, example = make(family)
        model = tvmq.import_model(module, example, name=family, tolerance=MOST_ERROR)
        found = interpret.run(model.module, model.example)
        error = max(deviation(value, reference) for value, reference in zip(found, model.reference, strict=True))
        done = tvmq.compile(model, "host", tvmq.Recipe(precision="int8"), _samples(example), folder / "m.tvmq")
        values = tvmq.load(done.path)(*model.example)
    except TvmqError as refused:
        return Verdict(group, family, kind, error, refusal=str(refused))
    pairs = zip(values, model.reference, strict=True)
    cosine = min(_cosine(value, reference) for value, reference in pairs if reference.dtype.kind == "f")
    integers = sum(row["precision"] == "int8" for row in done.operators)
    return Verdict(group, family, kind, error, cosine, integers, len(done.operators))


def _samples(example: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Others like the example: other numbers, tokens in another order."""
    draw = torch.Generator().manual_seed(1)

    def like(value: torch.Tensor) -> torch.Tensor:
        if value.is_floating_point():
            return torch.randn(value.shape, generator=draw)
        return value[:, torch.randperm(value.shape[1], generator=draw)]

    return [{name: like(value) for name, value in example.items()} for _ in range(SAMPLES)]


def _cosine(value: np.ndarray, reference: np.ndarray) -> float:
    a, b = value.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))


class Known:
    """The verdicts found so far, by family, kept in a file so that a run goes on where it was ended."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        stored = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
        self.verdicts = {family: Verdict(**fields) for family, fields in stored.items()}

    def add(self, verdict: Verdict) -> None:
        """Remember a verdict, and print it."""
        self.verdicts[verdict.family] = verdict
        print(("pass" if verdict.passes else "FAIL"), verdict, flush=True)
        if self.path is not None:
            atomic_write_text(self.path, json.dumps({name: vars(one) for name, one in self.verdicts.items()}, indent=1))


def markdown(verdicts: Iterable[Verdict], command: str) -> str:
    """The table of the documentation."""
    verdicts = list(verdicts)
    passed = sum(v.passes for v in verdicts)
    lines = [
        "# Architectures of transformers",
        "",
        "Small models with random weights: imported (the largest relative error of an output against PyTorch, at most",
        f"{MOST_ERROR:g}), and compiled to int8 (the least cosine of an output to PyTorch's, at least {LEAST_COSINE:g},",
        f"calibrated on {SAMPLES} random samples, the measured one not among them). {passed} of {len(verdicts)} pass. Written by",
        "",
        f"    {command}",
        "",
        "Batch norms of images have positive offsets here. Without them each batch norm and ReLU of a random network",
        "amplifies any disturbance by 1.2 (Yang et al., 2019), which training undoes: rounded to 8 bits by PyTorch alone,",
        "such a MobileNet keeps a cosine of 0.93.",
        "",
        "| inputs | family | class | float error | int8 cosine | operators in int8 |",
        "|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        error = "" if v.error is None else f"{v.error:.1e}"
        refusal = re.sub(r"[|`\n]", " ", v.refusal)[:160]
        last = refusal or f"{v.integers} of {v.operators}"
        cosine = "" if v.cosine is None else f"{v.cosine:.4f}"
        lines.append(f"| {v.group} | {v.family} | {v.kind} | {error} | {cosine} | {last} |")
    found = {verdict.family for verdict in verdicts}
    left = [family for families in FAMILIES.values() for family in families if family not in found]
    if left:
        lines += ["", f"Not in this run: {', '.join(left)}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print a line for each family; write the table. Exit code 1 where one does not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--out", metavar="FILE.md", help="write the table there")
    parser.add_argument("--known", type=Path, metavar="FILE.json", help="verdicts: those in it are not measured again")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    known = Known(options.known)
    wanted = [
        (g, f) for g, members in FAMILIES.items() for f in members if not options.families or f in options.families
    ]
    with tempfile.TemporaryDirectory() as folder:
        for group, family in wanted:
            if family not in known.verdicts:
                known.add(judge(group, family, Path(folder)))
    verdicts = [known.verdicts[family] for _, family in wanted]
    if options.out:
        Path(options.out).write_text(markdown(verdicts, f"python tests/importer/families.py --out {options.out}"))
    print(f"{sum(v.passes for v in verdicts)} of {len(verdicts)} pass")
    return int(not all(v.passes for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
