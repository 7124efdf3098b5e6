"""The SGLang engine on real servers: exact output, true counters, draft-safe pushes, restarts, offload, speed."""
