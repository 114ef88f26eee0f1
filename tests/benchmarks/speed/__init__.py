"""What is measured for docs/speed.md: a module for each part, each with a function `measure(...)` that returns a dict.

`tests/benchmarks/make_page.py` runs the parts, every one in a process of its own, keeps what they found as JSON and
writes the tables of the page from it. One part alone: ``python tests/benchmarks/make_page.py --parts energies``.
"""
