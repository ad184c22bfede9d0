"""Choose the client wheel's files: all of infermesh/ but infermesh/cli/. An editable install links the checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ClientFiles(BuildHookInterface):
    """Take the package from the checkout's top, or from beside this file when building from an sdist."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        here = Path(self.root)
        top = here if (here / "infermesh").is_dir() else here.parents[1]
        for path in sorted((top / "infermesh").rglob("*")):
            name = path.relative_to(top)
            if path.is_file() and name.parts[1] != "cli" and "__pycache__" not in name.parts:
                build_data["force_include"][str(path)] = str(name)
