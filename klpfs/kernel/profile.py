"""Kernel versions as data: which attributes, rules and messages exist.

Model
    ``data/profiles.toml`` lists rules with the versions they hold for and the commits behind them, and named
    profiles. The core asks ``profile.has("rule")`` and never compares versions.

Source
    The commits named in ``data/profiles.toml``; Documentation/ABI/testing/sysfs-kernel-livepatch.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import msgspec

__all__ = ["DEFAULT_PROFILE", "LINUX_PROC_BANNER", "Profile", "Rule", "profile", "profile_names", "rules"]

DEFAULT_PROFILE = "6.12"

LINUX_PROC_BANNER = "%s version %s (klpfs) %s\n"
"""``linux_proc_banner`` (init/version.c): what /proc/version prints system, release and version with."""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule, the versions it holds for (``since`` <= version < ``until``) and the commits behind it."""

    since: str
    commit: str
    until: str | None = None
    until_commit: str | None = None


class _Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: str
    release: str
    kernel_version: str
    vermagic: str
    module_compression: str = ""
    add: list[str] = []


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rule: dict[str, Rule]
    profile: dict[str, _Profile]


@dataclass(frozen=True, slots=True)
class Profile:
    """One kernel to be: *release* as ``uname -r`` gives it, *kernel_version* as ``uname -v`` does, *vermagic* without
    the release, the names of the *rules* that hold, and what the kernel unpacks modules from (empty: it does not)."""

    name: str
    release: str
    kernel_version: str
    vermagic_flags: str
    rules: frozenset[str]
    module_compression: str = ""

    @property
    def linux_banner(self) -> str:
        """What /proc/version says, and the first line of the log, newline included."""
        return LINUX_PROC_BANNER % ("Linux", self.release, self.kernel_version)

    def has(self, rule: str) -> bool:
        """Whether *rule* holds. Raises KeyError for a name that is no rule."""
        if rule not in _data().rule:
            raise KeyError(rule)
        return rule in self.rules

    @property
    def vermagic(self) -> str:
        """What a module's ``vermagic`` is compared with (include/linux/vermagic.h); it ends in a space."""
        return f"{self.release} {self.vermagic_flags} "


@cache
def _data() -> _Data:
    text = files("klpfs.kernel").joinpath("data/profiles.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), _Data)


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def rules() -> dict[str, Rule]:
    """All rules by name."""
    return dict(_data().rule)


def profile_names() -> list[str]:
    """The profiles there are, the default first."""
    return sorted(_data().profile, key=lambda name: (name != DEFAULT_PROFILE, name))


def profile(name: str = DEFAULT_PROFILE, *, release: str | None = None) -> Profile:
    """The profile called *name*; *release* replaces its ``uname -r``. Raises ValueError that lists the profiles."""
    raw = _data().profile.get(name)
    if raw is None:
        raise ValueError(f"kernel profile {name!r} is unknown: choose one of {', '.join(profile_names())}")
    version = _key(raw.version)
    holding = {
        rule
        for rule, r in _data().rule.items()
        if _key(r.since) <= version and (r.until is None or version < _key(r.until))
    }
    return Profile(
        name,
        release or raw.release,
        raw.kernel_version,
        raw.vermagic,
        frozenset(holding | set(raw.add)),
        raw.module_compression,
    )
