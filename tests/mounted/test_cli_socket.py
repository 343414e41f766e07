"""The control socket: whatever is sent to it gets an answer that says what is wrong, and the mount lives on."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cli_support import Cli, Mounted, patch, wait_for

from klpfs.control import protocol
from klpfs.control.server import MAX_CONNECTIONS


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """One mount for all: nothing that these tests send may harm it."""
    with Cli(tmp_path_factory.mktemp("socket")).mounted() as m:
        yield m
        m.alive()


@contextmanager
def connection(m: Mounted) -> Iterator[socket.socket]:
    (entry,) = m.cli.entries()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(entry["socket"])
        sock.settimeout(30)
        yield sock


def lines(sock: socket.socket, count: int) -> list[Any]:
    """The next ``count`` replies."""
    data = b""
    while data.count(b"\n") < count:
        chunk = sock.recv(1 << 20)
        assert chunk, data
        data += chunk
    return [json.loads(line) for line in data.splitlines()]


def ask(m: Mounted, message: object) -> Any:
    """The reply to one message; a str or bytes is sent as it is."""
    raw = message if isinstance(message, bytes) else json.dumps(message).encode()
    with connection(m) as sock:
        sock.sendall(raw + b"\n")
        return lines(sock, 1)[0]


def test_ping(mounted: Mounted) -> None:
    reply = ask(mounted, {"op": "ping", "id": "x1"})
    assert reply["ok"]
    assert reply["id"] == "x1"
    assert reply["result"] == {
        "version": mounted.cli.ok("--version").split()[1],
        "protocol": protocol.PROTOCOL,
        "pid": mounted.pid,
        "mountpoint": str(mounted.path),
    }


@pytest.mark.parametrize(
    ("message", "path", "words"),
    [
        ({"op": "frobnicate"}, "$.op", "an operation is one of ping, insmod, rmmod"),
        ({}, "$", "missing required field `op`"),
        ({"op": 5}, "$.op", "Expected `str`"),
        ([1, 2], "$", "Expected `object`, got `array`"),
        (17, "$", "Expected `object`, got `int`"),
        ({"op": "insmod"}, "$", "missing required field `data`"),
        ({"op": "insmod", "data": "***"}, "$.data", "Invalid base64"),
        ({"op": "insmod", "data": "", "flag": 1}, "$", "unknown field `flag`"),
        ({"op": "insmod", "data": "", "flags": -1}, "$.flags", "Expected `int` >= 0"),
        ({"op": "insmod", "data": "", "args": ["a"]}, "$.args", "Expected `str`, got `array`"),
        ({"op": "rmmod"}, "$", "missing required field `name`"),
        ({"op": "rmmod", "name": ""}, "$.name", "length >= 1"),
        ({"op": "rmmod", "name": "x" * 300}, "$.name", "length <= 255"),
        ({"op": "task-add", "stack": ["a", 7]}, "$.stack[1]", "Expected `str`, got `int`"),
        ({"op": "task-add", "stack": ["a+b"]}, "$.stack[0]", "neither [MODULE:]FUNCTION[+OFFSET] nor an address"),
        ({"op": "task-add", "stack": ["0x1" + "0" * 16]}, "$.stack[0]", "not an address of 64 bits"),
        ({"op": "task-add", "state": "Q"}, "$.state", "matching regex"),
        ({"op": "task-add", "count": 0}, "$.count", ">= 1"),
        ({"op": "task-wake", "pid": "2"}, "$.pid", "Expected `int`, got `str`"),
        ({"op": "task-signal", "pid": 2, "signal": 65}, "$.signal", "<= 64"),
        ({"op": "clock", "advance": -1}, "$.advance", "> 0"),
        ({"op": "clock", "advance": 1e300}, "$.advance", "<= "),
        ({"op": "dmesg", "since": 1.5}, "$.since", "Expected `int | null`"),
        (b"not json", None, "not a JSON object"),
        (b'{"op": "ping"', None, "not a JSON object"),
        (b"\xff\xfe{}", None, "not a JSON object"),
        (b"[" * 100_000, None, ""),
        (b'{"op": "ping", "x": ' + b"[" * 100_000, None, ""),
        ({"op": "ping", "id": 1.5}, "$.id", "Expected `int | str | null`, got `float`"),
        (b"\0", None, "not a JSON object"),
    ],
)
def test_malformed_requests(mounted: Mounted, message: object, path: str | None, words: str) -> None:
    reply = ask(mounted, message)
    assert reply["ok"] is False
    assert reply["error"]["kind"] == "request"
    assert words in reply["error"]["message"]
    if path is not None:
        assert reply["error"]["path"] == path
    assert ask(mounted, {"op": "ping"})["ok"]


def test_a_refused_request_keeps_its_id(mounted: Mounted) -> None:
    assert ask(mounted, {"op": "nosuch", "id": 7})["id"] == 7
    assert "id" not in ask(mounted, {"op": "nosuch", "id": [7]})


def test_refusals_of_the_kernel_carry_its_errno(mounted: Mounted) -> None:
    assert ask(mounted, {"op": "rmmod", "name": "nosuch"})["error"]["errno"] == 2
    assert ask(mounted, {"op": "insmod", "data": base64.b64encode(b"junk").decode()})["error"]["errno"] == 8
    assert ask(mounted, {"op": "task-wake", "pid": 250})["error"]["errno"] == 3
    assert ask(mounted, {"op": "task-remove", "pid": 2})["error"] == {
        "kind": "kernel",
        "message": "2 (kthreadd) is the kernel's own task",
        "errno": 1,
    }
    reply = ask(mounted, {"op": "task-add", "stack": ["nosuch_function"]})
    assert reply["error"]["message"] == "no function nosuch_function in the kernel or a module"
    reply = ask(mounted, {"op": "task-add", "stack": ["cmdline_proc_show+0x100000"]})
    assert "lies behind it" in reply["error"]["message"]
    assert "the real clock cannot be moved" in ask(mounted, {"op": "clock", "advance": 1})["error"]["message"]


def test_many_requests_on_one_connection(mounted: Mounted) -> None:
    with connection(mounted) as sock:
        sock.sendall(b"".join(b'{"op": "ping", "id": %d}\n\n' % i for i in range(500)))
        assert [reply["id"] for reply in lines(sock, 500)] == list(range(500))


def test_a_request_in_pieces(mounted: Mounted) -> None:
    with connection(mounted) as sock:
        for byte in b'{"op": "ping"}\n':
            sock.sendall(bytes([byte]))
        assert lines(sock, 1)[0]["ok"]


def test_a_request_without_its_newline(mounted: Mounted) -> None:
    with connection(mounted) as sock:
        sock.sendall(b'{"op": "ping"}')
        sock.shutdown(socket.SHUT_WR)
        assert "without a newline" in lines(sock, 1)[0]["error"]["message"]
        assert sock.recv(1) == b""


def test_a_request_too_long(mounted: Mounted) -> None:
    chunk = b"x" * (1 << 20)
    with connection(mounted) as sock:
        try:
            for _ in range(protocol.MAX_LINE // len(chunk) + 8):
                sock.sendall(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it does not read on
        reply = lines(sock, 1)[0]
    assert reply["error"]["message"] == f"request longer than {protocol.MAX_LINE} bytes"
    mounted.alive()


def test_clients_that_hang_up(mounted: Mounted) -> None:
    data = base64.b64encode(os.urandom(300_000)).decode()
    requests = [
        b'{"op": "stat',
        b'{"op": "status"}\n',
        b'{"op": "dmesg", "follow": true}\n',
        b'{"op": "dmesg"}\n' * 200,
        json.dumps({"op": "insmod", "data": data}).encode() + b"\n",
    ]
    for request in requests:
        for _ in range(20):
            with connection(mounted) as sock:
                sock.sendall(request)
    assert ask(mounted, {"op": "ping"})["ok"]


def test_a_client_that_does_not_read(mounted: Mounted) -> None:
    with connection(mounted) as sock:
        sock.setblocking(False)
        try:
            for _ in range(10_000):
                sock.send(b'{"op": "status"}\n')
        except BlockingIOError:
            pass
        assert ask(mounted, {"op": "ping"})["ok"]
        mounted.alive()


def test_more_connections_than_are_served(mounted: Mounted) -> None:
    (entry,) = mounted.cli.entries()
    held = []
    try:
        for _ in range(MAX_CONNECTIONS + 30):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(entry["socket"])
            held.append(sock)
        assert ask(mounted, {"op": "ping"})["ok"]
        mounted.alive()
    finally:
        for sock in held:
            sock.close()


def test_the_log_can_be_followed(mounted: Mounted) -> None:
    with connection(mounted) as sock:
        sock.sendall(b'{"op": "dmesg", "follow": true, "new": true, "id": 3}\n')
        wait_for(lambda: mounted.sh("echo followed > $M/dev/kmsg").returncode == 0, "a writable log")
        reply = lines(sock, 1)[0]
    assert reply["more"] is True
    assert reply["id"] == 3
    assert reply["result"]["text"] == "followed"


def test_a_request_waits_for_nobody_else(mounted: Mounted) -> None:
    """While one client's module waits in its init, others are served."""
    ko = mounted.cli.module('name = "slow_init"\nkind = "module"\n[init]\nduration = 2\n')
    with connection(mounted) as sock:
        message = {"op": "insmod", "data": base64.b64encode(ko.read_bytes()).decode()}
        sock.sendall(json.dumps(message).encode() + b"\n")
        initstate = mounted.path / "sys/module/slow_init/initstate"
        wait_for(initstate.exists, "the module's coming")
        assert initstate.read_text() == "coming\n"
        assert ask(mounted, {"op": "status"})["ok"]
        assert lines(sock, 1)[0]["result"] == {"name": "slow_init"}
    mounted.cli.ok("rmmod", "slow_init")


def test_other_users_are_refused(mounted: Mounted) -> None:
    """Even where the modes would let them in."""
    (entry,) = mounted.cli.entries()
    script = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); fd = os.open(sys.argv[1], os.O_PATH);"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "s.connect(f'/proc/self/fd/{fd}'); print(s.recv(1000).decode())"
    )
    os.chmod(entry["socket"], 0o666)
    try:
        done = subprocess.run(
            ["python3", "-c", script, entry["socket"]], capture_output=True, text=True, timeout=30, check=False
        )
    finally:
        os.chmod(entry["socket"], 0o600)
    assert "another user's mount" in done.stdout, done


def test_a_patch_over_the_socket(mounted: Mounted) -> None:
    data = base64.b64encode(mounted.cli.module(patch("viasocket")).read_bytes()).decode()
    assert ask(mounted, {"op": "insmod", "data": data})["result"] == {"name": "viasocket"}
    assert ask(mounted, {"op": "insmod", "data": data})["error"]["errno"] == 17
    (mounted.klp / "viasocket/enabled").write_text("0")
    mounted.gone("viasocket")
    wait_for(lambda: (mounted.path / "sys/module/viasocket/refcnt").read_text() == "0\n", "the last reference")
    assert ask(mounted, {"op": "rmmod", "name": "viasocket"}) == {"ok": True}
