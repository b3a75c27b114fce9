"""Measures 16 levels x 4 seeds: `flood_optax.sweep` beside the loops people write."""

import argparse
import functools
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import data, record, report

BATCH, LEARNING_RATE, NOISE = 50, 1e-3, 0.2
WIDTHS = {"small": (32,), "large": (256, 256)}
FULL = {"num_levels": 16, "num_seeds": 4, "steps": 300, "rounds": 3}
SMOKE = {"num_levels": 3, "num_seeds": 2, "steps": 20, "rounds": 1}
DEVICES = os.cpu_count() or 1
MARK = "measured:"


class Problem(NamedTuple):
    """An MLP on 300 digits with flipped labels, Adam, random batches."""

    split: data.Split
    sizes: tuple[int, ...]
    levels: np.ndarray
    num_seeds: int
    steps: int


def problem(model: str, *, num_levels: int, num_seeds: int, steps: int) -> Problem:
    split = data.digits(train=300, noise=NOISE)
    levels = np.linspace(0.0, 0.75, num_levels).astype(np.float32)
    sizes = (64, *WIDTHS[model], 10)
    return Problem(split, sizes, levels, num_seeds, steps)


class Jax:
    """The training, as it is written for one level and one seed."""

    def __init__(self, given: Problem) -> None:
        import jax  # noqa: PLC0415 - PyTorch is measured in a process without it
        import jax.numpy as jnp  # noqa: PLC0415
        import optax  # noqa: PLC0415

        import flood_optax  # noqa: PLC0415

        self.jax, self.given, self.traces = jax, given, 0
        self.keys = jax.random.split(jax.random.key(0), given.num_seeds)
        split = given.split
        optimizer = optax.adam(LEARNING_RATE)
        initialize = jax.nn.initializers.he_normal()

        def logits(params: Any, x: Any) -> Any:
            for weight, bias in params[:-1]:
                x = jax.nn.relu(x @ weight + bias)
            weight, bias = params[-1]
            return x @ weight + bias

        def start(key: Any) -> tuple[Any, Any]:
            first, second = jax.random.split(key)
            keys = jax.random.split(first, len(given.sizes) - 1)
            shapes = zip(given.sizes[:-1], given.sizes[1:], strict=True)
            params: Any = [
                (initialize(k, shape), jnp.zeros(shape[1]))
                for k, shape in zip(keys, shapes, strict=True)
            ]
            drawn = jax.random.randint(second, (given.steps, BATCH), 0, 300)
            return (params, optimizer.init(params)), drawn

        def step(state: Any, batch: Any, level: Any) -> tuple[Any, Any]:
            params, opt_state = state
            x, y = jnp.asarray(split.train_x)[batch], jnp.asarray(split.train_y)[batch]

            def loss_fn(params: Any) -> Any:
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits(params, x), y
                ).mean()

            objective = flood_optax.flooded(loss_fn, level, return_info=True)
            (_, info), grads = jax.value_and_grad(objective, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), {"loss": info.loss}

        def train(level: Any, key: Any) -> dict[str, Any]:
            self.traces += 1
            state, batches = start(key)
            (params, _), metrics = jax.lax.scan(
                lambda state, batch: step(state, batch, level), state, batches
            )
            guesses = logits(params, jnp.asarray(split.test_x)).argmax(axis=-1)
            accuracy = (guesses == jnp.asarray(split.test_y)).mean()
            return metrics | {"accuracy": accuracy}

        self.start, self.step, self.train = start, step, train

    def python_float(self) -> np.ndarray:
        """A new function for every level, compiled anew."""
        rows: list[list[Any]] = []
        for level in self.given.levels.tolist():
            fit: Any = self.jax.jit(functools.partial(self.train, level))
            rows.append([self.jax.device_get(fit(key)) for key in self.keys])
        return self.losses(rows)

    def jit_argument(self) -> np.ndarray:
        fit: Any = self.jax.jit(self.train)
        rows = [
            [self.jax.device_get(fit(level, key)) for key in self.keys]
            for level in self.given.levels
        ]
        return self.losses(rows)

    def losses(self, rows: list[list[Any]]) -> np.ndarray:
        return np.array([[run["loss"] for run in row] for row in rows])

    def run(self, **options: Any) -> np.ndarray:
        from flood_optax import sweep  # noqa: PLC0415

        return sweep.run(self.train, self.given.levels, self.keys, **options).metrics[
            "loss"
        ]

    def watched(self) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "sweep.jsonl"
            return self.run(strategy="map", progress=True, path=path)

    def forked(self) -> np.ndarray:
        from flood_optax import sweep  # noqa: PLC0415

        self.steps_run = 0
        rows: list[np.ndarray] = []
        for key in self.keys:
            state, batches = self.jax.jit(self.start)(key)
            result = sweep.forked(self.counted, state, batches, self.given.levels)
            self.steps_run += result.steps_run or 0
            rows.append(result.metrics["loss"])
        return np.stack(rows, axis=1)

    def counted(self, *args: Any) -> Any:
        self.traces += 1
        return self.step(*args)


def torch_loop(given: Problem) -> np.ndarray:
    """The same training as a PyTorch loop."""
    torch: Any = importlib.import_module("torch")  # the extra `rivals`
    x = torch.tensor(given.split.train_x)
    y = torch.tensor(given.split.train_y).long()
    losses = np.zeros((len(given.levels), given.num_seeds, given.steps), np.float32)
    for i, level in enumerate(given.levels.tolist()):
        for seed in range(given.num_seeds):
            torch.manual_seed(seed)
            layers: list[Any] = []
            for size, width in zip(given.sizes[:-1], given.sizes[1:], strict=True):
                layers += [torch.nn.Linear(size, width), torch.nn.ReLU()]
            net = torch.nn.Sequential(*layers[:-1])
            optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
            cost = torch.nn.CrossEntropyLoss()
            drawn = torch.randint(0, 300, (given.steps, BATCH))
            for t in range(given.steps):
                optimizer.zero_grad()
                loss = cost(net(x[drawn[t]]), y[drawn[t]])
                ((loss - level).abs() + level).backward()
                optimizer.step()
                losses[i, seed, t] = loss.item()
    return losses


RIVALS: dict[str, Callable[[Jax], np.ndarray]] = {
    "loop, level a Python float": Jax.python_float,
    "loop, level a jit argument": Jax.jit_argument,
    "sweep.run, map": lambda jax: jax.run(strategy="map"),
    "sweep.run, map, progress and file": Jax.watched,
    "sweep.run, vmap": lambda jax: jax.run(strategy="vmap"),
    "sweep.run, vmap, chunks of 8": lambda jax: jax.run(strategy="vmap", chunk_size=8),
    f"sweep.run, shard on {DEVICES} CPU devices": lambda jax: jax.run(strategy="shard"),
    "sweep.forked, seed by seed": Jax.forked,
}
FASTEST_LOOP = "loop, level a jit argument"
TORCH = "PyTorch loop"
NOT_IN_SMOKE = (
    "loop, level a jit argument",
    "sweep.run, map, progress and file",
    "sweep.run, vmap",
    "sweep.run, vmap, chunks of 8",
)


def peak_megabytes() -> float:
    """The most memory this process has held; Linux alone says so of itself only."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    import resource  # noqa: PLC0415 - not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(rival: str, given: Problem) -> dict[str, Any]:
    """Runs one rival in this process, which has done nothing before."""
    if rival == TORCH:
        importlib.import_module("torch")
        before, start = peak_megabytes(), time.perf_counter()
        losses = torch_loop(given)
        counts: dict[str, Any] = {}
    else:
        program = Jax(given)
        compilations: list[str] = []

        def listen(event: str, seconds: float, **_: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                compilations.append(event)

        program.jax.monitoring.register_event_duration_secs_listener(listen)
        before, start = peak_megabytes(), time.perf_counter()
        losses = RIVALS[rival](program)
        counts = {
            "traces": program.traces,
            "compilations": len(compilations),
            "steps_run": getattr(program, "steps_run", losses.size),
        }
    return {
        "seconds": time.perf_counter() - start,
        "memory_mb": peak_megabytes() - before,
        "final_loss": [float(x) for x in losses[..., -30:].mean(axis=(1, 2))],
        "first_loss": float(losses[..., 0].mean()),
        **counts,
    }


def in_a_process(rival: str, model: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Measures a rival in a fresh process, imports not counted."""
    environment = dict(os.environ)
    if "shard" in rival:
        flags = environment.get("XLA_FLAGS", "")
        count = f"--xla_force_host_platform_device_count={DEVICES}"
        environment["XLA_FLAGS"] = f"{flags} {count}".strip()
    request = json.dumps({"rival": rival, "model": model, "sizes": sizes})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweep", request],
        cwd=record.REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{rival!r} on {model!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.rpartition(MARK)[2])


def answer(request: str) -> None:
    """What a process started by `in_a_process` does."""
    asked = json.loads(request)
    sizes = {
        name: asked["sizes"][name] for name in ("num_levels", "num_seeds", "steps")
    }
    print(MARK, json.dumps(measure(asked["rival"], problem(asked["model"], **sizes))))


def summary(model: str, rival: str, runs: dict[str, list[dict[str, Any]]]) -> Any:
    """The medians of a rival; its ratios are paired with those of the same round."""
    seconds = [run["seconds"] for run in runs[rival]]

    def ratios(to: str) -> list[float]:
        base = [run["seconds"] for run in runs[to]]
        return [own / other for own, other in zip(seconds, base, strict=True)]

    floats = ratios("loop, level a Python float")
    jitted = ratios(FASTEST_LOOP) if FASTEST_LOOP in runs else None
    return {
        "model": model,
        "rival": rival,
        "seconds_median": statistics.median(seconds),
        "seconds": seconds,
        "time_ratio_median": statistics.median(floats),
        "time_ratio_range": [min(floats), max(floats)],
        "ratio_to_fastest_loop": None if jitted is None else statistics.median(jitted),
        "memory_mb": statistics.median(run["memory_mb"] for run in runs[rival]),
        **{
            name: runs[rival][0].get(name)
            for name in ("traces", "compilations", "steps_run", "final_loss")
        },
    }


def tables(payload: dict[str, Any]) -> dict[str, str]:
    def count(row: dict[str, Any], name: str) -> str:
        return "-" if row[name] is None else str(row[name])

    rows = [
        [
            row["model"],
            row["rival"],
            f"{row['seconds_median']:.1f}",
            "{:.2f} ({:.2f} to {:.2f})".format(
                row["time_ratio_median"], *row["time_ratio_range"]
            ),
            count(row, "traces"),
            count(row, "compilations"),
            f"{row['memory_mb']:.0f}",
        ]
        for row in payload["rows"]
    ]
    header = ["model", "rival", "seconds", "ratio (range)", "traces", "compilations"]
    source = report.provenance(payload)
    return {"sweep": f"{report.markdown([*header, 'memory, MB'], rows)}\n\n{source}"}


def main(argv: Sequence[str] | None = None) -> None:
    args: argparse.Namespace = record.arguments("sweep", __doc__).parse_args(argv)
    sizes = SMOKE if args.smoke else FULL
    models = list(WIDTHS)[:1] if args.smoke else list(WIDTHS)
    rivals = [rival for rival in RIVALS if not (args.smoke and rival in NOT_IN_SMOKE)]
    if record.version("torch") is None:
        print("PyTorch is not measured: pip install 'flood_optax[rivals]'.")
    else:
        rivals.append(TORCH)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for model in models:
        runs: dict[str, list[dict[str, Any]]] = {rival: [] for rival in rivals}
        for number in range(sizes["rounds"]):
            for i in rng.permutation(len(rivals)):
                rival = rivals[int(i)]
                found = in_a_process(rival, model, sizes)
                runs[rival].append(found)
                print(f"{model}, round {number}, {rival}: {found['seconds']:.1f} s")
        rows += [summary(model, rival, runs) for rival in rivals]
    protocol = {
        **sizes,
        "widths": {model: WIDTHS[model] for model in models},
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "label_noise": NOISE,
        "reference": rivals[0],
        "seconds": "with tracing and compilation, without imports",
        "memory_mb": "peak of the process above what the imports took",
    }
    written = record.write("sweep", {"protocol": protocol, "rows": rows}, args.out)
    payload = record.read("sweep", args.out)
    print(f"\n{tables(payload)['sweep']}\n")
    for row in rows:
        if row["ratio_to_fastest_loop"] is not None:
            ratio = f"{row['ratio_to_fastest_loop']:.2f} of the {FASTEST_LOOP}"
            print(f"{row['model']}, {row['rival']}: {ratio}")
    print(f"Wrote {written}")


if __name__ == "__main__":
    answer(sys.argv[1])
