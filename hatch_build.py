"""Build hook: fetches the explorer's layout library into the package, so that wheels have it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LayoutLibraryHook(BuildHookInterface):
    """A wheel without the library is not built; an editable install without npm works but for .html drawings."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Fetch the library; `version` is "standard" or "editable"."""
        library = _layout_library(Path(self.root))
        try:
            library.fetch()
        except library.LibraryUnavailable as error:
            if version != "editable":
                raise
            self.app.display_warning(f"drawings as .html will not work: {error}")


def _layout_library(root: Path) -> Any:
    # By its path: importing the package needs torch, which a build does not have.
    path = root / "mobizo_passes" / "views" / "explorer" / "layout_library.py"
    spec = importlib.util.spec_from_file_location("layout_library", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
