// Programs in the project's text form (docs/text_form.md), one node a line, as graphs.

const INPUT_KINDS = new Set([
  "parameter", "buffer", "constant", "state", "adapter", "tangent", "optimizer", "batch", "seed", "lr", "eps",
  "projected_gradients", "input",
]);
// Held by the program, or by the driver: these stand with their first reader.
const HELD = new Set(["parameter", "buffer", "constant", "state", "adapter", "tangent", "optimizer"]);
const WEIGHTS = new Set(["parameter", "buffer", "constant"]);
// Noise and scalars reach every layer: where their edges leave a module, they are drawn for a selected node only.
const EVERYWHERE = new Set(["seed", "lr", "eps", "adapter", "optimizer", "parameter", "buffer", "constant", "state"]);
const EVERYWHERE_OPS = new Set(["mobizo.noise", "mobizo.noise_stack", "mobizo.perturb"]);
// What hoist-selections moves above the module that it was written in.
const SELECTIONS = new Set(["mobizo.gather_rows", "aten.select", "aten.slice", "aten.index"]);
// Where what belongs to no module stands.
const OUTSIDE = "outside the model";

class Graph {
  // `lines` are those of a program's text; `columns` hold further facts of its nodes, in the order of the lines.
  constructor(name, lines, extra = {}) {
    this.name = name;
    this.nodes = new Map();
    this.outputs = [];
    this.extra = extra;
    for (const line of lines) this.add(line);
    for (const node of this.nodes.values()) {
      node.inputs = [...new Set(node.references)].map(each => this.nodes.get(each)).filter(each => each);
      for (const source of node.inputs) source.users.push(node);
    }
    for (const output of this.outputs) {
      const node = this.nodes.get(output.of);
      if (node) node.results.push(output);
    }
    this.place();
  }

  add(line) {
    const comment = line.lastIndexOf("  # ");
    const code = (comment < 0 ? line : line.slice(0, comment)).trimEnd();
    const [module, pass] = comment < 0 ? ["", ""] : line.slice(comment + 4).split("|").map(each => each.trim());
    const result = /^return %([\w.]+): (.*?) = (\w+)(?: '(.*)')?$/.exec(code);
    if (result) {
      this.outputs.push({ of: result[1], type: result[2], kind: result[3], name: result[4] ?? result[3] });
      return;
    }
    const found = /^%([\w.]+): (.*?) = ([\w.]+)(.*)$/s.exec(code);
    if (!found) return;
    const [, name, type, word, rest] = found;
    const isInput = INPUT_KINDS.has(word) && !rest.startsWith("(");
    const quoted = isInput ? /'(.*)'/.exec(rest) : null;
    this.nodes.set(name, {
      name, type, line: code, module: module ?? "", pass: pass ?? "", place: this.nodes.size,
      kind: isInput ? word : "call",
      op: word,
      label: isInput ? quoted?.[1] ?? word : word.split(".")[1] ?? word,
      fqn: quoted?.[1] ?? "",
      references: isInput ? [] : [...rest.matchAll(/%([\w.]+)/g)].map(each => each[1]),
      inputs: [], users: [], results: [], path: [],
    });
  }

  // The path of each node along the module hierarchy, or the part of the step that it belongs to.
  place() {
    const common = paths => {
      const first = paths[0] ?? [];
      let same = 0;
      while (same < first.length && paths.every(path => path[same] === first[same])) same += 1;
      return first.slice(0, same);
    };
    for (const node of [...this.nodes.values()].reverse()) {
      const readers = node.users.map(each => each.path);
      if (node.kind !== "call") {
        if (node.fqn && HELD.has(node.kind) && node.kind !== "constant" && node.kind !== "optimizer")
          node.path = this.known(node.fqn);
        else if (HELD.has(node.kind)) node.path = readers[0] ?? [];
        else node.path = [node.kind === "batch" || node.kind === "input" ? "inputs" : "scalars"];
      } else if (node.op === "mobizo.noise" || node.op === "mobizo.noise_stack") node.path = ["noise"];
      else if (node.op === "mobizo.update" || node.pass === "append-optimizer") node.path = ["update"];
      else if (node.pass === "regroup-loss") node.path = ["loss"];
      else if (node.pass === "append-update") node.path = ["estimate"];
      else if (node.pass === "append-gradients") node.path = ["gradient", ...parts(node.module)];
      else if (readers.length && (node.op === "mobizo.expand" || (node.pass === "hoist-selections" && SELECTIONS.has(node.op))))
        node.path = common(readers);
      else {
        node.path = node.module ? parts(node.module) : node.pass ? common(readers) : [];
        if (!node.path.length) node.path = [OUTSIDE];
      }
    }
  }

  // The modules of a parameter's FQN, its own name left out.
  known(fqn) {
    return parts(fqn.slice(0, Math.max(fqn.lastIndexOf("."), 0)));
  }

  get loss() {
    return this.nodes.get(this.outputs.find(each => each.kind === "loss")?.of);
  }

  // All nodes that lie on a way from one node to another.
  between(from, to) {
    const down = reach(from, node => node.users);
    const up = reach(to, node => node.inputs);
    return new Set([...down].filter(node => up.has(node)));
  }
}

function reach(start, next) {
  const found = new Set([start]);
  const left = [start];
  while (left.length)
    for (const node of next(left.pop()))
      if (!found.has(node)) {
        found.add(node);
        left.push(node);
      }
  return found;
}

// `layers.3` is one step down: a list of modules computes nothing.
function parts(fqn) {
  return fqn.match(/[^.]+(?:\.\d+)*/g) ?? [];
}

function runsEverywhere(node) {
  return EVERYWHERE.has(node.kind) || EVERYWHERE_OPS.has(node.op);
}
