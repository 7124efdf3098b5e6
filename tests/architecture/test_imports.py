"""The architecture, read from the sources: which way imports point and where the heavy libraries live."""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from slime_spec.engines import ENGINES
from tests.support.imports import imported

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("slime_spec", "rollout", "trainer_bridge")
LAUNCH = "slime_spec.launch"
# The composition roots: they alone import all three packages, and nothing below imports them.
ROOTS = (LAUNCH, "slime_spec.bench", "slime_spec.integrations")
# A library and the only modules (or packages) that may import it.
HOMES = {
    "megatron": ("trainer_bridge.megatron",),
    "sglang": ("rollout.sglang_engine", "slime_spec.sglang.answers"),
    "wandb": ("slime_spec.metrics.wandb",),
    "tensorboard": ("slime_spec.metrics.tensorboard",),
    "tree_sitter": ("slime_spec.launch.port",),
    "tree_sitter_bash": ("slime_spec.launch.port",),
    "pydantic": ("rollout.embedded.http",),
    "prometheus_client": ("rollout.embedded.http",),
    "aiohttp": ("rollout.embedded.http", "rollout.sglang_engine", "slime_spec.tasks.remote"),
    "math_verify": ("slime_spec.tasks.math_answers",),
    "reasoning_gym": ("slime_spec.tasks.reasoning",),
    "triton": ("rollout.embedded.cuda", "slime_spec.weights.xxh3_kernel"),
    "hydra": (LAUNCH,),
    "omegaconf": (LAUNCH,),
    "ray": (
        *ROOTS,
        "rollout.actor",
        "rollout.node_actor",
        "rollout.pool",
        "trainer_bridge.megatron.actor",
        "trainer_bridge.megatron.group",
        # Both the engine pool and the trainer group raise what actors raise, by one rule.
        "slime_spec.ray_errors",
        "slime_spec.transports.ray_object_store",
    ),
}
# Imports for annotations alone that may close a circle: (importers, imported) and why.
ANNOTATION_CIRCLES = {
    ("slime_spec.algorithms", "slime_spec.config.speculative"): "an algorithm's shape rule reads the settings, and "
    "the settings look up the record of their algorithm",
    ("slime_spec.engines", "slime_spec.config.tree"): "an engine kind's checks read the whole tree, which checks that "
    "the kind it names exists",
    ("slime_spec.interfaces", "slime_spec.config.tree"): "the seams are given the whole tree, which names their "
    "implementations",
    ("slime_spec.checkpoints.families", "slime_spec.checkpoints.model_spec"): "a family computes shapes from the spec "
    "that was read by asking the family",
    ("slime_spec.checkpoints.families", "slime_spec.checkpoints.draft_spec"): "a draft's format names the tensors of "
    "the spec that was read by asking the format",
}


def module_files() -> dict[str, Path]:
    """Every module of the three packages and its file."""
    modules = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = module_files()


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def forbidden_imports(module: str, names: set[str]) -> set[str]:
    """What ``module`` imports against the rules: upward, sideways, or a heavy library outside its home."""
    allowed = {
        "rollout": ("rollout", "slime_spec"),
        "trainer_bridge": ("trainer_bridge", "slime_spec"),
        "slime_spec": ("slime_spec",),
    }[module.partition(".")[0]]
    is_root = is_within(module, ROOTS) or module == "slime_spec.__main__"
    wrong = set()
    for name in names:
        if is_within(name, PACKAGES) and not is_root and (not is_within(name, allowed) or is_within(name, ROOTS)):
            wrong.add(name)
        library = name.partition(".")[0]
        if library in HOMES and not is_within(module, HOMES[library]):
            wrong.add(name)
    return wrong


def import_graph(*, at_import_time: bool) -> dict[str, set[str]]:
    """Module to the modules of ours that it imports: when it is loaded, or anywhere in its source."""
    graph = {}
    for module, path in MODULES.items():
        names = imported(path.read_text(), at_import_time=at_import_time)
        graph[module] = {name for name in names if name in MODULES and name != module}
    return graph


def without_annotation_circles(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """``graph`` less the imports of ANNOTATION_CIRCLES, where the module does not execute them when it is loaded."""
    executed = import_graph(at_import_time=True)
    kept = {}
    for module, names in graph.items():
        excused = [name for importers, name in ANNOTATION_CIRCLES if is_within(module, (importers,))]
        kept[module] = {name for name in names if name in executed[module] or name not in excused}
    return kept


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_and_heavy_libraries_stay_at_home(module: str) -> None:
    assert forbidden_imports(module, imported(MODULES[module].read_text())) == set()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("rollout.") and name.count(".") == 1])
def test_pool_and_actors_know_engines_by_what_their_kind_declares(module: str) -> None:
    source = MODULES[module].read_text()
    assert not [name for name in imported(source) if is_within(name, ("rollout.embedded", "rollout.sglang_engine"))]
    assert not [name for name in ENGINES if f'"{name}"' in source]


def test_no_module_imports_itself_through_others() -> None:
    order = list(TopologicalSorter(import_graph(at_import_time=True)).static_order())  # raises CycleError, naming it
    assert set(order) == set(MODULES)


def test_a_machine_without_triton_loads_every_module_but_those_of_a_gpu() -> None:
    """Torch's builds for a CPU come without it; what needs a GPU's kernels imports them where it runs them."""
    graph = import_graph(at_import_time=True)
    with_triton = {name for name, path in MODULES.items() if "triton" in imported(path.read_text())}
    while more := {name for name, others in graph.items() if others & with_triton} - with_triton:
        with_triton |= more
    assert {name for name in with_triton if not is_within(name, HOMES["triton"])} == set()


def test_imports_inside_functions_and_for_annotations_form_no_circle_either() -> None:
    graph = without_annotation_circles(import_graph(at_import_time=False))
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)


def test_a_circle_that_a_lazy_import_hides_is_found() -> None:
    graph = without_annotation_circles(import_graph(at_import_time=False))
    lazy = "def f():\n    from rollout.embedded.blocks import BlockStack"
    graph["rollout.embedded.kernels.library"] |= {name for name in imported(lazy) if name in MODULES}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("slime_spec.rl.loop", "from rollout.pool import Pool"),
        ("slime_spec.rl.loop", "def run():\n    import trainer_bridge.megatron.group"),
        ("rollout.pool", "from trainer_bridge import losses"),
        ("trainer_bridge.losses", "import rollout"),
        ("rollout.pool", "from slime_spec.launch.compose import compose"),
        ("rollout.pool", "from slime_spec import launch"),
        ("slime_spec.preflight.gather", "from slime_spec.launch.arguments import read_arguments"),
        ("slime_spec.rl.loop", "from slime_spec.bench.rows import Row"),
        ("rollout.pool", "from slime_spec.integrations.plugin import Plugin"),
        ("trainer_bridge.losses", "import megatron.core"),
        ("slime_spec.config.build", "from omegaconf import OmegaConf"),
        ("rollout.embedded.engine", "import ray"),
        ("slime_spec.metrics.jsonl", "if TYPE_CHECKING:\n    import wandb"),
    ],
)
def test_the_rules_catch_an_import_that_breaks_them(module: str, source: str) -> None:
    assert forbidden_imports(module, imported(source)) != set()


def test_the_cycle_check_sees_module_level_imports_and_not_lazy_ones() -> None:
    assert imported("class A:\n    import ray\nif X:\n    import wandb", at_import_time=True) == {"ray", "wandb"}
    assert imported("def f():\n    import ray\nif TYPE_CHECKING:\n    import wandb", at_import_time=True) == set()


@pytest.mark.parametrize("target", ["slime_spec", "slime_spec.config.tree", "slime_spec.launch.cli"])
def test_importing_the_package_and_its_configuration_loads_nothing_heavy(target: str) -> None:
    code = f"import {target}, sys; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert target in loaded
    assert not {"torch", "ray", "sglang", "megatron", "wandb", "hydra", "transformers"} & set(loaded)


def test_composing_a_configuration_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from slime_spec.launch.cli import main; code = main(['config']); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "batch_size: 8" in done.stdout
    assert not {"torch", "ray", "megatron", "wandb", "transformers"} & set(done.stderr.split())
