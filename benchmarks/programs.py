"""Training steps in every form, of models of any size: what is compiled and timed."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import flood_optax
from flood_optax import penalty

LEVEL, RHO, STRENGTH, WINDOW, GROUPS = 0.3, 0.05, 0.01, 4, 10
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class MLP(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(GROUPS)(x)


class CNN(nn.Module):
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in self.features:
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(GROUPS)(x.mean((1, 2)))


class Transformer(nn.Module):
    """A language model: from each token and those before it the next."""

    vocabulary: int
    width: int
    heads: int
    layers: int
    attention: Callable[..., jax.Array] = jax.nn.dot_product_attention

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embedding = nn.Embed(self.vocabulary, self.width)
        x = embedding(tokens)
        for _ in range(self.layers):
            y = nn.Dense(3 * self.width)(nn.LayerNorm()(x))
            y = y.reshape(*y.shape[:2], 3 * self.heads, -1)
            query, key, value = jnp.split(y, 3, 2)
            y = self.attention(query, key, value, is_causal=True)
            x += nn.Dense(self.width)(y.reshape(x.shape))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x += nn.Dense(self.width)(y)
        return embedding.attend(nn.LayerNorm()(x))


def flash(
    query: jax.Array, key: jax.Array, value: jax.Array, *, is_causal: bool
) -> jax.Array:
    """Attention in one kernel, as JAX writes it for TPUs."""
    # here, because it is for TPUs alone
    from jax.experimental.pallas.ops.tpu import flash_attention  # noqa: PLC0415

    by_head = (x.swapaxes(1, 2) for x in (query, key, value))
    return flash_attention.flash_attention(*by_head, causal=is_causal).swapaxes(1, 2)


class Model(NamedTuple):
    """A network, the shape of one example, and how many make a batch (of a chip)."""

    net: nn.Module
    shape: tuple[int, ...]
    batch: int


class Batch(NamedTuple):
    """Inputs, labels, and the group of each example."""

    x: Any
    y: Any
    groups: Any


MODELS = {
    "mlp": Model(MLP((1024, 1024)), (784,), 256),
    "cnn": Model(CNN((64, 128, 256)), (32, 32, 3), 64),
    "transformer": Model(Transformer(512, 128, 2, 2), (64,), 16),
    "flash": Model(Transformer(512, 256, 2, 2, flash), (128,), 16),
}


def like(model: Model, dtype: Any, chips: int = 1) -> tuple[Any, Batch]:
    """Shapes and dtypes of the parameters and of a global batch."""
    rows = model.batch * chips
    words = isinstance(model.net, Transformer)
    x = jax.ShapeDtypeStruct((rows, *model.shape), jnp.int32 if words else dtype)
    labels = jax.ShapeDtypeStruct((rows, *(model.shape if words else ())), jnp.int32)
    groups = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def initial(x: jax.Array) -> Any:
        return optax.tree.cast(model.net.init(jax.random.key(0), x), dtype)

    return jax.eval_shape(initial, x), Batch(x, labels, groups)


def drawn(model: Model, dtype: Any, seed: int = 0) -> tuple[Any, Batch]:
    """Parameters and a batch, on the device."""
    _, shapes = like(model, dtype)
    keys = jax.random.split(jax.random.key(seed), 4)
    limit = getattr(model.net, "vocabulary", GROUPS)

    def labels(key: jax.Array, shape: tuple[int, ...], below: int) -> jax.Array:
        return jax.random.randint(key, shape, 0, below)

    if isinstance(model.net, Transformer):
        x = labels(keys[0], shapes.x.shape, limit)
    else:
        x = jax.random.normal(keys[0], shapes.x.shape, dtype)
    y = labels(keys[1], shapes.y.shape, limit)
    groups = labels(keys[2], shapes.groups.shape, GROUPS)
    params: Any = model.net.init(keys[3], x[:1])
    return optax.tree.cast(params, dtype), Batch(x, y, groups)


def losses_of(model: Model) -> Callable[[Any, Batch], jax.Array]:
    """The loss of every example, float32."""

    def losses(params: Any, batch: Batch) -> jax.Array:
        logits = cast(jax.Array, model.net.apply(params, batch.x)).astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return each.reshape(len(each), -1).mean(1)

    return losses


def by_value(value: Any, **given: Any) -> dict[str, Any]:
    """What an update is handed beside the gradients: the loss."""
    del given
    return {"value": value}


def by_gradient(
    value: Any, *, batch: Batch, value_and_grad: Any, **given: Any
) -> dict[str, Any]:
    """What SAM is handed: the gradient at other parameters."""
    del value, given
    return {"grad_fn": lambda params, _: value_and_grad(params, batch)[1]}


def scaled_by(
    factor: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by any function of the loss, as a control."""

    def update(
        updates: Any, state: Any, params: Any = None, *, value: Any, **others: Any
    ) -> tuple[Any, Any]:
        del params, others
        by = factor(value)
        return jax.tree.map(lambda g: g * by.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), cast(Any, update))


class Form(NamedTuple):
    """A step: its value and gradient, its optimizer, and what it is compared with."""

    value_and_grad: Callable[..., Any]
    optimizer: Any
    reference: str | None = "plain"
    axis_name: str | None = None
    extra: Callable[..., dict[str, Any]] = by_value


def forms(
    losses: Callable[[Any, Batch], jax.Array],
    inner: optax.GradientTransformation,
    level: float = LEVEL,
) -> dict[str, Form]:
    """Every form of a step, and the steps without flooding beside them."""

    def mean(params: Any, batch: Batch) -> jax.Array:
        return losses(params, batch).mean()

    def over(kind: str, **more: Any) -> Callable[..., Any]:
        def bent(params: Any, batch: Batch) -> jax.Array:
            ids = batch.groups if kind == "segment" else None
            return flood_optax.flood_mean(
                *(losses(params, batch), level),
                over=cast(Any, kind),
                segment_ids=ids,
                **more,
            )

        return jax.value_and_grad(bent)

    raw = jax.value_and_grad(mean)
    plain = optax.with_extra_args_support(inner)
    flooded = jax.value_and_grad(flood_optax.flooded(mean, level))
    chain = optax.chain(flood_optax.scale_by_flood(level), inner)
    steps = optax.MultiSteps(inner, WINDOW).gradient_transformation()
    window = flood_optax.flood(inner, level, every_k=WINDOW)
    another = optax.chain(scaled_by(lambda loss: 1 / (1 + loss)), inner)
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    sam = optax.contrib.sam(inner, adversary, opaque_mode=True)
    mapped = functools.partial(Form, axis_name="data")
    on_mesh = jax.value_and_grad(flood_optax.flooded(mean, level, axis_name="data"))
    chain_on_mesh = optax.chain(
        flood_optax.scale_by_flood(level, axis_name="data"), inner
    )
    return {
        "plain": Form(raw, plain, None),
        "loss form": Form(flooded, plain),
        "optax form": Form(raw, chain),
        "another factor": Form(raw, another),
        "wrapper": Form(raw, flood_optax.flood(inner, level)),
        f"MultiSteps({WINDOW})": Form(raw, steps, None),
        f"wrapper, every_k={WINDOW}": Form(raw, window, f"MultiSteps({WINDOW})"),
        "per example": Form(over("example"), plain),
        "per class": Form(over("segment", num_segments=GROUPS), plain),
        "shard_map, plain": mapped(raw, plain, None),
        "shard_map, loss form": mapped(on_mesh, plain, "shard_map, plain"),
        "shard_map, optax form": mapped(raw, chain_on_mesh, "shard_map, plain"),
        "SAM": Form(raw, sam, extra=by_gradient),
        "SAM, loss form": Form(flooded, sam, "SAM", extra=by_gradient),
        "exact penalty": Form(penalty.value_and_grad(mean, STRENGTH), plain),
    }


def step_of(form: Form, mesh: Mesh | None = None) -> Callable[..., Any]:
    """(params, state, batch) -> (params, state, value), over the mesh where mapped."""

    def step(params: Any, state: Any, batch: Batch) -> Any:
        local: Any = params
        if form.axis_name:
            local = cast(Any, lax.pcast)(params, form.axis_name, to="varying")
        value, grads = form.value_and_grad(local, batch)
        if form.axis_name:
            grads = lax.pmean(grads, form.axis_name)

        extra = form.extra(
            value, grads=grads, batch=batch, value_and_grad=form.value_and_grad
        )
        updates, state = form.optimizer.update(grads, state, params, **extra)
        if form.axis_name:
            value = lax.pmean(value, form.axis_name)
        return optax.apply_updates(params, updates), state, value

    if form.axis_name is None:
        return step
    rows = P(form.axis_name)
    return jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), rows), out_specs=(P(), P(), P())
    )


def arguments(
    form: Form, params: Any, batch: Batch, mesh: Mesh, *, fsdp: bool = False
) -> tuple[Any, Any, Any]:
    """Shapes with shardings: rows split, parameters and state copied or split too."""

    def spec(leaf: Any) -> P:
        shape = leaf.shape
        if not fsdp or np.prod(shape, initial=1) < 2**14:
            return P()
        wide = max(range(len(shape)), key=lambda axis: shape[axis])
        if shape[wide] % mesh.size:
            return P()
        return P(*(["data" if axis == wide else None for axis in range(len(shape))]))

    def put(tree: Any, spec_of: Callable[[Any], P]) -> Any:
        def placed(leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, spec_of(leaf))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(placed, tree)

    state = jax.eval_shape(form.optimizer.init, params)
    return put(params, spec), put(state, spec), put(batch, lambda _: P("data"))


def small_training(
    steps: int = 300, rows: int = 300, width: int = 32
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """(level, key) -> losses of a small MLP on random labels: what sweeps map over."""
    net = MLP((width,))
    optimizer = optax.adam(1e-3)

    def train(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        first, second, third, fourth = jax.random.split(key, 4)
        x = jax.random.normal(first, (rows, 64))
        y = jax.random.randint(second, (rows,), 0, GROUPS)
        params: Any = net.init(third, x[:1])

        def step(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry

            def loss_fn(params: Any) -> jax.Array:
                logits = cast(jax.Array, net.apply(params, x[batch]))
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits, y[batch]
                ).mean()

            bent = flood_optax.flooded(loss_fn, level, return_info=True)
            (_, info), grads = jax.value_and_grad(bent, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), info.loss

        batches = jax.random.randint(fourth, (steps, min(rows, 50)), 0, rows)
        scan = cast(Callable[..., tuple[Any, jax.Array]], lax.scan)
        _, losses = scan(step, (params, optimizer.init(params)), batches)
        return {"loss": losses}

    return train
