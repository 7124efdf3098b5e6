"""Make a network from a draft's shape, and the tensors of a checkpoint from a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from slime_spec.checkpoints.draft_spec import DraftSpec, is_trainable
from slime_spec.draft.dflash import DFlashNetwork
from slime_spec.draft.eagle import EagleNetwork
from slime_spec.draft.eagle3 import Eagle3Network
from slime_spec.draft.mtp import MtpNetwork
from slime_spec.draft.network import DraftNetwork
from slime_spec.draft.ranks import ONE_RANK, DraftRanks


def make_network(spec: DraftSpec, ranks: DraftRanks = ONE_RANK) -> DraftNetwork:
    """Make the trainable network of a draft that ``is_trainable``, with torch's initial values.

    Each of ``ranks`` has another part of its experts, and all of the rest.
    """
    assert is_trainable(spec), f"there is no network of {spec.family}"
    networks: dict[str, Callable[[DraftSpec], DraftNetwork]] = {
        "eagle3": Eagle3Network,
        "eagle": EagleNetwork,
        "mtp": partial(MtpNetwork, ranks=ranks),
        "dflash": DFlashNetwork,
        "dspark": DFlashNetwork,
    }
    return networks[spec.family](spec)


def network_tensors(network: DraftNetwork) -> dict[str, torch.Tensor]:
    """Return the weights by the names of ``draft_shapes(network.spec)``; they share the network's memory."""
    return {stored_name(network.spec, name): tensor.detach() for name, tensor in network.state_dict().items()}


def load_network(spec: DraftSpec, tensors: Mapping[str, torch.Tensor], ranks: DraftRanks = ONE_RANK) -> DraftNetwork:
    """Make the network with a checkpoint's tensors (``DraftCheckpoint.tensors``), in fp32."""
    network = make_network(spec, ranks)
    network.load_state_dict({name: tensors[stored_name(spec, name)].float() for name in network.state_dict()})
    return network


def stored_name(spec: DraftSpec, name: str) -> str:
    """Return the name in checkpoints of a network's own ``name``: of MTP layers every family has its names."""
    if spec.family != "mtp":
        return name
    layer = spec.mtp_layer
    own = {
        "input_proj.weight": layer.projection,
        "token_layernorm.weight": layer.embedding_norm,
        "hidden_layernorm.weight": layer.hidden_norm,
        "final_layernorm.weight": layer.final_norm,
    }
    return layer.prefix + own.get(name, layer.block + name)
