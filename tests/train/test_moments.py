"""How moments are kept: rounding with the right mean, the error of 8 bits, and the same bits whatever part a rank holds."""

import pytest
import torch
from tokenyard.parallel.shard import ShardMetadata, whole
from tokenyard.train.config.config import OptimizerStates
from tokenyard.train.config.state_bytes import block_of
from tokenyard.train.moments import FIRST, SECOND, Moments, code_map, decode, encode, stochastic_bf16

SHAPE = 6, 48, 64
BF16, INT8, FP32 = OptimizerStates.bf16, OptimizerStates.int8, OptimizerStates.fp32


def moments(states: OptimizerStates, metadata: ShardMetadata, name: str = "a.weight") -> Moments:
    return Moments(name, metadata, states, torch.float32)


def test_the_mean_of_stochastic_rounding_is_the_number_itself() -> None:
    """Over all 65536 noises the mean is exact; each result is one of the two neighbours, and bf16 numbers stay."""
    noise = torch.arange(-(2**15), 2**15).to(torch.int16)
    for number in (1.0, 1.0 + 2**-9, -3.14159, 1e-20, -7.7e-31, 123456.789):
        x = torch.full((2**16,), number)
        rounded = stochastic_bf16(x, noise)
        below = (x[0].view(torch.int32) & -(2**16)).view(torch.float32)
        above = ((x[0].view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
        part = ((x[0].double() - below.double()) / (above.double() - below.double())).item()
        assert rounded.double().mean().item() == pytest.approx(x[0].double().item(), rel=1e-14)
        assert (rounded.float() == above).double().mean().item() == part
        assert ((rounded.float() == above) | (rounded.float() == below)).all()


def test_the_noise_is_even_and_differs_between_elements_steps_and_moments() -> None:
    """The mean of N uniform numbers is within 4 / sqrt(12 N) of a half, and their correlations within 4 / sqrt(N)."""
    drawn = [moments(BF16, whole(SHAPE)).noise(step, 0, 6 * 48, torch.device("cpu")).double() / 2**16 for step in (1, 2)]
    count = drawn[0].numel() / 2
    assert abs(drawn[0].mean().item()) < 4 / (24 * count) ** 0.5
    assert drawn[0].var().item() == pytest.approx(1 / 12, rel=0.02)
    one = drawn[0]
    pairs = [(one, drawn[1]), (one[..., 0], one[..., 1]), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, 2:], one[:, :-2])]
    for a, b in pairs:
        assert abs((a * b).mean().item()) * 12 < 4 / count**0.5


def test_an_average_moves_by_steps_below_its_last_bit() -> None:
    """0.999 of 1 and 0.001 of 0: rounded to the nearest it never moves, stochastically it decays as 0.999^steps."""
    kept = {key: torch.ones(64, 64, dtype=torch.bfloat16) for key in (FIRST, SECOND)}
    here, steps = moments(BF16, whole((64, 64))), 200
    assert (torch.ones(()).bfloat16() * 0.999).bfloat16() == 1
    for step in range(steps):
        first, second = here.read(kept)
        here.write(kept, first * 0.999, second * 0.999, step, 0)
    for moment in kept.values():
        deviation = 4 * 0.0039 * steps**0.5 / 2 / 64  # four deviations: each step adds at most half of the last bit, 2^-8
        assert moment.double().mean().item() == pytest.approx(0.999**steps, abs=deviation)


@pytest.mark.parametrize("states", [BF16, INT8])
def test_a_part_has_the_bits_of_the_whole(states: OptimizerStates) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(SHAPE), torch.rand(SHAPE) * 1e-6
    of_all = stored(states, whole(SHAPE), first, second)
    blocks = block_of(SHAPE[-1])
    cuts = [((2, 0, 0), (3, 48, 64)), ((0, 7, 0), (6, 11, 64)), ((1, 5, 3 * blocks), (2, 1, 4 * blocks))]
    for offsets, sizes in cuts + ([((0, 3, 7), (6, 9, 31))] if states is BF16 else []):
        part = ShardMetadata(SHAPE, offsets, sizes)
        for key, (metadata, tensor) in stored(states, part, part.cut(first), part.cut(second)).items():
            assert torch.equal(tensor, metadata.cut(of_all[key][1])), (key, part)


def test_eight_bits_keep_a_number_within_half_the_largest_gap_of_its_block() -> None:
    """0.9 / 64 / 2 of the largest magnitude with a sign; of the root of the second moment 0.9 / 128 / 2."""
    torch.manual_seed(0)
    first = torch.randn(SHAPE) * 10 ** torch.randn(SHAPE)
    second = first.square()
    kept = {key: tensor for key, (_, tensor) in stored(INT8, whole(SHAPE), first, second).items()}
    again, squared = moments(INT8, whole(SHAPE)).read({key: x.view(-1, x.shape[-1]) for key, x in kept.items()})
    for x, found, bound in ((first, again, 0.9 / 128), (second.sqrt(), squared.sqrt(), 0.9 / 256)):
        blocks, errors = (each.reshape(-1, block_of(64)) for each in (x.abs(), (x.view_as(found) - found).abs()))
        share = (errors.amax(1) / blocks.amax(1)).max().item()
        assert bound * 0.5 < share <= bound * (1 + 1e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_nearest_values(signed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64) * 10 ** (2 * torch.randn(64, 64))
    x = x if signed else x.abs()
    x[0] = 0
    codes, scales = torch.empty(64, 64, dtype=torch.uint8), torch.empty(64, 8)
    encode(x, codes, scales, signed)
    values = torch.tensor(code_map(signed).values)
    part = (x.view(64, 8, 8) / scales.clamp(min=1e-38)[..., None]).view(64, 64)
    nearest = (part[..., None] - values).abs().amin(-1)
    least = values[values > 0].min()
    wrong = (decode(codes, torch.ones_like(scales), signed) - part).abs() > nearest + 1e-7
    assert len(values) == 256 and not (wrong if signed else wrong & (part >= least)).any()
    assert torch.equal(decode(codes, scales, signed)[0], torch.zeros(64))
    if not signed:
        assert torch.equal(codes == 0, x == 0), "a second moment that is not 0 must not become 0"


def test_blocks_fit_rows_of_known_models_and_their_cuts() -> None:
    """Mixtral's width and hidden width, Qwen3-30B's, gpt-oss', a tiny one, and a prime."""
    assert [block_of(columns) for columns in (4096, 14336, 768, 2880, 64, 7)] == [256, 256, 96, 180, 8, 7]
    for columns in (4096, 14336, 768, 2880, 64):
        assert all(columns // parts % block_of(columns) == 0 for parts in (1, 2, 4, 8))


@pytest.mark.parametrize("before", [FP32, BF16, INT8])
@pytest.mark.parametrize("after", [FP32, BF16, INT8])
def test_moments_are_converted_within_the_error_of_what_they_are_kept_in(before: OptimizerStates, after: OptimizerStates) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(SHAPE), torch.rand(SHAPE)
    loaded = {f"optimizer.a.weight.{key}": shard for key, shard in stored(before, whole(SHAPE), first, second).items()}
    held = moments(after, whole(SHAPE)).on_host()
    moments(before, whole(SHAPE)).convert(loaded, moments(after, whole(SHAPE)), held, 5)
    found = moments(after, whole(SHAPE)).read({key.rpartition(".")[2]: x.view(-1, x.shape[-1]) for key, (_, x) in held.items()})
    error = {FP32: 0.0, BF16: 2**-7, INT8: 0.008}
    for x, y in zip((first, second), found, strict=True):
        assert (x.view_as(y) - y).abs().max().item() <= (error[before] + error[after]) * 2.1 * x.abs().max().item()


def stored(states: OptimizerStates, metadata: ShardMetadata, first: torch.Tensor, second: torch.Tensor):
    """Returns what is kept of the moments after step 3, written in two chunks."""
    here = moments(states, metadata)
    held = {key.rpartition(".")[2]: shard for key, shard in here.on_host().items()}
    rows, middle = first.reshape(-1, metadata.sizes[-1]), second.reshape(-1, metadata.sizes[-1])
    cut = len(rows) // 3
    for some in (slice(0, cut), slice(cut, len(rows)))[cut == 0 :]:
        kept = {key: shard.tensor.view(-1, shard.tensor.shape[-1])[some] for key, shard in held.items()}
        here.write(kept, rows[some].contiguous(), middle[some].contiguous(), 3, some.start)
    return held
