"""klpfs: a flight simulator for Linux kernel livepatch."""

__version__ = "0.1.0"
