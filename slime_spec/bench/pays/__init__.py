"""The benchmark of what speculation pays holds the automatic depth against off and fixed depths, by CPU time.

scenarios.py    what is generated: how many sequences at once, how long, with which prompts and seeds
sides.py        engines off, automatic and of fixed depth, in this process; and one repetition on each of them in turn
verdict.py      rows of what the repetitions say, with their bounds
benchmark.py    the benchmark's parts and flags
"""
