"""`tvmq board serve --tracker`: boards of a fleet, with a secret, at TVM's own tracker."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from servers import ALONE, Farm, Server

from tvmq.deploy.executor import load
from tvmq.deploy.session import connect
from tvmq.errors import DeviceError

sys.path.append(str(Path(__file__).parents[1] / "deploy"))
from serving import Serving, wait_until

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    found = Farm()
    yield found
    found.close()


def registered(farm: Farm, key: str, *words: str) -> Serving:
    from tvmq.deploy.tracker import Tracker

    serving = Serving("--tracker", f"127.0.0.1:{farm.tracker.port}", "--key", key, *words)
    wait_until(lambda: key in set(Tracker("127.0.0.1", farm.tracker.port, 9.0).keys()))
    return serving


def test_a_board_of_a_tracker_asks_for_its_secret_too(
    farm: Farm, tmp_path: Path, bundle_of: Callable[..., Path]
) -> None:
    secret = tmp_path / "s"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    device = f"tracker://127.0.0.1:{farm.tracker.port}/guarded"
    with registered(farm, "guarded", "--secret", str(secret)) as serving:
        executor = load(bundle_of("flatten_linear"), f"{device}?secret={secret}")
        inputs, outputs = executor.bundle.golden()
        np.testing.assert_array_equal(executor(*inputs)[0], outputs[0])
        executor.close()
        serving.wait_for("session of")
        # Without the tracker's word the right secret is not enough: the board may be somebody else's.
        with pytest.raises(DeviceError, match="expected a board with this secret"):
            connect(f"{serving.url}?secret={secret}")
        with pytest.raises(DeviceError, match="saw one that asks for a secret or a key"):
            connect(f"{device}?secret=none")
        serving.wait_for("refused: no secret")


def test_a_board_is_offered_again_after_each_session(farm: Farm) -> None:
    device = f"tracker://127.0.0.1:{farm.tracker.port}/open"
    with registered(farm, "open") as serving:
        first = connect(device)
        assert first.fetch(first.tensor(np.arange(3))).tolist() == [0, 1, 2]
        with pytest.raises(DeviceError, match="expected an answer, saw none in 0.3 s"):
            connect(device, timeout_s=0.3)
        with pytest.raises(DeviceError, match="saw one that asks for a secret or a key.*a tracker owns it"):
            connect(serving.url)
        os.kill(serving.sessions()[0], signal.SIGKILL)
        serving.wait_for("ended by SIGKILL")
        # The client that gave up is still in the tracker's line: its turn comes first, and passes.
        second = connect(device, timeout_s=30)
        assert second.fetch(second.tensor(np.arange(3))).tolist() == [0, 1, 2]


def test_tvm_s_own_server_knows_no_secret(tmp_path: Path) -> None:
    secret = tmp_path / "s"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    server = Server(ALONE)
    try:
        with pytest.raises(DeviceError, match="expected a board with a secret, saw none; .secret=none after the"):
            connect(f"rpc://127.0.0.1:{server.port}?secret={secret}")
        session = connect(f"rpc://127.0.0.1:{server.port}?secret=none", timeout_s=60)
        assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]
        session.close()
    finally:
        server.kill()
