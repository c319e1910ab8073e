"""Gathers what is reported about a run at its start, after a validation pass and at its end."""

import os
import shlex
from pathlib import Path
from typing import Any

import torch

from ..config.config import Config
from ..evaluation import Evaluation
from ..session import Session
from .console.startup import StartupFacts
from .console.summary import EndFacts, Sample
from .metrics import load_metrics
from .peak_flops import Peak


def validation_record(config: Config, evaluation: Evaluation) -> dict[str, Any]:
    """Returns loss and load of a validation pass, and the results of probes and tasks, under keys of their own."""
    load = load_metrics(evaluation.counts_LE, [0] * len(evaluation.counts_LE), moe_layers(config))
    peak = load.get("moe/load_max_over_mean")
    record = {"validation_loss": evaluation.loss, "validation/bits_per_byte": evaluation.bits_per_byte}
    for name, source in evaluation.sources.items():
        record |= {f"validation/{name}/loss": source.per_token, f"validation/{name}/bits_per_byte": source.bits_per_byte}
    return record | ({} if peak is None else {"validation/load_max_over_mean": peak}) | evaluation.scores


def moe_layers(config: Config) -> list[int]:
    """Returns the indices of the blocks with experts, without those of multi-token prediction."""
    return [index for index in range(config.model.layers) if config.model.moe_layer(index)]


def startup_facts(session: Session, peak: Peak) -> StartupFacts:
    """Returns what the table at the start shows in addition to the configuration."""
    facts, device = session.data.facts, session.device
    return StartupFacts(
        run_dir=str(session.folder),
        resume=session.start,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({os.cpu_count()} cores)",
        ranks=session.parallel.mesh.world,
        threads=torch.get_num_threads(),
        documents=facts.train_documents,
        tokens=facts.train_tokens,
        pieces=session.data.tokenizer.size,
        bytes_per_token=facts.bytes_per_token,
        peak_flops=peak.flops,
        peak_source=peak.source,
        first_step=session.step,
        precision_from=session.precision_from,
    )


def end_facts(session: Session, evaluation: Evaluation, sample: Sample | None, seconds: float, code: int) -> EndFacts:
    """Returns what the summary at the end shows, after `seconds` of this process, which exits with `code`."""
    config, checkpoint = session.config, shlex.quote(str(session.checkpoint))
    return EndFacts(
        steps=session.step,
        tokens=session.tokens,
        seconds=seconds,
        validation_loss=evaluation.loss,
        bits_per_byte=evaluation.bits_per_byte,
        unigram_entropy=session.data.facts.unigram_entropy,
        counts_LE=evaluation.counts_LE,
        layers=moe_layers(config),
        checkpoint=str(session.checkpoint) if session.checkpoint else None,
        sample=sample,
        commands=[
            ("write more text", f'tokenyard generate {checkpoint} --prompt "class "'),
            ("train longer", resume_command(session.folder, steps=2 * config.steps)),
            ("see what is in it and evaluate it again", f"tokenyard evaluate {checkpoint} evaluate.sequences=256"),
        ],
        outcome="Stopped" if code else "Done",
    )


def resume_command(run_dir: Path, steps: int | None = None) -> str:
    """Returns the command line that continues a run, with the settings of its config.yaml."""
    return " ".join(["tokenyard train --from", shlex.quote(str(run_dir)), *([f"steps={steps}"] if steps else [])])
