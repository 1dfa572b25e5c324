"""Commands and files that the README names."""

import re

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_commands_and_files_that_the_readme_names_exist() -> None:
    for path in re.findall(r"\]\((docs/[^)]+)\)", TEXT):
        assert (ROOT / path).is_file(), path
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z0-9-]+)", TEXT)) <= targets
    for group, option in re.findall(r"\b(tokenizer|backbone|data|trainer|logger|experiment)=([a-z0-9_/]+)", TEXT):
        if option not in ("stride", "cifar10/strong_"):
            assert (ROOT / "configs" / group / f"{option}.yaml").is_file(), f"{group}={option}"
