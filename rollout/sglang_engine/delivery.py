"""Delivery sends a whole push to one server: paused, inside a session, bucket by bucket, and checked afterwards.

pause (retract) ─ begin(side) ─ bucket ─ bucket ─ … ─ end ─ continue ─ version? checksums?

The server loads in place, so generating between two buckets would mix versions: it is paused while it loads, unless
the push has paused it already.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rollout.sglang_engine.client import ServerGone, ServerRefused, SglangClient
from rollout.sglang_engine.contract import END, Contract
from rollout.sglang_engine.transports.bucket import ServerTransport
from slime_spec.checkpoints.quantization import SCALE
from slime_spec.errors import PushError
from slime_spec.sglang.releases import SELECTOR
from slime_spec.weights.messages import NamedTensors, PauseMode, Side
from slime_spec.weights.run import bucketed

logger = logging.getLogger(__name__)

BEGIN = "/begin_weight_update"
ASK_AGAIN_S = (0.0, 0.5, 5.0)
# Parts of a fused projection that SGLang cuts out as if every head had hidden_size / num_attention_heads dimensions.
MISREAD = (".k_proj.", ".v_proj.")
NUM_ROWS = 2  # of a tensor, that are read back
Sums = Mapping[str, str]


@dataclass(frozen=True)
class Weights:
    """Holds one side's weights at one version."""

    side: Side
    version: int
    tensors: Mapping[str, torch.Tensor]


class Delivery:
    """Delivers pushes to one server, which then labels its weights with their version and ``label_suffix``.

    ``mtp_names`` are the target's tensors that belong to the draft inside the target.
    """

    def __init__(
        self,
        client: SglangClient,
        contract: Contract,
        transport: ServerTransport,
        transport_name: str,
        has_external_draft: bool,
        bucket_bytes: int,
        label_suffix: str = "",
    ) -> None:
        self._client, self._contract, self._transport = client, contract, transport
        self._name, self._has_external_draft, self._bucket_bytes = transport_name, has_external_draft, bucket_bytes
        self._label_suffix = label_suffix

    def check(self, side: Side) -> None:
        """Raise PushError, before anything is sent, where this transport cannot update this side."""
        if self._name == "disk":
            if self._has_external_draft:
                raise PushError(
                    "an update from disk loads the policy into the draft too: with a reduced vocabulary the server "
                    "dies of it, else the draft is overwritten. Pass --sglang-weight-transport tensor or distributed."
                )
            if side == "draft":
                raise PushError("an update from disk has no side. Pass --sglang-weight-transport tensor.")
            return
        self._fields(side)

    async def deliver(self, weights: Weights, mtp_names: frozenset[str], paused: PauseMode | None) -> None:
        """Send the weights; raises ServerRefused, the server then in an unknown state, or ServerGone."""
        parts = _parts(weights, mtp_names) if self._contract.style == "selector" else [(weights.side, weights.tensors)]
        flush = paused != "in_place"  # KV that paused requests hold cannot be flushed, and the server dies of trying
        async with self._paused(paused):
            await self._transport.open(self._client)
            try:
                for side, tensors in parts:
                    async with self._session(side):
                        await self._send(side, weights, list(bucketed(tensors.items(), self._bucket_bytes)), flush)
            finally:
                await self._transport.close(self._client)
        logger.info("weights delivered side=%s version=%d", weights.side, weights.version)

    async def checksums(self, side: Side) -> Sums:
        """Return every tensor's checksum as the server computes it; empty where the server has no checksums."""
        if not self._contract.has_checksums:
            return {}
        try:
            answer = await self._client.post("/weights_checker", {"action": "checksum", "selector": side})
        except ServerRefused as error:
            logger.warning("no checksums reason=%s", error.message)
            return {}
        ranks = answer.get("ranks") if isinstance(answer, Mapping) else None
        if not ranks or not all(
            isinstance(rank, Mapping) and isinstance(rank.get("checksums"), Mapping) for rank in ranks
        ):
            logger.warning("no checksums answer=%.200s", answer)
            return {}
        return {
            f"{rank}:{name}": checksum
            for rank, payload in enumerate(ranks)
            for name, checksum in payload["checksums"].items()
        }

    async def version(self) -> str:
        """Return the target's version as the server reports it; empty where it does not, asked several times."""
        for wait_s in ASK_AGAIN_S:
            await asyncio.sleep(wait_s)
            for path in ("/model_info", "/get_model_info"):
                try:
                    answer = await self._client.get(path)
                except ServerRefused:
                    continue
                if isinstance(answer, Mapping) and answer.get("weight_version") is not None:
                    return str(answer["weight_version"]).removesuffix(self._label_suffix)
        return ""

    def label(self, version: int) -> str:
        """Return what the server calls the target's weights of a version."""
        return f"{version}{self._label_suffix}"

    def fields_of(self, side: Side, by_group: bool, has_both: bool = False) -> dict[str, Any]:
        """Return the fields that send an update to one side, or a target that has both to both; raises PushError."""
        if not by_group:
            fields = self._contract.tensor_fields(side, self._has_external_draft)
        else:
            fields = self._contract.group_fields(side)
        return {**fields, str(SELECTOR.field): "all"} if has_both and self._contract.style == SELECTOR.style else fields

    async def begin_session(self, fields: Mapping[str, Any]) -> None:
        """Open a session, where the contract has sessions; a session that was left open is ended first."""
        if not self._contract.has_session:
            return
        selected = {str(SELECTOR.field): fields[str(SELECTOR.field)]}
        try:
            await self._client.post(BEGIN, selected)
        except ServerRefused as error:
            if error.status != 400:
                raise
            logger.warning("ended a stale weight-update session reason=%s", error.message)
            await self._client.post(END)
            await self._client.post(BEGIN, selected)

    async def end_session(self) -> None:
        if self._contract.has_session:
            await self._client.post(END)

    async def _send(
        self, side: Side, weights: Weights, buckets: list[list[tuple[str, torch.Tensor]]], flush: bool
    ) -> None:
        for number, bucket in enumerate(buckets):
            fields = {**self._fields(side), "flush_cache": flush and number == len(buckets) - 1}
            if weights.side == "target" and number == len(buckets) - 1:
                fields["weight_version"] = self.label(weights.version)
            await self._send_one(bucket, fields)

    async def _send_one(self, bucket: NamedTensors, fields: Mapping[str, Any]) -> None:
        await self._transport.send(self._client, bucket, fields)

    def _fields(self, side: Side) -> dict[str, Any]:
        if self._name == "disk":
            return {}
        return self.fields_of(side, self._name == "distributed")

    @asynccontextmanager
    async def _session(self, side: Side) -> AsyncIterator[None]:
        """Hold a session open where the contract has sessions."""
        if not self._contract.has_session or self._name == "disk":
            yield
            return
        await self.begin_session(self._fields(side))
        async with self._and_then(END):
            yield

    @asynccontextmanager
    async def _paused(self, paused: PauseMode | None) -> AsyncIterator[None]:
        if paused is not None:
            yield
            return
        await self._client.post("/pause_generation", {"mode": "retract"})
        async with self._and_then("/continue_generation"):
            yield

    @asynccontextmanager
    async def _and_then(self, path: str) -> AsyncIterator[None]:
        """Make a last call, also after an error; a server that is gone would only be waited for once more."""
        try:
            yield
        except ServerGone:
            raise
        except BaseException:
            await self._client.post(path)
            raise
        await self._client.post(path)


def _parts(weights: Weights, mtp_names: frozenset[str]) -> list[tuple[Side, Mapping[str, torch.Tensor]]]:
    """Split a target's push that has MTP tensors in two: each side loads only what its selector names."""
    if weights.side == "draft" or not mtp_names & weights.tensors.keys():
        return [(weights.side, weights.tensors)]
    inner = {name: tensor for name, tensor in weights.tensors.items() if name in mtp_names}
    outer = {name: tensor for name, tensor in weights.tensors.items() if name not in mtp_names}
    return [("target", outer), ("draft", inner)]


async def read_back(
    client: SglangClient, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, num_picked: int = 4
) -> dict[str, bool]:
    """Return, for some tensors, whether every rank has their first rows; leaves out tensors that no rank can show."""
    rows = await shown_rows(client, tensors, num_picked)
    # Codes in fp8 are shown as the numbers that they are without their scale, which every dtype has.
    ours = {name: tensors[name][:NUM_ROWS].to(dtype).to(torch.float64) for name in rows}
    return {name: all(torch.equal(theirs, ours[name]) for theirs in replicas) for name, replicas in rows.items()}


async def shown_rows(
    client: SglangClient, tensors: Mapping[str, torch.Tensor], num_picked: int
) -> dict[str, list[torch.Tensor]]:
    """Return the first rows of some tensors, as each data-parallel replica shows them; those not shown are left out."""
    rows = {}
    for name in picked_names(tensors, num_picked):
        try:
            shown = await client.post("/get_weights_by_name", {"name": name, "truncate_size": NUM_ROWS})
        except ServerRefused:
            continue
        if replicas := _per_replica(shown, tensors[name].dim()):
            rows[name] = replicas
    return rows


def picked_names(names: Iterable[str], num_picked: int = 4) -> list[str]:
    """Return some of the tensors that are read back, from the first to the last."""
    right = [name for name in names if is_read_right(name)]
    last = len(right) - 1
    return sorted({right[last * number // (num_picked - 1)] for number in range(num_picked)})


def is_read_right(name: str) -> bool:
    """Return whether SGLang, where it shows the tensor at all, shows the right numbers."""
    return not any(part in name for part in MISREAD) and not name.endswith(SCALE)


def _per_replica(shown: Any, num_dims: int) -> list[torch.Tensor]:
    """Return each data-parallel replica's rows; a server with one replica answers without a list of replicas.

    What is no list of numbers shows nothing.
    """
    if not isinstance(shown, list):
        return []
    try:
        theirs = torch.tensor(shown, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError):
        return []
    return [theirs] if theirs.dim() == num_dims else list(theirs)
