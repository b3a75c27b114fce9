"""Floods the paper's MLP on real images: accuracy, test loss, calibration, flatness."""

import argparse
import dataclasses
from typing import Any

import jax

from benchmarks import pixels, study
from benchmarks.images.findings import by_level, numbers, summarise, tables
from benchmarks.images.training import SMOKE, Protocol, trainer

__all__ = ["measure", "numbers", "options", "tables"]

SIZES = {  # training, validation; test is what is left, or the official one
    "mnist-5k": (2000, 500),
    "mnist": (5000, 1250),
    "fashion-mnist": (5000, 1250),
    "digits": (200, 50),  # for --smoke
}
LEVELS = {  # by the share of flipped labels; clean ones take the paper's grid
    0.0: (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1),
    0.1: (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
}


def options(parser: argparse.ArgumentParser) -> None:
    sets = [name for name in SIZES if name != "digits"]
    parser.add_argument("--sets", nargs="+", choices=sets, default=sets[:1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Protocol.epochs)
    study.data_option(parser)
    study.sweep_options(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    protocol = dataclasses.replace(Protocol(), epochs=args.epochs)
    sets, seeds, grid = args.sets, args.seeds, LEVELS
    if args.smoke:
        protocol, sets, seeds, grid = SMOKE, ["digits"], 2, {0.1: (0.0, 2.25)}
    loaded = {name: pixels.load(name, args.data, SIZES) for name in sets}  # or an error
    study.one_thread_per_run(args.workers)
    keys = jax.random.split(jax.random.key(0), seeds)
    entries: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for name, images in loaded.items():
        for noise, levels in grid.items():
            print(f"{pixels.TITLES[name]}, {noise:.0%} flips", flush=True)
            kept = study.journal(args.work, "images", name, f"{noise:g}")
            train = trainer(images, noise, protocol)
            result = study.run(train, levels, keys, journal=kept)
            entries += summarise(name, noise, result)
            rows += by_level(name, noise, result)
    protocol_of: dict[str, Any] = {
        **dataclasses.asdict(protocol),
        "optimizer": "sgd",
        "sizes": {name: [*SIZES[name], len(loaded[name].test_x)] for name in sets},
        "labels": "flipped in training and validation, clean in the test",
        "selection": "validation accuracy, the lowest of the best levels",
        "scaled_down": "images and epochs, to two processor cores; the paper trains "
        "500 epochs on all images, so these numbers do not compare with its table",
        "seeds": seeds,
    }
    return {"protocol": protocol_of, "rows": entries, "by_level": rows}
