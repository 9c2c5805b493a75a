from pathlib import Path

import numpy as np
import pytest
import torch

from tvmq.errors import CalibrationError
from tvmq.model import Signature, TensorSpec
from tvmq.quantize.data import inferences, open_data

ONE = Signature((TensorSpec("x", (2, 3), "float32"),), ())
TWO = Signature((TensorSpec("image", (1, 4), "float32"), TensorSpec("ids", (1, 2), "int64")), ())
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def _all(batches, signature=ONE):
    return list(inferences(batches, signature))


def _one_line(call, *parts: str) -> None:
    with pytest.raises(CalibrationError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- forms of a batch ---


@pytest.mark.parametrize(
    "batches",
    [
        [X],
        X,  # one array alone is one batch
        torch.from_numpy(X),
        {"x": X},
        [torch.from_numpy(X).requires_grad_()],
        [(X,)],
        [[X]],
        [{"x": X}],
        [{"arr_0": X}],  # the name that np.savez gives
        iter([X]),
        (batch for batch in [X]),
        [X.astype(np.float64)],
        [X.astype(np.int64)],
        [X.astype(np.uint8)],
        [np.asfortranarray(X)],
    ],
    ids=lambda b: type(b).__name__,
)
def test_forms_of_one_batch(batches):
    ((got,),) = _all(batches)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    assert (got == X).all()


def test_inputs_by_order_and_by_name():
    image, ids = np.ones((1, 4), np.float32), np.array([[1, 2]])
    for batch in ((image, ids), [image, ids], {"ids": ids, "image": image}):
        ((a, b),) = _all([batch], TWO)
        assert (a == image).all() and (b == ids).all() and b.dtype == np.int64


def test_a_multiple_of_the_batch_is_cut():
    data = np.arange(18, dtype=np.float32).reshape(6, 3)
    pieces = _all([data, X])
    assert len(pieces) == 4
    assert np.concatenate([p for (p,) in pieces[:3]]).tolist() == data.tolist()
    image, ids = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(6).reshape(3, 2)
    got = _all([{"image": image, "ids": ids}], TWO)
    assert [b.tolist() for _, b in got] == [[[0, 1]], [[2, 3]], [[4, 5]]]


def test_batches_are_streamed():
    def endless():
        while True:
            yield X

    stream = inferences(endless(), ONE)
    assert all((next(stream)[0] == X).all() for _ in range(3))


def test_no_batches_are_no_inferences():
    assert _all([]) == []


# --- what is wrong with a batch ---


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        (np.full((2, 3), np.nan), ["input 'x'", "finite"]),
        (np.array([[0, np.inf, 0]] * 2), ["input 'x'", "finite"]),
        (np.full((2, 3), 1e300), ["input 'x'", "finite"]),  # too large for float32
        (np.zeros((2, 4), np.float32), ["input 'x'", "[2, 3]", "[2, 4]"]),
        (np.zeros((3, 3), np.float32), ["input 'x'", "multiple", "[3, 3]"]),
        (np.zeros(3, np.float32), ["input 'x'", "[3]"]),
        (np.zeros((0, 3), np.float32), ["input 'x'", "[0, 3]"]),
        (np.zeros((2, 3), np.complex64), ["input 'x'", "float32", "complex64"]),
        (np.array([["a"] * 3] * 2), ["input 'x'", "dtype float32"]),
        (np.array([[None] * 3] * 2), ["input 'x'", "object"]),
        ([[1.0, 2.0], [3.0]], ["2"]),
        (([[1.0, 2.0], [3.0]],), ["input 'x'", "an array"]),
        ((torch.zeros(2, 3, dtype=torch.bfloat16),), ["input 'x'", "an array"]),
        ((X, X), ["1 inputs ['x']", "saw 2"]),
        ((), ["saw 0"]),
        ({"x": X, "y": X}, ["['x']", "['x', 'y']"]),
        ({}, ["['x']"]),
        (None, ["input 'x'"]),
    ],
    ids=lambda v: str(v)[:30],
)
def test_each_mistake_names_the_batch_and_input(batch, parts):
    _one_line(lambda: _all([X, batch]), "calibration batch 1", *parts)


def test_integer_inputs_refuse_floats():
    batch = (np.ones((1, 4), np.float32), np.ones((1, 2), np.float32))
    _one_line(lambda: _all([batch], TWO), "calibration batch 0, input 'ids'", "int64", "float32")


def test_inputs_with_different_numbers_of_samples():
    batch = (np.ones((2, 4), np.float32), np.ones((3, 2), np.int64))
    _one_line(lambda: _all([batch], TWO), "calibration batch 0", "same number of samples", "[2, 3]")


@pytest.mark.parametrize("batches", [None, 3, "data.npz", Path("data.npz")], ids=str)
def test_what_is_no_iterable_of_batches(batches):
    _one_line(lambda: _all(batches), "calibration data", "an iterable")


# --- files ---


def test_npz(tmp_path: Path):
    path = tmp_path / "d.npz"
    np.savez(path, image=np.ones((2, 4), np.float32), ids=np.array([[1, 2], [3, 4]]))
    got = _all(open_data(path), TWO)
    assert [b.tolist() for _, b in got] == [[[1, 2]], [[3, 4]]]
    np.savez_compressed(path, X)
    assert (_all(open_data(str(path)))[0][0] == X).all()


def test_a_folder_of_npy_in_order_of_name(tmp_path: Path):
    for index in (2, 0, 1):
        np.save(tmp_path / f"{index}.npy", X + index)
    (tmp_path / "notes.txt").write_text("not data")
    assert [int(x[0, 0]) for (x,) in _all(open_data(tmp_path))] == [0, 1, 2]


def test_pickles_are_refused(tmp_path: Path):
    folder = tmp_path / "d"
    folder.mkdir()
    np.save(folder / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    _one_line(lambda: _all(open_data(folder)), "a.npy", "allow_pickle=False")
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    _one_line(lambda: open_data(tmp_path / "d.npz"), "d.npz", "allow_pickle=False")


def test_damaged_files(tmp_path: Path):
    good = tmp_path / "good.npz"
    np.savez_compressed(good, x=np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32))
    whole = good.read_bytes()
    bad = tmp_path / "bad.npz"
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 5):
        bad.write_bytes(whole[:size])
        _one_line(lambda: open_data(bad), "bad.npz", "a .npz archive")
    flipped = bytearray(whole)
    flipped[300:340] = b"\xff" * 40
    bad.write_bytes(flipped)
    _one_line(lambda: open_data(bad), "bad.npz", "a .npz archive")
    bad.write_text("text")
    _one_line(lambda: open_data(bad), "bad.npz", "a .npz archive")


def test_damaged_npy(tmp_path: Path):
    np.save(tmp_path / "a.npy", X)
    whole = (tmp_path / "a.npy").read_bytes()
    for content in (b"", whole[:20], whole[:-3], b"text"):
        (tmp_path / "a.npy").write_bytes(content)
        _one_line(lambda: _all(open_data(tmp_path)), "a.npy", "a .npy array")


def test_one_kind_of_file_under_the_name_of_the_other(tmp_path: Path):
    np.save(tmp_path / "a.npy", X)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    _one_line(lambda: open_data(tmp_path / "a.npz"), "a.npz", "saw a .npy array")
    np.savez(tmp_path / "b.npz", x=X)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    _one_line(lambda: _all(open_data(tmp_path)), "b.npy", "saw a .npz archive")


def test_nothing_to_read(tmp_path: Path):
    _one_line(lambda: open_data(tmp_path), str(tmp_path), ".npy files", "none")
    _one_line(lambda: open_data(tmp_path / "absent.npz"), "absent.npz", "no such file")
    _one_line(lambda: open_data(tmp_path / "absent"), "absent", "no such file")
    (tmp_path / "d.csv").write_text("1,2")
    _one_line(lambda: open_data(tmp_path / "d.csv"), "d.csv", "a .csv file")
    np.savez(tmp_path / "e.npz")
    _one_line(lambda: open_data(tmp_path / "e.npz"), "e.npz", "an empty archive")
