"""Preflight checks a run for every known trap of speculative rollouts before anything is started.

finding.py      what a check finds, and how a check is written
facts.py        the facts that a check may look at; gather.py reads them
checks/         the checks, grouped by subject
gate.py         runs all checks on one configuration, and stops a launch at an error
report.py       writes findings as text and JSON; finished_run.py reads a run's acceptance, memory.py plans its memory
document.py     writes docs/doctor.md
"""
