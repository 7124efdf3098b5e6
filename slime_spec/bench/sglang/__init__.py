"""These benchmarks test the SGLang engine on real servers: output, counters, pushes, restarts, offload, speed."""
