"""`tokenyard push`: exports a checkpoint with its model card and uploads it to the Hugging Face hub.

The token is huggingface_hub's own affair: it reads HF_TOKEN or what `hf auth login` has stored, and nothing here reads or keeps it.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..train.config.complain import complain, printable
from ..train.config.config import ConfigError
from ..train.config.number_format import gigabytes
from ..version import __version__
from .model_card import CARD
from .parser import OneLineParser, add_json
from .words import one_of, split_words

WORDS = ("repo", "private", "license")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
INTERRUPTED = 130
"""The exit code of a process that SIGINT ends."""
HUB_SECONDS = 5.0
"""How long the hub may take for its first answer."""


class Wanted(NamedTuple):
    """What the words of the command line ask for."""

    repo: str
    private: bool | None
    """None: a new repository is private, one that exists stays as it is."""
    license: str | None


def push_command(argv: list[str]) -> int:
    """Returns the exit code: 2, with one line on standard error, for what is refused before anything is sent, and for failures."""
    parser = OneLineParser(
        "tokenyard push",
        usage="%(prog)s [-h] [--dry-run] [--json] PATH repo=OWNER/NAME [private=true|false] [license=ID]",
        description="Exports a checkpoint with a model card, and uploads it to the Hugging Face hub. A second try goes on.",
        epilog="The token is that of HF_TOKEN or of hf auth login. A new repository is private. license=apache-2.0: for the card.",
    )
    parser.add_argument("path", metavar="PATH", help="folder of a run, of a checkpoint, or of an export")
    parser.add_argument("words", nargs="*", metavar="repo=OWNER/NAME", help="where it goes, and the other words")
    parser.add_argument("--dry-run", action="store_true", help="export, write the card and list the files; ask the hub nothing")
    add_json(parser)
    arguments = parser.parse_intermixed_args(argv)
    try:
        wanted = read_words(arguments.words)
        _refuse_unreadable(Path(arguments.path))
        private = wanted.private is not False if arguments.dry_run else open_repository(wanted)
        folder = exported(Path(arguments.path), wanted)
        files, left = sendable(folder)
        facts: dict[str, Any] = {
            "repo": wanted.repo,
            "private": private,
            "folder": str(folder),
            "files": {name: (folder / name).stat().st_size for name in files},
            "not_sent": left,
        }
        if not arguments.json:
            print(printable("\n".join(listing(facts))), flush=True)
        if not arguments.dry_run:
            facts |= upload(wanted.repo, folder, files)
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on with what the hub does not have", INTERRUPTED)
    except (ValueError, OSError) as error:
        return complain(error)
    if arguments.json:
        print(json.dumps(facts))
    elif arguments.dry_run:
        print(printable(f"nothing was sent; {folder / CARD} is yours to edit"))
    else:
        print(printable(f"{facts['url']} has them, in commit {facts['commit'][:12]}"))
    return 0


def read_words(words: list[str]) -> Wanted:
    """Raises ConfigError for a word that is none of WORDS, and for a name that the hub does not allow."""
    own, others = split_words(words, WORDS)
    if others:
        raise ConfigError(
            f"push: {others[0]}: must be one of {', '.join(f'{word}=' for word in WORDS)}; nearest valid: repo=OWNER/NAME"
        )
    repo, license = own.get("repo", ""), own.get("license")
    if rule := wrong_name(repo):
        owner, _, name = repo.rpartition("/")
        near = "/".join(re.sub(r"[^A-Za-z0-9_.-]|(?<=[.-])[.-]+", "", part).strip(".-")[:48] for part in (owner, name))
        raise ConfigError.of("repo", repo, rule, f"repo={near if not wrong_name(near) else 'OWNER/NAME'}")
    private = one_of("private", own.get("private", "true"), ("true", "false")) == "true" if "private" in own else None
    if license is not None and not LICENSE.fullmatch(license):
        rule = "must be an identifier of the hub's list (https://huggingface.co/docs/hub/repositories-licenses)"
        raise ConfigError.of("license", license, rule, "license=apache-2.0")
    return Wanted(repo, private, license)


def wrong_name(repo: str) -> str:
    """Returns the rule that the name of a repository breaks; empty if none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1 or repo.startswith("/") or repo.endswith("/"):
        return "must be the owner (a user or an organization) and a name"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return "must be letters, digits, -, _ and ., at most 96, no two - or . together, none at an end, no .git at the end"
    return ""


def _refuse_unreadable(path: Path) -> None:
    """Raises ValueError for a path that is neither a checkpoint nor a run nor a Hugging Face folder. Imports no torch."""
    from ..train.stored_config import check_readable
    from ..train.weight_source import refuse_absent

    refuse_absent(str(path))
    check_readable(path)


def open_repository(wanted: Wanted) -> bool:
    """Makes the repository unless it exists. Returns whether it is private. Raises ValueError, one line, if the hub refuses."""
    from huggingface_hub import HfApi, constants, get_token

    from ..data.hub_answer import ask_hub

    place = f"repo={wanted.repo}"
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{place}: HF_HUB_OFFLINE is set, and the hub must be asked; nearest valid: --dry-run")
    if not get_token():
        raise ConfigError(
            f"{place}: no token of the hub; nearest valid: HF_TOKEN in the environment, or hf auth login; --dry-run needs none"
        )
    answer = ask_hub(f"{constants.ENDPOINT}/{wanted.repo}/resolve/main/{CARD}", HUB_SECONDS)
    if not answer.answered:
        raise ConfigError(f"{place}: {constants.ENDPOINT} does not answer ({answer.error}); nearest valid: --dry-run")
    with hub_errors(wanted.repo):
        api = HfApi(library_name="tokenyard")
        api.create_repo(wanted.repo, private=wanted.private is not False, exist_ok=True)
        private = bool(api.repo_info(wanted.repo).private)
    if wanted.private is not None and private != wanted.private:
        is_, said = ("private", "private=false") if private else ("public", "private=true")
        raise ConfigError.of(
            "private", said.partition("=")[2], f"{wanted.repo} exists and is {is_}", f"private={str(private).lower()}"
        )
    return private


def exported(path: Path, wanted: Wanted) -> Path:
    """Returns the folder to send: `path` if it is one of Hugging Face, else the export of the checkpoint, in `exports` of its run.

    An export that is there is taken as it is, with what was edited in its card: so a second try sends the same files.
    """
    import xxhash

    from ..checkpoint.manifest import MANIFEST
    from ..train.weight_source import HF_CONFIG

    if not (path / HF_CONFIG).is_file():
        from ..checkpoint.store import checkpoint_at
        from .convert import export_with_card

        checkpoint = checkpoint_at(path).absolute()
        of = xxhash.xxh3_64_hexdigest((checkpoint / MANIFEST).read_bytes())[:8]
        run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
        path = run / "exports" / f"{wanted.repo.replace('/', '--')}_{checkpoint.name}_{of}"
        if not path.exists():
            made = export_with_card(checkpoint, path, repo=wanted.repo, license=wanted.license)
            for note in made.notes:
                complain(note)
    card = (path / CARD).read_text(errors="replace") if (path / CARD).is_file() else ""
    if wanted.license and not re.search(rf"^license: *{re.escape(wanted.license)}\s*$", card, re.MULTILINE):
        raise ConfigError.of("license", wanted.license, f"{path} has its card already", f"license: {wanted.license} in its {CARD}")
    return path


def sendable(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the files of an export, and the others in its folder, which are not sent. Raises ValueError for a damaged export."""
    from ..interop.hf_folder import CONFIG, INDEX
    from ..interop.import_ import HF_FILES
    from ..interop.load_weights import open_source

    weights = {stored.file for stored in open_source(folder).folder.tensors.values()}
    ours = {CONFIG, INDEX, CARD, *HF_FILES, *LICENSE_FILES, *weights}
    found = sorted(path.name for path in folder.iterdir())
    return [name for name in found if name in ours], [name for name in found if name not in ours]


def upload(repo: str, folder: Path, files: list[str]) -> dict[str, Any]:
    """Sends the files. Returns `url` and `commit`. What an interrupted upload has sent is not sent again."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    with hub_errors(repo):
        api, message = HfApi(library_name="tokenyard"), f"Upload with tokenyard {__version__}"
        commit = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, commit_message=message)
        return {"url": f"{api.endpoint}/{repo}", "commit": commit.oid}


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turns what the hub refuses and what the network does into a ValueError of one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            rule = "the hub does not know this token; nearest valid: another HF_TOKEN, or hf auth login"
        elif status == 403:
            rule = f"this token may not write there; nearest valid: one with the right to write to {repo.partition('/')[0]}"
        else:
            rule = (
                f"the hub says {status}: {error.server_message or str(error).strip().splitlines()[0]}; what it has stays, try again"
            )
        raise ValueError(f"repo={repo}: {rule}") from None
    except Exception as error:  # the client, its transport and the network raise many types
        cause = error.__cause__ or error
        raise ValueError(f"repo={repo}: {type(cause).__name__}: {cause}; the same command goes on with the rest") from None


def listing(facts: dict[str, Any]) -> list[str]:
    """Returns the lines that say what is sent where."""
    files, width = facts["files"], max(map(len, facts["files"]))
    kind = "private" if facts["private"] else "public"
    left = f"; not sent: {', '.join(facts['not_sent'])}" if facts["not_sent"] else ""
    return [
        *(f"  {name:{width}}  {gigabytes(size):>12}" for name, size in files.items()),
        f"{len(files)} files, {gigabytes(sum(files.values()))}, of {facts['folder']} for {facts['repo']} ({kind}){left}",
    ]
