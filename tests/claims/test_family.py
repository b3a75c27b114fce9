"""Every method of the family is one expression; each against numpy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import flood_loss, flood_mean, levels, shapes
from flood_optax.objective import relax_loss
from tests import oracles

# The equations: what is bent over a partition is that of tests/oracles.py


LOSSES = np.array([0.01, 0.02, 0.2, 0.3, 0.7, 0.05, 0.1])
B = 0.1  # the last loss ties with it: ties descend
CLASSES = np.array([0, 0, 1, 1, 3, 3, 0])  # class 2 is absent
BY_CLASS = np.array([0.05, 0.3, 0.5, 0.4])
BY_EXAMPLE = np.array([0.05, 0.01, 0.3, 0.1, 0.9, 0.0, 0.2])
N = len(LOSSES)
EACH = np.arange(N)


def bent(level, groups=None, shape=oracles.reflect):
    return lambda x: oracles.mean(x, level, groups=groups, shape=shape)


def authors_softad(x, theta=B, sigma=3.0):
    # eta theta + sigma^2 mean rho((l - theta) / sigma) with eta = 1
    z = (x - theta) / sigma
    value = theta + sigma**2 * np.mean(np.sqrt(1 + z**2) - 1)
    return value, sigma * z / np.sqrt(1 + z**2) / N


def numpy_per_term(x):
    (first, one), (second, other) = bent(0.05)(x[:2]), bent(B)(x[2:])
    return first + 0.5 * second, np.append(one, 0.5 * other)


def numpy_cvar(x, q=0.5, t=0.15):
    statistic = t + np.mean(np.maximum(x - t, 0)) / (1 - q)
    sign = 1 if statistic >= 0.4 else -1
    return abs(statistic - 0.4) + 0.4, sign * (x > t) / (1 - q) / N


def numpy_nnpu(x, beta=0.02, gamma=0.5):
    # positive risk: the first three; negative risk: the rest minus the prior's share
    positive, negative = x[:3].mean(), x[3:].mean() - 0.4
    g_plus = np.array([1 / 3] * 3 + [0.0] * 4)
    g_minus = np.array([0.0] * 3 + [1 / 4] * 4)
    if negative >= -beta:
        return positive + negative, g_plus + g_minus
    return -gamma * (negative + beta) - beta, -gamma * g_minus


def nnpu(x):
    positive, negative = x[:3].mean(), x[3:].mean() - 0.4
    bent = flood_loss(negative, 0.0, shape=shapes.asymmetric(0.5, 0.02))
    return jnp.where(negative >= -0.02, positive, 0.0) + bent


def sign_times_loss(x):
    return jax.lax.stop_gradient(jnp.where(x.mean() >= 0.5, 1, -1)) * x.mean()


PAUSE = shapes.pause()
METHODS = {
    "flooding": (lambda x: flood_mean(x, B), bent(B)),
    "iflood": (lambda x: flood_mean(x, B, over="example"), bent(B, EACH)),
    "adaflood": (
        lambda x: flood_mean(x, levels.adaflood(BY_EXAMPLE, 0.0), over="example"),
        bent(BY_EXAMPLE, EACH),
    ),
    "softad": (
        lambda x: flood_mean(x, B, over="example", shape=shapes.soft(3.0)),
        authors_softad,
    ),
    "class_wise": (
        lambda x: flood_mean(
            x, BY_CLASS, over="segment", segment_ids=CLASSES, num_segments=4
        ),
        bent(BY_CLASS, CLASSES),
    ),
    "per_term": (
        lambda x: flood_mean(x[:2], 0.05) + 0.5 * flood_mean(x[2:], B),
        numpy_per_term,
    ),
    "gan_restricted": (
        lambda x: flood_mean(x, 0.4, shape=PAUSE),
        lambda x: (max(x.mean(), 0.4), np.full(N, float(x.mean() >= 0.4)) / N),
    ),
    "mlcat_loss_scaling": (
        lambda x: flood_mean(x, B, over="example", shape=PAUSE),
        lambda x: (np.mean(np.maximum(x, B)), (x >= B) / N),
    ),
    "coce": (
        lambda x: flood_loss(0.15 + jnp.maximum(x - 0.15, 0).mean() / 0.5, 0.4),
        numpy_cvar,
    ),
    "kl_capacity": (
        lambda x: 5.0 * (flood_loss(x.sum(), 2.0) - 2.0),
        lambda x: (5 * abs(x.sum() - 2), np.full(N, 5.0 if x.sum() >= 2 else -5.0)),
    ),
    "nnpu": (nnpu, numpy_nnpu),
    "abl": (  # another value, and flooding's gradient
        sign_times_loss,
        lambda x: (x.mean() * np.sign(x.mean() - 0.5), bent(0.5)(x)[1]),
    ),
}


@functools.cache
def value_and_slopes(method):
    return jax.jit(jax.value_and_grad(METHODS[method][0]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [0.3, 1.0, 6.0], ids=["low", "mid", "high"])
@pytest.mark.parametrize("method", METHODS)
def test_method_is_one_expression(method, scale):
    losses = LOSSES * scale
    value, grad = value_and_slopes(method)(losses)
    expected_value, expected_grad = METHODS[method][1](losses)
    np.testing.assert_allclose(value, expected_value, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-14, atol=1e-16)


@pytest.mark.usefixtures("x64")
def test_wavebound_bends_each_output_element_of_the_batch_mean():
    rng = np.random.default_rng(0)
    student, target, y = rng.normal(size=(3, 16, 4, 2))  # [batch, step, feature]
    r, r_target = ((student - y) ** 2).mean(0), ((target - y) ** 2).mean(0)

    def objective(prediction):
        losses = jnp.mean((prediction - y) ** 2, axis=0)
        return flood_loss(losses, levels.wavebound(r_target, 0.05)).mean()

    value, grad = jax.jit(jax.value_and_grad(objective))(student)
    bound = r_target - 0.05
    np.testing.assert_allclose(value, np.mean(np.abs(r - bound) + bound), rtol=1e-14)
    sign = np.where(r >= bound, 1, -1)
    assert 0 < (sign < 0).mean() < 1
    np.testing.assert_allclose(grad, sign * 2 * (student - y) / 16 / 8, rtol=1e-13)


@jax.jit
@jax.value_and_grad
def relaxed(logits, labels, level_epoch_upper, where=None):
    level, epoch, upper = level_epoch_upper
    return relax_loss(logits, labels, level, epoch=epoch, upper=upper, where=where)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("upper", [1.0, 0.3])
@pytest.mark.parametrize("epoch", [0, 1, 6, 7])
@pytest.mark.parametrize("level", [-np.inf, 0.8, 1.5, 3.0, "tie"])
def test_relax_loss_equals_numpy(level, epoch, upper):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(9, 5)), rng.integers(0, 5, 9)
    logits[:4] += 3 * np.eye(5)[labels[:4]]  # some are right

    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.eye(5)[labels]
    losses = -np.log((p * y).sum(-1))
    right = p.argmax(-1) == labels
    assert 0 < right.mean() < 1
    tie = level == "tie"
    if tie:  # even epochs descend, odd ones flatten
        level = float(relaxed(logits, labels, (-np.inf, epoch, upper))[0])
        np.testing.assert_allclose(level, losses.mean(), rtol=1e-12)
    if epoch % 2 == 0:
        expected, slopes = oracles.mean(losses, -np.inf if tie else level)
        slope = 9 * slopes[:, None] * (p - y)
    elif losses.mean() > level and not tie:
        expected, slope = losses.mean(), p - y
    else:
        kept = np.minimum((p * y).sum(-1, keepdims=True), upper)
        target = np.where(y == 1, kept, (1 - kept) / 4)
        wrong = 1 - right
        expected = np.mean(wrong * -(target * np.log(p)).sum(-1) - losses)
        slope = wrong[:, None] * (p - target) - (p - y)

    value, grad = relaxed(logits, labels, (level, epoch, upper))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, slope / 9, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("level", [0.3, 9.0], ids=["above", "below"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_relax_loss_of_masked_logits_is_that_of_the_others(epoch, level):
    """A mask is what padding is: labels of no class, logits of NaN."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(4, 3, 5)).astype(np.float32)
    labels, where = rng.integers(0, 5, (4, 3)), rng.uniform(size=(4, 3)) < 0.6
    padded, given = np.where(where[..., None], logits, np.nan), (level, epoch, 1.0)
    value, slope = relaxed(padded, np.where(where, labels, -100), given, where)
    expected, some = map(np.asarray, relaxed(logits[where], labels[where], given))
    slope = np.asarray(slope)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope[where], some, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(slope[~where], 0)
    nothing = np.zeros_like(where)
    assert np.isnan(relaxed(logits, labels, given, nothing)[0])
    with pytest.raises(
        ValueError, match=r"relax_loss\(where=...\)` must leave at least"
    ):
        relax_loss(logits, labels, level, epoch=epoch, where=np.zeros_like(where))


def test_relax_loss_traces_once_over_epochs_and_keeps_the_dtype():
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(relax_loss, n=1))
    logits = jnp.asarray([[0.5, 0.0], [0.0, 2.0]], jnp.bfloat16)
    values = [run(logits, np.array([0, 0]), 9.0, epoch=e) for e in (0, 1, 2, 3)]
    assert values[0].dtype == jnp.bfloat16
    assert values[0] == values[2] != values[1] == values[3]


@pytest.mark.parametrize("epoch", [0, 1])
def test_relax_loss_nan_stays_nan_and_a_label_that_is_no_class_gives_it(epoch):
    logits, given = np.float32([[0.5, np.nan], [0.0, 2.0]]), (0.5, epoch, 1.0)
    assert np.isnan(relaxed(logits, np.array([0, 0]), given)[0])
    assert np.isnan(relaxed(logits[1:], np.array([2]), given)[0])


# The partition


def multipliers(objective, x):
    return jax.jit(jax.grad(objective))(np.float32(x))


def test_partition_decides_the_sign_of_the_published_example():
    # losses .01, .02, .2, .3 at .1: the batch descends, halves and examples cancel
    x = [0.01, 0.02, 0.2, 0.3]
    assert multipliers(lambda x: flood_mean(x, 0.1), x).sum() == 1
    halves = lambda x: (flood_mean(x[:2], 0.1) + flood_mean(x[2:], 0.1)) / 2
    assert multipliers(halves, x).sum() == 0
    assert multipliers(lambda x: flood_mean(x, 0.1, over="example"), x).sum() == 0


def test_per_term_and_joint_flooding_are_two_algorithms():
    # two tasks on both sides of their level: jointly nothing is below
    per_term = multipliers(lambda t: flood_loss(t, 0.2).sum(), [0.1, 0.5])
    np.testing.assert_array_equal(per_term, [-1, 1])
    joint = multipliers(lambda t: flood_loss(t.sum(), 0.4), [0.1, 0.5])
    np.testing.assert_array_equal(joint, [1, 1])


# Published numbers


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(1.0, [-0.7071, 0.4472, 0.9806]), (3.0, [-0.9487, 0.4932, 2.5725])],
)
def test_softad_multipliers_are_those_of_the_authors_code(sigma, expected):
    theta = 0.4
    losses = np.float32([-1.0, 0.5, 5.0]) + np.float32(theta)
    bent = lambda x: flood_loss(x, theta, shape=shapes.soft(sigma)).sum()
    slope = jax.jit(jax.grad(bent))
    np.testing.assert_allclose(slope(losses), expected, atol=5e-5)


def test_softad_toy_converges_where_flooding_chatters():
    # f = x^2/2 from x = -2 at level 1/2, learning rate 1/10 (Holland and Nakatani)
    def path(shape):
        grad = jax.grad(lambda x: flood_loss(x**2 / 2, 0.5, shape=shape))
        step = lambda x, _: 2 * (x - 0.1 * grad(x),)
        return np.asarray(jax.jit(lambda: jax.lax.scan(step, -2.0, None, 400)[1])())

    hard, soft = path(shapes.reflect()), path(shapes.soft())
    x, numpy_hard = -2.0, []
    for _ in range(400):
        x -= 0.1 * x * (1 if x**2 / 2 >= 0.5 else -1)
        numpy_hard.append(x)
    np.testing.assert_allclose(hard, numpy_hard, rtol=1e-4)
    np.testing.assert_allclose(soft[-1], -1.0, atol=1e-6)
    tail = hard[-20:] ** 2 / 2
    assert (np.diff(np.sign(tail - 0.5)) != 0).mean() > 0.9, "down, up, down, up"
    assert np.abs(tail - 0.5).mean() > 0.03, "and not closer to the level"
