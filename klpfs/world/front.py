"""The first process of a world: it makes the namespaces, waits for the command, and passes signals on.

Model
    The front stays in the process group of the shell that started it, and so does the command, so that the terminal's
    signals reach the command without help. Signals that somebody sends to the front alone are passed on. When the
    command stops, the front stops too, which is what the shell's job control looks at; pid 1 and the daemon, which
    terminal signals do not reach, keep the world going meanwhile.

    Until the command starts, a signal that would end it ends the world.

    The front is the parent of the daemon and of pid 1, and each of the three dies with the others: pid 1 by
    PR_SET_PDEATHSIG, the daemon at the end of its socket to the front, the world when the front kills pid 1.

Locks
    One thread, one loop over a signalfd and a socket.

Source
    unshare(2), user_namespaces(7), pid_namespaces(7), setpgid(2), tty_ioctl(4), signalfd(2).
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Final

from klpfs.world import sysapi
from klpfs.world.mounts import WorldError
from klpfs.world.options import EXIT_FAILED, Options

__all__ = ["Signals", "complain", "fill_standard_streams", "run", "shortage"]

#: si_code of signals that the kernel sends, the terminal's among them.
SI_KERNEL: Final = 0x80

#: Passed on to the command.
_FORWARDED: Final = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGCONT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH,
)  # fmt: skip
#: What ends a world whose command has not started yet.
_ENDING: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
#: Sent to a whole process group by the kernel: the command has it too.
_BLOCKED: Final = (*_FORWARDED, signal.SIGCHLD)


class Signals:
    """The signal state that the command is to inherit: what was ignored and blocked when klpfs started."""

    def __init__(self) -> None:
        # Python ignores SIGPIPE and SIGXFSZ for itself, and what they were before is not known any more
        own = {signal.SIGPIPE, signal.SIGXFSZ}
        self.ignored = [n for n in range(1, 32) if n not in own and signal.getsignal(n) == signal.SIG_IGN]
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)

    def restore(self) -> None:
        """Give this process the dispositions and the mask that klpfs was started with."""
        for number in range(1, 32):
            if number in (signal.SIGKILL, signal.SIGSTOP):
                continue
            signal.signal(number, signal.SIG_IGN if number in self.ignored else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)


def complain(text: str) -> None:
    """Say it on standard error, if that still is there."""
    try:
        os.write(2, f"klpfs: {text}\n".encode(errors="surrogateescape"))
    except OSError:
        pass


def fill_standard_streams() -> None:
    """Put /dev/null where a standard descriptor is closed, so that nothing of klpfs's gets its number. The command
    will find it closed again. Raises OSError."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, and closed on exec
        if fd > 2:
            os.close(fd)
            return


def _leaves(err: BaseException) -> Iterator[BaseException]:
    if isinstance(err, BaseExceptionGroup):
        for inner in err.exceptions:
            yield from _leaves(inner)
    else:
        yield err


def shortage(err: BaseException) -> str | None:
    """What has run out and the limit to look at, if *err* says that; None for any other error."""
    limits = {
        errno.EMFILE: "ulimit -n",
        errno.ENFILE: "sysctl fs.file-max",
        errno.EAGAIN: "ulimit -u",
        errno.ENOMEM: "ulimit -d, ulimit -v",
    }
    for leaf in _leaves(err):
        number = None
        if isinstance(leaf, MemoryError):
            number = errno.ENOMEM
        elif isinstance(leaf, OSError):
            number = leaf.errno
        elif isinstance(leaf, RuntimeError) and "start new thread" in str(leaf):
            return "no more threads can be started (ulimit -u, ulimit -d, ulimit -v)"
        elif isinstance(leaf, ImportError):  # the dynamic linker's words
            number = next((n for n in limits if os.strerror(n) in str(leaf)), None)
            if "failed to map segment" in str(leaf):
                number = errno.ENOMEM
        if number in limits:
            return f"{os.strerror(number)} ({limits[number]})"
    return None


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _userns_hint(err: OSError) -> str:
    """What keeps an ordinary user from making a user namespace, and how an administrator changes that."""
    for path, bad, remedy in (
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        ("/proc/sys/user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ):
        if _read(path) == bad:
            return f"; user namespaces are switched off here, an administrator allows them with: {remedy}"
    if err.errno == errno.ENOSPC:
        return "; the limit user.max_user_namespaces is reached"
    return (
        "; in a container, start it with the capability SYS_ADMIN and without a seccomp profile that forbids unshare(2)"
        " (docker run --cap-add SYS_ADMIN --security-opt seccomp=unconfined)"
    )


def enter_namespaces() -> None:
    """New mount and PID namespaces (the latter for children); in a new user namespace where that is what it takes.

    In a user namespace the user is root, and the only one without subordinate ids. Raises WorldError.
    """
    try:
        sysapi.unshare(sysapi.CLONE_NEWNS | sysapi.CLONE_NEWPID)
        return
    except OSError as err:
        if err.errno != errno.EPERM:
            raise WorldError(f"cannot make namespaces: {err.strerror}{_userns_hint(err)}") from None
    from klpfs.world.idmap import Mapper

    try:
        mapper = Mapper()
        sysapi.unshare(sysapi.CLONE_NEWUSER | sysapi.CLONE_NEWNS | sysapi.CLONE_NEWPID)
    except OSError as err:
        raise WorldError(
            f"cannot make a user namespace: {shortage(err) or f'{err.strerror}{_userns_hint(err)}'}"
        ) from None
    try:
        mapper.write()
    except OSError as err:
        raise WorldError(f"cannot map the user into the new user namespace: {err.strerror}") from None


class _Terminal:
    """The terminal that belongs to this job, if there is one."""

    def __init__(self) -> None:
        self.fd = -1
        for fd in (0, 1, 2):
            try:
                if os.tcgetpgrp(fd) == os.getpgrp():
                    self.fd = os.dup(fd)
                    os.set_inheritable(self.fd, False)
                    return
            except OSError:
                continue

    def take_back(self) -> None:
        """Be the foreground process group again: a shell in the world leaves the terminal with a group that is gone."""
        if self.fd < 0:
            return
        try:
            if os.tcgetpgrp(self.fd) != os.getpgrp():
                os.tcsetpgrp(self.fd, os.getpgrp())  # SIGTTOU is blocked
        except OSError:
            pass

    def give(self, pgrp: int) -> None:
        """Hand the terminal to a process group."""
        if self.fd >= 0 and pgrp > 0:
            try:
                os.tcsetpgrp(self.fd, pgrp)
            except OSError:
                pass

    def owner(self) -> int:
        """The foreground process group, 0 if unknown."""
        if self.fd < 0:
            return 0
        try:
            return os.tcgetpgrp(self.fd)
        except OSError:
            return 0


class Front:
    """The loop: wait for the end of pid 1 or of the daemon, and pass things on meanwhile."""

    def __init__(
        self, init: int, daemon: int, to_init: socket.socket, to_daemon: socket.socket, signals: Signals
    ) -> None:
        self.init, self.daemon = init, daemon
        self.to_init, self.to_daemon = to_init, to_daemon
        self.signals = signals
        self.begun = False
        """Whether the command has started."""
        self.ended_by = 0
        """The signal that ended the world before."""
        self.status: int | None = None
        self.init_gone = self.daemon_gone = False
        self.failure = ""
        self.terminal = _Terminal()

    def loop(self) -> int:
        """Serve until pid 1 is gone; the exit code."""
        fd = sysapi.signalfd(_BLOCKED)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self.to_init, select.POLLIN)
        poll.register(self.to_daemon, select.POLLIN)
        while not self.init_gone:
            for ready, _events in poll.poll():
                if ready == fd:
                    for info in sysapi.read_signalfd(fd):
                        self._signal(poll, info)
                elif ready == self.to_init.fileno():
                    self._message(poll, self.to_init)
                else:
                    self._message(poll, self.to_daemon)
        self._message(poll, self.to_init)  # its last words may still be there
        self._message(poll, self.to_daemon)
        self.terminal.take_back()
        self._end_daemon(poll, fd)
        if self.status is None:  # pid 1 may have seen the daemon's end before the daemon could say why
            self._message(poll, self.to_daemon)
        os.close(fd)
        if self.ended_by:
            return 128 + self.ended_by
        if self.failure:
            complain(self.failure)
            return EXIT_FAILED
        if self.status is None:
            complain("pid 1 of the world was killed")
            return 128 + int(signal.SIGKILL)
        if os.WIFSIGNALED(self.status):
            return 128 + os.WTERMSIG(self.status)
        return os.WEXITSTATUS(self.status)

    def _signal(self, poll: select.poll, info: sysapi.SignalInfo) -> None:
        if not self.begun:
            self._message(poll, self.to_init)  # it may have said so just now
        if info.signo == signal.SIGCHLD:
            self._reap()
        elif not self.begun and info.signo in _ENDING:
            if info.signo not in self.signals.ignored and not self.init_gone and not self.ended_by:
                self.ended_by = info.signo
                for pid in (self.init, self.daemon):  # both may be waiting for something that never comes
                    os.kill(pid, signal.SIGKILL)
        elif info.code != SI_KERNEL or info.signo == signal.SIGCONT:
            self._tell_init(b"S%d" % info.signo)

    def _tell_init(self, message: bytes) -> None:
        try:
            self.to_init.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it is ending

    def _reap(self) -> None:
        for pid in (self.init, self.daemon):
            if (pid == self.init and self.init_gone) or (pid == self.daemon and self.daemon_gone):
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            if found == 0:
                continue
            if pid == self.init:
                self.init_gone = True
            else:
                self.daemon_gone = True
                if not self.init_gone:
                    os.kill(self.init, signal.SIGKILL)
                    if not self.failure:
                        how = f"by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "unexpectedly"
                        self.failure = f"the daemon ended {how}; the world went with it"

    def _message(self, poll: select.poll, sock: socket.socket) -> None:
        while True:
            try:
                message = sock.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            kind, text = message[:1], message[1:].decode(errors="surrogateescape")
            if not message:
                try:
                    poll.unregister(sock)  # the other side ended: SIGCHLD says how
                except KeyError:
                    pass
                return
            if kind == b"X":
                self.status = int(text)
            elif kind == b"B":
                self.begun = True
            elif kind == b"E" and sock is self.to_daemon:
                self.failure = text  # it has the reason, where pid 1 only knows that the daemon is gone
                if not self.init_gone:
                    os.kill(self.init, signal.SIGKILL)
            elif kind == b"E" and not self.failure:
                self.failure = text
            elif kind == b"T":
                self._stop()

    def _stop(self) -> None:
        """The command stopped: stop as well, until the shell continues us, or the daemon when the command goes on."""
        owner = self.terminal.owner()
        self.terminal.take_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        if owner != os.getpgrp():
            self.terminal.give(owner)
        self._tell_init(b"S%d" % signal.SIGCONT)

    def _end_daemon(self, poll: select.poll, signals: int) -> None:
        try:
            self.to_daemon.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        wait = select.poll()
        wait.register(signals, select.POLLIN)
        for _ in range(3):
            self._reap()
            if self.daemon_gone:
                return
            wait.poll(1000)
            sysapi.read_signalfd(signals)
        os.kill(self.daemon, signal.SIGKILL)
        os.waitpid(self.daemon, 0)


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def run(options: Options) -> int:
    """Run the command of *options* in a world of its own; the exit code for klpfs.

    That is the command's, 128 + n when signal n ended it, or EXIT_FAILED when klpfs failed, which then has been said on
    standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is None where the descriptor is closed
            stream.flush()
    try:
        fill_standard_streams()
        if not os.path.exists("/proc/self"):
            complain("/proc is not mounted, and a world cannot be made without it")
            return EXIT_FAILED
        return _run(options)
    except OSError as err:
        complain(f"cannot start: {shortage(err) or err}")
        return EXIT_FAILED


def _run(options: Options) -> int:
    """As :func:`run`. Raises OSError when the processes cannot be made."""
    signals = Signals()
    socks: list[socket.socket] = []
    daemon = 0
    try:
        for _ in range(3):
            socks += _pair()
        front_daemon, daemon_front, front_init, init_front, daemon_init, init_daemon = socks
        daemon_init.setsockopt(
            socket.SOL_SOCKET, socket.SO_PASSCRED, 1
        )  # so that the daemon learns pid 1's pid outside
        daemon = os.fork()
        if daemon == 0:
            status = EXIT_FAILED
            try:
                for sock in (front_daemon, front_init, init_front, init_daemon):
                    sock.close()
                from klpfs.world.daemon import main as daemon_main

                status = daemon_main(options, daemon_front, daemon_init, signals)
            except BaseException as err:  # noqa: BLE001 - a child must not return into what its parent was doing
                _fail(daemon_front, "the daemon failed", err)
            finally:
                os._exit(status)
        for sock in (daemon_front, daemon_init):
            sock.close()
        try:
            enter_namespaces()
        except WorldError as err:
            complain(str(err))
            return EXIT_FAILED
        init = os.fork()
        if init == 0:
            status = EXIT_FAILED
            try:
                for sock in (front_daemon, front_init):
                    sock.close()
                from klpfs.world.initproc import main as init_main

                status = init_main(options, init_front, init_daemon, signals)
            except BaseException as err:  # noqa: BLE001 - a child must not return into what its parent was doing
                _fail(init_front, "cannot make the world", err)
            finally:
                os._exit(status)
        for sock in (init_front, init_daemon):
            sock.close()
        front = Front(init, daemon, front_init, front_daemon, signals)
        daemon = 0  # the loop sees to its end
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)  # whoever reads from the command's output sees its end when the command closes it
        os.close(null)
        return front.loop()
    finally:
        if daemon:
            os.kill(daemon, signal.SIGKILL)
            os.waitpid(daemon, 0)
        for sock in socks:
            sock.close()
        signals.restore()


def _fail(to_front: socket.socket, what: str, err: BaseException) -> None:
    """Tell the front why this process ends; of what nobody has foreseen, show where, too."""
    why = shortage(err)
    if why is None:
        sys.excepthook(type(err), err, err.__traceback__)
        why = f"{type(err).__name__}: {err}"
    try:
        to_front.send(b"E" + f"{what}: {why}".encode(errors="surrogateescape"), socket.MSG_NOSIGNAL)
    except OSError:
        pass
