"""PassCapture keeps, of the policy's own forward passes, the rows that a draft learns from: no second pass is made.

Every pipeline stage keeps the states that it computes. Where activations are recomputed a layer runs twice, and the
first run counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from trainer_bridge.draft_rows import ReplyRows
from trainer_bridge.megatron.model import PolicyModel, all_rows
from trainer_bridge.megatron.vocab_parallel import argmax_and_logsumexp

EMBEDDING, FINAL, ARGMAX, LOGSUMEXP = "embedding", "final", "argmax", "logsumexp"


def layer_name(layer: int) -> str:
    return f"layer {layer}"


class KeptRows:
    """Holds the rows that are kept of one microbatch, each once, and what was kept so far by name."""

    def __init__(self, replies: Sequence[ReplyRows], device: torch.device) -> None:
        fed = torch.cat([reply.fed for reply in replies])
        self.fed, places = (each.to(device) for each in fed.unique(return_inverse=True))
        self.places = places.split([len(reply.fed) for reply in replies])  # of each reply's tokens in ``fed``
        self.logits = torch.cat([reply.logits for reply in replies]).to(device)
        self.kept: dict[str, torch.Tensor] = {}


class PassCapture:
    """Keeps of fed tokens the embedding, the outputs of ``layers`` (0-based, of the whole model) and the final state.

    Of a reply's logits it keeps the argmax and logsumexp. Every tensor rank keeps all of these.
    """

    def __init__(self, model: PolicyModel, layers: Sequence[int], temperature: float) -> None:
        self._model, self._temperature = model, temperature
        offset = get_transformer_layer_offset(model.config)
        own = {offset + index: module for index, module in enumerate(model.decoder.layers)}
        self._layers = {layer: own[layer] for layer in layers if layer in own}
        self._pending: Iterator[KeptRows | None] = iter(())
        self._current: KeptRows | None = None

    @contextmanager
    def of(self, microbatches: Sequence[Sequence[ReplyRows]]) -> Iterator[list[KeptRows | None]]:
        """Keep the rows of each microbatch's replies, for the passes of the block: one per microbatch, in order."""
        device = next(self._model.parameters()).device
        rows = [KeptRows(replies, device) if replies else None for replies in microbatches]
        self._pending = iter(rows)
        with ExitStack() as hooks:
            for module, hook in self._hooks():
                hooks.callback(module.register_forward_hook(hook).remove)
            hooks.callback(self._model.register_forward_pre_hook(self._next).remove)
            yield rows
        self._current = None

    def _hooks(self) -> Iterator[tuple[torch.nn.Module, Any]]:
        model = self._model
        if model.post_process:
            yield model.output_layer, self._keep_logits
        if model.pre_process:
            yield model.embedding, partial(self._keep, EMBEDDING)
        for layer, module in self._layers.items():
            yield module, partial(self._keep, layer_name(layer))
        if model.post_process:
            yield model.decoder.final_layernorm, partial(self._keep, FINAL)

    def _next(self, module: torch.nn.Module, args: Any) -> None:
        self._current = next(self._pending)

    @torch.no_grad()
    def _keep(self, name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        rows, states = self._current, output[0] if isinstance(output, tuple) else output
        if rows is not None and name not in rows.kept:
            rows.kept[name] = all_rows(states, self._model)[:, 0].index_select(0, rows.fed)

    @torch.no_grad()
    def _keep_logits(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        rows = self._current
        if rows is not None and ARGMAX not in rows.kept:
            logits = output[0][:, 0].index_select(0, rows.logits)
            group = mpu.get_tensor_model_parallel_group() if mpu.get_tensor_model_parallel_world_size() > 1 else None
            rows.kept[ARGMAX], rows.kept[LOGSUMEXP] = argmax_and_logsumexp(logits, self._temperature, group)
