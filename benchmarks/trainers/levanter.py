"""Levanter: its `Trainer`, with evaluation, micro-batches and checkpoints."""

import dataclasses
import time
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import optax
from levanter.checkpoint import CheckpointerConfig
from levanter.data.dataset import ListAsyncDataset
from levanter.optim.config import AdamConfig
from levanter.tracker import Tracker, TrackerConfig
from levanter.trainer import Trainer, TrainerConfig

from benchmarks.trainers import problem, rows
from flood_optax import flood_loss, scale_by_flood

TITLE = "Levanter `Trainer`"
SECTION = "Levanter"
REQUIREMENTS = (
    "marin-levanter==0.2.227.dev40316220070",  # it takes jax < 0.12, optax < 0.2.7
    "jax==0.11.2",
    "optax==0.2.6",
)
LEVEL = problem.LEVEL

Batch, Valid = hax.Axis("batch", 64), hax.Axis("batch", 32)
In, Hidden = hax.Axis("input", 4), hax.Axis("hidden", 16)
EVERY = 20  # steps between evaluations


class Network(eqx.Module):
    first: hax.nn.Linear
    last: hax.nn.Linear

    def __call__(self, x: Any) -> Any:
        return self.last(hax.tanh(self.first(x)))


def network() -> Network:
    keys = jax.random.split(jax.random.key(0))
    return Network(
        hax.nn.Linear.init(In, Hidden, key=keys[0]),
        hax.nn.Linear.init(Hidden, (), key=keys[1]),
    )


def examples(x: Any, y: Any) -> list[Any]:
    return [
        (hax.named(a, "input"), hax.named(b, ())) for a, b in zip(x, y, strict=True)
    ]


TRAIN = hax.named(problem.X, ("batch", "input")), hax.named(problem.Y, "batch")
VALID = (
    hax.named(problem.VALID_X, ("batch", "input")),
    hax.named(problem.VALID_Y, "batch"),
)


def loss_fn(model: Any, batch: Any, *, key: Any = None) -> Any:
    del key
    x, y = batch
    return hax.mean((model(x) - y) ** 2), {}


class Log(Tracker):
    """What a run logs, by name."""

    name = "list"

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def log(self, metrics: Any, *, step: Any, commit: Any = None) -> None:
        for name, value in metrics.items():
            self.found.setdefault(name, []).append(value)

    def log_hyperparameters(self, hparams: Any) -> None: ...

    def log_summary(self, metrics: Any) -> None: ...

    def log_artifact(self, artifact_path: Any, **other: Any) -> None: ...

    def finish(self) -> None: ...


@dataclasses.dataclass
class LogConfig(TrackerConfig):
    log: Log = dataclasses.field(default_factory=Log)

    def init(self, run_id: Any) -> Tracker:
        return self.log


@dataclasses.dataclass
class Ran:
    """A run by Levanter: what it logged, what it should have, and where it ended."""

    log: dict[str, list[float]]
    evaluation: list[float]
    state: Any


ADAM = AdamConfig(
    learning_rate=0.02, weight_decay=0.0, lr_schedule="constant", warmup=0.0
)


def measure(run: rows.Run) -> rows.Row:
    steps = run.steps(200)
    half = steps // 2

    def config(name: str, last: int, parts: int) -> Any:
        return TrainerConfig(
            id=name,
            log_dir=run.work / "logs",
            log_jaxprs=False,
            log_xla_hlo=False,
            tracker=LogConfig(),
            num_train_steps=last,
            train_batch_size=Batch.size,
            per_device_parallelism=Batch.size // parts,
            per_device_eval_parallelism=Valid.size,
            steps_per_eval=EVERY,
            checkpointer=CheckpointerConfig(
                base_path=str(run.work / "checkpoints"), keep=[{"every": half}]
            ),
            require_accelerator=False,
        )

    def trained(
        name: str, made: Any = None, *, last: int = steps, parts: int = 1
    ) -> Ran:
        """A run of this name, or what is left of it if it has a checkpoint."""
        settings = config(name, last, parts)
        settings.initialize()
        trainer = made(settings) if made else by_recipe(settings)
        evaluation: list[float] = []
        with trainer:
            trainer.add_eval_hook(
                ListAsyncDataset(examples(problem.VALID_X, problem.VALID_Y))
            )
            trainer.add_hook(
                lambda info: evaluation.append(
                    float(loss_fn(info.eval_model, VALID)[0].scalar())
                ),
                every=EVERY,
            )
            state = trainer.initial_state(jax.random.PRNGKey(1), model_init=network)
            state = trainer.train(state, iter(lambda: TRAIN, None)).state
        # it is written in the background, and a second run must find it
        done = run.work / "checkpoints" / name / f"step-{half}" / "metadata.json"
        deadline = time.monotonic() + 60
        while last > half and not done.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        return Ran(settings.tracker.log.found, evaluation, state)

    def by_recipe(settings: Any) -> Any:
        return run.recipe(
            optax=optax,
            config=ADAM,
            steps=steps,
            Trainer=Trainer,
            trainer_config=settings,
            loss_fn=loss_fn,
        )["trainer"]

    def flooded_loss(settings: Any) -> Any:
        def flooded(*batch: Any, **key: Any) -> Any:
            loss, metrics = loss_fn(*batch, **key)
            return flood_loss(loss.scalar(), LEVEL), metrics

        return Trainer(settings, ADAM.build(steps), flooded)

    def without_hook(settings: Any) -> Any:
        optimizer = optax.chain(scale_by_flood(LEVEL), ADAM.build(steps))
        return Trainer(settings, optimizer, loss_fn)

    whole = trained("whole")
    assert len(whole.log["optim/learning_rate"]) >= steps
    parts = trained("parts", parts=4)
    trained("broken", last=half + 1)
    resumed = trained("broken")
    assert len(resumed.log["train/loss"]) == steps - half  # the last one twice
    floods_both = trained("both", flooded_loss)
    floor = min(floods_both.log["eval/loss"])
    assert floor >= LEVEL
    in_parts = trained("flooded parts", flooded_loss, parts=4)
    silent = trained("silent", without_hook, last=EVERY)
    assert "optim/learning_rate" not in silent.log
    return rows.Row(
        form="optax form",
        line="`optax.chain(scale_by_flood(b), config.build(steps))`",
        logs="`train/loss` and `eval/loss`, raw",
        level=LEVEL,
        losses=whole.log["train/loss"][:steps],
        value="yes, as `loss=`",
        evaluation=whole.log["eval/loss"],
        evaluation_raw=whole.evaluation,
        evaluates_flooded=True,
        accumulates="the window",
        accumulation=rows.distance(parts.state.model, whole.state.model),
        resume=rows.distance(resumed.state, whole.state),
        wrong=[
            rows.Wrong(
                "a flooded loss function",
                "evaluation has a floor at {floor:.3f}, the raw one went to {raw:.3f}",
                {"floor": floor, "raw": min(floods_both.evaluation)},
            ),
            rows.Wrong(
                "the same, in four micro-batches",
                "floods each of them: ends {away:.2g} away from the whole batch's",
                {"away": rows.distance(in_parts.state.model, floods_both.state.model)},
            ),
            rows.Wrong("the flood without the hook", "no learning rate in the log", {}),
        ],
    )
