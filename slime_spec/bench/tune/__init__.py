"""``slime-spec tune`` measures what speculation pays with the user's checkpoint, drafts and prompts.

options     the command line: flags of train, and the command's own
workload    prompts become groups of requests, the same for every side
candidates  drafters that may pay, each as settings
acceptance  how often each drafter's tokens stand, by position, and by which rule of verification
sweep       the embedded engine: sides take turns at every batch size (off, each drafter, fixed lengths)
results     what was measured, whatever engine did
push        one push from a real trainer to a real engine
verdict     what to run with, or why not to speculate
report      the tables, and the JSON
picture     speed-up by batch, and acceptance by position

On SGLang a setting is a server's start:
server_settings   what servers may be started with, by the doctor's knowledge
server_sweep      one start after another, beside a server without speculation or between two of its times
server_turns      one repetition on one server, and its counters
"""
