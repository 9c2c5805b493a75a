"""Sizes as text, which program takes what, padding and cutting; and what is said where nothing fits."""

import numpy as np
import pytest

from tvmq.dynamic import Cut, Dynamic, cuts_of
from tvmq.errors import BundleError, ModelError, SignatureError
from tvmq.model import Signature, TensorSpec

TOKENS = Dynamic((("ids", 1), ("mask", 1)), (4, 8), cuts=(Cut(1, 1), None))
SPECS = (TensorSpec("ids", (2, 4), "int64"), TensorSpec("mask", (2, 4), "float32"))


@pytest.mark.parametrize(
    ("text", "axes", "sizes", "exact", "fixed"),
    [
        ("x:0=4,1,2", (("x", 0),), (1, 2, 4), False, ()),
        ("x:0=2", (("x", 0),), (2,), False, ()),
        ("ids:1, mask:1 == 64, 128", (("ids", 1), ("mask", 1)), (64, 128), True, ()),
        ("ids:1=16;ids:0,mask:0=1,2", (("ids", 0), ("mask", 0)), (1, 2), False, (("ids", 1, 16),)),
        ("a:b:0=1,2", (("a:b", 0),), (1, 2), False, ()),
    ],
)
def test_parse(text: str, axes: tuple, sizes: tuple, exact: bool, fixed: tuple) -> None:
    assert Dynamic.parse(text) == Dynamic(axes, sizes, exact, fixed=fixed)


@pytest.mark.parametrize("text", ["", "x", "x=1", "x:0", "x:0=", "x:0=0", "x:0=-1", "x:0=a", "x:-1=2", "x:0=1,,2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ModelError, match=r"dynamic sizes: expected INPUT:AXIS=N,N,"):
        Dynamic.parse(text)


def test_one_group_varies() -> None:
    with pytest.raises(ModelError, match="one group of axes that vary"):
        Dynamic.parse("x:0=1,2;x:1=3,4")


def test_text_is_what_was_parsed() -> None:
    for text in ("x:0=1,2,4", "ids:1,mask:1==64,128"):
        assert str(Dynamic.parse(text)) == text


@pytest.mark.parametrize(("size", "program"), [(1, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_the_next_program(size: int, program: int) -> None:
    assert TOKENS.program_for(size) == program


@pytest.mark.parametrize(("exact", "size", "expected"), [(False, 9, "1 to 8"), (False, 0, "1 to 8"), (True, 5, "4, 8")])
def test_no_program(exact: bool, size: int, expected: str) -> None:
    with pytest.raises(
        SignatureError, match=rf"input 'ids': expected {expected} along axis 1, saw {size}; .*--dynamic"
    ):
        Dynamic(TOKENS.axes, TOKENS.sizes, exact).program_for(size)


def test_padding_is_zeros_along_the_axes_that_vary() -> None:
    x = np.ones((2, 3), np.float32)
    padded = TOKENS.padded("mask", x, 8)
    assert padded.shape == (2, 8) and padded.dtype == np.float32
    assert padded[:, :3].all() and not padded[:, 3:].any()
    assert TOKENS.padded("other", x, 8) is x and TOKENS.padded("mask", x, 3) is x


def test_outputs_are_cut() -> None:
    outputs = np.zeros((2, 8, 5)), np.zeros((2, 6))
    assert [array.shape for array in TOKENS.cut(outputs, 3)] == [(2, 3, 5), (2, 6)]


def test_inputs_are_checked_but_for_the_axes_that_vary() -> None:
    ids, mask = np.ones((2, 7), np.int64), np.ones((2, 7), np.float32)
    signature = Signature(SPECS, ())
    arrays = TOKENS.arrays(signature, {"mask": mask, "ids": ids})
    assert [array.shape for array in arrays] == [(2, 7), (2, 7)] and arrays[0].dtype == np.int64
    assert TOKENS.size_of({"ids": ids, "mask": mask}) == 7
    for wrong, said in (((ids[:1], mask), r"shape \[2, 7\], saw \[1, 7\]"), ((ids[0], mask), r"saw \[7\]")):
        with pytest.raises(SignatureError, match=said):
            TOKENS.arrays(signature, wrong)
    with pytest.raises(SignatureError, match=r"input 'mask': expected 7 along axis 1, as input 'ids' .* saw 6"):
        TOKENS.size_of({"ids": ids, "mask": mask[:, :6]})


@pytest.mark.parametrize(
    ("small", "large", "cut"),
    [
        ((2, 5), (4, 5), Cut(0, 1)),
        ((6, 5), (12, 5), Cut(0, 3)),
        ((5, 2), (5, 4), Cut(1, 1)),
        ((5,), (5,), None),
        ((), (), None),
    ],
)
def test_cuts(small: tuple, large: tuple, cut: Cut | None) -> None:
    assert cuts_of([np.zeros(small)], 2, [np.zeros(large)], 4) == (cut,)


@pytest.mark.parametrize(
    ("small", "large"), [((2, 2), (4, 4)), ((3,), (5,)), ((2,), (4, 1)), ((0,), (1,)), ((2,), (5,))]
)
def test_outputs_that_do_not_grow_with_the_inputs(small: tuple, large: tuple) -> None:
    with pytest.raises(ModelError, match=r"output 0 of sizes 2 and 4: expected one axis that grows .*with == instead"):
        cuts_of([np.zeros(small)], 2, [np.zeros(large)], 4)


def test_plain_data_and_back() -> None:
    for wanted in (TOKENS, Dynamic.parse("ids:1=16;ids:0,mask:0=1,2")):
        assert Dynamic.from_dict(wanted.to_dict(), "here") == wanted
    of_before = {key: value for key, value in TOKENS.to_dict().items() if key != "fixed"}
    assert Dynamic.from_dict(of_before, "here") == TOKENS


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [8, 4]},
        {"sizes": []},
        {"sizes": [0, 4]},
        {"sizes": "ab"},
        {"axes": []},
        {"axes": [["ids"]]},
        {"axes": [["ids", -1]]},
        {"fixed": [["ids"]]},
        {"cuts": [{"axis": 0}]},
        {"cuts": [{"axis": -1, "each": 1}]},
        {"exact": None, "sizes": None},
    ],
    ids=str,
)
def test_plain_data_that_makes_no_sense(change: dict) -> None:
    with pytest.raises(BundleError, match="here: dynamic sizes: expected axes"):
        Dynamic.from_dict({**TOKENS.to_dict(), **change}, "here")
