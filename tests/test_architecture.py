"""The rules of DESIGN.md sections 2, 3 and 6 that can be read off the source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_sgm"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "datamodules").rglob("*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
every_file = pytest.mark.parametrize("name", TREES)

FOUNDATION = {"processes", "networks", "random"}
MODELS = FOUNDATION | {"denoiser", "joint_denoiser", "linear_denoiser", "residual_denoiser", "codecs"}
# What each room may import of lightning_sgm besides itself; a new room needs a row. Imports point one way.
ALLOWED = {
    "random": set(),
    "processes": {"random"},
    "networks": {"random"},
    "denoiser": FOUNDATION,
    "joint_denoiser": FOUNDATION | {"denoiser"},
    "linear_denoiser": FOUNDATION | {"denoiser"},
    "residual_denoiser": FOUNDATION | {"denoiser"},
    "codecs": FOUNDATION,
    "tiles": set(),
    # A classifier that guides is given as a checkpoint.
    "guidance": MODELS | {"io.checkpoint"},
    "objectives": MODELS | {"guidance", "metrics"},
    "samplers": MODELS | {"guidance"},
    "likelihood": MODELS | {"guidance", "samplers"},
    "methods": MODELS | {"guidance", "objectives", "samplers", "likelihood", "metrics", "optimizers", "tiles"},
    "metrics": {"random"},
    # Pictures of series show the statistics that metrics take.
    "io": {"methods.base", "random", "metrics"},
    "io.released": MODELS | {"methods", "objectives", "samplers", "io", "recipes"},
    "callbacks": {"methods.base", "random", "io"},
    "trainer": {"callbacks", "io"},
    "optimizers": set(),
    "testing": MODELS | {"objectives", "samplers", "methods.base"},
    "recipes": set(),
    "messages": set(),
    "arguments": {"io", "messages", "recipes"},
    # Packages by their bare names are imported for the short class names of the command line only.
    "cli": {"arguments", "callbacks", "io", "messages", "methods.base", "optimizers", "trainer", "recipes"},
    "commands": {"messages"},
    "importing": {"commands", "io"},
    "exporting": {"commands", "io"},
    "__main__": {"cli", "exporting", "importing", "recipes"},
    "pipelines": {"io", "methods", "random", "samplers"},
    "__init__": {"methods", "networks", "pipelines", "trainer", "io"},
}
SHORT_NAMES = {"codecs", "guidance", "methods", "metrics", "networks", "objectives", "processes", "samplers"}
HEAVY = {"diffusers", "sklearn", "transformers", "tokenizers", "matplotlib", "pyarrow", "scipy", "torchdiffeq"}
HEAVY |= {"networkx", "datasets", "rdkit", "fcd_torch", "arch", "dm_control", "pandas"}


def imports(tree):
    """(module, node) of everything imported anywhere in a file, without relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if node.module == "lightning_sgm":
                yield from (
                    (f"lightning_sgm.{alias.name}" if is_module(alias.name) else node.module, node)
                    for alias in node.names
                )
            elif node.module is not None:
                yield node.module, node


def is_module(name):
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def room(name):
    """The row of ALLOWED of a file such as lightning_sgm/processes/gaussian.py."""
    parts = Path(name).with_suffix("").parts[1:]
    return "io.released" if parts[:2] == ("io", "released") else parts[0]


def inside(module, rooms):
    return any(module == allowed or module.startswith(f"{allowed}.") for allowed in rooms)


@every_file
def test_imports_point_one_way(name):
    ours = [module.partition(".")[2] for module, _ in imports(TREES[name]) if module.split(".")[0] == "lightning_sgm"]
    if name.startswith("datamodules/"):
        assert not ours, f"{name} imports lightning_sgm; datamodules stand alone"
        return
    assert room(name) in ALLOWED, f"{name} opens a new room: give it a row in {Path(__file__).name} and in DESIGN.md"
    allowed = ALLOWED[room(name)] | {room(name)}
    for module in filter(None, ours):
        short_names = room(name) == "cli" and module in SHORT_NAMES
        assert short_names or inside(module, allowed), (
            f"{name} imports lightning_sgm.{module}; {room(name)} may import {', '.join(sorted(allowed))}"
        )


@every_file
def test_only_the_import_command_knows_released_weights_and_the_command_line_datamodules(name):
    modules = {module for module, _ in imports(TREES[name])}
    if room(name) not in ("importing", "io.released"):
        assert not any(inside(module, {"lightning_sgm.io.released"}) for module in modules), f"{name} imports it"
    if name.startswith("lightning_sgm/") and room(name) not in ("cli", "__init__"):
        # What tokens, atoms, bonds and units of series mean is asked by all who write or judge them, and has one home.
        shared = {"datamodules.scaling"} if room(name) == "objectives" else set()
        if room(name) in ("io", "methods", "metrics"):
            shared = {"datamodules.tokenizers", "datamodules.chemistry", "datamodules.scaling"}
        if room(name) == "methods":  # which read what they are to complete
            shared.add("datamodules.series_files")
        if room(name) == "io.released":  # weights without the range of their data are given it by the data themselves
            shared = {"datamodules.series"}
        found = {module for module in modules if module.split(".")[0] == "datamodules"} - shared
        assert not found, f"{name} imports {', '.join(found)}"


@every_file
def test_heavy_libraries_are_imported_where_they_are_used(name):
    for node in TREES[name].body:
        found = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        if isinstance(node, ast.ImportFrom) and node.module:
            found = {node.module}
        heavy = {module.split(".")[0] for module in found} & HEAVY
        assert not heavy, (
            f"{name} line {node.lineno} imports {', '.join(heavy)} for everyone: move it into its function"
        )


@pytest.mark.parametrize("name", ["__init__", "__main__", "recipes", "commands", "importing", "exporting"])
def test_help_needs_the_standard_library_only(name):
    for node in TREES[f"lightning_sgm/{name}.py"].body:
        for module, _ in (
            imports(ast.Module(body=[node], type_ignores=[])) if isinstance(node, ast.Import | ast.ImportFrom) else ()
        ):
            light = module.split(".")[0] in sys.stdlib_module_names or module in (
                "lightning_sgm",
                "lightning_sgm.commands",
                "lightning_sgm.recipes",
            )
            assert light, f"lightning_sgm/{name}.py imports {module} before --help is answered"


# Randomness.

DRAWING = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
DRAWING |= {"rand_like", "randn_like", "randint_like", "dropout"}
IN_PLACE = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
SEEDING = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"}
SEEDING |= {"torch.default_generator.manual_seed", "random.seed"}


def dotted(node):
    """ "torch.randn" of such an expression; "?" stands for what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def calls(tree, function=""):
    """(call, name of the innermost function around it)."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Call):
            yield child, function
        yield from calls(child, child.name if isinstance(child, ast.FunctionDef) else function)


def offence(call, function, name):
    """What is wrong with a call, or nothing."""
    called = dotted(call.func)
    given = any(keyword.arg == "generator" for keyword in call.keywords)
    if called in SEEDING or called.endswith("seed_everything"):
        return "seeds"
    head, _, tail = called.rpartition(".")
    if called.startswith(("np.random.", "numpy.random.")):
        owned = ("default_rng", "Generator", "PCG64", "RandomState")  # none of them has a state that others share
        return "" if name.startswith("datamodules/") and tail in owned and call.args else "draws"
    if (head == "torch" and tail in DRAWING) or tail in IN_PLACE:
        # Parameters are initialised as torch's own layers are, from the default generator, which fit seeds once.
        initialises = name.startswith("lightning_sgm/networks/") and (function == "__init__" or head.endswith("init"))
        return "" if (given and not name.startswith("lightning_sgm/")) or initialises else "draws"
    return ""


@every_file
def test_all_randomness_comes_from_one_file(name):
    if name == "lightning_sgm/random.py":
        return
    for call, function in calls(TREES[name]):
        wrong = offence(call, function, name)
        assert not wrong, f"{name} line {call.lineno}: {dotted(call.func)} {wrong} by itself: use a Draw of random.py"
    modules = {module for module, _ in imports(TREES[name])}
    assert not modules & {"random", "secrets"}, f"{name} imports the standard library's random numbers"


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("torch.manual_seed(0)", True),
        ("x = torch.randn(3)", True),
        ("x = torch.rand_like(y)", True),
        ("x = np.random.rand(3)", True),
        ("x.normal_()", True),
        ("x = torch.randn(3, generator=g)", True),
        ("x = draw.normal((3,))", False),
        ("g = torch.Generator().manual_seed(3)", False),
    ],
)
def test_the_randomness_rule_itself(source, wrong):
    (found,) = {offence(call, f, "lightning_sgm/x.py") != "" for call, f in list(calls(ast.parse(source)))[:1]}
    assert found == wrong


# Docstrings.


def public(tree, prefix=""):
    """(name, node) of public classes, functions and methods, those inside functions left out."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


@every_file
def test_everything_public_says_what_it_is(name):
    tree = TREES[name]
    assert ast.get_docstring(tree), f"{name} has no docstring"
    for title, node in public(tree):
        assert ast.get_docstring(node), f"{name} line {node.lineno}: {title} has no docstring"
