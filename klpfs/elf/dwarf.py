"""Layouts of the livepatch structures from a module's debug information (DWARF), by pyelftools.

This is what is asked when the target kernel's BTF is not at hand; it takes a second or so, and most shipped modules
carry no debug information. Sources: the DWARF standard, pyelftools' documentation.
"""

from __future__ import annotations

import io
from typing import Any

from klpfs.elf.layouts import KLP_LAYOUT, StructLayout, usable
from klpfs.elf.reader import ElfModule

#: Largest .debug_info and number of its relocations that are looked at.
MAX_DEBUG_INFO = 4 << 20
MAX_DEBUG_RELOCS = 200_000


def klp_layouts(elf: ElfModule) -> dict[str, StructLayout] | None:
    """The layouts that the module was built with, None when it does not tell all of them."""
    info = elf.any_section(".debug_info")
    if info is None or info.size > MAX_DEBUG_INFO:
        return None
    if sum(section.size // 24 for section in elf.rela_sections(info.number)) > MAX_DEBUG_RELOCS:
        return None
    from elftools.common.exceptions import DWARFError, ELFError
    from elftools.elf.elffile import ELFFile

    wanted = set(KLP_LAYOUT)
    found: dict[str, StructLayout] = {}
    try:
        dwarf = ELFFile(io.BytesIO(elf.data[: elf.size])).get_dwarf_info()
        for unit in dwarf.iter_CUs():
            for die in unit.get_top_DIE().iter_children():
                if die.tag != "DW_TAG_structure_type" or "DW_AT_byte_size" not in die.attributes:
                    continue
                name = _name(die)
                if name in wanted and name not in found:
                    found[name] = _layout(die)
            if found.keys() == wanted:
                return found if usable(found) else None
    except (ELFError, DWARFError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        # pyelftools meets broken debug information with many exceptions; it is not needed to load the module
        return None
    return None


def _name(die: Any) -> str:
    attribute = die.attributes.get("DW_AT_name")
    return attribute.value.decode("latin-1") if attribute is not None else ""


def _layout(die: Any) -> StructLayout:
    members = {
        _name(member): int(member.attributes["DW_AT_data_member_location"].value)
        for member in die.iter_children()
        if member.tag == "DW_TAG_member" and "DW_AT_data_member_location" in member.attributes
    }
    return StructLayout(int(die.attributes["DW_AT_byte_size"].value), members)
