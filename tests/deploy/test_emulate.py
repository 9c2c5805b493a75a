"""The emulated board starts, computes, and ends without a trace; its preparation is whole or absent."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax, rpc, te
from waiting import PATIENCE_S, wait_until

from tvmq.deploy import board_root as preparation
from tvmq.deploy import emulate
from tvmq.deploy.crosslink import linker
from tvmq.deploy.emulate import EmulatedBoard, default_cache, find_qemu, prepare
from tvmq.errors import DeviceError, OutputError

TRIPLE = "aarch64-linux-gnu.2.28"
TARGET = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}


# ---- On the board ----


def export_add(n: int, path: Path) -> None:
    a, b = (te.placeholder((n,), "int8", name=name) for name in "ab")
    c = te.compute((n,), lambda i: a[i] + b[i], name="c")
    module = tvm.IRModule({"add": te.create_prim_func([a, b, c]).with_attr("global_symbol", "add")})
    tvm.compile(module, target=tvm.target.Target(TARGET)).export_library(str(path), fcompile=linker(TRIPLE))


def export_dense(weight: np.ndarray, path: Path) -> None:
    x = relax.Var("x", relax.TensorType((1, weight.shape[0]), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.nn.relu(relax.op.matmul(x, relax.const(weight))))
        builder.emit_func_output(y)
    tvm.compile(builder.get(), tvm.target.Target(TARGET)).export_library(str(path), fcompile=linker(TRIPLE))


def load(remote: rpc.RPCSession, path: Path) -> tvm.runtime.Module:
    remote.upload(str(path))
    return remote.load_module(path.name)


@pytest.mark.emulated
@pytest.mark.parametrize("n", [7, 8, 9, 1003])
def test_an_int8_sum_is_the_sum_of_numpy(board: EmulatedBoard, tmp_path: Path, n: int) -> None:
    export_add(n, tmp_path / "add.so")
    remote = rpc.connect(board.host, board.port)
    add, device = load(remote, tmp_path / "add.so")["add"], remote.cpu()
    # Every int8 and its wrap-around: numpy and the board overflow alike.
    a = np.arange(n).astype("int8")
    b = (3 * np.arange(n) + 1).astype("int8")
    c = tvm.runtime.tensor(np.zeros(n, "int8"), device)
    add(tvm.runtime.tensor(a, device), tvm.runtime.tensor(b, device), c)
    np.testing.assert_array_equal(c.numpy(), a + b)


@pytest.mark.emulated
def test_a_relax_module_runs_and_is_timed(board: EmulatedBoard, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Small whole numbers: the sum is exact in float32, in any order.
    weight = rng.integers(-4, 5, (16, 9)).astype("float32")
    x = rng.integers(-4, 5, (1, 16)).astype("float32")
    export_dense(weight, tmp_path / "dense.so")
    remote = rpc.connect(board.host, board.port)
    device = remote.cpu()
    vm = relax.VirtualMachine(load(remote, tmp_path / "dense.so"), device)
    vm.set_input("main", tvm.runtime.tensor(x, device))
    vm.invoke_stateful("main")
    np.testing.assert_array_equal(vm.get_outputs("main").numpy(), np.maximum(x @ weight, 0))
    assert vm.time_evaluator("invoke_stateful", device, number=2, repeat=3)("main").mean > 0


@pytest.mark.emulated
def test_a_session_sees_no_file_of_the_last(board: EmulatedBoard) -> None:
    first = rpc.connect(board.host, board.port)
    first.upload(bytearray(b"x"), "a file")
    assert first.download("a file") == b"x"
    del first
    second = rpc.connect(board.host, board.port)
    with pytest.raises(tvm.error.RPCError, match="a file"):
        second.download("a file")
    with pytest.raises(tvm.error.RPCError, match="cannot open shared object"):
        second.load_module("nothing.so")


@pytest.mark.emulated
def test_the_runtime_has_what_tuning_needs(board: EmulatedBoard) -> None:
    remote = rpc.connect(board.host, board.port)
    remote.get_function("runtime.config_threadpool")(1, 2)
    assert remote.get_function("runtime.NumThreads")() == 2
    remote.get_function("tvm.contrib.random.random_fill_for_measure")


@pytest.mark.emulated
def test_a_session_that_dies_leaves_the_server(board: EmulatedBoard) -> None:
    with pytest.raises((tvm.error.RPCError, tvm.error.InternalError)):
        # Its second may be over before the client has heard that it began.
        timed_out = rpc.connect(board.host, board.port, session_timeout=1)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            timed_out.get_function("runtime.NumThreads")()
            time.sleep(0.1)
    rpc.connect(board.host, board.port)


@pytest.mark.emulated
@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x71\xf2\x0f\x00\xff\xff\xff\x7f"])
def test_a_stranger_leaves_the_server(board: EmulatedBoard, said: bytes) -> None:
    with socket.create_connection((board.host, board.port), PATIENCE_S) as stranger:
        stranger.sendall(said)
    rpc.connect(board.host, board.port)


@pytest.mark.emulated
def test_stop_leaves_no_process_and_no_file(board_root: Path) -> None:
    board = EmulatedBoard(board_root).start(cpu="cortex-a72")
    remote = rpc.connect(board.host, board.port)
    server, folder = board._process, board._folder
    assert server is not None
    assert folder is not None
    assert board.url == f"rpc://127.0.0.1:{board.port}"
    assert len(members(server.pid)) == 2, "a server and a session"
    with pytest.raises(DeviceError, match="already running"):
        board.start()
    board.stop()
    wait_until(lambda: not members(server.pid))
    assert not Path(folder.name).exists()
    board.stop()
    with pytest.raises(DeviceError, match="not running"):
        _ = board.port
    # The client notices, and its end is no crash.
    with pytest.raises((tvm.error.RPCError, tvm.error.InternalError)):
        remote.get_function("runtime.NumThreads")()


@pytest.mark.emulated
def test_the_board_ends_with_a_killed_parent(board_root: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tvmq.deploy.emulate import EmulatedBoard\n"
        "board = EmulatedBoard(Path(sys.argv[1])).start(); print(board._process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(board_root)]
    # Its temporary files stay behind, so they are made where pytest removes them.
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    assert members(server) == [server]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not members(server))


@pytest.mark.emulated
def test_an_unknown_processor_is_named(board_root: Path) -> None:
    with pytest.raises(DeviceError, match=r"did not start: saw .*CPU model 'abacus'"):
        EmulatedBoard(board_root).start(cpu="abacus")


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


# ---- Starting, with a stand-in for qemu ----


def fake_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A root, and on the PATH a qemu-aarch64 that runs `script`; it may write files into its folder `$D`."""
    command = tmp_path / "bin" / "qemu-aarch64"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nD={tmp_path}\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "root"


def test_the_port_is_what_the_server_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_qemu(tmp_path, monkeypatch, 'echo "$@" > $D/arguments; echo listening 127.0.0.1 1234; sleep 60')
    monkeypatch.setenv("LD_LIBRARY_PATH", "/of/this/machine")
    with EmulatedBoard(root, ["-plugin", "p.so"]).start(cpu="cortex-a53") as board:
        assert (board.host, board.port) == ("127.0.0.1", 1234)
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments == [
        *("-cpu", "cortex-a53", "-L", str(root), "-plugin", "p.so"),
        *(str(root / "opt/tvmq/tvmq-runner"), "serve", "--secret", "none", "--host", "127.0.0.1", "--port", "0"),
        "--until-stdin-closes",
        "--emulated",
    ]


def test_stop_ends_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_qemu(tmp_path, monkeypatch, "trap '' TERM HUP INT; sleep 60 & echo listening 127.0.0.1 1; wait")
    with EmulatedBoard(root) as board:
        assert board._process is not None
        group = board._process.pid
        assert len(members(group)) == 2
    wait_until(lambda: not members(group))


def test_a_silent_board_is_given_up_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_qemu(tmp_path, monkeypatch, "exec sleep 600")
    launch, launched = emulate._launch, []
    monkeypatch.setattr(emulate, "_launch", lambda *words: launched.append(launch(*words)) or launched[0])
    with pytest.raises(DeviceError, match=r"did not start: saw no answer in 0\.5 s"):
        EmulatedBoard(root).start(timeout_s=0.5)
    wait_until(lambda: not members(launched[0].pid))


def test_a_board_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_qemu(tmp_path, monkeypatch, "echo first >&2; echo the reason >&2; exit 3")
    with pytest.raises(DeviceError, match=r"did not start: saw the reason$"):
        EmulatedBoard(root).start()


def test_a_board_that_ends_without_a_word_shows_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_qemu(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(DeviceError, match="saw exit code 3"):
        EmulatedBoard(root).start()


def test_ctrl_c_during_the_start_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_qemu(tmp_path, monkeypatch, "echo $$ > $D/pid; exec sleep 60")

    def interrupt(*_: object) -> int:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
        raise KeyboardInterrupt

    monkeypatch.setattr("tvmq.deploy.emulate._wait_for_port", interrupt)
    with pytest.raises(KeyboardInterrupt):
        EmulatedBoard(root).start()
    wait_until(lambda: not members(int((tmp_path / "pid").read_text())))


# ---- Preparing, without downloads ----


def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(root: Path, scratch: Path) -> None:
        root.mkdir()
        scratch.mkdir()

    monkeypatch.setattr(preparation, "require_tools", lambda tools: None)
    monkeypatch.setattr(preparation, "install_debian_packages", install)
    monkeypatch.setattr(preparation, "_libraries", lambda cache, scratch: scratch.mkdir())
    monkeypatch.setattr(preparation, "install_tvm_runtime", lambda root, libraries: None)
    monkeypatch.setattr(preparation, "build_runner", lambda folder: (folder.parents[1] / "runner").touch())


def test_a_root_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_downloads(monkeypatch)
    root = prepare(tmp_path / "new" / "cache")
    assert (root / "runner").is_file()
    assert [p.name for p in root.parent.iterdir() if p.name != ".lock"] == [root.name]
    # From now on nothing is needed.
    monkeypatch.setattr(preparation, "locked", None)
    assert prepare(tmp_path / "new" / "cache") == root


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, DeviceError("no network")])
def test_an_interrupted_preparation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    no_downloads(monkeypatch)

    def interrupt(root: Path) -> None:
        raise interruption

    monkeypatch.setattr(preparation, "build_runner", interrupt)
    with pytest.raises((KeyboardInterrupt, DeviceError)):
        prepare(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_preparation_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_downloads(monkeypatch)
    (tmp_path / ".part-old" / "root").mkdir(parents=True)
    root = prepare(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", root.name]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_downloads(monkeypatch)

    def full(root: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparation, "build_runner", full)
    with pytest.raises(OutputError, match=r"cannot write .*: saw No space left on device"):
        prepare(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_cache_that_is_no_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_downloads(monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        prepare(tmp_path / "file")


def test_another_version_is_another_root(monkeypatch: pytest.MonkeyPatch) -> None:
    now = preparation.root_name()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "9.9")
    assert preparation.root_name() != now


def test_missing_tools_are_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DeviceError,
        match=r"saw no apt-get and no apt-config and no dpkg-deb on the PATH; on Debian: apt-get install apt dpkg$",
    ):
        prepare(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DeviceError, match=r"no qemu-aarch64 on the PATH; on Debian: apt-get install qemu-user$"):
        find_qemu()


def test_a_missing_pip_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"no pip in .*-m ensurepip"):
        preparation.require_pip()


def test_apt_keeps_the_sources_and_loses_the_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = (
        'APT::Architecture "amd64";\nAPT::Architectures:: "amd64";\nAcquire::http::Proxy "http://proxy";\n'
        'Dir::Etc::sourceparts "sources.list.d";\nAPT::Update::Post-Invoke:: "rm -f /var/cache";\n'
    )
    monkeypatch.setattr(preparation, "run_tool", lambda *_: dump)
    lines = preparation.apt_configuration(tmp_path).read_text().splitlines()
    assert 'Acquire::http::Proxy "http://proxy";' in lines
    assert 'Dir::Etc::sourceparts "sources.list.d";' in lines
    assert f'Dir::State "{tmp_path / "state"}";' in lines
    assert not any("Invoke" in line or "amd64" in line for line in lines)


def test_a_wheel_without_the_library_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.whl", "w") as wheel:
        wheel.writestr("lib/a.so", b"a")
    preparation.unpack_libraries(tmp_path / "t.whl", ["lib/a.so"], tmp_path)
    assert (tmp_path / "a.so").read_bytes() == b"a"
    with pytest.raises(DeviceError, match=r"cannot use t.whl: expected .*, saw no lib/b\.so"):
        preparation.unpack_libraries(tmp_path / "t.whl", ["lib/a.so", "lib/b.so"], tmp_path)


def test_a_failing_command_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"^cannot do it: saw last$"):
        preparation.run_tool(["sh", "-c", "echo first >&2; echo last >&2; exit 1"], "cannot do it")
    with pytest.raises(DeviceError, match="saw exit code 4 of sh"):
        preparation.run_tool(["sh", "-c", "exit 4"], "cannot do it")
    monkeypatch.setattr(preparation, "DOWNLOAD_TIMEOUT_S", 0.1)
    with pytest.raises(DeviceError, match="no answer of sleep"):
        preparation.run_tool(["sleep", "9"], "cannot do it")


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "tvmq" / "aarch64"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "tvmq" / "aarch64"
    monkeypatch.setattr(preparation, "user_cache", lambda: None)
    with pytest.raises(OutputError, match="a user without a home"):
        default_cache()
