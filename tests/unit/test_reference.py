"""The pages under docs/reference say what the code says."""

import pytest

from loading import ROOT, load

reference = load("scripts/reference.py")


@pytest.mark.parametrize("page", reference.PAGE_MAKERS)
def test_a_page_is_what_the_code_says(page: str) -> None:
    written = (ROOT / "docs" / "reference" / page).read_text()
    assert written == reference.NOTE + reference.PAGE_MAKERS[page](), "run `make reference`"


def test_every_flag_is_explained() -> None:
    rows = [line for line in reference.flags().splitlines() if line.startswith("| `--")]
    assert len(rows) > 40
    assert [row for row in rows if row.endswith("|  |")] == []
