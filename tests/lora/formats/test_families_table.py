"""The table of families in docs/formats.md: as the script makes it, and true of a sample of its files.

`python -m benchmarks.families` judges all of them, in a minute and a half of a processor's time.
"""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.families import ALGORITHMS, FAMILIES, NAMINGS, Family
from tests.conftest import ROOT

SAMPLE = 2
"""Files of each family. Which ones differs from family to family, so that together they are all kinds."""


def test_the_page_has_the_table_of_these_families() -> None:
    text = (ROOT / "docs" / families.PAGE).read_text()
    begin, end = (f"<!-- families: {word} -->" for word in ("begin", "end"))
    full = [f"{len(ALGORITHMS)} of {len(ALGORITHMS)}"] * len(NAMINGS)
    written = text.partition(begin)[2].partition(end)[0].strip()
    assert written == families.table({family.name: full for family in FAMILIES})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_sample_of_its_files_is_judged_so(tmp_path: Path, family: Family) -> None:
    kinds = list(product(NAMINGS, ALGORITHMS))
    start = 7 * FAMILIES.index(family) % len(kinds)
    layers = families.layers_of(families.on_meta(family))
    for naming, algorithm in islice(kinds[start:] + kinds[:start], SAMPLE):
        assert families.judged(tmp_path, family, layers, naming, algorithm) is None
