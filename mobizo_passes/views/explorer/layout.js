// Where blocks stand: each level by dagre, from the inside out, so that folding one module moves only what holds it.

const PAD = 14, HEAD = 30, GAP = 16;
const LEAF_HEIGHT = 40, BLOCK_HEIGHT = 46;
const FONT = '"Segoe UI", Roboto, Helvetica, Arial, sans-serif';
const ruler = document.createElement("canvas").getContext("2d");
const widths = new Map();

function textWidth(text, font) {
  const key = font + text;
  if (!widths.has(key)) {
    ruler.font = `${font} ${FONT}`;
    widths.set(key, ruler.measureText(text).width);
  }
  return widths.get(key);
}

function clip(text, most) {
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}

// Set `w`, `h`, and of what is inside of an open block `x`, `y` relative to it and the edges' `points`.
function layOut(block, isOpen, lines) {
  if (block.node || !isOpen(block)) {
    const [first, second] = lines(block);
    const room = Math.max(textWidth(first, "600 13px"), textWidth(second, "11px"));
    block.w = Math.ceil(room) + (block.node ? 22 : 46);
    block.h = block.node ? LEAF_HEIGHT : BLOCK_HEIGHT;
    return;
  }
  if (block.placed) return;
  block.placed = true;
  for (const child of block.children) layOut(child, isOpen, lines);
  const joined = new Set(block.edges.flatMap(edge => [edge.from, edge.to]));
  const alone = block.children.filter((_, index) => !joined.has(index));
  const size = joined.size ? flow(block, joined) : { w: 0, h: 0 };
  const top = grid(alone, size.w);
  if (joined.size && alone.length)
    for (const index of joined) block.children[index].y += top.h + GAP;
  const shift = joined.size && alone.length ? top.h + GAP : 0;
  for (const edge of block.edges) for (const point of edge.points) point.y += shift;
  const inner = { w: Math.max(size.w, top.w), h: size.h + shift + (joined.size ? 0 : top.h) };
  const title = block.kind === "root" ? 0 : textWidth(lines(block)[0], "600 13px") + 70;
  block.w = Math.max(inner.w, title) + 2 * PAD;
  block.h = inner.h + HEAD + PAD;
  const left = PAD + (block.w - 2 * PAD - inner.w) / 2;
  for (const child of block.children) {
    child.x += left;
    child.y += HEAD;
  }
  for (const edge of block.edges) for (const point of edge.points) {
    point.x += left;
    point.y += HEAD;
  }
}

function flow(block, joined) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 18, ranksep: 30, marginx: 0, marginy: 0, ranker: "tight-tree" });
  for (const index of joined) graph.setNode(`${index}`, { width: block.children[index].w, height: block.children[index].h });
  for (const edge of block.edges) graph.setEdge(`${edge.from}`, `${edge.to}`, { minlen: 1 });
  dagre.layout(graph);
  for (const index of joined) {
    const at = graph.node(`${index}`), child = block.children[index];
    child.x = at.x - child.w / 2;
    child.y = at.y - child.h / 2;
  }
  const ranks = new Map();
  for (const index of joined) {
    const { y } = graph.node(`${index}`);
    ranks.set(Math.round(y), Math.max(ranks.get(Math.round(y)) ?? 0, block.children[index].h / 2));
  }
  for (const edge of block.edges) {
    const from = block.children[edge.from], to = block.children[edge.to];
    const middle = graph.edge(`${edge.from}`, `${edge.to}`).points.slice(1, -1);
    edge.points = pastRanks(from, to, middle, ranks);
  }
  const all = [...joined].map(index => block.children[index]);
  const points = block.edges.flatMap(edge => edge.points);
  const left = Math.min(...all.map(each => each.x), ...points.map(each => each.x));
  const right = Math.max(...all.map(each => each.x + each.w), ...points.map(each => each.x));
  for (const each of [...all, ...points]) each.x -= left;
  return { w: right - left, h: Math.max(...all.map(each => each.y + each.h)) };
}

// Dagre gives an edge one point for each rank that it passes: it must go straight down there as far as the tallest block
// of the rank does, or it cuts the corner of one.
function pastRanks(from, to, middle, ranks) {
  const half = y => ranks.get(Math.round(y)) ?? 0;
  const room = (block, x) => Math.min(Math.max(x, block.x + Math.min(16, block.w / 2)), block.x + block.w - Math.min(16, block.w / 2));
  const start = from.y + from.h / 2, end = to.y + to.h / 2;
  const x0 = room(from, middle[0]?.x ?? from.x + from.w / 2), x1 = room(to, middle.at(-1)?.x ?? to.x + to.w / 2);
  const points = [{ x: x0, y: from.y + from.h }, { x: x0, y: start + half(start) }];
  for (const { x, y } of middle) if (half(y)) points.push({ x, y: y - half(y) }, { x, y: y + half(y) });
  points.push({ x: x1, y: end - half(end) }, { x: x1, y: to.y });
  return points.filter((p, i) => !i || Math.abs(p.x - points[i - 1].x) + Math.abs(p.y - points[i - 1].y) > 0.5);
}

// What has no edge on this level stands in rows above the flow.
function grid(blocks, wide) {
  if (!blocks.length) return { w: 0, h: 0 };
  const area = blocks.reduce((sum, each) => sum + (each.w + GAP) * (each.h + GAP), 0);
  const limit = Math.max(wide, Math.sqrt(2 * area), ...blocks.map(each => each.w));
  let x = 0, y = 0, high = 0, widest = 0;
  for (const each of blocks) {
    if (x && x + each.w > limit) {
      x = 0;
      y += high + GAP;
      high = 0;
    }
    each.x = x;
    each.y = y;
    x += each.w + GAP;
    high = Math.max(high, each.h);
    widest = Math.max(widest, x - GAP);
  }
  return { w: widest, h: y + high };
}

// A block whose inside changed is laid out anew, and so is all that holds it.
function unplace(block) {
  for (let each = block; each; each = each.parent) each.placed = false;
}

// Lines with round corners.
function curve(points, radius = 16) {
  const at = (x, y) => `${x.toFixed(1)} ${y.toFixed(1)}`;
  const toward = (p, q) => {
    const far = Math.hypot(q.x - p.x, q.y - p.y) || 1;
    const share = Math.min(radius, far / 2) / far;
    return at(p.x + (q.x - p.x) * share, p.y + (q.y - p.y) * share);
  };
  let path = `M${at(points[0].x, points[0].y)}`;
  for (let i = 1; i < points.length - 1; i += 1)
    path += `L${toward(points[i], points[i - 1])}Q${at(points[i].x, points[i].y)} ${toward(points[i], points[i + 1])}`;
  return `${path}L${at(points.at(-1).x, points.at(-1).y)}`;
}
