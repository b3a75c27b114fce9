"""MaxText: its pre-training, on one synthetic batch that a small model memorises."""

import os
from typing import Any

import maxtext
import optax
from flax import nnx
from maxtext.common import metric_logger
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train

from benchmarks.trainers import rows
from flood_optax import flooded, scale_by_flood

TITLE = "MaxText `pre_train`"
SECTION = "MaxText"
REQUIREMENTS = (
    "maxtext==0.2.5",  # it names none of what it imports
    "jax==0.12.0.1",
    "flax==0.12.12",
    "optax==0.2.8",
    "orbax-checkpoint==0.12.8",
    "aqtp==0.9.0",
    "qwix==0.1.8",
    "grain==0.2.18",
    "tokamax==0.0.17",
    "pathwaysutils==0.1.13",
    "ml-collections==1.1.0",
    "omegaconf==2.4.0",
    "pydantic==2.14.4",
    "drjax==0.2.1",
    "jaxtyping==0.3.11",
    "transformers==5.24.0",
    "tiktoken==0.14.0",
    "sentencepiece==0.2.3",
    "tensorboardx==2.6.5",
    "datasets==5.2.0",
    "cloud-accelerator-diagnostics==0.1.1",
    "jsonlines==4.0.0",
    "psutil==7.2.2",
    "requests==2.34.2",
    "ml-goodput-measurement==0.2.3",
    "sympy==1.14.0",
    "jinja2==3.1.6",
    "pillow==13.0.0",
)
VARIABLES = {"DECOUPLE_GCLOUD": "TRUE"}

LEVEL = 1.0
EVERY = 20  # steps between evaluations
TOKENS = 8 * 16
PLAIN = train.loss_fn
MADE = optimizers.get_optimizer
SKIP = optimizers.skip_step_on_spikes
WRITE = metric_logger.MetricLogger.buffer_and_write_metrics
SMALL = {
    "dataset_type": "synthetic",
    "hardware": "cpu",
    "attention": "dot_product",
    "dtype": "float32",
    "vocab_size": 32,
    "max_target_length": 16,
    "base_emb_dim": 16,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "base_mlp_dim": 32,
    "base_num_decoder_layers": 1,
    "sharding_tolerance": 1.0,
    "learning_rate": 0.01,
    "warmup_steps_fraction": 0.0,
    "lr_schedule_type": "wsd",
    "wsd_decay_steps_fraction": 0.0,
    "async_checkpointing": False,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
    "gcs_metrics": False,
    "enable_tensorboard": False,
    "log_config": False,
    "skip_jax_distributed_system": True,
}


def measure(run: rows.Run) -> rows.Row:
    steps = run.steps(200)

    def trained(name: str, **changed: Any) -> tuple[dict[str, list[float]], Any]:
        """What a run of MaxText logs, by name, and its last state."""
        log: dict[str, list[float]] = {}

        def write(self: Any, metrics: Any, *args: Any, **given: Any) -> Any:
            for key, value in metrics["scalar"].items():
                log.setdefault(key, []).append(float(value))
            return WRITE(self, metrics, *args, **given)

        options = SMALL | {
            "run_name": name,
            "base_output_directory": run.work,
            "steps": steps,
            "learning_rate_schedule_steps": steps,
            "per_device_batch_size": 8,
            "eval_interval": EVERY,
            "eval_steps": 1,
            "enable_checkpointing": False,
            **changed,
        }
        base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
        given = [f"{key}={value}" for key, value in options.items()]
        metric_logger.MetricLogger.buffer_and_write_metrics = write
        try:
            config, recorder = train.initialize(["train", base, *given])
            state = train.train_loop(config, recorder)
        finally:
            metric_logger.MetricLogger.buffer_and_write_metrics = WRITE
        return log, state

    def with_recipe(name: str, **changed: Any) -> tuple[dict[str, list[float]], Any]:
        run.recipe(optax=optax)
        try:
            return trained(name, **{"skip_step_on_spikes": True, **changed})
        finally:
            optimizers.get_optimizer = MADE

    def with_loss(name: str, loss: Any, **changed: Any) -> dict[str, list[float]]:
        train.loss_fn = loss
        try:
            return trained(name, **changed)[0]
        finally:
            train.loss_fn = PLAIN

    half = steps // 2
    kept = {"enable_checkpointing": True, "checkpoint_period": half}
    parts = {"per_device_batch_size": 2, "gradient_accumulation_steps": 4}
    log, state = with_recipe("whole")
    # a rounding of the loss at the level turns a step, so later they go apart
    early = {"steps": 40, "learning_rate_schedule_steps": steps}
    in_parts, as_whole = (
        parameters(with_recipe(name, **early, **changed)[1])
        for name, changed in (("parts", parts), ("early", {}))
    )
    with_recipe("broken", steps=half, **kept)
    rest, resumed = with_recipe("broken", **kept)
    assert len(rest["learning/loss"]) == steps - half

    two = {"steps": 2}
    without = rows.no_loss(
        "the same without `skip_step_on_spikes`",
        lambda: with_recipe("no loss", **two, skip_step_on_spikes=False),
    )
    optimizers.skip_step_on_spikes = inside
    within = rows.no_loss(
        "the flood inside the spike skipping",
        lambda: trained("inside", **two, skip_step_on_spikes=True),
    )
    optimizers.skip_step_on_spikes = SKIP

    raw = with_loss("raw", flooded(PLAIN, LEVEL, has_aux=True, raw_value=True))
    assert abs(mean(raw["learning/lm_loss"]) - LEVEL) < 0.2 * LEVEL
    both = with_loss("both", flooded(PLAIN, LEVEL, has_aux=True))
    floor = min(both["evaluation/loss"])
    assert floor >= LEVEL > min(raw["evaluation/loss"])
    sums = with_loss(
        "sums", flooded(PLAIN, LEVEL, has_aux=True, raw_value=True), **parts
    )
    after = range(1, steps, EVERY)  # an evaluation comes after its step
    return rows.Row(
        form="optax form",
        line="`optax.chain(scale_by_flood(b), plain(...))`, in `get_optimizer`",
        logs="`learning/loss` and `evaluation/loss`, raw",
        level=LEVEL,
        losses=log["learning/loss"],
        value="with `skip_step_on_spikes`, as `loss=`",
        evaluation=log["evaluation/loss"],
        evaluation_raw=[log["learning/lm_loss"][step] for step in after],
        evaluates_flooded=True,
        accumulates="the window",
        accumulation=rows.distance(in_parts, as_whole),
        resume=rows.distance(
            (parameters(resumed), resumed["optimizer"]),
            (parameters(state), state["optimizer"]),
        ),
        wrong=[
            without,
            within,
            rows.Wrong(
                "`train.loss_fn = flooded(train.loss_fn, b, has_aux=True)`",
                "evaluation has a floor at {floor:.3f}, the raw one went to {raw:.3f}",
                {"floor": floor, "raw": min(both["learning/lm_loss"])},
            ),
            rows.Wrong(
                "the same with `raw_value`, in four micro-batches",
                "raw loss {raw:.3f}: the level meets the sum over {tokens} tokens",
                {"raw": mean(sums["learning/lm_loss"]), "tokens": TOKENS // 4},
            ),
        ],
    )


def inside(inner: Any, **given: Any) -> Any:
    return SKIP(optax.chain(scale_by_flood(LEVEL), inner), **given)


def parameters(state: Any) -> Any:
    return nnx.filter_state(state["model"], nnx.Param)


def mean(losses: list[float]) -> float:
    return sum(losses[-rows.LAST :]) / rows.LAST
