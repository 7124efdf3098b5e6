"""This module reads and writes a checkpoint folder's tensors; its errors name the damaged tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slime_spec.checkpoints.families.blocks import block_shapes
from slime_spec.checkpoints.families.experts import CORRECTION
from slime_spec.checkpoints.folder import AGAIN, CONFIG, SINGLE, TARGET_PATH, CheckpointFolder
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import CheckpointError

MEND = "Copy the checkpoint again, or correct its config.json."
UNQUANTIZED = "Choose the checkpoint of the unquantised weights, or let SGLang compute with these in rollouts alone."
COMPUTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_WEIGHT = 1e15  # a flipped bit of an exponent makes 1e36; the largest weights of models are some hundreds
Dtypes = Sequence[torch.dtype]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Ends of the names by which quantised checkpoints store the parts of a weight.
QUANTIZED = (
    *(".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point", ".weight_packed", ".weight_shape"),
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".SCB", ".weight_format"),
)


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the family under its Hugging Face name, in the order in which weights are pushed."""
    hidden = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes |= block_shapes(prefix, spec, hidden, layer)
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes[HEAD] = (spec.vocab_size, hidden)
    return shapes


def served_dtype(name: str, dtype: str) -> str:
    """Return the dtype that a model of ``dtype`` has the tensor in: rounded, a router's bias chooses other experts."""
    return "float32" if name.endswith(CORRECTION) else dtype


def load_tensors(folder: str | Path, spec: ModelSpec, dtypes: Dtypes = ()) -> dict[str, torch.Tensor]:
    """Return every tensor of ``expected_shapes(spec)``, in that order and in the file's dtype.

    Raises CheckpointError naming the file or tensor when one is missing, truncated, misshapen or not finite, in the
    file's dtype and in ``dtypes``, to which the caller casts.
    """
    tensors = dict(_checked_tensors(Path(folder), spec, TARGET_PATH, dtypes))
    return {name: tensors[name] for name in expected_shapes(spec)}


def verify_tensors(folder: str | Path, spec: ModelSpec, setting: str = TARGET_PATH, dtypes: Dtypes = ()) -> None:
    """Check as ``load_tensors`` does, with one tensor in memory at a time; ``setting`` named the folder."""
    for _ in _checked_tensors(Path(folder), spec, setting, dtypes):
        pass


def save_checkpoint(
    folder: str | Path, tensors: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, object]
) -> None:
    """Write config.json and one ``model.safetensors`` that transformers loads."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    save_file(named, target / SINGLE, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def stored_tensors(
    folder: str | Path, wants: Callable[[str], bool], setting: str = TARGET_PATH
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a checkpoint folder whose name ``wants`` accepts, one at a time, in the file's dtype.

    Raises CheckpointError naming ``setting`` for a folder without weights, and the file for a damaged one.
    """
    stored = CheckpointFolder(Path(folder), setting)
    _ = stored.tensors  # reads the headers of all files: for its errors, before any weight is read
    for path in stored.weight_files:
        try:
            with safe_open(path, framework="pt") as shard:
                for name in filter(wants, shard.keys()):
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(path), f"must be a whole safetensors file: {error}", path.name, AGAIN) from None


def check_tensor(
    folder: str | Path, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: Dtypes = ()
) -> None:
    """Raise CheckpointError for a tensor of another shape or dtype, or of numbers that nothing can be computed with.

    These are NaN, infinity (in the tensor's dtype or one of ``dtypes``), and numbers whose products overflow.
    """
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{folder}: {name}", f"must have shape {shape}", tuple(tensor.shape), MEND)
    if tensor.dtype not in COMPUTED_DTYPES:
        rule = "must be float32, float16 or bfloat16: other codes mean nothing without the scales that belong to them"
        raise CheckpointError(f"{folder}: {name}", rule, str(tensor.dtype).removeprefix("torch."), UNQUANTIZED)
    extremes = torch.stack(tensor.aminmax())  # NaN where the tensor holds NaN; a cast keeps their order
    if not bool(extremes.isfinite().all()):
        raise CheckpointError(f"{folder}: {name}", "must be finite", "NaN or infinity", MEND)
    largest = float(extremes.abs().max())
    if largest > LARGEST_WEIGHT:
        rule = f"must hold numbers of at most {LARGEST_WEIGHT:g}: a forward pass overflows on larger ones"
        raise CheckpointError(f"{folder}: {name}", rule, largest, MEND)
    for dtype in dtypes:
        if not bool(extremes.to(dtype).isfinite().all()):
            rule = f"must be finite in {str(dtype).removeprefix('torch.')}, in which the engine computes"
            raise CheckpointError(f"{folder}: {name}", rule, largest, "Pass --sglang-dtype bfloat16 or float32.")


def _checked_tensors(folder: Path, spec: ModelSpec, setting: str, dtypes: Dtypes) -> Iterator[tuple[str, torch.Tensor]]:
    wanted = expected_shapes(spec)
    stored = CheckpointFolder(folder, setting).tensors
    for name in wanted:
        if name not in stored:
            raise CheckpointError(f"{folder}: {name}", "must be in the checkpoint", "missing", MEND)
    for name in stored:
        if name.endswith(QUANTIZED):
            rule = "belongs to quantised weights, which are not computed here"
            raise CheckpointError(f"{folder}: {name}", rule, stored[name].dtype, UNQUANTIZED)
    if spec.tie_word_embeddings and HEAD in stored:
        _check_tied(folder, setting)
    for name, tensor in stored_tensors(folder, wanted.__contains__, setting):
        check_tensor(folder, name, tensor, wanted[name], dtypes)
        yield name, tensor


def _check_tied(folder: Path, setting: str) -> None:
    """Raise CheckpointError for a head beside a tied embedding that is another: transformers would compute with it."""
    tables = dict(stored_tensors(folder, (EMBEDDING, HEAD).__contains__, setting))
    if not torch.equal(tables[EMBEDDING], tables[HEAD]):
        rule = f"must be {EMBEDDING} where tie_word_embeddings is true, or left out"
        raise CheckpointError(f"{folder}: {HEAD}", rule, "another tensor", "Set tie_word_embeddings to false.")
