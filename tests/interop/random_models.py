"""Random models of each Hugging Face family: imported, compared, exported and opened by transformers again; or refused by name.

`python tests/interop/random_models.py --seed 7`, or `make hf ARGS="--seed 7 --families Mixtral --cases 5"`. It ends with code 1 if
a model that is accepted differs, and says the seed of the case; --write puts the rows into docs/models.md.
"""

import argparse
import importlib
import importlib.util
import json
import logging
import math
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenyard
import torch
from random_settings import drawn
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.families import FAMILIES
from tokenyard.interop.import_ import import_folder
from tokenyard.launch.models_page import COMPARED, models_page
from torch import Tensor

MOST = 1e-10
"""In fp64, the largest difference of two logits that are equal, in standard deviations of the logits."""
MOST_DYNAMIC = 1e-6
"""The same with dynamic NTK, whose frequencies transformers computes in fp32 in each forward pass."""
DRAWS_PER_CASE = 5
"""Draws, for each case that is wanted, of which the others are refused or no model of transformers."""


class Different(Exception):
    """A model that was accepted is not the one of transformers."""


class Outcome(NamedTuple):
    """Of one case."""

    refused: str | None
    """The key that the import refused."""
    exact: float = 0.0
    """The largest difference of a logit in fp64, of import and of export, in standard deviations."""
    single: float = 0.0
    """The same in fp32, of the import."""


def settings_of(family: str, seed: int) -> dict[str, Any]:
    """The settings of one case."""
    return drawn(family, random.Random(f"{family} {seed}"))


class NoModel(Exception):
    """transformers does not take these settings."""


def their_side() -> Any:
    """The module with the fixtures of tests/interop."""
    spec = importlib.util.spec_from_file_location("their_side", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(family: str, seed: int, folder: Path) -> Outcome:
    """One case. Raises NoModel or Different."""
    with warnings.catch_warnings(action="ignore"):
        return _compare(family, seed, folder)


def _compare(family: str, seed: int, folder: Path) -> Outcome:
    import transformers

    side, settings, known = their_side(), settings_of(family, seed), FAMILIES[f"{family}ForCausalLM"]
    ids = torch.randint(0, settings["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(seed))
    try:
        model = side.built(family, **settings)
        theirs = model(ids).logits.detach()
        model.save_pretrained(folder / "theirs")
    except Exception as error:
        raise NoModel(f"{type(error).__name__}: {error}") from error
    if not theirs.isfinite().all():
        raise NoModel("its logits are not finite")
    try:
        import_folder(folder / "theirs", folder / "ours")
    except ValueError as error:
        return Outcome(refused_key(str(error), folder / "theirs"))
    single = difference(tokenyard.load_model(folder / "ours")(ids), theirs)
    with pytest.MonkeyPatch.context() as patch:
        module = side.MODULES[family]
        for name in (f"models.{module}.modeling_{module}", "modeling_rope_utils"):
            patch.setattr(importlib.import_module(f"transformers.{name}"), "torch", side.Widest())
        patch.setattr(Tensor, "float", Tensor.double)
        model = side.built(family, **settings).double()
        wide = model(ids).logits.detach()
        ours = tokenyard.load_model(folder / "ours", "fp64")(ids)
        export_checkpoint(folder / "ours", folder / "again", architecture=known.architecture)
        again, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "again", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
        )
        check_loading(loading, again, known.left_out)
        back = again.double().eval()(ids).logits.detach()
    found = max(difference(ours, wide), difference(back, wide))
    if not found <= (MOST_DYNAMIC if settings.get("rope_parameters", {}).get("rope_type") == "dynamic" else MOST):
        raise Different(f"import {difference(ours, wide):.1e}, export {difference(back, wide):.1e} deviations")
    return Outcome(None, found, single)


def refused_key(said: str, folder: Path) -> str:
    """The key that a refusal names. Raises Different if it does not do so in one line."""
    match = re.fullmatch(r"[^\n]*config\.json: ([\w.]+)=.*: .+", said)
    config = json.loads((folder / "config.json").read_text())
    if match is None or (match[1].partition(".")[0] not in config and match[1] not in config):
        raise Different(f"a refusal that names no key of config.json in one line: {said}")
    return match[1]


def check_loading(loading: dict[str, Any], model: torch.nn.Module, left_out: str) -> None:
    """Raises Different if transformers misses a tensor, other than one that is empty or `left_out`, or finds one too many."""
    idle = {name for name, tensor in model.state_dict().items() if not tensor.numel() or re.fullmatch(left_out, name)}
    left = {kind: set(names) - idle if kind == "missing_keys" else names for kind, names in loading.items()}
    if wrong := {kind: names for kind, names in left.items() if names}:
        raise Different(f"the export opens with {wrong}")


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two logits, in standard deviations of the expected ones."""
    return ((found.detach() - expected).abs().max() / expected.std()).item() if found.isfinite().all() else math.inf


class Row(NamedTuple):
    """Of one family."""

    cases: int
    exact: float
    single: float
    refused: dict[str, int]
    """How many models were refused, by key."""


def run_family(family: str, cases: int, seed: int, failures: list[str]) -> Row:
    """Draws until `cases` models were compared."""
    outcomes: list[Outcome] = []
    for number in range(DRAWS_PER_CASE * cases):
        case = seed * 1_000_000 + number
        if sum(outcome.refused is None for outcome in outcomes) == cases:
            break
        folder = Path(tempfile.mkdtemp(prefix="tokenyard-hf-"))
        try:
            outcomes.append(compare(family, case, folder))
        except NoModel:
            continue
        except Exception as error:
            detail = str(error) if isinstance(error, Different) else "".join(traceback.format_exception(error))
            failures.append(f"{family} --case {case}: {detail}\n  {settings_of(family, case)}")
            print(failures[-1], flush=True)
        finally:
            shutil.rmtree(folder)
    compared = [outcome for outcome in outcomes if outcome.refused is None]
    keys = sorted(outcome.refused for outcome in outcomes if outcome.refused is not None)
    worst = (max((getattr(outcome, kind) for outcome in compared), default=math.nan) for kind in ("exact", "single"))
    return Row(len(compared), *worst, {key: keys.count(key) for key in dict.fromkeys(keys)})


def main() -> int:
    """Runs the cases. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=60, help="models that are compared, of each family")
    parser.add_argument("--families", nargs="*", default=[name.removesuffix("ForCausalLM") for name in FAMILIES])
    parser.add_argument("--case", type=int, help="the seed of a single case, as a failure says it")
    parser.add_argument("--write", action="store_true", help="put the rows of these families into docs/models.md")
    arguments = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if arguments.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(settings_of(arguments.families[0], arguments.case), flush=True)
            print(compare(arguments.families[0], arguments.case, Path(folder)))
        return 0
    short, failures, compared = [], [], 0
    for family in arguments.families:
        begin, before = time.monotonic(), len(failures)
        row = run_family(family, arguments.cases, arguments.seed, failures)
        worst, took = f"fp64 {row.exact:.1e}, fp32 {row.single:.1e}", time.monotonic() - begin
        print(f"{family}: {row.cases} compared, {worst}, refused {row.refused}, {took:.0f} s", flush=True)
        compared += row.cases
        short += [family] if row.cases < arguments.cases else []
        if arguments.write and row.cases == arguments.cases and len(failures) == before:
            versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
            write(family, {"seed": arguments.seed, **versions, **row._asdict()})
    if short:
        print(f"too few cases: {', '.join(short)}")
    print(f"{compared} models compared, {len(failures)} different")
    return 1 if failures or short else 0


def write(family: str, row: dict[str, Any]) -> None:
    """Puts the row into docs/models.md, in the place of an earlier one."""
    rows = json.loads(COMPARED.read_text()) | {family: row}
    ordered = {name: rows[name] for known in FAMILIES if (name := known.removesuffix("ForCausalLM")) in rows}
    COMPARED.write_text(json.dumps(ordered, indent=1) + "\n")
    (Path(tokenyard.__file__).parent / "docs" / "models.md").write_text(models_page())


if __name__ == "__main__":
    sys.exit(main())
