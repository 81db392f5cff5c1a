"""The references in docs/ are what the commands and the declared settings say."""

from pathlib import Path

import pytest

from nanostudy.cli.reference import PAGES
from nanostudy.settings import SETTINGS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_is_up_to_date(name):
    again = "run `python -m nanostudy.cli.reference`"
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), again


def test_every_setting_is_in_the_reference():
    page = PAGES["settings.md"]()
    assert [name for name in SETTINGS if page.count(f"| `{name}` |") != 1] == []
