"""What models say of examples that they never saw, against closed forms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from flood_optax import levels


@pytest.mark.parametrize(("n", "folds"), [(12, 3), (11, 3), (5, 5), (7, 2)])
def test_held_out_losses_cut_the_data_into_folds(n, folds):
    seen = []

    def fit(train, key):
        return np.asarray(train), jax.random.key_data(key)

    def evaluate(model, indices):
        train, key = model
        seen.append((train, np.asarray(indices), np.asarray(key)))
        return indices.astype(jnp.float32) + 0.5

    losses = levels.held_out_losses(
        fit, evaluate, n, num_folds=folds, key=jax.random.key(3)
    )
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
    def fit(indices, key):
        del key
        return jnp.linalg.solve(x[indices].T @ x[indices], x[indices].T @ y[indices])

    def evaluate(w, indices):
        return (y[indices] - x[indices] @ w) ** 2

    return fit, evaluate


@pytest.mark.parametrize("vmap", [False, True])
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
    x, y = regression()
    fit, evaluate = least_squares(x, y)
    run = functools.partial(
        levels.held_out_losses,
        evaluate=evaluate,
        num_examples=12,
        num_folds=4,
        key=jax.random.key(5),
    )
    chex.clear_trace_counter()
    together = run(chex.assert_max_traces(fit, n=1), vmap=True)
    np.testing.assert_allclose(together, run(fit), atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda: run(fit))(), together, atol=1e-5)


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
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


@pytest.mark.parametrize("vmap", [False, True])
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


def test_held_out_losses_depend_on_the_key_alone():
    run = functools.partial(
        levels.held_out_losses, *least_squares(*regression()), 12, num_folds=3
    )
    np.testing.assert_array_equal(
        run(key=jax.random.key(1)), run(key=jax.random.key(1))
    )
    assert (run(key=jax.random.key(1)) != run(key=jax.random.key(2))).any()


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


def test_held_out_takes_any_tree_of_arrays_by_example():
    x = jnp.arange(10.0)

    def fit(indices, key):
        return x[indices].sum()

    def evaluate(total, indices):
        probs = jnp.stack([x[indices], total + 0 * x[indices], -x[indices]], axis=1)
        return {"probs": probs, "own": (indices, x[indices] > 4)}

    for vmap in (False, True):
        found = levels.held_out(
            fit, evaluate, 10, num_folds=5, key=jax.random.key(2), vmap=vmap
        )
        np.testing.assert_array_equal(found["own"][0], np.arange(10))
        assert found["own"][0].dtype == np.int32
        np.testing.assert_array_equal(found["own"][1], np.arange(10) > 4)
        np.testing.assert_array_equal(found["probs"][:, 0], x)
        # What is left of 45 without the two that were held out together.
        rest = 45 - np.asarray(found["probs"][:, 1])
        partners = rest - np.arange(10)
        np.testing.assert_array_equal(rest[partners.astype(int)], rest)
        assert sorted(partners) == list(range(10))


def test_held_out_losses_are_held_out_for_losses():
    fit, evaluate = least_squares(*regression())
    arguments = {"num_folds": 5, "key": jax.random.key(1)}
    losses = levels.held_out_losses(fit, evaluate, 12, **arguments)
    found = levels.held_out(fit, lambda w, i: (evaluate(w, i), i), 12, **arguments)
    np.testing.assert_array_equal(found[0], losses)


def test_held_out_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"3 in the first axis, got the shapes \[\(2,"):
        levels.held_out(
            lambda indices, key: (),
            lambda model, indices: jnp.ones((2, 3)),
            6,
            num_folds=2,
            key=jax.random.key(0),
        )
    with pytest.raises(
        TypeError, match=r"`held_out\(num_folds=...\)` must be a static"
    ):
        levels.held_out(None, None, 6, num_folds=2.0, key=jax.random.key(0))
