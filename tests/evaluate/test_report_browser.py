"""The page in a real headless Chromium: sliders move pictures, nothing is said, nothing is asked for, nothing jumps."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import browsing, find_browser, photograph
from tests.support.evaluations import BASE, variant, write_evaluation
from texforce_hub.evaluate.report.page import make_report, write_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed here")

HOSTILE = "</script><script>console.log('in')</script><img src=x onerror=console.log(1)>"
COLOUR, SHAPE = (
    {"label": label, "values": values} for label, values in (("shapes-colour", [0, 0.5, 1]), ("shapes-shape", [0, 1]))
)
SHOWN = """[...document.querySelectorAll('.card')].map(
    card => [...card.querySelectorAll('.after')].filter(image => !image.hidden).map(image => image.alt).join())"""

SHIFTS = """new Promise(done => {
    let sum = 0;
    const add = list => { for (const entry of list.getEntries()) sum += entry.value };
    new PerformanceObserver(add).observe({type: 'layout-shift', buffered: true});
    requestAnimationFrame(() => setTimeout(() => done(sum), 100));
})"""
BEYOND = """[...document.querySelectorAll('main *')].filter(
    element => !element.closest('.scroll, .table') && element.getBoundingClientRect().right > innerWidth + 1).length"""
TURN = "(control => {{ control.value = {!r}; control.dispatchEvent(new Event({!r})) }})(document.querySelector({!r}))"


def write_folder(path):
    """A stack, a sweep of its weight, and a pad of two."""
    path.mkdir()
    variants = [BASE, variant("colour", "c1", "shapes-colour"), variant(HOSTILE, "hostile", "shapes-colour:0.3")]
    variants.append(variant("half", "c05", "shapes-colour:0.5", sweep=0, position=[0.5]))
    pad = [f"{x} {y}" for y in (0, 1) for x in (0, 0.5, 1)]
    variants += [variant(name, f"pad{i}", "a:2", sweep=1) for i, name in enumerate(pad)]
    sweeps = [
        {"stack": "colour", "axes": [COLOUR], "variants": ["base", "half", "colour"]},
        {"stack": "two", "axes": [COLOUR, SHAPE], "variants": pad},
    ]
    prompts = [HOSTILE, *(f"prompt {number}" for number in range(1, 9))]
    return write_evaluation(path, variants=variants, prompts=prompts, sweeps=sweeps)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_report(make_report([write_folder(folder / "e")], words=0), folder / "page.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(find_browser(), tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, file):
    browser.open(file.as_uri())
    return browser


def box_of(page, selector):
    """Where an element lies on the page, in pixels."""
    return page.evaluate(
        f"(box => ({{x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height}}))"
        f"(document.querySelector({selector!r}).getBoundingClientRect())"
    )


def pixels(page, selector):
    """What an element looks like."""
    return np.asarray(Image.open(io.BytesIO(page.photograph(clip=box_of(page, selector)))).convert("RGB"), dtype=int)


def test_the_divider_moves_by_the_arrow_keys(page):
    page.evaluate("document.querySelector('.divider').focus()")
    before = pixels(page, ".compare")
    for _ in range(30):
        page.press("ArrowRight")
    after = pixels(page, ".compare")
    assert page.evaluate("document.querySelector('.divider').value") == "80"
    width = before.shape[1]
    assert np.array_equal(before[20, : width // 3], after[20, : width // 3])  # left of both positions
    assert not np.array_equal(before[20, width * 3 // 5], after[20, width * 3 // 5])  # between them
    assert np.array_equal(before[20, width * 9 // 10], after[20, width * 9 // 10])  # right of both


def test_the_divider_moves_by_the_mouse(page):
    box = box_of(page, ".compare")
    at = {"x": box["x"] + box["width"] * 0.2, "y": box["y"] + 30, "button": "left", "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, **at)
    assert 10 < int(page.evaluate("document.querySelector('.divider').value")) < 30


def test_the_weight_moves_every_picture(page):
    assert page.evaluate(SHOWN)[1] == "colour: prompt 1"
    page.evaluate("document.querySelector('.ranges input').focus()")
    before = pixels(page, ".compare")
    page.press("ArrowLeft")
    assert not np.array_equal(before, pixels(page, ".compare"))
    assert [alt.partition(":")[0] for alt in page.evaluate(SHOWN)] == ["half"] * 9
    assert page.evaluate("document.querySelector('.right').textContent") == "shapes-colour at 0.5"
    assert page.evaluate("[...document.querySelectorAll('.dot')].map(dot => dot.matches('.on'))") == [
        False,
        True,
        False,
    ]
    page.press("ArrowLeft")  # the base: nothing lies over it
    assert page.evaluate(SHOWN) == [""] * 9


def test_the_pad_takes_two_weights_by_keys_and_by_the_mouse(page):
    page.evaluate("document.querySelectorAll('.sweep')[1].querySelectorAll('input')[0].focus()")
    page.press("ArrowLeft")
    assert page.evaluate(SHOWN)[1] == "0.5 1: prompt 1"
    page.evaluate("document.querySelector('.pad').scrollIntoView({behavior: 'instant'})")
    box = page.evaluate("(b => [b.x, b.y, b.width, b.height])(document.querySelector('.pad').getBoundingClientRect())")
    at = {"x": box[0] + box[2] * 0.9, "y": box[1] + box[3] * 0.9, "button": "left", "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, **at)
    assert page.evaluate(SHOWN)[1] == "1 0: prompt 1"


def test_a_stack_is_chosen_and_prompts_are_ordered_and_found(page):
    page.evaluate("document.querySelectorAll('.choices input')[1].click()")
    assert page.evaluate(SHOWN)[1].startswith("</script>")
    page.evaluate(TURN.format("gain", "change", ".order"))
    gains = page.evaluate("[...document.querySelectorAll('.card')].map(card => gainOf(card))")
    assert gains == sorted(gains, reverse=True)
    page.evaluate(TURN.format("PROMPT 3", "input", ".find"))
    assert page.evaluate("[...document.querySelectorAll('.card')].filter(card => !card.hidden).length") == 1


def test_nothing_is_said_nothing_is_asked_for_and_strangers_texts_do_not_run(page, file):
    assert page.said == []
    assert {address for address in page.asked if not address.startswith("data:")} == {file.as_uri()}
    assert page.evaluate("document.scripts.length") == 1


def test_every_control_is_reached_by_tab(page):
    controls = "a[href], input:not([type=radio]), select, summary"
    wanted = page.evaluate(f"[...document.querySelectorAll({controls!r})].filter(e => e.checkVisibility()).length")
    seen = set()
    for _ in range(wanted + 15):
        page.press("Tab")
        seen.add(page.evaluate(f"[...document.querySelectorAll({controls!r})].indexOf(document.activeElement)"))
    assert len(seen - {-1}) == wanted


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_jumps_and_nothing_is_cut(page, file, width):
    page.open(file.as_uri(), width)
    assert page.evaluate(SHIFTS) == 0
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(BEYOND) == 0


def test_who_likes_it_dark_gets_it_dark(page):
    corners = {}
    for scheme in ("light", "dark"):
        page.resize(1280, scheme=scheme)
        corners[scheme] = np.asarray(Image.open(io.BytesIO(page.photograph())).convert("L"))[5, 5]
    assert corners["light"] > 240
    assert corners["dark"] < 40


def test_who_likes_no_motion_gets_none(page):
    scrolling = "getComputedStyle(document.documentElement).scrollBehavior"
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    assert page.evaluate(scrolling) == "auto"


def test_the_command_that_takes_the_documents_picture_takes_a_small_one(file, tmp_path):
    photograph(file, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        assert image.size == (1280, 1200)
    assert (tmp_path / "report.png").stat().st_size < 200_000
