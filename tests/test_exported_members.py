"""The public names of tvmq: a name that goes, or comes without being meant, is a change for every user."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tvmq

PUBLIC = {
    "CalibrationTable",
    "Executor",
    "Latency",
    "Model",
    "OpTime",
    "Recipe",
    "Signature",
    "Target",
    "TensorSpec",
    "TvmqError",
    "__version__",
    "compile",
    "import_model",
    "load",
    "load_target",
    "tune",
    "verify",
}


def test_the_public_names_are_these():
    assert set(tvmq.__all__) >= PUBLIC
    assert tvmq.__all__ == sorted(tvmq.__all__)


@pytest.mark.parametrize("name", tvmq.__all__)
def test_each_name_is_there_and_documented(name):
    value = getattr(tvmq, name)
    assert name == "__version__" or value.__doc__
    assert name in dir(tvmq)


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = tvmq.quantise


def test_a_name_is_imported_when_it_is_used():
    program = (
        "import sys, tvmq\n"
        "assert 'tvm' not in sys.modules\n"
        "tvmq.Recipe\n"
        "assert 'tvm' not in sys.modules\n"
        "from tvmq import load\n"
        "assert 'tvm' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
