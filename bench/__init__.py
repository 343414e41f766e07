"""Benchmarks, run by ``make bench``: ratios to something measured in the same run. No test depends on them."""
