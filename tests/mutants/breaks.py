"""The breaks: a line of the library, what it becomes, and the tests that must fail."""

from typing import NamedTuple


class Break(NamedTuple):
    """Text that stands once in a file, what replaces it, and who must see that."""

    file: str
    before: str
    after: str
    tests: str


def applied(mutant: Break, text: str) -> str:
    """The text of the file, broken."""
    if text.count(mutant.before) != 1:
        found = text.count(mutant.before)
        raise ValueError(f"{mutant.file} holds {found} times, not once: {mutant}")
    return text.replace(mutant.before, mutant.after)


AVERAGE = "tests/modules/test_average.py tests/modules/test_averaged.py"

CORE = {
    "transform.py": (
        "tests/contract/test_band.py tests/modules/test_transform.py",
        (
            ("level = level.astype(dtype)", "pass"),
            ("jnp.where(level == -jnp.inf, 0, jnp.asarray(band, dtype))", "band"),
            ("jnp.where(climbs, half, -half)", "jnp.where(climbs, -half, half)"),
            ("jnp.where(subnormal, -tiny,", "jnp.where(False, -tiny,"),
            (
                "value = jnp.where(is_below, jnp.minimum(value, just_below), value)",
                "pass",
            ),
            ("is_below = bent.loss < bent.level", "is_below = bent.loss <= bent.level"),
            ("lambda d: 0 <= d <= _most()", "lambda d: 0 <= d"),
            ("if b is not None and d is not None and np.isfinite(b)", "if False"),
            ("if d is not None and b is not None and d > b > 0:", "if False:"),
            ("check_turns_around(shape, 1.0 if", "isinstance(shape, 1.0 if"),
            ("if counts is not None:", "if False:"),
            (
                "may_be_zero = shape != reflect() or counts is not None",
                "may_be_zero = False",
            ),
            ("run = _compared if is_static(shape) else _compare", "run = _compare"),
            ("_is_scalar(params) and not _is_scalar(updates)", "False"),
        ),
    ),
    "shape_rules.py": (
        "tests/modules/test_shape_rules.py tests/contract/test_band.py",
        (
            ("slope < m[here].min() - slack or", "False or"),
            ("or slope > m[here].max() + slack", "or False"),
            ("for i in (0, 3):", "for i in (0,):"),
            ("for i in (0, 3):", "for i in (3,):"),
            ("m[1] <= m[0] / 100", "True"),
            ("m[2] >= m[3] / 100", "True"),
            ("m[0] < 0 and", "True and"),
            ("@functools.lru_cache(maxsize=256)", "@functools.lru_cache(maxsize=0)"),
        ),
    ),
    "wrapper.py": (
        "tests/modules/test_wrapper.py tests/modules/test_window.py",
        (
            ('return {"value", "grad"} <= set', 'return {"value"} <= set'),
            (
                "weighted=axis_name is not None and extra_args",
                "weighted=extra_args",
            ),
            (
                'if extra_args.get("value_fn") is not None:\n                inner',
                "if True:\n                inner",
            ),
            ("return new if same else", "return new if True else"),
            ("return new if same else", "return new if False else"),
            (
                "jnp.zeros_like, leaves, itertools.compress(dtypes, numeric)",
                "jnp.zeros_like, leaves",
            ),
            (
                "if remembered[0] != types:\n                remembered",
                "if remembered[0] is None:\n                remembered",
            ),
            ("next(made) if yes else leaf for", "next(made) for"),
        ),
    ),
    "window.py": (
        "tests/modules/test_wrapper.py tests/modules/test_window.py",
        (
            ("emits=full & (scalars.flood_weight != 0)", "emits=full"),
            ("jnp.where(full, jnp.zeros_like(step), step)", "step"),
            ("skip &= weighs", "pass"),
            ("counts = ~skip & weighs", "counts = ~skip"),
            ("full = full if flush is False else full | flush", "pass"),
            ("step = jnp.where(skip, step, step + 1)", "step = step + 1"),
            (
                "skip_state = _pick(weighs, skip_state,",
                "skip_state = _pick(np.True_, skip_state,",
            ),
            (
                "finite = jnp.where(jnp.isfinite(mean), mean, jnp.zeros_like(mean))",
                "finite = mean",
            ),
            (
                "(loss.astype(mean.dtype) - finite - rest) / parts",
                "(loss.astype(mean.dtype) - finite) / parts",
            ),
            (
                "return (wide + step).astype(old.dtype)",
                "return (old + step.astype(old.dtype))",
            ),
            (
                "compare_dtype(np.dtype(dtype)) if chosen is None else chosen",
                "compare_dtype(np.dtype(dtype))",
            ),
            ("skip = skip | ~jnp.isfinite(loss)", "pass"),
        ),
    ),
    "dispatch.py": (
        "tests/contract/test_cost.py tests/modules/test_transform.py",
        (("return len(devices) < 2", "return False"),),
    ),
}

BREAKS: list[Break] = [
    *(
        Break(f"flood_optax/{file}", before, after, tests)
        for file, (tests, breaks) in CORE.items()
        for before, after in breaks
    ),
    *(
        Break("flood_optax/average.py", before, after, AVERAGE)
        for before, after in (
            (
                "count = jnp.minimum(step.astype(kept.dtype), 1 / (1 - kept))",
                "count = step.astype(kept.dtype)",
            ),
            (
                "count = jnp.minimum(step.astype(kept.dtype), 1 / (1 - kept))",
                "count = 1 / (1 - kept)",
            ),
            (
                "kept = jnp.asarray(decay, jnp.result_type(float))",
                "kept = jnp.asarray(decay, jnp.float32)",
            ),
            (
                "jnp.asarray(optax.safe_increment(before.flood_average_step))",
                "before.flood_average_step + 1",
            ),
            ("param = optax.apply_updates(param, update)", "pass"),
            ("_rounded(jnp.asarray(param)).astype", "jnp.asarray(param).astype"),
            ("jnp.where(new == average, new, average + step)", "average + step"),
            (
                "return jnp.array(param, dtype, copy=True)",
                "return jnp.asarray(param, dtype)",
            ),
            ("dtype = compare_dtype(np.dtype(dtype))", "pass"),
            (
                "count.astype(jnp.finfo(average.dtype).dtype)",
                "count.astype(jnp.float32)",
            ),
            ("if len(means) > 1:", "if len(means) > 2:"),
            (
                "return jnp.array(value, jnp.result_type(param), copy=True)",
                "return jnp.asarray(value, jnp.result_type(param))",
            ),
            (
                "return value.copy() if isinstance(value, jax.Array) else value",
                "return value",
            ),
            ("if path not in known and not _is_masked(average):", "if False:"),
            ("if means and jnp.shape(means[0]) != jnp.shape(param):", "if False:"),
            ("if all(mean is None for mean in here):", "if False:"),
            ("lambda d: 0 <= d < 1", "lambda d: 0 <= d <= 1"),
            ("dtype.itemsize < 4:", "dtype.itemsize < 2:"),
            ("range(len(path), -1, -1)", "range(len(path), len(path) - 1, -1)"),
        )
    ),
    *(
        Break("flood_optax/logs.py", before, after, "tests/modules/test_logs.py")
        for before, after in (
            ("jnp.maximum(step, 1)", "step"),
            ("if len(found) > 1:", "if len(found) > 2:"),
            ("jnp.asarray(*jax.tree.leaves(field))", "field"),
            ('"flood/loss": value,', '"flood/loss": level,'),
        )
    ),
    *(
        Break(
            f"flood_optax/sweep/{file}",
            before,
            after,
            tests.replace("test_", "tests/modules/test_"),
        )
        for file, before, after, tests in (
            (
                "journal.py",
                "rest = rest[file.write(rest) :]",
                "file.write(rest); break",
                "test_sweep_resume.py -k full_disk",
            ),
            (
                "journal.py",
                'b"\\n" * torn + _line(document)',
                "_line(document)",
                "test_sweep_resume.py -k killed_and_resumed",
            ),
            (
                "journal.py",
                ".reshape(len(names), *values.shape[1:])[wanted]",
                ".reshape(len(names), *values.shape[1:])",
                "test_sweep_resume.py -k extended",
            ),
            (
                "journal.py",
                'begun = any(header["format"] == FORMAT for header in headers)',
                "begun = False",
                "test_sweep_resume.py -k symbolic",
            ),
            (
                "journal.py",
                'for level in header["levels"] for words in keys]',
                'for words in keys for level in header["levels"]]',
                "test_sweep_resume.py -k version_before",
            ),
            (
                "journal.py",
                "    if jax.process_count() == 1:\n",
                "    if jax.process_count() > 0:\n",
                "test_sweep.py -k two_processes",
            ),
            (
                "journal.py",
                "file, first = pathlib.Path(path), jax.process_index() == 0",
                "file, first = pathlib.Path(path), True",
                "test_sweep.py -k two_processes",
            ),
            (
                "journal.py",
                "if changed:",
                "if False:",
                "test_sweep_resume.py -k settings_that",
            ),
            (
                "journal.py",
                "for found in DOCUMENT.finditer(line):",
                "for found in [*DOCUMENT.finditer(line)][:1]:",
                "test_sweep_resume.py -k glued",
            ),
            (
                "traced.py",
                "parts += [value for value in literals if np.ndim(value)]",
                "del literals",
                "test_sweep_fingerprint.py -k literals",
            ),
            (
                "traced.py",
                '    "jax_threefry_partitionable",\n',
                "",
                "test_sweep_resume.py test_forked.py -k setting",
            ),
            (
                "traced.py",
                "hidden.update({equation.primitive.name} & CALLS_PYTHON)",
                "pass",
                "test_sweep_fingerprint.py -k function_of_python",
            ),
            (
                "trunk.py",
                "compared = max(min(fork, number - 1) - 1, 0)",
                "compared = min(fork, number - 1)",
                "test_forked.py -k level_used_above_itself",
            ),
            (
                "trunk.py",
                'slice(begin, fork + 1 if name == "loss" else fork)',
                "slice(begin, fork)",
                "test_forked.py",
            ),
            (
                "trunk.py",
                "        leaves |= np.isnan(losses)\n",
                "        pass\n",
                "test_forked.py -k nan_loss",
            ),
            (
                "trunk.py",
                "if lowest == -np.inf:  # which",
                "if True:  # which",
                "test_forked.py -k nan_loss",
            ),
            (
                "trunk.py",
                "dtype = compare_dtype(losses.dtype)",
                "dtype = losses.dtype",
                "test_forked.py -k 16_bit",
            ),
            (
                "trunk.py",
                "kept = {*wanted.values(), begin, begin - length}",
                "kept = {*wanted.values(), begin}",
                "test_forked.py",
            ),
            ("trunk.py", ", *settings().values()", "", "test_forked.py -k setting"),
            (
                "trunk.py",
                "[*PROGRAMS][:-4]",
                "[*PROGRAMS][:-40]",
                "test_forked.py -k alive",
            ),
            (
                "trunk.py",
                "    if hidden:  # a function",
                "    if False:  # a function",
                "test_forked.py -k closes_over",
            ),
            (
                "inputs.py",
                "return array.astype(array.dtype) if weak else array",
                "return array",
                "test_forked.py -k weak_types",
            ),
            (
                "inputs.py",
                "any(other != first for other in others) or not takes(first)",
                "not takes(first)",
                "test_forked.py -k many_parts",
            ),
            ("inputs.py", "or not takes(batch)", "", "test_forked.py -k stacked"),
            (
                "trunk.py",
                "        error.metrics = rows",
                "        error.metrics = {}",
                "test_forked.py -k trunk",
            ),
            (
                "cores.py",
                'on_one_cpu = len(devices) == 1 and devices.pop().platform == "cpu"',
                "on_one_cpu = True",
                "test_forked.py -k one_branch_at_a_time",
            ),
            (
                "cores.py",
                "any(getattr(jax.config, name) for name in checks)",
                "False",
                "test_sweep_cores.py -k nan",
            ),
            (
                "cores.py",
                "apart = traced.jaxpr.effects or any",
                "apart = any",
                "test_sweep_cores.py -k ordered",
            ),
            (
                "cores.py",
                "ThreadPoolExecutor(number_of_cores())",
                "ThreadPoolExecutor(1)",
                "test_sweep_cores.py -k at_a_time",
            ),
            (
                "placement.py",
                "if spread > 1:",
                "if spread > 99:",
                "test_sweep.py -k four_devices",
            ),
            (
                "placement.py",
                "(over_devices, mesh=mesh), no_mesh",
                "(over_devices, mesh=mesh), contextlib.nullcontext",
                "test_sweep.py -k four_devices",
            ),
            (
                "placement.py",
                "if len(words) > 1:",
                "if len(words) > 0:",
                "test_sweep.py -k key_once",
            ),
            (
                "placement.py",
                "return parts(number, parts(number, most))",
                "return min(number, most)",
                "test_sweep.py -k balanced",
            ),
            (
                "placement.py",
                "jax.process_count() > 1",
                "jax.process_count() > 2",
                "test_sweep.py -k trains_no_run_twice",
            ),
            (
                "placement.py",
                "parts(len(runs.numbers), devices)",
                "parts(len(runs.numbers), 1)",
                "test_sweep.py -k balanced",
            ),
            (
                "inputs.py",
                "name in words and name != word",
                "False",
                "test_sweep_refusals.py -k other_arguments",
            ),
            (
                "inputs.py",
                "used = given.astype(np.float64 if wide else np.float32)",
                "used = given.astype(np.float32)",
                "test_sweep.py -k float64",
            ),
            (
                "result.py",
                "return np.where(best.any(axis=0), chosen, np.nan)",
                "return chosen",
                "test_results.py -k best",
            ),
            (
                "result.py",
                'ascending = np.argsort(self.levels, kind="stable")',
                "ascending = np.arange(len(self.levels))",
                "test_results.py -k best",
            ),
            (
                "result.py",
                'if values.dtype.kind == "c":',
                "if False:",
                "test_results.py -k complex",
            ),
            (
                "export.py",
                'content = bytearray(base64.b64decode(document["bytes"]))',
                'content = base64.b64decode(document["bytes"])',
                "test_results.py -k json",
            ),
        )
    ),
    *(
        Break(f"flood_optax/{file}", before, after, f"tests/{tests}")
        for file, before, after, tests in (
            (
                "mean.py",
                "outside = members.sum() != ones.sum()",
                "outside = jnp.zeros((), bool)",
                "modules/test_objective.py -k segment_id",
            ),
            (
                "mean.py",
                "sums = segment_sums(values, ids, members, most)",
                "sums = plain",
                "modules/test_mean.py -k million",
            ),
            (
                "mean.py",
                "sums, sizes = segment_sums(both, ids, members, most).T",
                "sums, sizes = jax.ops.segment_sum(both, ids, number).T",
                "modules/test_mean.py -k many",
            ),
            (
                "mean.py",
                "if ids.dtype.itemsize > 4:",
                "if False:",
                "modules/test_mean.py -k any_integer",
            ),
            (
                "mean.py",
                "size if counted.mask is None else global_mean(size, axis_name)",
                "size",
                "around/test_sharding.py -k padded",
            ),
            (
                "precision.py",
                "if most <= RUN:",
                "if True:",
                "modules/test_mean.py -k million",
            ),
            (
                "precision.py",
                "owners, further, -(-most // RUN)",
                "owners, further, RUN",
                "modules/test_mean.py -k million",
            ),
            (
                "devices.py",
                "if varying:",
                "if False:",
                "around/test_meshes.py -k vary",
            ),
            (
                "devices.py",
                "x + zeros_like(loss, x.dtype) if explicit_axes(loss) else x",
                "x",
                "around/test_meshes.py -k explicit_mesh",
            ),
            (
                "devices.py",
                "jnp.broadcast_to(zero, x.shape, out_sharding=jax.typeof(x).sharding)",
                "jnp.zeros_like(x, dtype=zero.dtype)",
                "around/test_meshes.py -k explicit_mesh",
            ),
            (
                "relax.py",
                "global_mean(mask.sum(dtype=scores.dtype), axis_name)",
                "mask.sum(dtype=scores.dtype)",
                "around/test_meshes.py -k both_ways",
            ),
            (
                "relax.py",
                "odd = jnp.where(plain >",
                "odd = jnp.where(loss >",
                "around/test_meshes.py -k both_ways",
            ),
            (
                "relax.py",
                "scores = jnp.where(entries, scores, zeros_like(scores))",
                "scores += 0",
                "claims/test_family.py -k relax_loss_of_masked",
            ),
            (
                "objective.py",
                "lax.stop_gradient((raw, bent.level, bent.multiplier))",
                "(raw, bent.level, bent.multiplier)",
                "modules/test_objective.py -k through_the_info",
            ),
            (
                "objective.py",
                "setattr(flooded_fn, FLOODED, True)",
                "pass",
                "modules/test_objective.py -k refused",
            ),
            (
                "objective.py",
                "_annotate(flooded_fn, loss_fn)\n    return",
                "return",
                "modules/test_objective.py -k annotations",
            ),
            (
                "checks.py",
                "is_partial = isinstance(seen, functools.partial)",
                "is_partial = False",
                "modules/test_objective.py -k refused",
            ),
            (
                "penalty.py",
                "step = wide(strength if radius is None else radius)",
                "step = jnp.asarray(strength if radius is None else radius)",
                "modules/test_penalty.py -k whole_numbers",
            ),
            (
                "penalty.py",
                "eta = wide(learning_rate)",
                "eta = jnp.asarray(learning_rate)",
                "modules/test_penalty.py -k whole_numbers",
            ),
            (
                "sharpness.py",
                "for _ in range(2):",
                "for _ in range(1):",
                "modules/test_sharpness.py -k exhausted",
            ),
        )
    ),
]
