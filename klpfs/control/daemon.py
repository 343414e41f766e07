"""The process behind a mount: start-up, signals, clean end.

The daemon is forked before anything heavy is imported (:mod:`klpfs.control.prefork`). It reports once through a pipe:
that the mount can be used, or why not. Until then its standard error is the caller's, for what libraries have to say;
afterwards it is its log file. It ends when the mount is taken away from outside, on SIGTERM, SIGINT or SIGHUP, and on a
``shutdown`` request, and leaves neither mount nor registry entry.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from klpfs import __version__
from klpfs.control import prefork, runtime
from klpfs.control.text import from_json, to_json
from klpfs.limits import raise_limits

if TYPE_CHECKING:
    from klpfs.kernel.kallsyms import SymbolTable

log = logging.getLogger("klpfs.daemon")

#: How long a start may take before the caller gives up, in seconds.
START_TIMEOUT: Final = 60.0


class MountConfig(msgspec.Struct, kw_only=True):
    """What ``klpfs mount`` was asked for.

    ``mountpoint`` is absolute; ``subtree`` a path in the tree, or empty; ``log`` is empty for the default: a file in
    the runtime directory, or standard error in the foreground; ``kernel_image`` or ``kallsyms`` is a file to take the
    kernel's symbols from instead of the shipped table; ``options`` are those of ``-o`` that go to the FUSE
    library.
    """

    mountpoint: str
    kernel: str
    release: str | None = None
    kernel_image: str = ""
    kallsyms: str = ""
    subtree: str = ""
    driver: str = "pyfuse3"
    clock: str = "real"
    cpus: int = 2
    options: list[str] = []
    allow_other: bool | None = None
    log: str = ""
    debug: bool = False
    foreground: bool = False


class Report(msgspec.Struct):
    """The daemon's word to its starter. ``kind``: ``ready``, ``usage`` (an option's value is wrong) or ``failed``."""

    kind: str
    message: str = ""
    pid: int = 0
    log: str = ""


class StartError(Exception):
    """The start failed for a reason that the user is to read, without a traceback."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def serve_mount(config: MountConfig, report: Callable[[Report], None]) -> int:
    """Serve a mount in this process until it ends; the exit status. ``report`` is called exactly once.

    What is logged goes to the log file, or to standard error in the foreground.
    """
    raise_limits()
    try:
        directory = runtime.make_runtime_dir()
        name = runtime.new_name(os.getpid())
        entry = runtime.Entry(
            name=name,
            pid=os.getpid(),
            socket=str(directory / f"{name}.sock"),
            mountpoint=config.mountpoint,
            driver=config.driver,
            kernel=config.kernel,
            version=__version__,
            started=time.time(),
            log=config.log or ("" if config.foreground else str(directory / f"{name}.log")),
        )
        _start_log(entry.log, debug=config.debug)
        return _run(config, entry, report)
    except StartError as err:
        report(Report(err.kind, str(err)))
    except runtime.RuntimeDirError as err:
        report(Report("failed", str(err)))
    return 1


def _start_log(path: str, *, debug: bool) -> None:
    """Log to the file ``path``, private to the user, or to standard error if it is empty. Raises StartError."""
    stream = sys.stderr
    if path:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise StartError("failed", f"log {path}: {err.strerror}") from None
        stream = os.fdopen(fd, "a", encoding="utf-8")
    logging.basicConfig(
        stream=stream,
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s: %(message)s",
    )


def _run(config: MountConfig, entry: runtime.Entry, report: Callable[[Report], None]) -> int:
    import trio

    from klpfs.control.serving import serve
    from klpfs.kernel.clock import parse_clock
    from klpfs.kernel.profile import profile

    try:
        clock = parse_clock(config.clock)
        kernel = profile(config.kernel, release=config.release)
    except ValueError as err:
        raise StartError("usage", str(err)) from None
    table: SymbolTable | None = None
    if config.kernel_image or config.kallsyms:
        from klpfs.elf.symbols import given_table

        try:
            loaded = given_table(config.kernel_image, config.kallsyms)
        except ValueError as err:
            raise StartError("failed", str(err)) from None
        table = loaded
        kernel = profile(config.kernel, release=config.release or loaded.release or None)
    ready = False

    def started() -> None:
        nonlocal ready
        ready = True
        runtime.write_entry(Path(entry.socket).parent, entry)
        report(Report("ready", pid=entry.pid, log=entry.log))

    try:
        trio.run(serve, config, kernel, table, entry, started, clock=clock)
    except Exception as err:
        failure = _start_failure(err)
        if ready or failure is None:
            log.exception("the daemon failed")
            if not ready:
                where = f"; its log is {entry.log}" if entry.log else ""
                raise StartError("failed", f"the daemon failed: {_innermost(err)!r}{where}") from None
            return 1
        raise failure from None
    finally:
        runtime.remove_entry(entry)
    return 0


def _innermost(err: BaseException) -> BaseException:
    """The only exception in nested groups of one."""
    while isinstance(err, BaseExceptionGroup) and len(err.exceptions) == 1:
        err = err.exceptions[0]
    return err


def _start_failure(err: BaseException) -> StartError | None:
    """What to tell the user, if ``err`` is something that a start may well meet."""
    from klpfs.drivers import MountError

    inner = _innermost(err)
    if isinstance(inner, StartError):
        return inner
    if isinstance(inner, MountError):
        return StartError("failed", inner.strerror or str(inner))
    if isinstance(inner, ImportError):
        return StartError("failed", f"the driver's library is missing: {inner}")
    return None


# -- forking -----------------------------------------------------------------------------------------------------------


def spawn(config: MountConfig) -> Report:
    """Start the daemon and return its report; after a ``ready`` one it lives on."""
    data = to_json(config)
    child = prefork.take()
    try:
        child.restore_signals()
        child.send(data)
        report = _await_report(child.report)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # done: there is nothing left to interrupt
    except BaseException:
        os.kill(child.pid, signal.SIGTERM)
        os.waitpid(child.pid, 0)
        raise
    if report is None:
        os.kill(child.pid, signal.SIGKILL)
        report = Report("failed", f"the daemon was not ready after {START_TIMEOUT:g} s")
    if report.kind != "ready":
        _, status = os.waitpid(child.pid, 0)
        if not report.message:
            code = os.waitstatus_to_exitcode(status)
            why = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            report.message = f"the daemon ended while it started ({why})"
    return report


def _await_report(reader: int) -> Report | None:
    """The report; an empty failure when the daemon died without one, None when it did not come in time."""
    import select

    data = b""
    end = time.monotonic() + START_TIMEOUT
    while not data.endswith(b"\n"):
        left = end - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return None
        chunk = os.read(reader, 65536)
        if not chunk:
            return Report("failed")
        data += chunk
    report: Report = from_json(data, Report)
    return report


def child_main(reader: int, writer: int) -> int:
    """The forked side, detached already: serve what the starter sends on ``reader``; the exit status."""
    import klpfs.control.serving  # noqa: F401 - most of a start's time, and the starter still looks at its arguments

    data = b""
    while chunk := os.read(reader, 65536):
        data += chunk
    os.close(reader)
    if not data:
        return 0  # the command line was wrong
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def report(what: Report) -> None:
        if what.kind == "ready":
            fd = os.open(what.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.dup2(fd, 2)
            os.close(fd)
        try:
            os.write(writer, to_json(what) + b"\n")
        except OSError as err:
            if err.errno != errno.EPIPE:  # the starter was interrupted, and has sent a SIGTERM as well
                raise
        os.close(writer)

    return serve_mount(from_json(data, MountConfig), report)
