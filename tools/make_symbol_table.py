#!/usr/bin/env python3
"""Make the symbol table that klpfs ships for a kernel, out of that kernel's image.

    tools/make_symbol_table.py VMLINUZ OUTPUT [--symvers Module.symvers]

Debian's image comes from ``apt-get download linux-image-6.12.<N>+deb12-amd64-unsigned`` and ``dpkg -x``. With
``--symvers`` (from the linux-headers package) the exports of the image are compared with that list. The table is read
back and compared with the image before the tool ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from klpfs.elf.symbols import ListTable, ShippedTable, write_table
from klpfs.elf.vmlinux import KernelImage


def check_symvers(image: KernelImage, path: Path) -> list[str]:
    """Differences between the image's exports and Module.symvers."""
    listed = {}
    for line in path.read_text().splitlines():
        crc, name, module, kind, *_ = line.split("\t")
        if module == "vmlinux":
            listed[name] = (int(crc, 16), kind.startswith("EXPORT_SYMBOL_GPL"))
    found = {export.name: (export.crc, export.gpl) for export in image.exports}
    return sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))


def check_table(image: KernelImage, path: Path) -> list[str]:
    """What the table answers otherwise than the image."""
    shipped, direct = ShippedTable(path), ListTable.from_image(image)
    wrong = []
    if sorted(shipped) != sorted(direct):
        wrong.append("the lists of symbols differ")
    for name in sorted({symbol.name for symbol in image.symbols}):
        expected = direct.lookup(name)
        if shipped.lookup(name) != expected or shipped.exported(name) != direct.exported(name):
            wrong.append(name)
        for entry in expected:
            if entry.type in "tT" and shipped.has_ftrace(entry.address) != direct.has_ftrace(entry.address):
                wrong.append(f"{name} (ftrace)")
    return wrong


def main() -> int:
    """Command line; 0 when the table was made and answers as the image does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--symvers", type=Path)
    args = parser.parse_args()
    image = KernelImage.load(args.image)
    wrong = check_symvers(image, args.symvers) if args.symvers else []
    write_table(args.output, image.symbols, image.exports, image.ftrace_sites, image.release)
    wrong += check_table(image, args.output)
    for line in wrong[:20]:
        print(f"differs: {line}", file=sys.stderr)
    print(
        f"{args.output}: {image.release}, {len(image.symbols)} symbols, {len(image.exports)} exports, "
        f"{len(image.ftrace_sites)} ftrace sites, {args.output.stat().st_size} bytes, {len(wrong)} differences"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
