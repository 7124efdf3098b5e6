"""A copy of a draft in host memory, without what it shares with the target."""

from __future__ import annotations

import torch


class Copy:
    """A copy, in host memory, of all tensors of a draft that are not the target's: a draft shares its embedding."""

    def __init__(self, draft: torch.nn.Module, target: torch.nn.Module) -> None:
        self._tensors = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in own_tensors(draft, target)]

    @property
    def num_tensors(self) -> int:
        return len(self._tensors)

    def put_back(self) -> None:
        with torch.inference_mode():
            for tensor, kept in self._tensors:
                tensor.data.copy_(kept)


def own_tensors(draft: torch.nn.Module, target: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers and tensors that are neither, as the table of a reduced vocabulary is; each memory once."""
    seen = {_place(tensor) for tensor in _tensors(target)}
    own = []
    for tensor in _tensors(draft):
        if _place(tensor) not in seen:
            seen.add(_place(tensor))
            own.append(tensor)
    return own


def shared_names(draft: torch.nn.Module, target: torch.nn.Module) -> set[str]:
    """The parameters of a draft whose memory is the target's."""
    places = {_place(tensor) for tensor in _tensors(target)}
    return {name for name, tensor in draft.named_parameters() if _place(tensor) in places}


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    plain = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return [*model.parameters(), *model.buffers(), *plain]


def _place(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.data_ptr()
