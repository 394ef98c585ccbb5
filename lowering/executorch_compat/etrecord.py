"""ETRecords, which ExecuTorch's Inspector reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The one method name that the Inspector looks for.
_METHOD = "forward"


def save_etrecord(finished: Any, method: str, path: Path) -> None:
    """Write the record of one method of a program that was lowered with `generate_etrecord`, as that of a program whose
    one method it is: so the Inspector connects it with what the runtime measured."""
    from executorch.devtools.etrecord import ETRecord

    whole = finished.get_etrecord()

    # ExecuTorch declares one of the three to be a map of numbers.
    def of_method(by_method: Any) -> Any:
        return {_METHOD: by_method[method]}

    ETRecord(
        edge_dialect_program=whole.edge_dialect_program[method],
        _debug_handle_map=of_method(whole._debug_handle_map),
        _delegate_map=of_method(whole._delegate_map),
        _instruction_id_to_num_outs_map=of_method(whole._instruction_id_to_num_outs_map),
    ).save(path)
