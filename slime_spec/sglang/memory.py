"""A server's memory beside its static share, by the rules by which SGLang sets an unset --mem-fraction-static.

    GPU = share (weights, draft, KV cache) + activations of the largest prefill + CUDA graphs

Read in 0.5.21 (srt/arg_groups/memory_hook.py); the coefficients are SGLang's, for any model.
"""

from __future__ import annotations

from collections.abc import Mapping

MIB = 2**20
# Memory of a GPU below which a prefill takes so many tokens at most.
PREFILL_TOKENS = ((20 * 1024 * MIB, 2048), (60 * 1024 * MIB, 4096), (160 * 1024 * MIB, 8192))
PREFILL_TOKENS_OF_LARGER = 16384
METADATA = 512 * MIB
PER_PREFILL_TOKEN = 1.5 * MIB
PER_EIGHT_RANKS = 1024 * MIB
PER_GRAPH_SEQUENCE = 2 * MIB
PER_DP_GRAPH_SEQUENCE = 3 * MIB  # for each replica of data parallel attention
PASSES_OF_A_ROUND = 3  # draft, verify, and the draft's own cache brought up to date


def prefill_tokens(flags: Mapping[str, object], gpu_bytes: int) -> int:
    """Return the tokens of the largest prefill."""
    chunk = flags.get("chunked_prefill_size")
    if isinstance(chunk, int) and chunk > 0:
        return chunk
    return next((tokens for below, tokens in PREFILL_TOKENS if gpu_bytes < below), PREFILL_TOKENS_OF_LARGER)


def activation_bytes(flags: Mapping[str, object], gpu_bytes: int) -> int:
    ranks = _integer(flags, "tp_size") * _integer(flags, "pp_size")
    tokens = max(prefill_tokens(flags, gpu_bytes), PREFILL_TOKENS[0][1])
    return int(METADATA + tokens * PER_PREFILL_TOKEN + ranks * PER_EIGHT_RANKS / 8)


def graph_bytes(flags: Mapping[str, object], num_sequences: int, speculates: bool) -> int:
    """Return the memory of graphs for batches of up to ``num_sequences``."""
    largest = flags.get("cuda_graph_max_bs_decode")
    size = min(num_sequences, largest) if isinstance(largest, int) else num_sequences
    num_bytes = size * PER_GRAPH_SEQUENCE * (PASSES_OF_A_ROUND if speculates else 1)
    replicas = _integer(flags, "dp_size") if flags.get("enable_dp_attention") else 0
    return num_bytes + size * replicas * PER_DP_GRAPH_SEQUENCE


def static_fraction(flags: Mapping[str, object], gpu_bytes: int, num_sequences: int, speculates: bool) -> float:
    """Return the share of the free memory that a server takes when it starts: as set, or as SGLang chooses it."""
    given = flags.get("mem_fraction_static")
    if isinstance(given, float):
        return given
    reserved = activation_bytes(flags, gpu_bytes) + graph_bytes(flags, num_sequences, speculates)
    return max(0.0, (gpu_bytes - reserved) / gpu_bytes)


def _integer(flags: Mapping[str, object], name: str) -> int:
    value = flags.get(name, 1)
    assert isinstance(value, int), "typed by the table of flags"
    return value
