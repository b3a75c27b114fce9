"""What metrics finds in a state, and what loggers make of it."""

import csv
import struct

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flood_optax import flood, metrics, scale_by_flood
from flood_optax.flax import TrainState

LEVEL = 0.5
LOSSES = np.float32([0.7, 0.25, 0.5, 0.375, 0.75])  # below: the second and fourth
SEEN = {
    "flood/loss": 0.75,
    "flood/level": 0.5,
    "flood/share_below": 0.4,
    "flood/steps": 5,
}
W = jnp.array([1.0, -2.0])


def trained(optimizer, losses=LOSSES):
    state = optimizer.init(W)
    for loss in losses:
        _, state = optimizer.update(W, state, W, value=loss)
    return state


def chain():
    return optax.chain(scale_by_flood(LEVEL), optax.adam(0.1))


def train_state():
    state = TrainState.create(apply_fn=None, params={"w": W}, tx=chain())
    for loss in LOSSES:
        state = state.apply_gradients(grads={"w": W}, value=loss)
    return state


def nnx_optimizer():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chain(), wrt=nnx.Param)
    for loss in LOSSES:
        optimizer.update(model, nnx.state(model, nnx.Param), value=loss)
    return optimizer


STATES = {
    "chain": lambda: trained(chain()),
    "flood": lambda: trained(flood(optax.adam(0.1), LEVEL)),
    "windows": lambda: trained(
        flood(optax.sgd(0.1), LEVEL, every_k=2), [*np.repeat(LOSSES, 2), 9.0]
    ),
    "hyperparameters": lambda: trained(
        optax.inject_hyperparams(scale_by_flood)(level=LEVEL)
    ),
    "TrainState": train_state,
    "nnx.Optimizer": nnx_optimizer,
    "its state": lambda: nnx_optimizer().opt_state,
    "checkpoint": lambda: flax.serialization.to_state_dict(trained(chain())),
}


@pytest.mark.parametrize("name", STATES)
def test_metrics_are_found_in(name):
    state = STATES[name]()
    found = metrics(state)
    assert list(found) == list(SEEN)
    np.testing.assert_allclose([*found.values()], [*SEEN.values()], rtol=1e-6)
    kinds = [(v.dtype.name, v.shape, v.weak_type) for v in found.values()]
    assert kinds == [("float32", (), False)] * 3 + [("int32", (), False)]
    assert all(isinstance(number, jax.Array) for number in found.values())
    if name != "nnx.Optimizer":  # which jax.jit refuses
        assert jax.jit(metrics)(state) == found


def test_metrics_with_a_band_are_those_of_its_ends():
    optimizer = scale_by_flood(LEVEL, band=0.125)
    state = optimizer.init(W)
    ends = []
    for loss in LOSSES:
        _, state = optimizer.update(W, state, value=loss)
        ends.append(float(metrics(state)["flood/level"]))
    # .25 is below the lower end, .5 and .375 below the upper one
    assert ends == [0.375, 0.375, 0.625, 0.625, 0.625]
    assert metrics(state)["flood/share_below"] == np.float32(3 / 5)


@pytest.mark.usefixtures("x64")
def test_before_the_first_step_all_are_zero_and_no_nan():
    with jax.debug_nans(True):
        for read in (metrics, jax.jit(metrics)):
            found = read(chain().init(W))
            assert found == dict.fromkeys(SEEN, 0)
            assert found["flood/share_below"].dtype == np.float32


def test_metrics_of_runs_side_by_side_are_arrays():
    optimizer = scale_by_flood(LEVEL)
    state = jax.vmap(lambda loss: optimizer.update(W, optimizer.init(W), value=loss)[1])
    found = jax.vmap(metrics)(state(LOSSES))
    np.testing.assert_array_equal(found["flood/share_below"], [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(metrics(state(LOSSES))["flood/loss"], LOSSES)


# ---- loggers, which take them as they are ----


def assert_logged(by_step):
    """What a logger gives back, of each step: {step: {name: number}}."""
    shares = [0, 1 / 2, 1 / 3, 2 / 4, 2 / 5]
    wanted = {
        i + 1: (loss, LEVEL, share, i + 1)
        for i, (loss, share) in enumerate(zip(LOSSES, shares, strict=True))
    }
    assert by_step.keys() == wanted.keys()
    for step, numbers in wanted.items():
        got = [by_step[step][name] for name in SEEN]
        np.testing.assert_allclose(got, numbers, rtol=1e-6)


def steps():
    """The number of each step, and what to log of it."""
    optimizer = chain()
    state = optimizer.init(W)
    for i, loss in enumerate(LOSSES):
        _, state = optimizer.update(W, state, W, value=loss)
        yield i + 1, metrics(state)


def test_tensorboard_takes_them(tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2  # noqa: PLC0415 - where it is installed

    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for step, numbers in steps():
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)
    (file,) = tmp_path.iterdir()
    data, seen = file.read_bytes(), {}
    while data:  # a record: its length, a checksum, itself, a checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            seen.setdefault(event.step, {})[value.tag] = value.simple_value
        data = data[16 + length :]
    assert_logged(seen)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_takes_them(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="a large install, of no other use")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    with mlflow.start_run() as run:
        for step, numbers in steps():
            mlflow.log_metrics(numbers, step=step)
    client, seen = mlflow.MlflowClient(), {}
    for name in SEEN:
        for metric in client.get_metric_history(run.info.run_id, name):
            seen.setdefault(metric.step, {})[name] = metric.value
    assert_logged(seen)


def test_a_csv_file_takes_them(tmp_path):
    path = tmp_path / "log.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *SEEN])
        writer.writeheader()
        for step, numbers in steps():
            writer.writerow({"step": step} | numbers)
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert_logged({int(row["step"]): row for row in rows})
