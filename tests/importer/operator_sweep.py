"""PyTorch's own samples of its operators, imported without the import check: right, refused, or silently wrong?

    python tests/importer/operator_sweep.py [--jobs 2] [--stock] [--out docs/operator_sweep.md] [operator ...]

For each operator of `op_db` that makes sense in an inference graph, up to three float32 samples become modules, are
imported with check=False, computed with TVM and compared with PyTorch. `--stock` takes TVM's importer as it is;
`--out` writes a page of both. Each worker is a process of its own, so that a crash costs one operator. LEFT_OUT says what
is left out, and why.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from tvmq.errors import ModelError
from tvmq.importer import load
from tvmq.importer.check import deviation
from tvmq.oracle import interpret

SAMPLES = 3
TOLERANCE = 1e-4
PASSES, REFUSED, WRONG, CRASHED = "passes", "refused", "wrong", "crashed"

# Reason -> operators (`name` or `name/variant`; a name that ends in a star is a prefix).
LEFT_OUT = {
    "draws random numbers": """cauchy exponential geometric log_normal normal normal/* uniform randn randn_like rand_like
        randint randint_like multinomial bernoulli nn.functional.dropout nn.functional.dropout2d nn.functional.dropout3d
        nn.functional.alpha_dropout nn.functional.feature_alpha_dropout/* nn.functional.rrelu
        nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d svd_lowrank pca_lowrank""",
    "leaves memory undefined": "empty empty_like empty_strided empty_permuted new_empty new_empty_strided",
    "computes complex numbers": """fft.* stft complex polar view_as_complex cdouble cfloat chalf
        angle conj conj_physical resolve_conj imag real isreal""",
    "factors or solves a matrix": """cholesky cholesky_inverse cholesky_solve geqrf lu lu_unpack lu_solve ormqr
        qr svd triangular_solve pinverse logdet matrix_exp linalg.cholesky* linalg.cond linalg.det linalg.eig*
        linalg.householder_product linalg.inv* linalg.ldl_* linalg.lstsq* linalg.lu* linalg.matrix_rank* linalg.pinv*
        linalg.qr linalg.slogdet linalg.solve* linalg.svd* linalg.tensorinv linalg.tensorsolve linalg.norm/*
        linalg.matrix_norm linalg.norm norm/nuc corrcoef cov""",
    "has a result whose shape depends on values": """argwhere nonzero nonzero_static unique unique_consecutive
        masked_select combinations histogramdd repeat_interleave""",
    "returns no tensor": "allclose equal item broadcast_shapes hash_tensor",
    "belongs to training": """*_backward _softmax_backward_data max_pool2d_with_indices_backward
        native_dropout_backward _native_batch_norm_legit _batch_norm_with_update nn.functional.ctc_loss
        nn.functional.*_loss nn.functional.cross_entropy nn.functional.linear_cross_entropy*
        nn.functional.binary_cross_entropy* nn.functional.kl_div nn.functional.max_unpool1d/grad
        nn.functional.max_unpool2d/grad nn.functional.max_unpool3d/grad""",
    "is sparse": "sparse.* to_sparse",
    "changes storage": "resize_ resize_as_ as_strided/partial_views as_strided as_strided_copy as_strided_scatter",
    "is a statistic or a numerical method, no layer": """histc histogram quantile nanquantile mode kthvalue
        gradient cdist nn.functional.pdist dist mvlgamma/* polygamma/* special.* igamma igammac lgamma digamma
        trapz trapezoid cumulative_trapezoid renorm frexp nextafter i0 erfinv heaviside linalg.matrix_power
        linalg.multi_dot linalg.vander _segment_reduce/* signal.windows.* cummax cummin logcumsumexp median nanmedian
        hypot copysign""",
    "returns statistics for training": "native_batch_norm native_group_norm native_layer_norm",
    "has a result that NumPy has no dtype for": "bfloat16",
    "runs on other devices": "jiterator_* bmm/triton_optimized",
    "is a prototype of masked tensors": "masked.*",
    "is PyTorch's own plumbing": """_unsafe_masked_index _unsafe_masked_index_put_accumulate _chunk_cat alias_copy
        diagonal_copy expand_copy narrow_copy permute_copy split_with_sizes_copy squeeze_copy t_copy transpose_copy
        unbind_copy unfold_copy unsqueeze_copy view_copy addmm/decomposed resolve_neg unsafe_chunk unsafe_split
        linspace/tensor_overload logspace/tensor_overload linspace logspace zero_ scalar_tensor
        nn.functional.multi_head_attention_forward""",
}


def title(operator: Any) -> str:
    """`name`, or `name/variant`."""
    return f"{operator.name}/{operator.variant_test_name}" if operator.variant_test_name else str(operator.name)


def reason_to_leave_out(operator: Any) -> str | None:
    """Why an operator is not tried; None for one that is."""
    if torch.float32 not in operator.supported_dtypes("cpu"):
        return "takes no float32"
    name = title(operator)
    for reason, patterns in LEFT_OUT.items():
        if any(_matches(name, pattern) for pattern in patterns.split()):
            return reason
    return None


def _matches(name: str, pattern: str) -> bool:
    head, star, tail = pattern.partition("*")
    return name == pattern or (bool(star) and name.startswith(head) and name.endswith(tail))


def operators() -> dict[str, Any]:
    """The operators that are tried, by title."""
    return {title(operator): operator for operator in op_db if reason_to_leave_out(operator) is None}


class Call(nn.Module):
    """One sample as a module: its tensors are inputs, its other arguments constants."""

    def __init__(self, operator: Any, sample: Any) -> None:
        super().__init__()
        leaves, self.tree = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.operator = operator.op
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.example = tuple(leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor))

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self.constants)
        for index, tensor in zip(self.places, tensors, strict=True):
            leaves[index] = tensor
        first, args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return self.operator(first, *args, **kwargs)


def samples(operator: Any) -> Iterator[Call]:
    """The first samples of an operator that take and return tensors of real numbers, the same each time."""
    found = operator.sample_inputs("cpu", torch.float32, requires_grad=False)
    calls = (Call(operator, sample) for sample in found)
    return itertools.islice((call for call in calls if _is_plain(call)), SAMPLES)


def _is_plain(call: Call) -> bool:
    first, second = (pytree.tree_leaves(call(*(x.clone() for x in call.example))) for _ in range(2))
    tensors = [pair for pair in zip(first, second, strict=True) if isinstance(pair[0], torch.Tensor)]
    return bool(tensors) and all(not x.is_complex() and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in tensors)


@dataclass(frozen=True)
class Verdict:
    """What became of an operator, or of one sample."""

    name: str
    result: str
    detail: str = ""


def judge(name: str, operator: Any, stock: bool = False) -> Verdict:
    """The worst verdict over the samples of an operator."""
    torch.manual_seed(0)
    worst = Verdict(name, PASSES)
    order = (PASSES, REFUSED, WRONG, CRASHED)
    for index, call in enumerate(samples(operator)):
        result, detail = judge_sample(call, stock)
        if order.index(result) > order.index(worst.result):
            worst = Verdict(name, result, f"sample {index}: {detail}")
    return worst


def judge_sample(call: Any, stock: bool = False) -> tuple[str, str]:
    """(verdict, detail) of one sample: a module with its example inputs."""
    with torch.no_grad():
        results = pytree.tree_leaves(call(*(x.clone() for x in call.example)))
    expected = [value.resolve_neg().numpy() for value in results if isinstance(value, torch.Tensor)]
    example = [np.array(x.resolve_neg().numpy()) for x in call.example]
    try:
        found = _stock(call, example) if stock else _ours(call)
    except ModelError as error:
        return REFUSED, str(error)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        return CRASHED, f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:300]}"
    if len(found) != len(expected):
        return WRONG, f"{len(found)} results, not {len(expected)}"
    for index, (value, reference) in enumerate(zip(found, expected, strict=True)):
        if (value.shape, value.dtype) != (reference.shape, reference.dtype):
            return WRONG, f"{value.dtype}{value.shape} where PyTorch has {reference.dtype}{reference.shape}"
        if not deviation(value, reference) <= TOLERANCE:
            return WRONG, f"result {index} deviates by {deviation(value, reference):.3g}"
    return PASSES, ""


def _ours(call: Any) -> tuple[Any, ...]:
    model = load.import_model(call, call.example, check=False)
    return interpret.run(model.module, model.example)


def _stock(call: Any, example: list[Any]) -> tuple[Any, ...]:
    from tvm.relax.frontend.torch import from_exported_program

    return interpret.run(from_exported_program(torch.export.export(call, call.example)), example)


def _work(stock: bool) -> None:
    """Judge the operators that standard input names, one JSON line each."""
    known = {title(operator): operator for operator in op_db}
    for line in sys.stdin:
        name = line.strip()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = judge(name, known[name], stock)
        print(json.dumps(vars(verdict)), flush=True)


def sweep(names: list[str], jobs: int, stock: bool = False) -> Iterator[Verdict]:
    """The verdicts of operators, as they come."""
    todo: SimpleQueue[str] = SimpleQueue()
    done: SimpleQueue[Verdict] = SimpleQueue()
    for name in names:
        todo.put(name)
    with ThreadPoolExecutor(jobs) as pool:
        for _ in range(jobs):
            pool.submit(_feed, todo, done, stock)
        for _ in names:
            yield done.get()


def _feed(todo: SimpleQueue[str], done: SimpleQueue[Verdict], stock: bool) -> None:
    """Hand operators to a worker process, and start another one where it dies."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", *(["--stock"] if stock else [])]
    worker = None
    while True:
        try:
            name = todo.get_nowait()
        except Empty:
            break
        if worker is None:
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        worker.stdin.write(name + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        while line and not line.startswith("{"):
            line = worker.stdout.readline()
        if line:
            done.put(Verdict(**json.loads(line)))
        else:
            done.put(Verdict(name, CRASHED, f"the process ended with {worker.wait()}"))
            worker = None
    if worker is not None:
        worker.stdin.close()
        worker.wait()


def summary(verdicts: list[Verdict]) -> str:
    """How many of each."""
    counts = Counter(verdict.result for verdict in verdicts)
    return ", ".join(f"{counts[result]} {result}" for result in (PASSES, REFUSED, WRONG, CRASHED))


def page(ours: list[Verdict], stock: list[Verdict], command: str) -> str:
    """Both sweeps as a document."""
    versions = f"torch {metadata.version('torch')}, apache-tvm {metadata.version('apache-tvm')}"
    lines = [
        "# PyTorch's own samples of its operators\n",
        f"Of each operator of PyTorch's `op_db` that makes sense in an inference graph, up to {SAMPLES} float32 samples are",
        "imported with the import check off, computed with TVM, and compared with PyTorch: within",
        f"{TOLERANCE:g} of the largest value, equal for integers ({versions}). Written by\n",
        f"    {command}\n",
        f"| importer | operators | {PASSES} | {REFUSED} | silently {WRONG} | {CRASHED} |",
        "|---|---|---|---|---|---|",
    ]
    for name, verdicts in (("tvmq", ours), ("TVM's alone", stock)):
        counts = Counter(verdict.result for verdict in verdicts)
        cells = " | ".join(str(counts[result]) for result in (PASSES, REFUSED, WRONG, CRASHED))
        lines.append(f"| {name} | {len(verdicts)} | {cells} |")
    lines += ["\nA crash is an exception that names no operator of the model, or the end of the process.\n"]
    lines += ["## What tvmq does not take\n", "| operator | what | why |", "|---|---|---|"]
    lines += [f"| `{v.name}` | {v.result} | {_cell(v.detail)} |" for v in _sorted(ours) if v.result != PASSES]
    for result, title in ((WRONG, "Silently wrong in TVM's importer alone"), (CRASHED, "Not taken by TVM's alone")):
        named = ", ".join(f"`{v.name}`" for v in _sorted(stock) if v.result == result)
        lines += [f"\n## {title}\n", named or "None."]
    left = Counter(reason for operator in op_db if (reason := reason_to_leave_out(operator)) is not None)
    lines += ["\n## Left out\n", "`--left-out` names them.\n", "| reason | operators |", "|---|---|"]
    lines += [f"| {reason} | {count} |" for reason, count in left.most_common()]
    return "\n".join(lines) + "\n"


def _sorted(verdicts: list[Verdict]) -> list[Verdict]:
    return sorted(verdicts, key=lambda verdict: verdict.name)


def _cell(text: str) -> str:
    """A detail in a table: its first sentence."""
    return text.split("; ", maxsplit=1)[0].split("\n", maxsplit=1)[0].replace("|", "\\|")[:200]


def main() -> int:
    """Print a line for each operator that does not pass, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help="default: all that make sense in an inference graph")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--stock", action="store_true", help="TVM's importer, without tvmq's converters")
    parser.add_argument("--out", metavar="FILE.md", help="a page of both importers")
    parser.add_argument("--left-out", action="store_true", help="list what is left out, and why")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work(options.stock)
        return 0
    if options.left_out:
        for operator in op_db:
            if reason := reason_to_leave_out(operator):
                print(f"{title(operator)}: {reason}")
        return 0
    if options.out and options.stock:
        parser.error("--out tries both importers")
    names = options.operators or list(operators())
    verdicts = _told(names, options.jobs, options.stock)
    if options.out:
        stock = _told(names, options.jobs, stock=True)
        Path(options.out).write_text(
            page(verdicts, stock, f"python tests/importer/operator_sweep.py --out {options.out}")
        )
    return int(any(verdict.result in (WRONG, CRASHED) for verdict in verdicts))


def _told(names: list[str], jobs: int, stock: bool) -> list[Verdict]:
    """The verdicts, printed as they come where they are no passes."""
    verdicts = []
    for verdict in sweep(names, jobs, stock):
        verdicts.append(verdict)
        if verdict.result != PASSES:
            print(f"{verdict.result:8} {verdict.name}: {verdict.detail}", flush=True)
    print(f"{len(verdicts)} operators: {summary(verdicts)}", flush=True)
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
