"""The page as a file, and in a browser as a visitor has it."""

import base64
import json
import re
import shutil
import zlib

import numpy as np
import pytest
import torch

from nl_detectron import NonLocalBlock
from nl_detectron.analysis.attention import AttentionRecord
from nl_detectron.analysis.attention_figure import heat_colors, on_scale
from nl_detectron.analysis.attention_page import write_attention_page
from nl_detectron.analysis.placement import place

HEIGHT, WIDTH = 64, 96
BRIGHT = [(0, 0), (2, 4)]  # cells of 16 x 16 pixels that are alike and unlike all others
BOXES = np.array([[40.0, 8, 82, 60], [12.0, 8, 26, 29]])  # cells of 3 x 4 and of 1 x 1.5 pixels
IMAGE_BLOCK, HEAD_BLOCK, SIGNED_BLOCK = "res4.nonlocal4", "head.nonlocal2", "res4.nonlocal5"


def record_with_known_attention():
    """Places attend to the like, in blocks on the whole image and in one on objects' boxes."""
    block = NonLocalBlock(3, pairwise="gaussian", reduction=1, scale=False)
    torch.manual_seed(0)
    dot_product = NonLocalBlock(3, pairwise="dot_product", reduction=1, zero_init=False)
    whole, in_box = torch.zeros(1, 3, 4, 6), torch.zeros(1, 3, 14, 14)
    for row, column in BRIGHT:
        whole[..., row, column] = in_box[..., 2 * row, 2 * column] = 4
    return AttentionRecord(
        np.full((HEIGHT, WIDTH, 3), 100, np.uint8),
        BOXES,
        {IMAGE_BLOCK: block, HEAD_BLOCK: block, SIGNED_BLOCK: dot_product},
        {
            IMAGE_BLOCK: [place(whole, np.array([0.0, 0, WIDTH, HEIGHT]))],
            HEAD_BLOCK: [place(in_box, BOXES[0]), place(in_box.flip(2), BOXES[1])],
            SIGNED_BLOCK: [place(torch.randn(1, 3, 4, 6), np.array([0.0, 0, WIDTH, HEIGHT]))],
        },
    )


def data_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data" type="application/json">(.*?)</script>', text)[1])


def blocks_of(path, what="weights"):
    return data_of(path)["kinds"][what]


def places_of(block):
    """Places on the scale, -1 to 1, a list of (queries, rows, columns) for each region."""
    values = np.frombuffer(zlib.decompress(base64.b64decode(block["values"])), np.uint8)
    places = []
    for region in block["regions"]:
        keys = region["keys"]
        queries = len(region["highest"])
        count = queries * keys["rows"] * keys["columns"]
        shares = values[region["offset"] :][:count].reshape(queries, keys["rows"], -1) / 255
        places.append(2 * shares - 1)
    return places


@pytest.mark.parametrize("what", ["weights", "contributions"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_has_what_counts_for_every_cell(tmp_path, mirrored, what):
    record = record_with_known_attention()
    if mirrored:
        (features,) = record.features[IMAGE_BLOCK]
        record.features[IMAGE_BLOCK] = [place(features.x, np.array([WIDTH, 0.0, 0, HEIGHT]))]
    write_attention_page(tmp_path / "page.html", record)
    blocks = blocks_of(tmp_path / "page.html", what)
    assert [len(block["regions"]) for block in blocks] == [1, 2, 1]
    for i, block in enumerate(blocks):
        for region, places in zip(block["regions"], places_of(block)):
            left, top, right, bottom = region["box"]
            x = left + (np.arange(region["columns"]) + 0.5) * (right - left) / region["columns"]
            y = top + (np.arange(region["rows"]) + 0.5) * (bottom - top) / region["rows"]
            maps = record.maps([(column, row) for row in y for column in x], what).blocks[i].maps
            multiples = np.array([attention_map.multiples for attention_map in maps])
            places_there = on_scale(multiples, what, block["scale"])
            assert places == pytest.approx(places_there, abs=1 / 255)
            # A block that is the identity contributes nothing.
            highest = np.abs(multiples).max((1, 2)) * [m.mean > 0 for m in maps]
            assert region["highest"] == pytest.approx(highest, rel=1e-3)


def test_title_cannot_end_its_element(tmp_path):
    write_attention_page(tmp_path / "p.html", record_with_known_attention(), title="<b>{{data}}&")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert text.count("&lt;b&gt;{{data}}&amp;") == 2
    data_of(tmp_path / "p.html")


def test_loads_nothing(tmp_path):
    write_attention_page(tmp_path / "page.html", record_with_known_attention())
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|<link rel=.stylesheet|<script src", text)


def test_of_many_queries_only_some_are_in_it(tmp_path):
    # As res3 of an image of 800 x 1344 pixels: 282 million weights, here as random as can be.
    block = NonLocalBlock(2, pairwise="dot_product", reduction=1)
    x = torch.randn(1, 2, 100, 168, generator=torch.Generator().manual_seed(0))
    record = AttentionRecord(
        np.random.default_rng(0).integers(0, 255, (800, 1344, 3), np.uint8),
        np.empty((0, 4)),
        {"res3.nonlocal3": block},
        {"res3.nonlocal3": [place(x, np.array([0, 0, 1344.0, 800]))]},
    )
    write_attention_page(tmp_path / "page.html", record)
    assert (tmp_path / "page.html").stat().st_size < 10e6
    (block,) = blocks_of(tmp_path / "page.html")
    (region,) = block["regions"]
    assert "one in 10 x 10 can be asked" in block["note"]
    assert (region["rows"], region["columns"], region["step"]) == (100, 168, 10)
    asked = [(10 * i + 5, min(10 * j + 5, 167)) for i in range(10) for j in range(17)]
    (features,) = record.features["res3.nonlocal3"]
    maps = record.ask("res3.nonlocal3", features, asked)
    highest = [np.abs(attention_map.multiples).max() for attention_map in maps]
    assert region["highest"] == pytest.approx(highest, rel=1e-3)


def test_without_any_object(tmp_path):
    record = record_with_known_attention()
    record.features[HEAD_BLOCK].clear()
    write_attention_page(tmp_path / "page.html", record)
    assert blocks_of(tmp_path / "page.html")[1]["regions"] == []


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    """What a visitor does on the page, and sees."""

    def __init__(self, browser, path):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.support.ui import Select, WebDriverWait

        browser.get(path.as_uri())
        self.browser, self.actions, self.select = browser, ActionChains, Select
        self.wait = WebDriverWait(browser, 10)
        self.wait.until(lambda _: self.text("readout"))
        self.canvas = browser.find_element("id", "map")

    def text(self, name):
        return self.browser.find_element("id", name).text

    def choose(self, name, chooser="block"):
        self.select(self.browser.find_element("id", chooser)).select_by_visible_text(name)
        self.wait.until(lambda _: chooser == "kind" or f"{name}: " in self.text("note"))

    def point_at(self, x, y):
        size = self.canvas.size
        across, down = (x / WIDTH - 0.5) * size["width"], (y / HEIGHT - 0.5) * size["height"]
        self.actions(self.browser).move_to_element_with_offset(
            self.canvas, round(across), round(down)
        ).perform()

    def color_at(self, x, y):
        """Red, green, blue and alpha that are drawn over the image."""
        return self.browser.execute_script(
            "const canvas = document.getElementById('map');"
            "return [...canvas.getContext('2d').getImageData("
            f"{x} / {WIDTH} * canvas.width, {y} / {HEIGHT} * canvas.height, 1, 1).data]"
        )


@pytest.fixture
def page(browser, tmp_path):
    write_attention_page(tmp_path / "page.html", record_with_known_attention(), title="Attention")
    return Page(browser, tmp_path / "page.html")


# 12 times an even share of 24 cells, 98 of 196, and a small part of one.
TWELVE, MUCH, DARK = (
    pytest.approx([255 * part for part in heat_colors("weights")((place + 1) / 2)], abs=3)
    for place in on_scale(np.array([12, 98, 0.01]), "weights", 16)
)


def test_shows_what_is_under_the_pointer(page):
    page.point_at(75.5, 43.5)
    assert page.text("readout").startswith("Point 75, 43")
    for row, column in BRIGHT:
        assert page.color_at(16 * column + 3, 16 * row + 3) == TWELVE
    assert page.color_at(40, 40) == DARK
    assert page.text("readout").endswith(": at most 12 times an even share.")
    page.point_at(40.5, 40.5)  # black, which likes all alike
    assert "nearly even, at most 1 times an even share" in page.text("readout")
    assert page.color_at(75, 10)[3] < 5
    page.choose("contributions", "kind")  # its block is the identity
    page.wait.until(lambda _: "no place counts more than another" in page.text("readout"))
    page.choose(SIGNED_BLOCK)
    page.choose("weights", "kind")
    page.wait.until(lambda _: "times the mean magnitude" in page.text("readout"))


def test_blocks_of_objects(page):
    page.choose(HEAD_BLOCK)
    page.point_at(40 + 8.5 * 3, 8 + 4.5 * 4)  # in the larger box the cell in row 4, column 8
    assert "at most 98 times an even share" in page.text("readout")
    assert page.color_at(40 + 0.4 * 3, 8 + 0.6 * 4) == MUCH
    assert page.color_at(40 + 8.8 * 3, 8 + 4.2 * 4) == MUCH
    assert page.color_at(40 + 5.5 * 3, 8 + 4.5 * 4) == DARK
    page.point_at(12 + 8.5, 8 + 9.5 * 1.5)  # in the smaller box its mirror image
    assert "at most 98 times an even share" in page.text("readout")
    assert page.color_at(12 + 0.6, 8 + 13.4 * 1.5) == MUCH
    page.point_at(90, 30)
    assert "in no detected object's box" in page.text("readout")
    assert page.color_at(12 + 0.6, 8 + 13.4 * 1.5)[3] == 0


def test_signed_weights(page):
    page.choose(SIGNED_BLOCK)
    page.point_at(60, 30)
    assert "times the mean magnitude." in page.text("readout")


def test_arrow_keys_move_the_point(page):
    page.point_at(40.5, 40.5)
    assert "Point 40," in page.text("readout")
    page.canvas.send_keys("\ue014\ue014")  # right
    assert "Point 43," in page.text("readout") or "Point 44," in page.text("readout")
    page.canvas.send_keys("\ue012" * 60)  # left
    assert page.text("readout").startswith("Point 0,")


def test_no_errors_and_no_requests(page):
    page.choose(SIGNED_BLOCK)
    page.point_at(30, 30)
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    messages = [
        json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")
    ]
    urls = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert urls
    assert {url.split(":")[0] for url in urls} <= {"file", "data"}
