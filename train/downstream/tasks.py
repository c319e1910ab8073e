"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness): an adapter of its LM interface over a Scorer, and tasks from local files.

Every rank builds the same requests and takes part in each forward pass, so all ranks get the same numbers, on every layout.
"""

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.tokenizer_types import Tokenizer
from ..config.config import ConfigError
from ..config.schema import nearest_text
from .scorer import Sampling, Scorer, TokenRow

SUFFIXES = (".yaml", ".yml")
GENERATED = 256
"""Tokens of an answer, unless the task says how many."""


def open_tasks(names: list[str]) -> dict[str, Any]:
    """Returns lm-eval's tasks and groups: of YAML files, of folders of them, and those that it has by name.

    Paths of data in a YAML file are relative to its folder. Raises ConfigError for what is no task, or whose data cannot be read.
    """
    library = lm_eval()
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        path = Path(name).expanduser()
        try:
            local = path.exists() or path.suffix in SUFFIXES
            loaded = _load_local(library, path) if local else _load_named(library, name)
        except ConfigError:
            raise
        except Exception as error:  # of any library that reads the task's data
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError.of("evaluate.tasks", name, f"cannot be loaded ({reason})", "a file of a task and its data") from None
        for key in found:
            found[key] |= loaded.get(key, {})
    return found


def run_tasks(tasks: dict[str, Any], scorer: Scorer, limit: int | None = None) -> dict[str, float]:
    """Returns the metrics of the tasks, by task/metric. `limit`: questions of each task. Collective; changes no random state."""
    library = lm_eval()
    with _kept_random_state(), torch.no_grad():
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=1234)
        results = library.evaluate(_adapter()(scorer), tasks, limit=limit, bootstrap_iters=0, log_samples=False)["results"]
    found = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if isinstance(value, int | float) and chosen and not metric.endswith("_stderr"):
                found[f"{task}/{metric}" + ("" if chosen == "none" else f"_{chosen}")] = float(value)
    return found


@cache
def lm_eval() -> Any:
    """Returns the module that has `evaluate` and TaskManager, without progress bars. Raises ConfigError if it is not installed."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import lm_eval.api.task  # pyright: ignore[reportMissingImports]
        import lm_eval.evaluator  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("evaluate.tasks: lm-eval is not installed here, `pip install tokenyard[lm-eval]` does") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)
    return lm_eval.evaluator


def _load_local(library: Any, path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError.of("evaluate.tasks", path, "there is no such file", "a YAML file of a task, or a folder of them")
    manager = library.TaskManager(include_path=str(path if path.is_dir() else path.parent), include_defaults=False)
    specs = [str(path.resolve())] if path.is_file() else manager.all_subtasks
    if not specs:
        raise ConfigError.of("evaluate.tasks", path, "has no YAML file of a task", "a folder that has one")
    with contextlib.chdir(path if path.is_dir() else path.parent):
        return manager.load(specs)


def _load_named(library: Any, name: str) -> dict[str, Any]:
    manager = library.TaskManager()
    if name not in manager.task_index:
        nearest = nearest_text(name, manager.all_tasks)
        raise ConfigError.of("evaluate.tasks", name, "is neither a file nor a task of lm-eval", f"evaluate.tasks=[{nearest}]")
    return manager.load([name])


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@cache
def _adapter() -> Any:
    """Returns the class of the adapter, whose base is in lm-eval."""
    lm_eval()
    from lm_eval import utils  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

    class ScorerLM(TemplateLM):
        """Scores and continues texts as lm-eval's adapter of transformers does, with the model of a Scorer."""

        def __init__(self, scorer: Scorer) -> None:
            super().__init__()
            self.scorer = scorer

        @property
        def max_length(self) -> int:
            return self.scorer.length

        @property
        def eot_token_id(self) -> int:
            return self.scorer.tokenizer.end_of_document

        @property
        def prefix_token_id(self) -> int:
            return self.scorer.tokenizer.special_ids().get("bos_token_id", self.eot_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encode_text(self.scorer.tokenizer, string, add_special_tokens is not False)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            rows = [TokenRow(context + continuation, len(context)) for _, context, continuation in requests]
            return [(score.log_likelihood, score.greedy) for score in self.scorer.score(rows)]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            rows, of = [], []
            for index, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                    context, predicted = utils.make_disjoint_window(window)
                    rows.append(TokenRow(context + predicted, len(context)))
                    of.append(index)
            totals = [0.0] * len(requests)
            for index, score in zip(of, self.scorer.score(rows), strict=True):
                totals[index] += score.log_likelihood
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            groups: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
            texts = [""] * len(requests)
            for indices in groups.values():
                found = self._generate([requests[index].args[0] for index in indices], requests[indices[0]].args[1])
                for index, text in zip(indices, found, strict=True):
                    texts[index] = text
            return texts

        def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            tokens = settings.get("max_gen_toks", settings.get("max_new_tokens", GENERATED))
            temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
            sampling, decode = Sampling(tokens, temperature, float(settings.get("top_p") or 1.0)), self.scorer.tokenizer.decode

            def ends(ids: list[int]) -> bool:
                return any(stop in decode(ids) for stop in until)

            written = self.scorer.continuations([self.tok_encode(context) for context in contexts], sampling, ends)
            texts = map(decode, written)
            return [min((text.split(stop)[0] for stop in until), key=len, default=text) for text in texts]

    return ScorerLM


def encode_text(tokenizer: Tokenizer, text: str, begins: bool) -> list[int]:
    """Returns the ids of a text as transformers encodes it, with the token that begins a document if there is one and `begins`."""
    begin = [] if tokenizer.begin_of_document is None else [tokenizer.begin_of_document]
    if not text:
        return begin if begins else []
    ids = tokenizer.encode_prompt(text)
    return ids if begins else ids[len(begin) :]
