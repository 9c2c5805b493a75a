"""The bench suite on tiny models: who takes part, who cannot and why, ratios, Markdown, the chart."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from tvmq import zoo
from tvmq.errors import InputError, OutputError, TargetError
from tvmq.measure import chart, peers, report, suite
from tvmq.measure.suite_report import CELLS, Comparison, Row, Suite, compare
from tvmq.target import load_target


def subject(name: str, folder) -> peers.Subject:
    module, example = zoo.builder(name)()
    return peers.Subject(name, module, example, peers.samples(example, 2), 1, folder)


def test_every_precision_of_tvmq_is_measured_and_compared():
    found = suite.run(["tiny_image"], ["fp32", "int8"], threads=1, rounds=2, with_peers=False)
    assert (found.target, found.threads, found.rounds) == ("host", 1, 2)
    assert [(row.runtime, row.precision, row.note) for row in found.rows] == [
        ("tvmq", "fp32", ""),
        ("tvmq", "int8", ""),
    ]
    for row in found.rows:
        assert 0 < row.min_ms <= row.median_ms <= row.max_ms
    assert [c.against for c in found.comparisons] == [cell.title for cell in CELLS if cell.precision != "bf16"]
    assert {c.note for c in found.comparisons} == {"no peer"}
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(monkeypatch):
    absent = peers.Peer("Nobody", "fp32", ("no_such_package",), peers._torch)
    monkeypatch.setattr(suite, "peers", lambda: (absent,))
    found = suite.run(["tiny_image"], ["fp32"], threads=1, rounds=2)
    row = found.rows[-1]
    assert (row.runtime, row.median_ms) == ("Nobody", None)
    assert row.note == "not installed: no_such_package (pip install 'tvmq[peers]')"
    assert found.comparisons[0].note == f"no peer; {row.note}"
    assert row.note in found.to_markdown()


def test_a_level_that_peers_are_held_to_is_told(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = suite.run(["tiny_image"], ["fp32"], threads=1, rounds=1, with_peers=False)
    assert found.onednn_isa == "AVX2"
    assert "; OpenVINO and PyTorch held to AVX2\n" in found.to_markdown()


def test_a_precision_that_no_peer_has_is_measured_alone():
    found = suite.run(["tiny_image"], ["auto"], threads=1, rounds=1)
    assert [(row.runtime, row.precision) for row in found.rows] == [("tvmq", "auto")]
    assert found.comparisons == []


def test_bfloat16_is_measured_where_the_target_has_its_instructions():
    if not suite.runs_here(load_target("x86-64-avx2")):
        pytest.skip("this machine is below x86-64-avx2")
    found = suite.run(["tiny_image"], ["bf16"], target="x86-64-avx2", threads=1, rounds=2, with_peers=False)
    assert [row.note for row in found.rows] == ["x86-64-avx2 has no bfloat16 instructions"]


def test_a_lower_level_that_this_machine_has_can_be_measured():
    if not suite.runs_here(load_target("x86-64-avx2")):
        pytest.skip("this machine lacks AVX2")
    found = suite.run(["tiny_tokens"], ["int8"], target="x86-64-avx2", threads=1, rounds=2, with_peers=False)
    assert found.target == "x86-64-avx2"
    assert found.rows[0].median_ms > 0


@pytest.mark.parametrize("peer", peers.peers(), ids=lambda peer: f"{peer.name} {peer.precision}")
def test_each_peer_runs_what_suits_it(peer, tmp_path):
    if why := peer.missing():
        pytest.skip(why)
    image, tokens = subject("tiny_image", tmp_path), subject("tiny_tokens", tmp_path)
    assert peer.suits(tokens)
    assert peer.suits(image) == (peer.name != "ONNX Runtime dynamic")
    for model in (image, tokens):
        if peer.suits(model):
            peer.prepare(model)()


def test_pytorch_runs_the_module_itself(tmp_path):
    model = subject("tiny_image", tmp_path)
    want = model.module(*model.example).detach().numpy()
    np.testing.assert_allclose(peers._torch(model)().numpy(), want, atol=1e-5)
    assert model.module[0].weight.is_contiguous()


def test_unknown_names_are_refused_before_anything_is_measured():
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        suite.run(["resnet17"])
    with pytest.raises(InputError, match="precision 'int7': expected one of .*int8.*; did you mean 'int8'"):
        suite.run(["resnet18"], ["int7"])


def test_a_target_that_this_machine_cannot_run_is_refused():
    with pytest.raises(TargetError, match="target raspberry-pi-4b: expected one that this machine can run"):
        suite.run(["tiny_image"], target="raspberry-pi-4b")


# --- figures ---------------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_fastest_peer_of_the_cell_over_tvmq():
    times = {
        ("tvmq", "int8"): np.array([1.0, 1.0, 2.0]),
        ("ONNX Runtime static", "int8"): np.array([3.0, 3.0, 3.0]),
        ("ONNX Runtime dynamic", "int8"): np.array([2.0, 2.0, 2.0]),
        ("ONNX Runtime", "fp32"): np.array([0.1, 0.1, 0.1]),
    }
    slow = Row("m", "OpenVINO NNCF", "int8", note="not installed: nncf")
    openvino, onnx = compare("m", times, [slow], ["int8"])
    assert openvino == Comparison("m", "int8", "int8 vs OpenVINO", note="no peer; not installed: nncf")
    assert (onnx.peer, onnx.ratio, onnx.against) == ("ONNX Runtime dynamic", 2.0, "int8 vs ONNX Runtime")
    assert 1.0 <= onnx.low < onnx.ratio == onnx.high
    assert str(onnx) == f"2.00 ({onnx.low:.2f} to 2.00)"


def example() -> Suite:
    rows = [
        Row("one", "tvmq", "fp32", 1.0, 0.9, 1.2),
        Row("one", "Another runtime", "fp32", 2.0, 1.9, 2.2),
        Row("two", "tvmq", "fp32", note="why not"),
    ]
    comparisons = [
        Comparison("one", "fp32", CELLS[0].title, "Another runtime", 2.0, 1.8, 2.1),
        Comparison("two", "fp32", CELLS[0].title, note="why not"),
    ]
    return Suite("host", 2, 5, "a processor", rows, comparisons)


def test_the_markdown_has_a_row_a_runtime_and_ends_with_a_row_a_model():
    lines = example().to_markdown().splitlines()
    assert lines[0] == "tvmq for host; 2 threads each, 5 interleaved rounds; a processor"
    assert "| one | tvmq | fp32 | 1.00 | 0.90 | 1.20 |  |" in lines
    assert lines[-4:] == [
        "| model | fp32 vs the best peer |",
        "| --- | --- |",
        "| one | 2.00 (1.80 to 2.10) |",
        "| two | why not |",
    ]


def test_reports_are_files_in_a_new_folder(tmp_path):
    folder = report.folder_for(tmp_path / "a" / "b")
    paths = report.write(example(), folder, "suite")
    assert [path.name for path in paths] == ["suite.json", "suite.md"]
    assert json.loads(paths[0].read_text()) == example().to_dict()
    assert paths[1].read_text() == example().to_markdown()
    with pytest.raises(OutputError, match="cannot make the folder"):
        report.folder_for(paths[0] / "c")


@pytest.mark.skipif(not chart.available(), reason="matplotlib is not installed")
def test_the_chart_is_a_png_with_a_panel_a_model(tmp_path):
    image = pytest.importorskip("PIL.Image")
    chart.draw(example(), tmp_path / "suite.png")
    with image.open(tmp_path / "suite.png") as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        assert 1000 < width < 2000
        assert 200 < height < 800
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    # A bar of tvmq's colour, and one of a runtime without a colour of its own.
    assert {tuple(bytes.fromhex(code[1:])) for code in (chart._COLOURS["tvmq"], chart._OTHER)} <= colours


def test_bars_are_by_precision_and_the_fastest_first():
    rows = [
        Row("m", f"runtime {i}", p, ms, ms, ms)
        for i, (p, ms) in enumerate([("int8", 2.0), ("fp32", 9.0), ("int8", 1.0)])
    ]
    bars = chart._measured(Suite("host", 1, 1, "", rows), "m")
    assert [(bar.precision, bar.median_ms) for bar in bars] == [("int8", 1.0), ("int8", 2.0), ("fp32", 9.0)]
    first, second, third = chart._places(bars)
    assert third - second > second - first == 1.0


def test_without_matplotlib_there_is_no_chart(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not chart.available()
