"""Where the boxes of a view stand: layers of the data flow, down the page outside and from left to right inside."""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx

from mobizo_passes.views.picture.view import View

# Width of a character of the widest common sans-serif face, in units of the font's size.
_EM = 0.6
TEXT, SMALL = 12.0, 10.5
_PAD, _HEAD, _LANE = 12.0, 24.0, 8.0
_GAP_ALONG, _GAP_ACROSS = 22.0, 12.0
CHIP = 17.0


@dataclass
class Box:
    """A rectangle, with what is in it; positions are the page's once `move` was called on the outermost."""

    view: View
    w: float
    h: float
    x: float = 0.0
    y: float = 0.0
    children: list[Box] = field(default_factory=list)
    paths: list[list[tuple[float, float]]] = field(default_factory=list)
    down: bool = False

    def move(self, dx: float, dy: float) -> None:
        self.x, self.y = self.x + dx, self.y + dy
        self.paths = [[(x + dx, y + dy) for x, y in path] for path in self.paths]
        for child in self.children:
            child.move(dx, dy)


def width(text: str, size: float) -> float:
    return len(text) * size * _EM


def clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def lay_out(view: View, down: bool = True) -> Box:
    """Place a view and everything in it, with its upper left corner at 0, 0."""
    if view.shape != "frame":
        return _leaf(view)
    boxes = [lay_out(child, _goes_down(child)) for child in view.children]
    return _frame(view, boxes, down)


def _goes_down(view: View) -> bool:
    return any(child.shape == "frame" and any(g.shape == "frame" for g in child.children) for child in view.children)


def _leaf(view: View) -> Box:
    if view.shape == "glue":
        return Box(view, width(clip(view.label, 24), SMALL) + 14, 20)
    if view.shape == "expand":
        return Box(view, 1.1 * width(clip(view.detail, 44), 9.5) + 14, 34)
    if view.shape == "site":
        rows = [sum(chip_width(c.label) + (12 if c.repeated else 0) + 4 for c in row) for row in view.rows()]
        return Box(view, max(*rows, 1.1 * width(view.label, TEXT) + 82) + 16, 26 + 21 * len(rows))
    name = clip(view.label, 30) + (f"  × {len(view.run)}" if len(view.run) > 1 else "")
    lines = [1.1 * width(name, TEXT), width("99.9 % · once", SMALL) + 4]
    if view.detail:
        lines.append(width(clip(view.detail, 60), 9.5))
    return Box(view, max(lines) + 10, 50 if view.detail else 38)


def chip_width(label: str) -> float:
    return width(clip(label, 14), SMALL) + 12


def _frame(view: View, boxes: list[Box], down: bool) -> Box:
    place = _layers(len(boxes), view.edges)
    layers = [[i for i in _untangled(place, view.edges) if place[i] == n] for n in range(max(place, default=-1) + 1)]
    # Work with "across" and "along" the flow; the page's x and y follow from `down`.
    size = [(b.w, b.h) if down else (b.h, b.w) for b in boxes]
    extent = [sum(size[i][0] for i in layer) + _GAP_ACROSS * (len(layer) - 1) for layer in layers]
    widest = max(extent, default=0.0)
    # Of each box: where it begins across, begins along and ends along.
    spot: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)] * len(boxes)
    position = 0.0
    for layer, wide in zip(layers, extent, strict=True):
        cursor, thick = (widest - wide) / 2, max(size[i][1] for i in layer)
        for i in layer:
            start = position + (thick - size[i][1]) / 2
            spot[i] = (cursor, start, start + size[i][1])
            cursor += size[i][0] + _GAP_ACROSS
        position += thick + _GAP_ALONG
    lanes = _lanes(view.edges, place, layers, spot, size)
    low = min([0.0, *(lane - _LANE for lane in lanes.values())])
    high = max([widest, *(lane + _LANE for lane in lanes.values())])
    for box, (across, start, _) in zip(boxes, spot, strict=True):
        box.move(*((across - low, start) if down else (start, across - low)))
    frame = Box(view, high - low, max(position - _GAP_ALONG, 0.0), children=boxes, down=down)
    if not down:
        frame.w, frame.h = frame.h, frame.w
    for a, b in view.edges:
        from_a, to_b = spot[a][0] + size[a][0] / 2, spot[b][0] + size[b][0] / 2
        # Straight past what is longer in the same layer, and only then aside.
        end = max(spot[i][2] for i in layers[place[a]])
        start = min(spot[i][1] for i in layers[place[b]])
        points = [(from_a, spot[a][2]), (from_a, end), (to_b, start), (to_b, spot[b][1])]
        if place[b] - place[a] > 1:
            between = [i for n in range(place[a] + 1, place[b]) for i in layers[n]]
            first, last = min(spot[i][1] for i in between), max(spot[i][2] for i in between)
            points[2:2] = [(lanes[a], first), (lanes[a], last)]
        # A point twice would leave an arrowhead without a direction.
        points = [p for p, q in zip(points, [None, *points[:-1]], strict=True) if p != q]
        frame.paths.append([(x - low, y) if down else (y, x - low) for x, y in points])
    if view.label:
        for child in boxes:
            child.move(_PAD, _HEAD)
        frame.paths = [[(x + _PAD, y + _HEAD) for x, y in path] for path in frame.paths]
        head = 1.1 * width(view.label, TEXT) + (75 if len(view.run) > 1 else 0) + 110
        frame.w, frame.h = max(frame.w + 2 * _PAD, head), frame.h + _HEAD + _PAD
    return frame


def _lanes(
    edges: list[tuple[int, int]],
    place: list[int],
    layers: list[list[int]],
    spot: list[tuple[float, float, float]],
    size: list[tuple[float, float]],
) -> dict[int, float]:
    """Where across the flow edges pass the layers between their ends: one straight lane for each source."""
    last: dict[int, int] = {}
    for a, b in edges:
        if place[b] - place[a] > 1:
            last[a] = max(last.get(a, 0), place[b])
    taken: list[tuple[int, int, float]] = []
    lanes: dict[int, float] = {}
    # Short ones run close to the boxes, long ones outside of them.
    for a in sorted(last, key=lambda a: (last[a] - place[a], a)):
        row = layers[place[a]]
        # On the side where the source stands; alone in its layer, on the left or above.
        left = len(row) == 1 or 2 * row.index(a) < len(row)
        between = [i for n in range(place[a] + 1, last[a]) for i in layers[n]]
        edge = min(spot[i][0] for i in between) if left else max(spot[i][0] + size[i][0] for i in between)
        lane = edge - _GAP_ACROSS if left else edge + _GAP_ACROSS
        while any(f < last[a] and place[a] < t and abs(lane - other) < _LANE for f, t, other in taken):
            lane += -_LANE if left else _LANE
        taken.append((place[a], last[a], lane))
        lanes[a] = lane
    return lanes


def _layers(count: int, edges: list[tuple[int, int]]) -> list[int]:
    """The layer of each box: below all that it reads."""
    graph = networkx.DiGraph(edges)
    graph.add_nodes_from(range(count))
    order = list(networkx.lexicographical_topological_sort(graph))
    layer = [0] * count
    for node in order:
        layer[node] = max((layer[p] + 1 for p in graph.predecessors(node)), default=0)
    # What starts a branch, or only hands on, stands close to its readers.
    for node in reversed(order):
        after = [layer[s] for s in graph.successors(node)]
        if after and not graph.in_degree(node):
            layer[node] = min(after) - 1
    return layer


def _untangled(place: list[int], edges: list[tuple[int, int]]) -> list[int]:
    """All boxes, those of one layer sorted by where their predecessors stand, so that few edges cross."""
    graph = networkx.DiGraph(edges)
    rank: dict[int, float] = {}
    found: list[int] = []
    for layer in range(max(place, default=-1) + 1):
        row = [i for i, n in enumerate(place) if n == layer]

        def weight(node: int) -> tuple[float, int]:
            before = [rank[p] for p in graph.predecessors(node)] if node in graph else []
            return (sum(before) / len(before) if before else 0.5), node

        row.sort(key=weight)
        rank.update({node: (at + 0.5) / len(row) for at, node in enumerate(row)})
        found += row
    return found
