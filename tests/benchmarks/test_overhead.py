"""The tables of the cost compare each step with its own reference."""

from benchmarks import overhead

ENVIRONMENT = dict.fromkeys(
    ("commit", "dirty", "command", "jax", "optax", "cpu_count", "cpu")
)


def test_overhead_tables_compare_each_row_with_its_own_reference():
    def row(variant, reference, time, kernels, seconds):
        return {
            "model": "mlp",
            "optimizer": "sgd",
            "dtype": "float32",
            "variant": variant,
            "reference": reference,
            "compiles": 1,
            "time_ratio_median": time,
            "time_ratio_iqr": [time, time],
            "flops_ratio": time,
            "temp_memory_ratio": time,
            "kernels": kernels,
            "compile_seconds": seconds,
        }

    eager = dict.fromkeys(
        ("flops_ratio", "temp_memory_ratio", "kernels", "compile_seconds")
    )
    rows = [
        row("plain", "plain", 1.0, 40, 2.0),
        row("loss form", "plain", 1.25, 42, 3.0),
        row("MultiSteps(4)", "plain", 1.0, 90, 8.0),
        row("wrapper, every_k=4", "MultiSteps(4)", 0.5, 85, 6.0),
        row("PyTorch", "plain", 3.0, 0, 0) | eager,
        row("PyTorch, one-liner", "PyTorch", 1.5, 0, 0) | eager,
    ]
    second = {"model": "cnn", "time_ratio_median": 1.5, "kernels": 47}
    rows += [row("plain", "plain", 1.0, 42, 2.0) | {"model": "cnn"}, rows[1] | second]
    made = overhead.tables({"environment": ENVIRONMENT, "rows": rows})
    lines = {line.split(" | ")[0]: line for line in made["overhead"].splitlines()}
    # kernels: 42 - 40 and 47 - 42, at most 5; compile time: 3 over 2 twice
    assert lines["| loss form"] == (
        "| loss form | plain | 1.375 | 1.250 to 1.500 | 1.2500 | 1.250 | 1.2500 | 5 "
        "| 1.500 | 1 |"
    )
    assert (
        "| MultiSteps(4) | 0.500 | 0.500 to 0.500 | 0.5000 | 0.500 | 0.5000 | -5"
        in (lines["| wrapper, every_k=4"])
    )
    assert lines["| PyTorch, one-liner"].startswith(
        "| PyTorch, one-liner | PyTorch | 1.500 | 1.500 to 1.500 | - | - | - | - | - |"
    )
