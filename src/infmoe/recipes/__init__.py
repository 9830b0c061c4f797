"""Recipes: each name, `size/variant`, stands for a whole training run.

    config = recipe("small/infinity")

Importing this package is cheap (no torch).
"""

from collections.abc import Callable

from infmoe.errors import unknown_name
from infmoe.recipes.paper import medium, small
from infmoe.recipes.tiny import tiny
from infmoe.recipes.variants import VARIANTS
from infmoe.train.config import RunConfig

SIZES: dict[str, Callable[[str], RunConfig]] = {"tiny": tiny, "small": small, "medium": medium}


def recipe_names() -> list[str]:
    """Every recipe, by size and then as the variants are listed."""
    return [f"{size}/{variant}" for size in SIZES for variant in VARIANTS]


def recipe(name: str) -> RunConfig:
    """The run of this name, validated.

    Raises:
        InfMoEError: an unknown name; suggests the nearest.
    """
    if name not in recipe_names():
        raise unknown_name("recipe", name, recipe_names())
    size, _, variant = name.partition("/")
    return SIZES[size](variant)


def describe_variant(name: str) -> str:
    """One line on what a recipe's variant is, for listings."""
    doc = VARIANTS[name.partition("/")[2]].__doc__ or ""
    return doc.strip().splitlines()[0]
