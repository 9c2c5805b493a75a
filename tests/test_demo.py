"""The demo at its smallest: the network learns, three bundles and a report are written."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from tvmq.cli.demo import demo_table
from tvmq.demo import run as demo
from tvmq.demo.digits import DigitNet, load_digits, train
from tvmq.demo.run import Row, Settings, run_demo
from tvmq.deploy import bundle as bundles
from tvmq.errors import DeviceError, InputError, OutputError

TINY = Settings(epochs=1, width=8, held_out=40, calibration=4, repeat=2, min_repeat_ms=1)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        # The board has tests of its own.
        patch.setattr(demo, "_emulated_verdict", lambda _path: "not run here: a test")
        return folder, run_demo(folder, TINY)


def test_the_files(result):
    folder, report = result
    names = {"digits.pt2", "calibration.npz", "report.json"}
    names |= {f"digits-{which}.tvmq" for which in ("fp32-host", "int8-host", "int8-raspberry-pi-4b")}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "report.json").read_text()) == report.to_dict()


def test_the_rows(result):
    _, report = result
    torch_row, float_row, int8_row, board_row = report.rows
    assert float_row.agreement == 1.0
    assert int8_row.agreement > 0.8
    assert all(row.median_ms > 0 for row in (torch_row, float_row, int8_row))
    assert float_row.size > int8_row.size
    assert "bit for bit" in int8_row.verified
    assert (board_row.target, board_row.median_ms) == ("raspberry-pi-4b", None)
    assert report.ok
    assert report.machine["threads"] >= 1


def test_the_network_has_what_the_quantizer_meets(result):
    folder, _ = result
    operators = bundles.read(folder / "digits-int8-host.tvmq").manifest["operators"]
    integer = {row["kind"] for row in operators if row["precision"] == "int8"}
    assert {"conv2d", "matmul", "avg_pool2d", "nn.max_pool2d"} <= integer
    assert any("dwconv2d" in row["kernel"] for row in operators)


def test_training_learns_and_repeats():
    digits = load_digits(held_out=200)
    assert digits.test_images.shape == (200, 1, 32, 32)
    first, second = (train(digits, epochs=1, width=8) for _ in range(2))
    with torch.no_grad():
        answers = [net(torch.from_numpy(digits.test_images)).argmax(1).numpy() for net in (first, second)]
    assert np.array_equal(*answers)
    assert (answers[0] == digits.test_labels).mean() > 0.3


def test_the_split_holds_every_digit_once():
    digits = load_digits(held_out=500)
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.train_images.dtype == np.float32
    assert np.array_equal(digits.test_images, load_digits(held_out=500).test_images)


def test_the_table_leaves_out_what_was_not_measured():
    table = demo_table((Row("torch fp32", "host", accuracy=0.5, median_ms=1.0, threads=1), Row("tvmq int8", "board")))
    assert [str(cell) for cell in table.columns[2].cells] == ["50.0 %", ""]


def test_a_difference_is_not_ok(result):
    _, report = result
    bad = Row("tvmq int8", "host", verified="differs: conv")
    assert not demo.DemoReport((bad,), report.machine, TINY, ()).ok


def test_without_qemu_the_board_is_not_run(monkeypatch, tmp_path):
    def missing():
        raise DeviceError("cannot emulate a board", seen="no qemu-aarch64 on the PATH")

    monkeypatch.setattr(demo.emulate, "find_qemu", missing)
    said = demo._emulated_verdict(tmp_path / "m.tvmq")
    assert said == "not run here: cannot emulate a board: saw no qemu-aarch64 on the PATH"


def test_nothing_is_downloaded_for_the_board(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.emulate, "find_qemu", lambda: "qemu-aarch64")
    monkeypatch.setattr(demo.board_root, "default_cache", lambda: tmp_path)
    assert demo._emulated_verdict(tmp_path / "m.tvmq").startswith("not run here: no emulated board was prepared")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot make the folder"):
        run_demo(tmp_path / "file" / "out", TINY)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install 'tvmq\[demo\]'"):
        load_digits()


def test_the_network_takes_a_batch():
    assert DigitNet(8).eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
