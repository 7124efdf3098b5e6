"""On a GPU a pass runs in few fused kernels, captured once per shape as a CUDA graph and replayed."""
