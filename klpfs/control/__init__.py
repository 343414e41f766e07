"""The control socket: how the command line reaches a running emulator.

Model. A daemon (``klpfs mount``, ``klpfs run``) listens on a Unix socket in a private runtime directory. A client sends
one JSON object a line and gets one JSON object a line back; ``dmesg`` with ``follow`` gets one line a record until it
hangs up. Requests and replies are msgspec structs (:mod:`klpfs.control.protocol`), so that a malformed one is answered
with the path of the offending field and harms nobody.

========================  ==============================================================================
:mod:`.protocol`          requests, replies, limits, encoding and strict decoding
:mod:`.runtime`           the runtime directory and the registry of running daemons in it
:mod:`.client`            a blocking client, used by the commands; imports neither trio nor rich
:mod:`.server`            the trio server: connections, framing, limits
:mod:`.ops`               what each request does to a :class:`klpfs.machine.Machine`
:mod:`.daemon`            the process behind ``klpfs mount``: start-up, report, clean end
:mod:`.prefork`           how that process comes to be
:mod:`.serving`           what it runs under trio
========================  ==============================================================================

Locks. Handlers run on the trio thread, which owns the core; a request holds no lock of its own and takes the core's
(``klp_mutex``, ``module_mutex``) only through the calls it makes, in the order in which those take them. Requests of
one connection are served one after another, those of different connections concurrently.

Source. There is no such socket in a kernel: it stands in for what a kernel is told by system calls
(``finit_module(2)``, ``delete_module(2)``, ``syslog(2)``) and for the world around it that creates and wakes tasks.
"""
