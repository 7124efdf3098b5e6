"""A check may look at these facts: settings, server flags, both checkpoints' headers, SGLang's version, GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slime_spec.checkpoints.draft_location import locate_draft
from slime_spec.checkpoints.end_of_text import ReplyEnds
from slime_spec.checkpoints.families import FORMAT_OF
from slime_spec.checkpoints.families.draft_format import DraftFormat
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.sglang.draft_shape import DraftShape, draft_shape, embedded_shape
from slime_spec.sglang.interpreter import InstalledSglang
from slime_spec.sglang.releases import Release
from slime_spec.sglang.served import Difference

DraftKind = Literal["none", "in_target", "head", "whole"]
ATTENTION = ("decode_attention_backend", "attention_backend")  # the backend that decodes comes first
DENSE_GRAPH_SIZES = (*range(1, 33), *range(40, 65, 8), *range(80, 161, 16))


@dataclass(frozen=True)
class Facts:
    """Holds the facts about one engine of a run, from which every check decides.

    ``given`` are the paths of settings that the command line or the experiment sets; ``flags`` are the servers'.
    ``draft`` is None for algorithms without a draft network; an MTP layer inside the target's checkpoint is a draft
    whose checkpoint is the target's. ``known_flags`` are what the servers' interpreter says it understands, None where
    there is none to ask. ``gpu_bytes`` is the memory of each GPU that the run may use, None for a cluster's, which are
    not counted. ``acceptance`` are a finished run's cumulative rates by draft position. ``silent_servers`` are those
    that someone else started and that did not report their flags; ``differing`` are the flags of one that did, where
    they are not this run's. ``reply_ends`` is None for a run that generates nothing, and where the target's folder has
    no tokenizer. ``draft_embeds_otherwise``: the draft's file holds an embedding that is not the target's.
    """

    config: Config
    given: frozenset[str]
    target: Checkpoint
    draft: Checkpoint | None
    release: Release
    flags: Mapping[str, object]
    environ: Mapping[str, str]
    known_flags: InstalledSglang | None = None
    gpu_bytes: tuple[int, ...] | None = None
    acceptance: tuple[float, ...] = ()
    engine: int = 0
    silent_servers: tuple[str, ...] = ()
    differing: tuple[Difference, ...] = ()
    reply_ends: ReplyEnds | None = None
    draft_embeds_otherwise: bool = False

    @property
    def external_url(self) -> str:
        """Return the URL of the engine's server, which someone else started."""
        return f"http://{self.config.sglang_server.external_addrs[self.engine]}"

    @property
    def on_sglang(self) -> bool:
        return kind_of(self.config).has_servers and self.config.run.mode != "train_only"

    @property
    def knows_servers(self) -> bool:
        """Return whether the flags of an SGLang engine's servers are known: ours, or reported by running servers."""
        return self.on_sglang and bool(self.flags)

    @property
    def on_gpu(self) -> bool:
        return self.config.rollout.num_gpus_per_engine > 0

    @property
    def speculates(self) -> bool:
        return self.config.speculative.record.speculates and self.config.run.mode != "train_only"

    @property
    def draft_kind(self) -> DraftKind:
        """Return the kind of draft: a head over the target's features, an MTP layer, or a whole model."""
        draft = locate_draft(self.config.speculative, self.target.folder)
        return "none" if draft is None else draft.kind

    @property
    def draft_format(self) -> DraftFormat | None:
        """Return the format of a draft that reads the target's hidden states; None for others, and where unknown."""
        return None if self.draft is None else FORMAT_OF.get(self.draft.architecture)

    @property
    def shape(self) -> DraftShape:
        speculative, architecture = self.config.speculative, self.target.architecture
        of_engine = draft_shape if kind_of(self.config).has_servers else embedded_shape
        return of_engine(speculative, architecture)

    @property
    def context_length(self) -> int | None:
        """Return the context length set for the servers, else the target's own.

        None where its config.json does not say.
        """
        return self.config.engine.context_length or self.target.context_length

    @property
    def samples_per_engine(self) -> int:
        rollout = self.config.rollout
        return -(-rollout.batch_size * rollout.n_samples_per_prompt // rollout.num_engines)

    @property
    def trains_with_pushes(self) -> bool:
        return self.config.run.mode == "train"

    @property
    def attention_backend(self) -> str | None:
        """Return the backend that decodes and verifies; None: SGLang chooses."""
        return next((str(self.flags[name]) for name in ATTENTION if self.flags.get(name)), None)

    @property
    def page_size(self) -> int:
        page_size = self.flags.get("page_size", 1)
        assert isinstance(page_size, int), "typed by the table of flags"
        return page_size

    @property
    def uses_graphs(self) -> bool:
        is_off = self.flags.get("disable_cuda_graph") or self.flags.get("cuda_graph_backend_decode") == "disabled"
        return self.on_gpu and not is_off

    @property
    def graph_sizes_are_dense(self) -> bool:
        """Return whether few of the batch sizes that occur are not captured (all sizes up to 32, then in steps)."""
        sizes = self.flags.get("cuda_graph_bs_decode") or ()
        assert isinstance(sizes, tuple | list), "typed by the table of flags"
        wanted = {size for size in DENSE_GRAPH_SIZES if size <= self.config.engine.max_running_requests}
        return bool(sizes) and wanted <= set(sizes)
