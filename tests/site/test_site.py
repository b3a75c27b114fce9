"""The built site: every link leads somewhere, formulas and figures are there."""

import collections
import html.parser
import importlib
import importlib.resources
import importlib.util
import inspect
import json
import os
import pathlib
import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.parse

import pytest

import flood_optax

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("sphinx_book_theme") is None,
        reason="Building the site needs the extra `docs`.",
    ),
]


class Page(html.parser.HTMLParser):
    """What a page points to, what it can be pointed at, and its text."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.links, self.images, self.scripts, self.ids = [], [], [], set()
        self.tags, self.text, self.titles = collections.Counter(), "", []
        self.classes, self.moved = set(), False
        self._skip = self._heading = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags[tag] += 1
        self.classes |= set((given.get("class") or "").split())
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") == "stylesheet":
            self.scripts.append(given["href"])
        self.moved |= given.get("http-equiv") == "refresh"
        if tag == "img" and given.get("src"):
            self.images.append(given["src"])
        if tag == "script" and given.get("src"):
            self.scripts.append(given["src"])
        self._skip += tag in ("script", "style", "math")
        self._heading += tag == "h1"

    def handle_endtag(self, tag):
        self._skip -= tag in ("script", "style", "math")
        self._heading -= tag == "h1"

    def handle_data(self, data):
        if not self._skip:
            self.text += data
        if self._heading:
            self.titles.append(data)


def build(source, out):
    """Sphinx with warnings as errors, as `python -m sphinx -W docs OUT` has it."""
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", source, out],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site that `.ci/site` has built, or one of our own."""
    if built := os.environ.get("FLOOD_OPTAX_SITE"):
        return Site(pathlib.Path(built))
    out = tmp_path_factory.mktemp("site")
    result = build("docs", out)
    assert result.returncode == 0, result.stderr
    return Site(out)


class Site(dict):
    """The pages by their address under the root, such as `api/index.html`."""

    def __init__(self, root: pathlib.Path):
        paths = [path.relative_to(root).as_posix() for path in root.rglob("*.html")]
        super().__init__(
            (path, Page(root / path))
            for path in sorted(paths)
            if not path.startswith("_static/")
        )
        self.root = root

    def target(self, address: str, link: str) -> tuple[str, str] | None:
        """The file and the place in it that a link means; None for another site."""
        url = urllib.parse.urlsplit(link)
        if url.scheme or url.netloc:
            return None
        path = posixpath.join(
            posixpath.dirname(address), urllib.parse.unquote(url.path)
        )
        return (
            posixpath.normpath(path) if url.path else address,
            urllib.parse.unquote(url.fragment),
        )

    def dead_links(self) -> list[tuple[str, str]]:
        """The links inside the site whose page, or place on the page, is missing."""
        dead = []
        for address, page in self.items():
            for link in page.links + page.images + page.scripts:
                if (found := self.target(address, link)) is None:
                    continue
                path, place = found
                if not (self.root / path).is_file() or (
                    place and path in self and place not in self[path].ids
                ):
                    dead.append((address, link))
        return dead


GENERATED = "api/generated/"


def test_every_internal_link_of_the_site_leads_somewhere(site):
    assert sum(len(page.links) for page in site.values()) > 1000
    assert site.dead_links() == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html">x</a><a href="#here">y</a><a href="#there">z</a>'
        '<p id="there"></p>'
    )
    dead = [("a.html", "b.html"), ("a.html", "#here")]
    assert Site(tmp_path).dead_links() == dead


def test_pages_need_no_network(site):
    for address, page in site.items():
        for needed in page.scripts + page.images:
            assert not urllib.parse.urlsplit(needed).netloc, (address, needed)


def lookup(name):
    """The public object that `flood_optax.levels.warmup` names."""
    found = flood_optax
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def test_formulas_of_every_page_are_drawn(site):
    """As many as the sources have, and no TeX is left between the words."""
    assert site[f"{GENERATED}flood_optax.average_params.html"].tags["math"] > 2
    for address, built in site.items():
        assert not re.search(r":math:|\$\$|\\frac|\\nabla|\\phi", built.text), address
        if address.startswith(GENERATED):
            doc = inspect.getdoc(lookup(pathlib.Path(address).stem)) or ""
            written = len(re.findall(r":math:`|\.\. math::", doc))
            assert built.tags["math"] == written, address


def test_figures_of_every_page_are_there(site):
    drawn = {path.name for path in (DOCS / "figures").glob("*.svg")}
    shown = set()
    for source in DOCS.rglob("*.md"):
        address = source.relative_to(DOCS).with_suffix(".html").as_posix()
        text = source.read_text(encoding="utf-8")
        if address == "index.html":  # which includes it
            text = (ROOT / "README.md").read_text(encoding="utf-8")
        figures = re.findall(
            r"^!\[[^\]]*\]\((?:docs/|\.\./)?figures/([^)]+)\)", text, re.MULTILINE
        )
        images = [pathlib.Path(image).name for image in site[address].images]
        assert images == figures, address
        shown |= set(images)
    assert shown == drawn


def test_a_number_and_its_interval_are_on_one_line_in_every_table(site):
    shown = (site.root / "evidence" / "levels.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td.*?</td>", shown, re.DOTALL)
    assert any(
        re.search(r"\d\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}\d", one) for one in cells
    )
    assert not [one for one in cells if re.search(r"\d (±|to) \d", one)]


def test_every_page_of_a_public_name_has_its_signature_and_examples(site):
    pages = [address for address in site if address.startswith(GENERATED)]
    assert len(pages) > 30
    for address in pages:
        name = pathlib.Path(address).stem
        assert name in site[address].ids, name
        if "Examples:" in (inspect.getdoc(lookup(name)) or ""):
            assert ">>>" in site[address].text, name


def test_every_public_method_is_on_the_page_of_its_class(site):
    shown = {place for page in site.values() for place in page.ids}
    pages = [pathlib.Path(address).stem for address in site if GENERATED in address]
    wanted = {
        f"{name}.{method}"
        for name in pages
        if inspect.isclass(lookup(name))
        for method, value in vars(lookup(name)).items()
        if inspect.isfunction(value)
        and not method.startswith("_")
        and value.__module__.startswith("flood_optax")
    }
    assert "flood_optax.sweep.Result.best" in wanted
    assert wanted <= shown


def test_every_page_is_two_clicks_from_the_front(site):
    reached = {"index.html"}
    for _ in range(2):
        links = [(page, link) for page in reached for link in site[page].links]
        found = {site.target(page, link) for page, link in links}
        reached |= {target[0] for target in found if target and target[0] in site}
    kept = {address for address, page in site.items() if not page.moved}
    assert kept - reached <= {"genindex.html", "search.html"}


def test_an_old_address_leads_to_the_page_that_has_its_text_now(site):
    moved = {address: page for address, page in site.items() if page.moved}
    assert {"strokes.html", "cite.html", "versioning.html"} <= set(moved)
    for address, page in moved.items():
        path, _ = site.target(address, page.links[0])
        assert not site[path].moved, address


def test_no_page_shows_a_fault_of_its_source(site):
    for address, built in site.items():
        assert "system-message" not in built.classes, address
        assert built.titles, address


@pytest.mark.parametrize(
    "words", ["Training loss goes to zero", "loss = (loss - b).abs() + b"]
)
def test_the_words_people_search_for_are_on_the_first_page_they_run(site, words):
    assert words in site["quickstart.html"].text


def description(path):
    """What a search engine shows of a page."""
    found = re.findall(r'<meta name="description" content="([^"]*)"', path.read_text())
    assert len(found) == 1, path
    return found[0]


def test_every_page_has_a_title_and_a_description_of_its_own(site):
    heads = {}
    for address, page in site.items():
        if page.moved or address in ("genindex.html", "search.html"):
            continue
        path = site.root / address
        (title,) = re.findall(r"<title>(.*?)</title>", path.read_text(), re.DOTALL)
        assert title not in heads, address
        heads[title] = description(path)
        assert 40 < len(heads[title]) < 400, address
    front = re.search(r"<title>(.*?)</title>", (site.root / "index.html").read_text())
    assert front[1].startswith("Flooding for JAX and Optax ")
    assert len(set(heads.values())) > 0.9 * len(heads)


def test_every_page_leads_to_the_repository_and_its_issues(site):
    with (ROOT / "pyproject.toml").open("rb") as file:
        urls = tomllib.load(file)["project"]["urls"]
    for address, page in site.items():
        assert page.moved or urls["Source"] in page.links, address
    issues = [link for link in site["traps.html"].links if urls["Issues"] in link]
    assert issues


SOUGHT = {
    "LoRA": "traps",
    "PINN": "traps",
    "GAN": "family",
    "unlearning": "unlearning",
    "loss goes to zero": "quickstart",
    "free bits": "family",
    "gradient accumulation": "traps",
    "sharpness": "theory",
}


@pytest.mark.parametrize("words", SOUGHT)
def test_search_finds(site, words):
    """As the page's own script does: every stem, in the titles or in the text."""
    text = (site.root / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(
        re.fullmatch(r"Search\.setIndex\((.*)\);?\s*", text, re.DOTALL)[1]
    )
    english = pytest.importorskip("sphinx.search.en").SearchEnglish({})

    def pages(word):
        stem = english.stem(word.lower())
        found = set()
        for terms in (index["terms"], index["titleterms"]):
            numbers = terms.get(stem, [])
            found |= {numbers} if isinstance(numbers, int) else set(numbers)
        return {index["docnames"][number] for number in found}

    stops = english.stopwords
    found = [pages(word) for word in words.split() if word.lower() not in stops]
    assert SOUGHT[words] in set.intersection(*found)
    assert not pages("zeppelin")


def test_a_name_of_ours_that_leads_nowhere_stops_the_build(tmp_path):
    """Docstrings name each other; names of JAX may be out of reach, with no network."""
    conf = (
        (DOCS / "conf.py")
        .read_text()
        .replace("pathlib.Path(__file__).parent", f"pathlib.Path({str(DOCS)!r})")
    )
    (tmp_path / "conf.py").write_text(conf + "redirects = {}\n")
    (tmp_path / "_static").mkdir()
    (tmp_path / "_templates").mkdir()
    (tmp_path / "_static" / "site.css").touch()
    text = "# Title\n\n{py:obj}`flood_optax.flooded` {py:obj}`jax.no_such_name`\n"
    (tmp_path / "index.md").write_text(text)
    result = build(tmp_path, tmp_path / "out")
    assert result.returncode != 0
    assert "a reference to flood_optax.flooded leads nowhere" in result.stderr
    assert "no_such_name" not in result.stderr


def test_a_warning_stops_the_build(tmp_path):
    (tmp_path / "conf.py").write_text("extensions = ['myst_parser']\n")
    (tmp_path / "index.md").write_text("# Title\n\n[gone](gone.md)\n")
    result = build(tmp_path, tmp_path / "out")
    assert result.returncode != 0
    assert "gone.md" in result.stderr


# ---- in a browser ----


BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"


@pytest.fixture(scope="module")
def chromium():
    """A Chromium of this machine, driven by the package that brings axe-core."""
    missing = "The pages were not looked at in a browser: it needs the extra `dev`."
    driver = pytest.importorskip("playwright.sync_api", reason=missing)
    pytest.importorskip("axe_playwright_python", reason=missing)
    paths = filter(None, map(shutil.which, BROWSERS))
    if (path := next(paths, None)) is None:
        pytest.skip(
            "The pages were not looked at in a browser: none of "
            f"{', '.join(BROWSERS)} is on the path."
        )
    with driver.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def seen_by(view, site, addresses):
    """Serious findings of axe-core, and pages to be moved sideways.

    The dark theme differs in its colours alone, so it is asked for their contrast.
    """
    axe = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js")
    script, wrong = axe.read_text(encoding="utf-8"), []
    for address in addresses:
        view.goto((site.root / address).as_uri())
        view.evaluate(script)
        over = view.evaluate("document.documentElement.scrollWidth - innerWidth")
        if over > 0:
            wrong.append((address, "wider than the screen"))
        for theme, run in (
            ("light", "axe.run()"),
            ("dark", "axe.run({runOnly: 'color-contrast'})"),
        ):
            view.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
            wrong += [
                (address, theme, fault["id"], *(n["html"] for n in fault["nodes"][:1]))
                for fault in view.evaluate(run)["violations"]
                if fault["impact"] in ("serious", "critical")
            ]
    return wrong


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_are_accessible_and_no_wider_than_the_screen(site, chromium, width):
    # Without motion: while a colour fades to the theme's, its contrast is neither's.
    view = chromium.new_page(
        viewport={"width": width, "height": 900}, reduced_motion="reduce"
    )
    few = ("flood.html", "sweep.Result.html", "levels.noise_floor.html")
    addresses = [
        address
        for address, page in site.items()
        if not page.moved and (GENERATED not in address or address.endswith(few))
    ]
    assert seen_by(view, site, addresses) == []
    view.close()


def test_a_serious_finding_is_found(tmp_path, chromium):
    (tmp_path / "index.html").write_text(
        '<html lang="en"><title>x</title><style>div {width:500px} p {color:#eee} '
        "[data-theme=dark] p {color:#111} [data-theme=dark] h1 {color:#eee}</style>"
        "<main><h1>dark</h1><div><p>light</p></div></main></html>"
    )
    view = chromium.new_page(viewport={"width": 390, "height": 900})
    wide, pale, dark = seen_by(view, Site(tmp_path), ["index.html"])
    assert wide == ("index.html", "wider than the screen")
    assert pale[1:] == ("light", "color-contrast", "<p>light</p>")
    assert dark[1:] == ("dark", "color-contrast", "<h1>dark</h1>")
    view.close()
