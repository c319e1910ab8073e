"""Opens a checkpoint on one device, whatever layout wrote it, and continues text with it."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint.store import read_whole
from ..data.config import DataConfig, TokenizerConfig, TokenizerKind
from ..data.tokenizer import Tokenizer, load_tokenizer, ready_tokenizer, settings_of_saved
from ..interop.load_weights import load_folder, open_source, read_weights
from ..moe.argument_checks import wrong_kind
from ..moe.config import ModelConfig
from ..moe.generation import generate
from ..moe.model import Transformer
from ..moe.param_count import count
from ..moe.router import Router
from ..parallel.apply import Parallel
from ..parallel.config import ParallelConfig
from ..parallel.mesh import build_mesh
from ..parallel.process_group import pick_device
from ..ranges import check_kinds, check_ranges
from .config.config import Config, ConfigError, EngineConfig, SampleConfig
from .config.schema import written
from .config.serialize import config_from_plain, plain_config
from .derive import DTYPES, derive, set_products
from .downstream.scorer import Scorer
from .resume import as_checkpoint
from .session import Session
from .setup import build_engine, build_saver, open_data_on_all_ranks, spread_model
from .stored_config import read_stored
from .weight_source import HF_TOKENIZERS, hf_folder, hf_tokenizer

PRECISIONS = {precision.value: dtype for precision, dtype in DTYPES.items()}
PLACES = ("path", "name", "subset", "split", "revision", "pattern", "mix", "cache")
"""Settings of `data` that say where to read."""
LONGEST = 2048
"""Tokens of a sequence for a Hugging Face model that does not say how many it can take."""
SAMPLE_LIMIT = 2_000_000_000
"""Models with more parameters than this are not opened on one device for the sample at the end of a run."""


class OpenedCheckpoint(NamedTuple):
    """A checkpoint's model, tokenizer and configuration, ready for use."""

    model: Transformer
    tokenizer: Tokenizer
    config: Config
    path: Path


def load_model(path: str | Path, precision: str = "fp32", device: str | torch.device = "cpu") -> Transformer:
    """Returns the model of a checkpoint (or of the newest one of a run folder) or of a Hugging Face folder, in evaluation mode.

    precision: that of the activations, fp32, bf16 or fp64. Its `tokenizer` is read when it is first asked for. Raises ValueError,
    one line, if it is neither or damaged, and TypeError for a path that is none.
    """
    if not isinstance(path, str | Path):
        nearest = "tokenyard.Transformer(config) makes a model" if isinstance(path, ModelConfig) else "path='runs/first'"
        raise wrong_kind("path", path, "must be the path of a run, a checkpoint or a Hugging Face folder", nearest)
    if precision not in PRECISIONS:
        nearest = {"torch.bfloat16": "bf16", "torch.float64": "fp64"}.get(str(precision), "fp32")
        raise ValueError(f"precision={precision}: must be one of {', '.join(PRECISIONS)}; nearest valid: precision={nearest}")
    device = _usable(device)
    if hf := hf_folder(path):
        model = load_folder(hf, precision, device)
        model.open_tokenizer = partial(_hf_tokenizer, hf)
        return model
    checkpoint = as_checkpoint(Path(path))
    config = read_stored(checkpoint)[1]
    with torch.device("meta"):
        model = Transformer(config.model, PRECISIONS[precision])
    weights = read_whole(checkpoint)
    for name, tensor in weights.items():  # expert biases are fp32 whatever the weights are
        weights[name] = tensor.to(device, torch.float32 if name.endswith("router.expert_bias") else model.weights)
    add_expert_biases(model, weights)
    model.load_state_dict(weights, strict=True, assign=True)
    model.open_tokenizer = partial(_own_tokenizer, checkpoint)
    return model.eval()


def _usable(device: str | torch.device) -> str:
    """Returns the name of a device that torch knows and this machine has. Raises ValueError for any other."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device}: must be cpu or cuda; nearest valid: device={pick_device('auto').type}") from None
    if found.type == "cuda" and found.index is None:
        pick_device("cuda")  # refuses it where there is none
    return str(found)


def add_expert_biases(model: Transformer, names: Iterable[str]) -> None:
    """Adds the expert bias to the routers that have one in `names`: the checkpoint's run may have balanced by it."""
    for name in names:
        path, _, last = name.rpartition(".")
        if last == "expert_bias":
            router = model.get_submodule(path)
            assert isinstance(router, Router)
            router.add_expert_bias()


def open_checkpoint(path: str | Path, device: torch.device | None = None) -> OpenedCheckpoint:
    """Opens model, in the precision of its run, tokenizer and configuration; `device` is by default the best there is.

    `path` may also be a Hugging Face folder, or the name of one in the hub's cache. Raises ValueError, one line, for anything else.
    """
    device = pick_device("auto") if device is None else device
    if hf := hf_folder(path):
        return _open_hf_folder(hf, device)
    checkpoint = as_checkpoint(Path(path))
    config = read_stored(checkpoint)[1]
    derive(config, device)
    model = load_model(checkpoint, config.precision.value, device)
    _refuse_larger(model.tokenizer, model.config, checkpoint)
    return OpenedCheckpoint(model, model.tokenizer, config, checkpoint)


def _own_tokenizer(checkpoint: Path) -> Tokenizer:
    saved, kept = checkpoint / "tokenizer", checkpoint / "tokenizer_hf"  # an early import has only the second
    return load_tokenizer(saved) if saved.is_dir() or not kept.is_dir() else _hf_tokenizer(kept)


def _open_hf_folder(path: Path, device: torch.device) -> OpenedCheckpoint:
    config, tokenizer = Config(), _hf_tokenizer(path)
    derive(config, device)
    model = load_model(path, config.precision.value, device)
    model.tokenizer = tokenizer
    config.model, config.sequence_length = model.config, _longest(path)
    _refuse_larger(tokenizer, model.config, path)
    return OpenedCheckpoint(model, tokenizer, config, path)


def _longest(folder: Path) -> int:
    """Returns the tokens of a sequence that the config.json of a folder allows; LONGEST if it does not say."""
    about = json.loads((folder / "config.json").read_text())
    length = about.get("text_config", about).get("max_position_embeddings")
    return length if isinstance(length, int) and length > 1 else LONGEST


def _hf_tokenizer(folder: Path) -> Tokenizer:
    settings = hf_tokenizer(folder)
    if settings is None:
        raise _without_tokenizer(folder)
    tokenizer = ready_tokenizer(TokenizerConfig(TokenizerKind[settings["kind"]], settings["path"]))
    assert tokenizer is not None
    return tokenizer


def _refuse_larger(tokenizer: Tokenizer, model: ModelConfig, path: Path) -> None:
    """Raises ConfigError for a tokenizer with more pieces than the model of `path` has rows."""
    if tokenizer.size > model.vocabulary:
        raise ConfigError(f"{path}: its model has {model.vocabulary} rows, and the tokenizer {tokenizer.size} pieces")


def _without_tokenizer(path: Path) -> ConfigError:
    return ConfigError(f"{path}: has no tokenizer, neither {' nor '.join(HF_TOKENIZERS)}")


def continuation(model: Transformer, tokenizer: Tokenizer, settings: SampleConfig, seed: int) -> Iterator[str]:
    """Yields the text that each new token adds to the prompt. Characters of several byte tokens come with the last of them."""
    stop = tokenizer.end_of_document
    prompt = tokenizer.encode_prompt(settings.prompt)
    ids, shown = list(prompt), tokenizer.decode(prompt)
    for token in _sampled(model, prompt, settings, seed, stop, tokenizer.size):
        ids.append(token)
        text = tokenizer.decode(ids)
        ready = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown = text if ready else shown
        yield ready


def _sampled(
    model: Transformer, prompt: list[int], settings: SampleConfig, seed: int, stop: int | None, vocabulary: int | None
) -> Iterator[int]:
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k, "seed": seed}
    return generate(model, prompt, settings.tokens, stop=stop, vocabulary=vocabulary, **sampling)


def continue_prompts(source: Any, prompt: Any, settings: SampleConfig, seed: int) -> Any:
    """Returns what the model `source`, or the one of a path, writes after `prompt`, as `tokenyard generate` does.

    A text gives a text, token ids (integers in a list, a tensor or an array) a list of ids, and several prompts a list of these.
    Raises TypeError or ValueError, one line, for an argument of another kind or outside its range.
    """
    check_kinds(settings, "generate")
    check_ranges(settings, "generate")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise wrong_kind("seed", seed, "must be an integer", "seed=1")
    if not isinstance(source, Transformer | str | Path):
        rule = "must be a model of tokenyard.load_model, or the path of a run, a checkpoint or a Hugging Face folder"
        raise wrong_kind("model", source, rule, "model=tokenyard.load_model('runs/first')")
    model = source if isinstance(source, Transformer) else open_checkpoint(source).model
    training = model.training
    try:
        return _continued(model, prompt, settings, seed)
    finally:
        model.train(training)


def _continued(model: Transformer, prompt: Any, settings: SampleConfig, seed: int) -> Any:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            rule = "must be token ids, as this model was made by hand and has no tokenizer"
            raise ValueError(f"prompt={prompt[:40]!r}: {rule}; nearest valid: prompt=[1, 2, 3]")
        return "".join(continuation(model, model.tokenizer, replace(settings, prompt=prompt), seed))
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(ids, list | tuple) and ids and all(isinstance(each, str | list | tuple) for each in ids):
        return [_continued(model, each, settings, seed) for each in ids]
    if not isinstance(ids, list | tuple) or not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        rule = "must be a text, token ids (integers), or a list of these"
        raise wrong_kind("prompt", prompt, rule, "prompt='def ' or prompt=[1, 2, 3]")
    rows, tokenizer = model.config.vocabulary, model.tokenizer
    if wrong := [each for each in ids if not 0 <= each < rows]:
        raise ValueError(f"prompt: has the id {wrong[0]}, must be in [0, {rows}); nearest valid: {min(max(wrong[0], 0), rows - 1)}")
    stop, pieces = (None, None) if tokenizer is None else (tokenizer.end_of_document, tokenizer.size)
    return list(_sampled(model, list(ids), settings, seed, stop, pieces))


def sample_of(session: Session) -> tuple[str, str] | None:
    """Returns the configured prompt and its continuation by the last checkpoint, opened on one device; None if it is off."""
    settings = session.config.sample
    if not settings.prompt or session.checkpoint is None or count(session.config.model).total > SAMPLE_LIMIT:
        return None
    opened = open_checkpoint(session.checkpoint, session.device)
    return settings.prompt, "".join(continuation(opened.model, opened.tokenizer, settings, session.config.seed))


def open_for_evaluation(path: str, overrides: list[str]) -> Session:
    """Returns the checkpoint's run as a session of one process, without optimizer state; overrides may change data and evaluation.

    `path` may also be a Hugging Face folder, or the name of one in the hub's cache: model and tokenizer are its, the rest defaults.
    Files, folders and URLs that a checkpoint names are never read, because it may come from anybody: `overrides` must name them.
    """
    hf = hf_folder(path)
    source = None if hf is None else open_source(hf)
    checkpoint = hf or as_checkpoint(Path(path))
    stored = read_stored(checkpoint)[1] if source is None else Config(model=source.model)
    plain = _described(stored, checkpoint / "tokenizer")
    if hf is not None:
        plain["tokenizer"] = hf_tokenizer(hf) or {}
    config = config_from_plain(plain, overrides)
    if config.model != stored.model:
        raise ConfigError("model: the checkpoint's model cannot be changed by overrides")
    if hf is not None and config.tokenizer == TokenizerConfig():
        raise _without_tokenizer(hf)
    _check_places(config, stored)
    config.parallel, config.engine = ParallelConfig(), EngineConfig()
    config.batch.micro = config.batch.micro or config.batch.sequences
    device = pick_device(config.device.value)
    set_products(config, device, derive(config, device))
    data = open_data_on_all_ranks(config)
    _refuse_larger(data.tokenizer, config.model, checkpoint)
    parallel = spread_model(config, device)
    weights = read_whole(checkpoint) if source is None else read_weights(source, dict(parallel.model.state_dict()), str(device))
    add_expert_biases(parallel.model, weights)
    parallel.model.load_state_dict(weights, strict=True)
    saver = build_saver(config.checkpoint, checkpoint.parent)
    return Session(config, checkpoint.parent, parallel.device, data, parallel, build_engine(config, parallel), saver)


def open_for_scoring(path: str, rows: int) -> Scorer:
    """Returns what scores and continues texts with the model of a checkpoint, `rows` at a time, on one device. No data are read.

    `path` may also be a Hugging Face folder, or the name of one in the hub's cache. Raises ValueError, one line, for anything else.
    """
    opened = open_checkpoint(path)
    device = opened.model.get_parameter("embedding.weight").device
    parallel = Parallel(opened.model, build_mesh(ParallelConfig()), device)
    return Scorer(parallel, opened.tokenizer, opened.config.sequence_length, rows)


def _described(stored: Config, tokenizer: Path) -> dict[str, Any]:
    """Returns the settings of model, tokenizer and evaluation in a checkpoint's configuration, without the places to read from."""
    plain = plain_config(stored)
    kept = {name: plain[name] for name in ("model", "sequence_length", "precision", "seed", "batch", "evaluate")}
    kept["evaluate"]["tasks"] = []  # files, or names that would be looked up
    kept["data"] = {name: value for name, value in plain["data"].items() if name not in PLACES}
    return kept | {"tokenizer": settings_of_saved(tokenizer) if tokenizer.is_dir() else {"kind": plain["tokenizer"]["kind"]}}


def _check_places(config: Config, stored: Config) -> None:
    """Raises ConfigError if the data lack a place that the checkpoint had."""
    wanted, given, default = vars(stored.data), vars(config.data), vars(DataConfig())
    for name in PLACES:
        if (
            wanted[name] != default[name]
            and given[name] == default[name]
            and given["corpus"] is wanted["corpus"]
            and name != "cache"
        ):
            nearest = f"nearest valid: data.{name}={written(wanted[name])}, if you trust it"
            raise ConfigError(f"data.{name}: must be said anew, as places that a checkpoint names are not read; {nearest}")
