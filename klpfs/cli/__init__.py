"""The command line: one module a command, imported only when that command is used.

Model. :mod:`klpfs.cli.group` holds the table of commands; each of the modules that it names has a click command as
its attribute ``command``. What several share (exit codes, error type, finding the daemon, tables, JSON) is in
:mod:`klpfs.cli.common`. Data goes to standard output, everything else to standard error.

Locks. None: a command is a short-lived process that talks to the daemon through its control socket.

Source. ``insmod``, ``rmmod`` and ``lsmod`` word their output and their errors as kmod's do (tools/insmod.c,
tools/rmmod.c, tools/lsmod.c), ``dmesg`` as util-linux's (sys-utils/dmesg.c).
"""
