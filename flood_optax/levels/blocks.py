"""Which examples are held out together: whole groups, and a share of every class."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flood_optax.checks import check_that


def check_known(call: str, key: Any, groups: Any, stratify: Any) -> None:
    """Demands that the folds can be made while tracing."""
    rule = "be known where `groups` or `stratify` are given"
    got = "a tracer: call it outside of `jax.jit`"
    for name, one in (("key", key), ("groups", groups), ("stratify", stratify)):
        known = not isinstance(one, Tracer)
        check_that(known, f"{call}({name}=...)", rule, got, error=TypeError)


def assigned(
    call: str, groups: Any, stratify: Any, order: np.ndarray, num_folds: int
) -> list[jax.Array]:
    """The indices of each fold; the random order breaks ties, and is theirs within."""
    num_examples = len(order)
    group, _ = numbered(f"{call}(groups=...)", groups, num_examples)
    label, names = numbered(f"{call}(stratify=...)", stratify, num_examples)
    if groups is None:
        # Dealt out class by class, in one round over the folds: no two differ by more
        # than one example, neither in a class nor in all.
        fold = np.empty(num_examples, int)
        by_class = order[np.argsort(label[order], kind="stable")]
        fold[by_class] = np.arange(num_examples) % num_folds
    else:
        number = int(group.max()) + 1
        rule = f"be at most the number of groups, {number}"
        check_that(num_folds <= number, f"{call}(num_folds=...)", rule, num_folds)
        counts = np.zeros((number, len(names)), int)
        np.add.at(counts, (group, label), 1)
        of_group = _spread(counts, num_folds, group[order])
        if stratify is None:
            of_group = _evened(of_group, counts[:, 0], num_folds)
        fold = of_group[group]
    if stratify is not None:
        _check_classes(call, fold, label, names, num_folds)
    return [jnp.asarray(order[fold[order] == k], jnp.int32) for k in range(num_folds)]


def numbered(call: str, given: Any, length: int) -> tuple[np.ndarray, list[Any]]:
    """Each entry's number among the different ones, and these."""
    if given is None:
        return np.zeros(length, int), [None]
    if not isinstance(given, list | tuple):
        array = np.asarray(given)
        rule = "have one axis, with an entry per example"
        check_that(array.ndim == 1, call, rule, f"shape {array.shape}")
        given = array.tolist()
    rule = f"have an entry for each of the {length} examples"
    check_that(len(given) == length, call, rule, len(given))
    numbers: dict[Any, int] = {}
    found = np.array([numbers.setdefault(one, len(numbers)) for one in given])
    alike = all(one == one for one in numbers)  # noqa: PLR0124, as NaN is not
    check_that(alike, call, "not be NaN", "one, which is equal to nothing")
    return found, list(numbers)


def _spread(counts: np.ndarray, num_folds: int, shuffled: np.ndarray) -> np.ndarray:
    """The fold of each group of counts [groups, classes]; the order breaks ties.

    Large groups first, each into the fold that holds least of its classes, every class
    measured by its own size: with one class, the smallest fold.
    """
    total = counts.sum(axis=0)
    held = np.zeros((num_folds, len(total)))
    sizes = counts.sum(axis=1)
    _, first = np.unique(shuffled, return_index=True)
    fold = np.empty(len(counts), int)
    for group in np.lexsort((first, -sizes)):
        share = counts[group] / np.maximum(total, 1) ** 2
        fold[group] = np.lexsort((held.sum(axis=1), held @ share))[0]
        held[fold[group]] += counts[group]
    return fold


def _evened(fold: np.ndarray, sizes: np.ndarray, num_folds: int) -> np.ndarray:
    """Moves or swaps groups of the largest and the smallest fold while it helps."""
    while True:
        held = np.bincount(fold, sizes, num_folds)
        large, small = held.argmax(), held.argmin()
        gap = held[large] - held[small]
        out, out_at = np.unique(np.where(fold == large, sizes, 0), return_index=True)
        back, back_at = np.unique(np.where(fold == small, sizes, 0), return_index=True)
        moved = out[:, None] - back  # a size of 0 is no group
        left = np.where((moved > 0) & (moved < gap), abs(gap - 2 * moved), np.inf)
        i, j = np.unravel_index(left.argmin(), left.shape)
        if left[i, j] == np.inf:
            return fold
        fold[out_at[i]] = small
        if back[j]:
            fold[back_at[j]] = large


def _check_classes(
    call: str, fold: np.ndarray, label: np.ndarray, names: list[Any], num_folds: int
) -> None:
    """Demands that the rest of every fold holds every class."""
    rule = "leave every class in the rest of every fold"
    why = "all its examples are one group, or one example"
    remedy = " Take them out, or merge classes."
    for k in range(num_folds):
        missing = set(range(len(names))) - set(label[fold != k].tolist())
        got = f"class {names[min(missing, default=0)]!r} in fold {k} alone: {why}"
        check_that(not missing, f"{call}(stratify=...)", rule, got, remedy)
