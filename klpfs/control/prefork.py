"""The fork behind ``klpfs mount``, made before its command line is looked at.

Most of a start is importing: trio and the emulator in the daemon, click in the starter. The fork comes first, so that
the two do it at the same time. The starter then sends what to serve; closing the pipe instead ends the child.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from typing import Final, NoReturn

#: Signals that end the daemon. They are blocked from the fork on until it looks out for them: a start that is
#: interrupted is ended in order, and leaves no half of its files behind.
ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _pipe() -> tuple[int, int]:
    """A pipe clear of the standard streams, which a caller may have closed."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in ends)
    for fd in ends:
        os.close(fd)
    return high[0], high[1]


class Child:
    """A forked daemon that waits to be told what to serve. ``report`` is the pipe on which it says how that went."""

    def __init__(self) -> None:
        config_reader, self._config = _pipe()
        self.report, report_writer = _pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        self.pid = os.fork()
        if self.pid == 0:
            _child(config_reader, report_writer)
        os.close(config_reader)
        os.close(report_writer)

    def restore_signals(self) -> None:
        """Let the starter be interrupted again."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def send(self, config: bytes) -> None:
        """Tell the child what to serve. A child that has died is found out by its missing report."""
        try:
            os.write(self._config, config)
        except BrokenPipeError:
            pass
        os.close(self._config)


_waiting: Child | None = None


def prepare() -> None:
    """Fork a child for a later :func:`take`; it ends with this process when nobody takes it."""
    global _waiting
    _waiting = Child()
    _waiting.restore_signals()


def take() -> Child:
    """The prepared child, or a new one. :meth:`Child.restore_signals` is up to the caller."""
    global _waiting
    child, _waiting = _waiting, None
    return child or Child()


def _child(reader: int, writer: int) -> NoReturn:
    """The forked side: leave everything of the caller's but its standard error, serve, end without exit handlers."""
    status = 1
    try:
        os.setsid()
        os.chdir("/")
        os.umask(0o077)
        # nothing of the caller's may be kept open by a daemon: a pipe, a lock, a terminal
        low, high = sorted((reader, writer))
        os.closerange(3, low)
        os.closerange(low + 1, high)
        os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        from klpfs.control.daemon import child_main

        status = child_main(reader, writer)
    except BaseException:
        import logging

        logging.getLogger("klpfs.daemon").exception("the daemon failed")
    finally:
        sys.stderr.flush()
        os._exit(status)
