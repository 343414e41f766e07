"""Layouts of the livepatch structures from a module's debug information (DWARF), by pyelftools.

This is what is asked when the target kernel's BTF is not at hand; it takes a second or so, and most shipped modules
carry no debug information. Sources: the DWARF standard, pyelftools' documentation.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
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
    from elftools.elf.elffile import ELFFile

    found: dict[str, StructLayout] = {}
    try:
        dwarf = ELFFile(io.BytesIO(elf.data[: elf.size])).get_dwarf_info()
        for unit in dwarf.iter_CUs():
            for name, layout in _structs(unit):
                if name in KLP_LAYOUT:
                    found.setdefault(name, layout)
            if found.keys() == KLP_LAYOUT.keys():
                break
    except Exception:  # noqa: BLE001 - pyelftools meets broken files with whatever its helpers raise, assertions included
        return None
    return found if usable(found) else None


def _structs(unit: Any) -> Iterator[tuple[str, StructLayout]]:
    """Structures of a compile unit, entry by entry in file order.

    pyelftools' own walk follows references to siblings, which in a forged file may lead backwards for ever.
    """
    from elftools.dwarf.die import DIE

    offset = unit.cu_die_offset
    end = unit.cu_offset + unit["unit_length"] + unit.structs.initial_length_field_size()
    stack: list[tuple[str, StructLayout, dict[str, int]] | None] = []
    while offset < end:
        entry = DIE(unit, unit.dwarfinfo.debug_info_sec.stream, offset)
        offset += max(entry.size, 1)
        if entry.is_null():
            if stack and (done := stack.pop()) is not None:
                yield done[0], done[1]
            continue
        attributes = entry.attributes
        if entry.tag == "DW_TAG_member" and stack and stack[-1] is not None:
            where = attributes.get("DW_AT_data_member_location")
            if where is not None:
                stack[-1][2][_name(entry)] = int(where.value)
        if entry.has_children:
            members: dict[str, int] = {}
            is_struct = entry.tag == "DW_TAG_structure_type" and "DW_AT_byte_size" in attributes
            size = int(attributes["DW_AT_byte_size"].value) if is_struct else 0
            stack.append((_name(entry), StructLayout(size, members), members) if is_struct else None)


def _name(entry: Any) -> str:
    attribute = entry.attributes.get("DW_AT_name")
    return attribute.value.decode("latin-1") if attribute is not None else ""
