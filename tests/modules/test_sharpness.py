"""Sharpness against the dense Hessian of small nets."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from flood_optax import sharpness
from tests.marks import slow_but

KEY = jax.random.key(7)


def jitted(measure):
    """The measure as users run it."""
    counts = ("num_samples", "num_iterations", "has_aux")
    return jax.jit(measure, static_argnums=0, static_argnames=counts)


gradient_norm = jitted(sharpness.gradient_norm)
hessian_trace = jitted(sharpness.hessian_trace)
top_eigenvalue = jitted(sharpness.top_eigenvalue)


def net_loss(params, x, *, targets):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["second"] - targets) ** 2)


@pytest.fixture
def net(x64):
    """A tanh net of 25 numbers, as the arguments of `net_loss`."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.normal(size=shape)
    params = {"first": {"kernel": draw(3, 5), "bias": draw(5)}, "second": draw(5)}
    return (params, draw(20, 3)), {"targets": draw(20)}


@functools.cache
def in_float64(derivative):
    """A derivative of the loss of the net by its flat parameters."""

    @jax.jit
    def of(params, x, targets):
        flat, unravel = ravel_pytree(params)
        return derivative(lambda w: net_loss(unravel(w), x, targets=targets))(flat)

    return lambda net: np.asarray(of(*net[0], **net[1]))


dense_gradient, dense_hessian = in_float64(jax.grad), in_float64(jax.hessian)


def test_gradient_norm_equals_flat_numpy_norm(net):
    norm = gradient_norm(net_loss, *net[0], **net[1])
    np.testing.assert_allclose(norm, np.linalg.norm(dense_gradient(net)), rtol=1e-14)


def test_gradient_norm_in_float16_does_not_overflow():
    norm = gradient_norm(lambda w: 300 * w[0] - 400 * w[1], jnp.ones(2, "f2"))
    assert norm.dtype == jnp.float32
    assert norm == 500


def test_gradient_norm_at_stationary_point_is_zero():
    with jax.debug_nans(True):
        assert gradient_norm(lambda w: jnp.sum(w**4), jnp.zeros(3)) == 0


def test_hessian_trace_lies_within_its_standard_errors_of_dense(net):
    hessian = dense_hessian(net)
    estimate, error = hessian_trace(
        net_loss, *net[0], **net[1], key=KEY, num_samples=4000
    )
    assert abs(estimate - np.trace(hessian)) < 4 * error
    # Var[v'Hv] = 2 sum_{i != j} H_ij^2 for Rademacher v; sd known to about 1.5 %.
    off_diagonal = hessian - np.diag(np.diag(hessian))
    expected_error = np.sqrt(2 * np.sum(np.square(off_diagonal)) / 4000)
    np.testing.assert_allclose(error, expected_error, rtol=0.06)
    assert error < 0.05 * abs(estimate)  # else the first line says little


def test_hessian_trace_standard_error_covers_the_truth(net):
    """Over 200 keys about 68 % fall within one standard error: 10 sd of binomial."""
    estimate, error = jax.vmap(
        lambda key: hessian_trace(net_loss, *net[0], **net[1], key=key, num_samples=30)
    )(jax.random.split(KEY, 200))
    covered = np.mean(np.abs(estimate - np.trace(dense_hessian(net))) < error)
    assert 0.55 < covered < 0.80


def test_hessian_trace_of_diagonal_hessian_is_exact():
    bowl = lambda w: jnp.sum(w["a"] ** 2 * jnp.array([1.0, -2.0])) + 4 * w["b"] ** 2
    estimate, error = hessian_trace(
        bowl, {"a": jnp.ones(2), "b": jnp.float32(3)}, key=KEY, num_samples=2
    )
    assert estimate == 2 * (1 - 2 + 4)
    assert error == 0


@pytest.mark.parametrize("sign", slow_but([-1], [1, -1]))
def test_top_eigenvalue_equals_dense(net, sign):
    (params, x), targets = net
    loss = lambda params: sign * net_loss(params, x, **targets)
    hessian = sign * dense_hessian(net)
    dense = np.linalg.eigvalsh(hessian)
    expected = dense[np.argmax(np.abs(dense))]
    assert np.sign(expected) == sign
    eigenvalue, vector = top_eigenvalue(loss, params, key=KEY, num_iterations=20)
    np.testing.assert_allclose(eigenvalue, expected, rtol=1e-10)
    chex.assert_trees_all_equal_shapes_and_dtypes(vector, params)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(vector)])
    np.testing.assert_allclose(np.linalg.norm(flat), 1, rtol=1e-12)
    np.testing.assert_allclose(
        hessian @ flat, eigenvalue * flat, atol=1e-5 * abs(expected)
    )


@pytest.mark.slow
def test_top_eigenvalue_with_few_iterations_never_over_estimates(net):
    top = np.abs(np.linalg.eigvalsh(dense_hessian(net))).max()
    estimates = [
        top_eigenvalue(net_loss, *net[0], **net[1], key=KEY, num_iterations=k)[0]
        for k in (1, 6)
    ]
    magnitudes = np.abs(np.array(estimates))
    assert (magnitudes <= top * (1 + 1e-12)).all()
    assert magnitudes[0] < 0.9 * top < magnitudes[1]


def quadratic(w, hessian):
    return w @ hessian @ w / 2


def rotated(spectrum, seed=0):
    """A Hessian with these eigenvalues, and the rotation."""
    size = (len(spectrum),) * 2
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=size))
    return (rotation @ np.diag(spectrum) @ rotation.T).astype(np.float32), rotation


SPECTRA = {
    "negative-dominant": [1.0, -4.0, 2.0, 0.5],
    "opposite-pair": [3.0, -3.0, 1.0, 0.0],
    "multiple-of-identity": [2.5, 2.5, 2.5, 2.5],
    "rank-one": [0.0, 0.0, -1.5, 0.0],
    "zero": [0.0, 0.0, 0.0, 0.0],
    "far-apart": [1e-6, 1e6, -1.0, 3.0],
}


@pytest.mark.parametrize("num_iterations", [4, 9], ids=["full", "more-than-size"])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_top_eigenvalue_of_rotated_spectrum_is_found(spectrum, num_iterations):
    """Exhausted Krylov spaces included, in float32 and under debug_nans."""
    hessian, _ = rotated(spectrum)
    with jax.debug_nans(True):
        eigenvalue, vector = top_eigenvalue(
            quadratic, jnp.ones(4), hessian, key=KEY, num_iterations=num_iterations
        )
    top = np.abs(spectrum).max()
    np.testing.assert_allclose(np.abs(eigenvalue), top, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        hessian @ vector, eigenvalue * vector, atol=2e-6 * max(top, 1)
    )
    np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)


@pytest.mark.parametrize("values", [[2.5], [1, -2.5, 0.5]], ids=["one", "three"])
def test_top_eigenvalue_long_after_the_krylov_space_is_exhausted(values):
    """Rounding made orthogonal once only is not, and gives 22.5 for 2.5."""
    hessian, _ = rotated(np.resize(values, 40), seed=1)
    eigenvalue, vector = top_eigenvalue(
        quadratic, jnp.ones(40), hessian, key=KEY, num_iterations=40
    )
    np.testing.assert_allclose(np.abs(eigenvalue), 2.5, rtol=2e-6)
    np.testing.assert_allclose(hessian @ vector, eigenvalue * vector, atol=5e-6)
    np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=2e-6)


def test_top_eigenvalue_of_exactly_diagonal_hessian_is_found():
    """The first product is parallel to the start: nothing but rounding is left."""
    eigenvalue, _ = top_eigenvalue(
        lambda w: -3.0 * jnp.sum(w**2), jnp.ones(5), key=KEY, num_iterations=5
    )
    np.testing.assert_allclose(eigenvalue, -6, rtol=1e-6)


MIXED = [("float16", "float32"), ("bfloat16", "bfloat16")]


@pytest.mark.parametrize(("first", "second"), slow_but([MIXED[0]], MIXED))
def test_mixed_and_half_precision_params_keep_leaf_dtypes(first, second):
    params = {"a": jnp.ones(2, first), "b": jnp.asarray(2.0, second)}

    def loss(params):
        a, b = params["a"].astype(jnp.float32), params["b"].astype(jnp.float32)
        return jnp.sum(a**2 * jnp.array([1.0, 2.0])) - 4 * b**2

    eigenvalue, vector = top_eigenvalue(loss, params, key=KEY, num_iterations=3)
    estimate, _ = hessian_trace(loss, params, key=KEY, num_samples=2)
    assert eigenvalue.dtype == estimate.dtype == jnp.float32
    # Each product passes through the dtype of the leaf.
    np.testing.assert_allclose(eigenvalue, -8, rtol=1e-2)
    assert estimate == 2 + 4 - 8
    chex.assert_trees_all_equal_shapes_and_dtypes(vector, params)


@pytest.mark.parametrize("curvature", [1e-20, 1e-10, 1.0, 1e10, 1e20])
def test_measures_of_any_magnitude_equal_float64(curvature):
    """In float32 the squares of such numbers vanish or overflow."""
    hessian, rotation = rotated(curvature * np.array([5.0, -2.0, 1.0, 0.5]), seed=1)
    w = np.float32([1.0, -0.5, 0.25, 2.0])
    eigenvalue, vector = top_eigenvalue(
        quadratic, w, hessian, key=KEY, num_iterations=4
    )
    np.testing.assert_allclose(eigenvalue, 5 * curvature, rtol=1e-5)
    np.testing.assert_allclose(np.abs(vector @ rotation[:, 0]), 1, rtol=1e-5)
    estimate, error = hessian_trace(quadratic, w, hessian, key=KEY, num_samples=50)
    # the same draws in float64, from the same key
    exact = np.float64(hessian)
    draw = jax.jit(jax.vmap(lambda key: jax.random.rademacher(key, 4, jnp.float32)))
    probes = np.asarray(draw(jax.random.split(KEY, 50)))
    draws = np.einsum("si,ij,sj->s", probes, exact, probes, dtype=np.float64)
    np.testing.assert_allclose(estimate, draws.mean(), rtol=1e-5)
    np.testing.assert_allclose(error, draws.std(ddof=1) / 50**0.5, rtol=1e-5)
    expected = np.linalg.norm(exact @ np.float64(w))
    np.testing.assert_allclose(
        gradient_norm(quadratic, w, hessian), expected, rtol=1e-6
    )


def test_gradient_norm_of_infinite_and_nan_gradients_keeps_them():
    for slope, expected in ((np.inf, np.inf), (np.nan, np.nan)):
        norm = gradient_norm(lambda w, s: s * w[0] + 3 * w[1], jnp.ones(2), slope)
        np.testing.assert_equal(float(norm), expected)


@pytest.mark.parametrize(
    "jit", [jax.jit, pytest.param(lambda f: f, marks=pytest.mark.slow, id="eager")]
)
@pytest.mark.parametrize(
    ("measure", "count"),
    [("hessian_trace", "num_samples"), ("top_eigenvalue", "num_iterations")],
)
def test_no_key_is_used_twice_in_the_eyes_of_the_key_checker(measure, count, jit):
    measured = lambda w, key: getattr(sharpness, measure)(
        lambda w: jnp.sum(w**4), w, key=key, **{count: 3}
    )
    with jax.debug_key_reuse(True):
        jit(measured)(jnp.arange(3.0), jax.random.key(5))


def test_key_checker_can_complain():
    def twice(key):
        return jax.random.normal(key) + jax.random.normal(key)

    with (
        jax.debug_key_reuse(True),
        pytest.raises(jax.errors.KeyReuseError, match="consume"),
    ):
        jax.jit(twice)(KEY)


SETTINGS = {
    "gradient_norm": {},
    "hessian_trace": {"key": KEY, "num_samples": 3},
    "top_eigenvalue": {"key": KEY, "num_iterations": 2},
}


# op by op the power iteration compiles for five seconds
@pytest.mark.parametrize("name", slow_but(("gradient_norm", "hessian_trace"), SETTINGS))
def test_all_measures_under_jit_and_with_aux_equal_eager(net, name):
    measure, given = getattr(sharpness, name), SETTINGS[name]

    def with_aux(params, x, targets):
        return net_loss(params, x, targets=targets), {"n": len(x)}

    eager = measure(net_loss, *net[0], **net[1], **given)
    compiled = jitted(measure)(with_aux, *net[0], **net[1], has_aux=True, **given)
    chex.assert_trees_all_close(compiled, eager, rtol=1e-9)


def test_same_key_gives_same_result_and_another_key_another(net):
    trace = lambda key: hessian_trace(
        net_loss, *net[0], **net[1], key=key, num_samples=3
    )
    chex.assert_trees_all_equal(trace(KEY), trace(KEY))
    assert trace(KEY)[0] != trace(jax.random.key(8))[0]


def test_hessian_is_never_built():
    size = 4096
    wavy = lambda w: jnp.sum(jnp.sin(w) * jnp.roll(w, 1) ** 2)
    for measure in (
        lambda w: hessian_trace(wavy, w, key=KEY, num_samples=8),
        lambda w: top_eigenvalue(wavy, w, key=KEY, num_iterations=8),
    ):
        memory = jax.jit(measure).lower(jnp.ones(size)).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 200 * size  # the Hessian takes 4 size^2
