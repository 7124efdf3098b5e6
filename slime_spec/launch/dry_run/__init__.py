"""``slime-spec train --dry-run``: everything a launch would do, from settings, config.json and weight headers alone.

parameters.py   how many parameters a config.json means
memory.py       what engines and trainer will hold
plan.py         placement, servers, transport, memory, preflight: the whole plan
placement.py    who has which bundles, as text
show.py         the plan on a terminal
"""
