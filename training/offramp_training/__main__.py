"""`offramp-train`: the command line over fit, sweep, evaluate, compare, calibrate, export
and inspect.

Parses, calls, prints. What a user got wrong ends as one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

# Idle OpenMP threads spin for microseconds and then sleep. Spinning on, libgomp's default, makes a
# step several times slower as soon as anything else runs beside; sleeping at once costs a fifth
# on a quiet machine (docs/results/engine.md). Read when torch is loaded, so it comes first.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from rich.console import Console

from offramp_model.checkpoint import TORCH_DTYPES, CheckpointError, Manifest, load_checkpoint
from offramp_model.policies import POLICIES, supported_policies
from offramp_training.config import parse_recipe, read_recipe, read_table
from offramp_training.data import Columns, Dataset, load_split
from offramp_training.errors import DataError, OutputError, RecipeError, SweepError, TrainingError
from offramp_training.objectives import OBJECTIVES
from offramp_training.processes import first_on_machine, launched, leave

SPLITS = ("train", "validation", "test", "held_out")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.run is not _fit and launched() > 1:
            raise TrainingError(
                f"{launched()} processes: allowed for fit only; start this without a launcher"
            )
        options.run(options)
    except (TrainingError, CheckpointError) as error:
        _say(f"offramp-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = {
            _fit: "; the same command without --overwrite goes on from there",
            _sweep: "; the same command goes on from there",
        }
        _say(f"offramp-train: interrupted{goes_on.get(options.run, '')}", file=sys.stderr)
        return 130
    return 0


def _fit(options: argparse.Namespace) -> None:
    from offramp_training.fit import fit  # transformers and accelerate: seconds to import

    recipe = read_recipe(options.recipe, options.set, objective=options.objective)
    output = fit(
        recipe,
        options.output,
        data=options.data,
        overwrite=options.overwrite,
        calibrate=options.calibrate,
    )
    _say(f"checkpoint: {output}")
    leave()


def _say(line: str, file: TextIO | None = None) -> None:
    """Once, where several processes share a terminal."""
    if first_on_machine():
        print(line, file=file)


def _sweep(options: argparse.Namespace) -> None:
    from offramp_training.grid import parse_grid
    from offramp_training.results import METRICS, print_sweep
    from offramp_training.sweep import sweep

    if options.metric not in METRICS:
        raise RecipeError(f"--metric {options.metric}; allowed: {', '.join(METRICS)}")
    ranked = sweep(
        read_table(options.recipe, options.set, objective=options.objective),
        parse_grid(options.grid, options.seeds),
        options.output,
        data=options.data,
        metric=options.metric,
        keep=options.keep,
        say=lambda line: print(f"offramp-train: {line}", file=sys.stderr),
    )
    print_sweep(ranked, options.metric, _console())
    points = [result for one in ranked for result in one.results]
    failed = sum(result.state == "failed" for result in points)
    if failed:
        raise SweepError(
            f"{failed} of {len(points)} points failed; the same command tries them again"
        )


def _evaluate(options: argparse.Namespace) -> None:
    from offramp_training.evaluate import evaluate_checkpoint, print_report, write_json
    from offramp_training.plot import SUFFIXES, plot_report

    _check_target("--json", options.json)
    _check_target("--plot", options.plot, SUFFIXES)
    checkpoint = load_checkpoint(options.checkpoint)
    dataset = _rows(options, checkpoint.manifest)
    report = evaluate_checkpoint(checkpoint, dataset, options.policy)
    print_report(report, _console())
    if options.json:
        write_json(report, options.json)
    if options.plot:
        plot_report(report, options.plot, title=f"{checkpoint.manifest.data.name}, {dataset.split}")


def _compare(options: argparse.Namespace) -> None:
    from offramp_training.compare import compare_checkpoints, print_comparison, write_comparison
    from offramp_training.plot import SUFFIXES, plot_comparison

    _check_target("--json", options.json)
    _check_target("--plot", options.plot, SUFFIXES)
    checkpoints = [load_checkpoint(directory) for directory in options.checkpoints]
    datasets = [_rows(options, checkpoint.manifest) for checkpoint in checkpoints]
    comparison = compare_checkpoints(checkpoints, datasets, options.policy, draws=options.draws)
    print_comparison(comparison, _console())
    if options.json:
        write_comparison(comparison, options.json)
    if options.plot:
        title = f"{checkpoints[0].manifest.data.name}, {comparison.split}"
        plot_comparison(comparison, options.plot, title=title)


def _calibrate(options: argparse.Namespace) -> None:
    from offramp_training.calibrate import calibrate_checkpoint
    from offramp_training.evaluate import evaluate_checkpoint, store_report

    if options.split == "train":
        raise DataError("--split train: never training rows; allowed: held_out, validation, test")
    checkpoint = load_checkpoint(options.checkpoint)
    if options.backend not in (None, checkpoint.backend):
        raise TrainingError(
            f"--backend {options.backend}: {options.checkpoint} is for {checkpoint.backend}"
            + ("" if checkpoint.backend == "onnx" else "; offramp-train export makes graphs of it")
        )
    dataset = _rows(options, checkpoint.manifest)
    dtype = options.dtype or checkpoint.dtype
    checkpoint = calibrate_checkpoint(checkpoint, dataset, dtype=dtype)
    for policy in supported_policies(checkpoint.model):
        table = checkpoint.table(policy, backend=checkpoint.backend, dtype=dtype)
        print(f"{policy}: {len(table.points)} points up to {table.max_speedup:.2f}x")
    if dtype == checkpoint.dtype:  # the figures in the model card are of what is served by default
        store_report(checkpoint, evaluate_checkpoint(checkpoint, dataset), dataset.split)


def _export(options: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(options.checkpoint)
    if options.format == "final-head":
        from offramp_training.final_head import export_final_head

        if options.quantize or options.data:
            raise OutputError("--format final-head takes neither --quantize nor --data")
        export_final_head(checkpoint, options.output)
        print(f"{options.output}: the last exit alone; accuracy is that of speed-up 1")
        return
    from offramp_training.export import export_onnx

    measured_on = _rows(options, checkpoint.manifest) if options.quantize else None
    exported = export_onnx(checkpoint, options.output, measured_on=measured_on)
    print(f"{options.output}: {exported.dtype} graphs; next: offramp-train calibrate")


def _inspect(options: argparse.Namespace) -> None:
    from offramp_training.inspect import inspect_checkpoint

    inspect_checkpoint(options.checkpoint, _console())


def _check_target(option: str, path: Path | None, suffixes: Sequence[str] | None = None) -> None:
    """Whether a file can be written there, found out before the work that fills it."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise OutputError(f"{option} {path}: allowed: a name that ends in {', '.join(suffixes)}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{option} {path}: cannot be written there")


def _rows(options: argparse.Namespace, manifest: Manifest) -> Dataset:
    """The rows that --data and --split name, read as the checkpoint's recipe says."""
    recipe = parse_recipe(dict(manifest.objective.parameters))
    if options.split == "held_out":
        from offramp_training.fit import choose_rows

        held_out = choose_rows(recipe, options.data).held_out
        if held_out.fingerprint != manifest.data.held_out_fingerprint:
            raise DataError(f"--data {options.data} is not the data that the checkpoint came from")
        return held_out
    columns = Columns(recipe.data.text, recipe.data.text_pair, recipe.data.label)
    model = manifest.model
    return load_split(options.data, options.split, columns, model.labels, model.problem_type)


def _console() -> Console:
    """As wide as the terminal; a file or a pipe gets room for whole tables. Text is only text: a
    label may look like rich's markup or an emoji's name."""
    width = None if Console().is_terminal else 120
    return Console(width=width, markup=False, emoji=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="offramp-train", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fit = commands.add_parser("fit", help="train a multi-exit checkpoint; goes on where it stopped")
    fit.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    fit.add_argument("--data", help="directory, .jsonl/.csv/.parquet file or hub name")
    fit.add_argument("--objective", choices=sorted(OBJECTIVES))
    fit.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    fit.add_argument("--output", type=Path, required=True, metavar="DIR")
    fit.add_argument("--overwrite", action="store_true", help="start anew, replace what is there")
    fit.add_argument("--no-calibrate", dest="calibrate", action="store_false")
    fit.set_defaults(run=_fit)

    _add_sweep(commands)

    evaluate = commands.add_parser("evaluate", help="accuracy by layer, policy and speed-up")
    evaluate.add_argument("checkpoint", type=Path, metavar="DIR")
    _add_rows(evaluate)
    policies = sorted(POLICIES)
    evaluate.add_argument("--policy", nargs="+", action="extend", choices=policies, metavar="P",
                          help=f"any of {', '.join(policies)}")  # fmt: skip
    evaluate.add_argument("--json", type=Path, metavar="FILE")
    evaluate.add_argument("--plot", type=Path, metavar="FILE", help=".png, .svg or .pdf")
    evaluate.set_defaults(run=_evaluate)

    _add_compare(commands)

    calibrate = commands.add_parser("calibrate", help="measure thresholds on held-out rows")
    calibrate.add_argument("checkpoint", type=Path, metavar="DIR")
    _add_rows(calibrate)
    calibrate.add_argument("--backend", choices=["torch", "onnx"], help="default: what it is for")
    calibrate.add_argument(
        "--dtype", choices=[*sorted(TORCH_DTYPES), "int8"], help="default: its own"
    )
    calibrate.set_defaults(run=_calibrate)

    _add_export(commands)

    inspect = commands.add_parser("inspect", help="what a checkpoint is")
    inspect.add_argument("checkpoint", type=Path, metavar="DIR")
    inspect.set_defaults(run=_inspect)
    return parser


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="fit every point of a grid; goes on where it stopped")
    sweep.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    sweep.add_argument("--data", help="directory, .jsonl/.csv/.parquet file or hub name")
    sweep.add_argument("--objective", choices=sorted(OBJECTIVES))
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                       help="for every point")  # fmt: skip
    sweep.add_argument("--grid", action="append", default=[], metavar="KEY=[V1,V2]")
    sweep.add_argument("--seeds", metavar="0,1,2", help="each configuration with each seed")
    sweep.add_argument("--output", type=Path, required=True, metavar="DIR")
    sweep.add_argument("--metric", default="accuracy_at_2", help="what the table is sorted by")
    sweep.add_argument("--keep", choices=["all", "best"], default="all",
                       help="best: delete the weights of other configurations")  # fmt: skip
    sweep.set_defaults(run=_sweep)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser("compare", help="several checkpoints on the same rows")
    compare.add_argument("checkpoints", type=Path, nargs="+", metavar="DIR",
                         help="differences are to the first")  # fmt: skip
    _add_rows(compare)
    compare.add_argument("--policy", choices=["best", *sorted(POLICIES)], default="best",
                         help="default: each checkpoint's best at speed-up 2")  # fmt: skip
    compare.add_argument("--draws", type=_count, default=2000, help="bootstrap samples of the rows")
    compare.add_argument("--json", type=Path, metavar="FILE")
    compare.add_argument("--plot", type=Path, metavar="FILE", help=".png, .svg or .pdf")
    compare.set_defaults(run=_compare)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="a checkpoint in another form")
    export.add_argument("checkpoint", type=Path, metavar="DIR")
    export.add_argument("--format", choices=["onnx", "final-head"], required=True,
                        help="onnx: segments for --backend onnx; final-head: a plain "
                             "...ForSequenceClassification")  # fmt: skip
    export.add_argument("--quantize", choices=["int8"])
    export.add_argument("--data", metavar="PATH", help="rows that int8 activations are measured "
                        "on; default: the recipe's")  # fmt: skip
    export.add_argument("--split", choices=SPLITS, default="held_out")
    export.add_argument("--output", type=Path, required=True, metavar="DIR2")
    export.set_defaults(run=_export)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number from 1 on")
    return int(text)


def _add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="PATH")
    parser.add_argument("--split", choices=SPLITS, default="validation")


if __name__ == "__main__":
    sys.exit(main())
