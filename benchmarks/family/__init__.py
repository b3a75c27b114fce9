"""Compares the methods of the family, SAM and weight decay on the same noisy images."""

import argparse
import dataclasses
from typing import Any

import jax

from benchmarks import pixels, study
from benchmarks.family.findings import (
    DEFAULT,
    figures,
    numbers,
    record_name,
    summarise,
    tables,
)
from benchmarks.family.methods import METHODS
from benchmarks.family.training import FULL, SMOKE, Protocol, trainer

__all__ = ["figures", "measure", "numbers", "options", "record_name", "tables"]

NOISES = (0.0, 0.2)


def options(parser: argparse.ArgumentParser) -> None:
    sets = [name for name in pixels.WHOLE if name != "digits"]
    parser.add_argument("--set", choices=sets, default=DEFAULT)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="100, or 10 of a whole set")
    study.data_option(parser)
    study.sweep_options(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    protocol = Protocol() if args.set == DEFAULT else FULL
    protocol = dataclasses.replace(protocol, epochs=args.epochs or protocol.epochs)
    name, seeds, noises, methods = args.set, args.seeds, NOISES, list(METHODS)
    if args.smoke:
        protocol, name, seeds, noises = SMOKE, "digits", 2, NOISES[1:]
        methods = ["plain", "sam", "adaflood_last_layer"]
    images = pixels.load(name, args.data, pixels.WHOLE)
    study.one_thread_per_run(args.workers)
    keys = jax.random.split(jax.random.key(0), seeds)
    rows: list[dict[str, Any]] = []
    by_number: list[dict[str, Any]] = []
    for noise in noises:
        for method in methods:
            print(f"{pixels.TITLES[name]}, {noise:.0%} flips: {method}", flush=True)
            numbers = METHODS[method].numbers(noise)[: 2 if args.smoke else None]
            result = study.run(
                trainer(images, noise, METHODS[method], protocol),
                numbers,
                keys,
                journal=study.journal(args.work, "family", name, f"{noise:g}", method),
                progress=not args.smoke,
            )
            rows += summarise(method, noise, result)
            by_number.append(
                {
                    "method": method,
                    "noise": noise,
                    "numbers": list(numbers),
                    "accuracy": (100 * result.metrics["last"][..., 1].mean(1)).tolist(),
                }
            )
    return {
        "protocol": {
            **dataclasses.asdict(protocol),
            "data": name,
            "sizes": [*pixels.WHOLE[name], len(images.test_x)],
            "noises": list(noises),
            "optimizer": "sgd",
            "labels": "flipped in training and validation, clean in the test",
            "selection": "validation accuracy, the lowest of the best numbers",
            "seeds": seeds,
        },
        "rows": rows,
        "by_number": by_number,
    }
