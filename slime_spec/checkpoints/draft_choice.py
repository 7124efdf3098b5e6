"""The embedded engine chooses its draft, and checks from JSON files alone that the draft fits the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slime_spec.algorithms import EAGLE3, Algorithm, algorithm_of_family
from slime_spec.checkpoints.draft_location import locate_draft
from slime_spec.checkpoints.draft_spec import DraftSpec, is_trainable
from slime_spec.checkpoints.draft_tensors import verify_draft, with_stored_embedding
from slime_spec.checkpoints.families import family_of
from slime_spec.checkpoints.families.draft_format import ANOTHER_DRAFT
from slime_spec.checkpoints.folder import AGAIN, DRAFT_PATH, CheckpointFolder
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import Dtypes, verify_tensors
from slime_spec.config.speculation import check_quantization
from slime_spec.config.tree import Config
from slime_spec.errors import CheckpointError, ConfigError

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class ChosenDraft:
    """Describes the chosen draft: its folder, and the ``spec`` of a whole model or of a draft network."""

    folder: Path
    spec: ModelSpec | DraftSpec

    @property
    def block(self) -> ModelSpec:
        """Return the decoder whose keys and values the drafter caches."""
        return self.spec if isinstance(self.spec, ModelSpec) else self.spec.block

    def verify(self, dtypes: Dtypes = ()) -> None:
        """Read every tensor, one in memory at a time; raises CheckpointError naming the first that is damaged.

        ``dtypes`` are as in ``load_tensors``.
        """
        if isinstance(self.spec, ModelSpec):
            verify_tensors(self.folder, self.spec, DRAFT_PATH, dtypes)
        else:
            verify_draft(self.folder, self.spec, dtypes)


def choose_draft(config: Config, target: ModelSpec) -> ChosenDraft | None:
    """Return the draft of ``config``, None for an algorithm without a draft.

    Raises ConfigError for an unusable draft.
    """
    speculative = config.speculative
    if not speculative.record.has_weights:
        return None
    check_quantization(config)
    folder = _folder(config, target)
    if speculative.record.is_whole_model:
        draft = ChosenDraft(folder, _whole_model(folder, target, config.model.hf_checkpoint))
    else:
        spec = DraftSpec.from_folder(folder, target, speculative.draft_norm_output_convention)
        _check_family(spec, speculative.record)
        _check_tokenizers(folder, config.model.hf_checkpoint)
        draft = ChosenDraft(folder, with_stored_embedding(folder, spec, Path(config.model.hf_checkpoint)))
    _check_context(draft, config.engine.context_length or target.max_position_embeddings)
    return draft


def _folder(config: Config, target: ModelSpec) -> Path:
    draft = locate_draft(config.speculative, config.model.hf_checkpoint)
    is_unnamed = config.speculative.draft_model_path is None
    if draft is None or (is_unnamed and family_of(target.architecture).mtp is None):
        rule = f"must name the draft's folder: {config.speculative.algorithm} drafts with a network"
        raise ConfigError(DRAFT_PATH, rule, None, ANOTHER_DRAFT)
    return Path(draft.folder)


def _whole_model(folder: Path, target: ModelSpec, target_folder: str) -> ModelSpec:
    spec = ModelSpec.from_folder(folder, DRAFT_PATH)
    same = _check_tokenizers(folder, target_folder)
    # Models of one family pad their embedding differently; tokens beyond the tokenizer's are never generated.
    if spec.vocab_size != target.vocab_size and not same:
        raise CheckpointError(
            f"{folder / 'config.json'}: vocab_size",
            f"must be the target's ({target.vocab_size})",
            spec.vocab_size,
            ANOTHER_DRAFT,
        )
    return spec


def _check_family(spec: DraftSpec, algorithm: Algorithm) -> None:
    if spec.family not in algorithm.families:
        fitting = algorithm_of_family(spec.family).name
        raise ConfigError(
            "speculative.algorithm",
            f"must be {fitting} for a draft of the {spec.family} family",
            algorithm.name,
            f"Pass --sglang-speculative-algorithm {fitting}, or another draft.",
        )


def _check_context(draft: ChosenDraft, context_length: int) -> None:
    longest = draft.block.max_position_embeddings
    if longest < context_length:
        raise ConfigError(
            f"{draft.folder / 'config.json'}: max_position_embeddings",
            f"must cover the run's context of {context_length} tokens",
            longest,
            f"Lower --sglang-context-length to {longest}, or raise the draft's max_position_embeddings: beyond the "
            "lengths it was trained on fewer drafts are accepted, and the output stays the target's.",
        )


def _check_tokenizers(draft: Path, target: str | Path) -> bool:
    """Return whether both folders have a tokenizer; raises ConfigError where the two tokenizers differ."""
    files = draft / TOKENIZER, Path(target) / TOKENIZER
    if not all(CheckpointFolder(path.parent).has(TOKENIZER) for path in files):
        return False
    vocabularies = [_vocabulary(CheckpointFolder(path.parent)) for path in files]
    if vocabularies[0] != vocabularies[1]:
        differing = {item for one, other in (vocabularies, vocabularies[::-1]) for item in one.items() - other.items()}
        token, index = min(differing, key=lambda item: (item[1], item[0]))
        raise CheckpointError(
            str(files[0]),
            f"must hold the target's tokens: {len(differing)} differ",
            f"{token!r} = {index}",
            ANOTHER_DRAFT,
        )
    return True


def _vocabulary(folder: CheckpointFolder) -> dict[str, int]:
    """Return every token of the folder's tokenizer.json and its id."""
    stored = folder.json(TOKENIZER)
    try:
        vocab = stored["model"]["vocab"]
        # A unigram model lists [piece, score] pairs in the order of their ids.
        tokens = dict(vocab) if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
        tokens |= {added["content"]: added["id"] for added in stored.get("added_tokens") or ()}
    except (LookupError, TypeError, ValueError, AttributeError):
        tokens = {}
    if not tokens or not all(isinstance(token, str) and type(index) is int for token, index in tokens.items()):
        path = folder.path / TOKENIZER
        raise CheckpointError(str(path), "must hold tokens and their ids", TOKENIZER, AGAIN)
    return tokens


def trainable_draft(config: Config, target: ModelSpec) -> ChosenDraft:
    """Return the draft that a run trains; raises ConfigError naming what keeps it from being trained."""
    speculative = config.speculative
    setting, remedy = "draft_training.enable", "Drop --enable-draft-training, or choose another draft."
    if not speculative.record.has_weights:
        rule = f"trains a draft's weights, and {speculative.algorithm} has none"
        raise ConfigError(setting, rule, True, f"Choose {EAGLE3.name} and a draft for it, or drop it.")
    location = locate_draft(speculative, config.model.hf_checkpoint)
    if location is None or location.kind == "whole":
        rule = "trains a draft that reads the target's hidden states, not a whole model"
        raise ConfigError(setting, rule, True, remedy)
    folder = Path(location.folder)
    spec = DraftSpec.from_folder(folder, target, speculative.draft_norm_output_convention)
    if not is_trainable(spec):
        rule = f"cannot train this draft: {spec.block.num_layers} layers in the format {spec.family}"
        raise ConfigError(setting, rule, True, remedy)
    return ChosenDraft(folder, with_stored_embedding(folder, spec, Path(config.model.hf_checkpoint)))
