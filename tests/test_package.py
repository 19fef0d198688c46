"""Rules that hold for the package as a whole: what may import what, what importing costs, how code is written."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "scdlkit"
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(SOURCE.rglob("*.py"))
}  # "" is scdlkit itself, "pl" a package, "pl._style" a module

# Imports go down this list, or stay within one entry. Entries are modules, or folders with all that is in them.
LAYERS = """
    cli _demo tl pl pp get
    runner _fitted _recipes _saved _state _prepared _prediction _cluster _label_tables _cell_files _unfinished _stream _reader inspection _labels _annotation _run_config
    foundation.bundle foundation.export foundation.label_efficiency foundation.repeated foundation._summary foundation.comparison
    foundation.recommendation foundation.intervals foundation.metrics foundation.calibration
    foundation._one_fit foundation._run_state
    foundation.training foundation._fit foundation._graphs foundation._adamw foundation._compiled foundation._training_state foundation._preflight
    foundation.lower_states foundation.embedding_cache foundation.disk_cache foundation.known_cells foundation.confounding foundation.plan foundation.folds foundation.splits
    foundation._split_checks foundation._group_splits foundation.strategies
    foundation.inference
    foundation.weights foundation.frozen_cuda foundation.frozen foundation.model foundation._block_steps foundation._triton foundation._layer_norm_triton foundation._block_cuda foundation._block_triton
    foundation.batching foundation._packed
    foundation._packed_linear foundation._attention foundation._frozen_kernels foundation._fused_attention foundation._cell_attention
    foundation._attention_kernels foundation._lanes foundation._vector_math
    foundation._low_rank foundation._dropout foundation._linear foundation._layer_norm
    foundation.stored_tokens foundation.row_file foundation.tokens
    foundation._binning foundation._distinct foundation._prefetch
    foundation.expression_rows foundation.expression foundation._candidates foundation.matrices foundation.vocabulary foundation.gene_match foundation.gene_names
    foundation.checkpoints foundation._download foundation._lock foundation._memory
    foundation._device foundation._overlap foundation._processes foundation._random
    _optional _keys _settings
""".split()
# These two only gather names, and load what they gather when it is asked for.
FACADES = ("", "foundation")

KNOW_ANNDATA = {
    *"cli _demo tl pl pp get runner _fitted _prepared _prediction _cell_files _reader inspection _labels _annotation".split(),
    *"foundation.expression foundation._candidates".split(),
}
KNOW_NETWORK = {"foundation.checkpoints", "foundation._download"}
KNOW_PEFT = {"foundation.strategies"}
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "pooch", "requests", "socket", "urllib", "urllib3"}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def nodes(module: str) -> Iterator[ast.AST]:
    return ast.walk(tree(module))


def layer(module: str) -> str | None:
    """The entry of LAYERS that a module belongs to."""
    return next((entry for entry in LAYERS if module == entry or module.startswith(f"{entry}.")), None)


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Absolute names that a module imports, at the top or inside functions, with their lines; not for types alone."""
    package = ["scdlkit", *module.split(".")] if module else ["scdlkit"]
    if FILES[module].name != "__init__.py":
        package.pop()
    for_types = {
        inner
        for node in nodes(module)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in nodes(module):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def own_imports(module: str) -> Iterator[tuple[str, int]]:
    """The modules of this package that a module imports."""
    for name, line in imports(module):
        if name.split(".")[0] == "scdlkit":
            target = name.removeprefix("scdlkit").lstrip(".")
            while target not in FILES:
                target = target.rpartition(".")[0]
            yield target, line


def external_imports(module: str) -> Iterator[tuple[str, int]]:
    return ((name.split(".")[0], line) for name, line in imports(module) if name.split(".")[0] != "scdlkit")


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute of a name; empty for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def calls(module: str) -> Iterator[ast.Call]:
    return (node for node in nodes(module) if isinstance(node, ast.Call))


# Architecture


def test_every_module_has_a_place():
    homeless = [module for module in FILES if module not in FACADES and layer(module) is None]
    assert not homeless, f"give these a place in LAYERS: {homeless}"
    assert not [entry for entry in LAYERS if entry not in FILES], "LAYERS names modules that do not exist"


def test_imports_point_one_way():
    upwards = [
        f"{module}:{line} imports {target or 'scdlkit'}"
        for module in FILES
        if module not in FACADES and layer(module)
        for target, line in own_imports(module)
        if layer(target) is None or LAYERS.index(layer(target)) < LAYERS.index(layer(module))
    ]
    assert not upwards


def test_anndata_is_known_outside_of_the_engine_alone():
    strangers = []
    for module in FILES:
        if {module, layer(module)} & KNOW_ANNDATA:
            continue
        for node in nodes(module):
            named = getattr(node, "id", getattr(node, "attr", getattr(node, "arg", None)))
            if named in {"AnnData", "adata"}:
                strangers.append(f"{module}:{node.lineno} {named}")
        strangers += [f"{module}:{line}" for name, line in external_imports(module) if name == "anndata"]
    assert not strangers


@pytest.mark.parametrize(("packages", "allowed"), [(NETWORK, KNOW_NETWORK), ({"peft"}, KNOW_PEFT)])
def test_packages_have_their_place(packages, allowed):
    strangers = [
        f"{module}:{line} imports {name}"
        for module in FILES
        if layer(module) not in allowed
        for name, line in external_imports(module)
        if name in packages
    ]
    assert not strangers


# How code is written


def test_annotations_are_never_evaluated():
    """Every module that has code begins with the future import."""
    without = []
    for module in FILES:
        body = [node for node in tree(module).body if not isinstance(getattr(node, "value", None), ast.Constant)]
        if body and ast.unparse(body[0]) != "from __future__ import annotations":
            without.append(module)
    assert not without


def test_neither_print_nor_assert():
    found = [
        f"{module}:{call.lineno} print" for module in FILES for call in calls(module) if dotted(call.func) == "print"
    ]
    found += [f"{m}:{node.lineno} assert" for m in FILES for node in nodes(m) if isinstance(node, ast.Assert)]
    assert not found


def test_nothing_is_unpickled():
    """A checkpoint or a saved model from a stranger must not run code."""
    found = []
    for module in FILES:
        for call in calls(module):
            name, given = dotted(call.func), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if (
                name in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load"}
                or re.fullmatch(r"(pickle|dill|cloudpickle|marshal|shelve)\.\w+", name)
                or (name == "torch.load" and given.get("weights_only") != "True")
                or given.get("allow_pickle", "False") != "False"
            ):
                found.append(f"{module}:{call.lineno} {ast.unparse(call)}")
    assert not found


NUMPY_LOCAL = {"default_rng", "Generator", "SeedSequence", "BitGenerator", "PCG64", "Philox"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
TENSOR_DRAWS = {
    *"normal_ uniform_ random_ bernoulli_ exponential_ trunc_normal_ orthogonal_".split(),
    *"xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_".split(),
}


def test_no_global_randomness():
    """Draws come from a local generator: results must not depend on what ran before."""
    found = []
    for module in FILES:
        forked = {
            inner
            for node in nodes(module)
            if isinstance(node, ast.With) and any("fork_rng(" in ast.unparse(item) for item in node.items)
            for inner in ast.walk(node)
        }
        for node in nodes(module):
            name = dotted(node) if isinstance(node, ast.Attribute) else ""
            parts = name.split(".")
            if parts[:2] in (["np", "random"], ["numpy", "random"]) and len(parts) > 2 and parts[2] not in NUMPY_LOCAL:
                found.append(f"{module}:{node.lineno} {name}")
            if parts[0] == "random" and len(parts) > 1 and parts[1] != "Random":
                found.append(f"{module}:{node.lineno} {name}")
        for call in calls(module):
            name, own = dotted(call.func), {keyword.arg for keyword in call.keywords} & {"generator"}
            if parts_of_torch(name) in {"manual_seed", "seed"} and call not in forked:
                found.append(f"{module}:{call.lineno} {name} outside of fork_rng")
            if parts_of_torch(name) in TORCH_DRAWS and not own:
                found.append(f"{module}:{call.lineno} {name} without generator=")
            if isinstance(call.func, ast.Attribute) and call.func.attr in TENSOR_DRAWS and not own:
                found.append(f"{module}:{call.lineno} {call.func.attr} without generator=")
    assert not found


def parts_of_torch(name: str) -> str:
    """``seed`` of ``torch.seed``, ``torch.random.seed`` and ``torch.cuda.seed``; empty for anything else."""
    return name.rpartition(".")[2] if re.fullmatch(r"torch\.((random|cuda|mps)\.)?\w+", name) else ""


# What importing costs, and life without the extra


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "SCDLKIT_"))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=120
    )


HEAVY = "torch peft accelerate transformers scanpy anndata sklearn numba matplotlib.pyplot requests pooch"


def test_import_is_light():
    result = run_python(f"import sys, scdlkit; print(*[name for name in {HEAVY.split()} if name in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_checks_results_and_figures_import_no_torch():
    code = "import sys, scdlkit as sk; sk.pp, sk.get, sk.pl, sk.foundation; print('torch' in sys.modules, 'peft' in sys.modules)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "call",
    [
        "sk.tl.embed(adata, checkpoint=golden, device='cpu', progress=False)",
        "sk.tl.adapt_annotation(adata, 'cell_type', checkpoint=golden, device='cpu', progress=False)",
    ],
    ids=["embed", "adapt_annotation"],
)
def test_without_compiling_no_compiler_is_imported(call):
    """PyTorch's, which takes seconds and comes along with many a function; nor scanpy, which its users have already."""
    code = f"""
import json, sys
import numpy as np, pandas as pd, anndata as ad
import scdlkit as sk
golden = {str(ROOT / "tests" / "data" / "golden" / "flash_keys")!r}
genes = [name for name in json.load(open(golden + "/vocab.json")) if name[0] != "<"][:300]
counts = np.random.default_rng(0).poisson(1.0, (60, len(genes))).astype(np.float32)
obs = pd.DataFrame({{"cell_type": ["T cell", "B cell", "monocyte"] * 20}}, index=[f"cell{{i}}" for i in range(60)])
adata = ad.AnnData(counts, obs, var=pd.DataFrame(index=genes))
{call}
print("torch" in sys.modules, "torch._dynamo" in sys.modules, "scanpy" in sys.modules)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-3:] == ["True", "False", "False"]


# torch and its kin are on no path that the import system looks at, as in an environment without them.
WITHOUT_EXTRA = f"""
import json
from importlib.machinery import PathFinder
from pathlib import Path

find_spec = PathFinder.find_spec
hidden = "torch peft accelerate safetensors transformers".split()
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] in hidden else find_spec(name, path, target)
)

import numpy as np
import pandas as pd
from anndata import AnnData

import scdlkit as sk

golden = {str(ROOT / "tests" / "data" / "golden" / "flash_keys")!r}
genes = [name for name in json.loads(Path(golden, "vocab.json").read_text()) if name[0] != "<"][:300]
adata = AnnData(
    np.random.default_rng(0).poisson(1.0, (60, len(genes))).astype(np.float32),
    obs=pd.DataFrame(dict(cell_type=["B", "T"] * 30), index=list(map("cell{{}}".format, range(60)))),
    var=pd.DataFrame(index=genes),
)
"""


def test_without_the_extra_data_can_be_checked():
    code = """
print(sk.pp.inspect_annotation_data(adata, checkpoint=golden).to_dict()["n_cells"])
sk.pp.tokenize(adata, checkpoint=golden)
print(adata.layers["scgpt_bins"].shape[0], len(sk.foundation.list_checkpoints()) > 1)
sk.get, sk.pl
"""
    result = run_python(WITHOUT_EXTRA + code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["60", "60", "True"]


@pytest.mark.parametrize(
    "call",
    [
        "sk.tl.adapt_annotation(adata, label_key='cell_type', checkpoint=golden)",
        "sk.tl.predict(adata, 'model')",
        "sk.tl.embed(adata, checkpoint=golden)",
        "sk.adapt_annotation(adata, label_key='cell_type', checkpoint=golden)",
        "sk.AnnotationRunner('cell_type', checkpoint=golden)",
        "sk.foundation.load_encoder(golden)",
    ],
)
def test_without_the_extra_the_error_names_it(call):
    code = f"""
try:
    {call}
except ImportError as error:
    print(error)
"""
    result = run_python(WITHOUT_EXTRA + code)
    assert result.returncode == 0, result.stderr
    assert 'pip install "scdlkit[foundation]"' in result.stdout


# What stands in several places says the same


def readme_commands() -> dict[str, str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^<!-- command: (\w+) -->\n+```bash\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", ["demo", "test"])
def test_ci_reads_the_command_of_the_readme(name):
    script = ROOT / ".ci" / "run"
    shown = subprocess.run(["bash", script, "--show", name], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == readme_commands()[name]
    assert "-c constraints.txt" in shown


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "test_command=$(readme_command test)" in script
    assert 'bash -euo pipefail -c "$test_command"' in script
    assert "pytest" in readme_commands()["test"]


def test_every_benchmark_is_in_the_list_and_writes_the_common_file():
    listed = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert scripts.keys() == set(re.findall(r"^\| `(bench_\w+\.py)", listed, re.MULTILINE))
    assert [name for name, text in scripts.items() if "write_report(" not in text] == []


def test_every_dependency_has_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {normalised(name): Version(number) for name, number in (x.split("==") for x in lines if x[:1] != "#")}
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["foundation"],
        *[entry for group in project["dependency-groups"].values() for entry in group if isinstance(entry, str)],
    ]
    for requirement in map(Requirement, wanted):
        assert tested[normalised(requirement.name)] in requirement.specifier, requirement
    assert tested["torch"] == Version("2.13.0")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in citation
    assert project["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_documentation_lists_every_public_name():
    import scdlkit as sk

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {*re.findall(r"^   ([\w.]+)$", text, re.MULTILINE)}
    public = {
        f"{part}.{name}" for part in ("pp", "tl", "get", "pl", "foundation") for name in getattr(sk, part).__all__
    }
    assert public - listed == set()
    short = {"adapt_annotation", "inspect_annotation_data", "settings", "pp", "tl", "get", "pl", "foundation"}
    assert set(sk.__all__) - short - listed == set()
