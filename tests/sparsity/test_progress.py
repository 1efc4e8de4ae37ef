import pytest
from transformers.utils import logging

from trisparse.sparsity.progress import counting_bar, progress_bar, quiet_transformers


@pytest.mark.parametrize("shown", [True, False])
def test_transformers_progress_bars_are_put_back(shown):
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        with quiet_transformers():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() is shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_nothing_is_drawn_where_there_is_no_terminal(capsys):
    with progress_bar("work", 2) as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_the_steps(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("work", 2) as advance:
        advance(2)
    assert "2/2" in capsys.readouterr().err
    with progress_bar("work", 2, enabled=False) as advance:
        advance(2)
    assert capsys.readouterr().err == ""


def test_counted_work_shows_done_and_total(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with counting_bar("windows") as progress:
        progress(3, 8)
    assert "3/8" in capsys.readouterr().err
