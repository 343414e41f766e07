"""Devices of module code: character devices, the classes that they belong to, and their nodes in /dev.

Model
    A module registers a range of numbers, then operations for numbers in it (a cdev), and creates devices; a device
    with a number gets a node ``dev/<name>``, as devtmpfs does it. Whoever opens the node reaches the cdev that covers
    the number then: ENXIO without one. A ``struct device`` has a kobject at its beginning, so attributes work on it.

    The node is a file, not a device; in a world, /dev has a link to it. Everything but open, read, write and release
    stays with FUSE, so there is no ioctl, no mmap and no poll. The file is opened in the module anew for each read or
    write.

Locks
    None of its own.

Source
    fs/char_dev.c, drivers/char/misc.c, drivers/base/{core,class,devtmpfs}.c.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klpfs.cpu import layout as L
from klpfs.kernel.kobject import Kobject, KobjType
from klpfs.kernfs import Attribute, KernfsNode

if TYPE_CHECKING:
    from klpfs.cpu.files import Files
    from klpfs.cpu.host import Cpu, HostThread

__all__ = ["Devices"]

MINOR_BITS, MINOR_MASK = 20, (1 << 20) - 1
MISC_MAJOR, MISC_DYNAMIC_MINOR = 10, 255
_DYNAMIC_MAJORS = (*range(254, 233, -1), *range(511, 383, -1))
"""Majors that alloc_chrdev_region() tries, in order (``find_dynamic_major``)."""
_TAKEN_MAJORS = {247, 248, 249, 250, 251, 252, 253, 254}
"""Dynamic ones that the drivers built into Debian's kernel hold before any module comes."""


@dataclass(eq=False)
class _Region:
    major: int
    minor: int
    count: int
    name: str


@dataclass(eq=False)
class _Cdev:
    addr: int
    fops: int
    dev: int
    count: int
    private: int = 0
    """What ``file->private_data`` is at open (a miscdevice is found this way)."""


@dataclass(eq=False)
class _Device:
    addr: int
    cls: int
    dev: int
    name: str
    nodes: list[KernfsNode]
    kobj: Kobject
    names: list[int]
    link: KernfsNode | None = None


class Devices:
    """All devices of one engine, and the events about them."""

    def __init__(self, cpu: Cpu, files: Files) -> None:
        self.cpu = cpu
        self.files = files
        self.machine = cpu.machine
        self._regions: list[_Region] = []
        self._cdevs: list[_Cdev] = []
        self._devices: list[_Device] = []
        self._classes: dict[int, str] = {}
        self._misc: dict[int, _Cdev] = {}
        self._misc_class = 0
        self._taken_minors: set[int] = set()

    def take_over(self, before: Devices) -> None:
        """The numbers that the modules of a dead engine hold stay taken."""
        self._regions = list(before._regions)
        self._taken_minors = before._taken_minors | {cdev.dev & MINOR_MASK for cdev in before._misc.values()}

    # -- numbers ----------------------------------------------------------------------------------------------------

    async def on_chrdev_region(self, thread: HostThread, major: int, minor: int, count: int, name: bytes) -> int:
        """``__register_chrdev_region``: the major. Raises OSError: EINVAL out of range, EBUSY taken."""
        text = name.decode("utf-8", "replace")
        log = self.machine.printk.logger("")
        if major > 511:
            log.err(f'CHRDEV "{text}" major requested ({major}) is greater than the maximum (511)')
            raise OSError(errno.EINVAL, "major")
        if count > MINOR_MASK + 1 - minor:
            log.err(
                f'CHRDEV "{text}" minor range requested ({minor}-{minor + count - 1}) is out of range of maximum range '
                f"(0-{MINOR_MASK}) for a single major"
            )
            raise OSError(errno.EINVAL, "minor")
        if not major:
            taken = _TAKEN_MAJORS | {region.major for region in self._regions}
            major = next((number for number in _DYNAMIC_MAJORS if number not in taken), 0)
            if not major:
                log.err(f'CHRDEV "{text}" dynamic allocation region is full')
                raise OSError(errno.EBUSY, "no major left")
        for region in self._regions:
            if region.major == major and region.minor < minor + count and minor < region.minor + region.count:
                raise OSError(errno.EBUSY, region.name)
        self._regions.append(_Region(major, minor, count, text[:63]))
        return major

    async def on_chrdev_region_free(self, thread: HostThread, major: int, minor: int) -> int:
        """``unregister_chrdev_region``."""
        self._regions = [r for r in self._regions if (r.major, r.minor) != (major, minor)]
        return 0

    async def on_cdev_add(self, thread: HostThread, addr: int, fops: int, dev: int, count: int) -> int:
        """``cdev_add``: operations for *count* numbers from *dev* on."""
        self._cdevs.append(_Cdev(addr, fops, dev, count))
        return 0

    async def on_cdev_del(self, thread: HostThread, addr: int) -> int:
        """``cdev_del``."""
        self._cdevs = [c for c in self._cdevs if c.addr != addr]
        return 0

    async def on_cdev_del_at(self, thread: HostThread, dev: int) -> int:
        """``__unregister_chrdev``: the cdev that ``__register_chrdev`` made."""
        self._cdevs = [c for c in self._cdevs if c.addr or c.dev != dev]
        return 0

    # -- classes and devices ----------------------------------------------------------------------------------------

    async def on_class_add(self, thread: HostThread, addr: int, name: bytes) -> int:
        """``class_register``. Raises OSError(EEXIST)."""
        text = name.decode("utf-8", "replace")
        if text in self._classes.values():
            self.files.warn_duplicate(self.machine.kernfs.make_path("sys/class"), text)
            raise OSError(errno.EEXIST, text)
        self._classes[addr] = text
        self.machine.kernfs.make_path(f"sys/class/{text}")
        return 0

    async def on_class_del(self, thread: HostThread, addr: int) -> int:
        """``class_unregister``."""
        name = self._classes.pop(addr, None)
        node = self.machine.kernfs.lookup(f"sys/class/{name}") if name is not None else None
        if node is not None:
            await self.machine.kernfs.remove(node)
        return 0

    def _find(self, dev: int) -> _Cdev | None:
        return next((c for c in self._cdevs if c.dev <= dev < c.dev + c.count), None)

    def _make_nodes(self, dev: int, name: str, mode: int) -> list[KernfsNode]:
        """The node in /dev, and the one where a world finds it; ``!`` in a name stands for a slash."""
        made, fs, alias = [], self.machine.kernfs, self.machine.dev_alias
        for root in filter(None, ("dev", alias)):
            where, _, last = f"{root}/{name.replace('!', '/')}".rpartition("/")
            directory = fs.make_path(where)
            if directory.get(last) is None:
                made.append(fs.create_file(directory, last, self.files.device(lambda: self._open(dev)), mode))
        return made

    async def _announce(self, device: _Device) -> None:
        """Let the node be seen where programs look for it."""
        machine, name = self.machine, device.name.replace("!", "/")
        if not device.nodes or machine.dev_node is None:
            return
        where, why = f"/{machine.dev_alias}/{name}", await machine.dev_node(name, True)
        text = f"/dev/{name} is a link to a file here, without ioctl" if not why else f"/dev/{name} is {where} ({why})"
        machine.printk.logger("klpfs: ").info(text)

    def _open(self, dev: int) -> tuple[int, int, int, int]:
        """Operations, number, cdev and private data of the device *dev*. Raises OSError(ENXIO)."""
        cdev = self._find(dev)
        if cdev is None:
            raise OSError(errno.ENXIO, f"no driver for {dev >> MINOR_BITS}:{dev & MINOR_MASK}")
        return cdev.fops, dev, cdev.addr if not cdev.private else 0, cdev.private

    def _add(self, cls: int, dev: int, data: int, name: str, mode: int) -> _Device:
        cpu, heap, space = self.cpu, self.cpu.heap, self.cpu.space
        class_name = self._classes[cls]
        fs = self.machine.kernfs
        directory = fs.make_path(f"sys/devices/virtual/{class_name}")
        kobj = Kobject(fs, KobjType())
        try:
            kobj.add(directory, name)
        except OSError:
            self.files.warn_duplicate(directory, name)
            raise
        addr, text = heap.alloc(L.DEVICE_SIZE), heap.alloc(len(name) + 1, name.encode("utf-8", "replace"))
        space.put(addr, L.KOBJECT_NAME, text)
        space.put(addr, L.KOBJECT_REF, 1)
        space.put(addr, L.DEVICE_CLASS, cls)
        space.put(addr, L.DEVICE_DEVT, dev)
        space.put(addr, L.DEVICE_DRIVER_DATA, data)
        device = _Device(addr, cls, dev, name, [], kobj, [text])
        if kobj.node is not None and dev:
            numbers = b"%d:%d\n" % (dev >> MINOR_BITS, dev & MINOR_MASK)
            fs.create_file(kobj.node, "dev", Attribute(lambda: numbers), 0o444)
            device.nodes = self._make_nodes(dev, name, mode)
        where = fs.make_path(f"sys/class/{class_name}")
        if where.get(name) is None:
            device.link = fs.create_link(where, name, f"../../devices/virtual/{class_name}/{name}")
        self.files.adopt(addr, kobj)
        self._devices.append(device)
        assert cpu.alive
        return device

    async def _remove(self, device: _Device) -> None:
        self._devices.remove(device)
        self.files.disown(device.addr)
        if device.nodes and self.machine.dev_node is not None:
            await self.machine.dev_node(device.name.replace("!", "/"), False)
        for node in (*device.nodes, device.link):
            if node is not None:
                await self.machine.kernfs.remove(node)
        await device.kobj.put()
        for addr in (device.addr, *device.names):
            self.cpu.heap.free(addr)

    async def _groups(self, thread: HostThread, addr: int, groups: list[Any]) -> None:
        for name, attrs in groups:
            await self.files.on_sysfs_create(thread, addr, name, attrs)

    async def on_device_create(
        self, thread: HostThread, cls: int, dev: int, data: int, name: bytes, groups: list[Any]
    ) -> int:
        """``device_create``: the address of the device. Raises OSError(ENODEV) without a class, EEXIST."""
        if cls not in self._classes:
            raise OSError(errno.ENODEV, "no such class")
        device = self._add(cls, dev, data, name.decode("utf-8", "replace"), 0o600)
        await self._announce(device)
        await self._groups(thread, device.addr, groups)
        return device.addr

    async def on_device_destroy(self, thread: HostThread, cls: int, dev: int) -> int:
        """``device_destroy``."""
        for device in self._devices:
            if (device.cls, device.dev) == (cls, dev):
                await self._remove(device)
                break
        return 0

    # -- misc devices -----------------------------------------------------------------------------------------------

    def _class_of_misc(self) -> int:
        if not self._misc_class:
            heap, space = self.cpu.heap, self.cpu.space
            self._misc_class = heap.alloc(L.CLASS_SIZE)
            space.store(self._misc_class, heap.alloc(5, b"misc"))
            self._classes[self._misc_class] = "misc"
        return self._misc_class

    async def on_misc_register(
        self, thread: HostThread, addr: int, name: bytes, minor: int, fops: int, mode: int, groups: list[Any]
    ) -> list[int]:
        """``misc_register``: minor and device. Raises OSError: EBUSY for a minor that is taken, EEXIST for a name."""
        taken = self._taken_minors | {cdev.dev & MINOR_MASK for cdev in self._misc.values()}
        if minor == MISC_DYNAMIC_MINOR:
            minor = next(n for n in range(MISC_DYNAMIC_MINOR + 1, MINOR_MASK + 1) if n not in taken)
        elif minor in taken:
            raise OSError(errno.EBUSY, f"minor {minor}")
        dev = MISC_MAJOR << MINOR_BITS | minor
        device = self._add(self._class_of_misc(), dev, addr, name.decode("utf-8", "replace"), mode or 0o600)
        await self._announce(device)
        await self._groups(thread, device.addr, groups)
        self._misc[addr] = cdev = _Cdev(0, fops, dev, 1, private=addr)
        self._cdevs.insert(0, cdev)
        return [minor, device.addr]

    async def on_misc_deregister(self, thread: HostThread, addr: int) -> int:
        """``misc_deregister``: whether the minor was a dynamic one; -1 if it is not registered."""
        cdev = self._misc.pop(addr, None)
        if cdev is None:
            return -1
        self._cdevs.remove(cdev)
        await self.on_device_destroy(thread, self._misc_class, cdev.dev)
        return cdev.dev & MINOR_MASK > MISC_DYNAMIC_MINOR
