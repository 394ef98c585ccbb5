"""What passes did, as a table for notebooks."""

from __future__ import annotations

from mobizo_passes.graph.passes import PassRecord
from mobizo_passes.markup import counted, table


class History(tuple[PassRecord, ...]):
    """The records of passes, in the order in which they ran."""

    def _repr_html_(self) -> str:
        rows = [(each.name, each.rewrites, each.doc.partition("\n")[0]) for each in self]
        return table(counted(len(self), "pass", "passes"), ("pass", "rewrites", "what it does"), rows)
