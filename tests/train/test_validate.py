"""Each violated rule ends in one line, and the value that it proposes violates no rule."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

import pytest
from tokenyard.ranges import ranges
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config, ConfigError
from tokenyard.train.config.schema import settings
from tokenyard.train.preflight import check_config

BAD = [
    # ranks, overrides, what the message begins with, the nearest valid value
    (1, "parallel.expert=3", "parallel.expert=3: must divide model.moe.experts=8",
     "parallel.expert=2 launch=torchrun launch.ranks=2 or parallel.expert=4 launch=torchrun launch.ranks=4"),
    (4, "parallel.expert=3", "parallel.expert=3: must divide model.moe.experts=8", "parallel.expert=2 or parallel.expert=4"),
    (2, "parallel.expert=8", "parallel.expert=8: must divide the 2 ranks", "parallel.expert=2"),
    (1, "parallel.expert=4", "parallel.expert=4: needs 4 ranks", "parallel.expert=4 launch=torchrun launch.ranks=4"),
    (1, "parallel.expert=4 parallel.tensor=2", "parallel.tensor=2: needs 2 ranks",
     "parallel.tensor=2 launch=torchrun launch.ranks=4"),
    (4, "parallel.expert_tensor=3", "parallel.expert_tensor=3: must divide model.moe.hidden=256 into multiples of 8",
     "parallel.expert_tensor=2 or parallel.expert_tensor=4"),
    (4, "parallel.expert_tensor=64 model.moe.hidden=96", "parallel.expert_tensor=64: must divide model.moe.hidden=96 into",
     "parallel.expert_tensor=4"),
    (4, "parallel.expert_tensor=2 model.moe.hidden=500", "parallel.expert_tensor=2: must divide model.moe.hidden=500 into",
     "parallel.expert_tensor=1"),
    (2, "parallel.expert_tensor=4", "parallel.expert_tensor=4: must divide the 2 ranks", "parallel.expert_tensor=2"),
    (4, "parallel.expert=2 parallel.expert_tensor=4", "parallel.expert_tensor=4: must divide the 2 ranks that hold",
     "parallel.expert_tensor=2"),
    (1, "parallel.expert_tensor=2", "parallel.expert_tensor=2: needs 2 ranks",
     "parallel.expert_tensor=2 launch=torchrun launch.ranks=2"),
    (1, "parallel.expert=2 parallel.expert_tensor=2", "parallel.expert=2: needs 2 ranks",
     "parallel.expert=2 launch=torchrun launch.ranks=4"),
    (4, "model=dense parallel.expert_tensor=2", "parallel.expert_tensor=2: must be 1", "parallel.expert_tensor=1"),
    (4, "parallel.context=3", "parallel.context=3: must divide the 4 data ranks", "parallel.context=2 or parallel.context=4"),
    (1, "parallel.context=2", "parallel.context=2: needs 2 ranks", "parallel.context=2 launch=torchrun launch.ranks=2"),
    (4, "parallel.context=4 sequence_length=60", "parallel.context=4: must divide sequence_length=60 into two chunks a rank",
     "parallel.context=2"),
    (4, "parallel.context=2 parallel.tensor=2 sequence_length=66",
     "parallel.context=2: must divide sequence_length=66 into two chunks a rank and parallel.tensor=2 slices",
     "parallel.context=1"),
    (8, "parallel.context=4 parallel.shard=2", "parallel.shard=2: must be 1 or a multiple of parallel.context=4",
     "parallel.shard=1"),
    (2, "parallel.context=2 model=tiny_qwen3_next tokenizer=bytes",
     "parallel.context=2: must be 1 with linear attention (3 of 4 layers)", "parallel.context=1"),
    (2, "parallel.context=2 engine=deepspeed", "parallel.context=2: must be 1 with engine=deepspeed", "parallel.context=1"),
    (16, "parallel.context=16 parallel.context_exchange=heads", "parallel.context=16: must divide the 8 heads of a rank",
     "parallel.context=8"),
    (4, "parallel.context=2 batch.sequences=3", "batch.sequences=3: must be a multiple of the 2 data ranks (4 ranks / "
     "parallel.tensor=1 / parallel.context=2)", "batch.sequences=2 or batch.sequences=4"),
    (2, "parallel.pipeline=3", "parallel.pipeline=3: must divide the 2 ranks", "parallel.pipeline=2"),
    (1, "parallel.pipeline=2", "parallel.pipeline=2: needs 2 ranks", "parallel.pipeline=2 launch=torchrun launch.ranks=2"),
    (2, "parallel.pipeline=2 parallel.tensor=2", "parallel.tensor=2: needs 4 ranks (or a multiple) and this is 1 rank of a",
     "parallel.tensor=1"),
    (4, "parallel.pipeline=2 parallel.expert=4", "parallel.expert=4: must divide the 2 ranks of a pipeline stage",
     "parallel.expert=2"),
    (8, "parallel.pipeline=2 parallel.shard=4 parallel.tensor=2", "parallel.shard=4: must divide the 2 data ranks (4 ranks of a",
     "parallel.shard=2"),
    (8, "parallel.pipeline=8", "parallel.pipeline=8: makes 8 stages, and model.layers=4 can be cut into at most 5",
     "parallel.pipeline=4"),
    (1, "parallel.pipeline_schedule=interleaved", "parallel.pipeline_schedule=interleaved: must be left as it is, parallel.pipe",
     "parallel.pipeline_schedule=1f1b"),
    (1, "parallel.pipeline_layers=[4]", "parallel.pipeline_layers=[4]: must be left as it is, parallel.pipeline=1",
     "parallel.pipeline_layers=null"),
    (2, "parallel.pipeline=2 parallel.pipeline_chunks=2", "parallel.pipeline_chunks=2: must be null or 1 with",
     "parallel.pipeline_chunks=null"),
    (2, "parallel.pipeline=2 parallel.pipeline_schedule=interleaved parallel.pipeline_chunks=1 batch.micro=4",
     "parallel.pipeline_chunks=1: must be 2 or more", "parallel.pipeline_chunks=2"),
    (2, "parallel.pipeline=2 parallel.pipeline_schedule=zbv parallel.pipeline_chunks=1",
     "parallel.pipeline_chunks=1: must be null or 2 with parallel.pipeline_schedule=zbv", "parallel.pipeline_chunks=null"),
    (4, "parallel.pipeline=4 parallel.pipeline_schedule=zbv", "parallel.pipeline=4: makes 8 stages", "parallel.pipeline=2"),
    (1, "parallel.pipeline_schedule=zbv", "parallel.pipeline_schedule=zbv: must be left as it is, parallel.pipe",
     "parallel.pipeline_schedule=1f1b"),
    (2, "parallel.pipeline=2 parallel.pipeline_layers=[2,1]", "parallel.pipeline_layers=[2,1]: must be 2 numbers that add up to",
     "parallel.pipeline_layers=null"),
    (2, "parallel.pipeline=2 parallel.pipeline_layers=[0,4]", "parallel.pipeline_layers=[0,4]: must be 2 numbers that add up to",
     "parallel.pipeline_layers=null"),
    (2, "parallel.pipeline=2 parallel.pipeline_schedule=interleaved", "batch.micro=null: must cut the 16 sequences of a rank",
     "batch.micro=8"),
    (2, "parallel.pipeline=2 parallel.pipeline_schedule=interleaved batch.micro=16", "batch.micro=16: must cut the 16",
     "batch.micro=8"),
    (1, "parallel.pipeline_overlap=true", "parallel.pipeline_overlap=true: must be left as it is, parallel.pipeline=1 has one",
     "parallel.pipeline_overlap=false"),
    (4, "parallel.pipeline=2 parallel.expert=2 parallel.pipeline_overlap=true",
     "parallel.pipeline_overlap=true: must be false with parallel.pipeline_schedule=1f1b", "parallel.pipeline_overlap=false"),
    (4, "parallel.pipeline=2 parallel.expert=2 parallel.pipeline_overlap=true parallel.pipeline_schedule=zbh1",
     "parallel.pipeline_overlap=true: must be false with parallel.pipeline_schedule=zbh1", "parallel.pipeline_overlap=false"),
    (2, "parallel.pipeline=2 parallel.pipeline_schedule=interleaved batch.micro=4 parallel.pipeline_overlap=true",
     "parallel.pipeline_overlap=true: must be false with parallel.expert=1", "parallel.pipeline_overlap=false"),
    (4, "parallel.pipeline=2 parallel.pipeline_schedule=zbv parallel.expert=2 parallel.pipeline_overlap=true "
     "parallel.exchange=symmetric",
     "parallel.pipeline_overlap=true: must be false with parallel.exchange=symmetric", "parallel.pipeline_overlap=false"),
    (1, "profile.steps=12-1200", "profile.steps=12-1200: must be a step, or the first and the last", "profile.steps=12-1150"),
    (1, "profile.steps=12-10", "profile.steps=12-10: must be a step, or the first and the last", "profile.steps=10-12"),
    (1, "profile.steps=0", "profile.steps=0: must be a step, or the first and the last", "profile.steps=1"),
    (2, "profile.ranks=[0,5]", "profile.ranks=[0,5]: must be ranks from 0 to 1", "profile.ranks=[0,1]"),
    (1, "profile.memory=true device=cpu", "profile.memory=true: needs a GPU", "profile.memory=false"),
    (1, "optimizer=muon optimizer.states=int8", "optimizer.states=int8: must be fp32 with optimizer.name=muon",
     "optimizer.states=fp32"),
    (1, "optimizer=muon optimizer.offload=true", "optimizer.offload=true: must be false with optimizer.name=muon",
     "optimizer.offload=false"),
    (1, "optimizer=muon optimizer.gradients=bf16", "optimizer.gradients=bf16: must be fp32 with optimizer.name=muon",
     "optimizer.gradients=fp32"),
    (1, "precision=fp64 optimizer.gradients=bf16", "optimizer.gradients=bf16: must be fp32, as the weights, with precision=fp64",
     "optimizer.gradients=fp32"),
    (1, "optimizer=muon engine=deepspeed", "optimizer.name=muon: must be adamw with engine=deepspeed", "optimizer.name=adamw"),
    (1, "optimizer.qk_clip=100 engine=deepspeed", "optimizer.qk_clip=100.0: must be null with engine=deepspeed",
     "optimizer.qk_clip=null"),
    (1, "optimizer.qk_clip=100 model.attention.qk_norm=head",
     "optimizer.qk_clip=100.0: must be null with model.attention.qk_norm=head", "optimizer.qk_clip=null"),
    (2, "parallel.pipeline=2 engine=deepspeed", "parallel.pipeline=2: must be 1 with engine=deepspeed", "parallel.pipeline=1"),
    (1, "parallel.zero=0", "parallel.zero=0: must be in [1, 3]", "parallel.zero=1"),
    (1, "parallel.zero=4", "parallel.zero=4: must be in [1, 3]", "parallel.zero=3"),
    (1, "parallel.shard=2", "parallel.shard=2: needs 2 ranks", "parallel.shard=2 launch=torchrun launch.ranks=2"),
    (4, "model=dense parallel.expert=2", "parallel.expert=2: must be 1", "parallel.expert=1"),
    (1, "parallel.tensor=3", "parallel.tensor=3: must divide model.heads=8",
     "parallel.tensor=2 launch=torchrun launch.ranks=2 or parallel.tensor=4 launch=torchrun launch.ranks=4"),
    (4, "parallel.tensor=3", "parallel.tensor=3: must divide model.heads=8", "parallel.tensor=2 or parallel.tensor=4"),
    (8, "parallel.tensor=8", "parallel.tensor=8: must divide model.kv_heads=4", "parallel.tensor=4"),
    (4, "parallel.tensor=4 model.dense_first=1 model.hidden=1022",
     "parallel.tensor=4: must divide model.hidden=1022", "parallel.tensor=2"),
    (4, "parallel.tensor=4 model.vocabulary=8194", "parallel.tensor=4: must divide model.vocabulary=8194", "parallel.tensor=2"),
    (2, "parallel.tensor=2 sequence_length=255", "parallel.tensor=2: must divide sequence_length=255", "parallel.tensor=1"),
    (3, "parallel.tensor=2 batch.sequences=12", "parallel.tensor=2: must divide the 3 ranks", "parallel.tensor=1"),
    (4, "parallel.shard=3", "parallel.shard=3: must divide the 4 data ranks", "parallel.shard=2 or parallel.shard=4"),
    (4, "parallel.shard=4 parallel.tensor=2", "parallel.shard=4: must divide the 2 data ranks", "parallel.shard=2"),
    (4, "batch.sequences=10", "batch.sequences=10: must be a multiple of the 4 data ranks",
     "batch.sequences=8 or batch.sequences=12"),
    (4, "batch.sequences=13 batch.micro=2", "batch.sequences=13: must be a multiple of the 4 data ranks", "batch.sequences=16"),
    (4, "batch.sequences=3", "batch.sequences=3: must be a multiple of the 4 data ranks", "batch.sequences=4"),
    (1, "batch.micro=3", "batch.micro=3: must divide the 16 sequences of a rank", "batch.micro=2 or batch.micro=4"),
    (4, "batch.micro=16", "batch.micro=16: must divide the 4 sequences of a rank", "batch.micro=4"),
    (1, "batch.micro=0", "batch.micro=0: must be in [1, inf)", "batch.micro=1"),
    (1, "model.width=264", "model.heads=8: must divide model.width=264 into even heads", "model.heads=4 or model.heads=12"),
    (1, "model.heads=12", "model.heads=12: must divide model.width=128", "model.heads=8 or model.heads=16"),
    (1, "model.heads=0", "model.heads=0: must be in [1, ", "model.heads=4"),
    (1, "model.kv_heads=3", "model.kv_heads=3: must divide model.heads=8", "model.kv_heads=2 or model.kv_heads=4"),
    (1, "model.head_width=33", "model.head_width=33: must be even", "model.head_width=32 or model.head_width=34"),
    (1, "model.dense_layers=[1,4]", "model.dense_layers=[1,4]: must be rising indices of the 4 layers", "model.dense_layers=[1]"),
    (1, "model.attention.full_layers=[2,1]", "model.attention.full_layers=[2,1]: must be rising",
     "model.attention.full_layers=[1,2]"),
    (1, "model.attention.linear_layers=[1,4]", "model.attention.linear_layers=[1,4]: must be rising",
     "model.attention.linear_layers=[1]"),
    (1, "model.attention.linear_every=4 model.attention.delta.key_heads=3",
     "model.attention.delta.value_heads=8: must be a multiple of model.attention.delta.key_heads=3",
     "model.attention.delta.value_heads=9"),
    (1, "model.attention.kind=mla model.attention.linear_every=4", "model.attention.linear_every=4: must be 1 with",
     "model.attention.linear_every=1"),
    (1, "model.attention.kind=mla model.attention.linear_layers=[0]", "model.attention.linear_layers=[0]: must be [] with",
     "model.attention.linear_layers=[]"),
    (1, "model.attention.kind=mla model.attention.output_gate=true", "model.attention.output_gate=true: must be false with",
     "model.attention.output_gate=false"),
    (8, "parallel.tensor=4 model.attention.linear_layers=[1] model.attention.delta.key_heads=2",
     "parallel.tensor=4: must divide model.attention.delta.key_heads=2", "parallel.tensor=2"),
    (1, "model.dense_first=5", "model.dense_first=5: must be at most model.layers=4", "model.dense_first=4"),
    (1, "model.mtp_depth=256", "model.mtp_depth=256: must be in [0, 64]", "model.mtp_depth=64"),
    (1, "sequence_length=32 model.mtp_depth=40", "model.mtp_depth=40: must be below sequence_length=32", "model.mtp_depth=31"),
    (1, "model.attention.window=0", "model.attention.window=0: must be in [1, inf)", "model.attention.window=1"),
    (1, "model.attention.rope.fraction=0.22", "model.attention.rope.fraction=0.22: must be an even share of the 16 dimensions",
     "model.attention.rope.fraction=0.25"),
    (1, "model.attention.rope.scaling=llama3 model.attention.rope.high_frequency_factor=1",
     "model.attention.rope.high_frequency_factor=1.0: must be above model.attention.rope.low_frequency_factor=1",
     "model.attention.rope.high_frequency_factor=4.0"),
    (1, "model.attention.rope.scaling=yarn model.attention.rope.beta_fast=0.5",
     "model.attention.rope.beta_fast=0.5: must be at least model.attention.rope.beta_slow=1",
     "model.attention.rope.beta_fast=1.0"),
    (1, "model.attention.kind=mla model.attention.qk_norm=head", "model.attention.qk_norm=head: must be none with",
     "model.attention.qk_norm=none"),
    (1, "model.pre_norms=false", "model.sandwich_norms=false: must be true with model.pre_norms=false",
     "model.sandwich_norms=true"),
    (1, "model.attention.kind=mla model.attention.clip_qkv=8", "model.attention.clip_qkv=8.0: must be null with",
     "model.attention.clip_qkv=null"),
    (1, "model.attention.rope.scaling=longrope model.attention.rope.fraction=0.25 model.attention.rope.short_factors=[1,2]",
     "model.attention.rope.long_factors=[]: must be 2 numbers above 0, one for each rotated pair",
     "model.attention.rope.long_factors=[1.0,1.0]"),
    (1, "model.attention.rope.scaling=longrope model.attention.rope.fraction=0.125 model.attention.rope.original_length=1 "
     "model.attention.rope.long_factors=[2] model.attention.rope.short_factors=[1]",
     "model.attention.rope.original_length=1: must be at least 2", "model.attention.rope.original_length=2"),
    (1, "model.attention.rope.scaling=dynamic model.attention.rope.fraction=0.125", "model.attention.rope.scaling=dynamic: ",
     "model.attention.rope.scaling=linear"),
    (1, "model.attention.kind=mla model.attention.sinks=true", "model.attention.sinks=true: must be false with",
     "model.attention.sinks=false"),
    (1, "model.attention.kind=mla model.attention.rope.fraction=0.5", "model.attention.rope.fraction=0.5: must be 1 with",
     "model.attention.rope.fraction=1.0"),
    (1, "model.attention.kind=mla model.attention.mla.rope_width=15", "model.attention.mla.rope_width=15: must be even",
     "model.attention.mla.rope_width=14 or model.attention.mla.rope_width=16"),
    (1, "model.moe.top_k=9", "model.moe.top_k=9: must be at most model.moe.experts=8", "model.moe.top_k=8"),
    (1, "model.moe.capacity.factor=0", "model.moe.capacity.factor=0.0: must be in (0, inf)", "model.moe.capacity.factor=1"),
    (1, "model.moe.experts=-1", "model.moe.experts=-1: must be in [0, 65536]", "model.moe.experts=0"),
    (1, "model.moe.router.groups=3", "model.moe.router.groups=3: must divide model.moe.experts=8",
     "model.moe.router.groups=2 or model.moe.router.groups=4"),
    (1, "model.moe.router.groups=4 model.moe.router.top_groups=5", "model.moe.router.top_groups=5: must be at most",
     "model.moe.router.top_groups=4"),
    (1, "model.moe.router.groups=4 model.moe.top_k=3", "model.moe.top_k=3: must be at most 2, the experts of", "model.moe.top_k=2"),
    (1, "model.moe.router.groups=8 model.moe.router.top_groups=4 model.moe.router.group_score=top2",
     "model.moe.router.group_score=top2: top2 needs groups of two", "model.moe.router.group_score=max"),
    (1, "model.moe.router.null_experts=4 model.moe.router.copy_experts=3 model.moe.router.constant_experts=2",
     "model.moe.router.copy_experts=3: must be at most model.moe.router.null_experts=4 together with",
     "model.moe.router.copy_experts=2"),
    (1, "model.moe.router.null_experts=4 model.moe.router.constant_experts=3 model.moe.router.selection=gshard",
     "model.moe.router.constant_experts=3: must be 0 with model.moe.router.selection=gshard",
     "model.moe.router.constant_experts=0"),
    (1, "model.moe.router.groups=4 model.moe.router.null_experts=4", "model.moe.router.null_experts=4: must be 0",
     "model.moe.router.null_experts=0"),
    (1, "model.moe.shortcut=true", "model.dense_first=0: must be at least 1 with model.moe.shortcut=true", "model.dense_first=1"),
    (1, "model.moe.shortcut=true model.dense_first=1 model.mtp_depth=1", "model.mtp_depth=1: must be 0 with", "model.mtp_depth=0"),
    (1, "model.moe.router.selection=gshard model.moe.capacity.policy=random",
     "model.moe.capacity.policy=random: must be position or priority with",
     "model.moe.capacity.policy=position or model.moe.capacity.policy=priority"),
    (1, "model.moe.balance.device_coefficient=0.05", "model.moe.balance.device_coefficient=0.05: must be 0 with",
     "model.moe.balance.device_coefficient=0.0"),
    (1, "model.moe.capacity.groups=4", "model.moe.capacity.groups=4: must be 1 with model.moe.capacity.scope=sequence",
     "model.moe.capacity.groups=1"),
    (1, "model.moe.router.selection=gshard model.moe.top_k=1", "model.moe.top_k=1: must be 2 with", "model.moe.top_k=2"),
    (1, "model.moe.router.selection=hash model.moe.balance.bias_rate=0.001", "model.moe.balance.bias_rate=0.001: must be 0 with",
     "model.moe.balance.bias_rate=0.0"),
    (1, "model.moe.router.selection=hash model.moe.balance.pool_layers=true",
     "model.moe.balance.pool_layers=true: must be false with", "model.moe.balance.pool_layers=false"),
    (1, "model.moe.router.selection=hash model.moe.router.noise=true", "model.moe.router.noise=true: must be false with",
     "model.moe.router.noise=false"),
    (1, "model.moe.router.selection=expert_choice model.moe.router.groups=2", "model.moe.router.groups=2: must be 1 with",
     "model.moe.router.groups=1"),
    (1, "model.moe.router.selection=sinkhorn model.moe.balance.bias_rate=1", "model.moe.balance.bias_rate=1.0: must be 0 with",
     "model.moe.balance.bias_rate=0.0"),
    (1, "model.moe.router.selection=expert_choice model.moe.capacity.scope=rank",
     "model.moe.capacity.scope=rank: must be sequence or batch",
     "model.moe.capacity.scope=batch or model.moe.capacity.scope=sequence"),
    (1, "model.moe.router.softmax_after_top_k=true model.moe.router.score=sigmoid",
     "model.moe.router.score=sigmoid: must be softmax with", "model.moe.router.score=softmax"),
    (1, "model.moe.router.softmax_after_top_k=true model.moe.top_k=1",
     "model.moe.router.softmax_after_top_k=true: must be false with", "model.moe.router.softmax_after_top_k=false"),
    (1, "model.moe.capacity.schedule=[1000,1.5,0,1.0]",
     "model.moe.capacity.schedule=[1000.0,1.5,0.0,1.0]: must be pairs of a rising",
     "model.moe.capacity.schedule=[0.0,1.0,1000.0,1.5]"),
    (1, "model.moe.balance.schedule=[10,-1,20,1]", "model.moe.balance.schedule=[10.0,-1.0,20.0,1.0]: must be pairs of a rising",
     "model.moe.balance.schedule=[20.0,1.0]"),
    (1, "model.moe.z_schedule=[1.5,1]", "model.moe.z_schedule=[1.5,1.0]: must be pairs of a rising", "model.moe.z_schedule=[]"),
    (1, "batch.schedule=[1e6,32,1e5,48]", "batch.schedule=[1000000.0,32.0,100000.0,48.0]: must be pairs of a rising number of",
     "batch.schedule=[100000.0,48.0,1000000.0,32.0]"),
    (2, "batch.micro=4 batch.schedule=[1e6,20]", "batch.schedule=[1000000.0,20.0]: must have multiples of the 8 sequences that all",
     "batch.schedule=[1000000.0,16.0]"),
    (1, "schedule.decay_from=100", "schedule.decay_from=100: must be null with schedule.shape=cosine", "schedule.decay_from=null"),
    (1, "schedule=wsd schedule.decay_from=1150", "schedule.decay_from=1150: must be below steps=1150", "schedule.decay_from=1149"),
    (1, "schedule=wsd schedule.decay_from=9 schedule.decay=9", "schedule.decay_from=9: must be null with schedule.decay=9",
     "schedule.decay_from=null"),
    (1, "schedule=wsd schedule.unit=tokens schedule.decay=3000000", "schedule.decay=3000000: must be at most the 2355200 tokens of",
     "schedule.decay=2355200"),
    (1, "model.moe.capacity.schedule=[10,1.5,20]", "model.moe.capacity.schedule=[10.0,1.5,20.0]: must be pairs of a rising",
     "model.moe.capacity.schedule=[10.0,1.5]"),
    (1, "model.moe.capacity.pad=true", "model.moe.capacity.pad=true: must be false without", "model.moe.capacity.pad=false"),
    (1, "model.dropout=1", "model.dropout=1.0: must be in [0, 1)", "model.dropout=0.0"),
    (1, "model.moe.dropout=-0.1", "model.moe.dropout=-0.1: must be in [0, 1)", "model.moe.dropout=0.0"),
    (1, "model.moe.router.jitter=1", "model.moe.router.jitter=1.0: must be in [0, 1)", "model.moe.router.jitter=0.0"),
    (1, "steps=0", "steps=0: must be in [1, inf)", "steps=1"),
    (1, "seed=-4", "seed=-4: must be in [0, 9223372036854775808)", "seed=0"),
    (1, "sequence_length=0", "sequence_length=0: must be in [1, 1073741824]", "sequence_length=1"),
    (1, "optimizer.lr=0", "optimizer.lr=0.0: must be in (0, inf)", "optimizer.lr=0.005"),
    (1, "optimizer.lr=nan", "optimizer.lr=nan: must be in (0, inf)", "optimizer.lr=0.005"),
    (1, "optimizer.lr=inf", "optimizer.lr=inf: must be in (0, inf)", "optimizer.lr=0.005"),
    (1, "optimizer.beta1=1", "optimizer.beta1=1.0: must be in [0, 1)", "optimizer.beta1=0.9"),
    (1, "optimizer.beta2=-0.1", "optimizer.beta2=-0.1: must be in [0, 1)", "optimizer.beta2=0.0"),
    (1, "optimizer.clip_norm=0", "optimizer.clip_norm=0.0: must be in (0, inf)", "optimizer.clip_norm=1.0"),
    (16, "parallel.tensor=16 model.heads=16 model.kv_heads=16 model.width=256 optimizer.states=int8",
     "optimizer.states=int8: a rank holds 16 of 256 columns of layers.0.attention.o.weight, no whole blocks of 32",
     "optimizer.states=bf16"),
    (1, "engine=deepspeed optimizer.states=bf16",
     "optimizer.states=bf16: must be fp32 with engine=deepspeed", "optimizer.states=fp32"),
    (1, "engine=deepspeed optimizer.offload=true",
     "optimizer.offload=true: must be false with engine=deepspeed", "optimizer.offload=false"),
    (1, "schedule.final=1.5", "schedule.final=1.5: must be in [0, 1]", "schedule.final=1.0"),
    (1, "schedule.warmup=-1", "schedule.warmup=-1: must be in [0, inf)", "schedule.warmup=0"),
    (1, "schedule=wsd schedule.decay=1700", "schedule.decay=1700: must be at most steps=1150", "schedule.decay=1150"),
    (1, "data.validation_fraction=1", "data.validation_fraction=1.0: must be in (0, 1)", "data.validation_fraction=0.05"),
    (1, "data.max_failed_files=-1", "data.max_failed_files=-1: must be in [0, inf)", "data.max_failed_files=0"),
    (1, "tokenizer.pieces=10000", "tokenizer.pieces=10000: must be at most model.vocabulary=8192", "tokenizer.pieces=8192"),
    (1, "tokenizer=bytes model.vocabulary=100", "model.vocabulary=100: must be at least 259", "model.vocabulary=259"),
    (1, "evaluate.probes=8 sequence_length=32", "evaluate.probes=8: needs sequence_length of at least 64", "evaluate.probes=0"),
    (1, "evaluate.tasks_every=5", "evaluate.tasks_every=5: needs evaluate.tasks", "evaluate.tasks_every=null"),
    (1, "evaluate.tasks_limit=5", "evaluate.tasks_limit=5: needs evaluate.tasks", "evaluate.tasks_limit=null"),
    (1, "sample.every=5 sample.prompt=''", "sample.every=5: needs sample.prompt or sample.prompts", "sample.every=0"),
    *[(1, "evaluate.tasks=[a]", "evaluate.tasks=[a]: needs lm-eval, which is not installed", "evaluate.tasks=[]")
      for _ in range(find_spec("lm_eval") is None)],
    (1, "tracker.names=[wandd,wandb]", "tracker.names=[wandd,wandb]: may hold wandb, tensorboard", "tracker.names=[wandb]"),
    (1, "sample.top_p=0", "sample.top_p=0.0: must be in (0, 1]", "sample.top_p=0.95"),
    (1, "checkpoint.keep=0", "checkpoint.keep=0: must be in [1, inf)", "checkpoint.keep=1"),
    (1, "checkpoint.resume=atuo", "checkpoint.resume=atuo: must be auto, never or the path", "checkpoint.resume=auto"),
    (1, "checkpoint.resume=nevre", "checkpoint.resume=nevre: must be auto, never or the path", "checkpoint.resume=never"),
    (1, "schedule=wsd schedule.decay=0", "schedule.decay=0: must be in [1, inf)", "schedule.decay=1"),
    (1, "launch.ranks=4", "launch.ranks=4: launch=inline starts no ranks", "launch.ranks=1"),
    (1, "launch.ranks=0", "launch.ranks=0: must be in [1, inf)", "launch.ranks=1"),
]  # fmt: skip


@pytest.mark.fault(28)
@pytest.mark.parametrize(("world", "overrides", "begins", "nearest"), BAD, ids=[f"{world} {words}" for world, words, _, _ in BAD])
def test_bad_combination(world: int, overrides: str, begins: str, nearest: str) -> None:
    message = refused(overrides.split(), world)
    assert message.startswith(begins)
    assert message.endswith(f"; nearest valid: {nearest}")
    for proposal in nearest.split(" or "):
        config = compose([*overrides.split(), *proposal.split()])
        check_config(config, max(world, config.launch.ranks))


GOOD = [
    (1, ""),
    (4, "parallel.expert=4"),
    (4, "parallel.tensor=2 parallel.expert=4 parallel.shard=2"),
    (8, "parallel.tensor=2 parallel.expert=8 batch.micro=2"),
    (8, "parallel.tensor=4 parallel.expert=2 parallel.expert_tensor=4"),
    (8, "parallel.shard=8 parallel.expert_tensor=8 parallel.zero=1"),
    (1000, "parallel.tensor=4 parallel.shard=125 parallel.expert=4 parallel.expert_tensor=2 batch.sequences=250"),
    (6, "parallel.tensor=2 batch.sequences=3"),
    (4, "launch.ranks=4"),
    (4, "parallel.tensor=4 model.hidden=1022"),
    (1, "steps=20"),
    (1, "model=dense model.moe.top_k=9 model.moe.hidden=3 model.width=260 model.heads=10 model.kv_heads=5"),
    (1, "model.head_width=20 model.heads=12"),
    (1, "tokenizer=bytes tokenizer.pieces=9000"),
    (8, "parallel.tensor=8 model.attention.kind=mla model.width=104"),
    (4, "parallel.tensor=4 model.attention.delta.key_heads=3"),
    (1, "model.head_width=10 model.attention.rope.fraction=0.6"),
    (1, "optimizer.clip_norm=null model.moe.capacity.factor=1.25 model.moe.balance.coefficient=0"),
    (1, "model.moe.router.groups=4 model.moe.router.group_score=top2 model.moe.balance.bias_rate=0.001"),
    (1, "model.moe.router.selection=expert_choice model.moe.capacity.pad=true model.moe.capacity.scope=batch"),
    (1, "model.moe.capacity.schedule=[0,1.0,1000,1.5,2000,0] model.moe.capacity.pad=true"),
    (1, "model=dense model.moe.router.groups=3 model.moe.capacity.pad=true"),
    (4096, "parallel.tensor=4 parallel.expert=8 parallel.shard=1024 batch.sequences=1024"),
]


@pytest.mark.parametrize(("world", "overrides"), GOOD)
def test_good_combination(world: int, overrides: str) -> None:
    check_config(compose(overrides.split()), world)


def test_every_number_has_an_interval() -> None:
    numbers = {key for key, (kind, _) in settings().items() if kind in (int, float)}
    assert numbers == set(ranges(Config))


@pytest.mark.parametrize("key", ranges(Config))
def test_every_number_is_checked(key: str) -> None:
    config = Config()
    section, _, name = key.rpartition(".")
    setattr(attrgetter(section)(config) if section else config, name, -1)
    with pytest.raises(ConfigError, match=re.escape(f"{key}=-1: must be in {ranges(Config)[key]}")):
        check_config(config, 1)


def test_resume_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "step_00000100").mkdir()
    assert refused([f"checkpoint.resume={tmp_path}/step_00000100"], 1).endswith("is no checkpoint: it has no manifest.json")
    assert refused([f"checkpoint.resume={tmp_path}/step_00000010"], 1).endswith(f"checkpoint.resume={tmp_path}/step_00000100")


def test_the_run_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused([f"run.dir={tmp_path}/file"], 1).startswith(f"run.dir={tmp_path}/file: must be a folder")


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    assert refused(["data=text", f"data.path={tmp_path}/corpus"], 1).startswith(f"data.path={tmp_path}/corpus must exist")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    check_config(compose(["data=text", f"data.path={tmp_path}/corpus"]), 1)
    assert refused([f"tokenizer.path={tmp_path}/no.model"], 1).startswith(f"tokenizer.path={tmp_path}/no.model must exist")


def test_two_errors_are_told_one_at_a_time() -> None:
    assert refused(["parallel.tensor=5", "parallel.expert=3"], 1).startswith("parallel.tensor=5:")


COMMANDS = [
    (["optimizer.lrr=1"], "optimizer.lrr=1: ", "optimizer.lr=1"),
    (["parallel.expert=3"], "parallel.expert=3: ", "parallel.expert=4 launch=torchrun launch.ranks=4"),
    (["parallel.tensor=3"], "parallel.tensor=3: ", "parallel.tensor=4 launch=torchrun launch.ranks=4"),
    (["batch.sequences=10", "launch=torchrun", "launch.ranks=4"], "batch.sequences=10: ", "batch.sequences=12"),
    (["data=text", "data.path=/no/such/folder"], "data.path=/no/such/folder must exist", "/"),
    (["optimizer._target_=torch.optim.SGD"], "optimizer._target_=torch.optim.SGD: ", "optimizer=adamw"),
]


ENTRIES = [
    pytest.param(module, *case, id=f"{case[0][-1]}-{module}")
    for module in ("tokenyard train", "tokenyard.train --local_rank=0")
    for case in COMMANDS
    if module == "tokenyard train" or "launch=torchrun" not in case[0]  # ranks ignore launch
]


@pytest.mark.fault(28, "each in one line, before torch is imported")
@pytest.mark.parametrize(("module", "overrides", "begins", "nearest"), ENTRIES)
def test_the_command_refuses_quickly(
    module: str, overrides: list[str], begins: str, nearest: str, tmp_path: Path, child_seconds: Callable[[], float]
) -> None:
    command = [sys.executable, "-m", *module.split(), *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert child_seconds() < 5
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tokenyard: {begins}")
    assert done.stderr.endswith(f"{nearest}\n")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def refused(overrides: list[str], world: int) -> str:
    with pytest.raises(ConfigError) as error:
        check_config(compose(overrides), world)
    message = str(error.value)
    assert "\n" not in message
    return message
