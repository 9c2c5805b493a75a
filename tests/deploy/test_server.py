"""`tvmq board serve`, where it is not as the board's own program: its words, where it looks for a secret."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Serving

from tvmq.cli import main
from tvmq.deploy.session import connect


def test_the_secret_is_found_where_the_user_keeps_it(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVMQ_SECRET_FILE", str(secret))
    with Serving("--secret", str(secret)) as serving:
        session = connect(serving.url)
        assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]
        assert serving.stop(signal.SIGTERM) == 0
        assert serving.said().endswith("stopped\n")


def test_the_command_itself_is_interrupted_as_a_terminal_does() -> None:
    command = [sys.executable, "-m", "tvmq", "board", "serve", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that starts its jobs in the background has them ignore SIGINT, and so their children.
    with subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        **pipes,
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    url = line.split()[0]
    assert line == f"{url} serves and lets everybody in who reaches it; Ctrl-C stops it\n"
    assert (json.loads(out)["device"], err, process.returncode) == (url, "", 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0: expected --secret FILE with it; who reaches this board may run any code",
        ),
        (["--host", "board.local"], "expected --secret FILE with it"),
        (["--key", "pi"], "expected both or none"),
        (["--tracker", "h:1"], "expected both or none"),
        (["--tracker", "h", "--key", "k"], "--tracker: expected HOST:PORT with a port from 1 to 65535, saw h"),
        (["--cpu", "max"], "--cpu: expected another action than serve"),
        (["--secret", "/nowhere/s"], "secret /nowhere/s: saw No such file"),
        (["--port", "70000"], "expected a port from 0 to 65535"),
        (["--host", "203.0.113.1", "--secret", "none"], "cannot listen on 203.0.113.1:0: saw Cannot assign"),
    ],
)
def test_wrong_words(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["board", "serve", *words]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
