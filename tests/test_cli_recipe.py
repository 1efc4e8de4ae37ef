"""The card and the recipe of what the commands write: the command, and the perplexity that it measured."""

import pytest

from trisparse.cli.options import typed_command
from trisparse.sparsity.checkpoint import load, read_info, save


def test_the_card_of_a_retrained_model_has_its_commands_and_its_perplexity(tiny_llama, tmp_path, trisparse_command):
    text = tiny_llama / "text.txt"
    trisparse_command("prune", tiny_llama / "dense", "--out", tmp_path / "p", "--sparsity", "50% rows")
    data = ["--data", text, "--validation", text, "--validation-windows", 4, "--seq-len", 9]
    trisparse_command("retrain", tmp_path / "p", *data, "--steps", 2, f"--out={tmp_path / 'r'}")
    prune, retrain = read_info(tmp_path / "r")["recipe"]
    assert prune["command"] == "trisparse prune dense --out p --sparsity '50% rows'"
    assert retrain["command"] == (
        "trisparse retrain p --data text.txt --validation text.txt --validation-windows 4 --seq-len 9 --steps 2 --out=r"
    )
    assert 1 < retrain["perplexity"] < 50
    card = (tmp_path / "r" / "README.md").read_text()
    assert f"```sh\n{prune['command']}\n{retrain['command']}\n```" in card
    assert f"## Perplexity\n\n- {retrain['perplexity']:.3f} on {text}\n" in card
    assert typed_command() is None  # outside of the program


@pytest.mark.parametrize("form", ["cycles", "reconstruct"])
def test_every_form_of_retraining_says_its_command(tiny_llama, tmp_path, trisparse_command, form):
    more = {
        "cycles": ["--sparsity", "50%", "--cycles", 1, "--method", "magnitude"],
        "reconstruct": ["--dense", tiny_llama / "dense", "--samples", 2],
    }[form]
    model = tiny_llama / ("dense" if form == "cycles" else "pruned")
    options = ["--data", tiny_llama / "text.txt", "--steps", 1, "--seq-len", 16, "--out", tmp_path / "r"]
    trisparse_command("retrain", model, "--form", form, *options, *more)
    step = read_info(tmp_path / "r")["recipe"][-1]
    assert step["command"].startswith(f"trisparse retrain {model.name} --form {form} --data text.txt --steps 1 ")
    assert step["command"] in (tmp_path / "r" / "README.md").read_text()


def test_a_streamed_prune_says_its_command(tiny_llama, tmp_path, trisparse_command):
    trisparse_command("prune", tiny_llama / "dense", "--stream", "--out", tmp_path / "s", "--sparsity", "2:4")
    (step,) = read_info(tmp_path / "s")["recipe"]
    assert step["command"] == "trisparse prune dense --stream --out s --sparsity 2:4"
    save(load(tmp_path / "s"), tmp_path / "c", recipe=[step])
    assert step["command"] in (tmp_path / "c" / "README.md").read_text()
