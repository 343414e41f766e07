"""Pid 1 of a world, and the start of the command.

Model
    It makes the mounts, which in part wait for the daemon to answer; starts the command; then reaps whatever ends,
    passes on the signals that the front forwards, and reports when the command stops, goes on or ends. With the
    command's end it ends itself, and the kernel ends all that is left in the namespace.

    Messages are single datagrams: to the front ``E`` text of a failure, ``B`` the command begins, ``X`` wait status of
    the command, ``T`` it stopped; to the daemon descriptors with ``F`` (the FUSE device, the procfs, and a socket),
    ``R`` (the private tmpfs), ``L`` (the seccomp listener), and ``C`` (the command goes on, so wake the front). On that
    socket the daemon asks for nodes in /dev, and is answered.

Locks
    One thread. It must not touch the FUSE tree once the command runs: a hung daemon would make it unkillable.

Source
    pid_namespaces(7), seccomp_unotify(2), kernel/pid_namespace.c (``pid_ns_ctl_handler``: ns_last_pid).
"""

from __future__ import annotations

import _thread
import errno
import os
import select
import signal
import socket

from klpfs.world import bpf, sysapi
from klpfs.world.front import Signals, complain, shortage
from klpfs.world.libmodules import set_up as set_up_modules
from klpfs.world.mounts import HIDDEN, DevDir, WorldError, mount_fuse, mount_proc, place_tree
from klpfs.world.options import EXIT_CANNOT_EXECUTE, EXIT_FAILED, EXIT_NOT_FOUND, Options

__all__ = ["main"]


def _send_fds(sock: socket.socket, message: bytes, fds: list[int]) -> None:
    try:
        socket.send_fds(sock, [message], fds)
    except OSError:
        raise WorldError("the daemon ended while the world was being made") from None


def _receive(sock: socket.socket) -> bytes:
    """One message of the daemon. Raises WorldError when it is gone."""
    try:
        message = sock.recv(65536)
    except OSError:
        message = b""
    if not message:
        raise WorldError("the daemon ended while the world was being made")
    return message


def _reserve_pids(proc: int) -> None:
    """Let the next process get pid 300: those below belong to emulated tasks."""
    try:
        fd = os.open("sys/kernel/ns_last_pid", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, b"%d" % (bpf.RESERVED_PIDS - 1))
        finally:
            os.close(fd)
        return
    except OSError:
        pass  # a kernel without CONFIG_CHECKPOINT_RESTORE, or a read-only /proc/sys
    # threads use up pids as well, at 30 microseconds each
    lock = _thread.allocate_lock()
    lock.acquire()
    for _ in range(2, bpf.RESERVED_PIDS):
        _thread.start_new_thread(lock.release, ())
        lock.acquire()


def _install_filter(options: Options) -> int:
    """The seccomp filter for this process and its descendants; the listener. Raises WorldError."""
    try:
        program = sysapi.pack_filter(bpf.build(keep_uname=options.keep_uname, traps=options.traps))
    except ValueError as err:
        raise WorldError(f"--trap: {err}") from None
    base = sysapi.SECCOMP_FILTER_FLAG_NEW_LISTENER | sysapi.SECCOMP_FILTER_FLAG_SPEC_ALLOW
    # a signal must not tear a caller out of a system call that has had its effect already (Linux 5.19)
    attempts = [base | sysapi.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, base]
    while True:
        try:
            return sysapi.seccomp_listener(program, attempts[0])
        except OSError as err:
            if err.errno == errno.EINVAL and len(attempts) > 1:
                attempts.pop(0)
            elif err.errno == errno.EACCES:
                sysapi.prctl(sysapi.PR_SET_NO_NEW_PRIVS, 1)
            else:
                hint = ""
                if err.errno == errno.EBUSY:
                    hint = "; this process is supervised already (klpfs run inside klpfs run, or a container manager)"
                elif err.errno in (errno.EINVAL, errno.ENOSYS):
                    hint = "; Linux 5.5 or later with CONFIG_SECCOMP_FILTER is needed"
                raise WorldError(f"cannot supervise system calls: {err.strerror}{hint}") from None


def _launch(
    options: Options, signals: Signals, to_front: socket.socket, to_daemon: socket.socket, cwd: str, here: int
) -> int:
    """In the command's process: become the command, in the directory *cwd*, or *here* (a descriptor) if no path leads
    there. Returns an exit code if that fails."""
    try:
        listener = _install_filter(options)
        _send_fds(to_daemon, b"L", [listener])
        os.close(listener)
        _receive(to_daemon)
    except WorldError as err:
        complain(str(err))
        return EXIT_FAILED
    to_daemon.close()
    try:
        os.chdir(cwd)  # by path: the directory may be covered by now
    except OSError:
        try:
            os.fchdir(here)  # it was removed, say
        except OSError:
            pass
    os.environ["KLPFS_SOCKET"] = f"/proc/{HIDDEN}/run/control"
    to_front.send(b"B", socket.MSG_NOSIGNAL)
    signals.restore()
    if not options.command[0]:  # os.execvp() has another opinion of it than execve(2)
        complain(f"'': {os.strerror(errno.ENOENT)}")
        return EXIT_NOT_FOUND
    try:
        os.execvp(options.command[0], options.command)
    except OSError as err:
        complain(f"{options.command[0]}: {err.strerror}")
        return EXIT_NOT_FOUND if err.errno in (errno.ENOENT, errno.ENOTDIR) else EXIT_CANNOT_EXECUTE


class _Init:
    """The loop of pid 1."""

    def __init__(
        self, command: int, to_front: socket.socket, to_daemon: socket.socket, requests: socket.socket, dev: DevDir
    ) -> None:
        self.command = command
        self.requests, self.dev = requests, dev
        self.to_front, self.to_daemon = to_front, to_daemon

    def _tell(self, sock: socket.socket, message: bytes) -> None:
        try:
            sock.send(message, socket.MSG_NOSIGNAL)
        except OSError:
            pass  # if it is gone, this process is about to be killed

    def _reap(self) -> int | None:
        """Collect what ended; the command's wait status if that did."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid != self.command:
                continue
            if os.WIFSTOPPED(status):
                self._tell(self.to_front, b"T%d" % os.WSTOPSIG(status))
            elif os.WIFCONTINUED(status):
                self._tell(self.to_daemon, b"C")
            else:
                return status

    def loop(self) -> int:
        """Serve until the command ends; its wait status."""
        fd = sysapi.signalfd([signal.SIGCHLD])
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self.to_front, select.POLLIN)
        poll.register(self.requests, select.POLLIN)
        while True:
            for ready, _events in poll.poll():
                if ready == fd:
                    sysapi.read_signalfd(fd)
                    status = self._reap()
                    if status is not None:
                        return status
                    continue
                if ready == self.requests.fileno():
                    request = self.requests.recv(4096)
                    if request:
                        self._tell(self.requests, self.dev.handle(request) or b"\0")
                    else:
                        poll.unregister(self.requests)  # the daemon is gone, and the front about to end this process
                    continue
                message = self.to_front.recv(64)
                if not message:
                    return 0  # the front is gone, and PR_SET_PDEATHSIG has not reached us yet
                os.kill(self.command, int(message[1:]))


def main(options: Options, to_front: socket.socket, to_daemon: socket.socket, signals: Signals) -> int:
    """Pid 1: make the mounts, run the command, report, return the exit code."""
    sysapi.prctl(sysapi.PR_SET_PDEATHSIG, signal.SIGKILL)
    sysapi.set_name("klpfs-init")
    sysapi.set_title("klpfs-init")
    try:
        cwd = os.getcwd()
    except OSError:
        cwd = ""
    try:
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        here = -1
    if options.modules is not None and cwd:
        options.modules = os.path.abspath(options.modules)
    try:
        sysapi.mount("none", "/", None, sysapi.MS_REC | sysapi.MS_SLAVE)
        proc = mount_proc()
        fuse = mount_fuse()
        requests, daemon_requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _send_fds(to_daemon, b"F", [fuse, proc, daemon_requests.fileno()])
        os.close(fuse)
        daemon_requests.close()
        stage = place_tree(report=lambda run: _send_fds(to_daemon, b"R", [run]))
        release = _receive(to_daemon).decode()
        set_up_modules(release, options.modules)
        _reserve_pids(proc)
    except OSError as err:
        where = f"{err.filename}: " if err.filename else ""
        return _fail(to_front, f"cannot make the world: {shortage(err) or f'{where}{err.strerror}'}")
    except WorldError as err:
        return _fail(to_front, str(err))
    os.close(proc)
    os.chdir("/")
    command = os.fork()
    if command == 0:
        status = EXIT_FAILED
        try:
            status = _launch(options, signals, to_front, to_daemon, cwd, here)
        except OSError as err:
            complain(f"cannot start the command: {shortage(err) or err.strerror}")
        finally:
            os._exit(status)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    # whatever klpfs was started with belongs to the command alone
    keep = sorted({to_front.fileno(), to_daemon.fileno(), requests.fileno(), stage})
    low = 3
    for fd in [*keep, os.sysconf("SC_OPEN_MAX")]:
        os.closerange(low, fd)
        low = fd + 1
    status = _Init(command, to_front, to_daemon, requests, DevDir(stage)).loop()
    to_front.send(b"X%d" % status, socket.MSG_NOSIGNAL)
    return 0


def _fail(to_front: socket.socket, text: str) -> int:
    try:
        to_front.send(b"E" + text.encode(errors="surrogateescape"), socket.MSG_NOSIGNAL)
    except OSError:
        pass
    return EXIT_FAILED
