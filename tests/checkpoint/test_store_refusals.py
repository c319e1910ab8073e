"""What is damaged, incomplete or of another shape is refused in one line that names it, before any tensor is changed."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import xxhash
from tokenyard.checkpoint.store import load_checkpoint, read_facts, read_whole, save_checkpoint
from tokenyard.parallel.shard import LocalShard, ShardMetadata, whole


def held(**tensors):
    return {name: LocalShard(whole(tensor.shape), tensor) for name, tensor in tensors.items()}


@pytest.fixture
def path(tmp_path):
    return save_checkpoint(tmp_path, 7, held(one=torch.arange(64.0), two=torch.ones(2, 3)), {"seed": 1})


def refuse(path, pattern, wanted=None, **options):
    """load_checkpoint raises a ValueError of one line and changes nothing."""
    wanted = held(one=torch.zeros(64), two=torch.zeros(2, 3)) if wanted is None else wanted
    before = {name: one.tensor.clone() for name, one in wanted.items()}
    with pytest.raises(ValueError, match=pattern) as caught:
        load_checkpoint(path, wanted, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], one.tensor) for name, one in wanted.items())


def remove_file(path):
    (path / "shard_00000.safetensors").unlink()


def truncate(path):
    file = path / "shard_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_bit(path):
    file = path / "shard_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def remove_manifest(path):
    (path / "manifest.json").unlink()


def cut_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-20])


def edit(change, hashed=True):
    """A damage that edits the manifest, with a hash that fits the new content unless told otherwise."""

    def damage(path):
        file = path / "manifest.json"
        content = json.loads(file.read_text())
        change(content)
        if hashed:
            del content["hash"]
            content["hash"] = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
        file.write_text(json.dumps(content))

    return damage


def move_outside(content):
    content["files"]["../shard_00000.safetensors"] = content["files"].pop("shard_00000.safetensors")


def point_outside(content):
    group(content, "one")["files"] = ["/etc/passwd"]


def lose_half(content):
    group(content, "one")["cuts"] = [[0, 32]]


def lose_chunks(content):
    one = group(content, "one")
    del one["cuts"]
    one["rectangles"] = []


def group(content, name):
    return next(one for one in content["tensors"] if name in one["names"])


DAMAGES = {
    "missing file": (remove_file, r"shard_00000\.safetensors is missing"),
    "truncated file": (truncate, r"shard_00000\.safetensors is damaged: it has \d+ bytes and manifest\.json says \d+"),
    "flipped bit": (flip_bit, r"shard_00000\.safetensors is damaged: its hash"),
    "no manifest": (remove_manifest, r"step_00000007 is no checkpoint: it has no manifest\.json"),
    "no JSON": (cut_manifest, r"manifest\.json is no readable JSON"),
    "file outside": (edit(move_outside), r"'\.\./shard_00000\.safetensors' must be a plain name"),
    "file outside, absolute": (edit(point_outside), "files = '/etc/passwd' must be a file's number"),
    "file not listed": (edit(lambda content: content["files"].clear()), "must be listed under files"),
    "other format": (edit(lambda content: content.update(format="x")), "not the manifest of a tokenyard checkpoint"),
    "other version": (edit(lambda content: content.update(version=3)), "version = 3 cannot be read: it must be 2 or 1"),
    "no tensors": (edit(lambda content: content.pop("tensors")), "is damaged: KeyError: 'tensors'"),
    "a list": (lambda path: (path / "manifest.json").write_text("[]"), "not the manifest of a tokenyard checkpoint"),
    "edited by hand": (edit(lambda content: content["facts"].update(seed=2), hashed=False), "damaged or changed by hand"),
    "unknown dtype": (edit(lambda content: group(content, "one").update(dtype="F33")), "dtype = 'F33' must be one of F64"),
    "wrong chunk": (edit(lose_half), "'one' is incomplete"),
    "no chunk": (edit(lose_chunks), "'one' is incomplete"),
    "other dtype than the file": (edit(lambda content: group(content, "two").update(dtype="I32")), "two.*is int32"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(path, name):
    damage, pattern = DAMAGES[name]
    damage(path)
    refuse(path, pattern)


def test_hashes_are_optional_but_sizes_and_headers_are_not(path):
    flip_bit(path)
    load_checkpoint(path, held(one=torch.zeros(64), two=torch.zeros(2, 3)), verify=False)
    with pytest.raises(ValueError, match="is damaged: its hash"):
        read_whole(path, "")
    edit(lambda content: group(content, "two").update(dtype="I32"))(path)
    wanted = held(one=torch.zeros(64), two=torch.zeros(2, 3, dtype=torch.int32))
    refuse(path, "does not hold 'two' as", wanted, verify=False)
    truncate(path)
    refuse(path, "is damaged: it has", wanted, verify=False)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        (held(one=torch.zeros(64)), "tensor 'two' is in the checkpoint but not in this run"),
        (held(), r"tensor 'one' \(and 1 more\) is in the checkpoint but not in this run"),
        (held(one=torch.zeros(64), two=torch.zeros(2, 3), too=torch.zeros(2)), "'too' is in this run.*nearest name there is 'two'"),
        (held(one=torch.zeros(64), two=torch.zeros(3, 2)), r"'two' is float32 \(2, 3\) in the checkpoint and float32 \(3, 2\) in"),
        (held(one=torch.zeros(64), two=torch.zeros(6)), r"'two' is float32 \(2, 3\) in the checkpoint and float32 \(6,\) in"),
        (held(one=torch.zeros(64).double(), two=torch.zeros(2, 3)), r"'one' is float32 \(64,\).* and float64 \(64,\) in this run"),
        ({"one": LocalShard(whole((64,)), torch.zeros(1))}, r"local shape \(1,\) must be the shard's sizes \(64,\)"),
        ({"one": LocalShard(ShardMetadata((64,), (60,), (8,)), torch.zeros(8))}, r"\[60:68\] must lie inside"),
    ],
)
def test_names_shapes_and_dtypes_must_match(path, wanted, pattern):
    refuse(path, pattern, wanted)


def test_not_strict_leaves_names_that_nobody_wants(path):
    two = torch.zeros(2, 3)
    assert load_checkpoint(path, held(two=two), strict=False) == {"seed": 1}
    assert torch.equal(two, torch.ones(2, 3))
    refuse(path, "'three' is in this run but not in the checkpoint", held(three=two), strict=False)


def test_facts_of_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} is no checkpoint")):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    ("bad", "facts", "pattern"),
    [
        ({"x": LocalShard(ShardMetadata((4,), (0,), (2,)), torch.zeros(2))}, {}, "'x': the ranks hold 2 of its 4 elements"),
        (
            {"x": LocalShard(ShardMetadata((4,), (3,), (2,)), torch.zeros(2))},
            {},
            r"'x': \[3:5\] must lie inside of the shape \(4,\)",
        ),
        ({"x": LocalShard(whole((4,)), torch.zeros(3))}, {}, "'x': the local shape"),
        (held(x=torch.zeros(2, dtype=torch.complex64)), {}, "'x': dtype complex64 cannot be saved"),
        (held(x=torch.zeros(2)), {"loss": float("nan")}, "facts of a checkpoint must be plain JSON"),
        (held(x=torch.zeros(2)), {"path": Path()}, "facts of a checkpoint must be plain JSON"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(tmp_path, bad, facts, pattern):
    with pytest.raises(ValueError, match=pattern):
        save_checkpoint(tmp_path, 1, bad, facts)
    assert list(tmp_path.iterdir()) == []


def error_of(function, *args):
    """Errors as text; each rank must meet one."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def save_bad_shards(folder, case):
    offset, size, dtype = {
        "overlap": (dist.get_rank(), 3, torch.float32),
        "dtype": (2 * dist.get_rank(), 2, [torch.float32, torch.float64][dist.get_rank()]),
    }[case]
    shard = ShardMetadata((4,), (offset,), (size,))
    return error_of(save_checkpoint, folder, 1, {"x": LocalShard(shard, torch.zeros(size, dtype=dtype))}, {})


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("overlap", "ValueError: tensor 'x': two ranks hold shards that overlap but differ; shards must be equal or apart"),
        ("dtype", "ValueError: tensor 'x': shape and dtype must be the same on all ranks, not float32 (4,) and float64 (4,)"),
    ],
)
def test_shards_that_do_not_fit_together(ranks, tmp_path, case, text):
    assert ranks(2, save_bad_shards, tmp_path, case) == [text] * 2
    assert list(tmp_path.iterdir()) == []


def load_own_name(path, names):
    tensor = torch.zeros(64)
    error = error_of(load_checkpoint, path, held(**{names[dist.get_rank()]: tensor}))
    return error, tensor.count_nonzero().item()


def test_an_error_of_one_rank_stops_all_before_a_tensor_changes(ranks, tmp_path):
    path = save_checkpoint(tmp_path, 7, held(one=torch.ones(64)), {})
    assert ranks(2, load_own_name, path, ["one", "one"]) == [("no error", 64)] * 2
    for error, changed in ranks(2, load_own_name, path, ["one", "other"]):
        assert error.startswith("ValueError: checkpoint step_00000007: tensor 'other' is in this run")
        assert changed == 0
    flip_bit(path)
    for error, changed in ranks(2, load_own_name, path, ["one", "one"]):
        assert "is damaged: its hash" in error
        assert changed == 0
    remove_manifest(path)
    assert all("is no checkpoint" in error for error, _ in ranks(2, load_own_name, path, ["one", "one"]))
