"""A group is split where engines would have nothing to do: each part asks for some of the group's samples.

A part has the seeds and the sample indices that its samples had in the group, so they come out the same. A part costs a
prefill of the prompt, at an engine that was idle; what it saves is rows in every pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace

from slime_spec.partial_samples import as_partial, request_for_rest
from slime_spec.types import GroupRequest

# On a CPU a pass of up to eight rows costs what a pass of one row costs: smaller parts would add work and save no time.
LEAST_PART = 8


def part_of(request: GroupRequest, positions: Iterable[int]) -> GroupRequest:
    """Return the request for the samples at these positions of a request's seeds."""
    return request_for_rest(request, [as_partial(request, position) for position in positions])


def divided(requests: Iterable[GroupRequest], num_engines: int, least_part: int = LEAST_PART) -> list[GroupRequest]:
    """Divide groups into at most ``num_engines`` parts, or leave them whole where there are as many groups already.

    The largest part is divided first, so that the largest in the end is as small as can be with ``least_part`` samples
    or more in every part. Parts come in their groups' order; those of a group differ by at most one sample.
    """
    whole = list(requests)
    num_parts = [1] * len(whole)
    largest = [(-len(request.seeds), index) for index, request in enumerate(whole)]
    heapify(largest)
    for _ in range(num_engines - len(whole)):
        while largest and len(whole[largest[0][1]].seeds) < least_part * (num_parts[largest[0][1]] + 1):
            heappop(largest)
        if not largest:
            break
        index = largest[0][1]
        num_parts[index] += 1
        heapreplace(largest, (-_ceil(len(whole[index].seeds), num_parts[index]), index))
    return [
        part_of(request, range(first, len(request.seeds), num)) if num > 1 else request
        for request, num in zip(whole, num_parts, strict=True)
        for first in range(num)
    ]


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
