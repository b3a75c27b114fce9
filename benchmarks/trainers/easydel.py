"""EasyDeL: its `Trainer`, on one batch of tokens that a small Llama memorises."""

import sys
from typing import Any, NamedTuple

# ruff: noqa: E402 - when it is imported it patches models of PyTorch, which is not there
modules: dict[str, Any] = sys.modules
for name in ("dbrx", "llama4", "qwen3_next", "qwen3_5_moe", "phimoe", "glm4v_moe"):
    modules[f"transformers.models.{name}"] = None

import datasets
import easydel as ed
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.trainers import rows
from flood_optax import flood_loss, scale_by_flood

TITLE = "EasyDeL `Trainer`"
SECTION = "EasyDeL"
REQUIREMENTS = (
    "easydel==0.3.0",
    "jax==0.9.2",
    "optax==0.2.8",
    "pillow==13.0.0",  # imported, and not among its own requirements
)
VARIABLES = {"ENABLE_DISTRIBUTED_INIT": "0"}

LEVEL = 1.0
EVERY = 10  # steps between evaluations
CONFIG = ed.LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=16,
)
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 16))
DATA = datasets.Dataset.from_dict(
    {"input_ids": TOKENS.tolist(), "attention_mask": np.ones_like(TOKENS).tolist()}
)


PLAIN = ed.LlamaForCausalLM.compute_loss


def network(kind: Any = ed.LlamaForCausalLM) -> Any:
    precision = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    return kind(CONFIG, rngs=nnx.Rngs(0), **precision)


def subclass() -> Any:
    """The recipe as a subclass, which EasyDeL registers when it is defined."""

    class Flooded(ed.LlamaForCausalLM):
        def compute_loss(self, **batch: Any) -> Any:
            outputs, metrics = super().compute_loss(**batch)
            return outputs.replace(loss=flood_loss(outputs.loss, LEVEL)), metrics

    return Flooded


def another() -> Any:
    """A subclass that does nothing."""

    class Another(ed.LlamaForCausalLM): ...

    return Another


class Metric(ed.LlamaForCausalLM):
    """Floods what is logged and evaluated, and nothing else."""

    def compute_loss(self, **batch: Any) -> Any:
        outputs, metrics = super().compute_loss(**batch)
        metrics.loss = flood_loss(metrics.loss, LEVEL)
        return outputs, metrics


def raw_loss(state: Any) -> float:
    """Of the batch, by the model of a state."""
    batch = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}
    with state.model.mesh:
        _, metrics = PLAIN(state.model, **batch)
    return float(metrics.loss)


class Ran(NamedTuple):
    """A run by EasyDeL: what it logged, what it should have, and where it ended."""

    losses: list[float]
    evaluation: list[float]
    state: Any

    @property
    def mean(self) -> float:
        return sum(self.losses[-rows.LAST :]) / rows.LAST


def measure(run: rows.Run) -> rows.Row:
    steps = run.steps(200)

    half = steps // 2

    def trained(name: str, model: Any, **changed: Any) -> Ran:
        logged: dict[str, list[float]] = {"train/loss": [], "eval/loss": []}
        batch = {"total_batch_size": len(TOKENS), "num_train_epochs": steps}
        trainer = ed.Trainer(
            arguments=ed.TrainingArguments(
                model_name=name,
                save_directory=str(run.work),
                eval_batch_size=len(TOKENS),
                evaluation_steps=EVERY,
                do_eval=True,
                do_last_save=False,
                max_length=16,
                learning_rate=0.01,
                optimizer="adamw",
                scheduler="none",
                weight_decay=0.0,
                shuffle_train_dataset=False,
                progress_bar_type="json",
                log_steps=1,
                report_steps=1,
                use_wandb=False,
                track_memory=False,
                **batch | changed,
            ),
            model=model,
            dataset_train=DATA,
            dataset_eval=DATA,
        )
        write = trainer.log_metrics

        def log_metrics(metrics: Any, *args: Any, **given: Any) -> None:
            if given.get("log_to_backends", True):  # of an evaluation: its summary
                for key in logged.keys() & metrics.keys():
                    logged[key].append(float(metrics[key]))
            write(metrics, *args, **given)

        trainer.log_metrics = log_metrics
        state = trainer.train().state
        return Ran(logged["train/loss"], logged["eval/loss"], state)

    def resumed(name: str, kind: Any = ed.LlamaForCausalLM) -> Ran:
        trained(name, network(kind), num_train_epochs=half, save_steps=half)
        rest = trained(name, network(kind))
        assert len(rest.losses) == steps - half, len(rest.losses)
        return rest

    in_four = {"total_batch_size": 2, "gradient_accumulation_steps": 4}
    metric = trained("metric", network(Metric))
    kept = resumed("kept", subclass()).mean
    assert abs(kept - LEVEL) < 0.2 * LEVEL, kept
    model, _ = subclass(), another()
    forgotten = resumed("forgotten", model)
    run.recipe(ed=ed)
    whole = trained("whole", network())
    parts = trained("parts", network(), **in_four)
    broken = resumed("broken")
    ed.LlamaForCausalLM.compute_loss = PLAIN

    state = network().to_state()
    state = state.init_tx(optax.chain(scale_by_flood(LEVEL), optax.adamw(0.01)))
    after = range(EVERY, steps, EVERY)  # an evaluation comes before the next step
    raw = [whole.losses[step] for step in after] + [raw_loss(whole.state)] * 2
    return rows.Row(
        form="`flood_loss`",
        line="`outputs.replace(loss=flood_loss(outputs.loss, b))`, in `compute_loss`",
        logs="`train/loss` and `eval/loss`, raw",
        level=LEVEL,
        losses=whole.losses,
        value="no",
        evaluation=whole.evaluation,
        evaluation_raw=raw,
        evaluates_flooded=False,
        accumulates="each micro-batch",
        resume=rows.distance(
            (broken.state.graphstate, broken.state.opt_state),
            (whole.state.graphstate, whole.state.opt_state),
        ),
        wrong=[
            rows.no_loss(
                "an optimizer with a flood in it",
                lambda: state.apply_gradients(grads=state.graphstate),
            ),
            rows.Wrong(
                "a flooded `metrics.loss`",
                "**not flooded**: raw loss {raw:.3f}, and {logged:.3f} in the log",
                {"raw": raw_loss(metric.state), "logged": metric.mean},
            ),
            rows.Wrong(
                "a subclass, another one defined after it, and a resumed run",
                "**not flooded** from there on: raw loss {raw:.3f}",
                {"raw": forgotten.mean},
            ),
            rows.Wrong(
                "the recipe, in four micro-batches",
                "floods each of them: ends {away:.2g} away from the whole batch's",
                {"away": rows.distance(parts.state.graphstate, whole.state.graphstate)},
            ),
        ],
    )
