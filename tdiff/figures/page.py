"""The report: one self-contained HTML page that needs no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

CAPTIONS = {
    "tree.png": "The learned tree: at every node the average of its images, real examples, and its share of them.",
    "leaves.png": "New images of every leaf.",
    "root-draw.png": "One draw at the root, carried through every leaf: same latents, same noise.",
    "samples.png": "Real images, and samples from the prior: the TreeVAE's, and TreeDiffusion's for the same latents.",
    "losses-tree.png": "Negative ELBO while the tree grows; splits count only their sub-tree, on the leaf's images.",
    "losses-diffusion.png": "Denoising loss of the diffusion model.",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1d2630;
  background: #fff }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto } figcaption { color: #53606d }
.wide { overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .3rem .8rem; border-bottom: 1px solid #d9dfe5; text-align: left }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f4f6f8; padding: 1rem; overflow-x: auto }
@media print { details { display: none } }
"""


def page(
    name: str,
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]],
    pictures: Mapping[str, bytes],
    config: str,
) -> str:
    """HTML of a run: its pictures (PNG by file name), its numbers as titled tables, its config as YAML."""
    body = [f"<h1>{html.escape(name)}</h1>", "<p>A tree of clusters, and a diffusion model of each.</p>"]
    for file, content in pictures.items():
        data = base64.b64encode(content).decode()
        caption = html.escape(CAPTIONS.get(file, file))
        body.append(
            f'<figure><div class="wide"><img src="data:image/png;base64,{data}" alt="{caption}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    for title, (header, *rows) in tables:
        body.append(f'<h2>{html.escape(title)}</h2><div class="wide"><table><thead>{_row("th", header)}</thead><tbody>')
        body += [_row("td", row) for row in rows]
        body.append("</tbody></table></div>")
    body.append(f"<details><summary>config</summary><pre>{html.escape(config)}</pre></details>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
