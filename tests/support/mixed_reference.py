"""Parts of models with experts as transformers has them: its names of weights, and the MTP layer that it skips."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

NORMS = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")


def fused(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a layer as transformers 5 keeps them: [experts, 2 width, hidden] and [experts, hidden, width]."""
    found: dict[str, dict[int, torch.Tensor]] = {"gate": {}, "up": {}, "down": {}}
    rest = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name):
            found[match[2]][int(match[1])] = tensor
        else:
            rest[name] = tensor
    gate, up, down = (torch.stack([each[index] for index in sorted(each)]) for each in found.values())
    return {**rest, "mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1), "mlp.experts.down_proj": down}


class MtpLayer(nn.Module):
    """The MTP layer behind the last of GLM or DeepSeek: transformers' own decoder layer over [token; hidden]."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        super().__init__()
        config = model.config
        self.own = f"model.layers.{config.num_hidden_layers}."
        stored = load_file(folder / "model.safetensors").items()
        tensors = {name.removeprefix(self.own): each for name, each in stored if name.startswith(self.own)}
        self.layer = type(model.model.layers[-1])(config, config.num_hidden_layers - 1)
        self.layer.load_state_dict({name: each for name, each in fused(tensors).items() if name in self._names()})
        self.eps, self.rotary = config.rms_norm_eps, model.model.rotary_emb
        self.outer = nn.ParameterDict(
            {name.replace(".", "/"): tensors[name].clone() for name in (*NORMS, "eh_proj.weight")}
        )

    def _names(self) -> set[str]:
        return set(self.layer.state_dict())

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """What the head reads [tokens, hidden], of the trunk's normed states and the next tokens' embeddings."""
        enorm, hnorm, last, projection = (self.outer[name.replace(".", "/")] for name in (*NORMS, "eh_proj.weight"))
        both = torch.cat([self._norm(embedded, enorm), self._norm(hidden, hnorm)], dim=-1)
        x = (both @ projection.T)[None]
        positions = torch.arange(x.shape[1])[None]
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)[None, None]
        angles = self.rotary(x, positions)
        y = self.layer(x, attention_mask=mask, position_ids=positions, position_embeddings=angles)
        return self._norm(y if torch.is_tensor(y) else y[0], last)[0]

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)


@torch.inference_mode()
def trunk(model: PreTrainedModel, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The states [tokens - 1, hidden] after the final norm, and the embeddings of the tokens behind each."""
    ids = torch.tensor([list(token_ids)])
    return model.model(ids).last_hidden_state[0, :-1], model.model.embed_tokens(ids[0, 1:])


@torch.inference_mode()
def mtp_logits(folder: Path, model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """What the MTP layer says [tokens - 1, vocab] of the token behind each but the first."""
    logits: torch.Tensor = model.lm_head(MtpLayer(folder, model)(*trunk(model, token_ids)))
    return logits
