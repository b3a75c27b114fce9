"""The gradient penalty against closed forms worked out by hand in NumPy."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import penalty

METHODS = ["exact", "forward", "backward"]
W = np.array([0.3, -0.7, 1.1])
in_float64 = pytest.mark.usefixtures("x64")
every_method = pytest.mark.parametrize("method", METHODS)


@jax.jit
def loss_fn(w):
    return jnp.exp(w[0]) + w[0] * w[1] ** 2 - 0.5 * w[2] + w[1] * w[2] ** 3


def numpy_gradient(w):
    x, y, z = w
    return np.array([np.exp(x) + y**2, 2 * x * y + z**3, -0.5 + 3 * y * z**2])


def numpy_hessian(w):
    x, y, z = w
    return np.array(
        [
            [np.exp(x), 2 * y, 0],
            [2 * y, 2 * x, 3 * z**2],
            [0, 3 * z**2, 6 * y * z],
        ]
    )


def numpy_penalised(w, strength, method, radius):
    """The gradient g + strength H g, and its two finite differences."""
    g = numpy_gradient(w)
    if method == "exact":
        return g + strength * numpy_hessian(w) @ g
    signed = radius if method == "forward" else -radius
    return g + strength * (numpy_gradient(w + signed * g) - g) / signed


DERIVATIVES = {
    "value": lambda f: f,
    "gradient": jax.grad,
    "second": lambda f: jax.jit(jax.hessian(f)),
}


@in_float64
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_objective_and_its_derivatives_equal_the_closed_form(derivative):
    """In the second, third derivatives of the loss enter: nothing may be cut off."""
    of = functools.partial(numpy_penalised, strength=0.35, method="exact", radius=None)
    g, h = numpy_gradient(W), 1e-5
    expected, rtol = {
        "value": lambda: (float(loss_fn(W)) + 0.35 * (g @ g) / 2, 1e-14),
        "gradient": lambda: (of(W), 1e-13),
        "second": lambda: (
            [(of(W + h * e) - of(W - h * e)) / (2 * h) for e in np.eye(3)],
            1e-7,
        ),
    }[derivative]()
    found = DERIVATIVES[derivative](penalty.objective(loss_fn, 0.35))(jnp.asarray(W))
    np.testing.assert_allclose(found, expected, rtol=rtol)


@in_float64
@pytest.mark.parametrize(
    ("method", "radius"),
    [("exact", None), *((m, r) for m in METHODS[1:] for r in (None, 0.02))],
)
def test_value_and_grad_equals_closed_form(method, radius):
    value, gradient = penalty.value_and_grad(
        loss_fn, 0.05, method=method, radius=radius
    )(jnp.asarray(W))
    expected = numpy_penalised(W, 0.05, method, 0.05 if radius is None else radius)
    assert value == loss_fn(W)
    np.testing.assert_allclose(gradient, expected, rtol=1e-13)


@in_float64
def test_value_and_grad_forward_by_default_is_unnormalised_sam():
    w = jnp.asarray(W)
    _, gradient = penalty.value_and_grad(loss_fn, 0.1, method="forward")(w)
    sam = jax.grad(loss_fn)(w + 0.1 * jax.grad(loss_fn)(w))
    np.testing.assert_array_equal(gradient, sam)  # nothing is subtracted


@in_float64
@pytest.mark.parametrize("eta", [0.1, 0.003])
def test_pair_displacement_equals_two_steps_by_hand(eta):
    """Down and up again: the place itself, from which both begin, cancels."""
    down = W - eta * numpy_gradient(W)
    pair = penalty.pair_displacement(loss_fn, jnp.asarray(W), eta)
    moved = eta * (numpy_gradient(down) - numpy_gradient(W))
    np.testing.assert_allclose(pair, moved, rtol=1e-11)


@in_float64
def test_level_set_drift_equals_closed_form_and_is_tangential():
    g, product = numpy_gradient(W), numpy_hessian(W) @ numpy_gradient(W)
    projection = np.eye(3) - np.outer(g, g) / (g @ g)
    drift = np.asarray(penalty.level_set_drift(loss_fn, jnp.asarray(W)))
    np.testing.assert_allclose(drift, -projection @ product / 2, rtol=1e-13)
    assert abs(drift @ g) < 1e-14 * np.linalg.norm(drift) * np.linalg.norm(g)


@in_float64
def test_level_set_drift_where_gradient_is_an_eigenvector_is_zero():
    """On a ridge the whole of H g points along g: nothing is left to drift."""
    valley = lambda w: w[0] ** 2 + 5 * w[1] ** 4
    drift = penalty.level_set_drift(valley, jnp.array([3.0, 0.0]))
    np.testing.assert_allclose(drift, [0, 0], atol=1e-15)


# ---- every tool: trees, arguments, maps, edges ----


def displaced(tool, *given):
    """A tool that takes the parameters, as a function of them and of what follows."""

    def make(loss_fn, **options):
        return lambda w, *args, **kwargs: tool(
            loss_fn, w, *given, *args, **options, **kwargs
        )

    return make


# name -> (loss_fn, **options) -> function of the parameters
TOOLS = {
    **{
        name: functools.partial(penalty.value_and_grad, strength=0.05, method=name)
        for name in METHODS
    },
    "objective": functools.partial(penalty.objective, strength=0.05),
    "pair": displaced(penalty.pair_displacement, 0.1),
    "drift": displaced(penalty.level_set_drift),
}
every_tool = pytest.mark.parametrize("tool", TOOLS)


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


def tree_of(w):
    return {"a": Layer(w[:2].reshape(1, 2), None), "b": (w[2], {})}


def tree_loss(tree):
    return loss_fn(jnp.append(tree["a"].kernel.ravel(), tree["b"][0]))


@in_float64
@every_tool
def test_on_a_tree_equals_flat(tool):
    w = jnp.asarray(W)
    flat, found = TOOLS[tool](loss_fn)(w), TOOLS[tool](tree_loss)(tree_of(w))
    if tool in METHODS:
        assert found[0] == flat[0]
        flat, found = flat[1], found[1]
    expected = flat if tool == "objective" else tree_of(flat)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    rtol = 1e-13 if tool in ("pair", "drift") else 1e-14
    chex.assert_trees_all_close(found, expected, rtol=rtol)


def with_arguments(w, x, *, scale):
    return scale * jnp.sum(w**3 * x), {"squares": w**2}


@in_float64
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@every_tool
def test_hands_on_arguments_and_raw_aux(tool, jit):
    w, x = jnp.array([0.5, -1.0]), jnp.array([1.0, 3.0])
    plain = lambda w: with_arguments(w, x, scale=2.0)[0]
    made = TOOLS[tool](with_arguments, has_aux=True)
    found, expected = jit(made)(w, x, scale=2.0), TOOLS[tool](plain)(w)
    if tool in METHODS:
        (value, aux), gradient = found
        found = value, gradient
    elif tool == "objective":
        found, aux = found
    if tool not in ("pair", "drift"):  # which drop it
        chex.assert_trees_all_equal(aux, {"squares": w**2})
    chex.assert_trees_all_close(found, expected, rtol=1e-14)


@in_float64
@every_tool
def test_maps_over_params(tool):
    points = jnp.stack([jnp.asarray(W), jnp.asarray(W) + 0.5])
    mapped = jax.vmap(TOOLS[tool](loss_fn))(points)
    for i, w in enumerate(points):
        one = jax.tree.map(lambda x, i=i: x[i], mapped)
        chex.assert_trees_all_close(one, TOOLS[tool](loss_fn)(w), rtol=1e-13)


@in_float64
@every_method
def test_value_and_grad_maps_over_strengths_in_one_trace(method):
    chex.clear_trace_counter()
    w, strengths = jnp.asarray(W), jnp.array([0.0, 0.05, 0.3])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradient(strength):
        return penalty.value_and_grad(loss_fn, strength, method=method)(w)[1]

    one_by_one = [gradient(s) for s in strengths]
    chex.clear_trace_counter()
    mapped = jax.vmap(gradient)(strengths)
    np.testing.assert_allclose(mapped, np.stack(one_by_one), rtol=1e-14)
    expected = [numpy_penalised(W, s, method, s) for s in (0.05, 0.3)]
    np.testing.assert_allclose(mapped[1:], expected, rtol=1e-13)
    np.testing.assert_allclose(mapped[0], numpy_gradient(W), rtol=1e-14)


@in_float64
def test_pair_displacement_maps_over_learning_rates():
    pair = lambda eta: penalty.pair_displacement(loss_fn, jnp.asarray(W), eta)
    etas = jnp.array([0.1, 0.01])
    np.testing.assert_allclose(
        jax.vmap(pair)(etas), [pair(eta) for eta in etas], rtol=1e-13
    )


@every_tool
def test_stationary_point_gives_zero_without_nan(tool):
    flat = lambda w: jnp.sum(w**2 * jnp.array([1.0, -3.0]))
    made = TOOLS[tool](flat)
    with jax.debug_nans(True):
        found = jax.jit(jax.grad(made) if tool == "objective" else made)(np.zeros(2))
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@every_tool
def test_nan_loss_stays_nan(tool):
    broken = lambda w: jnp.sum(jnp.log(w) * w)
    found = jax.jit(TOOLS[tool](broken))(np.array([-1.0, 2.0]))
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(found))


# ---- dtypes and magnitudes ----


MIXED = [(jnp.float16, jnp.float32), (jnp.bfloat16, jnp.float16)]


@pytest.mark.parametrize(("first", "second"), MIXED, ids=str)
@every_method
def test_leaf_dtypes_are_kept_without_promotion(method, first, second):
    """Also under strict promotion, with a float32 strength."""
    params = {"a": jnp.asarray([0.5, -1.5], first), "b": jnp.asarray(0.75, second)}

    def mixed(params):
        a, b = params["a"].astype(jnp.float32), params["b"].astype(jnp.float32)
        return (jnp.sum(a**3) + b * a[0]).astype(jnp.bfloat16)

    @jax.jit
    def every_tool(params, strength, eta):
        return (
            *penalty.value_and_grad(mixed, strength, method=method)(params),
            penalty.objective(mixed, strength)(params),
            penalty.pair_displacement(mixed, params, eta),
            penalty.level_set_drift(mixed, params),
        )

    with jax.numpy_dtype_promotion("strict"):
        given = params, *np.float32([0.25, 0.125])
        value, gradient, penalised, pair, drift = every_tool(*given)
    assert value.dtype == penalised.dtype == jnp.bfloat16
    for tree in (gradient, pair, drift):
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, params)
    # g = (3a^2 + (b, 0), a[0]), exact in binary but for the rounding of the loss.
    g = np.array([1.5, 6.75, 0.5])
    hessian = np.array([[3.0, 0, 1], [0, -9, 0], [1, 0, 0]])
    if method == "exact":
        got = np.append(np.asarray(gradient["a"], float), float(gradient["b"]))
        np.testing.assert_allclose(got, g + 0.25 * hessian @ g, rtol=0.01)
    np.testing.assert_allclose(
        float(penalised), float(value) + 0.125 * g @ g, rtol=0.01
    )


def test_objective_in_float16_sums_squares_without_overflow():
    steep = lambda w: 300 * w  # the square of the gradient is no float16
    penalised = penalty.objective(steep, 0.5)(jnp.float16(1))
    assert penalised.dtype == jnp.float16
    np.testing.assert_allclose(penalised, 300 + 0.25 * 300**2, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e20, 1e25])
def test_level_set_drift_of_any_gradient_equals_float64(size):
    """In float32 the squares of such gradients vanish or overflow."""
    curved = np.array([[3.0, 0.5, 0.0], [0.5, -1.0, 0.2], [0.0, 0.2, 2.0]])
    slopes = size * np.array([1.0, -2.0, 0.5])
    at = size * np.array([0.3, 0.7, -0.4])
    loss = lambda w: (
        w @ jnp.asarray(curved, w.dtype) @ w / 2 + jnp.asarray(slopes, w.dtype) @ w
    )
    drift = penalty.level_set_drift(loss, jnp.asarray(at, jnp.float32))
    g = curved @ at + slopes
    product = curved @ g
    expected = -(product - g * (g @ product) / (g @ g)) / 2
    np.testing.assert_allclose(drift, expected, rtol=2e-6, atol=2e-7 * size)


@pytest.mark.parametrize(("slope", "strength"), [(1e-25, 1e38), (1e25, 1e-37)])
def test_objective_squares_gradients_of_any_size(slope, strength):
    """The penalty is a float32 though the squares in it are none."""
    steep = lambda w: slope * w[0] - 2 * slope * w[1] + w[0] * w[1]
    objective = penalty.objective(lambda w: steep(w) - steep(w), strength)
    np.testing.assert_array_equal(objective(jnp.zeros(2)), 0)
    value, gradient = jax.value_and_grad(penalty.objective(steep, strength))(
        jnp.zeros(2)
    )
    half = strength / 2 * np.float64(slope) ** 2 * 5
    np.testing.assert_allclose(value, half, rtol=1e-6)
    # g + strength H g with g = (s, -2 s), H = ((0, 1), (1, 0))
    expected = slope * np.array([1 - 2 * strength, -2 + strength])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("one", [np.uint8(1), np.uint16(1), np.int8(1), 1])
def test_whole_numbers_of_any_dtype_are_real_numbers(one):
    """An unsigned 1 has no minus: the radius was 255, or 4294967295."""
    cube, w = lambda w: w**3, jnp.float32(0.5)
    g = lambda w: 3 * w**2
    for size in (one, jnp.asarray(one)):
        for method, sign in (("forward", 1), ("backward", -1)):
            moved = g(0.5 + sign * g(0.5))
            expected = g(0.5) + sign * (moved - g(0.5))
            for radius in (None, size):
                given = {"method": method, "radius": radius}
                _, slope = penalty.value_and_grad(cube, size, **given)(w)
                np.testing.assert_allclose(slope, expected, rtol=1e-6)
        down = 0.5 - g(0.5)
        pair = penalty.pair_displacement(cube, w, size)
        np.testing.assert_allclose(pair, down + g(down) - 0.5, rtol=1e-6)
        value = penalty.objective(cube, size)(w)
        np.testing.assert_allclose(value, 0.125 + g(0.5) ** 2 / 2, rtol=1e-6)


# ---- cost ----


def test_exact_never_builds_the_hessian():
    size = 4096
    wavy = lambda w: jnp.sum(jnp.sin(w) * jnp.roll(w, 1) ** 2)
    compiled = jax.jit(penalty.value_and_grad(wavy, 0.1)).lower(jnp.ones(size))
    memory = compiled.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100 * size  # the Hessian takes 4 size^2


def test_exact_costs_less_than_four_gradients():
    def net(w, x):
        return jnp.mean(jnp.tanh(x @ w["first"]) @ w["second"]) ** 2

    w = {"first": jnp.ones((64, 64)), "second": jnp.ones((64, 64))}
    x = jnp.ones((64, 64))
    flops = [
        jax.jit(f).lower(w, x).compile().cost_analysis()["flops"]
        for f in (jax.value_and_grad(net), penalty.value_and_grad(net, 0.1))
    ]
    assert 1.5 < flops[1] / flops[0] < 4
