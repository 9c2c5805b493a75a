"""Tables for people, and the words in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tvmq.deploy.condition import Condition

# After figures of an emulated board.
EMULATED = " (emulated)"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> Table:
    """A table of texts; the columns named in `right` are figures."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    numbers = set(right)
    for column in columns:
        result.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        # Text, not markup: a name may hold brackets.
        result.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    return result


def latencies(rows: Iterable[Mapping[str, Any]]) -> Table:
    """One row a bundle, as `tvmq bench --json` lists them; emulated times are marked, each of them."""
    columns = ("bundle", "median ms", "95 % interval", "p90 ms", "min ms", "std ms", "threads")
    cells = []
    for row in rows:
        mark = EMULATED if row["emulated"] else ""
        interval = "" if row["low_ms"] is None else f"{row['low_ms']:.3f} to {row['high_ms']:.3f}{mark}"
        median, *others = (f"{row[key]:.3f}{mark}" for key in ("median_ms", "p90_ms", "min_ms", "std_ms"))
        cells.append((row["bundle"], median, interval, *others, row["threads"]))
    return table(columns, cells, right=columns[1:])


def conditions(before: Condition, after: Condition) -> list[str]:
    """A line each; one for a board that does not tell."""
    if before.emulated or not before.known:
        return [str(before)]
    return [f"before: {before}", f"after: {after}"]


def operators(rows: Iterable[Mapping[str, Any]], *, timed: bool, mark: str = "") -> Table:
    """One row an operator, as `tvmq explain --json` lists them. mark: after each time."""
    columns = ("layer", "op", "precision", "kernel", "tuning", *(("ms",) if timed else ()), "why, and notes")
    cells = (
        (
            row["path"],
            row["kind"],
            row["precision"],
            row["kernel"],
            row.get("tuning", ""),
            *(("" if row["ms"] is None else f"{row['ms']:.4f}{mark}",) if timed else ()),
            "; ".join(text for text in (row["reason"], row.get("note", "")) if text),
        )
        for row in rows
    )
    return table(columns, cells, right=("ms",))


def converters(found: Mapping[str, str]) -> list[str]:
    """One line a converter: the operators that it converted, or that were decomposed before."""
    kinds = {"tvm": "converted by TVM", "tvmq": "by tvmq", "yours": "by you", "decomposed": "decomposed before"}
    names = {who: [name for name in sorted(found) if found[name] == who] for who in kinds}
    return [f"{len(names[who])} operators {text}: {', '.join(names[who])}" for who, text in kinds.items() if names[who]]


def tensors(rows: Iterable[Mapping[str, Any]]) -> Table:
    """One row an output, as `tvmq run --json` lists them."""
    columns = ("output", "shape", "dtype", "min", "max", "largest at")
    cells = (
        (row["name"], row["shape"], row["dtype"], f"{row['min']:.6g}", f"{row['max']:.6g}", row["largest_at"])
        for row in rows
    )
    return table(columns, cells, right=("min", "max"))


def tree(values: Mapping[str, Any], indent: int = 0) -> str:
    """Nested plain data as indented lines."""
    lines = []
    for key, value in values.items():
        pad = "  " * indent
        if isinstance(value, Mapping):
            lines += [f"{pad}{key}:", tree(value, indent + 1)]
        else:
            lines.append(f"{pad}{key}: {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    return "\n".join(lines)


def kilobytes(size: int) -> str:
    """Bytes as kB (1000 bytes), or MB above ten thousand of them."""
    return f"{size / 1e6:.1f} MB" if size >= 10_000_000 else f"{size / 1e3:.0f} kB"
