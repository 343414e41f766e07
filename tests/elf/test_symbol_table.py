"""Symbol tables: the one that is shipped, one written here, one in memory, all with the same answers."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest
from image_support import EXPORTS, RELEASE, SYMBOLS, TEXT, vmlinux

from klpfs.elf import symbols
from klpfs.elf.symbols import ListTable, ShippedTable, SymbolTable, given_table, shipped_table, write_table
from klpfs.elf.vmlinux import KernelImage

IMAGE = KernelImage(vmlinux())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> ShippedTable:
    path = tmp_path_factory.mktemp("table") / "test.symbols"
    write_table(path, IMAGE.symbols, IMAGE.exports, IMAGE.ftrace_sites, IMAGE.release)
    return ShippedTable(path)


@pytest.fixture(params=["written", "in memory"])
def table(request: pytest.FixtureRequest, written: ShippedTable) -> SymbolTable:
    return written if request.param == "written" else ListTable.from_image(IMAGE)


def test_lookup(table: SymbolTable) -> None:
    assert table.release == RELEASE
    assert table.lookup("cmdline_proc_show") == [(TEXT + 0x8010, 0x50, "t")]
    assert table.lookup("twice") == [(TEXT + 0x8060, 0x20, "t"), (TEXT + 0x8100, 0x80, "t")]
    assert table.lookup("__pfx_klp_enable_patch") == [(TEXT + 0x8080, 16, "T")]
    assert table.lookup("_printk") == [(TEXT + 0x8180, 0x80, "T")]
    assert table.lookup("alias_of_printk") == [(TEXT + 0x8180, 0x80, "W")]
    assert table.lookup("cpu_tss_rw") == [(0x1000, TEXT - 0x1000, "A")]
    for name in ("", "nothing", "__pfx_twice", "zzz", "~"):
        assert table.lookup(name) == []


def test_all_symbols_are_there(table: SymbolTable) -> None:
    assert sorted(table) == sorted(SYMBOLS)
    assert [address for address, _, _ in table] == [address for address, _, _ in SYMBOLS]


def test_exports(table: SymbolTable) -> None:
    assert table.exported("_printk") == (0x11111111, False)
    assert table.exported("klp_enable_patch") == (0xDEADBEEF, True)
    assert table.exported("fixed_percpu_data") == (7, False)
    assert table.exported("twice") is None
    assert table.exported("nothing") is None
    assert table.export_address("_printk") == TEXT + 0x8180
    assert table.export_address("twice") is None


def test_call_sites(table: SymbolTable) -> None:
    assert table.has_ftrace(TEXT + 0x8010), "a site behind endbr64"
    assert table.has_ftrace(TEXT + 0x8090), "a site at the very start"
    assert not table.has_ftrace(TEXT + 0x8060), "only the second of the two can be traced"
    assert table.has_ftrace(TEXT + 0x8100)
    assert not table.has_ftrace(TEXT + 0x8180)
    assert not table.has_ftrace(TEXT + 0x8011), "no function starts there"
    assert not table.has_ftrace(0)


def test_addresses(table: SymbolTable) -> None:
    assert table.addr_to_symbol(TEXT + 0x8015) == ("cmdline_proc_show", 5, 0x50)
    assert table.addr_to_symbol(TEXT + 0x8180) == ("_printk", 0, 0x80)
    assert table.addr_to_symbol(TEXT) == ("_text", 0, 0x100)
    assert ListTable([(16, "T", "a")]).addr_to_symbol(8) is None


def test_what_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "x.symbols"
    for data in (b"", b"KLPSYM2\n", b"KLPSYM1\n\2\0\0\0{}", b"KLPSYM1\n\2\0\0\0{{"):
        path.write_bytes(data)
        with pytest.raises(OSError, match=r"x\.symbols: ") as info:
            ShippedTable(path)
        assert info.value.errno == errno.ENOEXEC


def test_table_by_source(tmp_path: Path) -> None:
    image = tmp_path / "vmlinux"
    image.write_bytes(vmlinux())
    text = tmp_path / "System.map"
    text.write_text("".join(f"{address:016x} {kind} {name}\n" for address, kind, name in SYMBOLS))
    assert given_table(str(image), None).exported("_printk") == (0x11111111, False)
    assert len(given_table(None, str(text)).lookup("twice")) == 2
    with pytest.raises(ValueError, match="--kernel-image and --kallsyms exclude each other"):
        given_table(str(image), str(text))
    with pytest.raises(ValueError, match=r"^--kallsyms .*nosuch: No such file or directory$"):
        given_table(None, str(tmp_path / "nosuch"))
    assert shipped_table("6.12").lookup("cmdline_proc_show")
    with pytest.raises(FileNotFoundError, match="ships no symbols of kernel 3"):
        shipped_table("3")
    assert shipped_table("3", "6.12").release.startswith("6.12")


# -- what is shipped ---------------------------------------------------------------------------------------------------


def test_shipped_table_knows_the_kernel() -> None:
    shipped = shipped_table("6.12")
    assert shipped.release.startswith("6.12.")
    (entry,) = shipped.lookup("cmdline_proc_show")
    assert entry.type == "t"
    assert entry.size == 48
    assert shipped.has_ftrace(entry.address)
    assert shipped.addr_to_symbol(entry.address + 3) == ("cmdline_proc_show", 3, 48)
    assert len(shipped.lookup("c_start")) == 3
    for name in ("meminfo_proc_show", "__x64_sys_getpid", "version_proc_show"):
        (entry,) = shipped.lookup(name)
        assert shipped.has_ftrace(entry.address), name
    for name in ("do_nmi", "t_show"):
        assert not any(shipped.has_ftrace(entry.address) for entry in shipped.lookup(name)), name
    exported = {
        name: shipped.exported(name) for name in ("klp_enable_patch", "_printk", "seq_printf", "cmdline_proc_show")
    }
    assert {name: found and found[1] for name, found in exported.items()} == {
        "klp_enable_patch": True,
        "_printk": False,
        "seq_printf": False,
        "cmdline_proc_show": None,
    }
    assert all(shipped.exported(name) for name in ("__fentry__", "param_ops_int", "param_array_ops", "module_layout"))


def test_a_few_names_cost_a_few_blocks() -> None:
    gc.collect()
    start = time.perf_counter()
    shipped = shipped_table("6.12")
    for name in ("cmdline_proc_show", "meminfo_proc_show", "nothing_of_this_name"):
        shipped.lookup(name)
    seconds = time.perf_counter() - start
    assert shipped._block.cache_info().misses <= 4
    assert shipped._chunk.cache_info().misses <= 4
    assert "_all" not in vars(shipped)
    assert seconds < 0.5  # 5 ms where nothing else runs


@pytest.mark.parametrize("kernel", ["6.12", "6.1"])
def test_shipped_tables_are_small_and_in_order(kernel: str) -> None:
    shipped = shipped_table(kernel)
    assert shipped.release.startswith(kernel + ".")
    assert Path(shipped.path).stat().st_size < 1 << 20
    addresses = [address for address, _, _ in shipped]
    assert addresses == sorted(addresses)
    assert {"_text", "_stext", "_etext", "_end"} <= {name for _, _, name in shipped}
    assert len(shipped.lookup("cmdline_proc_show")) == 1


def test_generator_makes_and_checks_a_table(tmp_path: Path) -> None:
    image, symvers = tmp_path / "vmlinux", tmp_path / "Module.symvers"
    image.write_bytes(vmlinux())
    listed = [f"{crc:#010x}\t{name}\tvmlinux\tEXPORT_SYMBOL{'_GPL' if gpl else ''}\t\n" for name, gpl, crc in EXPORTS]
    symvers.write_text("".join(listed) + "0x00000001\tof_a_module\tdrivers/x\tEXPORT_SYMBOL\t\n")
    tool = Path(__file__).resolve().parents[2] / "tools" / "make_symbol_table.py"
    command = [sys.executable, str(tool), str(image), str(tmp_path / "t.symbols"), "--symvers", str(symvers)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("0 differences\n")
    assert ShippedTable(tmp_path / "t.symbols").exported("_printk") == (0x11111111, False)
    symvers.write_text("".join(listed[1:]))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "differs: _printk\n"


def test_looking_up_addresses_one_by_one_gives_what_the_whole_table_gives() -> None:
    shipped = shipped_table()
    everything = list(shipped)
    step = len(everything) // 1500
    for i in range(0, len(everything), step):
        for address in (everything[i][0] - 1, everything[i][0], everything[i][0] + 5):
            assert shipped.addr_to_symbol(address) == symbols._addr_to_symbol(everything, address), hex(address)
