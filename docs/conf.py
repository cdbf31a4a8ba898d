"""How Sphinx builds these pages: `make docs`."""

import re
import shutil
from os.path import relpath
from pathlib import Path

import latex2mathml.converter
from docutils.nodes import SkipNode, paragraph

import dagcore

DOCS = Path(__file__).parent
# Tables and figures become pages of the site: a copy, which git ignores.
MEASURED = DOCS / "benchmarks"
shutil.rmtree(MEASURED, ignore_errors=True)
shutil.copytree(
    DOCS.parent / "benchmarks", MEASURED, ignore=shutil.ignore_patterns("*.py", "*.sh", "__*")
)
(DOCS / "changelog.md").write_text((DOCS.parent / "CHANGELOG.md").read_text())

project = "dagcore"
author = copyright = "The dagcore authors"
release = version = dagcore.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
root_doc = "index"
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_ambiguous"]

autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"dagcore {release}"
html_static_path = []
html_show_sourcelink = False
html_show_copyright = False


def _inside(app, name, source):
    """Lead links between docs/ and benchmarks/ to the copies that the site has."""
    here, benchmarks = (DOCS / name).parent, DOCS.parent / "benchmarks"
    if name == "benchmarks/README":
        source[0] = (
            source[0].replace("](../docs/", "](../").replace("](../tests/", "](../../tests/")
        )
        return
    if name.startswith("benchmarks/"):
        source[0] = f"---\norphan: true\n---\n\n{source[0]}"
        return

    def led(match):
        target = (here / match[1]).resolve().relative_to(benchmarks)
        return f"]({relpath(MEASURED / target, here)}"

    source[0] = re.sub(r"\]\(((?:\.\./)+benchmarks/[^)#\s]+)", led, source[0])


SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


def _readable(app, kind, name, thing, options, lines):
    """Docstrings have Markdown's `code` and plain stars; reStructuredText wants them otherwise."""
    for k, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        for i, part in enumerate(parts):
            code = i % 2 == 1
            parts[i] = f"`{part}`" if code else re.sub(r"([*|]|(?<=\w)_\b)", r"\\\1", part)
        lines[k] = "".join(parts)
        following = next((one for one in lines[k + 1 :] if one.strip()), "")
        deeper = len(following) - len(following.lstrip()) > len(line) - len(line.lstrip())
        if line.endswith(":") and lines[k + 1 : k + 2] == [""] and deeper and line not in SECTIONS:
            lines[k] += ":"


# What latex2mathml does not know.
UNKNOWN = {r"\lVert": r"\Vert", r"\rVert": r"\Vert", r"\arg\max": r"\mathrm{arg\,max}"}


def _formula(display):
    """What writes a formula as MathML, which browsers show without a script."""

    def visit(writer, node):
        text = node.astext()
        for name, known in UNKNOWN.items():
            text = text.replace(name, known)
        html = latex2mathml.converter.convert(text, display=display)
        writer.body.append(f"<p>{html}</p>" if display == "block" else html)
        raise SkipNode

    return visit


def _contents(app, exception):
    """Write llms.txt: every page with its title and first sentence, for machines."""
    if exception is not None or app.builder.name != "html":
        return
    lines = [f"# {project} {release}", ""]
    for name in sorted(app.env.found_docs):
        if name.startswith("benchmarks/results"):
            continue
        told = next(app.env.get_doctree(name).findall(paragraph), None)
        sentence = "" if told is None else ": " + told.astext().replace("\n", " ").split(". ")[0]
        lines.append(f"- [{app.env.titles[name].astext()}]({name}.html){sentence}")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n")


def setup(app):
    """Called by Sphinx."""
    app.connect("build-finished", _contents)
    app.add_html_math_renderer("mathml", (_formula("inline"), None), (_formula("block"), None))
    app.connect("source-read", _inside)
    app.connect("autodoc-process-docstring", _readable, priority=400)
