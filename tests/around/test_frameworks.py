"""Training frameworks: the recipe of docs/trainers.md settles at the level."""

import textwrap

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import optimistix as optx
import pytest
from flax import nnx
from flax.training import train_state
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

import flood_optax.flax
from flood_optax import flood, flooded, scale_by_flood
from tests import processes

LEVEL = 0.2
X = jax.random.normal(jax.random.key(0), (64, 4))
Y = jnp.sin(X[:, 0]) + 0.3 * X[:, 1]


def mse(outputs):
    return jnp.mean((outputs - Y) ** 2)


def settles(losses, level=LEVEL, band=0.06):
    """Above the level, then on both sides of it."""
    losses = np.asarray(losses)
    assert losses[0] > level + band
    late = losses[-20:]
    np.testing.assert_allclose(late, level, atol=band)
    assert late.min() < level < late.max()


def chain(rate=0.05):
    return optax.chain(scale_by_flood(LEVEL), optax.sgd(rate))


# ---- flax ----


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.05, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        hidden = nnx.tanh(self.norm(self.hidden(x)))
        return self.out(self.dropout(hidden))[:, 0]


NNX_OPTIMIZERS = {
    "chain": (chain, False),
    "loss_form": (lambda: optax.sgd(0.05), True),
}


@pytest.mark.parametrize("form", NNX_OPTIMIZERS)
def test_nnx_optimizer_with_batch_norm_and_dropout(form):
    make, in_the_loss = NNX_OPTIMIZERS[form]
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    def loss_fn(model):
        return mse(model(X))

    @nnx.jit
    def step(model, optimizer):
        if in_the_loss:
            objective = flooded(loss_fn, LEVEL, return_info=True)
            (_, info), grads = nnx.value_and_grad(objective, has_aux=True)(model)
            optimizer.update(model, grads)
            return info.loss
        value, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, value=value)
        return value

    mean_before = model.norm.mean[...]
    settles([float(step(model, optimizer)) for _ in range(120)], band=0.1)
    assert np.abs(model.norm.mean[...] - mean_before).max() > 1e-3  # BatchNorm lives
    if form != "loss_form":
        assert optax.tree.get(optimizer.opt_state, "flood_step")[...] == 120


def test_nnx_optimizer_without_the_value_is_an_error():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chain(), wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match="needs the current loss, got None"):
        optimizer.update(model, grads)


def linen():
    model = nn.Dense(1)
    return model, model.init(jax.random.key(1), X)


def linen_loss(params):
    return mse(nn.Dense(1).apply(params, X)[:, 0])


def test_our_train_state_hands_the_value_to_the_optimizer():
    model, params = linen()
    state = flood_optax.flax.TrainState.create(
        apply_fn=model.apply, params=params, tx=chain(0.2)
    )

    @jax.jit
    @chex.assert_max_traces(n=2)  # flax's step counter begins as a Python int
    def step(state):
        value, grads = jax.value_and_grad(linen_loss)(state.params)
        return state.apply_gradients(grads=grads, value=value), value

    losses = []
    for _ in range(60):
        state, value = step(state)
        losses.append(float(value))
    settles(losses, band=0.15)
    assert int(state.step) == 60


def test_flax_train_state_drops_the_value_and_takes_the_loss_form():
    model, params = linen()
    create = train_state.TrainState.create
    state = create(apply_fn=model.apply, params=params, tx=chain(0.2))
    with pytest.raises(ValueError, match="needs the current loss, got None"):
        state.apply_gradients(grads=params, value=1.0)

    state = create(apply_fn=model.apply, params=params, tx=optax.sgd(0.2))
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        state.apply_gradients(grads=params, value=1.0)
    objective = flooded(linen_loss, LEVEL, return_info=True)

    @jax.jit
    def step(state):
        (_, info), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), info.loss

    losses = []
    for _ in range(60):
        state, value = step(state)
        losses.append(float(value))
    settles(losses, band=0.15)


# ---- equinox, haiku ----


@pytest.mark.parametrize("form", ["optax_form", "loss_form"])
def test_equinox(form):
    model = eqx.nn.MLP(4, "scalar", 16, 1, key=jax.random.key(2))
    optimizer = chain() if form == "optax_form" else optax.sgd(0.05)
    optimizer = optax.with_extra_args_support(optimizer)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def loss_fn(model):
        return mse(jax.vmap(model)(X))

    objective = loss_fn if form == "optax_form" else flooded(loss_fn, LEVEL)

    @eqx.filter_jit
    def step(model, state):
        value, grads = eqx.filter_value_and_grad(objective)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimizer.update(grads, state, params, value=value)
        return eqx.apply_updates(model, updates), state, loss_fn(model)

    losses = []
    for _ in range(120):
        model, state, value = step(model, state)
        losses.append(float(value))
    settles(losses)


def test_haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(x)[:, 0]))
    params = net.init(jax.random.key(3), X)
    optimizer = chain(0.2)

    def loss_fn(params):
        return mse(net.apply(params, X))

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    start = (params, optimizer.init(params))
    settles(jax.lax.scan(step, start, length=60)[1], band=0.15)


# ---- optimistix ----


def convex(w, args):
    del args
    return jnp.sum(jnp.exp(w) - w - 1.0)


OPTIMISTIX = {
    "flood_sgd": (convex, lambda: flood(optax.sgd(0.1), 0.5), 0.1),
    "flood_polyak": (convex, lambda: flood(optax.polyak_sgd(f_min=0.5), 0.5), 1e-3),
    "loss_form": (flooded(convex, 0.5), lambda: optax.sgd(0.1), 0.1),
}


@pytest.mark.parametrize("form", OPTIMISTIX)
def test_optimistix_optax_minimiser_stays_at_the_level(form):
    objective, make, band = OPTIMISTIX[form]
    solver = optx.OptaxMinimiser(make(), rtol=1e-6, atol=1e-6)
    solution = optx.minimise(
        objective, solver, jnp.array([1.0, -0.5]), max_steps=150, throw=False
    )
    assert float(convex(solution.value, None)) == pytest.approx(0.5, abs=band)
    # steps around a level do not shrink: "never converged" is the right report
    if "sgd" in form or form == "loss_form":
        assert solution.result != optx.RESULTS.successful


def test_optimistix_hands_over_value_fn_which_scale_by_flood_refuses():
    solver = optx.OptaxMinimiser(chain(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"got `value_fn`.* Use `flood_optax.flood\("):
        optx.minimise(convex, solver, jnp.array([1.0, -0.5]), max_steps=5)


# ---- numpyro ----


def regression(x, y):
    weights = numpyro.sample("w", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(x @ weights, 1.0).to_event(1), obs=y)


def test_numpyro_svi_floods_the_negative_elbo():
    optimizer = optax.chain(scale_by_flood(75.0), optax.sgd(1e-3))
    svi = SVI(regression, AutoDelta(regression), optimizer, Trace_ELBO())
    run = svi.run(jax.random.key(4), 100, X, Y, progress_bar=False)
    settles(run.losses, level=75.0, band=3.0)
    # the level is reachable from below only: the MAP estimate has a loss of 63.4
    weights = jnp.linalg.solve(X.T @ X + jnp.eye(4), X.T @ Y)
    residual = jnp.sum((X @ weights - Y) ** 2) + jnp.sum(weights**2)
    least = 0.5 * residual + (64 + 4) / 2 * jnp.log(2 * jnp.pi)
    assert least < 65.0


# ---- keras, whose backend is chosen once per process ----

KERAS = textwrap.dedent('''
    import keras
    import numpy as np
    from flood_optax import flood_loss

    class FloodedMSE(keras.losses.MeanSquaredError):
        """Floods the reduced loss: __call__ is after the mean, call before it."""

        def __call__(self, y_true, y_pred, sample_weight=None):
            loss = super().__call__(y_true, y_pred, sample_weight)
            return flood_loss(loss, 0.2)

    class FloodedPerExample(keras.losses.MeanSquaredError):
        def call(self, y_true, y_pred):
            return flood_loss(super().call(y_true, y_pred), 0.2)

    assert keras.backend.backend() == "jax"
    # squared errors .09 and .36, mean .225; flooded one by one .31 and .36
    y_true, y_pred = np.zeros((2, 1), "float32"), np.array([[0.3], [0.6]], "float32")
    assert abs(float(FloodedMSE()(y_true, y_pred)) - 0.225) < 1e-6
    assert abs(float(FloodedPerExample()(y_true, y_pred)) - 0.335) < 1e-6

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    y = np.sin(x[:, :1]) + 0.3 * x[:, 1:2]
    late = {}
    for loss in (keras.losses.MeanSquaredError(), FloodedMSE(), FloodedPerExample()):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model.compile(optimizer=keras.optimizers.SGD(0.05), loss=loss, metrics=["mse"])
        history = model.fit(x, y, epochs=120, batch_size=64, verbose=0).history
        late[type(loss).__name__] = np.mean(history["mse"][-20:])
    assert late["MeanSquaredError"] < 0.05, late
    assert abs(late["FloodedMSE"] - 0.2) < 0.03, late
    assert late["FloodedPerExample"] < 0.17, late
''')


@pytest.mark.slow  # test_trainers.py trains with Keras every time
def test_keras_on_jax_floods_the_reduced_loss():
    filters = ("error::UserWarning",)
    process = processes.start("-c", KERAS, filters=filters, KERAS_BACKEND="jax")
    code, _, errors = processes.end(process)
    assert code == 0, errors[-3000:]
