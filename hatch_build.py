# SPDX-License-Identifier: Apache-2.0
"""Metadata of a build that depend on where the repository is public: project URLs, and the links of the README.

An index page shows the README alone, so links to other files have to be absolute there. pyproject.toml has the address.
While it is empty there are no URLs, and links to files become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def description(text: str, files: str) -> str:
    """Return a README whose links to files of the repository begin with `files`.

    If that is empty, links are plain text, and pictures are left out.
    """
    text = re.sub(r"!\[([^\]]+)\]\(([^)]+)\)\n*", rf"![\1]({files}/\2?raw=true)\n\n" if files else "", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)]+)\)", rf"[\1]({files}/\2)" if files else r"\1", text)


class Metadata(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        """Set the dynamic fields."""
        repository = self.config["repository"]
        files = f"{repository}/blob/v{metadata['version']}" if repository else ""
        text = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": description(text, files)}
        metadata["urls"] = {"Source": repository, "Changelog": f"{files}/CHANGELOG.md"} if repository else {}
