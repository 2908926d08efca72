"""Protects the report's page: it holds what the run holds, whatever that is; nothing that users name can act in it; and
in a real browser without a network every node opens, by mouse and by keyboard, every image is there, nothing overflows.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import making
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from safetensors.numpy import save_file

from tdiff import results, storage
from tdiff.config import Config
from tdiff.figures import diagram, markup
from tdiff.figures.contents import Chart, Contents
from tdiff.figures.page import page
from tdiff.figures.sheets import sheet
from tdiff.runs import Run
from tdiff.tree.growth import leaf_reach
from tdiff.tree.topology import Topology
from tdiff.work import showing
from tdiff.work.drawing import Pictured
from tdiff.work.growing import Decisions
from tdiff.work.sampling import Samples

HOSTILE = (
    "</title><script>pwned=1</script>",
    '"><img src=x onerror="pwned=1">',
    "'; pwned=1; //",
    "<!--",
    "]]>&lt;b&gt;",
    "\u202eright to left",
    "half of a \ud800 pair",
    "a" * 200,
)


def balanced(leaves: int) -> Topology:
    tree = Topology.root_with_two_leaves("00-root")
    while len(tree.leaves) < leaves:
        tree = tree.split(min(tree.leaves, key=lambda node: tree[node].depth), f"{len(tree.leaves) - 1:02d}-split")
    return tree


def routed(topology: Topology, leaves: np.ndarray, sure: float = 0.98) -> np.ndarray:
    """Routing [M, R] of images into these leaf indices."""
    left = np.full((len(leaves), len(topology.deciding)), 0.5, np.float32)
    for row, leaf in enumerate(leaves):
        for node, child in pairwise(topology.path(topology.leaves[leaf])):
            if node in topology.deciding:
                left[row, topology.deciding.index(node)] = sure if topology[child].side == "left" else 1 - sure
    return left


def noise(count: int, channels: int, size: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def drawn(images: np.ndarray, leaves: np.ndarray, draws: np.ndarray) -> Samples:
    entries: list[dict[str, object]] = [
        {"index": k, "draw": int(draw), "leaf": int(leaf), "path": [0], "reach": (1 + leaf) / 100, "seed": 0}
        for k, (leaf, draw) in enumerate(zip(leaves, draws, strict=True))
    ]
    return Samples(images, 255 - images, entries)


def contents(
    topology: Topology,
    channels: int = 1,
    size: int = 8,
    labelled: bool = True,
    generated: bool = True,
    names: tuple[str, ...] = tuple("0123456789"),
    name: str = "demo",
    images: int = 300,
) -> Contents:
    """What a run of this tree shows, of noise."""
    leaves = len(topology.leaves)
    of = np.arange(images) % leaves
    train, labels = noise(images, channels, size), np.arange(images) % len(names) if labelled else None
    samples = [drawn(noise(30, channels, size), np.full(30, k), np.arange(30)) for k in range(leaves)]
    through = drawn(noise(4 * leaves, channels, size), np.tile(np.arange(leaves), 4), np.repeat(np.arange(4), leaves))
    lines = [{"images": 10.0 * k, "loss": 1 / k} for k in range(1, 400)]
    nodes = showing.nodes(
        topology,
        Decisions(routed(topology, of), labels),
        Pictured.of(train),
        len(names),
        samples if generated else None,
        np.full((leaves, len(names)), 3) if generated and labelled else None,
        (np.linspace(-30, -20, images), of),
    )
    return Contents(
        name=name,
        topology=topology,
        images=images,
        facts=[("Data", name)],
        nodes=nodes,
        config=f"name: {name}\n",
        class_names=names if labelled else (),
        draws=showing.root_draws(through) if generated else (),
        samples=showing.side_by_side(train, samples[0]) if generated else (),
        tables=[(name, [(name, "ACC"), (name, "-0.5")])],
        charts=showing.charts({"00-root": lines}, lines if generated else []),
        missing=() if generated else ("There is no diffusion model yet.",),
    )


class Parsed(HTMLParser):
    """A page's elements, with its nesting checked."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == tag]

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


# --- the page ----------------------------------------------------------------------------------------

TREES = {
    "one leaf": Topology.root_with_two_leaves("00-root").prune(2),
    "two leaves": balanced(2),
    "pruned": balanced(6).prune(balanced(6).leaves[0]),
    "ten": balanced(10),
    "sixty-four": balanced(64),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("generated", [True, False])
def test_the_page_holds_every_node_and_hangs_together(tree: Topology, generated: bool) -> None:
    found = Parsed(page(contents(tree, generated=generated, labelled=generated)))
    ids = found.ids
    assert max(Counter(ids).values()) == 1
    buttons = [attributes for attributes in found.all("button") if "data-node" in attributes]
    assert sorted(int(button["data-node"]) for button in buttons) == [node.id for node in tree.nodes]
    assert len({button["aria-label"] for button in buttons}) == len(buttons)
    for node in tree.nodes:
        assert f"node-{node.id}" in ids
    for _, attributes in found.elements:
        for key in ("aria-controls", "aria-labelledby", "for", "data-copy"):
            assert attributes.get(key, ids[0]) in ids
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
    for image in found.all("img"):
        assert "alt" in image
        if "data-copy" not in image:
            assert decoded(image["src"]).size == (int(image["width"]), int(image["height"]))
    assert {"tree", "numbers", "training", "config"} <= set(ids)
    assert ({"walk", "leaves", "samples"} <= set(ids)) == generated
    assert ("There is no diffusion model yet." in found.data) != generated


def test_the_page_needs_no_network() -> None:
    found = page(contents(balanced(3)))
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", found))
    parsed = Parsed(found)
    for _, attributes in parsed.elements:
        assert attributes.get("src", "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    policy = next(meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    script = found.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("name", HOSTILE)
def test_what_users_name_is_shown_and_does_nothing(name: str) -> None:
    plain = Parsed(page(contents(balanced(3), names=("plain", "b"))))
    text = page(contents(balanced(3), names=(name, "b"), name=name))
    found = Parsed(text)
    text.encode()  # what is written to a file
    assert Counter(tag for tag, _ in found.elements) == Counter(tag for tag, _ in plain.elements)
    shown = name.encode("utf-8", "replace").decode()
    assert found.data.count(shown) >= 3  # run, class, table


def test_the_demo_is_small() -> None:
    assert len(page(contents(balanced(10), images=1500)).encode()) < 2e6


def test_style_and_script_are_in_a_wheel() -> None:
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["tdiff.figures"]
    others = [file.name for file in (root / "tdiff" / "figures").iterdir() if file.suffix in (".css", ".js")]
    assert sorted(others) == ["report.css", "report.js"]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in others)


def test_nodes_are_called_by_the_leaves_below() -> None:
    names = diagram.names(balanced(3))
    assert names[0] == "Root"
    assert sorted(names.values()) == ["Leaf 0", "Leaf 1", "Leaf 2", "Leaves 0–1", "Root"]


# --- its pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "tile", "gap"), [(8, 16, 1), (28, 28, 1), (64, 64, 3)])
def test_a_sheet_has_every_pixel_in_its_place(channels: int, size: int, tile: int, gap: int) -> None:
    images = noise(10, channels, size)
    found = sheet(images, 4)
    assert (found.tile, found.gap, found.columns) == (tile, gap, 4)
    assert found.shown % size == 0
    assert 40 <= found.shown < 40 + size
    pixels = np.asarray(decoded(found.uri))
    assert pixels.shape == (*found.size[::-1], channels + 1)
    assert found.size == (4 * tile + 3 * gap, 3 * tile + 2 * gap)
    for k, image in enumerate(images):
        top, left = k // 4 * (tile + gap), k % 4 * (tile + gap)
        shown = pixels[top : top + tile, left : left + tile]
        assert (shown[:: tile // size, :: tile // size, :-1] == image.transpose(1, 2, 0)).all()
        assert (shown[..., -1] == 255).all()
    assert (pixels[..., -1] == 255).sum() == 10 * tile**2  # what lies between lets the page through


def test_a_sheet_of_nothing_is_refused() -> None:
    for images in (noise(0, 1, 8), noise(3, 2, 8), noise(3, 1, 8)[0]):
        with pytest.raises(ValueError, match="a sheet needs images"):
            sheet(images, 4)
    assert sheet(noise(2, 1, 8), 8).columns == 2


def test_histograms_name_the_largest_and_gather_the_rest() -> None:
    found = Parsed(markup.bars([1, 0, 7, 2], ["a", "b", "c"], "labels", most=2))
    assert [text for text in found.data if text in ("a", "b", "c", "3")] == ["c", "3"]  # the fourth has no name
    assert "1 other classes" in found.data
    assert "70%" in found.data
    assert markup.bars([0, 0], ["a", "b"], "labels") == ""
    assert "none" in markup.columns([0, 0], ["a", "b"])
    assert "<svg" not in markup.columns([1] * 100, [])


def test_long_lines_are_thinned_and_gaps_stay() -> None:
    points = [(float(k), 1.0 if k < 500 else 3.0) for k in range(1000)]
    points[500] = (500.0, float("nan"))
    found = markup.thinned(points, 100)
    assert len(found) <= 103
    assert sum(np.isnan(y) for _, y in found) == 1
    assert {y for _, y in found if not np.isnan(y)} == {1.0, 3.0}  # nothing is mixed across the gap
    assert markup.thinned([(1.0, 2.0)]) == [(1.0, 2.0)]
    assert markup.chart(Chart("empty", "", {"loss": [(1.0, float("nan"))], "none": []})) == ""
    assert "<path" in markup.chart(Chart("one point", "", {"loss": [(0.0, -1.0)]}))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-25.5, -20.1), (0, 85_000), (0.13, 0.99), (5, 5.001)])
def test_ticks_are_few_and_cover(low: float, high: float) -> None:
    ticks = markup.nice(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 3 <= len(ticks) <= 8


# --- what nodes hold ---------------------------------------------------------------------------------


def test_a_node_holds_what_its_leaves_hold() -> None:
    tree = balanced(3)
    leaves = np.array([0, 0, 0, 1, 2, 2])
    images = np.zeros((6, 1, 8, 8), np.uint8)
    images += np.array([10, 20, 90, 100, 200, 220], np.uint8)[:, None, None, None]
    left = routed(tree, leaves)
    labels = np.array([0, 0, 1, 1, 2, 2])
    elbo = np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    found = showing.nodes(tree, Decisions(left, labels), Pictured.of(images), 3, elbo=(elbo, leaves))
    reach = leaf_reach(tree, left)
    inner = next(node for node in tree.inner if node)
    below = [tree.leaves.index(leaf) for leaf in tree.leaves_below(inner)]
    assert found[0].share == pytest.approx(1)
    assert found[inner].share == pytest.approx(reach[:, below].sum(1).mean())
    assert found[inner].count == np.isin(leaves, below).sum()
    assert found[inner].elbo is not None
    assert found[inner].elbo.value == pytest.approx(elbo[np.isin(leaves, below)].mean())
    first = found[tree.leaves[0]]
    assert first.typical[:, 0, 0, 0].tolist() == [20, 10, 90]  # by distance to the average, about 41
    assert int(first.average[0, 0, 0]) == pytest.approx(41, abs=3)
    assert first.classes is not None
    assert first.classes.tolist() == [2, 1, 0]
    assert found[0].classes is not None
    assert found[0].classes.sum() == 6
    single = found[tree.leaves[1]].elbo
    assert single is not None
    assert (single.value, single.images, single.standard_error) == (-4.0, 1, None)


def test_an_inner_node_draws_with_all_its_leaves() -> None:
    tree = balanced(4)
    decisions = Decisions(routed(tree, np.arange(40) % 4), None)
    samples = [drawn(np.full((30, 1, 8, 8), k, np.uint8), np.full(30, k), np.arange(30)) for k in range(4)]
    found = showing.nodes(tree, decisions, Pictured.of(noise(40, 1, 8)), of_leaves=samples)
    root = found[0].treediffusion
    assert root is not None
    assert Counter(root[:, 0, 0, 0].tolist()) == dict.fromkeys(range(4), 6)
    assert found[0].treevae is not None
    assert (found[0].treevae == 255 - root).all()  # of the same latents
    last = found[tree.leaves[3]].treediffusion
    assert last is not None
    assert (last == 3).all()
    assert found[0].classes is None


def test_an_empty_leaf_and_a_single_image() -> None:
    tree = balanced(2)
    found = showing.nodes(tree, Decisions(np.zeros((1, 1), np.float32), None), Pictured.of(noise(1, 3, 8)))
    assert found[1].count == 0
    assert len(found[1].typical) == len(found[1].spread) == 0
    assert found[2].count == 1
    text = page(Contents("empty", tree, 1, (), found, ""))
    assert "No image comes here" in text
    Parsed(text)


@pytest.mark.parametrize("nodes", [3, 19, 127])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_many_large_images_are_fewer(nodes: int, shape: tuple[int, int, int]) -> None:
    count = showing.images_per_sheet(shape, nodes)
    assert 4 <= count <= 24
    assert count < 8 or count % 8 == 0
    assert count == 4 or 4 * nodes * count * np.prod(shape) <= showing.NODE_BYTES


# --- a run folder ------------------------------------------------------------------------------------


def tree_alone(folder: Path, labelled: bool = False) -> Run:
    """A run with a finished tree of two leaves and nothing else."""
    data = making.make_set(folder / "data", [20, 12], (1, 8, 8), labelled)
    run = Run(str(folder / "runs" / "<alone>"))
    record = {"id": "a", "digest": "b", "config": Config().model_dump(mode="json"), "bf16": False}
    record |= {"data_url": data.url, "data_digest": data.manifest.digest}
    storage.write_text(run.at("run.json"), json.dumps(record))
    for phase in ("00-root", "01-finetune"):
        url = run.at("tree", phase)
        storage.write_text(storage.join(url, "tree.json"), balanced(2).to_json())
        storage.write_text(storage.join(url, "summary.json"), json.dumps({"wall_seconds": 1.5}))
        lines = "\n".join(json.dumps({"step": k, "images": 10 * k, "loss": 1 / k}) for k in range(1, 9))
        storage.write_text(storage.join(url, "metrics", "000000008.jsonl"), lines + "\n")
        left = np.linspace(0, 1, 32, dtype=np.float32)[:, None]
        routing = {"train": left} | ({"train.labels": np.arange(32) % 3} if labelled else {})
        save_file(routing, storage.join(url, "routing.safetensors"))
        storage.finish(url)
    return run


@pytest.mark.parametrize("labelled", [True, False])
def test_a_finished_tree_alone_has_a_report(tmp_path: Path, labelled: bool) -> None:
    run = tree_alone(tmp_path, labelled)
    found = Parsed(Path(results.report(run)).read_text())
    assert "<alone>" in found.data
    assert {"tree", "numbers", "training", "config", "node-2"} <= set(found.ids)
    assert not {"walk", "leaves", "samples"} & set(found.ids)
    for command in ("train", "evaluate"):  # what it lacks, and what makes it
        assert sum(f"python -m tdiff.{command}" in text for text in found.data) == 1
    assert ("Labels of its images, not used in training" in found.data) == labelled
    assert "3.0" in found.data  # seconds in all
    assert not any("ELBO" in text and len(text) == 4 for text in found.data)


def test_likelihoods_of_another_tree_are_not_shown(tmp_path: Path) -> None:
    run = tree_alone(tmp_path)
    url = run.at("likelihood.safetensors")
    for leaves, shown in ((3, False), (2, True)):
        save_file({"elbo": np.full(5, -7.25), "log_reach": np.zeros((5, leaves))}, url)
        found = Parsed(Path(results.report(run)).read_text())
        assert ("−7.25 ± 0.00 nats" in found.data) == shown


# --- in a browser ------------------------------------------------------------------------------------

KINDS = {
    "demo": lambda: contents(balanced(10), images=1500),
    "colour": lambda: contents(balanced(5), channels=3, size=64, images=100),
    "forest": lambda: contents(
        balanced(64), channels=3, size=16, images=640, names=HOSTILE[:6] + HOSTILE[7:], name=HOSTILE[1]
    ),
    "alone": lambda: contents(balanced(2), size=28, labelled=False, generated=False, name="a" * 200),
    "one leaf": lambda: contents(TREES["one leaf"], labelled=False),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Contents, str]]:
    """What every kind of run shows, and where its page lies."""
    out = {}
    for kind, make in KINDS.items():
        found = make()
        file = tmp_path_factory.mktemp("report") / "index.html"
        file.write_text(page(found))
        out[kind] = (found, file.as_uri())
    return out


class Watched:
    """A page in a browser without a network, and all that goes wrong there."""

    def __init__(self, context: BrowserContext, url: str):
        self.trouble: list[str] = []
        context.set_offline(True)
        context.set_default_timeout(60_000)
        self.page: Page = context.new_page()
        self.page.on("console", lambda message: self.trouble.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("requestfailed", lambda request: self.trouble.append(f"failed: {request.url[:80]}"))
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on("dialog", lambda dialog: self.trouble.append(dialog.message))
        self.page.goto(url)

    def _asked(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.trouble.append(f"asked for {url[:80]}")

    def broken_images(self, within: str = "body") -> list[str]:
        """Images that hold nothing, or, of those shown, have no size."""
        script = """from => Promise.all([...document.querySelectorAll(`${from} img`)].map(async image => {
            try { await image.decode() } catch { return image.alt }
            const shown = image.offsetParent === null || image.clientWidth > 0 && image.clientHeight > 0;
            return image.naturalWidth > 0 && shown ? "" : image.alt;
        }))"""
        found: list[str] = self.page.evaluate(script, within)
        return [alt for alt in found if alt]

    def overflow(self) -> int:
        """CSS pixels by which the page is wider than the window it was given."""
        assert self.page.viewport_size is not None
        return int(self.page.evaluate("document.documentElement.scrollWidth")) - self.page.viewport_size["width"]


@pytest.fixture
def opened(
    browser: Browser, pages: dict[str, tuple[Contents, str]], request: pytest.FixtureRequest
) -> Iterator[Watched]:
    """The page of `request.param` = (kind, width, options of the browser's context); nothing may go wrong there."""
    kind, width, options = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    watched = Watched(context, pages[kind][1])
    yield watched
    assert watched.trouble == []
    context.close()


def on(*kinds: str, width: int = 1280, **options: object) -> pytest.MarkDecorator:
    cases = [(kind, width, options) for kind in kinds]
    return pytest.mark.parametrize("opened", cases, ids=kinds, indirect=True)


slow = pytest.mark.slow


@slow
@on("demo", "colour", "alone", "one leaf")
def test_every_node_opens_and_its_images_are_there(opened: Watched) -> None:
    tab = opened.page
    assert opened.broken_images() == []
    assert tab.locator(".node.open").count() == 1
    for button in tab.locator(".node-button").all():
        node = button.get_attribute("data-node")
        button.click()
        shown = tab.locator(f"#node-{node}")
        assert shown.is_visible()
        assert tab.locator(".node.open").count() == 1
        assert button.get_attribute("aria-expanded") == "true"
        assert "%" in shown.inner_text()
        if "No image comes here" not in shown.inner_text():
            assert shown.locator("img").count() >= 2
        assert opened.broken_images(f"#node-{node}") == []
        assert tab.url.endswith(f"#node-{node}")


@slow
@on("forest")
def test_names_do_nothing_in_a_forest(opened: Watched) -> None:
    tab = opened.page
    assert opened.broken_images() == []
    tab.locator("#button-126").click()
    assert tab.locator("#node-126").is_visible()
    assert tab.evaluate("typeof pwned") == "undefined"
    assert tab.locator("h1").inner_text() == HOSTILE[1]
    box = tab.locator("#box")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")  # in its own box
    tab.locator("#fit").click()
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    for _ in range(4):
        tab.locator("#larger").click()
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")


@slow
@on("demo")
def test_the_tree_is_walked_by_keyboard(opened: Watched, pages: dict[str, tuple[Contents, str]]) -> None:
    tab, tree = opened.page, pages["demo"][0].topology
    focused = "document.activeElement.dataset.node ?? ''"
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate(focused):
            break
    assert tab.evaluate(focused) == "0"
    assert tab.locator(".node-button[tabindex='0']").count() == 1
    left, right = tree.children(0)
    for key, node in (
        ("ArrowUp", 0),
        ("ArrowDown", left),
        ("ArrowLeft", left),
        ("ArrowRight", right),
        ("ArrowLeft", left),
        ("ArrowDown", tree.children(left or 0)[0]),
        ("ArrowUp", left),
        ("End", tree.top_down[-1]),
        ("Home", 0),
        ("ArrowDown", left),
    ):
        tab.keyboard.press(key)
        assert tab.evaluate(focused) == str(node), key
    assert tab.locator("#node-0").is_visible()  # moving opens nothing
    tab.keyboard.press("Enter")
    assert tab.locator(f"#node-{left}").is_visible()
    assert "Shown in the panel" in tab.locator("#said").inner_text()
    assert tab.evaluate(focused) == str(left)
    tab.locator(f"#node-{left} .relatives a").first.click()  # to the node above
    tab.wait_for_function("document.activeElement.id === 'node-0-title'")  # a link's event comes after the click
    assert tab.locator("#node-0").is_visible()


@slow
@on("demo", "colour")
def test_the_slider_walks_a_draw_through_the_leaves(opened: Watched) -> None:
    tab = opened.page
    pixels = """() => {
        const canvas = document.querySelector("canvas[data-model=treediffusion]");
        return canvas.toDataURL();
    }"""
    tile = """([draw, leaf]) => {
        const image = document.querySelectorAll(".draw")[draw].querySelector("img[data-model=treediffusion]");
        const canvas = document.createElement("canvas");
        const size = canvas.width = canvas.height = image.naturalHeight;
        const step = size + Number(image.dataset.gap);
        const context = canvas.getContext("2d");
        context.drawImage(image, leaf * step, 0, size, size, 0, 0, size, size);
        return canvas.toDataURL();
    }"""
    slider = tab.locator("#leaf")
    slider.focus()
    tab.keyboard.press("Home")
    seen = []
    for leaf in range(int(slider.get_attribute("max") or 0) + 1):
        assert tab.locator("#at").inner_text() == f"leaf {leaf} · {leaf + 1}%"
        assert slider.get_attribute("aria-valuetext") == f"leaf {leaf}, probability {leaf + 1}%"
        seen.append(tab.evaluate(pixels))
        assert seen[-1] == tab.evaluate(tile, [0, leaf])
        tab.keyboard.press("ArrowRight")
    assert len(set(seen)) == len(seen)
    tab.locator("input[name=draw]").first.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".draw.open").count() == 1
    assert tab.evaluate(pixels) == tab.evaluate(tile, [1, len(seen) - 1])
    tab.locator(".draw.open li").nth(1).click()
    assert tab.locator("#at").inner_text().startswith("leaf 1 ")


@slow
@pytest.mark.parametrize("width", [360, 320])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_overflows_on_a_phone(
    browser: Browser, pages: dict[str, tuple[Contents, str]], kind: str, width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    watched = Watched(context, pages[kind][1])
    assert watched.overflow() <= 0
    last = watched.page.locator(".node-button").last
    last.tap()
    assert watched.page.locator(f"#node-{last.get_attribute('data-node')}").is_visible()
    watched.page.locator("summary").tap()
    assert watched.overflow() <= 0
    assert watched.trouble == []
    context.close()


@slow
@on("demo", java_script_enabled=False)
def test_without_a_script_everything_is_there(opened: Watched) -> None:
    tab = opened.page
    for section in tab.locator(".node").all():
        assert section.is_visible()
    assert not tab.locator("#leaf").is_visible()
    assert tab.locator(".draw").first.is_visible()
    assert tab.locator("img:visible:not([src])").count() == 0


@slow
@on("demo", color_scheme="dark")
def test_dark_is_dark_and_paper_is_white(opened: Watched) -> None:
    tab = opened.page
    ground = "getComputedStyle(document.body).backgroundColor"
    assert max(map(int, re.findall(r"\d+", tab.evaluate(ground))[:3])) < 60
    tab.emulate_media(media="print")
    assert tab.evaluate(ground) == "rgb(255, 255, 255)"
    for section in tab.locator(".node").all():
        assert section.is_visible()
    assert tab.locator(".draw").last.is_visible()
    assert tab.pdf(format="A4").startswith(b"%PDF")


@slow
@on("demo", "forest", "alone")
def test_text_stands_out_from_its_ground(opened: Watched) -> None:
    """WCAG AA: 4.5 to 1 for all text, light and dark."""
    script = """() => {
        const parse = colour => colour.match(/[\\d.]+/g).map(Number);
        const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const light = colour => colour.slice(0, 3).map(v => linear(v / 255))
            .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
        const ground = element => {
            for (; element; element = element.parentElement) {
                const colour = parse(getComputedStyle(element).backgroundColor);
                if (colour.length < 4 || colour[3] > 0) return colour;
            }
        };
        let worst = 99;
        for (const element of document.querySelectorAll("body *")) {
            if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
            if (element.offsetParent === null || element.closest("script")) continue;
            const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
            worst = Math.min(worst, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
        }
        return worst;
    }"""
    for scheme in ("light", "dark"):
        opened.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert opened.page.evaluate(script) >= 4.5
