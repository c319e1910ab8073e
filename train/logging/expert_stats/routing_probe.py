"""The probe routes the same held-out rows from time to time: which tokens go where, how that changes, which experts co-activate.

L layers that route, T probe tokens of this rank, K choices per token, E experts, C token classes. Results are sums over ranks of
whole numbers, the same for every layout. The probe does not change training: no count, bias, random number or row of it.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....data.batches import IGNORE
from ....moe.model import HeadLoss
from ....moe.router import Router, Routing
from ....parallel.apply import Parallel
from ....parallel.collectives import max_over, sum_over
from ....parallel.context import own_chunks
from ...batch import Rows, as_rows
from ...forward_only import forward_heads
from ...session import Session

# Token classes by the text of a piece alone. The rules hold for most programming languages, and for prose, whose words are
# identifiers. After the blanks around the piece are removed, the first rule that applies decides; see `token_class`.

CLASSES = ("identifier", "keyword", "number", "string", "operator", "whitespace", "comment", "other")

_WORDS = """
abstract and as assert async await bool boolean break byte case catch char class const continue def default defer del delete do
double elif else elsif end enum except export extends extern False false final finally float fn for from func function global go
goto if impl implements import in include inline instanceof int interface is lambda let long loop match mod module mut namespace
new nil None not null or override package pass private protected pub public raise return short signed sizeof static
struct super switch template this throw throws trait True true try type typedef typeof union unless unsigned until use using var
virtual void volatile where while with yield SELECT FROM WHERE INSERT UPDATE DELETE JOIN GROUP ORDER BY CREATE TABLE
"""
KEYWORDS = frozenset(_WORDS.split())
"""Reserved words of C, C++, Go, Java, JavaScript, Python, Ruby, Rust and SQL that are one piece in many tokenizers."""

_COMMENT = re.compile(r"#|//|/\*|\*/|<!--|-->|^-{2,}$")
_NUMBER = re.compile(r"\.?\d")
_OPERATOR = re.compile(r"[!-/:-@\[-`{-~]+")


def token_class(text: str, mark: bool = False) -> str:
    """Returns one of CLASSES. `mark`: the token has no text at all, such as the end of a document."""
    word = text.strip()
    if mark:
        return "other"
    if not word:
        return "whitespace"
    if _COMMENT.search(word):
        return "comment"
    if any(quote in word for quote in "\"'`"):
        return "string"
    if _NUMBER.match(word):
        return "number"
    if word in KEYWORDS:
        return "keyword"
    if any(character.isalpha() or character == "_" for character in word):
        return "identifier"
    return "operator" if _OPERATOR.fullmatch(word) else "other"


def piece_text(decode: Callable[[list[int]], str], token: int) -> tuple[str, bool]:
    """Returns the text of a token, and whether it is a mark. A doubled token shows a leading blank, which some tokenizers drop."""
    text = decode([token])
    if not text:
        text = decode([token, token])
    return text, not text


PICKED, PAIRS = 4, 2**17
"""Layers, spread evenly, and pairs of experts, for which co-activation, similarity and vocabulary are recorded at most."""
WORDS = 8
"""Tokens in an expert's vocabulary."""


class Routed(NamedTuple):
    """The experts of this rank's probe tokens."""

    experts_LTK: Tensor
    """int16; -1 where no expert computes the token: padding, null experts, full experts."""
    ids_T: Tensor
    sources_T: Tensor
    """int64: index into the names of the sources."""


class Probe:
    """Routes held-out rows: each data rank takes a run of them, and tensor ranks see a slice of each."""

    def __init__(self, session: Session, layers: list[int]) -> None:
        """`layers`: the blocks that route. Those of multi-token prediction, which run in training only, are left out."""
        self.session = session
        self.layers = [layer for layer in layers if layer < session.config.model.layers]
        count = len(self.layers)
        picked = min(count, PICKED, max(1, PAIRS // session.config.model.moe.experts**2))
        self.picked = [self.layers[i * count // picked] for i in range(picked)]
        self.last: Tensor | None = None
        self.texts: dict[int, tuple[str, bool]] = {}

    def run(self) -> dict[str, Any]:
        """Returns the results under their keys in telemetry.jsonl; rank 0 alone has the vocabulary. Collective."""
        routed, mesh = self.route(), self.session.parallel.mesh
        classes_T = [CLASSES.index(token_class(*self._text(token))) for token in routed.ids_T.tolist()]
        parts = {"classes": self._by(routed, torch.tensor(classes_T, device=routed.ids_T.device), len(CLASSES))}
        names = self.session.data.validation.source_names
        if len(names) > 1:
            parts["sources"] = self._by(routed, routed.sources_T, len(names))
        members = [self._members(routed.experts_LTK[self.layers.index(layer)]) for layer in self.picked]
        parts["coactivation"] = torch.stack([members_TE.T @ members_TE for members_TE in members])
        parts["stability"] = self._changes(routed)
        flat = sum_over(torch.cat([part.double().flatten() for part in parts.values()]), mesh.everyone).cpu()
        sums = dict(zip(parts, flat.split([part.numel() for part in parts.values()]), strict=True))
        sums = {name: sums[name].view(parts[name].shape) for name in parts}
        found: dict[str, Any] = {"classes": named(CLASSES, sums["classes"])}
        if "sources" in sums:
            found["sources"] = named(names, sums["sources"])
        found["coactivation"] = {str(layer): pairs.long() for layer, pairs in zip(self.picked, sums["coactivation"], strict=True)}
        if self.last is not None:
            found |= movement(sums["stability"])
        self.last = routed.experts_LTK
        return found | {"vocabulary": self._vocabulary(routed)}

    @torch.no_grad()
    def route(self) -> Routed:
        """Runs one forward pass without the head, with temporary hooks on the routers."""
        session, parallel = self.session, self.session.parallel
        rows, sources_B = self._rows()
        experts, found = session.config.model.moe.experts, dict[int, Tensor]()

        def keep(layer: int, _router: nn.Module, _inputs: object, routing: Routing) -> None:
            found[layer] = computing_experts(routing, experts)

        here = routers(parallel, self.layers)
        hooks = [router.register_forward_hook(partial(keep, layer)) for layer, router in here.items()]
        heads: list[HeadLoss] = [lambda hidden, _weight, _head: hidden.new_zeros(())]
        parallel.model.eval()
        try:
            forward_heads(parallel, rows, rows.targets != IGNORE, heads)
            if parallel.pipeline is not None:
                self._add_other_stages(found, rows.ids)
        finally:
            parallel.model.train()
            for hook in hooks:
                hook.remove()
        context, tensor, whole = parallel.mesh.context, parallel.mesh.tensor, (rows.targets != IGNORE, rows.ids)
        if context.size > 1:
            whole = (own_chunks(each, context) for each in whole)
        valid_BS, ids_BS = (each.chunk(tensor.size, 1)[tensor.rank] for each in whole)
        experts_LTK = torch.stack([found[layer] for layer in self.layers]).masked_fill(~valid_BS.flatten()[None, :, None], -1)
        return Routed(experts_LTK, ids_BS.flatten(), sources_B.repeat_interleave(ids_BS.shape[1]))

    def _add_other_stages(self, found: dict[int, Tensor], ids_BS: Tensor) -> None:
        """Adds layers of other pipeline stages, where no token has an expert, so that sums over all ranks are right."""
        mesh = self.session.parallel.mesh
        choices = max((experts_TK.shape[1] for experts_TK in found.values()), default=0)
        choices = int(max_over(torch.tensor(float(choices), device=ids_BS.device), mesh.everyone))
        none_TK = torch.full((ids_BS.numel() // mesh.sequence.size, choices), -1, dtype=torch.int16, device=ids_BS.device)
        found.update({layer: none_TK for layer in self.layers if layer not in found})

    def _rows(self) -> tuple[Rows, Tensor]:
        """Returns this rank's rows, and the source of each."""
        session, wanted = self.session, self.session.config.telemetry.probe
        data, validation = session.parallel.mesh.data, session.data.validation
        each = -(-wanted // data.size)
        mine = range(data.rank * each, (data.rank + 1) * each)
        batch = next(iter(validation.batches(wanted, each * data.size, mine)))
        sources_B = torch.tensor(validation.sources(wanted, mine), device=session.device)
        return as_rows(batch, 0, session.config, session.data, session.device), sources_B

    def _text(self, token: int) -> tuple[str, bool]:
        if token not in self.texts:
            self.texts[token] = piece_text(lambda ids: self.session.data.tokenizer.decode(ids), token)
        return self.texts[token]

    def _by(self, routed: Routed, kinds_T: Tensor, kinds: int) -> Tensor:
        """Returns the choices of each expert by tokens of each kind, (L, kinds, E)."""
        kinds_TC = nn.functional.one_hot(kinds_T, kinds).double()
        return torch.stack([kinds_TC.T @ self._members(experts_TK) for experts_TK in routed.experts_LTK])

    def _changes(self, routed: Routed) -> Tensor:
        """Returns (4, L): tokens, those whose experts changed since the last probe, choices then, choices that are the same now."""
        if self.last is None:
            return torch.zeros(4, len(self.layers), device=routed.ids_T.device)
        columns = []
        for now_TK, then_TK in zip(routed.experts_LTK, self.last, strict=True):
            now_TE, then_TE = self._members(now_TK), self._members(then_TK)
            either_T = (now_TE + then_TE).amax(1) > 0
            columns.append([either_T.sum(), (now_TE != then_TE).any(1).sum(), then_TE.sum(), (now_TE * then_TE).sum()])
        return torch.stack([torch.stack([value.double() for value in column]) for column in columns], dim=1)

    def _members(self, experts_TK: Tensor) -> Tensor:
        """Returns fp64 (T, E): 1 where a token chose an expert. Products of these are exact."""
        experts = self.session.config.model.moe.experts
        chosen_TK = experts_TK.long().masked_fill(experts_TK < 0, experts)
        members = torch.zeros(len(chosen_TK), experts + 1, dtype=torch.float64, device=chosen_TK.device)
        return members.scatter_(1, chosen_TK, 1.0)[:, :-1]

    def _vocabulary(self, routed: Routed) -> dict[str, Any]:
        """Returns each expert's most frequent tokens with their counts, ties by token id; empty on all ranks but the first."""
        mesh, pipeline = self.session.parallel.mesh, self.session.parallel.pipeline
        # Only the first data ranks have rows of the probe, so what travels does not grow with the ranks: each fills its slot.
        slots = min(mesh.data.size, self.session.config.telemetry.probe) * mesh.sequence.size
        slot = mesh.data.rank * mesh.sequence.size + mesh.sequence.rank
        ids_T = routed.ids_T if pipeline is None or pipeline.rank == 0 else torch.zeros_like(routed.ids_T)
        chosen_LTK = routed.experts_LTK[[self.layers.index(layer) for layer in self.picked]] + 1  # 0 in other stages
        mine_TX = torch.cat([ids_T[:, None], chosen_LTK.transpose(0, 1).flatten(1)], dim=1).int()
        all_STX = mine_TX.new_zeros(slots, *mine_TX.shape)
        if slot < slots:
            all_STX[slot] = mine_TX
        ids_A, experts_AX = sum_over(all_STX, mesh.everyone).flatten(0, 1).split([1, mine_TX.shape[1] - 1], dim=1)
        if mesh.rank:
            return {}
        ids_A, experts_LAK = ids_A.squeeze(1), (experts_AX - 1).unflatten(1, (len(self.picked), -1)).transpose(0, 1)
        found, ids_A = {}, ids_A.cpu()
        for layer, experts_AK in zip(self.picked, experts_LAK.cpu(), strict=True):
            tokens_of = [ids_A[(experts_AK == expert).any(1)] for expert in range(self.session.config.model.moe.experts)]
            found[str(layer)] = [self._most_frequent(ids_N) for ids_N in tokens_of]
        return found

    def _most_frequent(self, ids_N: Tensor) -> list[list[Any]]:
        tokens, counts = ids_N.unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:WORDS]
        return [[self._text(token)[0], count] for token, count in zip(tokens[order].tolist(), counts[order].tolist(), strict=True)]


def movement(sums_4L: Tensor) -> dict[str, Any]:
    """Compares two probes. stability_L: the share of tokens whose set of experts changed. saturation_L: the share of the earlier
    choices that are made again, |then and now| / |then| (OLMoE, section 4.1, with the earlier probe against the later one).
    """
    tokens_L, changed_L, then_L, same_L = sums_4L
    return {
        "stability_L": (changed_L / tokens_L.clamp(min=1)).tolist(),
        "saturation_L": (same_L / then_L.clamp(min=1)).tolist(),
    }


def named(names: tuple[str, ...] | list[str], counts_LCE: Tensor) -> dict[str, list[list[int]]]:
    """Returns {name: LE}, without names that no token has."""
    by_name = zip(names, counts_LCE.long().transpose(0, 1), strict=True)
    return {name: counts_LE.tolist() for name, counts_LE in by_name if counts_LE.any()}


def routers(parallel: Parallel, layers: list[int]) -> dict[int, Router]:
    """Returns the routers of the given blocks that this rank has, by block, in order."""
    blocks = zip(parallel.model.block_indices, parallel.model.blocks, strict=True)
    return {index: block.moe.router for index, block in blocks if index in layers and block.moe is not None}


def computing_experts(routing: Routing, experts: int) -> Tensor:
    """Returns the experts that compute each token, -1 for null and full experts: int16 (T, K)."""
    experts_TK = routing.experts_TK
    computes_TK = experts_TK < experts
    if routing.kept_TK is not None:
        computes_TK = computes_TK & routing.kept_TK
    return experts_TK.masked_fill(~computes_TK, -1).to(torch.int16)
