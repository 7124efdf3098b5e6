"""Where SGLang looks for the tree kernels of n-gram speculation."""

from sgl_kernel.trees import reconstruct_indices_from_tree_mask as reconstruct_indices_from_tree_mask
