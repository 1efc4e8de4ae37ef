"""Accuracy on tasks: a task of twenty questions, answered by lm-eval and by hand."""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trisparse.sparsity.checkpoint import save
from trisparse.sparsity.compression import compress
from trisparse.sparsity.mask import masks_sha256
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.zero_shot import PAPER_TASKS, _manager, zero_shot
from trisparse.sparsity.zero_shot_report import TaskResult, ZeroShotReport

pytest.importorskip("lm_eval")

WORDS = ["the", "list", "of", "a", "dict", "is", "in", "python", "and", "or", "not", "<s>"]
IDS = {word: i for i, word in enumerate(["<unk>", *WORDS])}
TASK = """
task: TASKNAME
dataset_path: json
dataset_kwargs: {data_files: {train: FILE, test: FILE}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 3.0}
"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<s>")


@pytest.fixture(scope="module")
def pruned() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=16, max_position_embeddings=32, initializer_range=0.3))
    sparsify(model, "2:4", "magnitude", progress=False)
    return model.eval()


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    draw = random.Random(0)
    answers = [" ".join(draw.choices(WORDS[:-1], k=1 + i % 3)) for i in range(12)]
    asked = [
        {
            "question": " ".join(draw.choices(WORDS[:-1], k=draw.randint(2, 7))),
            "choices": draw.sample(answers, 3),
            "answer": draw.randrange(3),
        }
        for _ in range(20)
    ]
    assert all(len(set(map(len, map(str.split, row["choices"])))) > 1 for row in asked[:1])
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, questions: list[dict[str, Any]]) -> Path:
    """Task files: ``questions``, the same task under the name ``boolq``, and some that ask for trouble."""
    made = tmp_path_factory.mktemp("tasks")
    file = made / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    task = TASK.replace("FILE", str(file))
    (made / "questions.yaml").write_text(task.replace("TASKNAME", "questions"))
    (made / "boolq.yaml").write_text(task.replace("TASKNAME", "boolq"))
    (made / "fixed.yaml").write_text(task.replace("TASKNAME", "fixed") + "num_fewshot: 0\n")
    (made / "hub.yaml").write_text(task.replace("TASKNAME", "hub").replace("metric: acc_norm", "metric: bertscore"))
    (made / "absent.yaml").write_text(TASK.replace("FILE", str(made / "none")).replace("TASKNAME", "absent"))
    return made


def by_hand(model: Any, questions: list[dict[str, Any]]) -> tuple[list[bool], list[bool]]:
    """Whether each question is answered rightly, one answer at a time: by log-likelihood, and by that per byte."""
    right, right_by_length = [], []
    for row in questions:
        scores, per_byte = [], []
        for choice in row["choices"]:
            question, answer = ([IDS[word] for word in text.split()] for text in (row["question"], choice))
            ids = torch.tensor([question + answer])
            with torch.no_grad():
                log_p = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[len(question) - 1 + i, word]) for i, word in enumerate(answer)))
            per_byte.append(scores[-1] / len(choice))
        right.append(max(range(3), key=scores.__getitem__) == row["answer"])
        right_by_length.append(max(range(3), key=per_byte.__getitem__) == row["answer"])
    return right, right_by_length


def test_accuracy_is_that_of_the_log_likelihoods(
    pruned: Any, tokenizer: Any, questions: list[dict[str, Any]], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random.seed(5)
    before, state, logged = random.getstate(), torch.get_rng_state(), logging.getLogger("lm_eval").handlers[:]
    pruned.train()
    report = zero_shot(pruned, tokenizer, "questions", include_path=folder, batch_size=3, progress=False)
    assert pruned.training
    assert tokenizer.pad_token is None
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("lm_eval").handlers == logged
    assert capfd.readouterr().err == ""
    right, by_length = by_hand(pruned.eval(), questions)
    assert right != by_length, "the two metrics must differ for this test to tell them apart"
    (task,) = report.tasks
    assert task.metrics == {"acc": pytest.approx(sum(right) / 20), "acc_norm": pytest.approx(sum(by_length) / 20)}
    deviation = torch.tensor(right, dtype=torch.float64).std(correction=1)
    assert task.standard_errors["acc"] == pytest.approx(float(deviation) / 20**0.5)
    assert (task.questions, task.num_fewshot, task.version) == (20, 0, 3.0)
    assert report.mean == task.metrics["acc"]
    assert (report.sparsity, report.masks_sha256, report.truncated) == (0.5, masks_sha256(pruned), 0)
    assert report.versions["lm_eval"]
    assert json.loads(report.to_json())["versions"] == report.versions


def test_a_compressed_model_scores_the_same(
    pruned: Any, tokenizer: Any, questions: list[dict[str, Any]], folder: Path
) -> None:
    import copy

    model = copy.deepcopy(pruned)
    compress(model)
    options: dict[str, Any] = {"include_path": folder, "progress": False}
    assert zero_shot(model, tokenizer, "questions", **options).tasks == (
        zero_shot(pruned, tokenizer, ["questions"], **options).tasks
    )
    first = zero_shot(model, tokenizer, "questions", limit=7, **options)
    assert first.tasks[0].questions == 7
    assert first.tasks[0].metrics["acc"] == pytest.approx(sum(by_hand(pruned, questions)[0][:7]) / 7)


def test_examples_are_chosen_by_the_seed_and_cut_to_the_model(pruned: Any, tokenizer: Any, folder: Path) -> None:
    options: dict[str, Any] = {"include_path": folder, "progress": False, "num_fewshot": 8}
    one = zero_shot(pruned, tokenizer, "questions", **options)
    assert one.tasks[0].num_fewshot == 8
    assert one.truncated > 0  # eight examples are more than 32 tokens
    assert f"{one.truncated} answers to questions that were cut" in str(one)
    assert zero_shot(pruned, tokenizer, "questions", **options).tasks == one.tasks
    others = [zero_shot(pruned, tokenizer, "questions", seed=seed, **options).tasks for seed in (1, 2, 3)]
    assert any(tasks != one.tasks for tasks in others)


def test_own_tasks_go_before_those_of_lm_eval(pruned: Any, tokenizer: Any, folder: Path) -> None:
    report = zero_shot(pruned, tokenizer, "questions, boolq", include_path=folder, limit=5, progress=False)
    assert [(task.name, task.version) for task in report.tasks] == [("questions", 3.0), ("boolq", 3.0)]
    assert report.mean == report.tasks[0].metrics["acc"]


def test_the_tasks_of_the_papers_are_found_without_reading_all_others() -> None:
    from lm_eval.tasks import TaskManager

    manager = _manager(TaskManager, list(PAPER_TASKS), None)
    assert set(PAPER_TASKS) <= set(manager.all_tasks)
    assert len(manager.all_tasks) < 100


def test_the_set_of_the_papers_is_seven_tasks(
    pruned: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append(path)
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"data of task 'boolq': Couldn't reach the hub\..*HF_HOME.*dataset_path: json.*--include-path"
    for tasks in ("zero-shot", "perp", PAPER_TASKS):
        with pytest.raises(ConnectionError, match=message):
            zero_shot(pruned, tokenizer, tasks, progress=False)
    assert asked == ["aps/super_glue"] * 3
    assert PAPER_TASKS == ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ""}, ValueError, "tasks must be names of tasks"),
        ({"tasks": "questions", "limit": 0}, ValueError, "limit must be at least 1, got 0"),
        ({"tasks": "questions", "num_fewshot": -1}, ValueError, "num_fewshot must be at least 0"),
        ({"tasks": "questions", "batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"tasks": "questions", "include_path": "none"}, ValueError, "include_path must be a folder"),
        ({"tasks": "fixed", "num_fewshot": 2}, ValueError, "num_fewshot is 2, but the task 'fixed' fixes it to 0"),
        ({"tasks": "hub"}, ValueError, "the metric 'bertscore', which is code on the Hugging Face hub"),
        ({"tasks": "absent"}, ConnectionError, "cannot load the data of task 'absent'"),
    ],
)
def test_what_cannot_be_done_is_refused(
    pruned: Any, tokenizer: Any, folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    import evaluate

    load = evaluate.load
    with pytest.raises(error, match=message):
        zero_shot(pruned, tokenizer, **{"include_path": folder, "progress": False, **options})
    assert evaluate.load is load


def test_an_unknown_task_is_named(
    pruned: Any, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import lm_eval.tasks.manager

    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "none.py"))  # no 13 s for all its tasks
    with pytest.raises(ValueError, match=f"lm-eval has no task 'bolq', nor has {folder}"):
        zero_shot(pruned, tokenizer, "bolq", include_path=folder)


def test_a_tokenizer_without_begin_and_end_is_refused(pruned: Any, folder: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(IDS, unk_token="<unk>")))
    with pytest.raises(ValueError, match="bos_token or eos_token"):
        zero_shot(pruned, bare, "questions", include_path=folder)


def test_without_lm_eval_the_error_says_what_to_install(
    pruned: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ImportError, match=r"pip install 'trisparse\[eval\]'"):
        zero_shot(pruned, tokenizer, "boolq")


def test_a_report_averages_acc_and_nothing_else() -> None:
    def report(*metrics: dict[str, float]) -> ZeroShotReport:
        tasks = [TaskResult(f"task{i}", 1, 10, 0, values, {"acc": 0.1}) for i, values in enumerate(metrics)]
        return ZeroShotReport(tasks, None, 0, 0, "Llama", 0.5, "ab", {"lm_eval": "0.4.13"}, 1.0)

    both = report({"acc": 0.25, "acc_norm": 0.5}, {"acc": 0.5})
    assert both.mean == 0.375
    assert both.to_dict()["mean"] == 0.375
    shown = str(both)
    assert "25.00% ± 10.00%" in shown
    assert "37.50%" in shown
    assert "lm-eval 0.4.13, sparsity 50.00%" in shown
    assert report({"acc": 0.25}, {"exact_match": 0.5}).mean is None
    assert "0.5" in str(report({"exact_match": 0.5}))


def test_the_command_evaluates_a_checkpoint(
    pruned: Any, tokenizer: Any, folder: Path, tmp_path: Path, trisparse_command: Any, trisparse_error: Any
) -> None:
    save(pruned, tmp_path / "pruned", tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text("the list of a dict is in python " * 40)
    options = ["--tasks", "questions", "--include-path", folder, "--limit", 6, "--batch-size", 2]
    shown = json.loads(trisparse_command("eval", tmp_path / "pruned", *options, "--json"))
    assert "perplexity" not in shown
    assert shown["zero_shot"]["tasks"][0]["questions"] == 6
    assert shown["zero_shot"]["masks_sha256"] == masks_sha256(pruned)
    assert shown["trisparse"] == shown["zero_shot"]["versions"]["trisparse"]
    data = ["--data", tmp_path / "text.txt", "--seq-len", 16]
    printed = trisparse_command("eval", tmp_path / "pruned", *options, *data)
    assert printed.startswith("perplexity ")
    assert "accuracy on 6 questions of each task" in printed
    assert "nothing to measure: pass --data" in trisparse_error("eval", tmp_path / "pruned")
