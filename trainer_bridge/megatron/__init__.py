"""This package trains the policy with Megatron-Core; it is the only package that imports megatron."""

import logging
import warnings

# On import Megatron-Core warns, once per file, that optional CUDA libraries (Transformer Engine, Apex, ...) are absent;
# the local layer spec used here needs none of them. This runs before any submodule can import megatron.
warnings.filterwarnings("ignore", message=r".*(Transformer Engine|transformer_engine|Apex|apex|nv-grouped|modelopt).*")
warnings.filterwarnings("ignore", module=r"megatron\.core.*")
logging.getLogger("megatron").setLevel(logging.ERROR)
