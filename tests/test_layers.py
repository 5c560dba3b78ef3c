"""Imports point one way. Read from the source, so that no import has to succeed."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import kdlosses

ROOT = Path(kdlosses.__file__).resolve().parents[1]
LIBRARY = ROOT / "kdlosses"
RUNNER = ROOT / "kdrun"
SOURCES = sorted(LIBRARY.rglob("*.py"))


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"


def imports(node, *, at_import=False):
    """(module, names) of every import below a node.

    With ``at_import`` only those that run when the module is imported.
    """
    if isinstance(node, ast.Import):
        yield from ((alias.name, ()) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield node.module, tuple(alias.name for alias in node.names)
    elif at_import and (
        is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ):
        return
    else:
        for child in ast.iter_child_nodes(node):
            yield from imports(child, at_import=at_import)


def inner(path):
    """The kdlosses modules that a module imports, by the first name below the package."""
    found = set()
    for module, names in imports(parse(path)):
        if module == "kdlosses":
            found.update(names or {"kdlosses"})
        elif module.startswith("kdlosses."):
            found.add(module.split(".")[1])
    return found


ALLOWED = {
    "definition": set(),
    "divergence": {"definition"},
    "numerics": set(),
    "vocabulary": {"numerics"},
    "sources": {"numerics", "vocabulary"},
    "compressed": {"numerics", "sources"},
    "losses": {"definition", "divergence", "numerics"},
    "token_weight": {"definition"},
    "weights": {"definition", "token_weight", "weights"},
    "weight_registry": {"plugins", "registry", "token_weight"},
    "engine": {
        "engine",
        "compressed",
        "sources",
        "vocabulary",
        "divergence",
        "numerics",
        "token_weight",
    },
    "schedules": set(),
    "terms": {"divergence", "schedules"},
    "batch": {"engine", "compressed", "sources"},
    "token_loss": {
        "batch",
        "terms",
        "engine",
        "compressed",
        "sources",
        "divergence",
        "schedules",
        "token_weight",
    },
    "objective": {
        "token_loss",
        "token_weight",
        "batch",
        "compressed",
        "engine",
        "sources",
        "schedules",
    },
    "measures": {"token_loss", "engine", "compressed", "sources"},
    "loss_file": set(),
    "plugins": {"loss_file"},
    "layer_map": set(),
    "hidden_loss": {"definition"},
    "features": {"hidden_loss"},
    "feature_term": {"hidden_loss", "layer_map"},
    "feature_registry": {"feature_term", "hidden_loss", "layer_map", "plugins"},
    "registry": {
        "loss_file",
        "plugins",
        "divergence",
        "token_loss",
        "engine",
        "schedules",
        "terms",
    },
    "testing": {
        "testing",
        "definition",
        "losses",
        "numerics",
        "token_weight",
        "weight_registry",
        "feature_registry",
        "feature_term",
        "hidden_loss",
        "schedules",
        "divergence",
        "engine",
        "objective",
        "token_loss",
        "registry",
        "compressed",
        "sources",
    },
}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_only_the_layers_below(path):
    parts = module_name(path).split(".")
    if len(parts) == 1:
        return  # the package's names come from all layers
    assert parts[1] in ALLOWED, f"{parts[1]} has no place in the layering"
    assert inner(path) <= ALLOWED[parts[1]]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_the_library_depends_on_torch_and_pydantic_only(path):
    packages = {module.split(".")[0] for module, _ in imports(parse(path))}
    assert packages - set(sys.stdlib_module_names) <= {"torch", "pydantic", "kdlosses"}


def test_the_conformance_checks_need_pytest_only_when_asked_for_tests():
    code = "import sys, kdlosses; kdlosses.testing.checks_for; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name",
    [
        "__init__",
        "feature_registry",
        "layer_map",
        "loss_file",
        "plugins",
        "registry",
        "weight_registry",
    ],
)
def test_names_load_without_torch(name):
    modules = [module for module, _ in imports(parse(LIBRARY / f"{name}.py"), at_import=True)]
    assert modules
    light = {*sys.stdlib_module_names, "kdlosses"}
    assert {module.split(".")[0] for module in modules} <= light
    names = {module for module in modules if module.startswith("kdlosses")}
    light_ones = ("layer_map", "loss_file", "plugins", "registry")
    assert names <= {f"kdlosses.{module}" for module in light_ones}


@pytest.mark.parametrize("group", ["losses", "features", "weights"])
def test_every_loss_is_one_file_registered_by_one_line(group):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    registered = project["entry-points"][f"kdlosses.{group}"]
    files = {path.stem for path in (LIBRARY / group).glob("*.py")} - {"__init__"}
    assert set(registered) == files
    for name, target in registered.items():
        module, _, attribute = target.partition(":")
        assert module == f"kdlosses.{group}.{name}"
        tree = parse(LIBRARY / group / f"{name}.py")
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        assert classes == [attribute]


def test_every_procedure_is_one_file_registered_by_one_line_and_loads_without_torch():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    registered = project["entry-points"]["kdrun.procedures"]
    assert {"gkd", "seqkd", "distillm", "minillm", "distillm2"} <= set(registered)
    for name, target in registered.items():
        module, _, attribute = target.partition(":")
        assert module == f"kdrun.procedures.{name}"
        tree = parse(RUNNER / "procedures" / f"{name}.py")
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        assert classes == [attribute]
    names = ", ".join(f"'{name}'" for name in registered)
    code = (
        "import sys; from kdrun.procedures import get_procedure; "
        f"[get_procedure(name) for name in ({names})]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


RUNNER_SOURCES = sorted(RUNNER.rglob("*.py"))
# From the lowest: a module may import modules of its own wing and of those that stand before it.
WINGS = (
    "builtin",
    "config",
    "losses",
    "data",
    "models",
    "served",
    "cache",
    "evaluation",
    "procedures",
    "training",
    "run",
    "dry_run",
    "bench",
    "compare",
    "cli",
)
AT_THE_TOP = {"__init__", "__main__", "errors", "files", "paths", "quiet"}
# A configuration looks the defaults of a procedure up by its name, in the registry alone; registry
# and base know nothing of kdrun but its errors.
LOW = ("kdrun.procedures.base", "kdrun.procedures.registry")


def is_facade(path):
    """Whether a module only hands on the public names of a package."""
    return path.name == "__init__.py"


def kdrun_imports(path):
    """The kdrun modules that a module imports anywhere in it, also for type checking."""
    modules = {module_name(other) for other in RUNNER_SOURCES}
    found = set()
    for module, names in imports(parse(path)):
        for name in names or ("",):
            whole = f"{module}.{name}"
            target = whole if whole in modules else module
            if target.split(".")[0] == "kdrun":
                found.add(target)
    return found


def height(module):
    """Where a module stands; lower ones may be imported."""
    if module in LOW:
        return 0
    parts = module.split(".")
    if len(parts) == 1:
        return len(WINGS) + 1
    return -1 if parts[1] in AT_THE_TOP else WINGS.index(parts[1]) + 1


def test_few_modules_stand_at_the_top_of_kdrun():
    assert {path.stem for path in RUNNER.glob("*.py")} == AT_THE_TOP
    folders = {path.name for path in RUNNER.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == set(WINGS)


@pytest.mark.parametrize(
    "path", [path for path in RUNNER_SOURCES if not is_facade(path)], ids=module_name
)
def test_a_wing_imports_only_the_wings_below(path):
    module = module_name(path)
    if module == "kdrun.__main__":
        return
    above = {other for other in kdrun_imports(path) if height(other) > height(module)}
    if module in LOW:
        above -= set(LOW)
    assert not above


@pytest.mark.parametrize("root", [LIBRARY, RUNNER], ids=["kdlosses", "kdrun"])
def test_there_is_no_circle_of_imports(root):
    paths = {module_name(path): path for path in root.rglob("*.py") if not is_facade(path)}
    graph = {}
    for name, path in paths.items():
        targets = set()
        for module, names in imports(parse(path)):
            for each in (module, *(f"{module}.{name}" for name in names)):
                targets.add(each)
        graph[name] = targets & set(paths)
    graphlib.TopologicalSorter(graph).prepare()


def test_only_what_runs_a_whole_configuration_takes_one():
    """Below a run, functions take the sections or values that they need."""
    wings = {"config", "run", "dry_run", "compare", "cli"}
    takers = {
        module_name(path)
        for path in RUNNER_SOURCES
        for module, names in imports(parse(path))
        if "RunConfig" in names
    }
    takers.discard("kdrun")
    assert {module.split(".")[1] for module in takers} <= wings


def test_kdrun_uses_only_the_public_names():
    wrong = []
    for path in sorted(RUNNER.rglob("*.py")):
        tree = parse(path)
        for module, names in imports(tree):
            if module.startswith("kdlosses."):
                wrong.append(f"{module_name(path)} imports {module}")
            elif module == "kdlosses":
                wrong += [
                    f"{module_name(path)} imports {name} from kdlosses"
                    for name in names
                    if name not in kdlosses.__all__
                ]
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "kdlosses"
                and node.attr not in kdlosses.__all__
            ):
                wrong.append(f"{module_name(path)} uses kdlosses.{node.attr}")
    assert not wrong


def test_gradients_are_written_by_hand_only_for_chunks_and_across_the_vocabulary():
    found = []
    for path in [*SOURCES, *RUNNER.rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        found += [
            f"{module_name(path)}.{node.name}"
            for node in ast.walk(parse(path))
            if isinstance(node, ast.ClassDef)
            and any(ast.unparse(base).split(".")[-1] == "Function" for base in node.bases)
        ]
    names = ("_Pick", "_Highest", "_Whole", "_Together", "_ToEach")
    across = [f"kdlosses.vocabulary.{name}" for name in names]
    assert found == ["kdlosses.engine.chunked._Chunked", *across]


def test_all_public_names_exist():
    for name in kdlosses.__all__:
        assert getattr(kdlosses, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        kdlosses.nothing_like_it  # noqa: B018
