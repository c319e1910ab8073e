"""An evaluation of a run: the validation pass, the probes and the tasks that its settings name."""

from ..evaluation import Evaluation, evaluate_session
from ..session import Session
from .probes import run_probes
from .scorer import Scorer
from .tasks import run_tasks


def judge(session: Session, tasks: bool = True) -> Evaluation:
    """Returns the results, with those of `tasks` if they are loaded. Changes nothing of the training. Collective."""
    evaluation, scores, settings = evaluate_session(session), dict[str, float](), session.config.evaluate
    if settings.probes:
        for name, found in run_probes(session, scorer_of(session)).items():
            scores |= {f"probes/{name}": found.accuracy, f"probes/{name}_chance": found.chance}
    if session.tasks is not None and tasks:
        results = run_tasks(session.tasks, scorer_of(session), settings.tasks_limit)
        scores |= {f"tasks/{name}": value for name, value in results.items()}
    return evaluation._replace(scores=scores)


def scorer_of(session: Session) -> Scorer:
    """Returns what scores and continues texts with the weights of this step."""
    return Scorer(session.parallel, session.data.tokenizer, session.config.sequence_length, session.micro)
