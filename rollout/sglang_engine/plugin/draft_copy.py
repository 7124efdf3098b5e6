"""A copy of a draft in host memory, without what it shares with the target."""

from __future__ import annotations

from collections.abc import Iterator

import torch

Place = tuple[str, str]  # the module and the tensor's name in it


class Copy:
    """A copy, in host memory, of all tensors of a draft that are not the target's: a draft shares its embedding."""

    def __init__(self, draft: torch.nn.Module, target: torch.nn.Module) -> None:
        self._draft = draft
        own = own_tensors(draft, target)
        self._kept = {place: tensor.detach().to("cpu", copy=True) for place, tensor in own.items()}

    @property
    def num_tensors(self) -> int:
        return len(self._kept)

    def put_back(self) -> None:
        """Writes into the tensors that the draft has by now; raises ValueError where one was replaced by another kind.

        SGLang's handling of weights after a load may put new tensors in the place of those that were copied.
        """
        current = dict(_tensors(self._draft))
        kinds = {place: _kind(current[place]) if place in current else None for place in self._kept}
        if changed := [".".join(place) for place, kept in self._kept.items() if kinds[place] != _kind(kept)]:
            raise ValueError(f"the load left other tensors than before: {', '.join(sorted(changed))}")
        with torch.inference_mode():
            for place, kept in self._kept.items():
                current[place].data.copy_(kept)


def own_tensors(draft: torch.nn.Module, target: torch.nn.Module) -> dict[Place, torch.Tensor]:
    """Parameters, buffers and tensors that are neither, as the table of a reduced vocabulary is; each memory once."""
    seen = {_memory(tensor) for _, tensor in _tensors(target)}
    own = {}
    for place, tensor in _tensors(draft):
        if _memory(tensor) not in seen:
            seen.add(_memory(tensor))
            own[place] = tensor
    return own


def shared_names(draft: torch.nn.Module, target: torch.nn.Module) -> set[str]:
    """The parameters of a draft whose memory is the target's."""
    places = {_memory(tensor) for _, tensor in _tensors(target)}
    return {name for name, tensor in draft.named_parameters() if _memory(tensor) in places}


def _tensors(model: torch.nn.Module) -> Iterator[tuple[Place, torch.Tensor]]:
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for name, value in held.items():
                if isinstance(value, torch.Tensor):
                    yield (path, name), value


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _memory(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.data_ptr()
