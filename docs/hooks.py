"""MkDocs hooks: plan pictures and closed forms of the methods page, and the import graph of the architecture page.

All of them are made from the code at build time. A page that names a plan or a package that does not exist, or an
architecture page that leaves a package out, fails the build.
"""

from __future__ import annotations

import ast
import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "trajsurgery"
METHODS_PAGE, ARCHITECTURE_PAGE = "methods/index.md", "architecture.md"
PLAN = re.compile(r"<!-- plan: (?P<picture>[^|]+?) \| (?P<formula>.+?) -->")
"""A marker of the methods page: the plan to draw, and the one whose closed form is shown."""


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pictures and those of the benchmarks to the site."""
    for i, match in enumerate(PLAN.finditer((ROOT / "docs" / METHODS_PAGE).read_text())):
        files.append(File.generated(config, f"methods/plan-{i}.svg", content=picture(plan(match["picture"]).draw)))
    files.append(File.generated(config, "architecture.svg", content=picture(draw_imports)))
    for path in sorted((ROOT / "benchmarks").glob("*/results/*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace the markers of the methods page, check the architecture page, and point at the site's copy of results."""
    markdown = re.sub(r"(?:\.\./)+benchmarks/\w+/results/([\w.-]+\.png)", r"../results/\1", markdown)
    if page.file.src_uri == METHODS_PAGE:
        texts = [described(i, match) for i, match in enumerate(PLAN.finditer(markdown))]
        return PLAN.sub(lambda _: texts.pop(0), markdown)
    if page.file.src_uri == ARCHITECTURE_PAGE:
        listed = set(re.findall(r"^\| `(\w+)/?`", markdown, flags=re.M))
        if listed != packages():
            raise PluginError(f"docs/{ARCHITECTURE_PAGE} lists {sorted(listed)}; the library has {sorted(packages())}")
    return markdown


def plan(code: str) -> Any:
    """Evaluate the code of a plan, such as `leapalign(18, 7)`."""
    import trajsurgery

    return eval(code, {name: getattr(trajsurgery, name) for name in trajsurgery.__all__ if name.islower()})


def described(number: int, match: re.Match[str]) -> str:
    """Return the picture, arrow notation and closed form of a marker as Markdown."""
    symbolic = plan(match["formula"])
    return (
        f"![{match['picture']}](plan-{number}.svg)\n\n"
        f"```text\n{match['formula']}\n{symbolic}\n\n{symbolic.gradient()}\n```"
    )


def picture(draw: Any) -> str:
    """Return what `draw(path)` writes as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.svg"
        draw(path)
        return path.read_text()


def packages() -> set[str]:
    """Return the packages and modules at the top of the library."""
    return {p.stem for p in LIBRARY.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {
        "__init__",
        "__main__",
    }


def imported(path: Path) -> set[str]:
    """Return the top-level packages of the library that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "trajsurgery":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trajsurgery."):
            names.add(str(node.module).split(".")[1])
    return names & packages()


def draw_imports(path: Path) -> None:
    """Draw which package imports which, without the imports that follow from others."""
    import networkx as nx
    from matplotlib.figure import Figure

    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(sorted(packages() - {"errors"}))  # every package imports errors
    for file in LIBRARY.rglob("*.py"):
        package = file.relative_to(LIBRARY).parts[0].removesuffix(".py")
        graph.add_edges_from((other, package) for other in imported(file) if {other, package} <= set(graph) - {""})
    graph.remove_edges_from([edge for edge in graph.edges if edge[0] == edge[1]])
    if not nx.is_directed_acyclic_graph(graph):
        raise PluginError(f"packages import each other in a circle: {list(nx.find_cycle(graph))}")
    graph = nx.transitive_reduction(graph)
    for layer, names in enumerate(nx.topological_generations(graph)):
        for name in names:
            graph.nodes[name]["layer"] = layer
    places = nx.multipartite_layout(graph, subset_key="layer", align="horizontal", scale=1)
    places = {name: (x, -y) for name, (x, y) in places.items()}
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.add_subplot()
    style = {"boxstyle": "round,pad=0.5", "facecolor": "#e0f2f1", "edgecolor": "#00796b"}
    axes.scatter(*zip(*places.values()), alpha=0)  # sets the limits
    axes.margins(0.15)
    axes.set_axis_off()
    boxes = {
        name: axes.annotate(name, place, ha="center", va="center", fontsize=12, family="monospace", bbox=style)
        for name, place in places.items()
    }
    figure.draw_without_rendering()  # the boxes get their sizes, at which arrows end
    for start, end in graph.edges:
        arrow = {
            "arrowstyle": "-|>",
            "color": "#607d8b",
            "patchA": boxes[start].get_bbox_patch(),
            "patchB": boxes[end].get_bbox_patch(),
        }
        axes.annotate("", places[end], places[start], arrowprops=arrow)
    figure.savefig(path)
