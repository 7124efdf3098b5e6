"""This module reads and writes a checkpoint folder's tensors; its errors name the damaged tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slime_spec.checkpoints.families.blocks import block_shapes
from slime_spec.checkpoints.folder import AGAIN, CONFIG, SINGLE, TARGET_PATH, CheckpointFolder, StoredTensor
from slime_spec.checkpoints.fp8 import LARGEST, Fp8Weight, LoadedTensors, has_nan
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.quantization import MEND, SCALE, UNQUANTIZED, check_stored, scheme_of, scheme_of_folder
from slime_spec.errors import CheckpointError

COMPUTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_WEIGHT = 1e15  # a flipped bit of an exponent makes 1e36; the largest weights of models are some hundreds
Dtypes = Sequence[torch.dtype]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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


def load_tensors(
    folder: str | Path, spec: ModelSpec, dtypes: Dtypes = (), names: Collection[str] | None = None
) -> LoadedTensors:
    """Return every tensor of ``expected_shapes(spec)``, in that order and in the file's dtype; from fp8 in fp32.

    ``names`` are those that are read, by default all. Raises CheckpointError naming the file or tensor when one of all
    is missing, or one that is read truncated, misshapen or not finite, in the file's dtype and in ``dtypes``, to which
    the caller casts.
    """
    tensors = dict(_checked_tensors(Path(folder), spec, TARGET_PATH, dtypes, names))
    loaded = LoadedTensors()
    for name in expected_shapes(spec):
        if name in tensors:
            loaded[name] = tensors.pop(name)
    return loaded


def verify_tensors(folder: str | Path, spec: ModelSpec, setting: str = TARGET_PATH, dtypes: Dtypes = ()) -> None:
    """Check as ``load_tensors`` does, with one tensor in memory at a time; ``setting`` named the folder."""
    for _ in _checked_tensors(Path(folder), spec, setting, dtypes):
        pass


def verify_headers(folder: str | Path, spec: ModelSpec, setting: str = TARGET_PATH) -> None:
    """Check names, shapes and dtypes of the weights that are there, by the files' headers alone.

    ``setting`` named the folder, which may have no weights yet. Raises CheckpointError naming the tensor.
    """
    there = CheckpointFolder(Path(folder), setting)
    stored = there.tensors_there
    if stored is None:
        return
    check_stored(stored, scheme_of(there.config, there.source), str(folder))
    for name, shape in expected_shapes(spec).items():
        if name in stored and stored[name].shape != shape:
            raise CheckpointError(f"{folder}: {name}", f"must have shape {shape}", stored[name].shape, MEND)
    _check_there(Path(folder), spec, stored)


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
    """Yield every tensor of a checkpoint folder whose name ``wants`` accepts, one at a time, as it is stored.

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


def weights(
    folder: str | Path, wants: Callable[[str], bool], setting: str = TARGET_PATH
) -> Iterator[tuple[str, torch.Tensor | Fp8Weight]]:
    """Yield what ``stored_tensors`` does, weights in fp8 with their scales, which are no tensors of their own here.

    Raises CheckpointError naming the tensor where codes and scales do not fit each other, before any is read.
    """
    stored = CheckpointFolder(Path(folder), setting)
    scheme = scheme_of_folder(stored)
    if scheme is None:
        yield from stored_tensors(folder, wants, setting)
        return
    # Scales may be in another file than their weight; they are a 4,096th of the weights' bytes.
    belongs = {name + SCALE for name in stored.tensors if wants(name)}
    scales = dict(stored_tensors(folder, belongs.__contains__, setting))
    for name, tensor in stored_tensors(folder, lambda name: wants(name) and not name.endswith(SCALE), setting):
        of_codes = scales.pop(name + SCALE, None)
        yield name, tensor if of_codes is None else Fp8Weight(tensor, of_codes, scheme)


def check_tensor(
    folder: str | Path, name: str, stored: torch.Tensor | Fp8Weight, shape: tuple[int, ...], dtypes: Dtypes = ()
) -> None:
    """Raise CheckpointError for a tensor of another shape or dtype, or of numbers that nothing can be computed with.

    These are NaN, infinity (in the tensor's dtype or one of ``dtypes``), and numbers whose products overflow.
    """
    tensor = stored.codes if isinstance(stored, Fp8Weight) else stored
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{folder}: {name}", f"must have shape {shape}", tuple(tensor.shape), MEND)
    if isinstance(stored, Fp8Weight):
        extremes = _extremes_of_codes(stored)
    elif tensor.dtype not in COMPUTED_DTYPES:
        rule = "must be float32, float16 or bfloat16: other codes mean nothing without the scales that belong to them"
        raise CheckpointError(f"{folder}: {name}", rule, str(tensor.dtype).removeprefix("torch."), UNQUANTIZED)
    else:
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


def _extremes_of_codes(weight: Fp8Weight) -> torch.Tensor:
    """Return bounds of a weight's numbers, the least and the largest; NaN where it holds NaN.

    They are the numbers that the largest code would stand for: the numbers themselves are computed where those are
    beyond float16, and else nobody needs them.
    """
    largest = weight.scales.abs().max() * LARGEST
    if bool(has_nan(weight.codes)) or bool(largest.isnan()):
        return torch.full((2,), torch.nan)
    if largest > torch.finfo(torch.float16).max:
        return torch.stack(weight.dequantised().aminmax())
    return torch.stack([-largest, largest])


def _checked_tensors(
    folder: Path, spec: ModelSpec, setting: str, dtypes: Dtypes, names: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor | Fp8Weight]]:
    wanted = expected_shapes(spec)
    read = wanted.keys() if names is None else names
    stored = CheckpointFolder(folder, setting).tensors
    _check_there(folder, spec, stored)
    if spec.tie_word_embeddings and HEAD in stored:
        _check_tied(folder, setting)
    for name, tensor in weights(folder, read.__contains__, setting):
        check_tensor(folder, name, tensor, wanted[name], dtypes)
        yield name, tensor


def _check_there(folder: Path, spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> None:
    for name in expected_shapes(spec):
        if name not in stored:
            raise CheckpointError(f"{folder}: {name}", "must be in the checkpoint", "missing", MEND)


def _check_tied(folder: Path, setting: str) -> None:
    """Raise CheckpointError for a head beside a tied embedding that is another: transformers would compute with it."""
    read = weights(folder, (EMBEDDING, HEAD).__contains__, setting)
    tables = {name: each.dequantised() if isinstance(each, Fp8Weight) else each for name, each in read}
    if not torch.equal(tables[EMBEDDING], tables[HEAD]):
        rule = f"must be {EMBEDDING} where tie_word_embeddings is true, or left out"
        raise CheckpointError(f"{folder}: {HEAD}", rule, "another tensor", "Set tie_word_embeddings to false.")
