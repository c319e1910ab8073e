"""The forward pass alone, for what heads and hooks keep of it: no losses of a step, no statistics."""

from torch import Tensor

from ..moe.model import HeadLoss
from ..parallel.apply import Parallel
from ..parallel.pipeline.p2p import StageMessage
from ..parallel.pipeline.run import run_forward
from ..parallel.pipeline.stage_model import between_stages
from ..parallel.progress import in_phase
from .batch import Rows


@in_phase("forward")
def forward_heads(parallel: Parallel, rows: Rows, valid_BS: Tensor, heads: list[HeadLoss]) -> None:
    """Runs the model on rows for what `heads` and hooks keep, without the losses of a step. `valid_BS`: see Transformer.forward."""
    pipeline = parallel.pipeline
    if pipeline is None:
        parallel.model(rows.ids, valid_BS, head_losses=heads, documents_BS=rows.documents)
        return

    def run_stage(stage: int, received: StageMessage | None) -> StageMessage:
        given = {"stage": stage, "received": received, "head_losses": heads, "documents_BS": rows.documents}
        return parallel.model(rows.ids, valid_BS, **given)[0]

    likes = between_stages(parallel.model, parallel.mesh, pipeline, rows.ids)
    run_forward(pipeline, {stage: like._replace(pooled_LBC=None) for stage, like in likes.items()}, run_stage)
