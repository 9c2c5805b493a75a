"""Inner loops in models of processors: which loop is looked at, what it is compared with, and llvm-mca itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tvmq.errors import DeviceError
from tvmq.measure import pipelines
from tvmq.measure.instructions import VectorRow, table_rows
from tvmq.measure.pipelines import GOALS, PROCESSORS, Pipelines, Row, inner_loop, products, target_of

ASSEMBLY = """\
kernel:
.LBB0_1:                                // outer
	mov	x9, x8
.LBB0_2:                                // =>This Inner Loop Header
	//APP
	prfm	pldl2keep, [x9]
	//NO_APP
	ldr	q4, [x9], #16                   // a load
	.loc	1 2 3
	fmla	v0.4s, v4.4s, v5.s[0]
	fmla	v1.4s, v4.4s, v5.s[1]
	subs	x10, x10, #1
	b.ne	.LBB0_2
	fmla	v9.4s, v4.4s, v5.s[0]
	fmla	v9.4s, v4.4s, v5.s[0]
	fmla	v9.4s, v4.4s, v5.s[0]
	cbnz	x12, .LBB0_1
.LBB0_3:
	fmla	v0.4s, v4.4s, v5.s[0]
	tbnz	w10, #0, .LBB0_3
.LBB0_20:
	add	x1, x1, #1
	cbnz	x1, .LBB0_2
	ret
""".splitlines()


def test_the_inner_loop_is_the_one_with_the_most_products() -> None:
    loop = inner_loop(ASSEMBLY)
    assert loop == [
        "prfm\tpldl2keep, [x9]",
        "ldr\tq4, [x9], #16",
        "fmla\tv0.4s, v4.4s, v5.s[0]",
        "fmla\tv1.4s, v4.4s, v5.s[1]",
        "subs\tx10, x10, #1",
        "b.ne\t.LBB0_2",
    ]
    assert products(loop) == 8


def test_code_without_a_loop_of_products() -> None:
    with pytest.raises(ValueError, match="no loop with products"):
        inner_loop(["a:", "\tret"])


def test_products_of_each_instruction() -> None:
    loop = [
        "smull v0.8h, v1.8b, v2.8b",
        "smlal2 v0.8h, v1.16b, v2.16b",
        "sadalp v3.4s, v0.8h",
        "sdot v0.4s, v1.16b, v2.16b",
        "fmla v0.4s, v1.4s, v2.s[1]",
        "fmla v0.8h, v1.8h, v2.h[1]",
    ]
    assert [products([line]) for line in loop] == [8, 8, 0, 16, 4, 8]


ROWS = [(processor, row) for processor in PROCESSORS for row in table_rows(target_of(processor).isa)]


@pytest.mark.parametrize(
    ("processor", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else value.key[0]
)
def test_the_rows_that_are_modelled_are_whole_tiles(processor: str, row: VectorRow) -> None:
    """A remainder has a loop of its own, of which more turns may be unrolled."""
    matmul = pipelines.whole_tiles(row, target_of(processor))
    assert matmul.x_shape[2] % int(matmul.tile.partition("x")[0]) == 0
    assert matmul.x_shape[2] > 700


@pytest.mark.parametrize(("processor", "dtype"), [("cortex-a53", "f32"), ("cortex-a53", "s8"), ("cortex-a55", "s8")])
def test_the_loop_of_in_order_processors_is_that_of_the_tile(processor: str, dtype: str) -> None:
    target = target_of(processor)
    (row,) = (row for row in table_rows(target.isa) if row.key[0] == dtype)
    assert isinstance(row, VectorRow)
    matmul = pipelines.whole_tiles(row, target)
    pixels, channels = map(int, matmul.tile.split("x"))
    loop = inner_loop(pipelines.assembly(matmul.function, target))
    assert products(loop) % (pixels * channels * row.micro.kr * row.micro.span.steps) == 0


def test_the_table_has_a_share_and_a_goal() -> None:
    found = Pipelines(
        [Row("cortex-a55", "s8-s8-matmul-10x8-sdot", 100, 100.0, 1280, 16.0), Row("cortex-a72", "f32", 9, 4.0, 16, 4.0)]
    )
    lines = found.to_markdown().splitlines()
    assert lines[-2:] == [
        "| cortex-a55 | s8-s8-matmul-10x8-sdot | 100 | 100.0 | 1280 | 12.8 | 16.0 | 80 % | 75 % |",
        "| cortex-a72 | f32 | 9 | 4.0 | 16 | 4.0 | 4.0 | 100 % |  |",
    ]
    document = json.loads(json.dumps(found.to_dict()))
    assert [row["goal"] for row in document["rows"]] == [GOALS["cortex-a55"], None]
    assert document["rows"][0]["share"] == 0.8


# --- llvm-mca -------------------------------------------------------------------------------------------------------


def command(folder: Path, script: str) -> str:
    path = folder / "llvm-mca-19"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_cycles_are_those_of_the_steady_state(tmp_path: Path) -> None:
    """A model that takes 100 cycles to begin, and 3 a turn."""
    script = (
        'for word; do case $word in -iterations=*) n=${word#*=};; esac; done\necho "Total Cycles:   $((100 + 3 * n))"'
    )
    assert pipelines.cycles(command(tmp_path, script), target_of("cortex-a55"), ["nop", "b .LBB0_1"]) == 3.0


def test_the_peak_is_that_of_the_products_alone(tmp_path: Path) -> None:
    script = "grep -q nop && exit 1; echo 'Block RThroughput: 1.5'"
    loop = ["nop", "smull v0.8h, v1.8b, v2.8b", "sadalp v3.4s, v0.8h", "b .LBB0_1"]
    assert pipelines.least_cycles(command(tmp_path, script), target_of("cortex-a55"), loop) == 1.5


def test_a_processor_without_a_model(tmp_path: Path) -> None:
    fails = command(tmp_path, "echo 'error: unknown cpu' >&2; exit 1")
    with pytest.raises(DeviceError, match="cannot model -mcpu=cortex-a55: saw error: unknown cpu"):
        pipelines.cycles(fails, target_of("cortex-a55"), ["b .LBB0_1"])


def test_without_llvm_mca_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="cannot model pipelines: expected llvm-mca-19, .*apt-get install llvm-19"):
        pipelines.run()


@pytest.mark.skipif(not any(map(shutil.which, pipelines._COMMANDS)), reason="no llvm-mca")
def test_no_loop_is_faster_than_its_instruction() -> None:
    found = pipelines.run(["cortex-a72"])
    assert {"f32", "s8", "bf16", "f16"} <= {row.kernel.partition("-")[0] for row in found.rows}
    for row in found.rows:
        assert 0.2 < row.share < 1.02
