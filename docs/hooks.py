"""What the site has beside docs/: the documents of the repository's root, and a list of the decisions."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: Documents of the root, which link to docs/NAME.md where the site has NAME.md.
ROOT_DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
#: Sphinx's roles in docstrings, which Markdown does not know.
ROLES = re.compile(r":(?:class|meth|func|mod|attr):<code>~?([\w.]+)</code>")
#: Code that documents link to is shown as text.
SOURCES = re.compile(r"\]\((?:\.\./)*((?:examples|benchmarks|tests)/[\w/]+\.(?:py|ipynb))\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/."""
    for name in ROOT_DOCUMENTS:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    decisions = sorted(Path(config.docs_dir, "adr").glob("[0-9]*.md"))
    titles = [each.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for each in decisions]
    listed = "\n".join(f"- [{title}]({each.name})" for title, each in zip(titles, decisions, strict=True))
    files.append(File.generated(config, "adr/index.md", content=f"# Decisions\n\n{listed}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links between the repository's documents find their pages."""
    name = page.file.src_uri
    for found in {*SOURCES.findall(markdown)}:
        target = f"source/{Path(found).name}.txt"
        if target not in files.src_uris:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / found)))
    up = "../" * name.count("/")
    markdown = SOURCES.sub(lambda match: f"]({up}source/{Path(match[1]).name}.txt)", markdown)
    if name in ROOT_DOCUMENTS:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    markdown = re.sub(r"\]\((?:\.\./)+(README|CONTRIBUTING|CHANGELOG)\.md", rf"]({up}\1.md", markdown)
    markdown = re.sub(r"\]\(((?:\.\./)*)how-to/?\)", r"](\1how-to/own-loss.md)", markdown)
    return re.sub(r"\]\(((?:\.\./)*)adr/?\)", r"](\1adr/index.md)", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of Sphinx's roles, where the reference has what they name."""
    return ROLES.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
