"""Settings of `evaluate` and `sample`: how the model is judged during a run and after it."""

from dataclasses import dataclass, field

from ...ranges import within


@dataclass
class EvaluateConfig:
    every: int = field(default=250, metadata=within("[0, inf)"))
    """Steps between evaluations; 0 evaluates only at the end."""
    sequences: int = field(default=512, metadata=within("[1, inf)"))
    """Validation sequences of one evaluation."""
    probes: int = field(default=0, metadata=within("[0, inf)"))
    """Questions of each built-in probe (next word, copying, addition, brackets) at each evaluation; 0: none."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval: YAML files, folders of them, or names of lm-eval's own, which read their data from the hub."""
    tasks_every: int | None = field(default=None, metadata=within("[1, inf)"))
    """Steps between runs of the tasks, each with an evaluation, and one after the last step; null: they follow each evaluation."""
    tasks_limit: int | None = field(default=None, metadata=within("[1, inf)"))
    """Questions of each task; null: all."""


@dataclass
class SampleConfig:
    prompt: str = "def "
    """The prompt of the sample at the end of a run; empty: no sample."""
    prompts: list[str] = field(default_factory=list)
    """Prompts of the samples during a run; empty: `prompt`."""
    every: int = field(default=0, metadata=within("[0, inf)"))
    """Steps between samples during a run, which events.jsonl keeps; 0: none. Several ranks compute all of a row for each token."""
    tokens: int = field(default=64, metadata=within("[0, inf)"))
    """Tokens of a sample; during a run a prompt and its sample have at most sequence_length tokens."""
    temperature: float = field(default=0.8, metadata=within("[0, inf)"))
    """Sampling temperature; 0 takes the most likely token."""
    top_p: float = field(default=0.95, metadata=within("(0, 1]"))
    """Sample from the most likely tokens that together have this probability."""
    top_k: int | None = field(default=None, metadata=within("[1, inf)"))
    """Sample from at most so many of the most likely tokens; null: from all that top_p leaves."""
