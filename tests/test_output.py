"""Figures in the format of their suffix, bars only where somebody sees them. Of files that fail: test_runs.py."""

import io

import pytest
from matplotlib.figure import Figure

import output


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a", b"\x89PNG")])
def test_a_figure_is_saved_in_the_format_of_its_suffix(name, start, tmp_path):
    figure = Figure((1, 1))
    assert output.save_figure(figure, str(tmp_path / name)) is figure
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(("terminal", "switch", "shown"), [(True, "", True), (False, "", False), (True, "1", False)])
def test_a_bar_is_shown_in_a_terminal_only_unless_switched_off(terminal, switch, shown, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", switch)
    file = io.StringIO()
    file.isatty = lambda: terminal
    assert list(output.progress_bar(range(3), file=file, desc="epoch 1")) == [0, 1, 2]
    assert ("epoch 1" in file.getvalue()) == shown
