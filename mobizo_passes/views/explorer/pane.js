// One drawing: a graph's blocks as SVG, with pan, zoom, folding and marks.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

class Pane {
  constructor(graph, options) {
    this.graph = graph;
    this.options = options;
    this.open = new Set();
    this.selected = null;
    this.path = new Set();
    this.matches = new Set();
    this.view = { x: 0, y: 0, k: 1 };
    this.marker = `arrow${Math.random().toString(36).slice(2)}`;
    this.element = document.createElement("div");
    this.element.className = "pane";
    this.caption = document.createElement("h2");
    this.caption.textContent = graph.name;
    this.world = svg("g", {});
    this.svg = svg("svg", { "aria-hidden": "true", tabindex: "-1" },
      svg("defs", {}, svg("marker", { id: this.marker, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8,
        markerHeight: 8, orient: "auto", markerUnits: "userSpaceOnUse" }, svg("path", { d: "M0 0L8 4L0 8z", class: "head" }))), this.world);
    this.element.append(this.caption, this.svg);
    this.rebuild();
    listen(this);
  }

  rebuild() {
    const chosen = this.selected?.node?.name ?? this.selected?.id;
    this.root = Block.root(this.graph, this.options);
    if (!this.open.size) this.openFirst();
    this.open.add("");
    if (chosen !== undefined && chosen !== "") this.selected = this.find(chosen);
  }

  // Open what holds nearly everything, until there is something to see.
  openFirst() {
    this.open = new Set([""]);
    if (this.options.depth !== null) return this.openTo(this.root, this.options.depth);
    const total = this.root.members.length;
    let at = this.root;
    while (at) {
      at = at.children.find(child => !child.node && child.kind !== "run" && 2 * child.members.length > total);
      if (at) this.open.add(at.id);
    }
    // A small graph is shown whole.
    if (total <= 40) for (const block of walk(this.root)) this.open.add(block.id);
  }

  openTo(block, depth) {
    if (block.node || block.depth >= depth) return;
    this.open.add(block.id);
    for (const child of block.children) this.openTo(child, depth);
  }

  find(key) {
    const node = this.graph.nodes.get(key);
    return (node && this.root.of(node)) ?? this.root.withId(key);
  }

  isOpen(block) {
    return !block.node && this.open.has(block.id);
  }

  lines(block) {
    const { node } = block;
    if (node) return [clip(nodeLabel(node, block), 42), clip(node.type, 46)];
    const count = block.members.length;
    const value = this.overlay?.describe(block) ?? "";
    return [clip(block.label, 40), clip([block.note, `${count} node${count === 1 ? "" : "s"}`, value].filter(each => each).join(" · "), 60)];
  }

  draw() {
    layOut(this.root, block => this.isOpen(block), block => this.lines(block));
    this.drawn = new Map();
    const boxes = svg("g", {}), edges = svg("g", { class: "edges" });
    this.links = svg("g", { class: "links" });
    this.drawInside(this.root, -PAD, -HEAD, boxes, edges);
    this.world.replaceChildren(boxes, edges, this.links);
    this.mark();
    this.transform();
  }

  drawInside(block, left, top, boxes, edges) {
    for (const child of block.children) this.drawBlock(child, left + child.x, top + child.y, boxes, edges);
    for (const edge of block.edges) {
      const path = svg("path", { class: "edge", d: curve(edge.points.map(p => ({ x: p.x + left, y: p.y + top }))),
        "marker-end": `url(#${this.marker})` });
      const types = [...new Set([...edge.sources].map(each => each.type))];
      path.append(svg("title", {}, types.slice(0, 6).join("\n") + (types.length > 6 ? `\nand ${types.length - 6} more` : "")));
      path.edge = edge;
      edges.append(path);
    }
  }

  drawBlock(block, x, y, boxes, edges) {
    const open = this.isOpen(block);
    const group = svg("g", { class: `block ${block.node ? `node ${block.node.kind}` : open ? "frame" : "folded"}`, "data-id": block.id });
    const box = svg("rect", { x, y, width: block.w, height: block.h, rx: block.node ? 5 : 8 });
    group.append(box);
    const [first, second] = this.lines(block);
    const tip = svg("title", {}, block.node ? `${block.node.line}\n${block.node.module}` : `${block.fqn || block.label}\n${second}`);
    group.append(tip);
    if (!open) {
      this.paint(block, box, group, x, y);
      const left = block.node ? x + block.w / 2 : x + 32;
      const anchor = block.node ? "middle" : "start";
      group.append(svg("text", { x: left, y: y + 18, "text-anchor": anchor, class: "name" }, first),
        svg("text", { x: left, y: y + 33, "text-anchor": anchor, class: "type" }, second));
    } else {
      box.setAttribute("class", `level${block.depth % 4}`);
      group.append(svg("text", { x: x + 32, y: y + 20, class: "name" }, first));
    }
    if (!block.node) group.append(svg("g", { class: "knob", "data-knob": "" },
      svg("circle", { cx: x + 17, cy: y + 16, r: 9 }),
      svg("path", { d: `M${x + 12} ${y + 16}h10${open ? "" : `M${x + 17} ${y + 11}v10`}` })));
    boxes.append(group);
    this.drawn.set(block, { group, x, y });
    if (open) this.drawInside(block, x, y, boxes, edges);
  }

  paint(block, box, group, x, y) {
    const marks = new Set(block.members.map(node => node.mark).filter(each => each));
    if (marks.size) {
      const mark = marks.size === 1 ? [...marks][0] : "changed";
      box.style.fill = `var(--${mark})`;
      return;
    }
    if (!this.overlay || this.diff) return;
    const value = this.overlay.of(block);
    if (!(value instanceof Map)) {
      if (value !== null) box.style.fill = this.overlay.color(value);
    } else if (value.size === 1) box.style.fill = this.overlay.color([...value.keys()][0]);
    else if (value.size) {
      // Shares of what is inside.
      const total = [...value.values()].reduce((sum, each) => sum + each, 0);
      let at = x + 8;
      for (const [name, count] of value) {
        const wide = (block.w - 16) * count / total;
        group.append(svg("rect", { x: at, y: y + block.h - 7, width: wide, height: 4, class: "share", style: `fill:${this.overlay.color(name)}` }));
        at += wide;
      }
    }
  }

  // The block that stands for a node: itself, or the folded one around it.
  shownFor(block) {
    let shown = block;
    for (let each = block; each; each = each.parent) if (each.parent && !this.isOpen(each.parent)) shown = each.parent;
    return this.drawn.has(shown) ? shown : null;
  }

  mark() {
    const near = { input: new Set(), user: new Set() };
    const chosen = this.selected;
    this.links.replaceChildren();
    if (chosen && chosen !== this.root) {
      const own = new Set(chosen.members);
      for (const node of own) {
        for (const each of node.inputs) if (!own.has(each)) near.input.add(each);
        for (const each of node.users) if (!own.has(each)) near.user.add(each);
      }
    }
    const states = new Map();
    const add = (nodes, name) => {
      for (const node of nodes) {
        const block = this.root.of(node);
        const shown = block && this.shownFor(block);
        if (shown) states.set(shown, (states.get(shown) ?? new Set()).add(name));
      }
    };
    add(near.input, "input");
    add(near.user, "user");
    add(this.path, "path");
    add(this.matches, "match");
    for (const [block, { group }] of this.drawn) {
      const found = states.get(block) ?? new Set();
      for (const name of ["input", "user", "path", "match"]) group.classList.toggle(`is-${name}`, found.has(name));
      group.classList.toggle("is-selected", block === chosen);
      group.classList.toggle("is-dim", this.path.size > 0 && !found.has("path") && !this.isOpen(block) && block !== chosen);
    }
    for (const path of this.world.querySelectorAll(".edge")) {
      const { edge } = path;
      path.classList.toggle("is-path", this.path.size > 0 && [...edge.targets].some(node => this.path.has(node) && node.inputs.some(each => edge.sources.has(each) && this.path.has(each))));
      path.classList.toggle("is-dim", this.path.size > 0 && !path.classList.contains("is-path"));
    }
    if (chosen && this.drawn.has(chosen)) {
      for (const node of near.input) this.link(node, chosen, "input");
      for (const node of near.user) this.link(node, chosen, "user");
    }
  }

  // From a neighbor that stands elsewhere: the layout's own edges end at the modules' borders.
  link(node, chosen, kind) {
    const block = this.root.of(node);
    const other = block && this.shownFor(block);
    if (!other || other.parent === chosen.parent || other === chosen || this.links.children.length > 120) return;
    for (let each = chosen; each; each = each.parent) if (each === other) return;
    const a = this.drawn.get(kind === "input" ? other : chosen), b = this.drawn.get(kind === "input" ? chosen : other);
    const [from, to] = kind === "input" ? [other, chosen] : [chosen, other];
    const x0 = a.x + from.w / 2, y0 = a.y + from.h, x1 = b.x + to.w / 2, y1 = b.y;
    const bend = Math.max(Math.min(Math.abs(y1 - y0) / 2, 300), 40);
    // Past what stands between them, not through it.
    const aside = Math.abs(x1 - x0) < 100 && Math.abs(y1 - y0) > 150 ? 140 : 0;
    this.links.append(svg("path", { class: `link ${kind}`, "marker-end": `url(#${this.marker})`,
      d: `M${x0} ${y0}C${x0 + aside} ${y0 + bend} ${x1 + aside} ${y1 - bend} ${x1} ${y1}` }));
  }

  toggle(block, deep = false) {
    if (block.node) return;
    const opening = !this.open.has(block.id);
    for (const each of deep ? walk(block) : [block]) {
      if (opening) this.open.add(each.id);
      else this.open.delete(each.id);
      each.placed = false;
    }
    unplace(block);
    const before = this.drawn.get(block);
    this.draw();
    const after = this.drawn.get(block);
    // What was clicked stays under the pointer.
    if (before && after) {
      this.view.x += (before.x - after.x) * this.view.k;
      this.view.y += (before.y - after.y) * this.view.k;
      this.transform();
    }
  }

  reveal(block) {
    for (let each = block.parent; each; each = each.parent) if (!this.open.has(each.id)) {
      this.open.add(each.id);
      unplace(each);
    }
    if (!this.drawn.has(block)) this.draw();
  }

  redraw() {
    for (const block of this.drawn?.keys() ?? []) block.placed = false;
    this.root.placed = false;
    this.draw();
  }

  fit() {
    const room = this.size();
    const k = Math.min(room.w / (this.root.w + 10), room.h / (this.root.h - HEAD + 10), 1.25);
    // Small enough to be seen whole, large enough to be read: a tall graph starts at its top.
    const shown = Math.max(k, Math.min(0.55, room.w / (this.root.w + 10)), 0.12);
    this.view = { k: shown, x: (room.w - (this.root.w - 2 * PAD) * shown) / 2, y: Math.max((room.h - (this.root.h - HEAD - PAD) * shown) / 2, 12) };
    this.transform();
  }

  size() {
    const box = this.svg.getBoundingClientRect();
    return { w: Math.max(box.width, 50), h: Math.max(box.height, 50) };
  }

  // In the upper middle, large enough to be read.
  putAt(block) {
    const at = this.drawn.get(block), room = this.size(), k = Math.max(this.view.k, 0.75);
    this.view = { k, x: room.w / 2 - (at.x + block.w / 2) * k, y: room.h / 3 - at.y * k };
    this.transform();
  }

  center(block) {
    const at = this.drawn.get(block);
    if (!at) return;
    const room = this.size(), { k } = this.view;
    const left = at.x * k + this.view.x, top = at.y * k + this.view.y;
    if (left >= 8 && top >= 8 && left + block.w * k <= room.w - 8 && top + block.h * k <= room.h - 8 && k > 0.4) return;
    const zoom = Math.max(k, 0.7);
    this.view = { k: zoom, x: room.w / 2 - (at.x + block.w / 2) * zoom, y: room.h / 2 - (at.y + Math.min(block.h / 2, room.h / 2 / zoom - 40)) * zoom };
    this.transform();
  }

  zoom(factor, x = this.size().w / 2, y = this.size().h / 2) {
    const k = Math.min(Math.max(this.view.k * factor, 0.03), 4);
    const real = k / this.view.k;
    this.view = { k, x: x - (x - this.view.x) * real, y: y - (y - this.view.y) * real };
    this.transform();
  }

  pan(dx, dy) {
    this.view.x += dx;
    this.view.y += dy;
    this.transform();
  }

  transform() {
    const { x, y, k } = this.view;
    this.world.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)}) scale(${k.toFixed(4)})`);
  }
}

function nodeLabel(node, block) {
  if (node.kind === "call") return node.label;
  const inside = node.fqn.startsWith(`${block.fqn}.`) ? node.fqn.slice(block.fqn.length + 1) : node.fqn;
  return inside || node.kind;
}
