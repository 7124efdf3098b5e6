"""Preflight: every known trap of speculative rollouts is a check, before anything is started.

finding.py      what a check finds, and how one is written
facts.py        all that a check may look at; gather.py reads it
checks/         the checks, by what they are about
gate.py         all of them on one configuration; the gate before a launch
report.py       findings as text and JSON; finished_run.py reads a run's acceptance, memory.py plans its memory
document.py     docs/doctor.md
"""
