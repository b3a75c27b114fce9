"""The gradient penalty against closed forms worked out by hand in NumPy."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import penalty

METHODS = ["exact", "forward", "backward"]
W = np.array([0.3, -0.7, 1.1])


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


def test_objective_value_equals_closed_form(x64):
    g = numpy_gradient(W)
    expected = float(loss_fn(W)) + 0.35 * (g @ g) / 2
    np.testing.assert_allclose(penalty.objective(loss_fn, 0.35)(W), expected, 1e-14)


def test_objective_gradient_equals_closed_form(x64):
    gradient = jax.grad(penalty.objective(loss_fn, 0.35))(jnp.asarray(W))
    expected = numpy_penalised(W, 0.35, "exact", None)
    np.testing.assert_allclose(gradient, expected, rtol=1e-13)


def test_objective_second_derivative_equals_difference_of_gradients(x64):
    """Third derivatives of the loss enter: nothing may be cut off."""
    hessian = jax.jit(jax.hessian(penalty.objective(loss_fn, 0.35)))(jnp.asarray(W))
    h = 1e-5
    for i, e in enumerate(np.eye(3)):
        above = numpy_penalised(W + h * e, 0.35, "exact", None)
        below = numpy_penalised(W - h * e, 0.35, "exact", None)
        np.testing.assert_allclose(hessian[i], (above - below) / (2 * h), rtol=1e-7)


@pytest.mark.parametrize(
    ("method", "radius"),
    [
        ("exact", None),
        ("forward", None),
        ("forward", 0.02),
        ("backward", None),
        ("backward", 0.02),
    ],
)
def test_value_and_grad_equals_closed_form(x64, method, radius):
    value, gradient = penalty.value_and_grad(
        loss_fn, 0.05, method=method, radius=radius
    )(jnp.asarray(W))
    expected = numpy_penalised(W, 0.05, method, 0.05 if radius is None else radius)
    assert value == loss_fn(W)
    np.testing.assert_allclose(gradient, expected, rtol=1e-13)


def test_value_and_grad_forward_by_default_is_unnormalised_sam(x64):
    w = jnp.asarray(W)
    _, gradient = penalty.value_and_grad(loss_fn, 0.1, method="forward")(w)
    sam = jax.grad(loss_fn)(w + 0.1 * jax.grad(loss_fn)(w))
    np.testing.assert_array_equal(gradient, sam)  # nothing is subtracted


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_value_and_grad_difference_approaches_exact_at_first_order(x64, method):
    w = jnp.asarray(W)
    _, exact = penalty.value_and_grad(loss_fn, 0.5)(w)
    radii = np.array([1e-3, 1e-4, 1e-5])
    errors = [
        jnp.linalg.norm(
            penalty.value_and_grad(loss_fn, 0.5, method=method, radius=a)(w)[1] - exact
        )
        for a in radii
    ]
    slope = np.polyfit(np.log(radii), np.log(errors), 1)[0]
    assert abs(slope - 1) < 0.01


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


def tree_of(w):
    return {"a": Layer(w[:2].reshape(1, 2), None), "b": (w[2], {})}


def tree_loss(tree):
    return loss_fn(jnp.append(tree["a"].kernel.ravel(), tree["b"][0]))


@pytest.mark.parametrize("method", METHODS)
def test_value_and_grad_on_tree_equals_flat(x64, method):
    flat = penalty.value_and_grad(loss_fn, 0.05, method=method)(jnp.asarray(W))
    tree = tree_of(jnp.asarray(W))
    value, gradient = penalty.value_and_grad(tree_loss, 0.05, method=method)(tree)
    assert value == flat[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, tree)
    chex.assert_trees_all_close(gradient, tree_of(flat[1]), rtol=1e-14)


def test_penalty_tools_on_tree_equal_flat(x64):
    w = jnp.asarray(W)
    np.testing.assert_allclose(
        penalty.objective(tree_loss, 0.05)(tree_of(w)),
        penalty.objective(loss_fn, 0.05)(w),
        rtol=1e-14,
    )
    for tool, given in (
        (penalty.pair_displacement, (0.1,)),
        (penalty.level_set_drift, ()),
    ):
        on_tree = tool(tree_loss, tree_of(w), *given)
        chex.assert_trees_all_equal_shapes_and_dtypes(on_tree, tree_of(w))
        expected = tree_of(tool(loss_fn, w, *given))
        chex.assert_trees_all_close(on_tree, expected, rtol=1e-13)


MIXED = [(jnp.float16, jnp.float32), (jnp.bfloat16, jnp.float16)]


@pytest.mark.parametrize(("first", "second"), MIXED, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_leaf_dtypes_are_kept_without_promotion(method, first, second):
    """Also under strict promotion, with a float32 strength."""
    params = {"a": jnp.asarray([0.5, -1.5], first), "b": jnp.asarray(0.75, second)}

    def mixed(params):
        a, b = params["a"].astype(jnp.float32), params["b"].astype(jnp.float32)
        return (jnp.sum(a**3) + b * a[0]).astype(jnp.bfloat16)

    with jax.numpy_dtype_promotion("strict"):
        strength = jnp.float32(0.25)
        value, gradient = penalty.value_and_grad(mixed, strength, method=method)(params)
        penalised = penalty.objective(mixed, strength)(params)
        pair = penalty.pair_displacement(mixed, params, jnp.float32(0.125))
        drift = penalty.level_set_drift(mixed, params)
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


def with_arguments(w, x, *, scale):
    return scale * jnp.sum(w**3 * x), {"squares": w**2}


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_value_and_grad_hands_on_arguments_and_raw_aux(x64, method, jit):
    w, x = jnp.array([0.5, -1.0]), jnp.array([1.0, 3.0])
    penalised = penalty.value_and_grad(with_arguments, 0.1, method=method, has_aux=True)
    (value, aux), gradient = jit(penalised)(w, x, scale=2.0)
    plain = lambda w: with_arguments(w, x, scale=2.0)[0]
    np.testing.assert_allclose(value, plain(w), rtol=1e-15)
    chex.assert_trees_all_equal(aux, {"squares": w**2})
    _, expected = penalty.value_and_grad(plain, 0.1, method=method)(w)
    np.testing.assert_allclose(gradient, expected, rtol=1e-14)


def test_other_tools_hand_on_arguments_and_drop_aux(x64):
    w, x = jnp.array([0.5, -1.0]), jnp.array([1.0, 3.0])
    plain = lambda w: with_arguments(w, x, scale=2.0)[0]
    penalised = penalty.objective(with_arguments, 0.1, has_aux=True)
    value, aux = penalised(w, x, scale=2.0)
    np.testing.assert_allclose(value, penalty.objective(plain, 0.1)(w), rtol=1e-15)
    chex.assert_trees_all_equal(aux, {"squares": w**2})
    chex.assert_trees_all_close(
        penalty.pair_displacement(with_arguments, w, 0.1, x, scale=2.0, has_aux=True),
        penalty.pair_displacement(plain, w, 0.1),
        rtol=1e-14,
    )
    chex.assert_trees_all_close(
        penalty.level_set_drift(with_arguments, w, x, scale=2.0, has_aux=True),
        penalty.level_set_drift(plain, w),
        rtol=1e-14,
    )


@pytest.mark.parametrize("method", METHODS)
def test_value_and_grad_maps_over_strengths_in_one_trace(x64, method):
    chex.clear_trace_counter()
    w, strengths = jnp.asarray(W), jnp.array([0.0, 0.05, 0.3])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradient(strength):
        return penalty.value_and_grad(loss_fn, strength, method=method)(w)[1]

    one_by_one = [gradient(s) for s in strengths]
    chex.clear_trace_counter()
    mapped = jax.vmap(gradient)(strengths)
    np.testing.assert_allclose(mapped, jnp.stack(one_by_one), rtol=1e-14)
    expected = [numpy_penalised(W, s, method, s) for s in (0.05, 0.3)]
    np.testing.assert_allclose(mapped[1:], expected, rtol=1e-13)
    np.testing.assert_allclose(mapped[0], numpy_gradient(W), rtol=1e-14)


def test_tools_map_over_params_and_learning_rates(x64):
    points = jnp.stack([jnp.asarray(W), jnp.asarray(W) + 0.5])
    drift = lambda w: penalty.level_set_drift(loss_fn, w)
    pair = lambda w, eta: penalty.pair_displacement(loss_fn, w, eta)
    np.testing.assert_allclose(
        jax.vmap(drift)(points), [drift(w) for w in points], rtol=1e-13
    )
    etas = jnp.array([0.1, 0.01])
    np.testing.assert_allclose(
        jax.vmap(pair)(points, etas),
        [pair(*each) for each in zip(points, etas, strict=True)],
        rtol=1e-13,
    )


@pytest.mark.parametrize("method", METHODS)
def test_stationary_point_gives_zero_without_nan(method):
    with jax.debug_nans(True):
        flat = lambda w: jnp.sum(w**2 * jnp.array([1.0, -3.0]))
        w = jnp.zeros(2)
        value, gradient = penalty.value_and_grad(flat, 0.5, method=method)(w)
        assert value == 0
        for zero in (
            gradient,
            jax.grad(penalty.objective(flat, 0.5))(w),
            penalty.pair_displacement(flat, w, 0.1),
            penalty.level_set_drift(flat, w),
        ):
            np.testing.assert_array_equal(zero, [0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_nan_loss_stays_nan(method):
    broken = lambda w: jnp.sum(jnp.log(w) * w)
    w = jnp.array([-1.0, 2.0])
    value, gradient = penalty.value_and_grad(broken, 0.5, method=method)(w)
    assert jnp.isnan(value)
    assert jnp.isnan(gradient[0])
    assert jnp.isnan(penalty.objective(broken, 0.5)(w))
    assert jnp.isnan(penalty.level_set_drift(broken, w)).any()


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


@pytest.mark.parametrize("eta", [0.1, 0.003])
def test_pair_displacement_equals_two_steps_by_hand(x64, eta):
    down = W - eta * numpy_gradient(W)
    up = down + eta * numpy_gradient(down)
    pair = penalty.pair_displacement(loss_fn, jnp.asarray(W), eta)
    # up - W cancels: its error is the rounding of W.
    np.testing.assert_allclose(pair, up - W, rtol=0, atol=4 * np.spacing(1.1))


@pytest.mark.parametrize("eta", [0.1, 0.003])
def test_pair_displacement_is_a_step_along_the_backward_difference(x64, eta):
    w = jnp.asarray(W)
    pair = penalty.pair_displacement(loss_fn, w, eta)
    _, backward = penalty.value_and_grad(loss_fn, 1.0, method="backward", radius=eta)(w)
    step = -(eta**2) * (backward - numpy_gradient(W))
    np.testing.assert_allclose(pair, step, rtol=1e-11)


def test_level_set_drift_equals_closed_form(x64):
    g, product = numpy_gradient(W), numpy_hessian(W) @ numpy_gradient(W)
    projection = np.eye(3) - np.outer(g, g) / (g @ g)
    drift = penalty.level_set_drift(loss_fn, jnp.asarray(W))
    np.testing.assert_allclose(drift, -projection @ product / 2, rtol=1e-13)


def test_level_set_drift_is_tangential_and_flattens(x64):
    w = jnp.asarray(W)
    drift = penalty.level_set_drift(loss_fn, w)
    g = jax.grad(loss_fn)(w)
    assert abs(drift @ g) < 1e-14 * jnp.linalg.norm(drift) * jnp.linalg.norm(g)
    squared_norm = lambda w: jnp.sum(jax.grad(loss_fn)(w) ** 2)
    assert jax.grad(squared_norm)(w) @ drift < 0


def test_level_set_drift_where_gradient_is_an_eigenvector_is_zero(x64):
    """On a ridge the whole of H g points along g: nothing is left to drift."""
    valley = lambda w: w[0] ** 2 + 5 * w[1] ** 4
    drift = penalty.level_set_drift(valley, jnp.array([3.0, 0.0]))
    np.testing.assert_allclose(drift, [0, 0], atol=1e-15)


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
