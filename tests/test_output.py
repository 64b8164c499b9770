"""Files that are whole or not there, figures by their suffix, bars only where somebody sees them.

What becomes of a run when a file cannot be written is in test_runs.py.
"""

import io
import types

import pytest
from matplotlib.figure import Figure

import output


def test_a_file_is_replaced_as_a_whole_or_kept(tmp_path):
    path = tmp_path / "file"
    for data in (b"first", b"second"):
        output.write_atomically(str(path), data)
        assert path.read_bytes() == data
    with pytest.raises(TypeError):
        output.write_atomically(path, "text, which fails when the file is already open")
    with pytest.raises(FileNotFoundError, match=r"No such file .*absent.file"):
        output.write_atomically(tmp_path / "absent" / "file", b"")
    assert path.read_bytes() == b"second" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a", b"\x89PNG")])
def test_a_figure_is_saved_in_the_format_of_its_suffix(name, start, tmp_path):
    figure = Figure((1, 1))
    assert output.save_figure(figure, str(tmp_path / name)) is figure
    assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(OSError, match="No such file"):
        output.save_figure(figure, tmp_path / "absent" / name)


@pytest.mark.parametrize(("terminal", "switch", "shown"), [(True, "", True), (False, "", False), (True, "1", False)])
def test_a_bar_is_shown_in_a_terminal_only_unless_switched_off(terminal, switch, shown, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", switch)
    file = io.StringIO()
    file.isatty = lambda: terminal
    with output.progress_bar(range(3), file=file, desc="epoch 1") as bar:
        assert list(bar) == [0, 1, 2]
    assert ("epoch 1" in file.getvalue()) == shown


def test_a_notebook_is_told_from_other_sessions(monkeypatch):
    shells = pytest.importorskip("IPython")
    assert not output.in_notebook()
    monkeypatch.setattr(shells, "get_ipython", lambda: types.SimpleNamespace(kernel="that of Jupyter"))
    assert output.in_notebook()
