"""Leave to use matrix tiles: asked for where a bundle is for a target that has them, and a refusal is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvmq.cpuinfo import host_features
from tvmq.deploy.bundle import read
from tvmq.deploy.executor import load
from tvmq.deploy.permission import allow_tiles
from tvmq.deploy.session import LocalSession
from tvmq.errors import IsaError
from tvmq.kernels.tiles import FEATURE, PERMISSION


class Library:
    """A library whose request for tiles is answered with `answer`."""

    def __init__(self, answer: int) -> None:
        self.answer, self.asked = answer, 0

    def get_function(self, name: str, *, query_imports: bool) -> Callable[[Any], None]:
        assert (name, query_imports) == (PERMISSION, True)

        def ask(tensor: Any) -> None:
            self.asked += 1
            tensor.copyfrom(np.array([self.answer], np.int32))

        return ask


def test_it_is_asked_for_once_where_the_target_has_tiles(bundle_of: Callable[..., Path]) -> None:
    library = Library(0)
    allow_tiles(read(bundle_of("flatten_linear", target="x86-64-amx")), LocalSession(), library)
    assert library.asked == 1


def test_it_is_not_asked_for_elsewhere(bundle_of: Callable[..., Path]) -> None:
    library = Library(-1)
    allow_tiles(read(bundle_of("flatten_linear", target="x86-64-avx2")), LocalSession(), library)
    assert library.asked == 0


def test_a_refusal_is_one_line(bundle_of: Callable[..., Path]) -> None:
    with pytest.raises(
        IsaError, match="bundle for x86-64-amx: expected a system that lets .*amx-tile.*refusal"
    ) as caught:
        allow_tiles(read(bundle_of("flatten_linear", target="x86-64-amx")), LocalSession(), Library(-1))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(FEATURE in host_features(), reason="this machine has tiles")
def test_a_bundles_own_request_is_refused_here(bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library asks Linux, which knows that the processor has none: the executor stops before any kernel runs."""
    monkeypatch.setattr(LocalSession, "check", lambda *_: None)
    with pytest.raises(IsaError, match="refusal"):
        load(bundle_of("flatten_linear", target="x86-64-amx"))
