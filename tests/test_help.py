"""Help lists fit a terminal of 80 columns: no line of them is cut short."""

import pytest

from cli.main import main


@pytest.mark.parametrize("group", ["recurse", "vocab", "lora", "emr", "tall"])
def test_no_line_of_a_list_is_cut(group, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([group, "--help"]) == 0
    told = capsys.readouterr().out.partition("Commands:")[2]
    assert len(told.splitlines()) > 2
    assert "..." not in told
