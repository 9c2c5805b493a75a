import pytest

from tvmq import errors
from tvmq.errors import CheckFailed, InputError, TvmqError, nearest


def _tree(cls: type = TvmqError) -> list[type]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _tree(sub))]


def test_a_sentence_names_what_expected_seen_and_hint_on_one_line():
    error = TvmqError("input 'x'", expected="shape [1, 3]", seen=[1, 4], hint="resize it")
    assert str(error) == "input 'x': expected shape [1, 3], saw [1, 4]; resize it"
    assert (error.what, error.expected, error.seen, error.hint) == ("input 'x'", "shape [1, 3]", [1, 4], "resize it")


def test_parts_may_be_absent():
    assert str(TvmqError("no disk")) == "no disk"
    assert str(TvmqError("a", seen=0)) == "a: saw 0"
    assert str(TvmqError("a", expected="b")) == "a: expected b"
    assert str(TvmqError("a", hint="b")) == "a; b"


def test_line_breaks_of_foreign_messages_are_folded():
    assert str(TvmqError("a\n  b", seen="c\n\n\td")) == "a b: saw c d"


def test_exit_codes():
    assert InputError("x").exit_code == 2
    assert CheckFailed("x").exit_code == 1
    assert all(cls.exit_code == 2 for cls in _tree(InputError))


def test_the_drawing_holds_the_whole_tree_in_order():
    # Other modules may derive classes of their own; the drawing shows those of this file.
    drawn = [
        word for line in errors.__doc__.splitlines() for word in line.split() if word[0].isupper() and "Err" in word
    ]
    defined = [cls.__name__ for cls in _tree() if cls.__module__ == "tvmq.errors"]
    assert [*drawn, "CheckFailed"] == defined


@pytest.mark.parametrize("cls", _tree())
def test_every_class_has_a_docstring(cls: type):
    assert cls.__doc__


def test_nearest():
    assert nearest("percision", ["observer", "precision"]) == "did you mean 'precision'?"
    assert nearest("zzz", ["observer", "precision"]) is None
    assert nearest("x", []) is None
