"""InsertNoise: a noise node per trainable tensor."""

from __future__ import annotations

from mobizo_passes import passes
from mobizo_passes.graph.facts import facts
from mobizo_passes.noise import site_ids
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, targets


class TestInsertNoise(PassContract):
    kind = passes.InsertNoise

    def example(self) -> Stage:
        return before(self.kind, Tiny(), rows())

    def test_it_fires(self) -> None:
        stage = before(self.kind, Tiny(layers=2), rows())
        after = stage.apply()
        marked = {facts(n).noise_of: n for n in after.graph.nodes if facts(n).noise_of}
        assert list(marked) == ["layer.lora_B.weight", "more.0.lora_B.weight"]
        ids = site_ids(marked)
        assert [n.args[1] for n in marked.values()] == list(ids.values())
        assert [n.meta["val"].shape for n in marked.values()] == [(1, 4, 1), (1, 4, 1)]
        assert len(after.placeholders("seed")) == 1

    def test_a_graph_without_adapters_is_left_alone(self) -> None:
        stage = before(passes.LiftAdapter, Tiny(), rows())
        text = targets(stage.ir)
        assert passes.InsertNoise(2, "gaussian")(stage.ir) == 0
        assert targets(stage.ir) == text
        assert stage.ir.placeholders("seed") == []

    def test_an_id_belongs_to_the_name(self) -> None:
        one = before(self.kind, Tiny(), rows()).apply()
        two = before(self.kind, Tiny(layers=3), rows()).apply()
        first = [next(n.args[1] for n in ir.graph.nodes if facts(n).noise_of) for ir in (one, two)]
        assert first[0] == first[1]
