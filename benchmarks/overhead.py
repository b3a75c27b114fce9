"""Measures what a flooded training step costs beside the plain one and its rivals."""

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import flood_optax
from benchmarks import by_hand, networks, programs, record, report, timing, torch_rivals
from benchmarks.programs import DTYPES, LEVEL, RHO, WINDOW, Batch, Form
from benchmarks.training import cross_entropy

BAND = 0.06
OPTIMIZERS = {"sgd": lambda: optax.sgd(0.1), "adam": lambda: optax.adam(1e-3)}
STEPS, WINDOWS = f"MultiSteps({WINDOW})", f"wrapper, every_k={WINDOW}"
BY_SUMS = f"window of {WINDOW} by hand"
REFERENCE_OF = {  # the others: the plain step, all in one interleaved run
    WINDOWS: STEPS,
    BY_SUMS: STEPS,
    "PyTorch": "plain",
    "PyTorch, one-liner": "PyTorch",
}
EAGER: dict[str, Any] = {  # what is not compiled says nothing of these
    "flops": None,
    "temp_bytes": None,
    "kernels": None,
    "compile_seconds": None,
}


class Problem(NamedTuple):
    """A batch of random images and labels, a network's losses on it, parameters."""

    losses: Callable[[Any, Batch], jax.Array]
    params: Any
    batch: Batch


def problem(model: str, dtype: Any = jnp.float32) -> Problem:
    net, size = networks.TIMED[model]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (size, 28, 28, 1), dtype)
    y = jax.random.randint(keys[1], (size,), 0, 10)

    def losses(params: Any, batch: Batch) -> jax.Array:
        return cross_entropy(net.apply(params, batch.x), batch.y)

    params = optax.tree.cast(net.init(keys[2], x), dtype)
    return Problem(losses, params, Batch(x, y, None))


def variants(
    losses: Callable[[Any, Batch], jax.Array],
    inner: optax.GradientTransformation,
    *,
    rivals: bool,
) -> dict[str, Form]:
    """The forms of a step, and what people write instead."""
    made = programs.forms(losses, inner)
    raw, plain, *_ = made["plain"]

    def mean_loss(params: Any, batch: Batch) -> jax.Array:
        return losses(params, batch).mean()

    def behind(first: optax.GradientTransformation) -> Form:
        return Form(raw, optax.chain(first, inner))

    one_liner = jax.value_and_grad(by_hand.one_liner(mean_loss, LEVEL))
    found = {"plain": made["plain"], "plain, again": made["plain"]}
    forms = ("loss form", "optax form", "wrapper", "per example")
    found |= {name: made[name] for name in forms}
    found |= {
        "jnp.abs one-liner": Form(one_liner, plain),
        "sign one-liner": behind(by_hand.sign(LEVEL)),
        "optax form, band": behind(flood_optax.scale_by_flood(LEVEL, band=BAND)),
        "band by hand": behind(by_hand.band(LEVEL, BAND)),
        STEPS: made[STEPS],
        WINDOWS: made[WINDOWS],
    }
    if rivals:
        # in bfloat16 Adam gives its moments another dtype, which this cond refuses
        found[BY_SUMS] = Form(raw, by_hand.window(inner, LEVEL, WINDOW))
        found |= {name: made[name] for name in ("exact penalty", "SAM")}
    return found


def eagerly(tried: Mapping[str, Form], at: Problem) -> dict[str, Callable[[], Any]]:
    """A window of updates of each optimizer alone, operation by operation."""
    value, grads = tried["plain"].value_and_grad(at.params, at.batch)

    def updates_of(optimizer: Any) -> Callable[[], Any]:
        start = optimizer.init(at.params)

        def run() -> Any:
            updates, state = None, start
            for _ in range(WINDOW):
                updates, state = optimizer.update(grads, state, at.params, value=value)
            return updates, state

        return run

    # no `window by hand`: its cond would compile at every update
    names = ["plain", "sign one-liner", "optax form", "optax form, band", "wrapper"]
    names += [STEPS, WINDOWS]
    return {f"{name}, eagerly": updates_of(tried[name].optimizer) for name in names}


def setting(
    model: str, optimizer: str, dtype: str, *, rounds: int, rivals: bool
) -> list[dict[str, Any]]:
    """All variants of one setting, interleaved."""
    at = problem(model, DTYPES[dtype])
    tried = variants(at.losses, OPTIMIZERS[optimizer](), rivals=rivals)
    costs: dict[str, dict[str, Any]] = {}
    traces: dict[str, int] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, form in tried.items():
        step = programs.step_of(form)
        given = (at.params, form.optimizer.init(at.params), at.batch)
        costs[name] = timing.compiled_cost(step, *given, donate=(0, 1))
        calls[name] = functools.partial(cast(Callable[..., Any], jax.jit(step)), *given)
        later = (*calls[name]()[:2], at.batch)
        traces[name] = timing.traces(step, given, later, later)
    timings = timing.compare(calls, rounds=rounds, calls=3)
    references = dict(REFERENCE_OF)
    if rivals and record.version("torch") is not None:
        images, labels = np.asarray(at.batch.x), np.asarray(at.batch.y)
        calls |= torch_rivals.steps(model, optimizer, images, labels, level=LEVEL)
    if rivals:
        one_by_one = eagerly(tried, at)
        timings |= timing.compare(one_by_one, rounds=rounds)
        references |= dict.fromkeys(one_by_one, "plain, eagerly")
    for name, reference in REFERENCE_OF.items():
        if name in calls:  # another reference, or other threads: a run of their own
            pair = {key: calls[key] for key in (reference, name)}
            timings[name] = timing.compare(pair, rounds=rounds, calls=3)[name]
    rows: list[dict[str, Any]] = []
    for name, seen in timings.items():
        reference = references.get(name, "plain")
        own, base = costs.get(name, EAGER), costs.get(reference, EAGER)
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
                "compiles": traces.get(name, 0),
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

    def place(row: dict[str, Any], variant: str) -> tuple[str, ...]:
        return row["model"], row["optimizer"], row["dtype"], variant

    found = {place(row, row["variant"]): row for row in rows}

    def beside(row: dict[str, Any]) -> dict[str, Any]:
        base = found[place(row, row["reference"])]
        more = None if row["kernels"] is None else row["kernels"] - base["kernels"]
        slower = ratio(row["compile_seconds"], base["compile_seconds"])
        return row | {"more_kernels": more, "compile_ratio": slower}

    return [beside(row) for row in rows if row["variant"] != row["reference"]]


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """Medians over models, optimizers and dtypes, short and whole, and every row."""
    rows = compared(payload["rows"])
    of = {
        name: [row for row in rows if row["variant"] == name]
        for name in dict.fromkeys(row["variant"] for row in rows)
    }

    def middle(seen: Sequence[dict[str, Any]], measure: str) -> str:
        values = known(seen, measure)
        return in_digits(statistics.median(values) if values else None, 3)

    def most(seen: Sequence[dict[str, Any]], measure: str, digits: int = 4) -> str:
        return in_digits(max(known(seen, measure), default=None), digits)

    def extent(seen: Sequence[dict[str, Any]]) -> str:
        ratios = known(seen, "time_ratio_median")
        return f"{min(ratios):.3f} to {max(ratios):.3f}"

    whole = report.markdown(
        [
            *("variant", "against", "step time, median", "range", "FLOPs, max"),
            *("memory, median", "memory, max", "more kernels, max"),
            *("compile time, median", "traces"),
        ],
        [
            [
                *(name, mine[0]["reference"]),
                *(middle(mine, "time_ratio_median"), extent(mine)),
                *(most(mine, "flops_ratio"), middle(mine, "temp_memory_ratio")),
                *(most(mine, "temp_memory_ratio"), most(mine, "more_kernels", 0)),
                *(middle(mine, "compile_ratio"), most(mine, "compiles", 0)),
            ]
            for name, mine in of.items()
        ],
    )
    full = report.table(
        rows,
        {
            "model": "{model}",
            "optimizer": "{optimizer}",
            "dtype": "{dtype}",
            "variant": "{variant}",
            "time (IQR)": "{time_ratio_median:.3f} "
            "({time_ratio_iqr[0]:.3f} to {time_ratio_iqr[1]:.3f})",
            "FLOPs": lambda row: in_digits(row["flops_ratio"]),
            "memory": lambda row: in_digits(row["temp_memory_ratio"]),
        },
    )
    source = report.provenance(payload)
    return {
        "overhead": f"{whole}\n\n{source}",
        "overhead-all": full,
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=40)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    settings = [(m, o, d) for m in networks.TIMED for o in OPTIMIZERS for d in DTYPES]
    rounds = args.rounds
    if args.smoke:
        settings, rounds = [("cnn", "sgd", "float32")], 2
    if record.version("torch") is None:
        print("PyTorch is not measured: pip install 'flood_optax[rivals]'.")
    rows: list[dict[str, Any]] = []
    for model, optimizer, dtype in tqdm(settings, unit="setting"):
        rivals = dtype == "float32"
        rows += setting(model, optimizer, dtype, rounds=rounds, rivals=rivals)
    protocol = {"rounds": rounds, "calls_per_round": 3, "level": LEVEL, "sam_rho": RHO}
    return {"protocol": protocol, "rows": rows}
