"""Whether an adapter's configuration is a program's: the same tensors under another scaling are another adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime_driver.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
#: What decides how the tensors are used, with PEFT's defaults: configurations of older releases lack some of them.
_DECISIVE: dict[str, Any] = {
    "peft_type": None,
    "r": None,
    "lora_alpha": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}


def check_config(directory: Path, expected: Mapping[str, Any] | None) -> None:
    """Check the ``adapter_config.json`` in ``directory`` against the program's.

    Args:
        expected: the program's; None where its adapter is not PEFT's and has no configuration.

    Raises:
        AdapterError: no configuration, one that cannot be read, or another kind, rank or scaling.
    """
    if expected is None:
        return
    path = directory / CONFIG_FILE
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(
            f"{path}: cannot be read ({error.strerror}), and the adapter's rank and alpha are in it. "
            "Give a whole PEFT directory."
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not JSON. Give a whole PEFT directory.") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(found).__name__}.")
    for name, default in _DECISIVE.items():
        own, other = (config.get(name) or default for config in (expected, found))
        if own != other:
            raise AdapterError(
                f"{path}: `{name}` is {other!r}, but {own!r} in the program. Lower the model with this adapter, or "
                "give one of this program's."
            )
