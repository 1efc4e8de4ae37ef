"""The command retrain in its first form: its options, its YAML file, the dry run, and adapters that stay."""

import dataclasses
import inspect
import json

import pytest
from safetensors.torch import load_file

from trisparse.cli.config_file import read_settings, section_of
from trisparse.cli.retrain import FORMS, retrain
from trisparse.cli.retrain_job import as_options, with_groups
from trisparse.retrain.groups import GROUPS, PRESETS
from trisparse.retrain.perp import PERPConfig
from trisparse.retrain.run_folder import checkpoints
from trisparse.retrain.sparse_lora_config import load_adapters
from trisparse.sparsity.checkpoint import load, read_info
from trisparse.sparsity.mask import check_masks


@pytest.fixture(scope="module")
def invoke(trisparse_command):
    return lambda *args: trisparse_command("retrain", *args)


def test_a_file_and_options_that_win_over_it(tiny_llama, invoke, tmp_path):
    settings = tmp_path / "perp.yaml"
    settings.write_text(
        "# YAML 1.1 reads 1e-2 as a string\nlearning_rate: grid\nlearning_rates: [1e-4, 1e-2]\ngrid_steps: 2\n"
        "groups: [norms, lora]\nsteps: 50\nseq_len: 32\nrank: 2\nguard_every: 2\n"
        f"data: missing.txt\nvalidation: {tiny_llama / 'text.txt'}\nvalidation_windows: 4\n"
        f"teacher: {tiny_llama / 'dense'}\nout: {tmp_path / 'r'}\n"
    )
    options = ["--data", tiny_llama / "text.txt", "--steps", 4, "--batch-size", 2, "--temperature", 3]
    saved = ["--output-dir", tmp_path / "checkpoints", "--save-steps", 2, "--json"]
    out = json.loads(invoke(tiny_llama / "pruned", "--config", settings, *options, *saved))
    assert (out["steps"], out["batch"], list(out["trainable"])) == (4, [2, 4, 1], ["norms", "lora"])
    assert (out["learning_rate"], list(out["grid"])) == (1e-2, ["0.0001", "0.01"])
    assert out["validation_loss"][1] < out["validation_loss"][0]
    assert len(checkpoints(tmp_path / "checkpoints")) == 2
    check_masks(load(tmp_path / "r"))
    (step,) = read_info(tmp_path / "r")["recipe"]
    assert (step["rank"], step["steps"], step["temperature"], step["learning_rate"]) == (2, 4, 3, 1e-2)
    assert step["teacher"] == str(tiny_llama / "dense")
    assert step["validation"] == str(tiny_llama / "text.txt")

    again = ["--resume", "--out", tmp_path / "again"]
    resumed = json.loads(invoke(tiny_llama / "pruned", "--config", settings, *options, *again, *saved))
    assert resumed["losses"] == out["losses"]
    assert resumed["resumed_at"] == 4


def test_one_command_starts_a_run_and_goes_on_with_it(tiny_llama, invoke, tmp_path, capsys):
    short = ["--data", tiny_llama / "text.txt", "--steps", 2, "--seq-len", 16, "--groups", "norms", "--json"]
    command = [tiny_llama / "pruned", *short, "--resume", "--output-dir", tmp_path / "run", "--out", tmp_path / "r"]
    assert json.loads(invoke(*command))["resumed_at"] == 0
    assert json.loads(invoke(*command))["resumed_at"] == 2


def test_the_recipe_holds_what_the_run_used(tiny_llama, invoke, tmp_path):
    short = ["--data", tiny_llama / "text.txt", "--steps", 2, "--seq-len", 16, "--groups", "norms"]
    invoke(tiny_llama / "pruned", *short, "--out", tmp_path / "r")
    (step,) = read_info(tmp_path / "r")["recipe"]
    unused = {"learning_rates", "grid_steps", "temperature", "distillation_weight", "rank", "alpha", "variant"}
    assert not unused & step.keys()
    assert (step["groups"], step["learning_rate"], step["steps"]) == (["biases", "norms"], 5e-4, 2)


def test_dry_run_reads_no_data_and_writes_nothing(tiny_llama, invoke):
    before = sorted(path.name for path in tiny_llama.rglob("*"))
    out = json.loads(invoke(tiny_llama / "pruned", "--dry-run", "--json", "--steps", 7, "--seq-len", 32))
    assert out["steps"] == 7
    assert out["tokens"] == 7 * 2 * 4 * 32
    assert set(out["memory"]) == {"weights", "gradients", "optimizer", "activations", "total"}
    assert sum(out["trainable"].values()) / out["total_parameters"] == out["trainable_share"]
    shown = invoke(tiny_llama / "pruned", "--dry-run", "--teacher", tiny_llama / "dense", "--seq-len", 32)
    assert "on each device, estimated" in shown
    assert "norms" in shown
    full = ["--dry-run", "--groups", "full", "--seq-len", 32, "--output-dir", tiny_llama / "run", "--json"]
    assert list(json.loads(invoke(tiny_llama / "pruned", *full))["trainable"]) == ["full"]
    grid = ["--dry-run", "--learning-rate", "grid", "--seq-len", 32, "--validation", "no file", "--json"]
    assert json.loads(invoke(tiny_llama / "pruned", *grid))["grid_steps"] == 5 * 20
    assert sorted(path.name for path in tiny_llama.rglob("*")) == before


def test_a_group_alone_and_the_preset_of_its_name(tiny_llama, invoke):
    def trained(*options):
        out = json.loads(invoke(tiny_llama / "pruned", "--dry-run", "--json", "--seq-len", 16, *options))
        return list(out["trainable"])

    assert trained("--groups", "norms") == ["biases", "norms"]
    assert trained("--groups", "only:norms") == ["norms"]
    assert trained("--groups", "lora") == ["lora"]
    assert trained("--groups", "only:head, norms") == ["norms", "head"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("norms", "norms"),
        ("only:norms", ("norms",)),
        (("only:norms", "head"), ("norms", "head")),
        ("head", ("head",)),
        ("perpp", "perpp"),
        (("norms", "head"), ("norms", "head")),
    ],
)
def test_groups(value, found):
    assert with_groups({"groups": value, "rank": 2}, PRESETS, GROUPS) == {"groups": found, "rank": 2}


def test_full_retraining(tiny_llama, invoke, tmp_path):
    short = ["--steps", 2, "--batch-size", 2, "--seq-len", 32, "--data", tiny_llama / "text.txt", "--json"]
    full = json.loads(invoke(tiny_llama / "pruned", "--groups", "full", *short, "--out", tmp_path / "full"))
    assert full["trainable"] == {"full": full["total_parameters"]}
    check_masks(load(tmp_path / "full"))
    head = ["--no-merge", "--groups", "head", "--rank", 2]
    invoke(tiny_llama / "pruned", *head, *short, "--out", tmp_path / "head")
    assert {name.rpartition(".lora_")[2] for name in load_file(tmp_path / "head" / "adapter_model.safetensors")} == {
        "A.weight", "B.weight",
    }  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tiny_llama, invoke, tmp_path_factory):
    """The folder that ``--no-merge`` writes, at the second time, and its command's output."""
    folder = tmp_path_factory.mktemp("adapters") / "adapters"
    short = ["--steps", 2, "--batch-size", 2, "--seq-len", 32, "--data", tiny_llama / "text.txt", "--json"]
    options = ["--variant", "lora", "--no-merge", "--groups", "norms,head,lora", "--targets", "q_proj,v_proj"]
    command = [tiny_llama / "pruned", *options, *short, "--rank", 2, "--learning-rate", 1e-2, "--out", folder]
    invoke(*command)
    (folder / "stale").touch()
    return folder, json.loads(invoke(*command))


def test_adapters_that_stay(tiny_llama, adapters):
    folder, out = adapters
    assert not (folder / "stale").exists()  # an earlier result is replaced as a whole
    assert out["trainable"]["lora"] == 2 * 2 * 2 * (32 + 32)
    found = load_adapters(load(tiny_llama / "pruned"), folder)
    assert sum(p.numel() for name, p in found.named_parameters() if "proj.lora_" in name) == out["trainable"]["lora"]
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "base_layer" in name or "embed" in name]  # noqa: SIM118
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "model.safetensors").exists()
    info = json.loads((folder / "trisparse_adapters.json").read_text())
    assert [step["step"] for step in info["recipe"]] == ["retrain"]


def test_a_folder_of_adapters_is_evaluated(tiny_llama, adapters, trisparse_command, trisparse_error, tmp_path):
    folder, _ = adapters
    text = ["--data", tiny_llama / "text.txt", "--seq-len", 32, "--json"]
    with_adapters = json.loads(trisparse_command("eval", folder, *text))["perplexity"]
    without = json.loads(trisparse_command("eval", tiny_llama / "pruned", *text))["perplexity"]
    assert with_adapters < 0.99 * without
    for command in (["inspect", folder], ["retrain", folder, *text[:2], "--out", tmp_path / "new"]):
        assert "holds adapters and not a whole model" in trisparse_error(*command)


def test_adapters_do_not_replace_their_model(tiny_llama, trisparse_error):
    text = tiny_llama / "text.txt"
    options = ["--data", text, "--no-merge", "--out", tiny_llama / "pruned"]
    assert "are one inside the other" in trisparse_error("retrain", tiny_llama / "pruned", *options)
    check_masks(load(tiny_llama / "pruned"))


def test_every_setting_of_every_form_is_an_option():
    from trisparse.cli.config_file import place_of
    from trisparse.cli.retrain import _of

    options = set(inspect.signature(retrain).parameters)
    assert {field.name for field in dataclasses.fields(PERPConfig)} <= options
    for form in FORMS:
        section = _of(form).section()
        places = {place for option in options if (place := place_of(option, section))}
        for name, kind in section.items():
            nested = kind if isinstance(kind, dict) else {None: kind}
            for key in nested:
                place = (name,) if key is None else (name, key)
                assert place in places, (form, place)


def test_settings_of_a_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        "learning_rate: 5e-4\nlearning_rates: [5e-6, 1.0e-3]\noutput_dir: '1e3'\nsave_steps: 2\nsteps: 1e3\n"
        "grid_steps: 20.0\ntargets: q_proj, v_proj\nreport_to: wandb\ngroups: perp\nbatch_size:\n"
    )
    settings = read_settings(file, section_of(PERPConfig))
    assert settings == {
        "learning_rate": 5e-4,
        "learning_rates": (5e-6, 1e-3),
        "output_dir": "1e3",
        "save_steps": 2,
        "steps": 1000,
        "grid_steps": 20,
        "targets": ("q_proj", "v_proj"),
        "report_to": ("wandb",),
        "groups": "perp",
        "batch_size": None,
    }
    assert isinstance(settings["steps"], int)
    assert PERPConfig(**settings).learning_rate == 5e-4
    file.write_text("learning_rates: 1e-4\n")
    assert read_settings(file, section_of(PERPConfig)) == {"learning_rates": (1e-4,)}
    file.write_text("# nothing\n")
    assert read_settings(file, section_of(PERPConfig)) == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("lerning_rate: 1\n", r"'lerning_rate' is no setting, did you mean 'learning_rate'\?"),
        ("zzz: 1\n", r"'zzz' is no setting, there are groups, variant"),
        ("3: 1\n", "3' is no setting"),
        ("- steps\n", "must hold keys and values"),
        ("steps\n", "must hold keys and values"),
        ("steps: [1\n", "is no YAML"),
        ("groups: 5\n", "settings.yaml: groups must be text, got 5"),
        ("groups: [norms, 5]\n", "groups must be text, got 5"),
        ("targets: 5\n", "targets must be text, got 5"),
        ("report_to: 5\n", "report_to must be text, got 5"),
        ("output_dir: true\n", "output_dir must be text, got True"),
        ("rank: [1, 2]\n", r"rank must be one value, got \[1, 2\]"),
        ("rank: {a: 2}\n", "rank must be one value, got {'a': 2}"),
        ("report_to:\n", "settings.yaml: report_to has no value: give one, or leave it out"),
        ("learning_rates: [1e-4, null]\n", "learning_rates has no value"),
        ("rank: ~\n", "rank has no value"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, match):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_settings(file, section_of(PERPConfig))


def test_a_missing_file_and_one_that_is_no_text(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "missing.yaml", section_of(PERPConfig))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no YAML"):
        read_settings(tmp_path / "binary.yaml", section_of(PERPConfig))


def test_settings_as_options():
    message = "variant='lora' cannot: merge=False, dtype='auto', seq_len=65, resume='auto', merge=False, other=True"
    names = {"variant", "merge", "dtype", "seq_len", "resume"}
    assert as_options(message, names) == "--variant lora, --no-merge, --dtype auto, --seq-len 65, --resume"
    assert as_options("nothing of the kind", names) == ""


NEW = ["--data", "TEXT", "--out", "NEW"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "retrain needs --data and --out"),
        (["--data", "TEXT"], "retrain needs --data and --out"),
        ([*NEW, "--learning-rate", "big"], "learning_rate must be a number above 0"),
        ([*NEW, "--learning-rate", "-1"], "learning_rate must be a number above 0"),
        ([*NEW, "--learning-rate", "grid"], "pass validation"),
        ([*NEW, "--dtype", "fp16", "--device", "cpu"], "needs a model on CUDA"),
        ([*NEW, "--resume"], "needs output_dir: where are the checkpoints?\nas options: --resume\n"),
        ([*NEW, "--variant", "lora"], "as options: --variant lora, --no-merge\n"),
        ([*NEW, "--config", "YAML"], "did you mean 'steps'?"),
        ([*NEW, "--config", "missing.yaml"], "missing.yaml"),
        ([*NEW, "--steps", "many"], "steps must be an integer of at least 1, got 'many'"),
        ([*NEW, "--seq-len", "65"], "maximum of 64 positions"),
        ([*NEW, "--output-dir", "NEW"], "must lie apart"),
        ([*NEW, "--output-dir", "NEW/run"], "must lie apart"),
        (["--data", "TEXT", "--out", "NEW/result", "--output-dir", "NEW"], "must lie apart"),
        ([*NEW, "--output-dir", "NEW2", "--report-to", "slate"], "report_to must be of "),
        (["--dry-run", "--seq-len", "65"], "maximum of 64 positions"),
        (["--dry-run", "--groups", "biases"], "nothing to train"),
        (["--dry-run", "--learning-rate", "grid"], "pass validation"),
        (["--dry-run", "--report-to", "tensorboard"], "report_to=tensorboard needs output_dir"),
        (["--dry-run", "--save-total-limit", "0"], "save_total_limit must be"),
        (["--dry-run", "--groups", "lora,heads"], "groups must be"),
        (["--dry-run", "--groups", "perpp"], "groups must be one of biases, norms, linear-probing, perp, full"),
        (["--dry-run", "--groups", "only:heads"], "groups must be one or more of biases, norms, head, lora, full"),
        (["--dry-run", "--groups", "bn-recalibrate"], "is for image classifiers"),
        (["--dry-run", "--cycles", "3"], "--cycles is for --form cycles, not for perp"),
        (["--dry-run", "--samples", "3"], "--samples is for --form cycles or reconstruct, not for perp"),
        (["--dry-run", "--form", "imp"], "form must be one of perp, cycles, reconstruct, vision, got 'imp'"),
    ],
)
def test_errors_are_short(tiny_llama, tmp_path, args, message, trisparse_error):
    (tmp_path / "wrong.yaml").write_text("step: 3\n")
    names = {"TEXT": tiny_llama / "text.txt", "YAML": tmp_path / "wrong.yaml"}
    args = [tmp_path / arg.replace("NEW", "new", 1) if arg.startswith("NEW") else names.get(arg, arg) for arg in args]
    if "--dry-run" not in args and "--seq-len" not in args:
        args = [*args, "--seq-len", "32"]
    shown = trisparse_error("retrain", tiny_llama / "pruned", *args)
    assert message in shown
    assert shown.startswith("error: ")
    assert not (tmp_path / "new").exists()


def test_a_logger_that_is_not_installed(tiny_llama, tmp_path, trisparse_error, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["wandb"])
    new = ["--data", tiny_llama / "text.txt", "--out", tmp_path / "new", "--output-dir", tmp_path / "run"]
    shown = trisparse_error("retrain", tiny_llama / "pruned", *new, "--report-to", "wandb,tensorboard")
    assert "tensorboard is not installed here" in shown
