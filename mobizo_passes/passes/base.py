"""What a pass is."""

from __future__ import annotations

from typing import ClassVar

from mobizo_passes.graph.ir import Ir


class Pass:
    """A rewrite of an `Ir` in place. Subclasses are frozen dataclasses whose fields are the options.

    `requires` and `ensures` state, in a sentence each, what must hold before and what holds after.
    """

    name: ClassVar[str]
    requires: ClassVar[str]
    ensures: ClassVar[str]
    # False for a pass whose new nodes get their users only in a later pass.
    prunes: ClassVar[bool] = True

    def rewrite(self, ir: Ir) -> int:
        """Rewrite the graph; returns how many places were rewritten."""
        raise NotImplementedError

    def __call__(self, ir: Ir) -> int:
        """Run the pass: stamp the nodes it creates, drop dead code, check the graph."""
        ir.pass_name = self.name
        count = self.rewrite(ir)
        if self.prunes:
            ir.eliminate_dead_code()
        ir.lint()
        return count
