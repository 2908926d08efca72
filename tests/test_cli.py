"""What the commands print."""

from __future__ import annotations

import pytest

from tdiff import cli


def test_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Ray's and gloo's errors hold paths in brackets, which would be taken for style."""
    text = "a worker failed (connectFullMesh failed with [/pytorch/gloo/pair.cc:152], [bold] time out)"
    cli.console.print(text)
    cli.show_tables([("[/title]", [("[/header]",), ("[/cell]",)])])
    printed = capsys.readouterr().out
    for part in (text, "[/title]", "[/header]", "[/cell]"):
        assert part in printed


def test_tables_in_a_log_keep_their_words(capsys: pytest.CaptureFixture[str]) -> None:
    header = ("samples", "drawn", "precision", "recall", "reconstructed", "confidence", "class entropy per leaf")
    row = ("TreeDiffusion", "93.635 ± 5.360", "0.1", "0.5", "97.2 ± 6.4", "0.7", "1.7")
    cli.show_tables([("title", [header, row])])
    printed = capsys.readouterr().out
    assert all(word in printed for word in (*header, "TreeDiffusion", "93.635 ± 5.360"))
