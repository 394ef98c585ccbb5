"""InsertNoise: a noise node per trainable tensor."""

from __future__ import annotations

from mobizo_passes.graph.facts import facts
from mobizo_passes.noise import site_ids
from mobizo_passes.passes import InsertNoise
from tests.passes.contract import PassContract, left_alone, parsed


class TestInsertNoise(PassContract):
    one = InsertNoise(2, "gaussian")
    before = """
        %a: f32[4, 1] = adapter 'a'
        %b: f32[4, 1] = adapter 'b'

        %mul: f32[4, 1] = aten.mul(%a, %b)

        return %mul: f32[4, 1] = logits
    """
    # Computed first and used last.
    after = """
        %a: f32[4, 1] = adapter 'a'
        %b: f32[4, 1] = adapter 'b'
        %seed: i64[1] = seed  # | insert-noise

        %noise: f32[2, 4, 1] = mobizo.noise(%seed, 3904355907, 2, [4, 1], 'gaussian')  # | insert-noise | noise of a
        %noise_1: f32[2, 4, 1] = mobizo.noise(%seed, 1908338681, 2, [4, 1], 'gaussian')  # | insert-noise | noise of b
        %mul: f32[4, 1] = aten.mul(%a, %b)

        return %mul: f32[4, 1] = logits
    """

    def test_an_id_belongs_to_the_name(self) -> None:
        _, new = self.run_pass()
        ids = {facts(n).noise_of: n.args[1] for n in new.graph.nodes if facts(n).noise_of}
        assert ids == site_ids("ab")
        alone = parsed(self.before.replace("%a: f32[4, 1] = adapter 'a'", "%a: f32[4, 1] = parameter 'a'"))
        assert self.one(alone) == 1
        assert {n.args[1] for n in alone.graph.nodes if facts(n).noise_of} == {ids["b"]}

    def test_a_seed_that_is_there_is_used(self) -> None:
        text = """
            %a: f32[4, 1] = adapter 'a'
            %seed: i64[1] = seed
            return %a: f32[4, 1] = logits
        """
        ir = parsed(text)
        assert self.one(ir) == 1
        assert len(ir.placeholders("seed")) == 1

    def test_a_graph_without_adapters_is_left_alone(self) -> None:
        left_alone(self.before.replace("adapter", "parameter"), self.one)
