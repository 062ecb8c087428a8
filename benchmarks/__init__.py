"""What guarding a call costs: resilient, code written by hand, and the other libraries, side by side.

Run `python -m benchmarks`; `python -m benchmarks --help` says more. Nothing here is part of the installed package.
"""
