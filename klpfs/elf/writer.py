"""Write a synthetic module: a relocatable ELF64 file for x86-64 that module tools take for a real one.

The file holds what kbuild would put there: ``.modinfo``, ``.gnu.linkonce.this_module``, ``__param``, a symbol for each
function with an ftrace call site, and for a livepatch the whole ``struct klp_patch`` with its relocations, so that what
examines real modules examines these too. The functions' bodies only return; what they do stands in the section
``.klpfs.spec``, as the normalised spec. Symbol versions (``__versions``) are left out: the release in vermagic
counts.

Sources: scripts/mod/modpost.c (``add_header``, ``add_depends``, ``add_srcversion``), include/linux/moduleparam.h,
Documentation/livepatch/module-elf-format.rst.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass, field

from klpfs.elf import layouts as C
from klpfs.spec import Function, ModuleSpec, Param, errno_value, lines

_ENDBR64 = b"\xf3\x0f\x1e\xfa"
_CALL = b"\xe8\0\0\0\0"
_INTEGER_SIZES = {
    "bool": 1, "invbool": 1, "byte": 1, "short": 2, "ushort": 2, "int": 4, "uint": 4, "hexint": 4,
    "long": 8, "ulong": 8, "ullong": 8, "charp": 8,
}  # fmt: skip


@dataclass
class _Section:
    name: str
    type: int = C.SHT_PROGBITS
    flags: int = 0
    align: int = 1
    entsize: int = 0
    data: bytearray = field(default_factory=bytearray)
    #: (offset, type, symbol, addend); a symbol is a key of the symbol table
    relocs: list[tuple[int, int, str, int]] = field(default_factory=list)
    link: str = ""
    info: int | str = 0

    def place(self, data: bytes, align: int = 8) -> int:
        """Append data, aligned; returns its offset."""
        self.data += bytes(-len(self.data) % align)
        offset = len(self.data)
        self.data += data
        return offset

    def pointer(self, offset: int, symbol: str, addend: int = 0) -> None:
        """Have eight bytes at an offset relocated to an address."""
        self.relocs.append((offset, C.R_X86_64_64, symbol, addend))


@dataclass
class _Symbol:
    key: str
    name: str
    section: str | int
    value: int = 0
    size: int = 0
    bind: int = C.STB_LOCAL
    type: int = C.STT_NOTYPE


def write_module(spec: ModuleSpec, *, release: str = "", flags: str = "") -> bytes:
    """The bytes of a module file for a spec.

    ``release`` and ``flags`` are the parts of vermagic, unless the spec itself says (default: Debian's 6.12).
    """
    return _Writer(spec, _vermagic(spec, release, flags)).build()


def _vermagic(spec: ModuleSpec, release: str = "", flags: str = "") -> str:
    release = spec.release or release or C.DEFAULT_RELEASE
    return spec.vermagic or f"{release} {flags.strip() or C.VERMAGIC_FLAGS} "


def modinfo_of(spec: ModuleSpec, vermagic: str = "") -> list[tuple[str, str]]:
    """The .modinfo entries of a spec, in kbuild's order."""
    info: list[tuple[str, str]] = []
    if spec.description:
        info.append(("description", spec.description))
    info += [("author", author) for author in lines(spec.author)]
    if spec.version:
        info.append(("version", spec.version))
    if spec.is_livepatch:
        info.append(("livepatch", "Y"))
    info.append(("license", spec.license))
    for param in spec.params:
        info.append(("parm", f"{param.name}:{param.description}"))
        info.append(("parmtype", f"{param.name}:{'array of ' if _is_array(param) else ''}{param.type}"))
    if spec.version:
        info.append(("srcversion", hashlib.sha1(spec.to_json(), usedforsecurity=False).hexdigest().upper()[:23]))
    info.append(("depends", ",".join(spec.depends)))
    if spec.intree:
        info.append(("intree", "Y"))
    info.append(("name", spec.name))
    info.append(("retpoline", "Y"))
    info.append(("vermagic", vermagic or _vermagic(spec)))
    info = [(k, spec.modinfo.get(k, v)) for k, v in info if k not in spec.omit_modinfo]
    present = {k for k, _ in info}
    return info + [(k, v) for k, v in spec.modinfo.items() if k not in present and k not in spec.omit_modinfo]


def _is_array(param: Param) -> bool:
    return param.max > 0 and param.type != "string"


class _Writer:
    def __init__(self, spec: ModuleSpec, vermagic: str) -> None:
        self.spec = spec
        self.vermagic = vermagic
        self.sections: dict[str, _Section] = {}
        self.locals: dict[str, _Symbol] = {}
        self.globals: dict[str, _Symbol] = {}
        self.strings: dict[str, int] = {}
        self.text = self.section(".text", flags=C.SHF_ALLOC | C.SHF_EXECINSTR, align=16)
        self.mcount = self.section("__mcount_loc", flags=C.SHF_ALLOC, align=8)
        self.rodata = self.section(".rodata", flags=C.SHF_ALLOC, align=8)
        self.modinfo = self.section(".modinfo", flags=C.SHF_ALLOC)
        self.note = self.section(".note.gnu.build-id", type=C.SHT_NOTE, flags=C.SHF_ALLOC, align=4)
        self.data = self.section(".data", flags=C.SHF_ALLOC | C.SHF_WRITE, align=32)

    def section(self, name: str, **fields: int) -> _Section:
        """Make a section, or give the one of that name."""
        if name not in self.sections:
            self.sections[name] = _Section(name, **fields)  # type: ignore[arg-type]  # only integers are passed
        return self.sections[name]

    def build(self) -> bytes:
        spec = self.spec
        for entry in modinfo_of(spec, self.vermagic):
            self.modinfo.data += "=".join(entry).encode() + b"\0"
        normalised = spec.to_json()
        digest = hashlib.sha1(normalised, usedforsecurity=False).digest()
        self.note.data += struct.pack("<III", 4, len(digest), 3) + b"GNU\0" + digest
        for function in spec.functions:
            self.add_function(function)
        patch = self.add_patch() if spec.is_livepatch else None
        self.add_this_module(patch)
        for param in spec.params:
            self.add_param(param)
        for name in spec.requires:
            self.undefined(name)
        self.section(C.SPEC_SECTION).data += normalised
        return self.serialise()

    # -- contents ---------------------------------------------------------------------------------------------------

    def string(self, text: str) -> int:
        """Offset of a NUL-terminated string in .rodata."""
        if text not in self.strings:
            self.strings[text] = self.rodata.place(text.encode() + b"\0", 1)
        return self.strings[text]

    def undefined(self, name: str) -> str:
        """Key of a symbol that the kernel or another module has to supply."""
        if name not in self.globals:
            self.globals[name] = _Symbol(name, name, C.SHN_UNDEF, bind=C.STB_GLOBAL)
        return name

    def code(self, name: str, body: bytes, *, traced: bool = True) -> int:
        """Place a function and its local symbol; returns the offset of the body's first byte in .text."""
        start = self.text.place(_ENDBR64, 16)
        if traced:
            site = self.text.place(_CALL, 1)
            self.text.relocs.append((site + 1, C.R_X86_64_PLT32, self.undefined("__fentry__"), -4))
            self.mcount.pointer(self.mcount.place(bytes(8)), ".text", site)
        offset = self.text.place(body, 1)
        key = f"{name}@{start}"
        self.locals[key] = _Symbol(key, name, ".text", start, len(self.text.data) - start, type=C.STT_FUNC)
        self.text.data += b"\xcc" * (-len(self.text.data) % 16)
        self.last_start = start
        return offset

    def returning(self, value: int | str) -> bytes:
        """Machine code that returns a constant; a parameter's value is not known here, 0 stands for it."""
        number = value if isinstance(value, int) else errno_value(value) or 0
        return b"\xb8" + struct.pack("<I", number & 0xFFFFFFFF) + b"\xc3"

    def add_function(self, function: Function) -> None:
        self.code(function.name, self.returning(function.ret), traced=not function.notrace)
        if function.export == "no":
            return
        key = f"{function.name}@{self.last_start}"
        symbol = self.locals.pop(key)
        symbol.key, symbol.bind = function.name, C.STB_GLOBAL
        self.globals[function.name] = symbol
        suffix = "_gpl" if function.export == "gpl" else ""
        strings = self.section("__ksymtab_strings", flags=C.SHF_ALLOC)
        if not strings.data:
            strings.data += b"\0"  # the empty namespace
        name = strings.place(function.name.encode() + b"\0", 1)
        table = self.section("__ksymtab" + suffix, flags=C.SHF_ALLOC, align=4)
        row = table.place(bytes(C.KSYMTAB_SIZE), 4)
        table.relocs += [
            (row, C.R_X86_64_PC32, function.name, 0),
            (row + 4, C.R_X86_64_PC32, "__ksymtab_strings", name),
            (row + 8, C.R_X86_64_PC32, "__ksymtab_strings", 0),
        ]
        crcs = self.section("__kcrctab" + suffix, flags=C.SHF_ALLOC, align=4)
        crcs.place(struct.pack("<I", zlib.crc32(function.name.encode())), 4)

    def add_patch(self) -> int:
        """Write struct klp_patch and all below it into .data; returns its offset."""
        spec, data = self.spec, self.data
        sizes = {name: layout.size for name, layout in C.KLP_LAYOUT.items()}
        patch = self.local_object("patch", bytes(sizes["klp_patch"]))
        data.pointer(patch, "__this_module")
        if spec.replace is True:
            data.data[patch + C.KLP_LAYOUT["klp_patch"].members["replace"]] = 1
        objs = self.local_object("objs", bytes(sizes["klp_object"] * (len(spec.objects) + 1)))
        data.pointer(patch + 8, ".data", objs)
        for i, obj in enumerate(spec.objects):
            row = objs + i * sizes["klp_object"]
            if not obj.is_vmlinux:
                data.pointer(row, ".rodata", self.string(obj.name))
            funcs = self.local_object(f"{obj.name}_funcs", bytes(sizes["klp_func"] * (len(obj.functions) + 1)))
            data.pointer(row + 8, ".data", funcs)
            for j, repl in enumerate(obj.functions):
                func = funcs + j * sizes["klp_func"]
                self.code(repl.symbol, self.returning(repl.ret))
                data.pointer(func, ".rodata", self.string(repl.old_name))
                data.pointer(func + 8, ".text", self.last_start)
                struct.pack_into("<Q", data.data, func + 16, repl.sympos)
            members = C.KLP_LAYOUT["klp_callbacks"].members
            for name, action in obj.callbacks.items():
                self.code(f"{name}_{obj.name}", self.returning(action.ret))
                data.pointer(row + 16 + members[name], ".text", self.last_start)
            if obj.uses:
                self.add_klp_relocs(obj.name, obj.uses)
        if spec.states:
            rows = b"".join(struct.pack("<QIxxxxQ", state.id, state.version, 0) for state in spec.states)
            states = self.local_object("states", rows + bytes(sizes["klp_state"]))
            data.pointer(patch + 16, ".data", states)
        return patch

    def local_object(self, name: str, contents: bytes) -> int:
        """Place a variable and its local symbol in .data; returns its offset."""
        offset = self.data.place(contents, 32)
        key = f"{name}@data{offset}"
        self.locals[key] = _Symbol(key, name, ".data", offset, len(contents), type=C.STT_OBJECT)
        return offset

    def add_klp_relocs(self, objname: str, uses: list[str]) -> None:
        """A table of addresses that livepatch fills in: .klp.rela.<object>..data and its .klp.sym symbols."""
        table = self.local_object(f"{objname}_refs", bytes(8 * len(uses)))
        rela = self.section(
            f".klp.rela.{objname}..data",
            type=C.SHT_RELA,
            flags=C.SHF_ALLOC | C.SHF_INFO_LINK | C.SHF_RELA_LIVEPATCH,
            align=8,
            entsize=C.RELA_SIZE,
        )
        rela.link, rela.info = ".symtab", ".data"
        for i, use in enumerate(uses):
            name = f".klp.sym.{objname}.{use if ',' in use else use + ',0'}"
            self.globals.setdefault(name, _Symbol(name, name, C.SHN_LIVEPATCH, bind=C.STB_GLOBAL))
            rela.pointer(table + 8 * i, name)

    def add_this_module(self, patch: int | None) -> None:
        spec = self.spec
        this = self.section(".gnu.linkonce.this_module", flags=C.SHF_ALLOC | C.SHF_WRITE, align=64)
        this.data += bytes(C.MODULE_SIZE)
        name = spec.name.encode()
        this.data[C.MODULE_NAME_OFFSET : C.MODULE_NAME_OFFSET + len(name)] = name
        self.globals["__this_module"] = _Symbol(
            "__this_module", "__this_module", this.name, 0, C.MODULE_SIZE, C.STB_GLOBAL, C.STT_OBJECT
        )
        if patch is None:
            self.code(f"{spec.name}_init", self.returning(spec.init.ret))
        else:  # lea patch(%rip),%rdi; jmp klp_enable_patch
            body = self.code(f"{spec.name}_init", b"\x48\x8d\x3d\0\0\0\0\xe9\0\0\0\0")
            enable = self.undefined("klp_enable_patch")
            self.text.relocs += [
                (body + 3, C.R_X86_64_PC32, ".data", patch - 4),
                (body + 8, C.R_X86_64_PLT32, enable, -4),
            ]
        self.alias("init_module")
        this.pointer(C.MODULE_INIT_OFFSET, "init_module")
        self.code(f"{spec.name}_exit", b"\xc3")
        self.alias("cleanup_module")
        this.pointer(C.MODULE_EXIT_OFFSET, "cleanup_module")

    def alias(self, name: str) -> None:
        """A global name for the function placed last, as module_init() makes one."""
        last = next(reversed(self.locals.values()))
        self.globals[name] = _Symbol(name, name, ".text", last.value, last.size, C.STB_GLOBAL, C.STT_FUNC)

    def add_param(self, param: Param) -> None:
        """struct kernel_param, what it points to, and the variable."""
        table = self.section("__param", flags=C.SHF_ALLOC, align=8)
        row = table.place(bytes(C.PARAM_SIZE))
        key = f"__param_{param.name}"
        self.locals[key] = _Symbol(key, key, "__param", row, C.PARAM_SIZE, type=C.STT_OBJECT)
        ops = f"param_ops_{param.type}"
        table.pointer(row + C.PARAM_NAME, ".rodata", self.string(param.name))
        table.pointer(row + C.PARAM_MOD, "__this_module")
        struct.pack_into("<HbB", table.data, row + C.PARAM_PERM, param.mode, -1, 0)
        argument, where = self.variable(param), ".data"
        if param.type == "string":  # struct kparam_string: maxlen, string
            holder = self.rodata.place(struct.pack("<IxxxxQ", param.max, 0))
            self.rodata.pointer(holder + 8, ".data", argument)
            argument, where = holder, ".rodata"
        elif _is_array(param):  # struct kparam_array: max, elemsize, num, ops, elem
            holder = self.rodata.place(struct.pack("<IIQQQ", param.max, _INTEGER_SIZES[param.type], 0, 0, 0))
            given = len(param.default) if isinstance(param.default, list) else 0
            count = self.data.place(struct.pack("<I", given), 4)
            self.rodata.pointer(holder + 8, ".data", count)
            self.rodata.pointer(holder + 16, self.undefined(ops))
            self.rodata.pointer(holder + 24, ".data", argument)
            argument, where, ops = holder, ".rodata", "param_array_ops"
        table.pointer(row + C.PARAM_OPS, self.undefined(ops))
        table.pointer(row + C.PARAM_ARG, where, argument)

    def variable(self, param: Param) -> int:
        """The parameter's variable with its default, in .data."""
        if param.type == "string":
            return self.local_object(param.name, param.default_text.encode().ljust(param.max, b"\0"))
        size = _INTEGER_SIZES[param.type]
        values = param.default if isinstance(param.default, list) else [param.default]
        mask = (1 << 8 * size) - 1
        numbers = [int(v) & mask if isinstance(v, int) else 0 for v in values]
        contents = b"".join(n.to_bytes(size, "little") for n in numbers).ljust(size * max(param.max, 1), b"\0")
        offset = self.local_object(param.name, contents)
        if param.type == "charp" and param.default_text and not _is_array(param):
            self.data.pointer(offset, ".rodata", self.string(param.default_text))
        return offset

    # -- the file ---------------------------------------------------------------------------------------------------

    def serialise(self) -> bytes:
        ordered = self.order_sections()
        index = {section.name: i + 1 for i, section in enumerate(ordered)}
        symbols, first_global = self.order_symbols(ordered)
        number = {symbol.key: i + 1 for i, symbol in enumerate(symbols)}
        names = bytearray(b"\0")
        table = bytearray(C.SYMBOL_SIZE)
        for symbol in symbols:
            at = 0
            if symbol.name:
                at = len(names)
                names += symbol.name.encode() + b"\0"
            shndx = index[symbol.section] if isinstance(symbol.section, str) else symbol.section
            info = symbol.bind << 4 | symbol.type
            table += struct.pack("<IBBHQQ", at, info, 0, shndx, symbol.value, symbol.size)
        self.sections[".symtab"].data = table
        self.sections[".symtab"].info = first_global + 1
        self.sections[".strtab"].data = names
        for section in ordered:
            source = section if section.type == C.SHT_RELA and section.relocs else None
            if section.type == C.SHT_RELA and source is None:
                source = self.sections[str(section.info)]
            if source is not None:
                section.data = bytearray().join(
                    struct.pack("<QQq", offset, number[symbol] << 32 | kind, addend)
                    for offset, kind, symbol, addend in source.relocs
                )
        return self.assemble(ordered, index)

    def order_sections(self) -> list[_Section]:
        """All sections in the order of the file, each followed by its relocations."""
        ordered: list[_Section] = []
        for section in list(self.sections.values()):
            if not section.data and section.type != C.SHT_RELA and section.name not in (".text", ".data"):
                del self.sections[section.name]
                continue
            ordered.append(section)
            if section.relocs and section.type != C.SHT_RELA:
                rela = _Section(".rela" + section.name, C.SHT_RELA, C.SHF_INFO_LINK, 8, C.RELA_SIZE)
                rela.link, rela.info = ".symtab", section.name
                self.sections[rela.name] = rela
                ordered.append(rela)
        for name, kind, align in (
            (".symtab", C.SHT_SYMTAB, 8),
            (".strtab", C.SHT_STRTAB, 1),
            (".shstrtab", C.SHT_STRTAB, 1),
        ):
            self.sections[name] = _Section(name, kind, 0, align)
            ordered.append(self.sections[name])
        self.sections[".symtab"].entsize, self.sections[".symtab"].link = C.SYMBOL_SIZE, ".strtab"
        return ordered

    def order_symbols(self, ordered: list[_Section]) -> tuple[list[_Symbol], int]:
        """All symbols, local ones first, and the number of those."""
        targets = {symbol for section in ordered for _, _, symbol, _ in section.relocs}
        local = [
            _Symbol(section.name, "", section.name, type=C.STT_SECTION)
            for section in ordered
            if section.name in targets
        ]
        local.append(_Symbol("@file", f"{self.spec.name}.toml", C.SHN_ABS, type=C.STT_FILE))
        local += self.locals.values()
        return local + list(self.globals.values()), len(local)

    def assemble(self, ordered: list[_Section], index: dict[str, int]) -> bytes:
        names = bytearray(b"\0")
        name_at = {}
        for section in ordered:
            name_at[section.name] = len(names)
            names += section.name.encode() + b"\0"
        self.sections[".shstrtab"].data = names
        out = bytearray(C.ELF_HEADER_SIZE)
        headers = bytearray(C.SECTION_HEADER_SIZE)
        for section in ordered:
            out += bytes(-len(out) % section.align)
            info = index[section.info] if isinstance(section.info, str) else section.info
            headers += struct.pack(
                "<IIQQQQIIQQ",
                name_at[section.name], section.type, section.flags, 0, len(out), len(section.data),
                index[section.link] if section.link else 0, info, section.align, section.entsize,
            )  # fmt: skip
            out += section.data
        out += bytes(-len(out) % 8)
        ident = b"\x7fELF" + bytes((2, 1, 1, 0)) + bytes(8)
        out[: C.ELF_HEADER_SIZE] = struct.pack(
            "<16sHHIQQQIHHHHHH",
            ident, 1, 62, 1, 0, 0, len(out), 0, 64, 0, 0, 64, len(ordered) + 1, index[".shstrtab"],
        )  # fmt: skip
        return bytes(out + headers)
