"""Make a network from a draft's shape, and the tensors of a checkpoint from a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from slime_spec.checkpoints.draft_spec import DraftSpec, is_trainable
from slime_spec.draft.dflash import DFlashNetwork
from slime_spec.draft.eagle import EagleNetwork
from slime_spec.draft.eagle3 import Eagle3Network
from slime_spec.draft.mtp import MtpNetwork
from slime_spec.draft.network import DraftNetwork


def make_network(spec: DraftSpec) -> DraftNetwork:
    """Make the trainable network of a draft that ``is_trainable``, with torch's initial values."""
    assert is_trainable(spec), f"there is no network of {spec.family}"
    networks: dict[str, Callable[[DraftSpec], DraftNetwork]] = {
        "eagle3": Eagle3Network,
        "eagle": EagleNetwork,
        "mtp": MtpNetwork,
        "dflash": DFlashNetwork,
        "dspark": DFlashNetwork,
    }
    return networks[spec.family](spec)


def network_tensors(network: DraftNetwork) -> dict[str, torch.Tensor]:
    """Return the parameters by the names of ``draft_shapes(network.spec)``; they share the network's memory."""
    prefix = _prefix(network.spec)
    return {prefix + name: tensor.detach() for name, tensor in network.state_dict().items()}


def load_network(spec: DraftSpec, tensors: Mapping[str, torch.Tensor]) -> DraftNetwork:
    """Make the network with a checkpoint's tensors (``DraftCheckpoint.tensors``), in fp32."""
    network, prefix = make_network(spec), _prefix(spec)
    network.load_state_dict({name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()})
    return network


def _prefix(spec: DraftSpec) -> str:
    return spec.mtp_layer.prefix if spec.family == "mtp" else ""
