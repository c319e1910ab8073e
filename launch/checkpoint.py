"""`tokenyard checkpoint inspect|verify|diff`: shows what a checkpoint holds, verifies it, and compares two."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..train.config.complain import BAD_USAGE, complain, printable
from ..train.config.number_format import gigabytes, short
from .parser import OneLineParser, add_json
from .progress_bar import progress_bar

if TYPE_CHECKING:
    from ..checkpoint.diff import TensorDifference

MOST_LINES = 40
"""Tensors that `diff` prints; --json has all."""


def checkpoint_command(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if a checkpoint is damaged or two differ; 2 if there is no checkpoint."""
    parser = OneLineParser("tokenyard checkpoint", description="Looks into checkpoints; none is changed.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="inspect|verify|diff")
    one = verbs.add_parser("inspect", help="step, layout, tensors, bytes, experts and configuration; of a run folder, the newest")
    one.add_argument("path", help="folder of a checkpoint or of a run")
    one.add_argument("--json", action="store_true", help="one JSON object, with the whole configuration and all hashes of experts")
    one = verbs.add_parser("verify", help="read every byte and compare hashes, sizes, shapes and experts; exit code 1 if damaged")
    one.add_argument("path", help="folder of a checkpoint, or of a run (then all of its checkpoints)")
    add_json(one)
    one = verbs.add_parser("diff", help="tensors that differ and by how much; exit code 0 if none does, 1 if any")
    one.add_argument("a", help="folder of a checkpoint or of a run (then its newest)")
    one.add_argument("b", help="another one, of whatever layout")
    one.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args(argv)
    try:
        return {"inspect": _inspect, "verify": _verify, "diff": _diff}[arguments.verb](arguments)
    except (ValueError, OSError) as error:
        return complain(error)


def _inspect(arguments: argparse.Namespace) -> int:
    from ..checkpoint.inspect import inspect

    found = inspect(_all_in(arguments.path)[0])
    print(json.dumps(found) if arguments.json else printable("\n".join(_table(found))))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from ..checkpoint.manifest import DamagedCheckpoint, NoManifest, read_manifest

    paths, damaged = _all_in(arguments.path), 0
    if len(paths) == 1:
        read_manifest(paths[0])  # before torch is imported
    from ..checkpoint.verify import check_all

    found, say = list[dict[str, Any]](), (lambda _: None) if arguments.json else print
    with progress_bar("of the bytes") as progress:
        done, total = 0, sum(_size_of(path) for path in paths)

        def count(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        for path in paths:
            try:
                manifest = check_all(path, count)
            except DamagedCheckpoint as error:
                damaged = max(damaged, BAD_USAGE if isinstance(error, NoManifest) else 1)
                found.append({"path": str(path), "whole": False, "file": error.file.name, "fault": str(error)})
                say(printable(f"{path.name}: DAMAGED, {error.file.name}: {error}"))
                continue
            files = manifest.files | manifest.attachments
            size, tensors = sum(record.bytes for record in files.values()), len(manifest.tensors)
            experts = sum(len(next(iter(kinds.values()), [])) for kinds in manifest.experts.values())
            numbers = {"files": len(files), "bytes": size, "tensors": tensors, "experts": experts}
            found.append({"path": str(path), "whole": True, **numbers})
            say(f"{printable(path.name)}: whole; {len(files)} files, {gigabytes(size)}, {tensors} tensors, {experts} experts")
    if arguments.json:
        print(json.dumps({"whole": not damaged, "checkpoints": found}))
    return damaged


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _diff(arguments: argparse.Namespace) -> int:
    from ..checkpoint.manifest import read_manifest

    one, other = (_all_in(path)[0] for path in (arguments.a, arguments.b))
    for path in (one, other):
        read_manifest(path)  # before torch is imported
    from ..checkpoint.diff import diff

    found = diff(one, other)
    if arguments.json:
        for difference in found:
            print(json.dumps(difference._asdict()))
        return 1 if found else 0
    print(printable(f"A {one}\nB {other}"))
    print(f"{len(found)} tensors differ" if found else "no tensor differs")
    if found:
        print(printable("\n".join(_differences(found))))
    return 1 if found else 0


def _differences(found: list["TensorDifference"]) -> list[str]:
    shown = found[:MOST_LINES]
    width = max(len(one.name) for one in shown)
    lines = [f"  {'tensor':{width}}  {'largest':>10}  {'relative':>10}  what"]
    for one in shown:
        what = one.what if one.what != "values" else f"experts {_ranges(one.experts)}" if one.experts else ""
        largest, relative = ("" if number is None else f"{number:.3g}" for number in (one.largest, one.relative))
        lines.append(f"  {one.name:{width}}  {largest:>10}  {relative:>10}  {what}".rstrip())
    return lines + ([f"  and {len(found) - MOST_LINES} more; --json lists all"] if len(found) > MOST_LINES else [])


def _all_in(path: str) -> list[Path]:
    """Returns the checkpoint at `path`, or those of the run folder `path`, newest first. Raises ValueError if there is none."""
    from ..checkpoint.folder import checkpoints_of

    found = checkpoints_of(Path(path))
    if not found:
        raise ValueError(f"{path}: is neither a checkpoint nor a run folder with one")
    return found


def _table(found: dict[str, Any]) -> list[str]:
    loss = found["validation_loss"]
    layout = " x ".join(f"{name} {size}" for name, size in (found["layout"] or {}).items() if size != 1) or "one rank"
    experts = found["experts"]
    lines = [
        _row("checkpoint", f"{found['path']} ({gigabytes(found['bytes'])} in {len(found['files'])} files)"),
        _row("step", f"{found['step']:,}, {found['tokens'] or 0:,} tokens" + (f", validation loss {loss:.4f}" if loss else "")),
        _row("written by", f"torch {found['torch']} on {found['ranks']} ranks: {layout}"),
        *_config(found["config"]),
    ]
    for kind, count in found["tensors"].items():
        sizes = f"{count['tensors']:>6,} tensors {short(count['elements']):>8} {gigabytes(count['bytes']):>8}"
        lines.append(_row(kind, sizes))
    if experts:
        each = "each with a hash of its weights and moments"
        lines.append(_row("experts", f"{sum(experts.values()):,} in {len(experts)} layers, {each}"))
    return lines


def _config(config: dict[str, Any]) -> list[str]:
    """Returns the most telling settings; --json has all."""
    model, batch = config.get("model", {}), config.get("batch", {})
    moe = model.get("moe", {})
    if "width" not in model:
        return []
    shape = f"{model['layers']} layers, {model['width']} wide, {moe.get('experts', 0)} experts of {moe.get('hidden')}"
    rows = [_row("model", f"{shape}, top {moe.get('top_k')}, vocabulary {model['vocabulary']:,}")]
    if batch:
        training = f"{batch['sequences']} sequences of {config['sequence_length']}, {config['precision']}, seed {config['seed']}"
        rows.append(_row("training", f"{training}, lr {config['optimizer']['lr']:g}, {config['steps']:,} steps"))
    return rows


def _ranges(ids: tuple[int, ...]) -> str:
    """Returns sorted ids as text: 0-3, 7."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _row(name: str, value: str) -> str:
    return f"{name:12}{value}"
