"""The shape of the code base: import direction, size limits, forbidden names, public API."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from specdec.registry import _BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_ROOTS = ("specdec", "kernels", "draft_training", "integrations", "benchmarks")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8

# Folders of the core and its top-level modules, by floor: each imports from floors below its own.
FLOORS = (
    {"errors"},
    {"round", "sources", "hf", "caches"},
    {"audit", "stats", "method_options"},
    {"artifacts", "config", "contracts"},
    {"registry", "loop", "targets", "heads.eagle3", "demo"},
    {"loading", "cost", "heads.checkpoints"},
    {"heads"},
    {"drafters"},
    {"generate"},
    {"api"},
    {"cli"},
)
TRAINING = ROOT / "draft_training" / "specdec_training"
TRAINING_FLOORS = ("contracts", "data", "features", "objective", "run", "commands")
BENCH = ROOT / "benchmarks" / "specdec_bench"
BENCH_FLOORS = (
    {"output_files", "printable", "results", "rows", "default_arms"},
    {"arm_names", "tasks"},
    {"contracts"},
    {"checks", "summary"},
    {"paired", "report"},
    {"measure"},
    {"gate", "replay", "tune"},
)
# Side packages, and those of ours that each may import.
PACKAGES = {
    "specdec_kernels": set[str](),
    "specdec_integrations": {"specdec"},
    "specdec_training": {"specdec", "specdec_kernels"},
    "specdec_bench": {"specdec", "specdec_integrations"},
}
WITHOUT_TRANSFORMERS = ("round", "loop", "contracts", "stats", "registry", "generate/stop_rules")
WITHOUT_TORCH = ("sources", "errors")
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load"}
LEGACY_READER = "specdec/heads/checkpoints/legacy.py"  # restricted unpickling, for `convert` alone


def library_files() -> list[Path]:
    """Every library source file."""
    return sorted(p for root in PACKAGE_ROOTS for p in (ROOT / root).rglob("*.py"))


def module_name(path: Path) -> str:
    """Name below `specdec`, for example "drafters.base"; empty for the package itself."""
    parts = path.relative_to(ROOT / "specdec").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room(module: str) -> str:
    """Folder that a module is in, or itself at the top level."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "heads" and len(parts) > 2 else parts[0]


def floor_of(module: str) -> int:
    """Floor of a module's folder."""
    return next(index for index, rooms in enumerate(FLOORS) if room(module) in rooms)


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def specdec_imports(path: Path) -> set[str]:
    """Modules of the core that a file imports; packages that hold nothing do not count."""
    found = set()
    for name in imports(path):
        module = name.removeprefix("specdec.")
        place = ROOT / "specdec" / module.replace(".", "/")
        known = place.with_suffix(".py").exists() or module == "demo"
        if name.startswith("specdec.") and known:
            found.add(module)
    return found


CORE = [p for p in sorted((ROOT / "specdec").rglob("*.py")) if module_name(p)]


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    own = module_name(path)
    others = {name for name in specdec_imports(path) if room(name) != room(own)}
    wrong = {name for name in others if floor_of(name) >= floor_of(own)}
    assert not wrong, f"{own} imports {wrong}, which is on no floor below"


def training_folder(module: str) -> str:
    """Folder of the trainer that a module is in, or itself; empty for one of another package."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == TRAINING.name else ""


@pytest.mark.parametrize(
    "path", sorted(TRAINING.rglob("*.py")), ids=lambda p: str(p.relative_to(TRAINING))
)
def test_imports_of_the_trainer_go_down(path: Path) -> None:
    own = path.relative_to(TRAINING).with_suffix("").parts[0]
    below = TRAINING_FLOORS[: TRAINING_FLOORS.index(own)] if own != "__init__" else ()
    others = {training_folder(name) for name in imports(path)} - {"", own}
    assert others <= set(below), f"{path} imports {others - set(below)}, which is not below"


@pytest.mark.parametrize(
    "path", sorted(BENCH.rglob("*.py")), ids=lambda p: str(p.relative_to(BENCH))
)
def test_imports_of_the_harness_go_down(path: Path) -> None:
    own = path.relative_to(BENCH).with_suffix("").parts[0]
    if own == "__init__":
        return
    floor = next(at for at, folders in enumerate(BENCH_FLOORS) if own in folders)
    below = set().union(*BENCH_FLOORS[:floor])
    names = {name.removeprefix("specdec_bench.").split(".")[0] for name in imports(path)
             if name.startswith("specdec_bench.")}  # fmt: skip
    assert names - {own} <= below, f"{path} imports {names - {own} - below}, which is not below"


@pytest.mark.parametrize("package", PACKAGES)
def test_side_packages_import_only_what_is_below_them(package: str) -> None:
    ours = {"specdec", *PACKAGES}
    folder = next(ROOT.glob(f"*/{package}"))
    for path in folder.rglob("*.py"):
        others = {name.split(".")[0] for name in imports(path)} & ours - {package}
        assert others <= PACKAGES[package], f"{path} imports {others - PACKAGES[package]}"


def test_the_top_level_is_small() -> None:
    assert len(list((ROOT / "specdec").glob("*.py"))) <= 10
    rooms = {room(module_name(path)) for path in CORE}
    assert rooms == set().union(*FLOORS)


def trainer_name(path: Path) -> str:
    """Full name of one of the trainer's modules."""
    return ".".join(path.relative_to(TRAINING.parent).with_suffix("").parts)


def trainer_imports(path: Path) -> set[str]:
    """Modules of the trainer that a file imports, by their full names."""
    known = {trainer_name(other) for other in TRAINING.rglob("*.py")}
    return known & set(imports(path))


def test_no_import_cycles() -> None:
    graph = {module_name(path): specdec_imports(path) for path in CORE}
    graph |= {trainer_name(path): trainer_imports(path) for path in TRAINING.rglob("*.py")}

    def reach(start: str) -> set[str]:
        seen, queue = set(), [start]
        while queue:
            for target in graph.get(queue.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    queue.append(target)
        return seen

    assert [name for name in graph if name in reach(name)] == []


def test_drafters_never_import_each_other() -> None:
    drafters = ROOT / "specdec" / "drafters"
    for path in drafters.rglob("*.py"):
        method = path.relative_to(drafters).parts[0]
        others = {n for n in specdec_imports(path) if n.startswith("drafters.")}
        foreign = {name for name in others if not name.startswith(f"drafters.{method}.")}
        assert foreign <= {"drafters.row", "drafters.growth"}, path


def files_of(place: str) -> list[Path]:
    """The files of a folder or module of the core."""
    target = ROOT / "specdec" / place
    found = list(target.rglob("*.py")) if target.is_dir() else [target.with_suffix(".py")]
    assert found, place
    return found


@pytest.mark.parametrize("place", WITHOUT_TRANSFORMERS)
def test_core_does_not_know_transformers(place: str) -> None:
    for path in files_of(place):
        assert not [name for name in imports(path) if name.split(".")[0] == "transformers"], path


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_sources_do_not_know_torch(place: str) -> None:
    for path in files_of(place):
        assert not [name for name in imports(path) if name.split(".")[0] == "torch"], path


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", library_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_size_limits(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for function in functions(ast.parse(text)):
        assert function.end_lineno is not None
        lines = function.end_lineno - function.lineno + 1
        parameters = [*function.args.args, *function.args.kwonlyargs]
        counted = [a for a in parameters if a.arg not in ("self", "cls")]
        assert lines <= MAX_FUNCTION_LINES, f"{function.name} has {lines} lines"
        if "specdec_kernels" not in path.parts:  # kernels take what the device needs
            assert len(counted) <= MAX_PARAMETERS, f"{function.name} has {len(counted)} parameters"


@pytest.mark.parametrize("path", library_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_forbidden_calls(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {"pickle", "dill", "shelve"} & {name.split(".")[0] for name in imports(path)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load" and path == ROOT / LEGACY_READER:
                assert "weights_only=True" in map(ast.unparse, node.keywords)
            else:
                assert called not in FORBIDDEN_CALLS, ast.unparse(node)
            for keyword in node.keywords:
                switched_on = getattr(keyword.value, "value", None) is True
                assert not (keyword.arg in {"trust_remote_code", "shell"} and switched_on)


def test_only_convert_reads_legacy_weights() -> None:
    users = {p for p in library_files() if "specdec.heads.checkpoints.legacy" in set(imports(p))}
    assert users == {ROOT / "specdec" / "cli" / "heads.py"}


# Where methods are named as what they are: their files, their table, and declared defaults.
NAMED_METHODS = {
    "specdec/registry.py": "the table of methods",
    "specdec/config.py": "the default method",
    "specdec/drafters": "their own files",
    "specdec/heads": "eagle3 is a word of the file formats there",
    "draft_training": "the trainer of that kind of head",
    "benchmarks/training_throughput.py": "a word of another trainer's configuration",
    "benchmarks/specdec_bench/default_arms.py": "what is measured when nobody names arms",
}


@pytest.mark.parametrize("path", library_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_method_is_named_outside_its_own_file(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    if any(place == known or place.startswith(f"{known}/") for known in NAMED_METHODS):
        return
    names = set(_BUILT_IN) - {"none"}  # which is no method but the loop without one
    pattern = re.compile(rf"({'|'.join(names)})([:+].*)?")
    literals = {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not [text for text in literals if pattern.fullmatch(text)]


def test_public_api_is_small() -> None:
    import specdec

    assert len(specdec.__all__) <= 14
    assert all(hasattr(specdec, name) for name in specdec.__all__)


def test_side_folders_are_not_packages() -> None:
    for folder in (
        "kernels",
        "draft_training",
        "integrations",
        "benchmarks",
        "tests",
        "tests/kernels",
    ):
        assert not (ROOT / folder / "__init__.py").exists()


def test_import_opens_no_connection_and_needs_no_triton() -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise RuntimeError('network')\n"
        "socket.socket.connect = refuse\n"
        "sys.modules['triton'] = None\n"
        "import specdec, specdec.cli.main\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
