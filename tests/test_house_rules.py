"""What the project asks of its own source: imports, sizes, names. Each rule is shown to fire when broken."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_elastic"

# A module may import from its own row and from the rows above it.
STRANGERS = {
    "adapters",
    "routing",
    "compression",
    "proxies",
    "training",
    "checkpoint",
}  # nor from one another
LAYERS = (
    {"errors", "late_imports", "files", "downloads", "kept_memory"},
    {"architecture", "counting"},
    {"space"},
    {"search"},
    {
        "layers", "quantgrid", "packed_format", "distillation", "least_squares", "models",
        "head_similarity", "head_merging", "stored_sizes",
    },
    {
        "families", "parts", "activation", "supernet", "declaration", "conversion", "importance", "costs", "streams",
        "fingerprints", "blocks", "routers", "routers_folder", "supernet_folder",
        "fusion",
    },
    STRANGERS,
    {"repair", "spaces"},
    {"tables"},
    {"cost_objectives"},
    {"objectives"},
    {"runtimes"},
    {"report", "pipeline", "testing"},
    {"evaluation"},
    {"commands"},
    {"hub", "reporting", "workers"},
    {"cli"},
)
OUTERMOST = set().union(*LAYERS[-5:])  # what may use the package as its users do
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_TENSORS = {"errors", "late_imports", "architecture", "counting", "space", "search"}
FORBIDDEN_FILES = {"utils.py", "util.py", "common.py", "base.py", "helpers.py", "misc.py"}
UNFINISHED = re.compile(
    r"\b(TODO|FIXME|XXX|HACK|placeholder|for now|stub(?:bed)?|not implemented yet|simplified version)\b", re.I
)
# Methods whose positional parameters are laid down by the library we subclass.
FOREIGN_SIGNATURES = {
    "forward", "backward", "compute_loss", "training_step", "prediction_step", "evaluation_loop",
    "sample_independent", "sample_relative", "after_trial", "__exit__", "update_layer",
}  # fmt: skip
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FRESH_GENERATORS = {"Random", "SystemRandom", "default_rng", "Generator", "SeedSequence", "PCG64"}


@dataclass(frozen=True)
class Source:
    """One file: its path relative to the package (``search/engine.py``) and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.path.removesuffix(".py").split("/"))

    @property
    def component(self) -> str:
        """Top-level module or package the file belongs to: ``search`` for ``search/engine.py``."""
        return self.parts[0]


Rule = Callable[[Source], Iterator[str]]


def package_sources() -> list[Source]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [Source(file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def imported_modules(source: Source) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported, also inside functions."""
    package = ("hf_elastic", *source.parts[:-1])
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_components(source: Source) -> Iterator[tuple[int, str]]:
    """Line and component of every import from hf_elastic; "" for the package itself."""
    for line, name in imported_modules(source):
        top, *rest = name.split(".")
        if top == "hf_elastic":
            yield line, rest[0] if rest and rest[0] in LEVEL else ""


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function, and whether it is a method that takes ``self`` or ``cls``."""
    methods = {
        member
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for member in owner.body
        if isinstance(member, FUNCTIONS) and "staticmethod" not in map(ast.unparse, member.decorator_list)
    }
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            yield node, node in methods


def imports_only_from_below(source: Source) -> Iterator[str]:
    here = source.component
    if here in ("__init__", "__main__"):
        return
    if here not in LEVEL:
        yield f"{source.path}: {here} has no place among the layers; give it one in DESIGN and in LAYERS"
        return
    for line, other in imported_components(source):
        where = f"{source.path}:{line}: {here} imports {other or 'hf_elastic itself'}"
        if other == here:
            continue
        if not other:
            if here not in OUTERMOST:
                yield where
        elif LEVEL[other] > LEVEL[here] or {here, other} <= STRANGERS:
            yield where


def search_needs_no_tensors(source: Source) -> Iterator[str]:
    if source.component in WITHOUT_TENSORS:
        for line, name in imported_modules(source):
            if name.split(".")[0] in ("torch", "transformers"):
                yield f"{source.path}:{line}: {source.component} imports {name}"


def only_adapters_import_peft(source: Source) -> Iterator[str]:
    for line, name in imported_modules(source):
        if name.split(".")[0] == "peft" and source.component != "adapters":
            yield f"{source.path}:{line}: only adapters import peft"


def models_travel_as_remote_code(source: Source) -> Iterator[str]:
    """Hugging Face copies the files that ``from .name import`` reaches, from one flat folder."""
    if source.component != "models":
        return
    if len(source.parts) != 2:
        yield f"{source.path}: hf_elastic/models is one flat folder"
    for node in ast.walk(source.tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.level
            and (node.level > 1 or "." in (node.module or "."))
        ):
            yield f"{source.path}:{node.lineno}: only `from .name import` reaches a copied file"
    if source.parts[-1] != "__init__":
        for node in ast.walk(source.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "hf_elastic" for name in names):
                yield f"{source.path}:{node.lineno}: hf_elastic is not installed where this file is copied to"


def files_are_short(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > 500:
        yield f"{source.path}: {lines} lines, at most 500"


def functions_are_short(source: Source) -> Iterator[str]:
    for node, _ in functions(source.tree):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body and (lines := (node.end_lineno or 0) - body[0].lineno + 1) > 60:
            yield f"{source.path}:{node.lineno}: {node.name} has {lines} lines, at most 60"


def depth_below(node: ast.AST) -> int:
    """Blocks nested below a node; ``elif`` is no deeper than its ``if``, an inner function starts anew."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth_below(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def nesting_is_shallow(source: Source) -> Iterator[str]:
    for node, _ in functions(source.tree):
        if (depth := depth_below(node)) > 3:
            yield f"{source.path}:{node.lineno}: {node.name} nests {depth} blocks, at most 3"


def few_parameters_are_positional(source: Source) -> Iterator[str]:
    for node, is_method in functions(source.tree):
        if is_method and node.name in FOREIGN_SIGNATURES:
            continue
        count = len(node.args.posonlyargs) + len(node.args.args) - is_method
        if count > 3:
            yield f"{source.path}:{node.lineno}: {node.name} has {count} positional parameters, at most 3"


def file_names_say_something(source: Source) -> Iterator[str]:
    if source.path.split("/")[-1] in FORBIDDEN_FILES:
        yield f"{source.path}: a name that could hold anything"


def nothing_is_unfinished(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if UNFINISHED.search(line):
            yield f"{source.path}:{number}: {line.strip()[:80]}"


def no_star_imports(source: Source) -> Iterator[str]:
    for line, name in imported_modules(source):
        if name.endswith(".*"):
            yield f"{source.path}:{line}: {name}"


def no_attribute_probing(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            yield f"{source.path}:{node.lineno}: hasattr"


def no_global_random_state(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            seeds_torch = name in ("torch.manual_seed", "torch.seed", "torch.random.manual_seed")
            shared = re.fullmatch(r"(random|(np|numpy)\.random)\.(\w+)", name)
            if seeds_torch or (shared and shared.group(3) not in FRESH_GENERATORS):
                yield f"{source.path}:{node.lineno}: {name} uses the state every library shares"


def name_clashes(sources: list[Source]) -> list[str]:
    """Functions and classes that share a name with a module: the later import would hide one of them."""
    modules = {part for source in sources for part in source.parts} - {"__init__", "__main__"}
    return [
        f"{source.path}:{node.lineno}: {node.name} is also a module"
        for source in sources
        for node in source.tree.body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name in modules
    ]


def lines_of(count: int, *, indent: str = "") -> str:
    return f"{indent}x = 1\n" * count


# Each rule with sources that break it once (and only it is asked).
BROKEN: dict[Rule, list[Source]] = {
    imports_only_from_below: [
        Source("space.py", "from .search import engine"),
        Source("errors.py", "from hf_elastic.space import Choice"),
        Source("layers.py", "def f():\n    from hf_elastic import supernet"),
        Source("costs.py", "import hf_elastic.training.rules"),
        Source("search/engine.py", "from ..objectives import loss"),
        Source("training/rules.py", "from ..checkpoint.record import Run"),
        Source("objectives.py", "from . import cli"),
        Source("supernet.py", "from hf_elastic import __version__"),
        Source("novelty.py", "x = 1"),
    ],
    search_needs_no_tensors: [
        Source("space.py", "import torch.nn as nn"),
        Source("search/results.py", "def f():\n    from transformers import AutoModel"),
    ],
    only_adapters_import_peft: [Source("supernet.py", "from peft.tuners import lora")],
    models_travel_as_remote_code: [
        Source("models/deep/modeling.py", "x = 1"),
        Source("models/modeling_x.py", "from ..space import Choice"),
        Source("models/modeling_x.py", "from . import configuration_x"),
        Source("models/modeling_x.py", "import hf_elastic"),
        Source("models/modeling_x.py", "from hf_elastic.space import Choice"),
    ],
    files_are_short: [Source("costs.py", lines_of(501))],
    functions_are_short: [Source("costs.py", 'def f():\n    """One."""\n' + lines_of(61, indent="    "))],
    nesting_is_shallow: [
        Source(
            "costs.py", "def f():\n for a in b:\n  if a:\n   with a:\n    try:\n     c\n    finally:\n     d"
        )
    ],
    few_parameters_are_positional: [
        Source("costs.py", "def f(a, b, c, d): ..."),
        Source("costs.py", "class A:\n    def f(self, a, b, c, d): ..."),
        Source("costs.py", "class A:\n    @staticmethod\n    def f(a, b, c, d): ..."),
        Source("costs.py", "def forward(a, b, c, d): ..."),
    ],
    file_names_say_something: [Source("search/utils.py", "x = 1")],
    nothing_is_unfinished: [Source("costs.py", "x = 1  # " + "TO" + "DO: later")],
    no_star_imports: [Source("costs.py", "from .layers import *")],
    no_attribute_probing: [Source("costs.py", "x = hasattr(y, 'z')")],
    no_global_random_state: [
        Source("costs.py", "import random\nrandom.shuffle(x)"),
        Source("costs.py", "np.random.rand(3)"),
        Source("costs.py", "torch.manual_seed(0)"),
    ],
}

WELL_BEHAVED = [
    Source("__init__.py", "from .cli import app\nfrom .space import Choice"),
    Source(
        "search/engine.py", "import optuna\nfrom ..space import Choice\nfrom .results import SearchResult"
    ),
    Source(
        "training/rules.py",
        "from ..supernet import Supernet\nfrom hf_elastic.space import Choice\nimport torch",
    ),
    Source("cli.py", "from hf_elastic import __version__\nfrom hf_elastic.checkpoint import export"),
    Source(
        "models/modeling_x.py",
        "import torch\nfrom transformers import BertModel\nfrom .configuration_x import X",
    ),
    Source("adapters/config.py", "from peft import LoraConfig"),
    Source("costs.py", lines_of(500)),
    Source(
        "costs.py", 'def f(a, b, c, *, d):\n    """One.\n\n    Two.\n    """\n' + lines_of(60, indent="    ")
    ),
    Source(
        "costs.py", "class A:\n    def forward(self, a, b, c, d): ...\n    def f(self, a, b, c, *, d): ..."
    ),
    Source("costs.py", "def f():\n if a: b\n elif c: d\n elif e: f\n elif g:\n  for h in i:\n   if j: k"),
    Source("costs.py", "rng = random.Random(0)\nrng.shuffle(x)\ng = np.random.default_rng(0)\ng.random()"),
]

RULES = list(BROKEN)


def name_of(rule: Rule) -> str:
    return rule.__name__


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_every_source_file_keeps_the_rule(rule: Rule) -> None:
    assert [complaint for source in package_sources() for complaint in rule(source)] == []


@pytest.mark.parametrize(
    ("rule", "source"), [(rule, source) for rule, sources in BROKEN.items() for source in sources]
)
def test_the_rule_fires_once_on_a_source_that_breaks_it(rule: Rule, source: Source) -> None:
    assert len(list(rule(source))) == 1


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_the_rule_is_silent_on_sources_that_keep_it(rule: Rule) -> None:
    assert [complaint for source in WELL_BEHAVED for complaint in rule(source)] == []


def test_no_function_or_class_shares_a_name_with_a_module() -> None:
    assert name_clashes(package_sources()) == []


def test_the_clash_of_names_is_found_across_files() -> None:
    sources = [
        Source("checkpoint/export.py", "x = 1"),
        Source("cli.py", "def export(): ...\ndef other(): ..."),
    ]
    assert name_clashes(sources) == ["cli.py:1: export is also a module"]


def test_the_rules_saw_the_package() -> None:
    assert {"errors.py", "space.py"} <= {source.path for source in package_sources()}
