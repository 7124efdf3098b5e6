"""A stand-in for SGLang's compiled CPU kernels, in plain torch, for tests: SGLang 0.5.21, Llama-family models.

Written from the kernels' documented shapes. Slow by nature: it proves behaviour, never speed. ``convert_weight_packed``
must not exist here, so that SGLang keeps its own torch layers.
"""

from sgl_kernel import attention as attention  # registers torch.ops.sgl_kernel.*
from sgl_kernel.slots import (
    assign_draft_cache_locs_contiguous_cpu as assign_draft_cache_locs_contiguous_cpu,
)
from sgl_kernel.slots import (
    assign_extend_cache_locs_cpu as assign_extend_cache_locs_cpu,
)
from sgl_kernel.slots import (
    assign_req_to_token_pool_cpu as assign_req_to_token_pool_cpu,
)
from sgl_kernel.slots import (
    build_draft_decode_metadata_cpu as build_draft_decode_metadata_cpu,
)
from sgl_kernel.slots import (
    copy_all_layer_kv_cache_cpu as copy_all_layer_kv_cache_cpu,
)
from sgl_kernel.slots import (
    rotate_input_ids_cpu as rotate_input_ids_cpu,
)
from sgl_kernel.trees import (
    build_tree_kernel_efficient_cpu as build_tree_kernel_efficient_cpu,
)
from sgl_kernel.trees import (
    fill_accept_out_cache_loc_cpu as fill_accept_out_cache_loc_cpu,
)
from sgl_kernel.trees import (
    fill_bonus_tokens_cpu as fill_bonus_tokens_cpu,
)
from sgl_kernel.trees import (
    reconstruct_indices_from_tree_mask as reconstruct_indices_from_tree_mask,
)
from sgl_kernel.trees import (
    verify_tree_greedy_cpu as verify_tree_greedy_cpu,
)

__version__ = "0.0.0"
