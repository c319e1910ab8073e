"""tokenyard/plan/claims.py and `tokenyard audit`: claims that are right, wrong and silent."""

import json
from pathlib import Path

import pytest
from tokenyard.launch.main import main
from tokenyard.plan.claims import Answer, audit, left_out
from tokenyard.train.config.compose import compose


def answers(claim: str, model: str) -> dict[str, Answer]:
    return {answer.question: answer for answer in audit(claim, compose([f"model={model}"]).model)}


def test_a_true_claim_agrees() -> None:
    found = answers("A 46.7B sparse mixture-of-experts, 12.9B active per token, top-2 of 8 experts", "mixtral_8x7b")
    for question in ("dense or MoE", "total parameters", "active per token", "routing"):
        assert found[question].verdict == "agrees", question
    assert left_out(list(found.values())) == ["memory", "compute", "training tokens", "evidence", "deployment"]


@pytest.mark.parametrize(
    ("claim", "model", "question", "verdict"),
    [
        ("Mixtral 8x7B", "mixtral_8x7b", "total parameters", "differs: 56.0B if multiplied; attention and embedding exist once"),
        ("Mixtral 8x7B has 56B parameters", "mixtral_8x7b", "total parameters", "differs by +20%"),
        ("a 3B model", "qwen3_30b_a3b", "total parameters", "differs by -90%: near to what a token uses, not to what is held"),
        ("a dense model", "gpt_oss_20b", "dense or MoE", "differs: the model is MoE in 24 of 24 layers"),
        ("faster than dense models", "gpt_oss_20b", "dense or MoE", "not stated"),
        ("a MoE", "dense", "dense or MoE", "differs: the model is dense"),
        ("671B with 52B activated", "deepseek_v3", "active per token", "differs by +38%"),
        ("5.1B active parameters", "gpt_oss_120b", "active per token", "agrees, without embedding or head"),
        ("64 experts, top-8", "qwen3_30b_a3b", "routing", "differs: 128 experts"),
        ("128 experts, top-6", "qwen3_30b_a3b", "routing", "differs: top-8"),
        ("runs in 24 GB", "qwen3_30b_a3b", "memory", "holds the weights in int4, cache and runtime not counted"),
        ("runs in 24 GB", "mixtral_8x7b", "memory", "differs: not even int4 weights fit, without keeping experts elsewhere"),
        (
            "10x faster than dense",
            "qwen3_30b_a3b",
            "compute",
            "differs: FLOPs alone allow at most 9.1 x over a dense model of equal size",
        ),
        ("on one RTX 4090", "mixtral_8x7b", "deployment", "differs: does not fit in bf16, fp8, int4"),
        ("on 8 x H200", "deepseek_v3", "deployment", "fits in fp8"),
        ("14.8 trillion tokens", "deepseek_v3", "training tokens", "394 per active parameter"),
        ("see arXiv and MMLU", "tiny", "evidence", "named; read it"),
        ("the best model", "tiny", "evidence", "no source, benchmark or log is named"),
    ],
)
def test_what_a_claim_gets_wrong(claim: str, model: str, question: str, verdict: str) -> None:
    assert answers(claim, model)[question].verdict.startswith(verdict)


def test_numbers_of_tokens_and_money_are_no_parameters() -> None:
    found = answers("trained on 15T tokens for $5.6M", "deepseek_v3")
    assert found["total parameters"].claim == "" and found["training tokens"].claim == "15T tokens"


def test_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tmp_path / "card.json"
    card.write_text(
        json.dumps({"total_parameters": 671e9, "active_parameters": 37e9, "routing": {"experts": 256, "selection": "top-8"}})
    )
    assert main(["audit", str(card), "deepseek_v3", "--json"]) == 0
    verdicts = {answer["question"]: answer["verdict"] for answer in json.loads(capsys.readouterr().out)["answers"]}
    assert {verdicts[question] for question in ("total parameters", "active per token", "routing")} == {"agrees"}


def test_the_page_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "Mixtral 8x7B has 56B parameters and runs on a single RTX 4090", "mixtral_8x7b"]) == 1
    page = capsys.readouterr().out
    assert "  claimed         56B: differs by +20%" in page
    assert page.endswith("left out          active per token, routing, memory, compute, training tokens, evidence\n")
    assert max(map(len, page.splitlines())) <= 120
    assert main(["audit", "/no/card.json", "tiny"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
