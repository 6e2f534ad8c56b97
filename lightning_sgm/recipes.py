"""Finds recipes: the YAML files of a checkout or of the installed package. Standard library only."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any


def folders() -> list[Path]:
    """Where recipes are looked for: ./recipes of the working directory, the checkout, the installed package."""
    package = Path(__file__).resolve().parent
    places = [Path.cwd() / "recipes", package.parent / "recipes", package / "recipes_data"]
    found: list[Path] = []
    for place in places:
        if place.is_dir() and place.resolve() not in [f.resolve() for f in found]:
            found.append(place)
    return found


def available() -> dict[str, Path]:
    """Recipes by name ("radd", "paper/radd_small_owt"), the first folder wins."""
    names: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.rglob("*.yaml")):
            names.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return names


def describe(path: Path) -> str:
    """First comment line of a recipe."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("#"):
                return line.lstrip("# ").strip()
            if line.strip():
                break
    return ""


def find(name: str) -> Path:
    """The file of a recipe given as a path, or as a name with or without ``recipes/`` and ``.yaml``.

    Raises:
        FileNotFoundError: naming the nearest recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    short = name.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml").removesuffix(".yml")
    recipes = available()
    if short in recipes:
        return recipes[short]
    near = difflib.get_close_matches(short, recipes, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`python -m lightning_sgm recipes` lists them."
    raise FileNotFoundError(f"no recipe or file {name!r}; {hint}")


class RecipeError(ValueError):
    """A recipe that cannot be used."""


def read(path: Path) -> dict[str, Any]:
    """The sections of a recipe's file.

    Raises:
        RecipeError: it is no YAML, or no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise RecipeError(f"{path} is no YAML{line}: {type(error).__name__}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is no recipe: it must hold sections such as model, data and trainer")
    return values


def chain(name: str, above: tuple[Path, ...] = ()) -> list[Path]:
    """The files of the recipe ``name`` (as :func:`find` takes it) and of those it builds on, the first base first.

    A ``base`` is a file beside the recipe, or anything that :func:`find` takes. ``above`` are those that led here.

    Raises:
        FileNotFoundError: no such recipe.
        RecipeError: a recipe that cannot be read, or is its own base.
    """
    beside = above[-1].parent / name if above else Path(name)
    path = beside if beside.is_file() else find(name)
    if path.resolve() in [other.resolve() for other in above]:
        raise RecipeError(f"{path} is its own base: {' -> '.join(map(str, [*above, path]))}")
    base = read(path).get("base")
    return [*(chain(str(base), (*above, path)) if base else []), path]


def content(name: str) -> dict[str, Any]:
    """Sections of a recipe, laid over those of the recipes it builds on; ``name`` as :func:`find` takes it.

    The command line merges the same files with its parser. The two agree unless a recipe changes the class of a part
    and the new class has arguments of the names that the old one was given: the parser keeps those.

    Raises:
        FileNotFoundError, RecipeError: see :func:`chain`.
    """
    values: dict[str, Any] = {}
    for path in chain(name):
        values = overlay(values, read(path))
    values.pop("base", None)
    return values


def overlay(values: Any, changes: Any) -> Any:
    """``values`` with ``changes`` over them, dicts key by key; arguments do not outlive a change of their class.

    A dict whose keys are no names is a value of its own, as for the command line.
    """
    if (
        not isinstance(values, dict)
        or not isinstance(changes, dict)
        or not all(isinstance(key, str) for key in changes)
    ):
        return changes
    if "class_path" in changes and changes["class_path"] != values.get("class_path"):
        return changes
    return {**values, **{key: overlay(values.get(key), change) for key, change in changes.items()}}


def listing() -> str:
    """One line per recipe: name and description."""
    recipes = available()
    width = max((len(name) for name in recipes), default=0)
    return "\n".join(f"{name:<{width}}  {describe(path)}" for name, path in recipes.items())
