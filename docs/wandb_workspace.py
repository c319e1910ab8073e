"""Makes a W&B workspace and a report with panels for the experts: python docs/wandb_workspace.py ENTITY PROJECT

Needs `pip install wandb-workspaces` and an account (`wandb login`). With --print nothing is sent: the workspace is shown as JSON.
SECTIONS and MEDIA can be imported without either.
"""

import argparse
import importlib.util
import sys
from typing import Any

SECTIONS = {
    "Loss": [
        ("Loss per token, nats", ["train/loss", "train/validation_loss"]),
        ("Auxiliary losses, scaled", ["train/loss_balance_scaled", "train/loss_z_scaled"]),
    ],
    "Look here first": [
        ("Busiest expert over an even share: worst layer, mean", ["moe/load_max_over_mean", "moe/load_max_over_mean_mean"]),
        ("Entropy of the load: worst layer, mean", ["moe/load_entropy", "moe/load_entropy_mean"]),
        ("Dead experts, share", ["moe/dead_fraction"]),
        ("Dropped: worst layer, all", ["moe/dropped_fraction", "train/dropped_fraction"]),
    ],
    "Router": [
        ("Entropy per token, nats: worst layer, mean", ["moe/router_entropy", "moe/router_entropy_mean"]),
        ("Largest probability", ["moe/top1_probability"]),
        ("Size of the logits", ["moe/router_logit_norm", "moe/router_logit_max"]),
        ("Range of the expert bias", ["moe/expert_bias_range"]),
    ],
    "Ranks and speed": [
        ("Busiest rank over the mean", ["moe/rank_overload", "moe/exchange_skew"]),
        ("Tokens per second", ["perf/tokens_per_second"]),
        ("MFU", ["perf/mfu"]),
        ("Waiting for data, share", ["perf/data_wait_fraction"]),
        ("In collectives, share: longest rank, mean", ["perf/exchange_fraction", "perf/exchange_fraction_mean"]),
        ("Host waits for the device, share", ["perf/host_wait_fraction"]),
    ],
    "Memory": [
        ("Peak, GB: worst rank, mean", ["system/memory_peak_gb", "system/memory_peak_gb_mean"]),
        ("Share of the device", ["system/memory_share"]),
        ("Of tensors and reserved, GB: worst rank", ["system/memory_allocated_gb", "system/memory_reserved_gb"]),
    ],
    "Stability (telemetry.tier=detailed)": [
        ("Largest attention logit", ["stability/attention_logit_max"]),
        ("Update over weight", [f"stability/update_ratio/{kind}" for kind in ("experts", "router", "attention", "embedding")]),
        ("Gradients", [f"stability/grad_norm/{kind}" for kind in ("experts", "router", "attention", "embedding")]),
        ("Weights", [f"stability/weight_norm/{kind}" for kind in ("experts", "router", "attention", "embedding")]),
    ],
    "Optimizer": [
        ("Norms", ["optimizer/grad_norm", "optimizer/grad_norm_experts", "optimizer/grad_norm_router"]),
        ("Learning rate", ["optimizer/lr"]),
    ],
}
"""Section, then title and keys of each chart; x is our own step, as W&B's cannot go back after a resume."""

MEDIA = ["experts/load", "experts/load_over_even", "experts/grad_norm", "experts/table", "sample"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entity")
    parser.add_argument("project")
    parser.add_argument("--print", action="store_true", help="show the workspace's definition and send nothing")
    arguments = parser.parse_args()
    if importlib.util.find_spec("wandb_workspaces") is None:
        sys.exit("wandb-workspaces is not installed: pip install wandb-workspaces")
    view = workspace(arguments.entity, arguments.project)
    if arguments.print:
        print(view._to_model().spec.model_dump_json(indent=1, by_alias=True))
        return
    view.save()
    print(view.url)
    page = report(arguments.entity, arguments.project)
    page.save()
    print(page.url)


def workspace(entity: str, project: str) -> Any:
    """Returns a wandb_workspaces Workspace."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=name, panels=panels(name), is_open=True) for name in SECTIONS]
    sections.append(ws.Section(name="Layer x expert", panels=[wr.MediaBrowser(media_keys=MEDIA)], is_open=True))
    settings = ws.WorkspaceSettings(x_axis="global_step")
    return ws.Workspace(name="tokenyard: experts", entity=entity, project=project, sections=sections, settings=settings)


def report(entity: str, project: str) -> Any:
    """Returns a wandb_workspaces Report."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list = []
    for name in SECTIONS:
        blocks += [wr.H2(text=name), wr.PanelGrid(runsets=[wr.Runset(entity=entity, project=project)], panels=panels(name))]
    media = wr.PanelGrid(runsets=[wr.Runset(entity=entity, project=project)], panels=[wr.MediaBrowser(media_keys=MEDIA)])
    title = "tokenyard: how the experts train"
    return wr.Report(entity=entity, project=project, title=title, blocks=[*blocks, wr.H2(text="Layer x expert"), media])


def panels(section: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [wr.LinePlot(title=title, x="global_step", y=keys) for title, keys in SECTIONS[section]]


if __name__ == "__main__":
    main()
