"""app.py in headless Chromium: typing, seeds, comparison, messages, downloads, the second tab.

The server runs in this process, with the shipped emoji models and, in runs/, a flow, a Stable
Diffusion of random weights and a broken file.
"""

import io
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

import app
import app_sampling
import checkpoint
import sample
from app_sampling import Settings, read_settings
from command import TINY_ONE_STEP, BadInput
from conftest import ROOT
from formats.images import enlarged, image_grid
from make_checkpoint import make_model
from stable_diffusion import FewStep
from toy.two_points import describe_landing

TEACHER = ROOT / "toy" / "tiny_emoji.safetensors"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 15  # seconds
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(URL, host names that the server's process looked up)."""
    folder, hosts = tmp_path_factory.mktemp("app"), set()
    flow = checkpoint.load(TEACHER)
    flow.kind = "flow"
    (folder / "runs/emoji").mkdir(parents=True)
    checkpoint.save(flow, folder / "runs/emoji/2rf.safetensors")
    checkpoint.save(make_model(), folder / "runs/small.safetensors")
    (folder / "runs/broken.safetensors").write_bytes(b"not a model")
    look_up = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(
            socket, "getaddrinfo", lambda host, *how, **more: hosts.add(host) or look_up(
                host, *how, **more))
        page = app.build_page([TINY_ONE_STEP], torch.device("cpu"), torch.float32)
        yield app.launch(page, "127.0.0.1", 0), hosts
        page.close()


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail("no Chromium: apt-get install chromium, or leave these out: "
                    "make test-no-browser")
    from playwright.sync_api import sync_playwright  # for these tests alone
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, server):
    """A page in a context of its own, with its first image; `page.urls` are its requests."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.urls = []
    page.on("request", lambda request: page.urls.append(request.url))
    page.goto(server[0])
    page.wait_for_selector("#image img")
    yield page
    context.close()


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


def image_in(page, selector: str) -> Image.Image:
    source = page.locator(f"{selector} img").first.get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body()))


def image_with(page, selector: str = "#image", **about) -> np.ndarray:
    """Pixels of the image, as soon as its metadata says what `about` does."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        image = image_in(page, selector)
        if all(image.text[key] == str(value) for key, value in about.items()):
            return np.asarray(image)
        page.wait_for_timeout(50)
    pytest.fail(f"no image of {about}; the last one is of {image.text}")


def number(page, name: str):
    return page.get_by_label(name, exact=True)


def prompt_box(page):
    return page.get_by_label("Prompt", exact=False).first


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def choose_model(page, name: str) -> None:
    page.get_by_label("Model").click()
    page.get_by_role("option", name=name).click()


# --------------------------------------------------------------------------------------------------
# In the browser


@pytest.mark.browser
def test_image_changes_while_typing(page):
    first = image_with(page, prompt="red apple")
    prompt_box(page).fill("")
    image_with(page, prompt="")
    assert "unconditional" in page.locator("#status").inner_text()
    prompt_box(page).press_sequentially("penguin", delay=20)  # without Enter
    assert (image_with(page, prompt="penguin", steps=1) != first).any()
    assert " ms · 1 step · 1 NFE" in page.locator("#status").inner_text()
    prompt_box(page).fill("a cat and a dog and a pear and an apple and a castle")
    page.get_by_text("the prompt is cut").wait_for()
    page.get_by_role("button", name="castle", exact=True).click()  # an example
    image_with(page, prompt="castle")


@pytest.mark.browser
def test_seed_fixes_the_image(page):
    first = image_with(page, seed=0)
    number(page, "Seed").fill("7")
    assert (image_with(page, seed=7) != first).any()
    number(page, "Seed").fill("0")
    assert (image_with(page, seed=0) == first).all()


@pytest.mark.browser
def test_compare_shows_teacher_flow_and_one_step_model(page):
    one_step = image_with(page)
    press(page, "Compare")
    page.get_by_text("2-RF: end-point estimate").wait_for()
    expected = (("diffusion", "Teacher", "25 steps · 50 NFE", "tiny_emoji.safetensors"),
                ("flow", "2-RF", "25 steps · 50 NFE", "2rf.safetensors"),
                ("one-step", "One step", "1 step · 1 NFE", "tiny_emoji_instaflow.safetensors"))
    images = []
    for kind, title, cost, model in expected:
        text = page.locator(f"#{kind}").inner_text()
        assert title in text and cost in text and " ms" in text
        images.append(image_with(page, f"#{kind}", model=model, prompt="red apple", seed=0))
    assert (images[2] == one_step).all()
    assert (images[0] != images[1]).any() and (images[0] != images[2]).any()
    for k in range(2):  # the paths: 25 images in rows of 13
        source = page.locator(".strip img").nth(k).get_attribute("src")
        assert Image.open(io.BytesIO(page.request.get(source).body())).size == (1692, 262)


@pytest.mark.browser
def test_compare_says_how_to_make_a_missing_model(page):
    choose_model(page, "tiny_instaflow")
    image_with(page, model="tiny_instaflow.safetensors", prompt="a red circle above a blue square")
    press(page, "Compare")
    page.get_by_text("--teacher toy/tiny_sd.safetensors").wait_for()
    image_with(page, "#diffusion", model="tiny_sd.safetensors")
    image_with(page, "#one-step", model="tiny_instaflow.safetensors")


@pytest.mark.browser
def test_four_seeds(page):
    number(page, "Seed").fill("3")
    press(page, "Four seeds")
    page.get_by_text("seed 6").wait_for()
    images = page.locator("#gallery img")
    sources = [images.nth(k).get_attribute("src") for k in range(images.count())]
    files = [Image.open(io.BytesIO(page.request.get(source).body())) for source in sources]
    assert [file.text["seed"] for file in files] == ["3", "4", "5", "6"]
    assert len({file.tobytes() for file in files}) == 4


@pytest.mark.browser
def test_download_is_what_sample_writes(page, call):
    prompt_box(page).fill("penguin")
    number(page, "Seed").fill("5")
    image_with(page, prompt="penguin", seed=5)
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "penguin-seed-5.png"
    downloaded = Image.open(download.value.path())
    assert call(sample.main, "--prompt", "penguin", "--seed", 5, "--num-images", 1, "--model",
                TINY_ONE_STEP, "--device", "cpu", "--dtype", "fp32")[0] == 0
    written = Image.open("out.png")
    assert downloaded.text == written.text
    assert (np.asarray(downloaded) == np.asarray(written)).all()


@pytest.mark.browser
def test_bad_value_is_a_message(page):
    for field, value, message, good in (
        ("Seed", "-1", "must be a whole number of at least 0", "1"),
        ("Steps", "5", "is a one-step model", "1"),
        ("Steps", "0", "must be a whole number of at least 1", "1"),
        ("Guidance", "-2", "must be a number of at least 0", "1"),
        ("Size", "30", "must be a multiple of 8, such as 32", "40"),
        ("Size", "4096", "must be at most 128", "32"),
    ):
        number(page, field).fill(value)
        number(page, field).press("Enter")  # the size waits for it
        page.get_by_text(message).first.wait_for()
        number(page, field).fill(good)
        number(page, field).press("Enter")
        prompt_box(page).fill(f"castle {message}")
        image_with(page, prompt=f"castle {message}")
    assert "Traceback" not in page.locator("body").inner_text()


@pytest.mark.browser
def test_switching_models_brings_their_own_settings(page):
    for name, family_prompt, steps in (("tiny_sd", "a red circle above a blue square", 25),
                                       ("tiny_emoji_instaflow", "red apple", 1),
                                       ("2rf", "red apple", 25),
                                       ("tiny_instaflow", "a red circle above a blue square", 1)):
        choose_model(page, name)
        image_with(page, model=f"{name}.safetensors", prompt=family_prompt, steps=steps)
        assert number(page, "Steps").input_value() == str(steps)
    assert page.get_by_text("Warning").count() == 0


@pytest.mark.browser
def test_broken_model_leaves_the_page_and_the_previous_model(page):
    choose_model(page, "broken")
    page.get_by_text("not a complete safetensors file").first.wait_for()
    assert "tiny_emoji_instaflow" in page.get_by_label("Model").input_value()
    prompt_box(page).fill("rainbow")
    image_with(page, prompt="rainbow", model="tiny_emoji_instaflow.safetensors")


@pytest.mark.browser
def test_slow_model_waits_for_enter(page):
    choose_model(page, "small")
    page.get_by_text("25 steps: press Enter to sample").wait_for()
    assert image_in(page, "#image").text["model"] == "tiny_emoji_instaflow.safetensors"
    number(page, "Steps").fill("2")
    prompt_box(page).fill("house")
    page.get_by_text("2 steps: press Enter to sample").wait_for()
    prompt_box(page).press("Enter")
    image_with(page, model="small.safetensors", prompt="house", steps=2)


@pytest.mark.browser
def test_two_visitors_get_their_own_images(browser, server):
    with opened(browser, server) as one, opened(browser, server) as two:
        for k in range(3):
            prompt_box(one).fill("penguin " * k + "cactus")
            prompt_box(two).fill("rainbow " * k + "castle")
        image_with(one, prompt="penguin penguin cactus")
        image_with(two, prompt="rainbow rainbow castle")


# The image is missing while the page still draws it.
NEW_FIGURE = """old => {
    const image = document.querySelector("#figure img");
    return image && !old.includes(image.src);
}"""


@pytest.mark.browser
def test_second_tab_follows_slider_and_switch(page):
    page.get_by_role("tab", name="Why one step works").click()
    figures = []

    def figure_where(landing):
        page.locator("#landing").get_by_text(landing).wait_for()
        page.wait_for_function(NEW_FIGURE, arg=figures)
        figures.append(page.locator("#figure img").get_attribute("src"))

    figure_where("(+1.00, +0.00)")  # one step of random pairs: between the targets
    page.locator("#steps input[type=number]").fill("2")
    figure_where("(+1.00, +0.50)")
    page.get_by_label("after reflow").click()
    figure_where("(+1.00, +1.00)")
    page.locator("#steps input[type=number]").fill("1")  # one step is enough
    page.wait_for_function(NEW_FIGURE, arg=figures)
    assert page.locator("#landing").inner_text().count("on a target") == 2


@pytest.mark.browser
def test_no_request_leaves_the_loopback(page, server):
    prompt_box(page).fill("castle")
    image_with(page, prompt="castle")
    press(page, "Four seeds")
    page.get_by_text("seed 3").wait_for()
    page.get_by_role("tab", name="Why one step works").click()
    page.wait_for_selector("#figure img")
    page.wait_for_timeout(500)
    schemes, hosts = zip(*((urlsplit(u).scheme, urlsplit(u).hostname) for u in page.urls))
    assert len(hosts) > 50 and set(hosts) <= {"127.0.0.1", None}
    assert set(schemes) <= {"http", "data", "blob"}
    assert {str(host) for host in server[1]} <= {"127.0.0.1", "localhost", "None"}


# --------------------------------------------------------------------------------------------------
# Without a browser


def test_without_gradio_one_line_says_what_to_install(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    main = runpy.run_path(str(ROOT / "app.py"))["main"]
    code, out, err = call(main)
    assert (code, out) == (2, "")
    assert err == "error: the page needs gradio: pip install -r requirements-app.txt"


def test_missing_model_is_one_line(call):
    code, out, err = call(app.main, "--model", "nowhere.safetensors")
    assert code == 2 and "nowhere.safetensors: no such file or folder" in err


def heed_interrupts():
    """In the new process: a background shell's children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_command_serves_at_the_next_free_port_until_interrupted(tmp_path, monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)  # of other pages
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = subprocess.Popen([sys.executable, ROOT / "app.py", "--port", str(port)],
                                   cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                   preexec_fn=heed_interrupts)
        url = process.stdout.readline().split()[0]
        try:
            assert urlsplit(url).hostname == "127.0.0.1" and urlsplit(url).port > port
            assert b"InstaFlow from scratch" in urlopen(url).read()
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 0


def test_models_in_use_or_half_written_and_the_commands_that_make_others(call, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("runs/.2rf.tmp", "runs/shard-00000", "shard-house"):
        shutil.copy(ROOT / "toy/tiny_emoji.safetensors", tmp_path / f"{name}.safetensors")
    own = str(tmp_path / "shard-house.safetensors")
    found = app_sampling.find_models([own])
    assert [path for path in found if path.startswith(str(tmp_path))] == [own]
    flow = checkpoint.load(own, kind="flow")
    checkpoint.save(flow, "runs/2rf.safetensors")
    command = app_sampling.command_to_make(app_sampling.find_models([own]), own, "one-step")
    assert "--teacher runs/2rf.safetensors" in command


def test_few_step_model_takes_its_steps_and_no_guidance():
    model = checkpoint.load(TEACHER, "meta")
    model.few_step = FewStep("renoise", 4, (1, 2, 4, 8))
    assert read_settings(model, 0, 8, 1, 32) == Settings(0, 8, 1.0, (32, 32))
    with pytest.raises(BadInput, match="not trained for this number"):
        read_settings(model, 0, 3, 1, 32)
    with pytest.raises(BadInput, match="trained with its teacher's guidance"):
        read_settings(model, 0, 4, 2.5, 32)


def test_strip_ends_at_the_image():
    model = checkpoint.load(TEACHER)
    strip = app_sampling.path_strip(model, "castle", Settings(3, 4, 2.5, (32, 32)))
    image = sample.sample_images(model, ["castle"], [3], 4, 2.5, solver="ddim")
    last = image_grid(enlarged(image), 1)
    assert strip.shape == (132, 4 * 130 + 2, 3)
    assert (np.abs(strip[2:-2, -130:-2].astype(int) - last) <= 1).all()


def test_landing_is_on_the_targets_after_many_steps_or_reflow():
    assert describe_landing("random pairs", 1).count("1.00 from the nearest target") == 2
    assert describe_landing("random pairs", 32).count("on a target") == 2
    assert describe_landing("after reflow", 1).count("on a target") == 2
