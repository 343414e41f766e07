"""Directories come and go by the hundred while eight processes read, list and walk them, on both drivers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
from driver_support import Server

READERS = 8

READER = """
import errno, json, os, signal, sys
base, kind = sys.argv[1], int(sys.argv[2]) % 4
stop = []
signal.signal(signal.SIGTERM, lambda *args: stop.append(1))
seen, rounds = {}, 0
def note(what):
    seen[what] = seen.get(what, 0) + 1
def attempt(fn, *args):
    try:
        return fn(*args)
    except OSError as exc:
        note(errno.errorcode[exc.errno])
print("ready", flush=True)
while not stop:
    rounds += 1
    for name in ("p0", "p1", "p2", "p3"):
        path = f"{base}/{name}"
        if kind == 0:      # values, by path
            for file in ("enabled", "transition", "vmlinux/patched"):
                fd = attempt(os.open, f"{path}/{file}", os.O_RDONLY)
                if fd is not None:
                    data = attempt(os.read, fd, 100)
                    if data is not None:
                        note(f"value {data.decode()!r}")
                        again = attempt(os.pread, fd, 100, 0)
                        if again is not None:
                            note(f"value {again.decode()!r}")
                    os.close(fd)
        elif kind == 1:    # listings
            names = attempt(os.listdir, path)
            if names is not None:
                note("names " + " ".join(sorted(names)) if len(names) in (0, 4) else "names some")
            for root, dirs, files in os.walk(base):
                for each in files:
                    attempt(os.stat, f"{root}/{each}")
        elif kind == 2:    # a directory held
            fd = attempt(os.open, path, os.O_RDONLY | os.O_DIRECTORY)
            if fd is not None:
                for _ in range(3):
                    inner = attempt(lambda: os.open("enabled", os.O_RDWR, dir_fd=fd))
                    if inner is not None:
                        data = attempt(os.pread, inner, 100, 0)
                        if data is not None:
                            note(f"value {data.decode()!r}")
                        written = attempt(os.write, inner, b" ")
                        if written is not None:
                            note(f"wrote {written}")
                        os.close(inner)
                os.close(fd)
        else:              # attributes, and what is refused
            attempt(os.stat, path)
            attempt(os.chmod, f"{path}/force", 0o200)
            attempt(os.open, f"{path}/vmlinux/nosuch", os.O_RDONLY)
            if os.path.isdir(path):
                note("directory")
print(json.dumps([rounds, seen]))
"""


@pytest.mark.timeout(110)
def test_storm(toy: Server, driver: str) -> None:
    storm = toy.path / "storm"
    readers = [
        subprocess.Popen(
            [sys.executable, "-I", "-c", READER, str(storm), str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(READERS)
    ]
    try:
        for process in readers:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for _ in range(20):
            toy.call("storm", 25, 4)
            assert os.listdir(storm) == []
            for i in range(4):
                assert not (storm / f"p{i}").exists()
            assert (toy.path / "attrs/transition").read_bytes() == b"0\n"
        for process in readers:
            process.terminate()
        results = [(*process.communicate(timeout=60), process.returncode) for process in readers]
    finally:
        for process in readers:
            process.kill()
            process.wait(20)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
    allowed = {
        "ENOENT",
        "ENODEV",
        "value '0\\n'",
        "value '1\\n'",
        "wrote 1",
        "directory",
        "names ",
        "names some",
        "names enabled force transition vmlinux",
    }
    total: dict[str, int] = {}
    for out, err, status in results:
        assert (status, err) == (0, "")
        rounds, seen = json.loads(out)
        assert rounds > 2
        assert set(seen) <= allowed
        for what, count in seen.items():
            total[what] = total.get(what, 0) + count
    assert total["value '1\\n'"] > 0  # they did see the directories
    assert total["directory"] > 0
    assert total["ENOENT"] > 0
    assert os.stat(storm).st_nlink == 2
    assert toy.log() == ""


def test_two_removals_with_a_process_inside_each(toy: Server) -> None:
    """Processes that sit in the directories, all asking at once, when a removal takes the names back."""
    for _ in range(30):
        for name in ("a", "b"):
            toy.call("mkdir", f"storm/{name}")
        inside = [os.open(toy.path / "storm" / name, os.O_RDONLY | os.O_DIRECTORY) for name in ("a", "b")]
        go = threading.Barrier(5)
        seen: set[object] = set()

        def look(fd: int, go: threading.Barrier = go, seen: set[object] = seen) -> None:
            go.wait(20)
            for _ in range(20):
                try:
                    os.close(os.open("vmlinux/patched", os.O_RDONLY, dir_fd=fd))
                    seen.add(tuple(os.listdir(fd)) and "listed")
                except OSError as exc:
                    seen.add(type(exc).__name__ if exc.errno != 19 else "ENODEV")

        threads = [threading.Thread(target=look, args=(fd,)) for fd in inside * 2]
        for thread in threads:
            thread.start()
        go.wait(20)
        toy.call("rm", "storm/a")
        toy.call("rm", "storm/b")
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert seen <= {"listed", (), "FileNotFoundError", "ENODEV"}
        for fd in inside:
            assert os.listdir(fd) == []
            os.close(fd)
