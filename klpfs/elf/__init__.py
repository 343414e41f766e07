"""Kernel modules as files: reading ``.ko``, writing synthetic ones, and the symbols of a target kernel.

Model: everything here turns bytes into plain data and back; nothing knows of a running kernel. :mod:`.reader` gives the
contents of a module (real or synthetic), :mod:`.klp` the livepatch in it, :mod:`.layout` where its sections would lie
in memory, :mod:`.writer` makes a module of a :class:`klpfs.spec.ModuleSpec`; :mod:`.vmlinux` reads symbols and types
out of a kernel image, :mod:`.symbols` offers them for lookup, from an image, a text file or the shipped table.

Locks: none; the objects are not changed after they were made, but for caches that are filled once.

Trust: module files come from anybody. Sizes are capped, every offset is checked before it is used, and whatever is
malformed ends in ``OSError(ENOEXEC)`` with what and where, never in another exception.

Sources: kernel/module/main.c (``elf_validity_*``), kernel/livepatch/core.c, scripts/kallsyms.c,
Documentation/livepatch/module-elf-format.rst, Documentation/bpf/btf.rst, the ELF specification.
"""
