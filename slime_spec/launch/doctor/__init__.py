"""Preflight: every known trap of speculative rollouts is a check, before anything is started.

finding.py      what a check finds, and how one is written
facts.py        all that a check may look at; gather.py reads it, with checkpoint.py, release.py and gpus.py
checks/         the checks, by what they are about
preflight.py    all of them on one configuration; the gate before a launch
command.py      slime-spec doctor; report.py shows, finished_run.py reads a run's acceptance
document.py     docs/doctor.md
"""
