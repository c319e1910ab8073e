"""Compares MoE with dense models: `python -m tokenyard.bench.quality [key=value ...]`, settings as for `tokenyard train`.

Trains a dense model and MoE variants with its active parameters on the same tokens of real text. Reports the validation loss
against tokens, FLOPs and time, and how much less of each a variant needs to reach the final loss of the dense model. Run
folders stay in --out; complete runs are not repeated.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from ...train.allocator import restart_with_kept_memory
from .cost import causal_loss, relative_costs
from .plan import DENSE, EXPERT_CHOICE, FP8, MUON, SIZES, TUNED, QualityPlan, TrainingRun, models, variants
from .results import draw, results, table
from .runs import Lab, complete

STAGES = ("train", "cost", "report")
EXTENSIONS = 3
"""The most times that tuning extends the range of learning rates."""


def main(words: list[str] | None = None) -> int:
    """Returns the exit code."""
    if words is None:
        restart_with_kept_memory()
    arguments = parse(words)
    try:
        lab = laboratory(arguments)
        models(lab.size, lab.variants, lab.more)
        lab.folder.mkdir(parents=True, exist_ok=True)
        for stage in arguments.stages:
            {"train": train, "cost": cost, "report": report}[stage](lab, arguments)
    except ValueError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    return 0


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.quality", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="settings of all runs, as data=fineweb_edu precision=bf16")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the runs and the results")
    parser.add_argument("--text", help="a text file, or a folder of *.txt; without it the standard library's source")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, help="of a run; without it as the size says")
    parser.add_argument("--expansion", type=int, help="weights of the routed experts, as a multiple of the dense feed-forward")
    parser.add_argument("--variants", nargs="*", help=f"in addition to {DENSE} and {TUNED} (all but those in FP8)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[5e-3, 1e-2], help="learning rates to begin tuning with; one: no tuning"
    )
    parser.add_argument("--tuning", type=float, default=0.4, help="length of a tuning run, as a share of a run")
    parser.add_argument(
        "--shorter", nargs="*", type=float, default=[0.5, 0.25], help=f"shares of the tokens that {TUNED} and {MUON} have too"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--rounds", type=int, default=5, help="in which the costs of a step are measured")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    return parser.parse_intermixed_args(words)


def laboratory(arguments: argparse.Namespace) -> Lab:
    """Returns the lab for these arguments. Raises ValueError for an unknown variant."""
    size = SIZES[arguments.size]
    size = replace(size, steps=arguments.steps or size.steps, expansion=arguments.expansion or size.expansion)
    known = variants(size)
    for name in arguments.variants or []:
        if name not in known:
            raise ValueError(f"--variants {name}: must be among {', '.join(known)}")
    chosen = {DENSE, TUNED, *([name for name in known if name not in FP8] if arguments.variants is None else arguments.variants)}
    text = ["data=text", f"data.path={arguments.text}"] if arguments.text else []
    return Lab(
        arguments.out,
        size,
        {name: model for name, model in known.items() if name in chosen},
        [*text, *arguments.overrides],
        processes=arguments.processes,
        threads=arguments.threads,
    )


def train(lab: Lab, arguments: argparse.Namespace) -> None:
    """Tunes the learning rates, writes the plan, and trains all runs."""
    tried = {name: tune(lab, name, arguments) for name in (DENSE, TUNED, MUON) if name in lab.variants}
    plan = QualityPlan(lab.size.steps, arguments.seeds, arguments.shorter, tried)
    named(lab, "plan", "json").write_text(json.dumps(asdict(plan), indent=1))
    lab.train(plan.runs(lab.variants))


def tune(lab: Lab, variant: str, arguments: argparse.Namespace) -> list[list[float]]:
    """Returns pairs of a learning rate and its loss: the given rates, and further ones while the best is at an end.

    One rate is not tuned.
    """
    rates, losses = list(arguments.rates), dict[float, float]()
    if len(rates) == 1:
        return [[rates[0], 0.0]]
    steps = max(1, round(arguments.tuning * lab.size.steps))
    for _ in range(EXTENSIONS + 1):
        new = [rate for rate in rates if rate not in losses]
        runs = [TrainingRun(variant, rate, steps, 1) for rate in new]
        lab.train(runs)
        losses |= {run.rate: lab.curve(run).losses[-1] for run in runs}
        best = min(losses, key=lambda rate: losses[rate])
        rates = [best / 2, best * 2]
    return [[rate, losses[rate]] for rate in sorted(losses)]


def cost(lab: Lab, arguments: argparse.Namespace) -> None:
    """Measures the cost of steps. A stage of its own, because nothing else may run at the same time."""
    (lab.folder / "costs.json").write_text(json.dumps(relative_costs(lab, arguments.rounds, 5), indent=1))


def report(lab: Lab, _: argparse.Namespace) -> None:
    """Reports the runs that exist so far."""
    plan, costs = QualityPlan(**json.loads(named(lab, "plan", "json").read_text())), lab.folder / "costs.json"
    found = results(lab, plan, json.loads(costs.read_text()) if costs.exists() else {})
    of_experts = [plan.full(EXPERT_CHOICE, seed) for seed in range(1, plan.seeds + 1)]
    found["causal"] = [causal_loss(lab.place(run)) for run in of_experts if complete(lab.place(run))]
    named(lab, "results", "json").write_text(json.dumps(found, indent=1))
    print(table(found))
    try:
        draw(lab, plan, found, named(lab, "quality", "png"))
    except ImportError:
        print("quality: no picture without matplotlib: pip install 'tokenyard[report]'")


def named(lab: Lab, name: str, kind: str) -> Path:
    """Returns a file of results for runs of this length; the folder may hold results of other lengths."""
    return lab.folder / f"{name}-{lab.size.steps}.{kind}"


if __name__ == "__main__":
    sys.exit(main())
