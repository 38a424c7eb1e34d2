import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cnnray.evaluation.findings import Finding
from cnnray.evaluation.metrics import UNPREDICTED, UNRANKED, compute_metrics
from cnnray.evaluation.report import Mistake, render_report

VOID = {"meta", "img", "br"}
SECTIONS = [
    "Learning curves",
    "Diagnosis",
    "Confusion matrix",
    "Most confused pairs",
    "Classes",
    "Calibration",
    "Worst mistakes",
    "Facts",
]
INVISIBLE = "\x1b\x85\u202e\udcff\n"
HOSTILE = [
    "<img src=x onerror=alert(1)>" + INVISIBLE,
    '"><script>alert(1)</script>' + INVISIBLE,
    "' onmouseover='alert(1)' \x00\x1b[31m\r\n\x9b",
    "\u202e{{ 7 * 7 }}{% raw %}\udcff" + INVISIBLE + "x" * 5000,
    "</title></style></bdi><!-- javascript:alert(1)" + INVISIBLE,
]


class Page(HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.sources += [value for name, value in attrs if name == "src"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def render(make_predictions):
    """Render a small report in which every text that comes from outside is ``names``."""

    def render(names, *, history=({"epoch": 1, "val_loss": 0.5},), thumbnails=(None,)):
        rows = [(f"k{i}", i, i, 0.9, 0.2, 0) for i in range(5)]
        rows += [("m", 0, 1, 0.8, 2.0, 1), ("n", 2, UNPREDICTED, 0.0, float("nan"), UNRANKED)]
        mistakes = [
            Mistake(names[2], names[0], names[1], confidence=0.8, thumbnail=thumbnail)
            for thumbnail in thumbnails
        ]
        return render_report(
            title=names[0],
            metrics=compute_metrics(make_predictions(rows), classes=names),
            history=history,
            diagnosis=[Finding("imbalance", {}, f"{names[0]} is rare.", (f"more {names[1]}",))],
            mistakes=mistakes,
            facts={names[3]: names[4]},
        )

    return render


@pytest.fixture(scope="module")
def benign(render):
    return render(["cat", "dog", "fox", "owl", "emu"])


@pytest.fixture(scope="module")
def hostile(render):
    return render(HOSTILE)


def test_tags_are_balanced(benign, hostile):
    assert Page(benign).open == []
    assert Page(hostile).open == []


def test_every_section_is_present(benign):
    text = Page(benign).text
    assert [section for section in SECTIONS if section not in text] == []


def test_tiles_show_the_headline_numbers(benign):
    text = Page(benign).text
    assert "Accuracy71.4%" in text  # 5 of 7
    assert "Top-5 accuracy85.7%" in text  # 6 of 7: the one without a prediction has no rank
    assert "Balanced accuracy80.0%" in text  # recall 1/2, 1, 1/2, 1, 1
    assert "Lossnot finite" in text
    assert "Samples7" in text


def test_findings_are_shown_with_their_advice(benign):
    text = Page(benign).text
    assert "Imbalance\ncat is rare.\n\nmore dog" in text


def test_learning_curves_are_left_out_without_history(render, benign):
    without = render(["cat", "dog", "fox", "owl", "emu"], history=())
    assert "Learning curves" not in without
    assert without.count("<figure") == benign.count("<figure") - 1


def test_hostile_text_adds_no_element_and_no_attribute(benign, hostile):
    assert Page(hostile).elements == Page(benign).elements


def test_hostile_text_is_shown(hostile):
    text = Page(hostile).text
    assert "<img src=x onerror=alert(1)>" in text
    assert "\\x00\\x1b[31m\\r\\n\\x9b" in text
    assert "\\u202e{{ 7 * 7 }}{% raw %}\\udcff" in text


def test_report_holds_no_control_character(hostile):
    assert [char for char in hostile if not char.isprintable() and char != "\n"] == []
    hostile.encode()  # an unpaired surrogate would raise


def test_long_names_are_shortened(hostile):
    assert "x" * 201 not in hostile


def test_report_is_self_contained(benign, hostile):
    for html in (benign, hostile):
        page = Page(html)
        without_pictures = re.sub(r'src="data:image/png;base64,[^"]*"', "", html)
        assert not re.search(r"https?:|//|url\(|@import|src=\"", without_pictures)
        assert all(source.startswith("data:image/png;base64,") for source in page.sources)
        assert not {"script", "link", "iframe", "a", "form"} & {tag for tag, _ in page.elements}


def test_content_security_policy_forbids_everything_but_inline(benign):
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in benign
    assert benign.index("Content-Security-Policy") < benign.index("<style>")


def test_every_picture_has_an_alternative_text_and_decodes(benign):
    page = Page(benign)
    pictures = [names for tag, names in page.elements if tag == "img"]
    assert len(pictures) == 4  # loss curve, confusion, recall, reliability
    assert all("alt" in names for names in pictures)
    for source in page.sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()


def test_thumbnails_are_small_pictures(render):
    shapes = [(28, 28, 1), (400, 200, 3), (20, 30, 2), (20, 30, 8)]
    html = render(
        ["cat", "dog", "fox", "owl", "emu"],
        thumbnails=[np.full(shape, 128, np.uint8) for shape in shapes],
    )
    seen = []
    for source in Page(html).sources[-4:]:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            seen.append((image.format, image.mode, image.size))
    assert seen == [
        ("PNG", "L", (28, 28)),  # small ones are lossless
        ("JPEG", "RGB", (64, 128)),  # large ones shrink to 128 pixels
        ("PNG", "L", (30, 20)),  # the first of two channels
        ("PNG", "RGB", (30, 20)),  # the first three of eight
    ]


def test_mistake_without_thumbnail_says_so(benign):
    assert "no picture" in benign


def test_perfect_model_has_no_pairs_and_no_mistakes(make_predictions):
    html = render_report(
        title="perfect",
        metrics=compute_metrics(make_predictions([("a", 0, 0, 1.0, 0.0, 0)]), classes=["cat"]),
        history=[],
        diagnosis=[],
        mistakes=[],
        facts={},
    )
    assert "No class was taken for another." in html
    assert "No mistakes to show." in html
    assert "Nothing was found in the predictions." in html
