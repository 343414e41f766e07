"""Sizes and offsets of the C structures that stand in a module's file, for x86-64.

Sources: ``include/linux/livepatch.h``, ``include/linux/module.h``, ``include/linux/moduleparam.h``,
``include/linux/export-internal.h``, ``include/uapi/linux/elf.h``, and the BTF of Debian's 6.1 and 6.12 kernels, which
agree on the livepatch structures. kpatch's rows: ``kmod/patch/kpatch-patch.h`` of the kpatch project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SHN_UNDEF = 0
SHN_LORESERVE = 0xFF00
#: Section index that marks a symbol which livepatch resolves.
SHN_LIVEPATCH = 0xFF20
SHN_ABS = 0xFFF1
SHN_COMMON = 0xFFF2

SHT_NULL, SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOTE, SHT_NOBITS, SHT_REL = 0, 1, 2, 3, 4, 7, 8, 9

SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
SHF_MERGE, SHF_STRINGS, SHF_INFO_LINK = 0x10, 0x20, 0x40
#: Section flag of relocations that livepatch applies (an OS specific bit).
SHF_RELA_LIVEPATCH = 0x00100000
#: Section flag of data that becomes read-only after init; the loader sets it.
SHF_RO_AFTER_INIT = 0x00200000

R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32 = 1, 2, 4

STB_LOCAL, STB_GLOBAL, STB_WEAK = 0, 1, 2
STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_SECTION, STT_FILE = 0, 1, 2, 3, 4

ELF_HEADER_SIZE = 64
SECTION_HEADER_SIZE = 64
SYMBOL_SIZE = 24
RELA_SIZE = 24

#: struct module of 6.12 (amd64, Debian's configuration), and where its members stand.
MODULE_SIZE = 0x500
MODULE_NAME_OFFSET = 0x18
MODULE_NAME_LEN = 56
MODULE_INIT_OFFSET = 0x138
MODULE_EXIT_OFFSET = 0x4B0

#: struct kernel_param: name, mod, ops, perm (u16), level (s8), flags (u8), arg.
PARAM_SIZE = 40
PARAM_NAME, PARAM_MOD, PARAM_OPS, PARAM_PERM, PARAM_ARG = 0, 8, 16, 24, 32

#: struct modversion_info: crc (long), name[56].
MODVERSION_SIZE = 64

#: struct kernel_symbol with relative references: value, name, namespace (s32 each).
KSYMTAB_SIZE = 12

#: rows of kpatch's .kpatch.funcs: new_addr, new_size, old_addr, old_size, sympos, name, objname.
KPATCH_FUNC_SIZE = 56

#: Section of a synthetic module that holds its normalised spec (JSON); not loaded into memory.
SPEC_SECTION = ".klpfs.spec"

#: vermagic of Debian's 6.12: its flags, and its release.
VERMAGIC_FLAGS = "SMP preempt mod_unload modversions"
DEFAULT_RELEASE = "6.12.117+deb12-amd64"


class StructLayout(NamedTuple):
    """Size of a structure and the offsets of its members, in bytes."""

    size: int
    members: Mapping[str, int]


#: Layout of the livepatch structures when nothing better (BTF, DWARF) is at hand.
KLP_LAYOUT: Mapping[str, StructLayout] = {
    "klp_patch": StructLayout(200, {"mod": 0, "objs": 8, "states": 16, "replace": 24}),
    "klp_object": StructLayout(168, {"name": 0, "funcs": 8, "callbacks": 16, "kobj": 56}),
    "klp_callbacks": StructLayout(
        40, {"pre_patch": 0, "post_patch": 8, "pre_unpatch": 16, "post_unpatch": 24, "post_unpatch_enabled": 32}
    ),
    "klp_func": StructLayout(152, {"old_name": 0, "new_func": 8, "old_sympos": 16, "old_func": 24}),
    "klp_state": StructLayout(24, {"id": 0, "version": 8, "data": 16}),
}


def usable(layouts: Mapping[str, StructLayout]) -> bool:
    """Whether layouts from elsewhere have all structures and members that are needed, at possible places."""
    for name, known in KLP_LAYOUT.items():
        layout = layouts.get(name)
        if layout is None or not 0 < layout.size <= 1 << 16:
            return False
        needed = known.members.keys() - {"kobj", "old_func", "data", "post_unpatch_enabled"}
        if any(not 0 <= layout.members.get(member, -1) <= layout.size - 1 for member in needed):
            return False
    return True
