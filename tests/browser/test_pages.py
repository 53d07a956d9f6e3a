"""Pages as they are seen: nothing sticks out, texts can be read in both colour schemes, and nothing fails to load."""

import threading

import pytest
from look import Look

DOCS = ["index.html", "methods/dora.html", "how-to/inspect.html"]
WIDE = ["methods.html", "interchange.html", "claims.html", "benchmarks.html"]  # of tables


def check(look):
    assert look.overflow() == []
    assert look.low_contrast() == []
    assert look.faults == []


@pytest.fixture(scope="session")
def report(word_model, colour_rows, tmp_path_factory):
    """The page of a comparison of two recipes."""
    import json

    from veneer.cli import main

    folder = tmp_path_factory.mktemp("compared")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in colour_rows(60)))
    (folder / "general.txt").write_text("say the colour of sky red blue green " * 60)
    given = ["--model", str(word_model), "--data", str(folder / "rows.jsonl"), "--general", str(folder / "general.txt")]
    budget = ["--steps", "3", "--seeds", "2", "--lr", "1e-2", "--rank", "2", "--batch-size", "4", "--answers", "2"]
    with pytest.raises(SystemExit) as stop:
        main.run(["compare", "lora", "dora", *given, *budget, "--out", str(folder / "out")])
    assert stop.value.code == 0
    return folder / "out" / "report.html"


def test_a_comparison_reads_well(look, report):
    check(look.open(report.as_uri()))
    exact = look.page.locator('figure svg[aria-label="exact answers"]').count()  # drawn where recipes differ in it
    assert look.page.locator("figure svg").count() == 7 + 4 * exact  # losses, one against three costs, and curves
    assert all(box["width"] > 200 for box in (f.bounding_box() for f in look.page.locator("figure svg").all()))
    assert look.page.locator(".legend li").all_inner_texts() == ["lora", "dora"]
    drawn = look.page.evaluate("getComputedStyle(document.querySelector('figure text')).fill")
    assert drawn == look.page.evaluate("getComputedStyle(document.querySelector('.quiet')).color")  # of the scheme


def test_a_comparison_prints_within_the_page(browser, report):
    look = Look(browser, 718, "light")  # A4 less its margins
    look.page.emulate_media(media="print")
    look.open(report.as_uri())
    assert look.overflow() == []
    look.context.close()


@pytest.mark.parametrize("path", DOCS)
def test_the_documentation_reads_well(look, site, path):
    look.open((site / path).as_uri())
    assert look.overflow() == []
    assert look.low_contrast() == []
    assert [f for f in look.faults if "search" not in f and "Worker" not in f] == []  # searching needs a server


@pytest.mark.parametrize("path", WIDE)
def test_wide_tables_scroll_in_their_own_frame_on_a_phone(browser, site, path):
    look = Look(browser, 390, "light").open((site / path).as_uri())
    assert look.overflow() == []
    look.context.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a server with two adapters on a tiny model."""
    uvicorn = pytest.importorskip("uvicorn", reason="serving is not installed: pip install 'veneer[serve]'")
    import torch
    import transformers

    import veneer
    from veneer.serve.app import Settings, build
    from veneer.serve.engine import Engine, Limits
    from veneer.serve.trunk import Trunk

    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": None}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=89, **sizes)).eval()
    for name in ("colours", "a-name-that-is-rather-long-for-a-phone"):
        adapter = veneer.attach(base, "lora", rank=2)
        adapter.save(root / name)
        adapter.detach()
    engine = Engine(Trunk(base), 3000, tokens=4, limits=Limits(batch=4, queue=6))
    app = build(engine, Letters(), Settings("tiny", root, None, watch=0.1))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


class Letters:
    """A tokenizer of one character a token."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text):
        return {"input_ids": [2 + (ord(c) - 32) % 87 for c in text]}

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(30 + t) for t in tokens)


def test_the_chat_page_answers_and_reads_well(look, served):
    page = look.open(served).page
    page.wait_for_function("document.querySelectorAll('datalist option').length === 3")
    check(look)
    for box, name in zip(page.locator("section input").all(), ("tiny", "a-name-that-is-rather-long-for-a-phone")):
        box.fill(name)
    page.evaluate(  # a few tokens are enough
        "() => { const f = window.fetch; window.fetch = (u, o) => f(u, o && o.body ? "
        "{ ...o, body: o.body.replace('\"max_tokens\":512', '\"max_tokens\":40') } : o); }"
    )
    page.locator("#say").fill("what is the colour of the sky")
    page.locator("#send").click()
    page.wait_for_function(
        "[...document.querySelectorAll('.note')].every((n) => n.textContent.includes('first token'))"
    )
    assert all(len(answer.text_content()) > 5 for answer in page.locator(".answer").all())
    check(look)


def test_the_check_itself_sees_what_sticks_out_and_what_cannot_be_read(browser):
    look = Look(browser, 390, "light")
    look.page.set_content("<p style='width:500px;color:#bbb;background:#fff'>hardly</p><script>fail()</script>")
    assert look.overflow() and look.low_contrast() and look.faults
    look.context.close()
