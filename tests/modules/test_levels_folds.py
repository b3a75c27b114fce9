"""What models say of examples that they never saw, against closed forms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from flood_optax import levels
from flood_optax.levels.blocks import assigned

vmap_or_not = pytest.mark.parametrize("vmap", [False, True])
KEY = jax.random.key(3)


@pytest.mark.parametrize(("n", "folds"), [(12, 3), (11, 3), (5, 5), (7, 2)])
def test_held_out_losses_cut_the_data_into_folds(n, folds):
    seen = []

    def fit(train, key):
        return np.asarray(train), jax.random.key_data(key)

    def evaluate(model, indices):
        train, key = model
        seen.append((train, np.asarray(indices), np.asarray(key)))
        return indices.astype(jnp.float32) + 0.5

    losses = levels.held_out_losses(fit, evaluate, n, num_folds=folds, key=KEY)
    # entry i is that of example i, whatever the permutation
    np.testing.assert_array_equal(losses, np.arange(n) + 0.5)
    sizes = {len(held_out) for _, held_out, _ in seen}
    assert len(seen) == folds
    assert sizes <= {n // folds, -(-n // folds)}
    for train, held_out, _ in seen:
        np.testing.assert_array_equal(
            np.sort(np.concatenate([train, held_out])), np.arange(n)
        )
    blocks = np.concatenate([held_out for _, held_out, _ in seen])
    assert (np.sort(blocks) == np.arange(n)).all()
    assert (blocks != np.arange(n)).any(), "the data are not shuffled"
    assert len({key.tobytes() for _, _, key in seen}) == folds


def regression(n=12, d=3):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(n, d))
    y = x @ np.arange(1.0, d + 1) + 0.3 * rng.normal(size=n)
    return jnp.asarray(x), jnp.asarray(y)


def least_squares(x, y):
    @jax.jit
    def solved(indices):
        return jnp.linalg.solve(x[indices].T @ x[indices], x[indices].T @ y[indices])

    def fit(indices, key):
        del key
        return solved(indices)

    @jax.jit
    def evaluate(w, indices):
        return (y[indices] - x[indices] @ w) ** 2

    return fit, evaluate


@vmap_or_not
@pytest.mark.usefixtures("x64")
def test_held_out_losses_leaving_one_out_equal_the_closed_form(vmap):
    # PRESS: the residual left out is the residual over one minus the leverage
    x, y = regression()
    losses = levels.held_out_losses(
        *least_squares(x, y), 12, num_folds=12, key=jax.random.key(0), vmap=vmap
    )
    hat = x @ np.linalg.solve(x.T @ x, x.T)
    expected = ((y - hat @ y) / (1 - np.diag(hat))) ** 2
    np.testing.assert_allclose(losses, expected, rtol=1e-10)


def test_held_out_losses_vmapped_are_one_program_with_the_same_folds():
    fit, evaluate = least_squares(*regression())
    run = functools.partial(
        levels.held_out_losses,
        evaluate=evaluate,
        num_examples=12,
        num_folds=4,
        key=jax.random.key(5),
    )
    chex.clear_trace_counter()
    together = run(chex.assert_max_traces(fit, n=1), vmap=True)
    one_by_one = run(fit)
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda: run(fit))(), together, atol=1e-5)
    np.testing.assert_array_equal(run(fit), one_by_one)  # by the key alone
    assert (run(fit, key=jax.random.key(2)) != one_by_one).any()


@vmap_or_not
@pytest.mark.parametrize(
    "compile_",
    [pytest.param(lambda f: f, marks=pytest.mark.slow, id="eager"), jax.jit],
)
def test_held_out_losses_pass_the_check_of_key_reuse(vmap, compile_):
    def losses(key):
        return levels.held_out_losses(
            lambda indices, key: jax.random.normal(key),
            lambda noise, indices: noise + indices,
            6,
            num_folds=3,
            key=key,
            vmap=vmap,
        )

    expected = losses(jax.random.key(4))
    with jax.debug_key_reuse(True):
        found = compile_(losses)(jax.random.key(4))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@vmap_or_not
@pytest.mark.usefixtures("x64")
def test_held_out_losses_give_int32_indices_with_64_bit_types(vmap):
    seen = []

    def evaluate(train, indices):
        seen.extend([train.dtype, indices.dtype])
        return indices * 1.0

    losses = levels.held_out_losses(
        lambda indices, key: indices,
        evaluate,
        6,
        num_folds=2,
        key=jax.random.key(0),
        vmap=vmap,
    )
    assert set(seen) == {np.dtype(np.int32)}
    np.testing.assert_array_equal(losses, np.arange(6.0))


def test_held_out_losses_take_a_model_that_is_not_of_jax():
    x = np.linspace(-1, 1, 20)[:, None]
    y = (x[:, 0] > 0).astype(int)
    y[3] = 1  # the one wrong label

    def fit(indices, key):
        del key
        return LogisticRegression(C=10.0).fit(x[indices], y[indices])

    def evaluate(model, indices):
        return -model.predict_log_proba(x[indices])[np.arange(len(indices)), y[indices]]

    losses = levels.held_out_losses(
        fit, evaluate, 20, num_folds=5, key=jax.random.key(0)
    )
    assert losses.argmax() == 3


@vmap_or_not
def test_held_out_takes_any_tree_of_arrays_by_example(vmap):
    x = jnp.arange(10.0)

    def fit(indices, key):
        return x[indices].sum()

    def evaluate(total, indices):
        probs = jnp.stack([x[indices], total + 0 * x[indices], -x[indices]], axis=1)
        return {"probs": probs, "own": (indices, x[indices] > 4)}

    found = levels.held_out(fit, evaluate, 10, num_folds=5, key=KEY, vmap=vmap)
    np.testing.assert_array_equal(found["own"][0], np.arange(10))
    assert found["own"][0].dtype == np.int32
    np.testing.assert_array_equal(found["own"][1], np.arange(10) > 4)
    np.testing.assert_array_equal(found["probs"][:, 0], x)
    # What is left of 45 without the two that were held out together.
    rest = 45 - np.asarray(found["probs"][:, 1])
    partners = rest - np.arange(10)
    np.testing.assert_array_equal(rest[partners.astype(int)], rest)
    assert sorted(partners) == list(range(10))
    losses = levels.held_out_losses(
        fit, lambda model, i: x[i], 10, num_folds=5, key=KEY, vmap=vmap
    )
    np.testing.assert_array_equal(losses, x)


# Groups and classes


def blocks_of(n, folds, **given):
    """The blocks that are held out, and the rests, as sets of rows by fold."""
    seen = []

    def fit(indices, key):
        del key
        return np.asarray(indices)

    def evaluate(rest, indices):
        seen.append((np.asarray(indices), rest))
        return indices

    given = {"key": jax.random.key(3)} | given
    found = levels.held_out(fit, evaluate, n, num_folds=folds, **given)
    np.testing.assert_array_equal(found, np.arange(n))
    for block, rest in seen:
        assert sorted([*block, *rest]) == list(range(n))
    return [block for block, _ in seen]


def test_folds_without_groups_and_classes_are_those_of_the_records():
    blocks = blocks_of(11, 3)
    recorded = [[6, 7, 2, 5], [3, 0, 1, 10], [4, 9, 8]]
    assert [block.tolist() for block in blocks] == recorded


PAIRS = np.repeat(np.arange(20), 2)


@pytest.mark.parametrize(
    ("n", "given"),
    [(40, {}), (40, {"groups": PAIRS}), (40, {"stratify": PAIRS % 3})],
    ids=["examples", "groups", "classes"],
)
def test_folds_are_those_of_the_key(n, given):
    runs = [blocks_of(n, 5, key=jax.random.key(k), **given) for k in (1, 1, 2)]
    first, again, other = ({frozenset(b.tolist()) for b in run} for run in runs)
    assert first == again
    assert first != other


def folds_of(n, number, seed=0, **given):
    """The blocks of a random order of the examples, each of which is in one."""
    order = np.random.default_rng(seed).permutation(n)
    given = {"groups": None, "stratify": None} | given
    blocks = assigned("held_out", order=order, num_folds=number, **given)
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(n))
    return [np.asarray(block) for block in blocks]


def torn(blocks, groups):
    return sum(len({*groups[block]}) for block in blocks) - len({*groups})


def imbalance(blocks, y):
    """Number of examples by fold and class; how far the classes are from even."""
    held = np.array([np.bincount(y[b], minlength=y.max() + 1) for b in blocks])
    return held.sum(axis=1), np.abs(held - held.sum(axis=0) / len(blocks)).max()


@pytest.mark.parametrize("seed", range(4))
def test_stratified_folds_differ_by_one_example_in_all_and_in_every_class(seed):
    rng = np.random.default_rng(seed)
    y = rng.choice(5, 103 + seed, p=[0.5, 0.3, 0.1, 0.06, 0.04])
    blocks = folds_of(len(y), 4, seed, stratify=y)
    sizes, off = imbalance(blocks, y)
    assert np.ptp(sizes) <= 1
    assert off < 1


@pytest.mark.parametrize("kind", ["one class a group", "mixed", "a large group"])
def test_groups_stay_whole_and_classes_as_even_as_those_of_scikit_learn(kind):
    rng = np.random.default_rng(1)
    ours, theirs = [], []
    for seed in range(6):
        n, number, folds, c = 300, 70, 5, 4
        groups = rng.integers(0, number, n)
        if kind == "a large group":
            groups = np.minimum(rng.geometric(0.05, n), number)
        classes = rng.choice(c, number + 1, p=[0.4, 0.3, 0.2, 0.1])
        y = rng.choice(c, n) if kind == "mixed" else classes[groups]
        blocks = folds_of(n, folds, seed, groups=groups, stratify=y)
        assert torn(blocks, groups) == 0
        largest = np.bincount(groups).max()
        sizes, off = imbalance(blocks, y)
        assert np.ptp(sizes) <= largest
        assert off <= largest
        ours.append(off)
        peer = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        theirs.append(imbalance([t for _, t in peer.split(y, y, groups)], y)[1])
    assert np.mean(ours) <= np.mean(theirs) + 1e-9


@pytest.mark.parametrize(
    ("sizes", "folds"),
    [
        ([7, 5, 4, 4, 3, 3, 2, 1, 1], [10, 10, 10]),
        ([3, 3, 2, 2, 2], [6, 6]),  # 7 and 5, each into the smallest
        ([5, 5, 4, 4, 3, 3, 3], [9, 9, 9]),  # 8, 8 and 11
        ([9, 2, 2], [4, 9]),
    ],
)
def test_groups_alone_make_folds_as_even_as_they_fit(sizes, folds):
    n, groups = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    order = np.random.default_rng(0).permutation(n)
    blocks = folds_of(n, len(folds), groups=groups[order])
    assert sorted(len(block) for block in blocks) == folds
    assert torn(blocks, groups[order]) == 0


@pytest.mark.parametrize(
    "groups",
    [
        ["a", "b", ("c", 1), None, 5] * 4,
        np.array(["x", "y", "z", "u", "v"] * 4),
        jnp.arange(20) % 5,
        tuple(range(5)) * 4,
    ],
    ids=["hashable", "words", "jax", "tuple"],
)
def test_groups_are_of_any_kind(groups):
    blocks = folds_of(20, 5, groups=groups)
    assert [sorted(block % 5) for block in blocks] == [[b[0] % 5] * 4 for b in blocks]


@pytest.mark.slow
def test_groups_of_one_size_train_in_one_program():
    groups, y = np.arange(24) // 2 % 12, np.arange(24) // 2 % 3
    x, target = regression(24)
    fit, evaluate = least_squares(x, target)
    given = {"groups": groups, "stratify": y, "key": jax.random.key(5)}
    run = functools.partial(levels.held_out_losses, fit, evaluate, 24, num_folds=4)
    together = run(**given, vmap=True)
    np.testing.assert_allclose(together, run(**given), atol=1e-5)
    compiled = jax.jit(lambda: run(**given))()  # the key is known: folds are made
    np.testing.assert_allclose(compiled, together, atol=1e-5)
    with jax.debug_key_reuse(True):
        run(**given)


def test_a_model_without_a_class_is_named_with_call_and_fold():
    y = np.array([2, 2] + [0, 1] * 29)

    def run(**given):
        return levels.held_out(
            lambda i, key: np.bincount(y[i])[np.unique(y[i])] / len(i),
            lambda shares, i: np.tile(shares, (len(i), 1)),
            60,
            num_folds=5,
            key=jax.random.key(8),
            **given,
        )

    message = r"`held_out\(evaluate\)` must return the same in every fold.* in fold 3"
    with pytest.raises(ValueError, match=message):
        run()
    assert run(stratify=y).shape == (60, 3)  # the remedy


def test_folds_of_other_trees_and_dtypes_are_refused():
    def run(answer):
        fold = iter(range(3))
        return levels.held_out(
            lambda i, key: next(fold),
            lambda k, i: answer(k, i),
            6,
            num_folds=3,
            key=jax.random.key(0),
        )

    for answer in (
        lambda k, i: {"a": i} if k else {"b": i},
        lambda k, i: jnp.asarray(i, jnp.float32 if k == 2 else jnp.int32),
    ):
        with pytest.raises(ValueError, match="must return the same in every fold"):
            run(answer)
