"""Pages that are made from the code are up to date."""

from __future__ import annotations

import re
import runpy

from conftest import ROOT


def test_the_page_of_config_keys_is_up_to_date():
    """If not: python docs/make_config_md.py"""
    made = runpy.run_path(str(ROOT / "docs" / "make_config_md.py"))["render"]()
    assert (ROOT / "docs" / "config.md").read_text() == made


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
