"""What people write instead of the library: a line or two, and no corner cases."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def one_liner(
    loss_fn: Callable[..., jax.Array], level: float
) -> Callable[..., jax.Array]:
    return lambda *args: jnp.abs(loss_fn(*args) - level) + level


def sign(level: float) -> optax.GradientTransformationExtraArgs:
    """The one-liner in front of an optimizer."""

    def update(
        updates: Any, state: Any, params: Any = None, **given: Any
    ) -> tuple[Any, Any]:
        m = jnp.where(given["value"] < level, -1.0, 1.0)
        return jax.tree.map(lambda g: m.astype(g.dtype) * g, updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def band(level: float, half: float) -> optax.GradientTransformationExtraArgs:
    """The same between two ends: the state is whether the loss climbs."""

    def update(
        updates: Any, state: Any, params: Any = None, **given: Any
    ) -> tuple[Any, Any]:
        climbs = given["value"] < jnp.where(state, level + half, level - half)
        m = jnp.where(climbs, -1.0, 1.0)
        return jax.tree.map(lambda g: m.astype(g.dtype) * g, updates), climbs

    return optax.GradientTransformationExtraArgs(
        lambda params: jnp.bool_(False), update
    )


def window(
    inner: optax.GradientTransformation, level: float, k: int
) -> optax.GradientTransformationExtraArgs:
    """Sums and one cond: no weights, no NaN, no sums wider than the gradients."""

    def init(params: Any) -> Any:
        sums = jax.tree.map(jnp.zeros_like, params)
        return jnp.int32(0), jnp.zeros([]), sums, inner.init(params)

    def update(
        updates: Any, state: Any, params: Any = None, **given: Any
    ) -> tuple[Any, Any]:
        step, loss, sums, inner_state = state
        loss += given["value"].astype(loss.dtype)

        def added() -> Any:
            return jax.tree.map(jnp.add, sums, updates)

        def emit() -> Any:
            m = jnp.where(loss / k < level, -1.0, 1.0) / k
            means = jax.tree.map(lambda x: m.astype(x.dtype) * x, added())
            stepped, after = inner.update(means, inner_state, params)
            zeros = jax.tree.map(jnp.zeros_like, sums)
            return stepped, (jnp.zeros_like(step), jnp.zeros_like(loss), zeros, after)

        def wait() -> Any:
            nothing = jax.tree.map(jnp.zeros_like, updates)
            return nothing, (step + 1, loss, added(), inner_state)

        return jax.lax.cond(step == k - 1, emit, wait)

    return optax.GradientTransformationExtraArgs(init, update)
