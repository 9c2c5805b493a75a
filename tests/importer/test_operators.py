"""PyTorch's samples of its operators: none imports silently wrong (`operator_sweep.py`)."""

import warnings

import operator_sweep
import pytest
import torch
from torch import nn

KNOWN = operator_sweep.operators()
# One or two of each kind: scalars, indexing, scattering, reductions, pooling with indices, convolutions, promotion.
SLICE = (
    "arange",
    "nn.functional.adaptive_max_pool2d",
    "nn.functional.avg_pool3d",
    "nn.functional.conv_transpose3d",
    "amax",
    "index_put",
    "linalg.vector_norm",
    "logaddexp",
    "scatter_reduce/mean",
    "searchsorted",
    "std/unbiased",
    "take",
    "var_mean",
)
# Refused by design: batch statistics, attention with dropout, shapes that inputs decide, and layers nobody has asked for yet.
REFUSED = {
    "narrow",
    "tensor_split",
    "nn.functional.batch_norm",
    "nn.functional.embedding_bag",
    "nn.functional.scaled_dot_product_attention",
    "grid_sampler_3d",
}


def _judged(name: str) -> operator_sweep.Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return operator_sweep.judge(name, KNOWN[name])


class Together(nn.Module):
    """Samples as the layers of one module, each with its own inputs: an import has a price of its own."""

    def __init__(self, calls: list[operator_sweep.Call]) -> None:
        super().__init__()
        self.calls = nn.ModuleList(calls)
        self.example = tuple(x for call in calls for x in call.example)

    def forward(self, *tensors: torch.Tensor) -> list[object]:
        rest = iter(tensors)
        return [call(*(next(rest) for _ in call.places)) for call in self.calls]


def test_operators_pass() -> None:
    torch.manual_seed(0)
    together = Together([call for name in SLICE for call in operator_sweep.samples(KNOWN[name])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert operator_sweep.judge_sample(together) == (operator_sweep.PASSES, "")


@pytest.mark.parametrize("name", ["nn.functional.batch_norm", "tensor_split"])
def test_operator_is_refused(name: str) -> None:
    assert _judged(name).result == operator_sweep.REFUSED


@pytest.mark.slow
def test_no_operator_is_silently_wrong() -> None:
    verdicts = list(operator_sweep.sweep(list(KNOWN), jobs=1))
    wrong = [v for v in verdicts if v.result in (operator_sweep.WRONG, operator_sweep.CRASHED)]
    assert not wrong
    assert {v.name for v in verdicts if v.result == operator_sweep.REFUSED} <= REFUSED


def test_every_pattern_that_leaves_out_matches() -> None:
    for reason, patterns in operator_sweep.LEFT_OUT.items():
        for pattern in patterns.split():
            matching = [o for o in operator_sweep.op_db if operator_sweep._matches(operator_sweep.title(o), pattern)]
            assert matching, f"{pattern} ({reason})"


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call = next(operator_sweep.samples(KNOWN["abs"]))
    monkeypatch.setattr(operator_sweep, "_ours", lambda call: (torch.abs(call.example[0]).numpy() + 1,))
    assert operator_sweep.judge_sample(call)[0] == operator_sweep.WRONG


def test_the_page_has_both_importers() -> None:
    ours = [
        operator_sweep.Verdict("abs", "passes"),
        operator_sweep.Verdict("narrow", "refused", "sample 0: a | b; and so on"),
    ]
    stock = [operator_sweep.Verdict("abs", "wrong", "deviates"), operator_sweep.Verdict("narrow", "crashed", "no")]
    page = operator_sweep.page(ours, stock, "a command")
    for part in (
        "    a command\n",
        "| tvmq | 2 | 1 | 1 | 0 | 0 |",
        "| TVM's alone | 2 | 0 | 0 | 1 | 1 |",
        "| `narrow` | refused | sample 0: a \\| b |",
        "## Silently wrong in TVM's importer alone\n\n`abs`\n",
        "| is sparse | ",
    ):
        assert part in page
