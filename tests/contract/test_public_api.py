"""The public surface as a literal list; documented; cheap to import."""

import importlib
import inspect
import pydoc
import re

import pytest

import flood_optax
from tests import processes

PUBLIC = {
    "flood_optax": """
        AverageState FloodInfo FloodState FloodWarning FloodWindow FloodWrapperState
        Shape average_params averaged flood flood_loss flood_mean flooded levels
        metrics objective penalty scale_by_flood shapes sharpness sweep
    """
}
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
    parts, star = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            star = True
            parts.append(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            parts.append(f"**{parameter.name}")
        else:
            if parameter.kind is parameter.KEYWORD_ONLY and not star:
                star = True
                parts.append("*")
            parts.append(parameter.name)
    return f"({', '.join(parts)})"


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_exactly_these(module):
    assert set(importlib.import_module(module).__all__) == {*PUBLIC[module].split()}


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


def test_flood_state_schema_is_stable():
    assert flood_optax.FloodState._fields == (
        "flood_step",
        "flood_level",
        "flood_value",
        "flood_below",
    )


def test_every_warning_is_a_user_warning_of_one_category():
    assert issubclass(flood_optax.FloodWarning, UserWarning)


def test_average_state_schema_is_stable():
    fields = flood_optax.AverageState._fields
    assert fields == ("flood_average_step", "flood_average")


EXTRAS = {"chex", "flax", "matplotlib", "tqdm", "xarray", "diffrax", "sklearn"}


def printed(code):
    """What a process of its own prints."""
    returned, output, errors = processes.end(processes.start("-c", code))
    assert returned == 0, errors
    return output


def imported_by(statement):
    """What a statement loads beyond what optax itself loads."""
    code = (
        "import sys, jax, optax\nbefore = set(sys.modules)\n"
        f"{statement}\nprint(*(set(sys.modules) - before))"
    )
    return set(printed(code).split())


def extras_imported_by(statement):
    return EXTRAS & imported_by(statement)


def test_import_needs_jax_and_optax_alone():
    everything = "from flood_optax import levels, penalty, sharpness, sweep"
    assert extras_imported_by(everything) == set()


def test_import_brings_what_a_training_step_needs_alone():
    """Pallas and the tools for many processes take as long as all that is ours."""
    found = imported_by("import flood_optax")
    later = {f"flood_optax.{n}" for n in ("levels", "penalty", "sharpness", "sweep")}
    assert {name.partition(".")[0] for name in found} == {"flood_optax"}
    assert not found & later
    assert later <= imported_by("from flood_optax import *")
    assert "jax.extend.core" in imported_by("import jax.extend.core")


def test_import_probe_can_fail():
    assert "tqdm" in extras_imported_by("import tqdm")


BACKEND = """
import os
os.environ["JAX_PLATFORMS"] = "no_such_platform"
{statement}
"""


@pytest.mark.parametrize(
    ("statement", "fails"),
    [("import flood_optax", False), ("import jax; jax.numpy.zeros(3)", True)],
    ids=["import", "meta"],
)
def test_import_initialises_no_backend(statement, fails):
    process = processes.start("-c", BACKEND.format(statement=statement))
    code, _, errors = processes.end(process)
    assert (code != 0) == fails, errors


def test_flax_extra_missing_names_the_extra():
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "try:\n    import flood_optax.flax\n"
        "except ImportError as error:\n    print(error)"
    )
    assert "pip install 'flood_optax[flax]'" in printed(code)
