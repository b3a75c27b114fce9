"""Measures what a flooded training step costs beside the plain one and its rivals."""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.typing import ArrayLike
from tqdm import tqdm

import flood_optax
from benchmarks import record, report, timing, torch_rivals
from flood_optax import penalty

LEVEL, RHO, ACCUMULATION = 0.3, 0.05, 4
OPTIMIZERS = {"sgd": lambda: optax.sgd(0.1), "adam": lambda: optax.adam(1e-3)}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
REFERENCE_OF = {  # the others: the plain step, all in one interleaved run
    f"wrapper, every_k={ACCUMULATION}": f"MultiSteps({ACCUMULATION})",
    "PyTorch": "plain",
    "PyTorch, one-liner": "PyTorch",
}
EAGER: dict[str, Any] = {  # PyTorch compiles nothing, and says nothing of these
    "flops": None,
    "temp_bytes": None,
    "kernels": None,
    "compile_seconds": None,
}


SHORT = (  # of the variants, for the README
    *("plain, again", "loss form", "optax form", "wrapper", "jnp.abs one-liner"),
    *("PyTorch, one-liner", "SAM", "exact penalty"),
)


COMPARED = (  # with the reference
    *("time_ratio_median", "flops_ratio", "temp_memory_ratio"),
    *("more_kernels", "compile_ratio", "compiles"),
)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for width in (512, 512):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(64)(x.reshape(len(x), -1, 28))  # a row of the image is a token
        for _ in range(2):
            attention: Any = nn.MultiHeadDotProductAttention(num_heads=4)
            x += attention(nn.LayerNorm()(x))
            x += nn.Dense(64)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x.mean(1))


MODELS: dict[str, tuple[nn.Module, int]] = {  # and the batch size
    "mlp": (MLP(), 256),
    "cnn": (CNN(), 64),
    "transformer": (Transformer(), 32),
}


def one_liner(loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """What people write."""
    return lambda *args: jnp.abs(loss_fn(*args) - LEVEL) + LEVEL


def sam(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """SAM in one call per step: the adversarial gradient comes from `grad_fn`."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(inner, adversary, opaque_mode=True)


def steps(
    loss_fn: Callable[..., Any], inner: optax.GradientTransformation, *, rivals: bool
) -> dict[str, tuple[Any, Any]]:
    """For each variant its objective's value_and_grad, and its optimizer."""

    def mean_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss_fn(params, x, y).mean()

    def per_example(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return flood_optax.flood_mean(loss_fn(params, x, y), LEVEL, over="example")

    raw = jax.value_and_grad(mean_loss)
    plain = optax.with_extra_args_support(inner)
    loss_form = jax.value_and_grad(flood_optax.flooded(mean_loss, LEVEL))
    variants: dict[str, tuple[Any, Any]] = {
        "plain": (raw, plain),
        "plain, again": (raw, plain),
        "loss form": (loss_form, plain),
        "optax form": (raw, optax.chain(flood_optax.scale_by_flood(LEVEL), inner)),
        "wrapper": (raw, flood_optax.flood(inner, LEVEL)),
        "per example": (jax.value_and_grad(per_example), plain),
        "jnp.abs one-liner": (jax.value_and_grad(one_liner(mean_loss)), plain),
        f"MultiSteps({ACCUMULATION})": (raw, optax.MultiSteps(inner, ACCUMULATION)),
        f"wrapper, every_k={ACCUMULATION}": (
            raw,
            flood_optax.flood(inner, LEVEL, every_k=ACCUMULATION),
        ),
    }
    if rivals:
        variants["exact penalty"] = (penalty.value_and_grad(mean_loss, 0.01), plain)
        variants["SAM"] = (raw, sam(inner))
    return variants


def train_step(value_and_grad: Any, optimizer: Any, *, is_sam: bool) -> Any:
    """One step, which returns its loss, as training loops do to log it."""

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = value_and_grad(params, x, y)

        def grad_fn(params: Any, _: Any) -> Any:
            return value_and_grad(params, x, y)[1]

        extra: dict[str, Any] = {"grad_fn": grad_fn} if is_sam else {"value": value}
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    return step


def measure(
    model: str, optimizer: str, dtype: str, *, rounds: int, rivals: bool
) -> list[dict[str, Any]]:
    """All variants of one setting, interleaved."""
    net, batch = MODELS[model]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, 28, 28, 1), DTYPES[dtype])
    y = jax.random.randint(keys[1], (batch,), 0, 10)
    params = optax.tree.cast(net.init(keys[2], x), DTYPES[dtype])

    def loss_fn(params: Any, x: jax.Array, y: ArrayLike) -> jax.Array:
        logits: Any = net.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    calls: dict[str, Callable[[], Any]] = {}
    costs: dict[str, dict[str, Any]] = {}
    compiles: dict[str, int] = {}
    for name, (value_and_grad, transform) in steps(
        loss_fn, OPTIMIZERS[optimizer](), rivals=rivals
    ).items():
        step = train_step(value_and_grad, transform, is_sam=name == "SAM")
        arguments = (params, transform.init(params), x, y)
        costs[name] = timing.compiled_cost(step, *arguments, donate=(0, 1))
        compiled = cast(Callable[..., tuple[Any, Any, Any]], jax.jit(step))
        later = (*compiled(*arguments)[:2], x, y)
        compiles[name] = timing.traces(step, arguments, later, later)
        calls[name] = functools.partial(compiled, *arguments)
    timings = timing.compare(calls, rounds=rounds, calls=3)
    if rivals and record.version("torch") is not None:
        images, labels = np.asarray(x), np.asarray(y)
        eager = torch_rivals.steps(model, optimizer, images, labels, level=LEVEL)
        calls |= eager
        costs |= dict.fromkeys(eager, EAGER)
        compiles |= dict.fromkeys(eager, 0)
    for name, reference in REFERENCE_OF.items():
        if name in calls:  # another reference, or other threads: a run of their own
            pair = {key: calls[key] for key in (reference, name)}
            timings[name] = timing.compare(pair, rounds=rounds, calls=3)[name]
    rows: list[dict[str, Any]] = []
    for name, seen in timings.items():
        reference = REFERENCE_OF.get(name, "plain")
        own, base = costs[name], costs[reference]
        rows.append(
            {
                "model": model,
                "optimizer": optimizer,
                "dtype": dtype,
                "variant": name,
                "reference": reference,
                "seconds_median": seen["seconds_median"],
                "time_ratio_median": seen["time_ratio_median"],
                "time_ratio_iqr": seen["time_ratio_iqr"],
                "flops_ratio": ratio(own["flops"], base["flops"]),
                "temp_memory_ratio": ratio(own["temp_bytes"], base["temp_bytes"]),
                "temp_bytes": own["temp_bytes"],
                "kernels": own["kernels"],
                "compile_seconds": own["compile_seconds"],
                "compiles": compiles[name],
            }
        )
    return rows


def ratio(own: float | None, base: float | None) -> float | None:
    """None where one of them is not known."""
    return None if own is None or base is None else own / base


def known(rows: Sequence[dict[str, Any]], measure: str) -> list[float]:
    """What the rows say of a measure, without those that do not know it."""
    return [row[measure] for row in rows if row[measure] is not None]


def in_digits(x: float | None, digits: int = 4) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with kernels and compile time beside those of their reference."""

    def setting(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["model"], row["optimizer"], row["dtype"]

    found = {(*setting(row), row["variant"]): row for row in rows}

    def beside(row: dict[str, Any]) -> dict[str, Any]:
        base = found[(*setting(row), row["reference"])]
        more = None if row["kernels"] is None else row["kernels"] - base["kernels"]
        slower = ratio(row["compile_seconds"], base["compile_seconds"])
        return row | {"more_kernels": more, "compile_ratio": slower}

    return [beside(row) for row in rows if row["variant"] != "plain"]


def numbers(payload: dict[str, Any]) -> dict[str, Any]:
    """Columns of each row, and over all settings their least, median and greatest."""
    rows = compared(payload["rows"])
    found = report.named(
        rows,
        lambda row: "/".join(
            report.slug(row[part])
            for part in ("variant", "model", "optimizer", "dtype")
        ),
    )
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        for column in COMPARED:
            if seen := known(mine, column):
                base = f"{report.slug(name)}/{column}"
                found |= {f"{base}/min": min(seen), f"{base}/max": max(seen)}
                found[f"{base}/median"] = statistics.median(seen)
    return found


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """Medians over models, optimizers and dtypes, short and whole, and every row."""
    rows = compared(payload["rows"])
    of = {
        name: [row for row in rows if row["variant"] == name]
        for name in dict.fromkeys(row["variant"] for row in rows)
    }

    def middle(name: str, measure: str) -> str:
        seen = known(of[name], measure)
        return in_digits(statistics.median(seen) if seen else None, 3)

    def most(name: str, measure: str, digits: int = 4) -> str:
        return in_digits(max(known(of[name], measure), default=None), digits)

    def summary(name: str) -> list[str]:
        ratios = known(of[name], "time_ratio_median")
        return [
            *(name, of[name][0]["reference"], middle(name, "time_ratio_median")),
            f"{min(ratios):.3f} to {max(ratios):.3f}",
            *(most(name, "flops_ratio"), middle(name, "temp_memory_ratio")),
            *(most(name, "temp_memory_ratio"), most(name, "more_kernels", 0)),
            *(middle(name, "compile_ratio"), most(name, "compiles", 0)),
        ]

    header = [
        *("variant", "against", "step time, median", "range", "FLOPs, max"),
        *("memory, median", "memory, max", "more kernels, max"),
        *("compile time, median", "traces"),
    ]
    whole = report.table(header, [summary(name) for name in of])
    short = report.table(
        ["step", "against", "time, median", "FLOPs, max", "memory, median"],
        [
            [
                *(name, of[name][0]["reference"], middle(name, "time_ratio_median")),
                *(most(name, "flops_ratio"), middle(name, "temp_memory_ratio")),
            ]
            for name in SHORT
            if name in of
        ],
    )
    full = report.table(
        ["model", "optimizer", "dtype", "variant", "time (IQR)", "FLOPs", "memory"],
        [
            [
                *(row["model"], row["optimizer"], row["dtype"], row["variant"]),
                "{:.3f} ({:.3f} to {:.3f})".format(
                    row["time_ratio_median"], *row["time_ratio_iqr"]
                ),
                in_digits(row["flops_ratio"]),
                in_digits(row["temp_memory_ratio"]),
            ]
            for row in rows
        ],
    )
    source = report.provenance(payload)
    return {
        "overhead": f"{whole}\n\n{source}",
        "overhead-short": f"{short}\n\n{source}",
        "overhead-all": full,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = record.arguments("overhead", __doc__)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(argv)
    settings = [(m, o, d) for m in MODELS for o in OPTIMIZERS for d in DTYPES]
    rounds = args.rounds
    if args.smoke:
        settings, rounds = [("cnn", "sgd", "float32")], 2
    if record.version("torch") is None:
        print("PyTorch is not measured: pip install 'flood_optax[rivals]'.")
    rows: list[dict[str, Any]] = []
    for model, optimizer, dtype in tqdm(settings, unit="setting"):
        rows += measure(
            model, optimizer, dtype, rounds=rounds, rivals=dtype == "float32"
        )
    protocol = {"rounds": rounds, "calls_per_round": 3, "level": LEVEL, "sam_rho": RHO}
    payload: dict[str, Any] = {"protocol": protocol, "rows": rows}
    written = record.write("overhead", payload, args.out)
    payload = record.read("overhead", args.out)
    print(f"\n{tables(payload)['overhead']}\n\nWrote {written}")
