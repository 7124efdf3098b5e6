"""``slime-spec train --dry-run`` plans a launch from settings, config.json and weight headers alone.

plan.py         the whole plan: placement, servers, transport, memory, preflight
placement.py    the bundles of each actor, as text
show.py         the plan on a terminal
"""
