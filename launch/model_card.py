"""The model card of an export: README.md as the Hugging Face hub wants it.

All facts are those that a checkpoint and its run recorded; others are absent. Front matter: https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.manifest import Manifest, read_manifest
from ..data.config import Corpus, DataConfig, mixture_sources
from ..report.journal_reader import RunError
from ..report.run_reader import Run
from ..train.config.config import Config
from ..train.config.model_summary import count, describe_routing, layout_text, moe_layers
from ..train.config.number_format import gigabytes, short
from ..train.config.redact import redact
from ..train.config.serialize import config_from_plain
from ..train.weight_source import HUB_NAME

if TYPE_CHECKING:
    from ..interop.export import Exported

CARD = "README.md"
SENTENCES = {
    Corpus.stdlib: "the source text of Python's standard library",
    Corpus.synthetic: "small stories made by a grammar",
}
"""Corpora that need no name."""


class Training(NamedTuple):
    """What is recorded of a checkpoint."""

    name: str
    step: int
    config: Config
    facts: dict[str, Any]
    """Of the manifest."""
    numbers: dict[str, tuple[int, float]]
    """The newest step and value of each number that was logged, up to this step."""
    events: list[dict[str, Any]]
    """Of events.jsonl, up to this step."""


def read_training(checkpoint: Path) -> Training:
    """Reads the manifest of a checkpoint, and the journals of its run if they are beside it.

    Raises ValueError for a damaged manifest.
    """
    manifest = read_manifest(checkpoint)
    config, facts = config_from_plain(manifest.facts["config"]), manifest.facts
    run = _run_of(checkpoint, manifest)
    if run is None:
        return Training(config.run.name or checkpoint.parent.name, manifest.step, config, facts, {}, [])
    events = [event for event in run.events if isinstance(event.get("step"), int) and event["step"] <= manifest.step]
    numbers = dict[str, tuple[int, float]]()
    for name, column in run.metrics.by_name.items():
        upto = [(int(step), value) for step, value in zip(column.steps, column.values, strict=True) if step <= manifest.step]
        numbers |= {name: upto[-1]} if upto else {}
    for event in events:  # the last validation of a run may be in the event of its end alone
        if isinstance(event.get("validation_loss"), int | float):
            numbers |= {name: (event["step"], float(event[name])) for name in event if is_measure(name)}
    return Training(config.run.name or run.name, manifest.step, config, facts, numbers, events)


def _run_of(checkpoint: Path, manifest: Manifest) -> Run | None:
    """Returns the run that wrote the checkpoint: the folder around it, if its id is that of the manifest."""
    folder = checkpoint.absolute().parent.parent
    try:
        run_id = (folder / "run_id").read_text().strip()
        return Run(folder) if run_id == manifest.facts.get("run_id") else None
    except (OSError, RunError, UnicodeDecodeError):
        return None


def model_card(training: Training, made: "Exported", repo: str | None = None, license: str | None = None) -> str:
    """Returns the text of README.md. `repo`: where the model will be on the hub; `license`: an identifier of the hub's list."""
    import yaml

    name = repo.partition("/")[2] if repo else training.name
    parts = [
        f"---\n{yaml.safe_dump(front_matter(training.config, license), sort_keys=False)}---",
        f"# {_cell(name)}",
        _opening(training.config, made),
        "## Architecture\n\n" + _table(_architecture(training.config, made)),
    ]
    if training.step or training.facts.get("tokens"):
        parts.append("## Training\n\n" + _table(_training(training)))
    if measured := _evaluation(training):
        parts.append(f"## Evaluation\n\n{measured}")
    if balance := _balance(training.numbers):
        parts.append(f"## Balance of the experts\n\n{balance}")
    parts += ["## Use\n\n" + _use(repo), "## Limits\n\n" + "\n".join(f"- {_cell(each)}" for each in _limits(training, made))]
    return redact("\n\n".join(parts) + "\n")


def front_matter(config: Config, license: str | None) -> dict[str, Any]:
    """Returns the metadata of the card."""
    init, names = config.checkpoint.init, [source.config.name for source in mixture_sources(config.data)]
    datasets = [name for name in names if name is not None and HUB_NAME.fullmatch(name)]
    return {
        **({"license": license} if license else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(["moe", "mixture-of-experts"] if moe_layers(config.model) else []), "tokenyard"],
        **({"datasets": datasets} if datasets else {}),
        **({"base_model": init} if init and HUB_NAME.fullmatch(init) and not Path(init).exists() else {}),
    }


def _opening(config: Config, made: "Exported") -> str:
    parts, experts = count(config.model), moe_layers(config.model)
    kind = "Mixture-of-Experts language model" if experts else "language model"
    active = f", of which {short(parts.active)} are active for each token" if experts else ""
    return f"A {kind} with {short(parts.total)} parameters{active}, trained with tokenyard. transformers: `{made.architecture}`."


def _architecture(config: Config, made: "Exported") -> Iterator[tuple[str, str]]:
    model, parts, experts = config.model, count(config.model), moe_layers(config.model)
    yield "parameters", f"{parts.total:,}"
    if experts:
        yield "active for each token", f"{parts.active:,} ({parts.active / parts.total:.1%})"
    yield "layers", f"{model.layers}" + (f", {experts} of them with experts" if experts else "")
    yield "width", f"{model.width}"
    yield "attention", f"{model.attention.kind.name}, {model.heads} heads"
    if experts:
        yield "experts of a layer", f"{model.moe.experts}, {model.moe.hidden} wide; {model.moe.top_k} for each token"
        yield "routing", describe_routing(model)
    yield "vocabulary", f"{model.vocabulary:,}"
    yield "weights", f"{made.dtype}, {gigabytes(made.bytes)}"


def _training(training: Training) -> Iterator[tuple[str, str]]:
    config, facts = training.config, training.facts
    yield "data", "; ".join(_sources(config.data))
    yield "tokenizer", _tokenizer(config)
    if "tokens" in facts:
        yield "tokens", f"{facts['tokens']:,}"
    yield "steps", f"{training.step:,} of {config.steps:,}" if training.step != config.steps else f"{training.step:,}"
    scheduled = " at the end of a schedule" if config.batch.schedule else ""
    yield "batch", f"{config.batch.sequences:,} sequences of {config.sequence_length:,} tokens{scheduled}"
    rate = f"{config.optimizer.lr:g} at its peak, schedule {config.schedule.shape.value}"
    yield "learning rate", rate + (f", {training.numbers['lr'][1]:.3g} at the end" if "lr" in training.numbers else "")
    yield "optimizer", f"{config.optimizer.name.value}, weight decay {config.optimizer.weight_decay:g}"
    yield "precision", config.precision.value if config.precision else ""
    if config.checkpoint.init:
        yield "initial weights", _last_part(config.checkpoint.init)
    yield "seed", f"{config.seed}"
    if "ranks" in facts:
        yield "layout", layout_text(config.parallel, facts["ranks"])
    yield from _circumstances(training.events)


def _circumstances(events: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Hardware, time and software, as the events of the run have them; of the last start."""
    found = [event["environment"] for event in events if isinstance(event.get("environment"), dict)]
    here = found[-1] if found else {}
    if device := here.get("gpu", here.get("cpu")):
        yield "hardware", f"{device}, on each host" if here.get("ranks", 1) > 1 else f"{device}"
    spent = [event["seconds"] for event in events if event.get("event") == "accounting" and isinstance(event.get("seconds"), dict)]
    if spent:
        yield "time", _duration(sum(map(float, spent[-1].values())))
    software = [f"{name} {here[name]}" for name in ("tokenyard", "torch") if name in here]
    yield "software", ", ".join(software)


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.3g} hours"
        if seconds >= 7200
        else f"{seconds / 60:.3g} minutes"
        if seconds >= 120
        else f"{seconds:.3g} s"
    )


def _sources(data: DataConfig) -> Iterator[str]:
    """Names each source, without the folders around it."""
    sources = mixture_sources(data)
    total = sum(source.weight for source in sources)
    for source in sources:
        of = source.config
        place = of.name if of.corpus is Corpus.hf else _last_part(of.path) if of.path else None
        text = SENTENCES.get(of.corpus) or f"{of.corpus.value}: {place}"
        text += f", {of.subset}" if of.subset else ""
        text += f", revision {of.revision}" if of.revision else ""
        yield f"{text} ({source.weight / total:.0%} of the tokens)" if len(sources) > 1 else text


def _tokenizer(config: Config) -> str:
    path = config.tokenizer.path
    return f"{config.tokenizer.kind.value}" + (f": {path if HUB_NAME.fullmatch(path) else _last_part(path)}" if path else "")


def is_measure(name: str) -> bool:
    """Whether a number of the journals says how good the model is."""
    by_source = name.startswith("validation/") and name.endswith(("/loss", "/bits_per_byte"))
    return by_source or name == "validation_loss" or name.startswith(("probes/", "tasks/"))


def _evaluation(training: Training) -> str:
    """Returns the results of the newest validation: loss, bits per byte, by source, probes and tasks."""
    measured = {name: at for name, at in training.numbers.items() if is_measure(name)}
    last = max((step for step, _ in measured.values()), default=None)
    found, loss = {name: value for name, (step, value) in measured.items() if step == last}, training.facts.get("validation_loss")
    if last is None and loss is not None:
        found = {"validation_loss": loss}
    when = f"At step {last:,} of the training" if last is not None else "During the training"
    return f"{when}, on text that was held out of it.\n\n{_table(_measured(found))}" if found else ""


def _measured(found: dict[str, float]) -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        kind, _, rest = name.partition("/")
        if kind == "probes" and not name.endswith("_chance"):
            chance = f"{name}_chance"
            yield f"probe {rest}", f"{value:.1%} right" + (f" (by chance {found[chance]:.1%})" if chance in found else "")
        elif kind == "tasks":
            yield f"task {rest}", f"{value:.4f}"
        elif kind != "probes":
            source, _, unit = (rest or "loss").rpartition("/")
            what = "loss, nats per token" if unit == "loss" else "bits per byte"
            yield f"{source}: {what}" if source else what, f"{value:.4f}"


def _balance(numbers: dict[str, tuple[int, float]]) -> str:
    """Says how even the load of the experts was in the last step that logged it."""
    step, load = numbers.get("moe/load_max_over_mean", (0, None))
    mean, layer, dead, dropped = (
        numbers[name][1] if name in numbers else None
        for name in ("moe/load_max_over_mean_mean", "moe/load_max_over_mean_layer", "moe/dead_experts", "dropped_fraction")
    )
    if load is None or layer is None:
        return ""
    text = f"In step {step:,} the busiest expert of layer {layer:.0f}, the least even one, got {load:.2f} times an even share"
    text += f" (mean of all layers: {mean:.2f})." if mean is not None else "."
    text += f" Experts without a token: {dead:.0f}." if dead is not None else ""
    return text + (f" {dropped:.2%} of the choices were dropped." if dropped is not None else "")


def _use(repo: str | None) -> str:
    place = f'name = "{repo}"' if repo else 'name = "."  # this folder, or the name of its repository on the hub'
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{place}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""


def _limits(training: Training, made: "Exported") -> Iterator[str]:
    config, tokens = training.config, training.facts.get("tokens")
    if training.step:
        yield "This run trained it to predict the next token of its data, not to follow instructions or to refuse."
        yield f"This run trained it on sequences of {config.sequence_length:,} tokens."
    if training.step and tokens and not config.checkpoint.init:
        yield f"It has seen {tokens / count(config.model).active:.3g} tokens for each active parameter."
    if training.step < config.steps:
        yield f"The run was planned for {config.steps:,} steps and is at {training.step:,}."
    yield "The run has measured nothing of it but what this card says."
    yield from made.notes


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows if value]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else ""


def _cell(text: str) -> str:
    """One line that ends no cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _last_part(path: str) -> str:
    """The last part of a path or URL, since the folders around it are nobody's business."""
    return path.rstrip("/").rpartition("/")[2]
