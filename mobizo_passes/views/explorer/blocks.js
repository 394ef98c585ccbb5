// A graph as nested blocks along its modules: between the blocks of one level the data flow has no cycle.

const LONGEST = 80;
const SHORTEST_RUN = 3;

// A block is one node, or has children, which are found when they are first asked for. Its id is the same for the same
// place in two graphs. `kind` is root, module, run (layers that are alike), part (of a very long level) or node.
class Block {
  constructor(kind, label, parent, members, { fqn = "", note = "", level = 0, id } = {}) {
    Object.assign(this, { kind, label, members, fqn, note, level, placed: false });
    this.parent = parent;
    this.id = id ?? `${parent.id}/${label}`;
    this.depth = parent ? parent.depth + 1 : 0;
    this.node = kind === "node" ? members[0] : null;
  }

  static root(graph, options) {
    const shown = [...graph.nodes.values()].filter(node => options.weights || !WEIGHTS.has(node.kind));
    return new Block("root", graph.name, null, shown, { id: "" });
  }

  get children() {
    this.inside ??= this.node ? [] : childrenOf(this);
    return this.inside;
  }

  set children(list) {
    this.inside = list;
  }

  get edges() {
    this.flow ??= edgesOf(this);
    return this.flow;
  }

  // The block of a node below this one.
  of(node) {
    this.owner ??= new Map(this.children.flatMap(child => child.members.map(each => [each, child])));
    const child = this.owner.get(node);
    return child && (child.node ? child : child.of(node));
  }

  withId(id) {
    if (id === this.id) return this;
    const next = this.children.find(child => id === child.id || id.startsWith(`${child.id}/`));
    return next?.withId(id) ?? null;
  }
}

function* walk(block) {
  yield block;
  for (const child of block.children) yield* walk(child);
}

function childrenOf(block) {
  const taken = new Map();
  const children = acyclic(block.members, block.level).map(({ name, nodes }) => {
    if (!name) {
      const [node] = nodes;
      return new Block("node", node.label, block, nodes, { fqn: node.path.join("."), id: `${block.id}/%${node.name}` });
    }
    const again = (taken.get(name) ?? 0) + 1;
    taken.set(name, again);
    return moduleBlock(block, name, nodes, again);
  });
  return foldParts(block, foldRuns(block, children));
}

// A chain of modules with one child each is one block.
function moduleBlock(block, name, nodes, again) {
  let level = block.level + 1;
  const names = [name];
  for (;;) {
    const next = nodes[0].path[level];
    if (next === undefined || !nodes.every(node => node.path[level] === next)) break;
    names.push(next);
    level += 1;
  }
  const path = names.join(".");
  return new Block("module", path + (again > 1 ? ` (${again})` : ""), block, nodes, {
    fqn: block.fqn ? `${block.fqn}.${path}` : path, level, id: `${block.id}/${path}${again > 1 ? `#${again}` : ""}`,
  });
}

// Group nodes, given in the order of the program, by the next module of their path; a module gets a further group
// where one group would close a cycle.
function acyclic(nodes, level) {
  const groups = [];
  const byName = new Map();
  const place = new Map();
  const after = [];
  const reaches = (from, to) => {
    const left = [from];
    const seen = new Set(left);
    while (left.length)
      for (const next of after[left.pop()]) {
        if (next === to) return true;
        if (!seen.has(next)) {
          seen.add(next);
          left.push(next);
        }
      }
    return false;
  };
  for (const node of nodes) {
    const name = node.path[level] ?? "";
    const before = new Set();
    for (const source of node.inputs)
      if (place.has(source) && !runsEverywhere(source)) before.add(place.get(source));
    const own = byName.get(name) ?? [];
    let number = -1;
    for (let at = own.length - 1; at >= 0 && number < 0; at -= 1)
      if (![...before].some(each => each !== own[at] && reaches(own[at], each))) number = own[at];
    if (number < 0) {
      number = groups.length;
      groups.push({ name, nodes: [] });
      after.push(new Set());
      if (name) byName.set(name, [...own, number]);
    }
    groups[number].nodes.push(node);
    place.set(node, number);
    for (const each of before) if (each !== number) after[each].add(number);
  }
  return groups;
}

// The edges between a block's children, with the nodes that they lead from and to.
function edgesOf(block) {
  const owner = new Map();
  block.children.forEach((child, index) => child.members.forEach(node => owner.set(node, index)));
  const edges = new Map();
  for (const [node, target] of owner)
    for (const source of node.inputs) {
      const from = owner.get(source);
      if (from === undefined || from === target) continue;
      const crosses = !block.children[from].node || !block.children[target].node;
      if (crosses && runsEverywhere(source)) continue;
      const key = from * block.children.length + target;
      if (!edges.has(key)) edges.set(key, { from, to: target, sources: new Set(), targets: new Set() });
      edges.get(key).sources.add(source);
      edges.get(key).targets.add(node);
    }
  return [...edges.values()];
}

function signatureOf(block) {
  return block.members
    .filter(node => node.kind === "call")
    .map(node => `${node.op} ${node.type} ${node.path.slice(block.level).join(".")} ${node.mark ?? ""}`)
    .join("\n");
}

// Layers that follow each other and compute the same are one block, which unfolds into them.
function foldRuns(block, children) {
  const runs = new Map();
  for (const child of children) {
    if (child.kind !== "module" || !/\.\d+$/.test(child.label)) continue;
    const key = child.label.replace(/\d+$/, "");
    const list = runs.get(key) ?? [];
    runs.set(key, list);
    const mark = signatureOf(child);
    const last = list.at(-1);
    if (last && last.mark === mark) last.blocks.push(child);
    else list.push({ mark, blocks: [child] });
  }
  for (const { blocks } of [...runs.values()].flat()) {
    if (blocks.length < SHORTEST_RUN || blocks.length === children.length || !isClosed(block, blocks)) continue;
    const last = /\d+$/.exec(blocks.at(-1).label)[0];
    children = gathered(block, children, blocks, "run", `${blocks[0].label}–${last}`, `${blocks.length} alike`);
  }
  return children;
}

// Whether nothing stands between the blocks: folding would then bend the flow into a circle.
function isClosed(block, blocks) {
  const inside = new Set(blocks.flatMap(each => each.members));
  const all = new Set(block.members);
  const seen = new Set();
  const left = [];
  const follow = node => {
    if (runsEverywhere(node)) return;
    for (const user of node.users) if (all.has(user) && !seen.has(user)) left.push(user);
  };
  for (const node of inside) for (const user of node.users) if (all.has(user) && !inside.has(user) && !runsEverywhere(node)) left.push(user);
  while (left.length) {
    const node = left.pop();
    if (inside.has(node)) return false;
    seen.add(node);
    follow(node);
  }
  return true;
}

// A level with very many blocks is cut along the order of the program, in which every edge leads forward.
function foldParts(block, children) {
  if (children.length <= LONGEST) return children;
  const size = Math.max(20, Math.ceil(Math.sqrt(children.length)));
  const list = [...children].sort((a, b) => a.members[0].place - b.members[0].place);
  for (let at = 0; at < list.length; at += size) {
    const part = list.slice(at, at + size);
    const operators = new Map();
    for (const node of part.flatMap(each => each.members)) operators.set(node.label, (operators.get(node.label) ?? 0) + 1);
    const most = [...operators].sort((a, b) => b[1] - a[1]).slice(0, 2).map(each => each[0]).join(", ");
    children = gathered(block, children, part, "part", `${at + 1}–${at + part.length}`, most);
  }
  return children;
}

function gathered(block, children, blocks, kind, label, note) {
  const members = blocks.flatMap(each => each.members);
  const parent = new Block(kind, label, block, members, { fqn: block.fqn, note, level: block.level });
  for (const each of blocks) {
    each.id = parent.id + each.id.slice(block.id.length);
    each.parent = parent;
    each.depth = parent.depth + 1;
  }
  parent.children = blocks;
  const inside = new Set(blocks);
  return children.flatMap(each => each === blocks[0] ? [parent] : inside.has(each) ? [] : [each]);
}
