"""The house's floors: imports point down only, and nothing heavy comes along at run time."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "robust_mo"

# From the ground up; a module may import from its own floor's folder and from floors below.
FLOORS = [
    {"errors"},
    {"runs"},
    {"model", "data", "analysis", "processes", "slurm"},
    {"hosts"},
    {"training", "sampling"},
    {"command_line", "organisms"},
    {"evals"},
    {"configured"},
    {"train", "sample", "evaluate", "export"},
    {"study", "chat", "preflight"},
]


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(module: pathlib.Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(module: pathlib.Path):
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robust_mo"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("robust_mo."))


@pytest.mark.parametrize("module", modules(), ids=lambda m: str(m.relative_to(PACKAGE)))
def test_imports_point_down(module):
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    here = room(module)
    if here == "__init__":
        return
    assert here in floor, f"{here} has no floor: add it to FLOORS"
    for other in imported_rooms(module):
        allowed = other == here or floor[other] < floor[here]
        assert allowed, f"{here} imports {other}, which is not below it"


def test_every_library_that_is_imported_is_declared():
    """Where the tests run, torch and the rest bring much along that a user's environment does not have."""
    used = set()
    for module in modules():
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            used |= {name.split(".")[0] for name in names if name}
    # submitit is an extra, and slurm.py says so where it is missing.
    libraries = used - set(sys.stdlib_module_names) - {"robust_mo", "configs", "submitit"}
    providers = importlib.metadata.packages_distributions()

    def normal(name):
        return re.split(r"[\[<>=!~; ]", name)[0].lower().replace("_", "-")

    lists = {
        "pyproject.toml": tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["dependencies"],
        "requirements.txt": (PACKAGE.parent / "requirements.txt").read_text().splitlines(),
    }
    for file, lines in lists.items():
        declared = {normal(line) for line in lines}
        missing = {name for name in libraries if not declared & {normal(d) for d in providers.get(name, [name])}}
        assert not missing, f"{file} does not list {missing}"


def test_every_module_opens_with_its_contract():
    for module in modules():
        if module.name == "__init__.py" and module.parent != PACKAGE:
            continue
        docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
        assert docstring, f"{module} has no docstring"


def heavy(statement: str, forbidden: tuple[str, ...]) -> list[str]:
    program = f"import sys; {statement}; print(*(m for m in {forbidden!r} if m in sys.modules))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_programs_run_without_torch_and_tensorflow():
    programs = ("train", "sample", "evaluate", "export", "study", "chat", "preflight")
    everything = "; ".join(f"import robust_mo.{program}" for program in programs)
    assert heavy(everything, ("torch", "tensorflow")) == []


def test_analysis_reads_records_without_jax():
    assert (
        heavy("import robust_mo.analysis.report, robust_mo.runs", ("jax", "torch", "flax", "matplotlib.pyplot")) == []
    )


def test_the_core_needs_only_what_a_bare_accelerator_machine_has():
    core = (
        "import robust_mo.model.hugging_face, robust_mo.sampling.sampler, robust_mo.training.step, "
        "robust_mo.training.optimizers"
    )
    extra = ("grain", "datasets", "gguf", "tensorboard", "ml_collections", "math_verify", "matplotlib")
    assert heavy(core, extra) == []
