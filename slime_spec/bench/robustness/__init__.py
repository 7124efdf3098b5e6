"""The robustness benchmark feeds hostile inputs to everything that reads them: each is accepted or refused in words.

fuzzer.py       the interface of a fuzzer; tries inputs one by one, within a time limit, and counts what became of them
benchmark.py    the benchmark's kinds of inputs and its flags
commands.py, rows.py, ...   one fuzzer per kind of input, with its number of inputs
"""
