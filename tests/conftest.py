"""What the tests of the command line share."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

WORDS = ["the", "list", "of", "a", "dict", "is", "in", "python", "and", "or", "not"]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with ``dense``, ``pruned`` (2:4, a checkpoint of ours) and ``text.txt``, in a vocabulary of 16."""
    from trisparse.sparsity.checkpoint import save
    from trisparse.sparsity.sparsify import sparsify

    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    )
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    sparsify(model, "2:4", "magnitude", progress=False)
    save(model, folder / "pruned", tokenizer=tokenizer, recipe=[])
    (folder / "text.txt").write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(4000)))
    return folder


@pytest.fixture(scope="session")
def trisparse_command():
    """``trisparse_command("retrain", ...)``: standard output of the command, which must end well."""
    from trisparse import cli

    def invoke(*args):
        result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


@pytest.fixture
def trisparse_error(monkeypatch, capsys):
    """``trisparse_error("retrain", ...)``: what the program writes on standard error as it ends with code 2."""
    from trisparse import cli

    def run(*args):
        monkeypatch.setattr("sys.argv", ["trisparse", *(str(arg) for arg in args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        return shown

    return run
