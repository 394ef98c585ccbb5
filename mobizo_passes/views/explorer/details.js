// What is known of the selected block or node, beside the drawing.

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children.filter(each => each !== null && each !== undefined));
  return element;
}

function facts(pairs) {
  const list = make("dl");
  for (const [name, value] of pairs)
    if (value !== "" && value !== null && value !== undefined) list.append(make("dt", {}, name), make("dd", {}, value));
  return list;
}

function showDetails(app) {
  const { element, pane, block } = { element: app.details, pane: app.active, block: app.active.selected };
  const body = block && block !== pane.root ? (block.node ? nodeDetails(app, pane, block) : blockDetails(app, pane, block)) : start(app);
  element.replaceChildren(...(app.mode.kind === "passes" ? passDetails(app) : []), ...body);
  element.querySelector(".passes [aria-selected=true]")?.scrollIntoView({ block: "nearest" });
}

function start(app) {
  if (app.mode.kind === "passes") return [];
  return [
    make("h2", {}, app.data.title),
    make("ul", { class: "facts" }, ...app.data.facts.map(each => make("li", {}, each))),
    make("p", {}, "Click a module or a node for its details. A double click, or +, unfolds it. Press ? for the keys."),
  ];
}

function values(pane, block) {
  const own = block.node ? "made by" : "";
  return pane.overlays.filter(each => each.name !== own).map(each => [each.name, each.describe(block)]);
}

function nodeDetails(app, pane, block) {
  const { node } = block;
  const returned = node.results.map(each => each.name === each.kind ? each.kind : `${each.kind} ${each.name}`).join(", ");
  const frames = pane.graph.sourceOf(node);
  const loss = pane.graph.loss;
  const reached = loss && loss !== node ? pane.graph.between(node, loss) : new Set();
  return [
    make("h2", {}, nodeLabel(node, block)),
    facts([
      ["node", `%${node.name}`],
      ["operator", node.kind === "call" ? node.op : ""],
      ["role", node.kind === "call" ? "" : node.kind],
      ["type", node.type],
      ["module", node.module || (node.kind === "call" ? "none: it is part of the step" : node.path.join("."))],
      ["parameter", node.fqn],
      ["source", frames.length ? source(frames) : ""],
      ["made by", node.pass || (node.kind === "call" ? "capture" : "")],
      ["returned as", returned],
      ...values(pane, block),
    ]),
    reached.size > 1 ? make("p", {}, make("button", { class: "path", onclick: () => app.showPath(pane, node) },
      `Path to the loss: ${reached.size} nodes`)) : null,
    neighbors(app, pane, "Inputs", node.inputs),
    neighbors(app, pane, "Users", node.users),
    make("h3", {}, "Text"), make("pre", {}, node.line),
  ].filter(each => each);
}

// The innermost line of the user's model; who called it, on request.
function source([line, ...callers]) {
  if (!callers.length) return line;
  return make("details", { class: "frames" }, make("summary", {}, line), ...callers.map(each => make("div", {}, each)));
}

function neighbors(app, pane, title, nodes) {
  if (!nodes.length) return null;
  const list = make("ul", { class: "neighbors" });
  for (const node of nodes.slice(0, 60))
    list.append(make("li", {}, make("button", { class: "link", onclick: () => app.goTo(pane, node) }, `%${node.name}`), " ",
      make("small", {}, `${node.kind === "call" ? node.label : node.kind} · ${node.type}`)));
  if (nodes.length > 60) list.append(make("li", {}, `and ${nodes.length - 60} more`));
  return make("section", { class: title.toLowerCase() }, make("h3", {}, `${title} (${nodes.length})`), list);
}

function blockDetails(app, pane, block) {
  const nodes = block.members;
  const counts = new Map();
  for (const node of nodes) if (node.kind === "call") counts.set(node.op, (counts.get(node.op) ?? 0) + 1);
  const open = pane.isOpen(block);
  const own = new Set(nodes);
  const outside = list => [...new Set(list)].filter(node => !own.has(node));
  return [
    make("h2", {}, block.label),
    facts([
      ["module", block.kind === "module" || block.kind === "run" ? block.fqn : ""],
      ["repeated", block.kind === "run" ? block.note : ""],
      ["nodes", `${nodes.length}`],
      ...values(pane, block),
    ]),
    make("p", { class: "buttons" },
      make("button", { onclick: () => app.toggle(pane, block) }, open ? "Fold" : "Unfold"), " ",
      make("button", { onclick: () => app.toggle(pane, block, true) }, open ? "Fold all inside" : "Unfold all inside")),
    make("h3", {}, "Operators"),
    make("ul", { class: "neighbors" }, ...[...counts].sort((a, b) => b[1] - a[1]).slice(0, 20)
      .map(([op, count]) => make("li", {}, `${count} × ${op}`))),
    neighbors(app, pane, "Reads", outside(nodes.flatMap(node => node.inputs)).filter(node => !WEIGHTS.has(node.kind))),
    neighbors(app, pane, "Read by", outside(nodes.flatMap(node => node.users))),
  ].filter(each => each);
}
