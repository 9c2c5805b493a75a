"""Architectures of transformers: imported right, and compiled to int8 that is close (`families.py`)."""

import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import families

# A decoder with transposed weights, one with rotary positions and grouped heads, and an image transformer.
SLICE = ("GPT-2", "Llama", "DeiT")
NAMES = [(group, family) for group, members in families.FAMILIES.items() for family in members]


@pytest.mark.parametrize(
    ("group", "family"),
    [pytest.param(*name, marks=[] if name[1] in SLICE else pytest.mark.slow, id=name[1]) for name in NAMES],
)
def test_family(group: str, family: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = families.judge(group, family, tmp_path)
    assert verdict.passes, verdict


def test_the_table_says_what_failed_and_what_was_left_out() -> None:
    verdicts = [
        families.Verdict("text", "BERT", "BertModel", 1e-6, 0.99, 3, 5),
        families.Verdict("text", "GPT-2", "GPT2Model", 1e-6, 0.5, 3, 5),
        families.Verdict("vision", "ViT", "ViTModel", refusal="no | converter"),
    ]
    table = families.markdown(verdicts, "a command")
    assert "1 of 3 pass" in table and "    a command\n" in table
    assert "| text | BERT | BertModel | 1.0e-06 | 0.9900 | 3 of 5 |" in table
    assert "| vision | ViT | ViTModel |  |  | no   converter |" in table
    assert "Not in this run: ALBERT, BART," in table
