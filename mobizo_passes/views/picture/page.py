"""A picture as one HTML page: it loads nothing from elsewhere, and a click on a block lists its nodes."""

from __future__ import annotations

import json
from html import escape

from mobizo_passes.graph.text import node_text
from mobizo_passes.views.picture.svg import Picture

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}: one training step</title>
<style>
body {{ margin: 0; font-family: "Segoe UI", Roboto, Helvetica, Arial, sans-serif; background: #fff }}
main {{ overflow: auto; padding-bottom: 40vh }}
.block {{ cursor: pointer }}
.block:hover > rect:first-of-type, .block.chosen > rect:first-of-type {{ stroke: #1d4ed8; stroke-width: 2.5 }}
aside {{ position: fixed; left: 0; right: 0; bottom: 0; max-height: 40vh; overflow: auto; background: #f7f9fa;
  border-top: 1px solid #b8c4ce; padding: 8px 16px }}
aside h2 {{ font-size: 14px; margin: 4px 0 }}
aside pre {{ font-size: 12px; margin: 4px 0; white-space: pre }}
</style>
</head>
<body>
<main>
{svg}
</main>
<aside><h2 id="name">Click a block to list its nodes.</h2><pre id="nodes"></pre></aside>
<script type="application/json" id="blocks">{blocks}</script>
<script>
const blocks = JSON.parse(document.getElementById("blocks").textContent);
for (const group of document.querySelectorAll(".block")) {{
  group.addEventListener("click", () => {{
    document.querySelectorAll(".chosen").forEach(other => other.classList.remove("chosen"));
    group.classList.add("chosen");
    const block = blocks[group.dataset.block];
    document.getElementById("name").textContent = block.name;
    document.getElementById("nodes").textContent = block.nodes.join("\\n");
  }});
}}
</script>
</body>
</html>
"""


def to_page(picture: Picture) -> str:
    """Return a picture as an HTML page."""
    blocks = [
        {"name": block.name or label, "nodes": [node_text(n) for n in block.nodes]} for label, block in picture.blocks
    ]
    # The one sequence that would end the script element early.
    data = json.dumps(blocks, ensure_ascii=False).replace("</", "<\\/")
    return _PAGE.format(title=escape(picture.name), svg=picture.svg, blocks=data)
