"""PERP's tables: every published number has its cell, and cells are shared where the paper repeats them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trisparse.bench.papers.perp_models import OPT_3B, OPT_13B, has_biases
from trisparse.bench.papers.scale import find_scale
from trisparse.bench.papers.table import find_tables, published_paper

PAPER = find_scale("paper")
TABLES = {table.name.removeprefix("perp-"): table for table in find_tables(["perp"])}
PUBLISHED = published_paper("perp")["tables"]


def cells_of(name, model, scale=PAPER):
    layout = TABLES[name].layout(model, scale)
    return {cell.key: cell for one in layout.every() for cell in (*one.cells, *one.minus)}


def places(numbers):
    return {(row, column) for row, of in numbers["rows"].items() for column in of}


def test_the_tables_that_there_are():
    tables = {f"table-{number}" for number in (1, 2, *range(4, 16))}
    assert set(TABLES) == tables | {"figure-2", "figure-3", "figure-4"}
    assert set(PUBLISHED) == tables  # the figures show no numbers


@pytest.mark.parametrize(("name", "model"), [(name, model) for name, of in PUBLISHED.items() for model in of["models"]])
def test_every_published_number_has_a_cell_and_no_cell_is_without(name, model):
    table = TABLES[name]
    assert model in table.models
    found = table.published(model)
    assert found.same_model
    assert set(table.layout(model, PAPER).entries) == set(found.values) == places(PUBLISHED[name]["models"][model])


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_smaller_scales_have_rows_and_columns_of_the_paper(name, scale):
    model = PUBLISHED[name]["models"]
    published = set().union(*(places(numbers) for numbers in model.values()))
    entries = TABLES[name].layout("facebook/opt-125m", find_scale(scale)).entries
    # which the paper has for the models that have biases, and fit into memory
    assert {place for place in entries if place[0] not in ("Full IMP", "Biases")} <= published


def test_numbers_as_the_paper_has_them():
    first = PUBLISHED["table-1"]["models"][OPT_3B]
    assert first["dense"] == 12.47
    assert first["rows"]["PERP"] == {
        "% trainable": 0.27, "30%": 13.42, "40%": 14.50, "50%": 16.38, "60%": 19.20, "70%": 27.01
    }  # fmt: skip
    assert PUBLISHED["table-9"]["models"]["facebook/opt-66b"]["rows"]["Wanda + PERP"]["2:4"] == 19.58
    assert PUBLISHED["table-10"]["models"]["mistralai/Mistral-7B-v0.1"]["rows"]["SparseGPT + PERP"]["4:8"] == 6.15
    assert PUBLISHED["table-11"]["models"][OPT_13B]["rows"]["Magnitude"]["50%"] == 33.68
    assert PUBLISHED["table-12"]["models"]["ResNet-50"]["rows"]["freeze from the output"]["5 cycles"] == -6.59
    assert PUBLISHED["table-13"]["models"][OPT_13B]["rows"]["norms + head"]["70%"] == 93.26
    assert PUBLISHED["table-14"]["models"][OPT_13B]["rows"]["α = 64"]["rank 128"] == 12.95
    assert PUBLISHED["table-15"]["models"]["facebook/opt-30b"]["rows"]["SparseGPT + PERP"]["80%"] == 20.20


def test_tables_share_what_the_paper_repeats():
    assert cells_of("table-2", OPT_13B).keys() < cells_of("table-9", OPT_13B).keys()
    assert cells_of("table-1", OPT_3B).keys() == cells_of("table-4", OPT_3B).keys()
    # dense, and magnitude at 50% with and without PERP
    assert len(cells_of("table-4", OPT_13B).keys() & cells_of("table-9", OPT_13B).keys()) == 3
    small = find_scale("small")
    groups, retraining = (
        cells_of("table-13", "facebook/opt-125m", small),
        cells_of("table-1", "facebook/opt-125m", small),
    )
    assert len(groups.keys() & retraining.keys()) == 6  # dense, none, biases, + norms, + head, + lora


def test_where_the_paper_s_lora_is():
    opt = next(cell for cell in cells_of("table-1", OPT_3B).values() if cell.retraining and cell.retraining.targets)
    assert opt.retraining.targets == ("q_proj", "v_proj")
    assert opt.retraining.rank == 16
    llama = cells_of("table-5", "meta-llama/Llama-2-7b-hf").values()
    assert all(cell.retraining is None or cell.retraining.targets is None for cell in llama)


def test_the_paper_s_settings():
    cell = next(cell for cell in cells_of("table-9", OPT_3B).values() if cell.retraining)
    assert (cell.texts.train, cell.texts.test, cell.texts.seq_len) == ("c4:train", "wikitext2:test", 2048)
    config = cell.retraining.config(2048)
    assert (config.steps, config.learning_rate) == (1000, "grid")
    assert tuple(config.learning_rates) == (5e-6, 1e-5, 5e-5, 1e-4, 5e-4)
    assert config.batch_size is config.gradient_accumulation is None  # the paper's for the size of the model


def test_biases_are_left_out_where_there_are_none(tiny_llama):
    assert has_biases(OPT_3B)
    assert not has_biases("mistralai/Mistral-7B-v0.1")
    model = str(tiny_llama / "dense")
    assert not has_biases(model)
    layout = TABLES["table-1"].layout(model, find_scale("tiny"))
    assert "Biases" not in {row for row, _ in layout.entries}
    assert "has no biases" in layout.notes[0]
    assert len(TABLES["table-13"].layout(model, find_scale("tiny")).entries) == 2 * 8


def test_image_figures_take_a_folder_of_images_or_digits():
    layout = TABLES["figure-2"].layout("facebook/opt-2.7b", PAPER)
    assert {cell.model for one in layout.every() for cell in one.cells} == {"digits"}
    assert "Not ResNet-50 on ImageNet" in layout.notes[0]
    layout = TABLES["figure-2"].layout("facebook/opt-2.7b", replace(PAPER, images="imagenet"))
    cells = {(cell.model, cell.images) for one in layout.every() for cell in one.cells}
    assert cells == {("microsoft/resnet-50", "imagenet")}
    assert layout.notes == ()
