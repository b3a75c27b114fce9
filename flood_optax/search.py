"""Line searches, which evaluate the loss themselves: what they are handed, and keep."""

from typing import Any

import jax
import jax.numpy as jnp

from flood_optax.bend import Bent
from flood_optax.checks import check_raw
from flood_optax.devices import AxisName
from flood_optax.objective import flooded
from flood_optax.shapes import Shape
from flood_optax.transform import scaled


def check_search(extra_args: dict[str, Any], *, windows: bool, weighted: bool) -> None:
    """A line search compares losses of one batch: those it evaluates, and this one."""
    for name in ("value_fn", "grad"):
        if extra_args.get(name) is None:
            continue
        if windows:
            raise ValueError(
                "`flood(every_k=..., should_skip_update_fn=...)` cannot use "
                f"`{name}`, which belongs to one micro-batch, got one. "
                "Line searches need the whole batch: `flood(inner, level)`."
            )
        if weighted and name == "value_fn":
            raise ValueError(
                "`flood(axis_name=...)` cannot weigh `value_fn` by `weight`, got both. "
                "Give a `value` and a `value_fn` that are the weighted mean over the "
                "devices already, without axis_name and weight."
            )


def flooded_search(
    extra_args: dict[str, Any], bent: Bent, shape: Shape, axis_name: AxisName | None
) -> dict[str, Any]:
    """What goes to the inner optimizer beside the value: what came raw, flooded."""
    handed_on = {n: x for n, x in extra_args.items() if n not in ("value", "weight")}
    if handed_on.get("loss") is None:  # not given, and most optimizers do not know it
        handed_on.pop("loss", None)
    if extra_args.get("grad") is not None:
        handed_on["grad"] = scaled(extra_args["grad"], bent.multiplier)
    if extra_args.get("value_fn") is not None:
        check_raw("flood(...).update(value_fn=...)", extra_args["value_fn"])
        handed_on["value_fn"] = flooded(
            extra_args["value_fn"], bent.level, axis_name=axis_name, shape=shape
        )
    return handed_on


def forgetting(inner_state: Any, bent: Bent) -> Any:
    """Marks value and gradient that a line search keeps, flooded ones, as unknown.

    `optax.value_and_grad_from_state` takes them for raw ones, unless the value is
    infinite: then it evaluates the loss function, as it does at the first step.
    """

    def kept(node: Any) -> bool:
        return {"value", "grad"} <= set(getattr(node, "_fields", ()))

    def forget(node: Any) -> Any:
        if not kept(node):
            return node
        off = bent.level == -jnp.inf  # nothing was flooded
        return node._replace(value=jnp.where(off, node.value, jnp.inf))

    return jax.tree.map(forget, inner_state, is_leaf=kept)
