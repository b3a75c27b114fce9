"""The public surface as a literal list; documented; cheap to import."""

import inspect
import json
import pydoc
import re

import pytest

import flood_optax
from tests import processes

PUBLIC = """
    AverageState FloodInfo FloodState FloodWarning FloodWindow FloodWrapperState
    Shape average_params averaged flood flood_loss flood_mean flooded levels
    metrics objective penalty scale_by_flood shapes sharpness sweep
"""
SIGNATURES = {
    "flood_loss": "(loss, level, *, shape)",
    "flood_mean": "(losses, level, *, over, segment_ids, num_segments, where, weights, "
    "axis_name, shape)",
    "flooded": "(loss_fn, level, *, has_aux, axis_name, shape, return_info, raw_value)",
    "scale_by_flood": "(level, *, band, shape, axis_name)",
    "flood": "(inner, level, *, band, every_k, shape, axis_name, "
    "should_skip_update_fn, accumulator_dtype)",
    "average_params": "(decay)",
    "averaged": "(state, params)",
    "metrics": "(state)",
    "shapes.soft": "(scale)",
    "shapes.asymmetric": "(ascent, dead_band)",
    "levels.warmup": "(level, start_step)",
    "levels.adaflood": "(held_out_loss, gamma, *, alpha, beta)",
    "levels.held_out": "(fit, evaluate, num_examples, *, num_folds, key, vmap, groups, "
    "stratify)",
    "levels.held_out_losses": "(fit, evaluate, num_examples, *, num_folds, key, vmap, "
    "groups, stratify)",
    "levels.wavebound": "(target_loss, epsilon)",
    "levels.entropy_floor": "(target_probs)",
    "levels.at_best": "(losses, metric, *, mode, window)",
    "levels.noise_floor": "(noise, num_classes, *, label_frequencies)",
    "levels.noise_matrix": "(probs, labels)",
    "levels.leave_one_out": "(features, labels, num_classes, *, groups)",
    "levels.noise_rate": "(scores, labels, *, confident)",
    "levels.gradient_accordance": "(grads_a, grads_b)",
    "objective.relax_loss": "(logits, labels, level, *, epoch, upper, where, "
    "axis_name)",
    "penalty.objective": "(loss_fn, strength, *, has_aux)",
    "penalty.value_and_grad": "(loss_fn, strength, *, method, radius, has_aux)",
    "penalty.pair_displacement": "(loss_fn, params, learning_rate, *args",
    "penalty.level_set_drift": "(loss_fn, params, *args",
    "sharpness.gradient_norm": "(loss_fn, params, *args",
    "sharpness.hessian_trace": "(loss_fn, params, *args, key, num_samples",
    "sharpness.top_eigenvalue": "(loss_fn, params, *args, key, num_iterations",
    "sweep.run": "(train, levels, keys, *, strategy, progress",
    "sweep.forked": "(step, state, batches, levels",
}


def lookup(path):
    found = flood_optax
    for name in path.split("."):
        found = getattr(found, name)
    return found


def names(function):
    """The parameters without defaults and annotations."""
    parameters = inspect.signature(function).parameters.values()
    bare = [
        p.replace(default=p.empty, annotation=p.empty, kind=p.kind) for p in parameters
    ]
    return str(inspect.Signature(bare))


def test_public_names_are_exactly_these():
    assert set(flood_optax.__all__) == set(PUBLIC.split())


MODULES = ["levels", "objective", "penalty", "shapes", "sharpness", "sweep"]


@pytest.mark.parametrize("module", MODULES)
def test_module_lists_all_that_it_defines_without_an_underscore(module):
    found = getattr(flood_optax, module)
    defined = {
        name
        for name, value in vars(found).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == found.__name__
    }
    assert defined <= set(found.__all__)
    assert all(hasattr(found, name) for name in found.__all__)


@pytest.mark.parametrize("path", SIGNATURES)
def test_help_prints_names_instead_of_unions_and_addresses(path):
    head = pydoc.render_doc(lookup(path), renderer=pydoc.plaintext).splitlines()[2]
    assert "Union[" not in head
    assert " at 0x" not in head


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature_is_the_contract(path):
    assert names(lookup(path)).startswith(SIGNATURES[path].removesuffix(")"))


@pytest.mark.parametrize("path", SIGNATURES)
def test_docstring_has_its_sections(path):
    function = lookup(path)
    doc = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Examples:"):
        assert section in doc, section
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            # described, or handed on in the words "like has_aux"
            assert re.search(rf"\b{parameter.name}\b", doc), parameter.name


def test_schemas_of_states_are_stable():
    flood_state = "flood_step flood_level flood_value flood_below"
    assert " ".join(flood_optax.FloodState._fields) == flood_state
    average = "flood_average_step flood_average"
    assert " ".join(flood_optax.AverageState._fields) == average


def test_every_warning_is_a_user_warning_of_one_category():
    assert issubclass(flood_optax.FloodWarning, UserWarning)


# One process without a backend, in which importing is all that is done: what each of
# the statements loads beyond what JAX and Optax themselves do.
STATEMENTS = {
    "step": "import flood_optax",
    "core": "import jax.extend.core",
    "all": "from flood_optax import *",
    "tqdm": "import tqdm",
}
PROBE = """
import json, sys, jax, optax
loaded = {}
for name, statement in json.loads(sys.argv[1]).items():
    before = set(sys.modules)
    exec(statement)
    loaded[name] = sorted(set(sys.modules) - before)
sys.modules["flax"] = None
try:
    import flood_optax.flax
except ImportError as error:
    loaded["without flax"] = str(error)
print(json.dumps(loaded))
jax.numpy.zeros(3)
"""


@pytest.fixture(scope="module")
def loaded():
    arguments = "-c", PROBE, json.dumps(STATEMENTS)
    started = processes.start(*arguments, JAX_PLATFORMS="no_such_platform")
    code, output, errors = processes.end(started)
    assert output, errors
    # it ended where an array was asked for, not before
    assert code != 0
    assert "no_such_platform" in errors
    return json.loads(output)


def test_import_needs_jax_and_optax_alone(loaded):
    extras = {"chex", "flax", "matplotlib", "tqdm", "xarray", "diffrax", "sklearn"}
    assert not extras & {*loaded["step"], *loaded["all"]}
    assert extras & {*loaded["tqdm"]}  # the probe can fail


def test_import_brings_what_a_training_step_needs_alone(loaded):
    """Pallas and the tools for many processes take as long as all that is ours."""
    later = {f"flood_optax.{n}" for n in ("levels", "penalty", "sharpness", "sweep")}
    assert {name.partition(".")[0] for name in loaded["step"]} == {"flood_optax"}
    assert not later & {*loaded["step"]}
    assert later <= {*loaded["all"]}
    assert "jax.extend.core" in loaded["core"]  # which JAX itself does not load


def test_import_initialises_no_backend(loaded):
    assert "flood_optax.sweep" in loaded["all"]  # there was none to initialise


def test_flax_extra_missing_names_the_extra(loaded):
    assert "pip install 'flood_optax[flax]'" in loaded["without flax"]
