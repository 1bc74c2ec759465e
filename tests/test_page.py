"""The page: odd prompts, many visitors at once, and a browser."""

import contextlib
import dataclasses
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.test_talk import talk  # noqa: F401
from tools import page
from utils.support.artefacts import save_artefact
from utils.talk import AFTER, BEFORE, Talk

TRACE = re.compile(r"Traceback|File \"|Error:|/(?:home|root|tmp|usr)/|\.py\b")


def odd_prompts():
    """Two hundred prompts that nobody means, or that somebody means too well."""
    rng = random.Random(0)
    scripts = "好是 кино فيلم סרט ภาพ 映画 한국 हिन्दी ελλ 😀👩\u200d👧 ﷽ Z̵͑a̷l̴g̸o"
    fixed = [
        *("", " ", "\n\t", "\x00", "\ufeff", "\u202e reversed", "\ud83d", "�"),
        *("a" * 10_000, "the film is " * 900, "x " * 1_999, "é" * 700, "😀" * 400),
        *("<|endoftext|>", "so <|endoftext|> dull", "<|endoftext", "</s>", "<pad>"),
        *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;b&gt;"),
        *("'; DROP TABLE films; --", "{0}", "{prompt}", "%s%n", "$(ls)", "../../etc"),
        *("$\\frac{1}{0}$", "# title\n\n| a | b |", "[x](javascript:alert(1))", "nan"),
        *(None, 5, 0.5, True, [], ["the film"], {"a": 1}),
    ]
    fixed += scripts.split()
    while len(fixed) < 200:
        letters = [chr(rng.choice([rng.randrange(32), rng.randrange(0x3000)]))]
        letters += [chr(rng.randrange(0xD800)) for _ in range(rng.randrange(40))]
        letters += rng.sample(["the", "film", "is", "dull"], rng.randrange(4))
        fixed.append(" ".join(letters))
    return fixed


def test_two_hundred_odd_prompts_get_a_text_or_a_sentence(talk):  # noqa: F811
    """No exception, no trace, no tag but our own; and all of it ends."""
    models = (*talk.models.values(), talk.reward_model, talk.tokenizer)
    short = Talk(*models, dataclasses.replace(talk.settings, max_new_tokens=2))
    prompts, said = odd_prompts(), []
    for prompt in prompts:
        *_, last = page.answers(short, prompt, 1.0, 0)
        assert len(last) == 2
        for place in last:
            assert not TRACE.search(place.replace(str(prompt), "")), place[:300]
            tags = set(re.findall(r"<(/?\w+)", place))
            assert tags <= {"p", "/p", "b", "/b", "br", "span", "/span"}, place[:300]
            place.encode("utf8")  # as it is sent
        said.append(last[0])
    refused = [place for place in said if "reward" not in place]
    assert len(said) == 200 and 8 < len(refused) < 100
    assert sum("the prompt is empty" in place for place in refused) >= 5
    assert sum("which ends a text; take it out" in place for place in refused) == 2
    assert sum("characters, and 2,000 are read" in place for place in refused) == 3


@pytest.mark.parametrize(
    "temperature, seed, said",
    [
        (9, 0, "temperature must be from 0.1 to 2, got 9.0"),
        (1, -1, "seed must be from 0 to"),
        (1, 2**40, "seed must be from 0 to"),
        (None, 0, "temperature and seed must be numbers"),
        (1, "<b>", "invalid literal .*&lt;b&gt;"),
        (1, float("inf"), "must be numbers"),
    ],
)
def test_numbers_out_of_range_are_a_sentence(talk, temperature, seed, said):  # noqa: F811
    *_, last = page.answers(talk, "the film", temperature, seed)
    assert re.search(said, last[0]) and last[0] == last[1]


def test_the_texts_grow_until_they_are_whole(talk):  # noqa: F811
    *growing, last = page.answers(talk, "the film is", 1.0, 4)
    replies = talk.write("the film is", 1.0, 4)
    for place, reply in enumerate(replies.values()):
        texts = [re.sub(r"<[^>]*>", "", step[place]) for step in growing]
        assert all(
            new.startswith(old) for old, new in zip(texts, texts[1:], strict=False)
        )
        assert texts[-1].endswith(reply.text)
        assert f"reward {reply.reward:+.2f}" in last[place]


def test_without_gradio_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        page.main([])
    said = capsys.readouterr().err
    assert "gradio is missing; pip install -r tools/page-requirements.txt" in said


START = """
import sys
from pathlib import Path
from tools import page
from utils.settings import TINY
import dataclasses
page.load_settings = lambda preset: dataclasses.replace(TINY, runs_dir=sys.argv[1])
page.main(["--port", sys.argv[2]])
"""


@pytest.fixture(scope="module")
def served(talk, tmp_path_factory):  # noqa: F811
    """The page in a process of its own: its address and its process."""
    pytest.importorskip("gradio", reason="pip install -r tools/page-requirements.txt")
    runs = tmp_path_factory.mktemp("runs")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as place:
        port = place.getsockname()[1]
    settings = dataclasses.replace(talk.settings, runs_dir=str(runs))
    models = {"sft": talk.models[BEFORE], "policy": talk.models[AFTER]}
    for name, model in {**models, "reward_model": talk.reward_model}.items():
        save_artefact(settings, name, model, talk.tokenizer, {})
    log = (runs / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(runs), str(port)],
        cwd=ROOT,
        stdout=log,
        stderr=log,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(180):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=5).close()
                break
            assert process.poll() is None, (runs / "log").read_text()[-3000:]
            time.sleep(1)
        yield address, process, runs / "log"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_person_types_sees_both_texts_and_changes_the_seed(served, tmp_path):
    """In Chromium, by its driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    driver_file = Path("/usr/bin/chromedriver")
    if not driver_file.exists():
        pytest.skip("there is no Chromium with its driver")
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--window-size=1100,800"):
        options.add_argument(option)
    service = webdriver.ChromeService(str(driver_file))
    browser = webdriver.Chrome(options, service)
    try:
        browser.get(served[0])
        wait = WebDriverWait(browser, 60)

        def field(name):
            find = f"#{name} textarea, #{name} input"
            return wait.until(lambda b: b.find_element(By.CSS_SELECTOR, find))

        def fill(name, text):
            field(name).send_keys(Keys.CONTROL, "a")
            field(name).send_keys(text)

        def texts(holding, unlike=("", "")):
            """Both texts, once both hold these words and neither is the old one."""
            browser.find_element(By.ID, "write").click()

            def done(b):
                found = [b.find_element(By.ID, x).text for x in ("before", "after")]
                pairs = zip(found, unlike, strict=True)
                new = all(holding in one and one != old for one, old in pairs)
                return found if new and not found[0].startswith("before PPO …") else 0

            return wait.until(done)

        fill("prompt", "the acting")
        first = texts("reward")
        assert all("the acting" in text for text in first)
        assert first[0].startswith("before PPO") and first[1].startswith("after PPO")
        browser.save_screenshot(str(tmp_path / "page.png"))
        fill("seed", "5")
        second = texts("reward", unlike=first)
        assert all("the acting" in text for text in second)
        fill("prompt", "<b>bold</b>")
        texts("<b>bold</b>", unlike=second)
        fill("prompt", " ")
        texts("the prompt is empty; write the first words")
        browser.save_screenshot(str(tmp_path / "empty.png"))
    finally:
        browser.quit()


@pytest.mark.slow
def test_twenty_visitors_with_twenty_prompts_each(served, report):
    """All at once on loopback: all answered, and the memory stays where it is."""
    client = pytest.importorskip("gradio_client", reason="comes with gradio")
    address, process, log = served
    server, seconds, lock = psutil.Process(process.pid), [], threading.Lock()

    def visit(number):
        visitor = client.Client(address, verbose=False)
        for i in range(20):
            started = time.perf_counter()
            before, after = visitor.predict(
                f"the film {number}", 1.0, 20 * number + i, api_name="/write"
            )
            assert "reward" in before and "reward" in after
            with lock:
                seconds.append(time.perf_counter() - started)

    visit(0)
    used = [server.memory_info().rss]
    started = time.perf_counter()
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(visit, range(20)))
    wall = time.perf_counter() - started
    used.append(server.memory_info().rss)
    assert len(seconds) == 20 + 400
    assert used[1] < 1.25 * used[0]
    slowest, middle = max(seconds), sorted(seconds)[len(seconds) // 2]
    odd = client.Client(address, verbose=False)
    prompts = [p for p in odd_prompts() if isinstance(p, str) and p != "\ud83d"]
    for prompt in prompts:  # that one is no UTF-8, and cannot be sent
        said = odd.predict(prompt, 1.0, 0, api_name="/write")[0]
        assert said and not TRACE.search(said.replace(prompt, ""))
    assert "Traceback" not in log.read_text()
    report(
        "20 visitors x 20 prompts",
        f"{wall:.0f} s for 400, median {middle:.1f} s, slowest {slowest:.1f} s; memory "
        f"{used[0] / 2**20:.0f} MiB before, {used[1] / 2**20:.0f} MiB after",
    )
