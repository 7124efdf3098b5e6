"""The plug-in makes unmodified SGLang servers safe to speculate in RL.

It runs in SGLang's own processes, so it imports nothing heavy: no Ray, no torch, and of slime_spec the version alone.
"""
