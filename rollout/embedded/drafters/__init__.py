"""Drafters propose the tokens that the target verifies; one class per algorithm."""

from __future__ import annotations

import torch

from rollout.embedded.cuda.graphs import Graphs
from rollout.embedded.drafters.fronted import FrontedDrafter
from rollout.embedded.drafters.history import HistoryDrafter
from rollout.embedded.drafters.step import DrafterSetup
from rollout.embedded.drafting import Drafter
from rollout.embedded.kernels.library import kernels
from slime_spec.algorithms import ALGORITHMS
from slime_spec.checkpoints.draft_choice import choose_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.speculation import check_fp8, draft_quantization, fronts_history
from slime_spec.config.tree import Config
from slime_spec.interfaces import load_choice
from slime_spec.preflight.requests import RequestLimits
from slime_spec.sglang.draft_shape import embedded_shape

DRAFTERS = {each.name: each.drafter for each in ALGORITHMS.values() if each.drafter is not None}


def make_drafter(
    config: Config,
    target: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    limits: RequestLimits,
    graphs: Graphs | None = None,
) -> Drafter:
    """Return the configured drafter.

    Raises ConfigError for a draft that cannot serve. Weights are read at its first bind.
    """
    speculative = config.speculative
    drafter_class = load_choice("speculative.algorithm", DRAFTERS, speculative.algorithm)
    if speculative.record.takes_corpus:
        with_corpus: Drafter = drafter_class.with_corpus(config, target.vocab_size)
        return with_corpus
    draft = choose_draft(config, target)
    if draft is None:
        weightless: Drafter = drafter_class(speculative)
        return weightless
    quantization = draft_quantization(config)
    if speculative.draft_model_quantization is None and kernels() is None:
        quantization = None  # without kernels rounded weights are unpacked for each product
    if quantization == "fp8":
        check_fp8(torch.cuda.get_device_capability(device))
    setup = DrafterSetup(
        config=speculative,
        shape=embedded_shape(speculative, target.architecture),
        draft=draft,
        target=target,
        dtype=dtype,
        device=device,
        context_length=min(limits.context_length, limits.max_total_tokens),
        max_total_tokens=limits.max_total_tokens,
        quantization=quantization,
        graphs=graphs,
    )
    network: Drafter = drafter_class(setup)
    return FrontedDrafter(HistoryDrafter(speculative), network) if fronts_history(config) else network


def draft_kv_spec(config: Config, target: ModelSpec) -> ModelSpec | None:
    """Return the decoder whose keys and values the configured drafter caches, if it caches any.

    Reads config files only.
    """
    draft = choose_draft(config, target)
    return None if draft is None else draft.block
