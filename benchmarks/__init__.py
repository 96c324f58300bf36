"""Benchmarks: ratios against what a user would pick instead."""

import experiments as experiments  # it says which packages are missing
